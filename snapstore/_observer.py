"""What the state tells whoever watches it: each commit, cleanup and join, in the order in which they happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from snapstore._records import Commit, End, Job
from snapstore._types import SnapshotKey


class Observer(Protocol):
    """Called under the state lock: takes note, and does nothing else. Never blocks, never raises."""

    def committed(self, job: Job, commit: Commit) -> None:
        """The snapshot is on disk and in the index."""

    def ended(self, request_ids: Sequence[str] | None) -> End:
        """A cleanup of these requests, or of all; what it waits for."""

    def joined(self, key: SnapshotKey, life: str) -> None:
        """A snapshot of a remote life was loaded: what is saved of the request from here on belongs to that life."""
