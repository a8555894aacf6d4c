"""Who owns a session, and whether that owner is provably dead.

Ownership is a ``flock`` on ``owner.lock``, held for the session's life; the kernel drops it at any death of the
process. The record beside it only informs: a pid proves nothing, it may be another process's by now. Dead is an owner
whose lock can be taken on the machine that it ran on. Alive, or not to be known (another machine, no lock support):
left alone.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from snapstore._files import FileSystem, opened, read_exactly, same_file
from snapstore._paths import OWNER_LOCK, OWNER_RECORD, join

Liveness = Literal["alive", "dead", "unknown"]

_RECORD_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class OwnerRecord:
    """Who made a session: for people, and to know whether its lock can be trusted from here."""

    pid: int
    host: str
    boot_id: str
    start_time: str
    opened_at_s: float

    @classmethod
    def of_this_process(cls, opened_at_s: float) -> OwnerRecord:
        return cls(os.getpid(), socket.gethostname(), _boot_id(), _start_time(), opened_at_s)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> OwnerRecord | None:
        """``None`` for anything that is not a record: torn, foreign, or of another version."""
        try:
            fields = json.loads(text)
            record = cls(**fields)
        except (ValueError, TypeError, RecursionError):
            return None
        well_formed = isinstance(record.pid, int) and isinstance(record.opened_at_s, (int, float))
        return record if well_formed else None

    @property
    def same_machine(self) -> bool:
        """True if a lock taken here means that it is not held there: one kernel, or one host name after a reboot."""
        same_kernel = self.boot_id != "" and self.boot_id == _boot_id()
        return same_kernel or self.host == socket.gethostname()


class OwnerLock:
    """The lock of one session, held until ``release`` or the end of the process. A forked child drops its copy."""

    def __init__(self, files: FileSystem, fd: int) -> None:
        self._files = files
        self._fd: int | None = fd

    @classmethod
    def take(
        cls, files: FileSystem, directory: str, *, create: bool, dir_fd: int | None = None
    ) -> OwnerLock | None:
        """Take the lock in ``directory`` without waiting; ``None`` if somebody holds it, or held what stood there.

        With ``dir_fd`` the directory is named below that open one: ``"."`` for that one itself.
        """
        path = join(directory, OWNER_LOCK)
        with _books.change():
            fd = files.open_lock(path, create=create, dir_fd=dir_fd)
            lock = cls(files, fd)
            _books.held.add(lock)
        try:
            if files.lock(fd) and _same_file(files, fd, path, dir_fd):
                return lock
        except BaseException:
            lock.release()
            raise
        lock.release()
        return None

    def is_in(self, directory: str) -> bool:
        """The lock file of this directory is the one that is held here. False also where that is not to be known."""
        try:
            return self._fd is not None and _same_file(
                self._files, self._fd, join(directory, OWNER_LOCK), None
            )
        except OSError:
            return False

    @property
    def stands(self) -> bool:
        """The lock file is still in some directory, wherever that was moved to. Also where it is not to be known."""
        try:
            return self._fd is not None and self._files.status(self._fd).st_nlink > 0
        except OSError:
            return True

    def release(self) -> None:
        """Close the descriptor, which drops the lock. Twice is fine."""
        with _books.change():
            fd, self._fd = self._fd, None
            _books.held.discard(self)
            if fd is not None:
                with suppress(OSError):  # it is closed all the same
                    self._files.close(fd)

    def _forget_in_child(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            # It may be none of this process's: the others are to be closed all the same.
            with suppress(OSError):
                os.close(fd)


# -- fork -----------------------------------------------------------------------------------------------------------
# A forked child closes its copies of the descriptors. That leaves the parent's locks as they are; unlocking would drop
# them, since both share one open file.


class _Books:
    """The descriptors that a child has to close. A fork waits until what is being opened or closed is in the books.

    But not for a disk that hangs: while that system call lasts, there is no descriptor that a child could inherit.
    """

    def __init__(self) -> None:
        self.held: set[OwnerLock] = set()
        self._changed = threading.Condition()
        self._changing = 0
        self._forking = 0

    @contextmanager
    def change(self) -> Iterator[None]:
        """Around a system call and its entry here. Any number of threads at once, but not beside a fork."""
        with self._changed:
            self._changed.wait_for(lambda: not self._forking, _FORK_WAITS_S)
            self._changing += 1
        try:
            yield
        finally:
            with self._changed:
                self._changing -= 1
                self._changed.notify_all()

    def before_fork(self) -> None:
        with self._changed:
            self._forking += 1
            self._changed.wait_for(lambda: not self._changing, _FORK_WAITS_S)

    def after_fork(self) -> None:
        with self._changed:
            self._forking -= 1
            self._changed.notify_all()

    def in_child(self) -> None:
        for lock in self.held:
            lock._forget_in_child()
        self.held.clear()
        self._changed = threading.Condition()  # whoever held the other one is not here
        self._changing = self._forking = 0


_FORK_WAITS_S = 1.0
_books = _Books()
os.register_at_fork(
    before=_books.before_fork, after_in_parent=_books.after_fork, after_in_child=_books.in_child
)


LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What this process, or its machine, has no more of: such an error says nothing of the file."""


def read_record(files: FileSystem, directory: str, *, dir_fd: int | None = None) -> OwnerRecord | None:
    """The owner record of a session, ``None`` if it is missing, torn, or unreadable. ``OSError`` if ``LACKING``."""
    buffer = memoryview(bytearray(_RECORD_BYTES_MAX))
    try:
        with opened(files, files.open_read(join(directory, OWNER_RECORD), dir_fd=dir_fd)) as fd:
            count = read_exactly(files, fd, buffer, 0)
    except OSError as error:
        if error.errno in LACKING:
            raise
        return None
    return OwnerRecord.from_json(bytes(buffer[:count]))


def liveness(
    files: FileSystem, directory: str, record: OwnerRecord | None, *, dir_fd: int | None = None
) -> Liveness:
    """Whether the owner of a session, by its record, is provably dead; never disturbs a live one."""
    if record is None or not record.same_machine:
        return "unknown"
    try:
        lock = OwnerLock.take(files, directory, create=False, dir_fd=dir_fd)
    except OSError:
        return "unknown"
    if lock is None:
        return "alive"
    lock.release()
    return "dead"


def _same_file(files: FileSystem, fd: int, path: str, dir_fd: int | None) -> bool:
    """True if the path still names the file that was locked: another owner may have removed it just before."""
    try:
        there = files.status_at(path, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return same_file(files.status(fd), there)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_time() -> str:
    """Start time of this process in clock ticks since boot (field 22 of /proc/self/stat), or empty."""
    try:
        return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
