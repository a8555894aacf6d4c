"""The core's one door to a store beyond this machine: what it asks of a remote tier. ``_observer`` is what it tells it.

Without ``StoreOptions.remote`` there is no tier, and nothing of it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from snapstore._files import FileSystem
from snapstore._format import Header
from snapstore._memory import BufferPool
from snapstore._observer import Observer
from snapstore._options import StoreOptions
from snapstore._records import Commit, Life
from snapstore._session import Session
from snapstore._state import State
from snapstore._threads import Threads
from snapstore._types import RemoteHealth, RemoteStats, SnapshotKey


class Fetch(Protocol):
    """A snapshot that is on its way from the remote store. For the thread that asked for it."""

    @property
    def life(self) -> str:
        """The remote life that it was read from."""

    def read(self, memory: Callable[[Header], memoryview], *, verify: bool) -> tuple[Header, str]:
        """Bring the tensors to ``memory``; the header, and the metadata as JSON.

        Blocks for the network, bounded. Raises what ``load`` does.
        """

    def keep(self, life: Life) -> None:
        """Have it kept on the local disk if there is room, in the background, then ``end_fetch``. Never blocks."""


class Tier(Observer, Protocol):
    """What a store asks of its remote tier. Only what says so blocks, and that is bounded."""

    def start(self) -> None:
        """Begin to work."""

    def fetch(self, key: SnapshotKey) -> Fetch:
        """To be read. Does not block."""

    def boundaries(self, request_id: str) -> tuple[int, ...]:
        """What ``fetch`` would find. Blocks for the network, bounded: ``RemoteUnavailableError``."""

    def publish(self, commits: Sequence[Commit], deadline_s: float) -> None:
        """Wait until these are visible to other nodes. ``TimeoutError``, or why not."""

    def leaving(self, commit: Commit) -> Callable[[], None]:
        """Its file is about to leave the store. Blocks for one opening of it; ``end_hold`` calls the answer."""

    def health(self) -> RemoteHealth:
        """How the remote store is, without asking it."""

    def stats(self) -> RemoteStats:
        """Counters of one moment."""

    def let_go(self) -> None:
        """End the threads, without waiting for anything."""

    def close(self, timeout_s: float) -> tuple[SnapshotKey, ...]:
        """Publish and end what is left, within this time, and stop; the keys that are not published."""


def open_tier(
    options: StoreOptions,
    state: State,
    session: Session,
    files: FileSystem,
    buffers: BufferPool,
    threads: Threads,
) -> Tier | None:
    """The tier that the options ask for. Blocks for no network: what the remote store is like is found out later."""
    if options.remote is None:
        return None
    from snapstore.remote import RemoteTier

    return RemoteTier(options, state, session, files, buffers, threads)
