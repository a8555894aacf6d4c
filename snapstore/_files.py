"""The only code that touches the disk, one method an operation: the seam at which tests plant faults.

Every method does one system call (or a loop of one), blocks for as long as the disk does, and raises ``OSError``.
Nothing follows a link in the last part of a path. Names may be given below an open directory (``dir_fd``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

IOV_MAX = 1024
"""Most buffers in one ``writev`` (Linux and macOS)."""


class FileSystem:
    """The real one. ``snapstore.testing.FaultyFileSystem`` wraps it."""

    def make_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        """A directory of mode 0700, whatever the umask. ``FileExistsError`` if it stands already."""
        os.mkdir(path, 0o700, dir_fd=dir_fd)
        os.chmod(path, 0o700, dir_fd=dir_fd)

    def make_parents(self, path: str) -> None:
        """The directories above ``path``, with the modes that the umask leaves; they are not ours to tighten."""
        os.makedirs(os.path.dirname(path), exist_ok=True)

    def create(self, path: str) -> int:
        """A new file of mode 0600, open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def open_lock(self, path: str, *, create: bool) -> int:
        """A lock file, open for reading and writing; made if ``create``."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(path, flags | (os.O_CREAT if create else 0), 0o600)

    def open_read(self, path: str, *, dir_fd: int | None = None) -> int:
        """A regular file, open for reading; anything else (a link, a FIFO, a device) is refused without waiting."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags, dir_fd=dir_fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", path)
        return fd

    def open_directory(self, path: str, *, dir_fd: int | None = None) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, dir_fd=dir_fd)

    def write(self, fd: int, buffers: Sequence[memoryview]) -> int:
        """Bytes written, possibly fewer than given. At most ``IOV_MAX`` buffers."""
        return os.writev(fd, buffers)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Bytes read at ``offset``; 0 at the end of the file."""
        return os.preadv(fd, [buffer], offset)

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)

    def sync_directory(self, path: str) -> None:
        fd = self.open_directory(path)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: str, destination: str) -> None:
        """Atomic on one file system; replaces a file, never a directory that has something in it."""
        os.rename(source, destination)

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        os.unlink(path, dir_fd=dir_fd)

    def remove_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        os.rmdir(path, dir_fd=dir_fd)

    def status(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def status_at(self, path: str, *, dir_fd: int | None = None) -> os.stat_result:
        """The status of the name itself, not of what a link there points to."""
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)

    def names(self, directory: str | int) -> list[str]:
        """The names in a directory, given by path or by descriptor, sorted."""
        return sorted(os.listdir(directory))

    def lock(self, fd: int) -> bool:
        """Take the whole-file lock without waiting. True if it is ours now. The kernel drops it at any death."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def free_bytes(self, path: str) -> int:
        """Bytes that this user can still write below ``path``."""
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize


@contextmanager
def opened(files: FileSystem, fd: int) -> Iterator[int]:
    """Close ``fd`` at the end, also on an error."""
    try:
        yield fd
    finally:
        files.close(fd)


def write_all(
    files: FileSystem,
    fd: int,
    buffers: Sequence[memoryview],
    *,
    chunk_bytes: int,
    go_on: Callable[[], bool],
) -> bool:
    """Write every buffer, ``chunk_bytes`` at a time; False if ``go_on()`` said no before the end."""
    for chunk in _chunks(buffers, chunk_bytes):
        if not go_on():
            return False
        while chunk:
            written = files.write(fd, chunk)
            if written == 0:
                raise OSError(errno.EIO, "the file takes no more bytes, and gives no reason")
            chunk = _rest(chunk, written)
    return True


def read_exactly(files: FileSystem, fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on; bytes read, fewer only where the file ends."""
    done = 0
    while done < len(buffer):
        count = files.read_into(fd, buffer[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def disk_bytes(status: os.stat_result) -> int:
    """Bytes of disk that a file takes: blocks, not its length. POSIX counts them in units of 512."""
    return status.st_blocks * 512


def remove_tree(
    files: FileSystem,
    path: str,
    *,
    dir_fd: int | None = None,
    between: Callable[[], None] = lambda: None,
    keep_last: str | None = None,
) -> tuple[int, list[OSError]]:
    """Remove a directory and all in it, by descriptor, following no link. Bytes of disk freed, and what would not go.

    ``between`` is called before each removal: slow deletions let urgent work through there. What is gone already is
    fine; what will not go is reported and passed over. ``keep_last`` names a file of the top directory that goes last.
    """
    freed, errors = 0, []
    try:
        fd = files.open_directory(path, dir_fd=dir_fd)
    except FileNotFoundError:
        return 0, []
    except OSError as error:
        return 0, [error]
    with opened(files, fd):
        names = files.names(fd)
        for name in sorted(names, key=lambda name: name == keep_last):
            between()
            more, wrong = _remove_entry(files, name, fd, between)
            freed += more
            errors += wrong
    errors += _tolerating_absence(lambda: files.remove_directory(path, dir_fd=dir_fd))
    return freed, errors


def _remove_entry(
    files: FileSystem, name: str, dir_fd: int, between: Callable[[], None]
) -> tuple[int, list[OSError]]:
    try:
        status = files.status_at(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return 0, []
    except OSError as error:
        return 0, [error]
    if stat.S_ISDIR(status.st_mode):
        return remove_tree(files, name, dir_fd=dir_fd, between=between)
    wrong = _tolerating_absence(lambda: files.unlink(name, dir_fd=dir_fd))
    return (0 if wrong else disk_bytes(status)), wrong


def _tolerating_absence(action: Callable[[], None]) -> list[OSError]:
    try:
        action()
    except FileNotFoundError:
        return []
    except OSError as error:
        return [error]
    return []


def _chunks(buffers: Sequence[memoryview], chunk_bytes: int) -> Iterator[list[memoryview]]:
    """Group and cut ``buffers`` into lists of at most ``chunk_bytes`` and ``IOV_MAX`` views."""
    chunk: list[memoryview] = []
    room = chunk_bytes
    for buffer in buffers:
        while len(buffer):
            piece, buffer = buffer[:room], buffer[room:]
            chunk.append(piece)
            room -= len(piece)
            if room == 0 or len(chunk) == IOV_MAX:
                yield chunk
                chunk, room = [], chunk_bytes
    if chunk:
        yield chunk


def _rest(chunk: list[memoryview], written: int) -> list[memoryview]:
    """What is left of ``chunk`` after a short write."""
    for index, buffer in enumerate(chunk):
        if written < len(buffer):
            return [buffer[written:], *chunk[index + 1 :]]
        written -= len(buffer)
    return []
