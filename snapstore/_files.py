"""The only code that touches the disk, one method an operation: the seam at which tests plant faults.

Every method does one system call (or a loop of one), blocks for as long as the disk does, and raises ``OSError``.
Nothing follows a link in the last part of a path, and below a guarded root in no part. Names may be given below an
open directory (``dir_fd``).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from snapstore._ways import Ways

IOV_MAX = 1024
"""Most buffers in one ``writev`` (Linux and macOS)."""

TREE_DEPTH_MAX = 64
"""Deepest tree that is walked: ours have three levels, and each takes a descriptor and some stack."""


class FileSystem:
    """The real one. ``snapstore.testing.FaultyFileSystem`` wraps it."""

    def __init__(self) -> None:
        self.ways = Ways()
        """Which directories are guarded, and which are held. To change that takes no trip to the disk."""

    def hold(self, path: str) -> None:
        """Keep a directory open until ``ways.let_go``: what is below it is reached from it, wherever it is moved to."""
        self.ways.hold(path)

    def look_for(self, path: str) -> None:
        """``FileNotFoundError`` unless there is something at the path and, where it is held, still that."""
        with self.ways.from_root(path) as (name, fd):
            there = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if not self.ways.is_held(path, there):
            raise FileNotFoundError(errno.ENOENT, "another directory stands here now", path)

    def make_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        """A directory of mode 0700, whatever the umask. ``FileExistsError`` if it stands already."""
        with self.ways.to(path, dir_fd) as (name, fd):
            os.mkdir(name, 0o700, dir_fd=fd)
            made = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_IMODE(made.st_mode) != 0o700:
                os.chmod(name, 0o700, dir_fd=fd, follow_symlinks=False)

    def make_parents(self, path: str) -> None:
        """The directories above ``path``, with the modes that the umask leaves; they are not ours to tighten."""
        os.makedirs(os.path.dirname(path), exist_ok=True)

    def create(self, path: str, *, dir_fd: int | None = None) -> int:
        """A new file of mode 0600, whatever the umask, open for writing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self.ways.to(path, dir_fd) as (name, fd):
            return _private(os.open(name, flags, 0o600, dir_fd=fd))

    def open_lock(self, path: str, *, create: bool, dir_fd: int | None = None) -> int:
        """A lock file, open for reading and writing (on a read-only disk, for reading); made if ``create``."""
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with self.ways.to(path, dir_fd) as (name, fd):
            if create:
                return _private(os.open(name, flags | os.O_RDWR | os.O_CREAT, 0o600, dir_fd=fd))
            try:
                return os.open(name, flags | os.O_RDWR, dir_fd=fd)
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
                return os.open(name, flags | os.O_RDONLY, dir_fd=fd)

    def tighten(self, fd: int) -> None:
        """Take from group and others whatever they may do with an open file or directory."""
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & 0o077:
            os.fchmod(fd, mode & 0o700)

    def open_read(self, path: str, *, dir_fd: int | None = None) -> int:
        """A regular file, open for reading; anything else (a link, a FIFO, a device) is refused without waiting.

        It is what stands under the path now, whatever directory of it is held: what was moved away may come back.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self.ways.from_root(path, dir_fd) as (name, within):
            fd = os.open(name, flags, dir_fd=within)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", path)
        return fd

    def open_directory(self, path: str, *, dir_fd: int | None = None) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with self.ways.to(path, dir_fd) as (name, fd):
            return os.open(name, flags, dir_fd=fd)

    def reserve(self, fd: int, nbytes: int) -> None:
        """Room on disk for a file that will be so long; nothing where that is not to be had but by writing.

        A large file is then written in 0.7 x the time (ext4), and a full disk is known before the first byte.
        """
        if _fallocate is not None and _fallocate(fd, _KEEP_SIZE, 0, nbytes) != 0:
            error = ctypes.get_errno()
            if error not in _NO_RESERVING:
                raise OSError(error, os.strerror(error))

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes written from ``offset`` on, possibly fewer than given. At most ``IOV_MAX`` buffers."""
        return os.pwritev(fd, buffers, offset)

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

    def rename(
        self, source: str, destination: str, *, from_fd: int | None = None, to_fd: int | None = None
    ) -> None:
        """Atomic on one file system; replaces a file, never a directory that has something in it."""
        with (
            self.ways.to(source, from_fd) as (old, old_fd),
            self.ways.to(destination, to_fd) as (new, new_fd),
        ):
            os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)

    def link(
        self, source: str, destination: str, *, from_fd: int | None = None, to_fd: int | None = None
    ) -> None:
        """A second name for a file. ``FileExistsError`` where there is one already: it replaces nothing."""
        with (
            self.ways.to(source, from_fd) as (old, old_fd),
            self.ways.to(destination, to_fd) as (new, new_fd),
        ):
            os.link(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd, follow_symlinks=False)

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        with self.ways.to(path, dir_fd) as (name, fd):
            os.unlink(name, dir_fd=fd)

    def remove_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        with self.ways.to(path, dir_fd) as (name, fd):
            os.rmdir(name, dir_fd=fd)

    def status(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def status_at(self, path: str, *, dir_fd: int | None = None) -> os.stat_result:
        """The status of the name itself, not of what a link there points to."""
        with self.ways.to(path, dir_fd) as (name, fd):
            return os.stat(name, dir_fd=fd, follow_symlinks=False)

    def names(self, directory: str | int) -> list[str]:
        """The names in a directory, given by path or by descriptor, sorted."""
        if isinstance(directory, int):
            return sorted(os.listdir(directory))
        fd = FileSystem.open_directory(self, directory)
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def lock(self, fd: int) -> bool:
        """Take the whole-file lock without waiting. True if it is ours now. The kernel drops it at any death."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def free_bytes(self, path: str | int) -> int:
        """Bytes that this user can still write below ``path``, which may be an open directory."""
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize

    def resolve(self, path: str) -> str:
        """The absolute path without any link in it."""
        return os.path.realpath(path)

    def first_hole(self, fd: int, offset: int) -> int:
        """Where, from ``offset`` on, the first bytes lie that were never written; the file's end if none do."""
        return os.lseek(fd, offset, os.SEEK_HOLE)

    def tells_mounts(self) -> bool:
        """False where two mounts of one file system can not be told apart: on Linux, without ``/proc``."""
        return sys.platform != "linux" or os.path.isdir("/proc/self/fdinfo")

    def mount_id(self, fd: int) -> int:
        """The mount that an open file was reached through; its device, where mounts can not be told apart.

        Differs also between two mounts of one file system, where ``st_dev`` does not. The kernel says it of the open
        file, so nothing can be mounted or moved between the look and the use.
        """
        if sys.platform == "linux" and self.tells_mounts():
            for line in _read_proc(f"/proc/self/fdinfo/{fd}").splitlines():
                if line.startswith("mnt_id:"):
                    return int(line.removeprefix("mnt_id:"))
        return os.fstat(fd).st_dev

    def file_system_type(self, fd: int) -> str:
        """Name of the file system that an open file is on (``ext4``, ``nfs4``, ...); empty if it is not to be known."""
        if sys.platform != "linux":
            return ""
        mount = str(self.mount_id(fd))
        for line in _read_proc("/proc/self/mountinfo").splitlines():
            fields, _, described = line.partition(" - ")
            if fields.split(" ", 1)[0] == mount:
                return described.split(" ", 1)[0]
        return ""


GONE = frozenset({errno.ENOENT, errno.ESTALE})
"""What is said of a directory that somebody removed: on a network file system, of one that is open, the latter."""

_KEEP_SIZE = 1
_NO_RESERVING = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EINTR})
"""Not known here, not allowed in a sandbox, or a signal came: the file is written without."""


