"""Who owns a session, and whether that owner is provably dead.

Ownership is a ``flock`` on ``owner.lock``, held for the session's life; the kernel drops it at any death of the
process. The record beside it only informs: a pid proves nothing, it may be another process's by now. Dead is an owner
whose lock can be taken on the machine that it ran on. Alive, or not to be known (another machine, no lock support):
left alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from snapstore._files import (
    FileIdentity,
    FileSystem,
    close_copies,
    close_if_it_is,
    identity_of,
    opened,
    read_exactly,
)
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
    def of_this_process(cls) -> OwnerRecord:
        return cls(os.getpid(), socket.gethostname(), _boot_id(), _start_time(), time.time())

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
        self._identity: FileIdentity | None = None
        self._leaving: int | None = None

    @classmethod
    def take(
        cls, files: FileSystem, directory: str, *, create: bool, dir_fd: int | None = None
    ) -> OwnerLock | None:
        """Take the lock in ``directory`` without waiting; ``None`` if somebody holds it, or held what stood there.

        With ``dir_fd`` the directory is named below that open one: ``"."`` for that one itself.
        """
        path = join(directory, OWNER_LOCK)
        with _being_opened(path, dir_fd):
            fd = files.open_lock(path, create=create, dir_fd=dir_fd)
            lock = cls(files, fd)
            _held.add(lock)
        try:
            if files.lock(fd) and lock._stands_at(fd, path, dir_fd):
                return lock
        except BaseException:
            lock.release()
            raise
        lock.release()
        return None

    def release(self) -> None:
        """Close the descriptor, which drops the lock. Twice is fine."""
        self._leaving = self._fd
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):  # it is closed all the same
                self._files.close(fd)
        _held.discard(self)

    def _stands_at(self, fd: int, path: str, dir_fd: int | None) -> bool:
        """True if the path still names the file that was locked: another owner may have removed it just before."""
        self._identity = identity_of(self._files.status(fd))
        try:
            return self._identity == identity_of(self._files.status_at(path, dir_fd=dir_fd))
        except FileNotFoundError:
            return False

    def _forget_in_child(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
        elif self._leaving is not None and self._identity is not None:
            # The fork came while another thread was closing it: here it may be open still, or be something else's.
            close_if_it_is(self._leaving, self._identity)


_held: set[OwnerLock] = set()
_opening: dict[object, tuple[str, int | None]] = {}
"""Lock files that a thread is opening just now: a fork in that moment may inherit a descriptor that nobody knows yet."""


@contextmanager
def _being_opened(path: str, dir_fd: int | None) -> Iterator[None]:
    me = object()
    _opening[me] = (path, dir_fd)
    try:
        yield
    finally:
        del _opening[me]


def _close_in_child() -> None:
    # Closing leaves the parent's lock as it is; unlocking would drop it, since both share one open file.
    for lock in _held:
        lock._forget_in_child()
    _held.clear()
    for path, dir_fd in _opening.values():
        close_copies(path, dir_fd)
    _opening.clear()


os.register_at_fork(after_in_child=_close_in_child)


def read_record(files: FileSystem, directory: str, *, dir_fd: int | None = None) -> OwnerRecord | None:
    """The owner record of a session, ``None`` if it is missing, torn, or can not be read."""
    try:
        fd = files.open_read(join(directory, OWNER_RECORD), dir_fd=dir_fd)
    except OSError:
        return None
    buffer = memoryview(bytearray(_RECORD_BYTES_MAX))
    try:
        with opened(files, fd):
            count = read_exactly(files, fd, buffer, 0)
    except OSError:
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
