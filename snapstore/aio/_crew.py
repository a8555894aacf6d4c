"""A few daemon threads for calls that may hang, and the way from such a call back to the loop."""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from snapstore._errors import StoreClosedError

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Crew(Executor):
    """At most ``most`` threads, started as they are needed and ended when nobody holds the crew any more.

    They are daemons: a call that hangs can not keep the process from ending. ``submit`` never blocks; what finds no
    thread idle waits for its turn.
    """

    def __init__(self, most: int) -> None:
        if isinstance(most, bool) or not isinstance(most, int):
            raise TypeError(f"threads must be an int, not {type(most).__name__}")
        if most < 1:
            raise ValueError(f"threads must be 1 or more, not {most}")
        self._most = most
        self._lock = threading.RLock()  # a collection may release it, wherever it strikes
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._holders = 1

    @property
    def threads(self) -> int:
        """How many were started: it only rises, and never above the bound."""
        return self._threads

    def submit(self, work: Callable[_P, _R], /, *args: _P.args, **options: _P.kwargs) -> Future[_R]:
        """Have a thread do it; ``StoreClosedError`` once nobody holds the crew."""
        future: Future[_R] = Future()
        with self._lock:
            if not self._holders:
                raise StoreClosedError("the store is shut down; open a new one")
            self._work.put((future, functools.partial(work, *args, **options)))
            if self._idle:
                self._idle -= 1
            elif self._threads < self._most:
                self._start_locked()
        return future

    def hold(self) -> None:
        """Keep the threads until ``release``: for a file that is open and still to be read."""
        with self._lock:
            if not self._holders:
                raise StoreClosedError("the store is shut down; open a new one")
            self._holders += 1

    def release(self) -> None:
        """The end of a ``hold``, or of the store's own. The last one lets the threads end when all work is done."""
        with self._lock:
            self._holders -= 1
            if not self._holders:
                for _ in range(self._threads):
                    self._work.put(None)

    def _start_locked(self) -> None:
        name = f"snapstore-aio-{self._threads + 1}"
        try:
            threading.Thread(target=_serve, args=(self._work, self._rest), name=name, daemon=True).start()
        except RuntimeError:
            if not self._threads:
                raise  # as many threads as the process may have, and none of ours to wait for
        else:
            self._threads += 1

    def _rest(self) -> None:
        with self._lock:
            self._idle += 1


def _serve(
    work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], rest: Callable[[], None]
) -> None:
    """A thread's top."""
    while _serve_one(work):
        rest()


def _serve_one(work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> bool:
    """A function of its own, so that an idle thread keeps nothing of the last call alive."""
    item = work.get()
    if item is None:
        return False
    future, call = item
    if future.set_running_or_notify_cancel():
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - a thread's top: the error is the caller's
            future.set_exception(error)
        else:
            future.set_result(result)
    return True


async def outcome_of(future: Future[_R]) -> _R:
    """Await a future of another thread. Cancelled, it leaves the future alone.

    ``asyncio.wrap_future`` would cancel it, and complains when it ends after its loop.
    """
    loop = asyncio.get_running_loop()
    bell = asyncio.Event()
    future.add_done_callback(lambda _: ring(loop, bell))
    await bell.wait()
    return future.result()


def ring(loop: asyncio.AbstractEventLoop, bell: asyncio.Event) -> None:
    """Set an event from any thread. Does not block; a loop that is closed has nobody left who waits."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(bell.set)
