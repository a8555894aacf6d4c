"""Locks, conditions, threads, futures and the clock: the only code of the core that makes one or reads it.

This is the seam at which tests run the real code in an order of their choice, as ``_files`` is that for the disk. What
is made here is bound where it is used, once an object: on the hot path it is the standard library's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

LONGEST_S = threading.TIMEOUT_MAX
"""The longest wait there is: about 292 years."""


class Lock(Protocol):
    """As ``threading.Lock``."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...

    def locked(self) -> bool: ...

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Condition(Protocol):
    """As ``threading.Condition`` on a lock that others have too."""

    def wait(self, timeout: float | None = None) -> bool: ...

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool: ...

    def notify(self, n: int = 1) -> None: ...

    def notify_all(self) -> None: ...


class Event(Protocol):
    """As ``threading.Event``."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Thread(Protocol):
    """As ``threading.Thread``."""

    name: str

    def start(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...

    def is_alive(self) -> bool: ...


class Queue(Protocol):
    """As ``queue.SimpleQueue``: ``put`` waits for nobody."""

    def put(self, item: Any) -> None: ...

    def get(self) -> Any: ...


def on_main_thread() -> bool:
    """Here interruptions arrive, and the interpreter's exit begins."""
    return threading.current_thread() is threading.main_thread()


def _daemon(name: str, target: Callable[[], None]) -> Thread:
    return threading.Thread(target=target, name=name, daemon=True)


@dataclass(frozen=True, slots=True)
class Threads:
    """The real ones, unless a test says otherwise.

    ``thread``: a daemon of this name, not started yet. ``this_thread``: what stands for the one that asks.
    """

    monotonic_s: Callable[[], float] = time.monotonic
    lock: Callable[[], Lock] = threading.Lock
    condition: Callable[[Lock], Condition] = threading.Condition  # type: ignore[assignment]
    event: Callable[[], Event] = threading.Event
    future: Callable[[], Future[Any]] = Future
    thread: Callable[[str, Callable[[], None]], Thread] = _daemon
    queue: Callable[[], Queue] = SimpleQueue
    this_thread: Callable[[], object] = threading.current_thread
