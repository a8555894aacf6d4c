"""Who owns a session, and whether that owner is provably dead.

Ownership is a ``flock`` on ``owner.lock``, held for the session's life; the kernel drops it at any death of the process.
The record beside it only informs: a pid proves nothing, it may be another process's by now. Dead is an owner whose lock
can be taken on the machine that it ran on. Alive, or not to be known (another machine, no lock support): left alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from snapstore._files import FileSystem, opened, read_exactly
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
        return self.boot_id == _boot_id() or self.host == socket.gethostname()


class OwnerLock:
    """The lock of one session, held until ``release`` or the end of the process. A forked child drops its copy."""

    def __init__(self, files: FileSystem, fd: int) -> None:
        self._files = files
        self._fd: int | None = fd
        _held.add(self)

    @classmethod
    def take(cls, files: FileSystem, directory: str, *, create: bool) -> OwnerLock | None:
        """Take the lock in ``directory`` without waiting; ``None`` if somebody holds it, or holds what stood there before."""
        path = join(directory, OWNER_LOCK)
        fd = files.open_lock(path, create=create)
        try:
            if files.lock(fd) and _same_file(files, fd, path):
                return cls(files, fd)
        except BaseException:
            files.close(fd)
            raise
        files.close(fd)
        return None

    def release(self) -> None:
        """Close the descriptor, which drops the lock. Twice is fine."""
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is not None:
            self._files.close(fd)

    def _forget_in_child(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


_held: weakref.WeakSet[OwnerLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # Closing leaves the parent's lock as it is; unlocking would drop it, since both share one open file.
    for lock in list(_held):
        lock._forget_in_child()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def read_record(files: FileSystem, directory: str) -> OwnerRecord | None:
    """The owner record of a session, ``None`` if it is missing or torn."""
    try:
        fd = files.open_read(join(directory, OWNER_RECORD))
    except OSError:
        return None
    buffer = memoryview(bytearray(_RECORD_BYTES_MAX))
    with opened(files, fd):
        count = read_exactly(files, fd, buffer, 0)
    return OwnerRecord.from_json(bytes(buffer[:count]))


def liveness(files: FileSystem, directory: str) -> Liveness:
    """Whether the owner of a session is provably dead; never disturbs a live one."""
    record = read_record(files, directory)
    if record is None or not record.same_machine:
        return "unknown"
    try:
        lock = OwnerLock.take(files, directory, create=False)
    except OSError:
        return "unknown"
    if lock is None:
        return "alive"
    lock.release()
    return "dead"


def _same_file(files: FileSystem, fd: int, path: str) -> bool:
    try:
        there = files.status_at(path)
    except FileNotFoundError:
        return False
    here = files.status(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


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
