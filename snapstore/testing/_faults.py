"""Faults on demand, for snapstore's tests and for its users': a file system that pauses, fails, delays or writes short.

    files = FaultyFileSystem()
    gate = files.pause("rename", ".safetensors")      # the writer will stop before the rename
    store = SnapshotStore(root, file_system=files)
    store.save("request-1", 64, tensors)
    gate.wait_reached()
    report = store.cleanup_request("request-1", timeout_s=0)
    gate.open()                                       # and now the late rename is undone

Operations are named like the methods of the file system: ``create``, ``write``, ``sync_data``, ``rename``, ``unlink``,
``make_directory``, ``open_read``, ``read_into``, ``lock``, and so on. ``path`` is any part of a path that the operation
is about; for operations on descriptors it is the path that was opened. Everything here is safe from any thread.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from snapstore._files import FileSystem

__all__ = ["OPERATIONS", "FaultyFileSystem", "Gate"]

When = Literal["before", "after"]

OPERATIONS = tuple(
    name for name, _ in inspect.getmembers(FileSystem, inspect.isfunction) if not name.startswith("_")
)
"""Every operation that a fault can be planted at."""

_OPENING = frozenset({"create", "open_lock", "open_read", "open_directory"})
_PATIENCE_S = 30.0


class Gate:
    """A place where threads wait until the test lets them go on. As a context manager it opens at the end."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._open = threading.Event()

    def wait_reached(self, timeout_s: float = _PATIENCE_S) -> None:
        """Wait until a thread stands here. ``TimeoutError`` if none comes."""
        if not self._reached.wait(timeout_s):
            raise TimeoutError(f"no thread reached the gate within {timeout_s} s")

    @property
    def reached(self) -> bool:
        return self._reached.is_set()

    def open(self) -> None:
        """Let go who waits here, and whoever comes later."""
        self._open.set()

    def pass_through(self) -> None:
        """Stand here until the gate is open."""
        self._reached.set()
        self._open.wait()

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()


@dataclass(slots=True, eq=False)
class _Rule:
    operation: str
    path: str
    when: When
    act: Callable[[], None]
    skip: int
    times: float
    at_most_bytes: int | None = None


@dataclass(slots=True)
class Call:
    """One operation that was made: its name and the paths that it was about."""

    operation: str
    paths: tuple[str, ...] = field(default=())


class FaultyFileSystem(FileSystem):
    """The real file system, with faults where the test plants them. ``calls`` lists what was done, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._mutex = threading.Lock()
        self._rules: list[_Rule] = []
        self._open_paths: dict[int, str] = {}
        self.calls: list[Call] = []

    def pause(
        self, operation: str, path: str = "", *, when: When = "before", skip: int = 0, times: float = 1
    ) -> Gate:
        """Stop the thread that comes to the operation until the gate is opened."""
        gate = Gate()
        self._plant(operation, path, when, gate.pass_through, skip, times)
        return gate

    def fail(
        self,
        operation: str,
        number: int,
        path: str = "",
        *,
        when: When = "before",
        skip: int = 0,
        times: float = 1,
    ) -> None:
        """Raise ``OSError(number)``; ``times=math.inf`` for ever, ``skip`` operations are let through first."""

        def act() -> None:
            raise OSError(number, os.strerror(number), path or None)

        self._plant(operation, path, when, act, skip, times)

    def call(
        self,
        operation: str,
        act: Callable[[], None],
        path: str = "",
        *,
        when: When = "before",
        skip: int = 0,
        times: float = 1,
    ) -> None:
        """Do anything at the operation, on the thread that makes it."""
        self._plant(operation, path, when, act, skip, times)

    def delay(self, operation: str, delay_s: float, path: str = "", *, times: float = float("inf")) -> None:
        """Make the operation slow."""
        self._plant(operation, path, "before", lambda: time.sleep(delay_s), 0, times)

    def short_write(self, at_most_bytes: int, path: str = "", *, times: float = float("inf")) -> None:
        """Write at most so many bytes a call."""
        self._plant("write", path, "before", lambda: None, 0, times).at_most_bytes = at_most_bytes

    def heal(self) -> None:
        """Take every fault away; gates stay as they are."""
        with self._mutex:
            self._rules.clear()

    def count(self, operation: str, path: str = "") -> int:
        """How often an operation was made on paths that contain ``path``."""
        with self._mutex:
            return sum(_concerns(call, operation, path) for call in self.calls)

    def _plant(
        self, operation: str, path: str, when: When, act: Callable[[], None], skip: int, times: float
    ) -> _Rule:
        if operation not in OPERATIONS:
            raise ValueError(f"no operation {operation!r}; there are {', '.join(OPERATIONS)}")
        rule = _Rule(operation, path, when, act, skip, times)
        with self._mutex:
            self._rules.append(rule)
        return rule

    def _perform(self, operation: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        call = Call(operation, self._paths_of(args, options.get("dir_fd")))
        with self._mutex:
            self.calls.append(call)
        limit = self._meet(call, "before")
        if limit is not None:
            args = (args[0], _shortened(args[1], limit), *args[2:])
        if operation == "close":
            with self._mutex:
                self._open_paths.pop(args[0], None)
        result = getattr(FileSystem, operation)(self, *args, **options)
        if operation in _OPENING:
            with self._mutex:
                self._open_paths[result] = call.paths[0]
        self._meet(call, "after")
        return result

    def _meet(self, call: Call, when: When) -> int | None:
        """Run the rules that this call meets, outside the mutex; the byte limit of the last one that has any."""
        met: list[_Rule] = []
        with self._mutex:
            for rule in self._rules:
                if rule.when != when or not _concerns(call, rule.operation, rule.path):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                elif rule.times > 0:
                    rule.times -= 1
                    met.append(rule)
        for rule in met:
            rule.act()
        return next((rule.at_most_bytes for rule in reversed(met) if rule.at_most_bytes is not None), None)

    def _paths_of(self, args: tuple[Any, ...], dir_fd: int | None) -> tuple[str, ...]:
        """The paths that the arguments name, descriptors and names below a descriptor included."""
        with self._mutex:
            base = self._open_paths.get(dir_fd, "") if dir_fd is not None else ""
            named = (self._open_paths.get(arg, "") if isinstance(arg, int) else arg for arg in args)
            return tuple(os.path.join(base, path) for path in named if isinstance(path, str))


def _performing(operation: str) -> Callable[..., Any]:
    def perform(self: FaultyFileSystem, *args: Any, **options: Any) -> Any:
        return self._perform(operation, args, options)

    perform.__name__ = operation
    perform.__doc__ = getattr(FileSystem, operation).__doc__
    return perform


for _operation in OPERATIONS:
    setattr(FaultyFileSystem, _operation, _performing(_operation))


def _concerns(call: Call, operation: str, path: str) -> bool:
    return call.operation == operation and (not path or any(path in each for each in call.paths))


def _shortened(buffers: Sequence[memoryview], limit: int) -> list[memoryview]:
    first = next((buffer for buffer in buffers if len(buffer)), memoryview(b""))
    return [first[: max(limit, 0)]]
