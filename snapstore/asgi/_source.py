"""Where answers come from: a store of this process. (``_root``: what lies below a root.)"""

from __future__ import annotations

import asyncio
import math
from dataclasses import asdict
from typing import Any, Protocol

from snapstore._errors import SnapshotNotFoundError
from snapstore._types import SnapshotKey, StoreHealth
from snapstore.aio import AsyncSnapshotStore, Stream

OPEN_S = 10.0
"""How long a client waits for a file that is still to be written, or for a disk that does not open it."""


class Source(Protocol):
    """What the routes ask. ``health`` and ``stats`` never block; the others may be awaited."""

    def health(self) -> dict[str, Any]:
        """With ``status`` and ``reasons``."""

    def stats(self) -> dict[str, Any]:
        """One moment."""

    async def snapshots(self, request_id: str) -> list[dict[str, Any]]:
        """Ascending; ``SnapshotNotFoundError`` if there is none."""

    async def open(self, request_id: str, token_count: int) -> Stream:
        """Open it; ``TimeoutError`` after ``OPEN_S``."""

    async def cleanup(self, request_id: str | None, timeout_s: float | None) -> dict[str, Any]:
        """Forget one request, or all."""


class StoreSource:
    """A store of this process."""

    def __init__(self, store: AsyncSnapshotStore) -> None:
        self._store = store

    def health(self) -> dict[str, Any]:
        """Never blocks."""
        return health_as_json(self._store.health())

    def stats(self) -> dict[str, Any]:
        """Never blocks."""
        return asdict(self._store.stats())

    async def snapshots(self, request_id: str) -> list[dict[str, Any]]:
        """Pending and committed. Never blocks for a disk."""
        boundaries = await self._store.boundaries(request_id)
        if not boundaries:
            raise no_such_request(request_id)
        return [{"token_count": count} for count in boundaries]

    async def open(self, request_id: str, token_count: int) -> Stream:
        """What is pending is awaited."""
        return await in_time(self._store.stream(SnapshotKey(request_id, token_count)))

    async def cleanup(self, request_id: str | None, timeout_s: float | None) -> dict[str, Any]:
        """Goes on although the client leaves."""
        if request_id is None:
            return asdict(await self._store.cleanup_all(timeout_s=timeout_s))
        return asdict(await self._store.cleanup_request(request_id, timeout_s=timeout_s))


async def in_time(stream: Stream) -> Stream:
    """Open a stream within ``OPEN_S``."""
    try:
        return await asyncio.wait_for(stream.open(), OPEN_S)
    except asyncio.TimeoutError:
        raise TimeoutError(f"the file could not be opened within {OPEN_S:g} s; try again later") from None


def no_such_request(request_id: str) -> SnapshotNotFoundError:
    """For a request that has no snapshot."""
    shown = request_id if len(request_id) <= 64 else request_id[:61] + "..."
    return SnapshotNotFoundError(f"no snapshot of {shown!r}: never saved here, or cleaned up")


def health_as_json(health: StoreHealth) -> dict[str, Any]:
    """JSON has no infinities."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(health).items()
    }
