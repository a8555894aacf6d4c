"""How a name below a guarded root is reached: through no link, from the nearest directory that is held open.

A directory that is held is the one that was opened, whatever stands under its path by now: who needs to know, looks.
Where none is, the way begins at the root, and each operation opens and closes every directory on it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from weakref import WeakSet

_PASSING = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Ways:
    """Of one file system: the roots that are guarded, the directories that are held. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guarded: frozenset[str] = frozenset()
        self._held: dict[str, Held] = {}
        _everybodys.add(self)

    def guard(self, root: str) -> None:
        """Every path below it is gone directory by directory from here on: a link swapped in leads nobody out."""
        with self._lock:
            self._guarded |= {root}

    def hold(self, path: str) -> None:
        """Keep a directory open until ``let_go``: what is below it is reached from it, wherever it is moved to."""
        with self.to(path) as (name, fd):
            held = Held.open(name, fd, self._lock)
        with self._lock:
            before, self._held[path] = self._held.get(path), held
        if before is not None:
            before.leave()

    def let_go(self, path: str) -> None:
        """The end of ``hold``; nothing where there was none."""
        with self._lock:
            held = self._held.pop(path, None)
        if held is not None:
            held.leave()

    def is_held(self, path: str, there: os.stat_result) -> bool:
        """False if another directory is held for this path than the one that has this status."""
        held = self._held.get(path)
        return held is None or held.identity == (there.st_dev, there.st_ino)

    def to(self, path: str, dir_fd: int | None = None) -> Way:
        """A context: what to call the path, and below which open directory."""
        return Way(self._enter, self._guarded, path, dir_fd)

    def from_root(self, path: str, dir_fd: int | None = None) -> Way:
        """``to`` what stands under the path now, whatever is held."""
        return Way(_none, self._guarded, path, dir_fd)

    def _enter(self, path: str) -> Held | None:
        """The directory if it is held, to be followed by ``Held.leave``."""
        if path not in self._held:
            return None
        with self._lock:
            held = self._held.get(path)
            if held is not None:
                held.users += 1
            return held

    def close_in_child(self) -> None:
        """A forked child has no store: what is held here need not keep a file system from being unmounted."""
        self._lock = threading.Lock()  # whoever held the other one is not here
        for held in self._held.values():
            with suppress(OSError):
                os.close(held.fd)
        self._held.clear()


class Held:
    """An open directory, closed when nobody is on a way from it any more."""

    __slots__ = ("_lock", "fd", "identity", "users")

    def __init__(self, fd: int, status: os.stat_result, lock: threading.Lock) -> None:
        self.fd = fd
        self.users = 1  # who holds it
        self.identity = (status.st_dev, status.st_ino)
        self._lock = lock

    @classmethod
    def open(cls, name: str, dir_fd: int | None, lock: threading.Lock) -> Held:
        fd = os.open(name, _PASSING, dir_fd=dir_fd)
        try:
            return cls(fd, os.fstat(fd), lock)
        except BaseException:
            os.close(fd)
            raise

    def leave(self) -> None:
        """One user less; the last one closes it."""
        with self._lock:
            self.users -= 1
            last = self.users == 0
        if last:
            os.close(self.fd)


class Way:
    """The way to one name. Whatever fails on it, or at its end, speaks of the whole path."""

    __slots__ = ("_dir_fd", "_enter", "_guarded", "_held", "_own_fd", "_path")

    def __init__(
        self, enter: Callable[[str], Held | None], guarded: frozenset[str], path: str, dir_fd: int | None
    ) -> None:
        self._enter = enter
        self._guarded = guarded
        self._path = path
        self._dir_fd = dir_fd
        self._held: Held | None = None
        self._own_fd: int | None = None

    def __enter__(self) -> tuple[str, int | None]:
        if self._dir_fd is not None:
            return self._path, self._dir_fd
        try:
            return self._go()
        except BaseException as error:
            self._end(error)
            raise

    def _go(self) -> tuple[str, int | None]:
        above, _, name = self._path.rpartition(os.sep)
        way: list[str] = []
        while above:
            self._held = self._enter(above)
            if self._held is not None:
                return self._pass_through(self._held.fd, way, name)
            if above in self._guarded:
                self._own_fd = os.open(above, _PASSING)
                return self._pass_through(self._own_fd, way, name)
            above, _, outer = above.rpartition(os.sep)
            way.append(outer)
        return self._path, None

    def _pass_through(self, fd: int, way: list[str], name: str) -> tuple[str, int]:
        """``way``: the directories to open on it, the outermost last. ``ENOTDIR`` where one is a link."""
        for directory in reversed(way):
            inner = os.open(directory, _PASSING, dir_fd=fd)
            # Before the close, since an interruption may come right after it.
            before, self._own_fd, fd = self._own_fd, inner, inner
            if before is not None:
                os.close(before)
        return name, fd

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        fd, self._own_fd = self._own_fd, None
        if fd is not None:
            os.close(fd)
        held, self._held = self._held, None
        if held is not None:
            held.leave()
        if isinstance(error, OSError) and self._dir_fd is None:
            error.filename = self._path


def _none(_: str) -> None:
    """Nothing is held."""


_everybodys: WeakSet[Ways] = WeakSet()


def _in_child() -> None:
    for ways in list(_everybodys):
        ways.close_in_child()


os.register_at_fork(after_in_child=_in_child)