def _fallocate_here() -> Callable[[int, int, int, int], int] | None:
    """``fallocate(2)``: ``os.posix_fallocate`` would write zeros where the file system can not reserve."""
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return None
    off_t = ctypes.c_long  # on 64-bit machines
    function.argtypes = (ctypes.c_int, ctypes.c_int, off_t, off_t)
    return function if sys.maxsize > 2**32 else None


_fallocate = _fallocate_here()


def _private(fd: int) -> int:
    """A file that was just made, of mode 0600 whatever the umask took away. To look costs no trip to the disk."""
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) != 0o600:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read_proc(path: str) -> str:
    """A whole file of ``/proc``, which is text that the kernel makes up as it is read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 64 * 1024):
            parts.append(part)
        return os.fsdecode(b"".join(parts))
    finally:
        os.close(fd)


@contextmanager
def opened(files: FileSystem, fd: int) -> Iterator[int]:
    """Close ``fd`` at the end, also on an error."""
    try:
        yield fd
    finally:
        files.close(fd)


def exists(files: FileSystem, path: str) -> bool:
    """True if something is called ``path``, a dangling link too."""
    try:
        files.status_at(path)
    except FileNotFoundError:
        return False
    return True


def rename_surely(
    files: FileSystem,
    source: str,
    destination: str,
    is_it: Callable[[os.stat_result], bool] = lambda _: True,
) -> None:
    """``rename``, of which no error counts that was made all the same: a network file system may say so of a retry.

    ``is_it`` knows by its status what was renamed, where the new name is not one that nobody else gives.
    """
    try:
        files.rename(source, destination)
    except OSError:
        with suppress(OSError):
            if is_it(files.status_at(destination)):
                return
        raise


def unlink_surely(files: FileSystem, path: str) -> None:
    """``unlink``, of which no error counts where nothing bears the name any more."""
    try:
        files.unlink(path)
    except OSError:
        with suppress(OSError):
            if not exists(files, path):
                return
        raise


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Two looks at one file, under whatever names."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def write_all(files: FileSystem, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write every buffer, one after the other, from ``offset`` on."""
    for start in range(0, len(buffers), IOV_MAX):
        group = buffers[start : start + IOV_MAX]
        left = sum(map(len, group))
        while left:
            written = files.write(fd, group, offset)
            if written == 0:
                raise OSError(errno.EIO, "the file takes no more bytes, and gives no reason")
            offset += written
            left -= written
            if left:
                group = _rest(group, written)


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


