"""The records that the state is made of. They change only under its lock, in ``_state``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from snapstore._latency import Latencies, Reasons
from snapstore._memory import HostImage
from snapstore._ticket import SaveTicket
from snapstore._types import Framework, SnapshotInfo, SnapshotKey


@dataclass(slots=True, eq=False)
class Commit:
    """A committed snapshot in the index, and the blocks that it takes on disk."""

    info: SnapshotInfo
    disk_bytes: int


@dataclass(slots=True, eq=False)
class Life:
    """One generation of a request id. Its fields change only under the state lock.

    ``committed_bytes``, ``disk_bytes``: sums over ``committed``, so that its end takes no longer the more there is.
    """

    request_id: str
    generation: int
    alive: bool = True
    busy: bool = False
    on_disk: bool = False
    swept: bool = False
    sweep_error: OSError | None = None
    committed_bytes: int = 0
    disk_bytes: int = 0
    doomed_bytes: int = 0
    waiting: int = 0
    staging: set[Job] = field(default_factory=set)
    pending: dict[int, Job] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)
    committed: dict[int, Commit] = field(default_factory=dict)
    failed: dict[int, BaseException] = field(default_factory=dict)

    @property
    def settled(self) -> bool:
        """The sweeper is done with it, or failed. Read without the lock: it may be learnt of late."""
        return self.swept or self.sweep_error is not None

    @property
    def empty(self) -> bool:
        return not (
            self.waiting or self.staging or self.pending or self.committed or self.failed or self.busy
        )


class Content(NamedTuple):
    """What goes into the file's header beside the key."""

    framework: Framework
    metadata_json: str


@dataclass(slots=True, eq=False)
class Job:
    """One accepted save. ``sequence`` is the order of acceptance; ``holds`` counts those who read its memory.

    ``on_its_way``: devices' threads bring it to the host; they say when its sources are released. ``fetched``: it came
    from the remote store.
    """

    life: Life
    ticket: SaveTicket
    sequence: int
    since_s: float
    image: HostImage | None = None
    holds: int = 1
    content: Content | None = None
    on_its_way: bool = False
    fetched: bool = False

    @property
    def key(self) -> SnapshotKey:
        return self.ticket.key

    @property
    def nbytes(self) -> int:
        return self.ticket.nbytes


@dataclass(slots=True, eq=False)
class Turn:
    """A save that waits for room, in the order of arrival. It keeps the life alive that it is to belong to."""

    life: Life
    key: SnapshotKey
    nbytes: int
    content: Content
    started_s: float
    deadline_s: float


@dataclass(slots=True, eq=False)
class End:
    """The remote end of a cleanup: once ``recorded`` on the local disk, it comes, whatever becomes of this process."""

    recorded: bool = False
    error: BaseException | None = None

    @property
    def settled(self) -> bool:
        """Recorded, or it can not be. Read without the lock: it may be learnt of late."""
        return self.recorded or self.error is not None


@dataclass(slots=True)
class Cleanup:
    """What ``begin_cleanup`` ended: the lives to wait for, and the figures of the report."""

    lives: list[Life] = field(default_factory=list)
    end: End | None = None
    cancelled: int = 0
    removed: int = 0
    removed_bytes: int = 0

    @property
    def waits(self) -> list[Life | End]:
        """All that has to be settled before the cleanup is over."""
        return [*self.lives, self.end] if self.end is not None else [*self.lives]


class Published(NamedTuple):
    """One moment: made whole under the lock at the end of each transition, read without it."""

    accepted: int = 0
    accepted_bytes: int = 0
    committed: int = 0
    committed_bytes: int = 0
    cancelled: int = 0
    cancelled_bytes: int = 0
    failed: int = 0
    failed_bytes: int = 0
    pending: int = 0
    pending_bytes: int = 0
    rejected: int = 0
    rejected_bytes: int = 0
    in_flight: int = 0
    cancelled_in_hand: int = 0
    live_requests: int = 0
    live_snapshots: int = 0
    session_bytes: int = 0
    trash_bytes: int = 0
    cleanup_timeouts: int = 0
    writer_restarts: int = 0
    oldest_since_s: float | None = None
    writing_since_s: float | None = None
    last_error: str | None = None
    free_bytes: int | None = None
    closing: str | None = None
    latencies: Latencies = Latencies()
    failures: Reasons = Reasons()
    rejections: Reasons = Reasons()
