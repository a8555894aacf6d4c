"""The words of snapstore: keys, states, and the frozen records that its calls return."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Framework = Literal["numpy", "torch", "mlx"]
Source = Literal["memory", "disk", "remote"]
HealthStatus = Literal["ok", "degraded", "stuck", "dead"]
DeviceStatus = Literal["ok", "stuck", "lost"]
RemoteStatus = Literal["opening", "ok", "unreachable", "closed"]
JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


class SaveState(enum.Enum):
    """Where an accepted save stands: ``STAGING -> QUEUED -> WRITING -> COMMITTED | CANCELLED | FAILED``."""

    STAGING = "staging"
    QUEUED = "queued"
    WRITING = "writing"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def settled(self) -> bool:
        """True in the three states that nothing leaves."""
        return self in _SETTLED


_SETTLED = frozenset({SaveState.COMMITTED, SaveState.CANCELLED, SaveState.FAILED})


@dataclass(frozen=True, slots=True, order=True)
class SnapshotKey:
    """One boundary of one request."""

    request_id: str
    token_count: int

    def __str__(self) -> str:
        shown = self.request_id if len(self.request_id) <= 64 else self.request_id[:61] + "..."
        return f"{shown!r} at {self.token_count} tokens"


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A committed snapshot. ``nbytes`` counts tensor bytes; the file is larger by its header."""

    key: SnapshotKey
    generation: int
    path: Path
    nbytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A loaded snapshot. The tensors are the caller's own memory, in the order in which they were saved."""

    key: SnapshotKey
    tensors: dict[str, Any]
    metadata: Any
    source: Source


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """What a cleanup did.

    Attributes:
        clean: no file of the generations that it ended exists, or will appear. With a remote store: and its end there
            is written down on the local disk, so it comes, even if this process dies now.
        cancelled: accepted saves that it cancelled (queued, being staged, or being written).
        removed: committed snapshots that it forgot.
        removed_bytes: tensor bytes of those.
        left_to_writer: generations that the writer thread still had in hand at return; it undoes its own file.
        waited_s: seconds that the call waited.
    """

    clean: bool
    cancelled: int
    removed: int
    removed_bytes: int
    left_to_writer: int
    waited_s: float


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """What a shutdown did, once; every caller gets the same report.

    Attributes:
        committed, cancelled, failed: saves settled so since shutdown began.
        abandoned: keys accepted and not settled in time. Not written, or written after this report.
        trash_left: forgotten directories whose bytes are not freed yet.
        writer_stopped: the writer thread is gone. (If only the sweeper hangs, ``errors`` says so.)
        session_removed: the session directory is gone.
        errors: what went wrong on the way, in words.
        waited_s: seconds that it took.
        leaked_bytes: memory that is kept because a device may still touch it.
        unpublished: keys that were to go to the remote store and did not; their files stay here, as ever.
    """

    committed: int
    cancelled: int
    failed: int
    abandoned: tuple[SnapshotKey, ...]
    trash_left: int
    writer_stopped: bool
    session_removed: bool
    errors: tuple[str, ...]
    waited_s: float
    leaked_bytes: int = 0
    unpublished: tuple[SnapshotKey, ...] = ()

    @property
    def clean(self) -> bool:
        """Everything accepted was settled, the threads are gone, and nothing went wrong."""
        return self.writer_stopped and not self.abandoned and not self.errors


@dataclass(frozen=True, slots=True)
class StoreStats:
    """One moment of a store. ``accepted == committed + cancelled + failed + pending``, in jobs and in bytes.

    ``in_flight`` is what the writer has in hand, ``cancelled_in_hand`` how much of it is being undone.
    Bytes are tensor bytes, but ``session_bytes`` and ``trash_bytes``, which are blocks on disk. The last four are of
    the devices, at a moment of their own: saves that wait for a device's copy, memory kept because a device may still
    touch it, copies that went through memory that was not pinned, and host memory that is.
    """

    accepted: int
    accepted_bytes: int
    committed: int
    committed_bytes: int
    cancelled: int
    cancelled_bytes: int
    failed: int
    failed_bytes: int
    pending: int
    pending_bytes: int
    rejected: int
    rejected_bytes: int
    in_flight: int
    cancelled_in_hand: int
    live_requests: int
    live_snapshots: int
    session_bytes: int
    trash_bytes: int
    cleanup_timeouts: int
    writer_restarts: int
    oldest_pending_s: float
    on_devices: int = 0
    leaked_bytes: int = 0
    pageable_copies: int = 0
    pinned_bytes: int = 0
    remote: RemoteStats | None = None


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """What was exchanged with the remote store. Bytes are those of files, headers included.

    Attributes:
        published, published_bytes: snapshots that became visible to other nodes.
        fetched, fetched_bytes: snapshots that were loaded from there.
        refused: snapshots that did not become visible, since their life had ended there, or another had taken over.
        ended: cleanups that were carried out there.
        failed: requests to the remote store that failed, each after the client's own retries.
        unpublished, unpublished_bytes: what waits to be published, or is under way.
        endings: cleanups that are still to be carried out there.
        in_flight_bytes: being moved now, either way.
    """

    published: int = 0
    published_bytes: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    refused: int = 0
    ended: int = 0
    failed: int = 0
    unpublished: int = 0
    unpublished_bytes: int = 0
    endings: int = 0
    in_flight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RemoteHealth:
    """How the remote store is, without asking it.

    Attributes:
        status: ``opening``: not reached yet; ``unreachable``: the last requests failed or took too long, it is asked
            again after a pause; local work goes on either way.
        error: the last failure, while it counts.
        lost: guarantees that this remote store can not give, in words.
    """

    status: RemoteStatus
    error: str | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceHealth:
    """How a device's copies are. ``stuck``: none came for ``device_timeout_s``; ``lost``: none ever will.

    A stuck device is ``ok`` again when one comes after all. Saves of a device that is not ``ok`` fail at once.
    ``leaked_bytes`` of it are kept, since it may still touch them.
    """

    name: str
    status: DeviceStatus
    error: str | None
    leaked_bytes: int


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """How the store is, without asking the disk or the device.

    ``ok``; ``degraded``: the last write failed, a device is lost or the remote store is unreachable, saves are still
    taken; ``stuck``: one write has
    been in the writer's hand for more than ``stuck_after_s``, or a device reached nothing for ``device_timeout_s``;
    ``dead``: shut down, or the writer thread is gone for good.
    """

    status: HealthStatus
    reasons: tuple[str, ...] = ()
    writing_s: float = 0.0
    oldest_pending_s: float = 0.0
    last_error: str | None = None
    free_bytes: int | None = None
    writer_restarts: int = 0
    devices: tuple[DeviceHealth, ...] = ()
    remote: RemoteHealth | None = None
