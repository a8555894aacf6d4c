"""``SaveTicket``: what ``save`` returns; a future of the save, with its states."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from snapstore._threads import Event, Threads, on_main_thread
from snapstore._types import SaveState, SnapshotInfo, SnapshotKey


class SaveTicket:
    """An accepted save. Every method may be called from any thread; none blocks but those with ``timeout_s``.

    Attributes:
        key: what was saved.
        generation: the life of the request id that it belongs to.
        nbytes: tensor bytes.
    """

    __slots__ = (
        "__weakref__",
        "_bells",
        "_new_bell",
        "_outcome",
        "_published",
        "_released",
        "_state",
        "generation",
        "key",
        "nbytes",
    )

    def __init__(
        self, key: SnapshotKey, generation: int, nbytes: int, threads: Threads, *, publishes: bool = False
    ) -> None:
        self.key = key
        self.generation = generation
        self.nbytes = nbytes
        self._state = SaveState.STAGING
        self._outcome: Future[SnapshotInfo] = threads.future()
        self._released = False
        self._new_bell = threads.event
        self._bells: list[Event] = []
        self._published = threads.event() if publishes else None

    @property
    def state(self) -> SaveState:
        """Where the save stands now."""
        return self._state

    @property
    def released(self) -> bool:
        """True: the caller's tensors are not read any more (from the start, without ``borrow``)."""
        return self._released

    def wait_released(self, timeout_s: float | None = None) -> bool:
        """Wait until ``released``; what it says at the end."""
        bell = self._new_bell()
        self._bells.append(bell)
        try:
            return self._released or bell.wait(timeout_s)  # looked at after the bell is there to be rung
        finally:
            self._bells.remove(bell)

    @property
    def published(self) -> bool:
        """True: other nodes can load it (with ``StoreOptions.remote``; by its policy, or after ``publish``)."""
        return self._published is not None and self._published.is_set()

    def wait_published(self, timeout_s: float | None = None) -> bool:
        """Wait until ``published``; what it says at the end. False at once without a remote store."""
        return self._published is not None and self._published.wait(timeout_s)

    def done(self) -> bool:
        """True: committed, cancelled or failed; ``result`` does not wait."""
        return self._outcome.done()

    def result(self, timeout_s: float | None = None) -> SnapshotInfo:
        """Wait for the commit. ``SaveCancelledError``, ``SaveFailedError`` (with the cause), or ``TimeoutError``."""
        try:
            return self._outcome.result(timeout_s)
        except FutureTimeoutError:
            raise self._late(timeout_s) from None

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the end; the error, or ``None`` if it was committed. ``TimeoutError`` if it did not end in time."""
        try:
            return self._outcome.exception(timeout_s)
        except FutureTimeoutError:
            raise self._late(timeout_s) from None

    def _late(self, timeout_s: float | None) -> TimeoutError:
        """Before Python 3.11 a future's own time-out is no ``TimeoutError``."""
        return TimeoutError(f"the save of {self.key} has not ended after {timeout_s} s: {self._state.value}")

    def add_done_callback(self, fn: Callable[[SaveTicket], object]) -> None:
        """Call ``fn(ticket)`` once at the end, on the thread that ends it (at once if it has ended). Keep it short.

        That is often the writer's own thread: nothing in ``fn`` may wait for another save, and the way to end the store
        is ``begin_shutdown``. What ``fn`` raises is logged, but an exit or an interruption of the main thread.
        """
        self._outcome.add_done_callback(lambda _: self._call(fn))

    def __await__(self) -> Generator[object, None, SnapshotInfo]:
        """Await the commit. Cancelling the await abandons the wait, not the save."""
        import asyncio  # whoever awaits has it; for all others it is a fifth of the time that importing snapstore takes

        return asyncio.shield(asyncio.wrap_future(self._outcome)).__await__()

    def __repr__(self) -> str:
        return f"<SaveTicket {self.key} generation {self.generation}: {self._state.value}>"

    def _call(self, fn: Callable[[SaveTicket], object]) -> None:
        try:
            fn(self)
        except Exception:
            raise  # the future logs it
        except BaseException as error:
            if on_main_thread():
                raise
            raise RuntimeError(f"a done callback of {self.key} raised {type(error).__name__}") from error

    def _move(self, state: SaveState) -> None:
        self._state = state

    def _settle(self, outcome: SnapshotInfo | BaseException) -> None:
        if isinstance(outcome, BaseException):
            self._outcome.set_exception(outcome)
        else:
            self._outcome.set_result(outcome)

    def _release(self) -> None:
        self._released = True
        for bell in tuple(self._bells):
            bell.set()

    def _publish(self) -> None:
        if self._published is not None:
            self._published.set()
