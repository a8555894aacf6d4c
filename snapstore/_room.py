"""Room for saves that are not on disk yet: who is in, who waits, what the limits say. For use under the state lock."""

from __future__ import annotations

import errno
from collections import OrderedDict, deque

from snapstore._errors import DiskQuotaError, StoreFullError
from snapstore._options import StoreOptions
from snapstore._records import Content, Job, Life, Turn
from snapstore._types import SnapshotKey


class Room:
    """First come, first served, so that small saves do not starve a large one (invariant 6)."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self.in_flight: OrderedDict[Job, None] = OrderedDict()
        self.pending_bytes = 0
        self.waiting: deque[Turn] = deque()

    @property
    def oldest_since_s(self) -> float | None:
        """When the oldest of them was accepted, on the monotonic clock."""
        oldest = next(iter(self.in_flight), None)
        return oldest.since_s if oldest else None

    def queue_up(self, life: Life, key: SnapshotKey, nbytes: int, content: Content, now_s: float) -> Turn:
        """A place at the end of the queue."""
        patience_s = self._options.save_timeout_s if self._options.on_full == "wait" else 0.0
        turn = Turn(life, key, nbytes, content, now_s, now_s + patience_s)
        self.waiting.append(turn)
        return turn

    def is_there_for(self, turn: Turn, now_s: float) -> bool:
        """It is this one's turn, and there is room. Raises ``StoreFullError`` when its time is up."""
        if self.waiting[0] is turn and self.fits(turn.nbytes):
            return True
        if now_s >= turn.deadline_s:
            raise self._full(turn, now_s - turn.started_s)
        return False

    def charge(self, job: Job) -> None:
        self.in_flight[job] = None
        self.pending_bytes += job.nbytes

    def give_back(self, job: Job) -> None:
        del self.in_flight[job]
        self.pending_bytes -= job.nbytes

    def check_quota(self, key: SnapshotKey, nbytes: int, *, used: int, free: int | None) -> None:
        """``DiskQuotaError`` where the disk would get too full, counting what is pending as written."""
        most, least = self._options.max_session_bytes, self._options.min_free_bytes
        used += self.pending_bytes
        if most is not None and used + nbytes > most:
            raise _over_quota(key, nbytes, most, used, "max_session_bytes", "used")
        if least is not None and free is not None and free - self.pending_bytes - nbytes < least:
            raise _over_quota(key, nbytes, least, free - self.pending_bytes, "min_free_bytes", "free")

    def fits(self, nbytes: int) -> bool:
        """There is room for so much more, whoever waits for some."""
        if not self.in_flight:
            return True
        options = self._options
        return (
            len(self.in_flight) < options.max_pending_jobs
            and self.pending_bytes + nbytes <= options.max_pending_bytes
        )

    def _full(self, turn: Turn, waited_s: float) -> StoreFullError:
        error = StoreFullError(
            f"no room for {turn.key} ({turn.nbytes} bytes) after {waited_s:.3f} s: {len(self.in_flight)} jobs and "
            f"{self.pending_bytes} bytes are pending; save less often, or raise max_pending_jobs or max_pending_bytes",
            key=turn.key,
        )
        error.nbytes, error.waited_s = turn.nbytes, waited_s
        error.pending_jobs, error.pending_bytes = len(self.in_flight), self.pending_bytes
        return error


def _over_quota(
    key: SnapshotKey, nbytes: int, limit: int, used: int, option: str, word: str
) -> DiskQuotaError:
    error = DiskQuotaError(
        f"{key} ({nbytes} bytes) was not saved: {used} bytes are {word} and {option} is {limit}; "
        "clean up requests, or change the option",
        key=key,
    )
    error.nbytes, error.limit_bytes, error.used_bytes = nbytes, limit, used
    error.errno = errno.EDQUOT if word == "used" else errno.ENOSPC
    return error