def freed_by_unlinking(status: os.stat_result) -> int:
    """Bytes of disk that come free with this name: none while the file has another one."""
    return disk_bytes(status) if status.st_nlink == 1 else 0


def remove_tree(
    files: FileSystem,
    path: str,
    *,
    dir_fd: int | None = None,
    between: Callable[[], None] = lambda: None,
    keep_last: str | None = None,
    depth: int = TREE_DEPTH_MAX,
) -> tuple[int, list[OSError]]:
    """Remove a directory and all in it, by descriptor, following no link. Bytes of disk freed, and what would not go.

    ``between`` is called before each removal: slow deletions let urgent work through there. What is gone already is
    fine; what will not go is reported and passed over: so are other file systems mounted below, and what is nested
    too deep. ``keep_last`` names a file of the top directory that goes last, and stays as long as anything else does.
    """
    freed = 0
    errors: list[OSError] = []
    try:
        with opened(files, open_within(files, path, dir_fd, depth)) as fd:
            for name in sorted(files.names(fd), key=lambda name: name == keep_last):
                if name == keep_last and (errors or files.names(fd) != [keep_last]):
                    break
                between()
                more, wrong = _remove_entry(files, name, fd, between, depth)
                freed += more
                errors += wrong
    except FileNotFoundError:
        pass  # gone already, if the disk tells the truth: the removal below would not go if it does not
    except OSError as error:
        errors.append(error)
    if not errors:
        errors += _tolerating_absence(lambda: files.remove_directory(path, dir_fd=dir_fd))
    return freed, errors


def open_within(
    files: FileSystem,
    path: str,
    dir_fd: int | None,
    depth: int = TREE_DEPTH_MAX,
    *,
    mount: int | None = None,
) -> int:
    """Open a directory below an open one: through no link, and not where another file system is mounted.

    ``mount`` is that of the open one, where the caller knows it.
    """
    if depth <= 0:
        raise OSError(errno.ELOOP, "directories are nested too deep here", path)
    fd = files.open_directory(path, dir_fd=dir_fd)
    try:
        if mount is None and dir_fd is not None:
            mount = files.mount_id(dir_fd)
        if mount is not None and files.mount_id(fd) != mount:
            raise OSError(errno.EXDEV, "another file system is mounted here", path)
    except BaseException:
        files.close(fd)
        raise
    return fd


def _remove_entry(
    files: FileSystem, name: str, dir_fd: int, between: Callable[[], None], depth: int
) -> tuple[int, list[OSError]]:
    try:
        status = files.status_at(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return 0, []
    except OSError as error:
        return 0, [error]
    if stat.S_ISDIR(status.st_mode):
        return remove_tree(files, name, dir_fd=dir_fd, between=between, depth=depth - 1)
    wrong = _tolerating_absence(lambda: files.unlink(name, dir_fd=dir_fd))
    return (0 if wrong else freed_by_unlinking(status)), wrong


def _tolerating_absence(action: Callable[[], None]) -> list[OSError]:
    try:
        action()
    except FileNotFoundError:
        return []
    except OSError as error:
        return [error]
    return []


def _rest(group: Sequence[memoryview], written: int) -> list[memoryview]:
    """What is left of ``group`` after a short write."""
    for index, buffer in enumerate(group):
        if written < len(buffer):
            return [buffer[written:], *group[index + 1 :]]
        written -= len(buffer)
    return []
