"""One load at a time as long as loads are quick.

Measured (16 MiB files in the page cache, 4 cores): eight loads at once are no faster than one, and keep the GIL from
the loop for 40 to 250 ms at a time, since they map, fault and unmap memory of the same process. But a load that hangs
must not hold up the next: who has been in for longer than ``PATIENCE_S`` does not count any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PATIENCE_S = 0.1


class Turnstile:
    """First come, first served. For one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._inside: object | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until the one before has left, or has been in for long."""
        me: object = object() if self._inside is None else await self._queue_up()
        self._inside = me
        timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._leave, me)
        try:
            yield
        finally:
            timer.cancel()
            self._leave(me)

    async def _queue_up(self) -> object:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            self._leave(turn)
            raise
        return turn

    def _leave(self, who: object) -> None:
        """Nothing, for one who does not count any more."""
        if self._inside is who:
            while self._waiting and self._waiting[0].done():
                self._waiting.popleft()  # cancelled while it waited
            self._inside = self._waiting.popleft() if self._waiting else None
            if isinstance(self._inside, asyncio.Future):
                self._inside.set_result(None)
