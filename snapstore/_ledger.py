"""The counters of a store, and the one value that is published of them. Used only under the state lock.

Every job is counted once when it is accepted and once when it ends, so the balance of invariant 10 holds by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from snapstore._latency import Latencies, Reasons
from snapstore._reasons import reason_of
from snapstore._records import Published
from snapstore._room import Room

_NO_LATENCIES, _NO_REASONS = Latencies(), Reasons()


@dataclass(slots=True)
class Ledger:
    """Jobs and bytes, disk space, errors, times."""

    accepted: int = 0
    accepted_bytes: int = 0
    committed: int = 0
    committed_bytes: int = 0
    cancelled: int = 0
    cancelled_bytes: int = 0
    failed: int = 0
    failed_bytes: int = 0
    rejected: int = 0
    rejected_bytes: int = 0
    live_snapshots: int = 0
    session_bytes: int = 0
    trash_bytes: int = 0
    cleanup_timeouts: int = 0
    writer_restarts: int = 0
    write_error: str | None = None
    removal_error: str | None = None
    free_bytes: int | None = None
    latencies: Latencies = _NO_LATENCIES
    failures: Reasons = _NO_REASONS
    rejections: Reasons = _NO_REASONS

    def reject(self, nbytes: int, error: BaseException) -> None:
        """A save was refused before it was accepted."""
        self.rejected += 1
        self.rejected_bytes += nbytes
        self.rejections = self.rejections.with_one(reason_of(error), nbytes)

    def accept(self, nbytes: int) -> None:
        self.accepted += 1
        self.accepted_bytes += nbytes

    def commit(self, nbytes: int) -> None:
        self.committed += 1
        self.committed_bytes += nbytes
        self.write_error = None

    def cancel(self, nbytes: int) -> None:
        self.cancelled += 1
        self.cancelled_bytes += nbytes

    def fail(self, nbytes: int, error: BaseException) -> None:
        self.failed += 1
        self.failed_bytes += nbytes
        self.failures = self.failures.with_one(reason_of(error), nbytes)

    def list(self, disk_bytes: int) -> None:
        """A snapshot is in the index."""
        self.live_snapshots += 1
        self.session_bytes += disk_bytes

    def unlist(self, count: int, disk_bytes: int) -> None:
        """So many are there no more."""
        self.live_snapshots -= count
        self.session_bytes -= disk_bytes

    def note(self, name: str, seconds: float) -> None:
        """One more observation for a histogram."""
        self.latencies = self.latencies.with_one(name, seconds)

    def publish(
        self,
        room: Room,
        *,
        cancelled_in_hand: int,
        live_requests: int,
        writing_since_s: float | None,
        closing: str | None,
    ) -> Published:
        """This moment, as an immutable value."""
        return Published(
            self.accepted, self.accepted_bytes, self.committed, self.committed_bytes,
            self.cancelled, self.cancelled_bytes, self.failed, self.failed_bytes,
            len(room.in_flight), room.pending_bytes, self.rejected, self.rejected_bytes,
            int(writing_since_s is not None), cancelled_in_hand, live_requests, self.live_snapshots,
            self.session_bytes, self.trash_bytes, self.cleanup_timeouts, self.writer_restarts,
            room.oldest_since_s, writing_since_s,
            self.write_error or self.removal_error, self.free_bytes, closing,
            self.latencies, self.failures, self.rejections,
        )  # fmt: skip


def in_words(error: BaseException) -> str:
    """How an error is published."""
    return f"{type(error).__name__}: {error}"
