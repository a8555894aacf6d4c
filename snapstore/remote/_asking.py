"""Asking a transfer thread for something, and waiting for its answer, bounded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TypeVar

from snapstore._errors import RemoteUnavailableError
from snapstore.remote._pool import Kind, Pool, Task

_R = TypeVar("_R")


def ask(pool: Pool, work: Callable[[], _R], nbytes: int = 0) -> Future[_R]:
    """Have a transfer thread find out."""
    future: Future[_R] = pool.threads.future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            future.set_result(work())

    def failed(error: BaseException) -> None:
        with suppress(InvalidStateError):  # nobody waits any more
            future.set_exception(error)

    pool.put(Task(Kind.ASK, run, failed, nbytes))
    return future


def answer(future: Future[_R], timeout_s: float) -> _R:
    """Wait for it. ``RemoteUnavailableError``, or what the work raised."""
    try:
        return future.result(timeout_s)
    except (TimeoutError, FutureTimeoutError):
        future.cancel()
        raise RemoteUnavailableError(
            f"the remote store did not answer within {timeout_s} s; try again later"
        ) from None
