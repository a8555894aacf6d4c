"""Whether the remote store is worth asking: after some failures it is left alone for a while, then tried by one ping.

    closed     everything goes; so many failures in a row, and it is open
    open       nothing goes, for a pause
    half-open  one ping goes: it closes, or opens for twice the pause

It begins half-open: nothing goes before the first ping was answered.
"""

from __future__ import annotations

from collections.abc import Callable

FAILURES = 3
PAUSE_S = 0.25
MOST_PAUSE_S = 5.0


class Breaker:
    """Used under the pool's lock only."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._pause_s = PAUSE_S
        self._ping_at_s: float | None = clock()
        self._pinging = False
        self.error: str | None = None

    @property
    def closed(self) -> bool:
        """Everything may go."""
        return self._ping_at_s is None

    @property
    def ping_due_s(self) -> float | None:
        """Seconds until somebody is to ping; ``None``: nobody is."""
        if self._ping_at_s is None or self._pinging:
            return None
        return max(0.0, self._ping_at_s - self._clock())

    def begin_ping(self) -> None:
        """Somebody does; nobody else is to."""
        self._pinging = True

    def worked(self, *, ping: bool = False) -> None:
        """A request was answered. An old one does not close it, only its ping does."""
        if ping:
            self._ping_at_s, self._pinging, self._pause_s = None, False, PAUSE_S
        if self.closed:
            self._failures, self.error = 0, None

    def failed(self, error: BaseException, *, ping: bool = False) -> bool:
        """A request failed, or took too long. True if this has just opened it."""
        self._failures += 1
        self.error = f"{type(error).__name__}: {error}"
        if ping:
            self._pinging = False
            self._open()
        elif self.closed and self._failures >= FAILURES:
            self._open()
            return True
        return False

    def _open(self) -> None:
        self._ping_at_s = self._clock() + self._pause_s
        self._pause_s = min(MOST_PAUSE_S, self._pause_s * 2)
