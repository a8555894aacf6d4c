"""A disk in memory, as POSIX has it: inodes, names, descriptors and locks, with the errors of Linux.

    disk = MemoryFileSystem()
    store = SnapshotStore("/root", file_system=disk)      # nothing of it touches a real disk

What it leaves out: symbolic links (there is no operation that makes one), permissions (modes are kept, never enforced)
and space that runs out. Descriptors begin at 2**30, so that none is ever taken for one of the process. Every method is
one atomic step and safe from any thread.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from snapstore._files import IOV_MAX, FileSystem

__all__ = ["Change", "MemoryFileSystem", "Named", "Synced", "Written"]

ROOT = 1
"""Number of the inode of ``/``."""

_FIRST_FD = 2**30
_NAME_BYTES_MAX = 255
_BLOCK_BYTES = 4096
_FREE_BYTES = 2**40


@dataclass(slots=True, eq=False)
class File:
    """An inode with bytes. ``names``: how many directory entries lead to it."""

    number: int
    device: int
    mode: int
    content: bytearray = field(default_factory=bytearray)
    names: int = 0
    changed_s: float = field(default_factory=time.time)


@dataclass(slots=True, eq=False)
class Directory:
    """An inode with entries. ``parent`` is ``None`` for ``/`` and for one that was removed."""

    number: int
    device: int
    mode: int
    entries: dict[str, Node] = field(default_factory=dict)
    parent: Directory | None = None
    removed: bool = False
    changed_s: float = field(default_factory=time.time)


Node = File | Directory


@dataclass(frozen=True, slots=True)
class Named:
    """Entries that changed in one atomic step: directory, name, and the inode that it leads to now (``None``: gone)."""

    entries: tuple[tuple[int, str, int | None], ...]
    leads_to_directory: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes that came into a file."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Synced:
    """All that had changed in this file, or in the entries of this directory, is on the medium."""

    inode: int


Change = Named | Written | Synced


@dataclass(slots=True, eq=False)
class _Open:
    """An open file description. ``at``: where the next write goes."""

    node: Node
    readable: bool
    writable: bool
    locked: bool = False


class MemoryFileSystem(FileSystem):
    """See the module. ``write_bytes_max`` makes writes short, as a disk may."""

    def __init__(self, *, write_bytes_max: int | None = None) -> None:
        super().__init__()
        self._mutex = threading.Lock()
        self._write_bytes_max = write_bytes_max
        self._numbers = ROOT
        self._devices = 1
        self._top = Directory(ROOT, 1, 0o755)
        self._descriptors: dict[int, _Open] = {}
        self._next_fd = _FIRST_FD

    @classmethod
    def holding(cls, tree: Mapping[str, bytes | None]) -> MemoryFileSystem:
        """A disk with these paths, as ``tree`` gives them: the bytes of a file, ``None`` for a directory."""
        disk = MemoryFileSystem()
        for path in sorted(tree):
            content = tree[path]
            if content is None:
                disk.make_directory(path)
            else:
                directory, name = disk._place(path, None)
                disk._make_file(directory, name, path).content = bytearray(content)
        return disk

    # -- for the test -------------------------------------------------------------------------------------------

    @property
    def open_descriptors(self) -> int:
        """How many were opened and not closed."""
        with self._mutex:
            return len(self._descriptors)

    def tree(self) -> dict[str, bytes | None]:
        """Every path, with the bytes of a file and ``None`` for a directory."""
        with self._mutex:
            return dict(_walk(self._top, ""))

    def mount(self, path: str) -> None:
        """Make a directory that is another file system: nothing is renamed or linked across its edge."""
        with self._mutex:
            self._devices += 1
            self._make_directory(path, None, 0o755, self._devices)

    # -- the operations, see FileSystem -------------------------------------------------------------------------

    def make_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        """See ``FileSystem``, as for all that follow."""
        with self._mutex:
            self._make_directory(path, dir_fd, 0o700, None)

    def make_parents(self, path: str) -> None:
        """One after the other, as ``os.makedirs`` does."""
        with self._mutex:
            whole = os.path.dirname(path)
            for above in accumulate(whole.split("/"), lambda upper, part: f"{upper}/{part}"):
                if above:
                    self._make_if_missing(above, last=above == whole)

    def create(self, path: str, *, dir_fd: int | None = None) -> int:
        """See ``FileSystem``."""
        with self._mutex:
            directory, name = self._place(path, dir_fd)
            if self._entry(directory, name) is not None:
                raise _error(errno.EEXIST, path)
            return self._open(self._make_file(directory, name, path), readable=False, writable=True)

    def open_lock(self, path: str, *, create: bool, dir_fd: int | None = None) -> int:
        """See ``FileSystem``."""
        with self._mutex:
            directory, name = self._place(path, dir_fd)
            node = self._entry(directory, name)
            if node is None and create:
                node = self._make_file(directory, name, path)
            if node is None:
                raise _error(errno.ENOENT, path)
            if isinstance(node, Directory):
                raise _error(errno.EISDIR, path)
            return self._open(node, readable=True, writable=True)

    def tighten(self, fd: int) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            node = self._description(fd).node
            if node.mode & 0o077:
                node.mode &= 0o700

    def open_read(self, path: str, *, dir_fd: int | None = None) -> int:
        """See ``FileSystem``."""
        with self._mutex:
            node = self._node(path, dir_fd)
            if isinstance(node, Directory):
                raise OSError(errno.EINVAL, "not a regular file", path)
            return self._open(node, readable=True, writable=False)

    def open_directory(self, path: str, *, dir_fd: int | None = None) -> int:
        """See ``FileSystem``."""
        with self._mutex:
            node = self._node(path, dir_fd)
            if isinstance(node, File):
                raise _error(errno.ENOTDIR, path)
            return self._open(node, readable=True, writable=False)

    def hold(self, path: str) -> None:
        """See ``FileSystem``. A path is one step here."""
        self.look_for(path)

    def look_for(self, path: str) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            self._node(path, None)

    def reserve(self, fd: int, nbytes: int) -> None:  # noqa: ARG002 - as the real one
        """See ``FileSystem``. There is always room."""
        with self._mutex:
            if not self._description(fd).writable:
                raise _error(errno.EBADF)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """See ``FileSystem``."""
        with self._mutex:
            opened = self._description(fd)
            if not opened.writable or isinstance(opened.node, Directory):
                raise _error(errno.EBADF)
            if len(buffers) > IOV_MAX:
                raise _error(errno.EINVAL)
            data = b"".join(buffers)[: self._write_bytes_max]
            file, at = opened.node, offset
            if not data:
                return 0
            if at > len(file.content):
                file.content.extend(bytes(at - len(file.content)))
            file.content[at : at + len(data)] = data
            file.changed_s = time.time()
            self._happened(Written(file.number, at, data))
            return len(data)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """See ``FileSystem``."""
        with self._mutex:
            opened = self._description(fd)
            if not opened.readable:
                raise _error(errno.EBADF)
            if isinstance(opened.node, Directory):
                raise _error(errno.EISDIR)
            if offset < 0:
                raise _error(errno.EINVAL)
            part = opened.node.content[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            return len(part)

    def sync_data(self, fd: int) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            self._happened(Synced(self._description(fd).node.number))

    def sync_directory(self, path: str) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            node = self._node(path, None)
            if isinstance(node, File):
                raise _error(errno.ENOTDIR, path)
            self._happened(Synced(node.number))

    def close(self, fd: int) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            self._description(fd)
            del self._descriptors[fd]

    def rename(
        self, source: str, destination: str, *, from_fd: int | None = None, to_fd: int | None = None
    ) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            here, name = self._place(source, from_fd)
            there, target = self._place(destination, to_fd)
            if {name, target} & {"", ".", ".."}:
                raise _error(errno.EBUSY, source, destination)
            node = self._entry(here, name)
            if node is None:
                raise _error(errno.ENOENT, source, destination)
            replaced = self._entry(there, target)
            if replaced is node:
                return
            number = _why_no_rename(node, there, replaced)
            if number:
                raise _error(number, source, destination)
            _replace(replaced)
            del here.entries[name]
            there.entries[target] = node
            if isinstance(node, Directory):
                node.parent = there
            here.changed_s = there.changed_s = time.time()
            entries = ((here.number, name, None), (there.number, target, node.number))
            self._happened(Named(entries, isinstance(node, Directory)))

    def link(
        self, source: str, destination: str, *, from_fd: int | None = None, to_fd: int | None = None
    ) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            node = self._node(source, from_fd)
            there, target = self._place(destination, to_fd)
            if self._entry(there, target) is not None:
                raise _error(errno.EEXIST, source, destination)
            if there.device != node.device:
                raise _error(errno.EXDEV, source, destination)
            if isinstance(node, Directory):
                raise _error(errno.EPERM, source, destination)
            node.names += 1
            self._put(there, target, node, destination)

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            directory, name = self._place(path, dir_fd)
            node = self._entry(directory, name)
            if node is None:
                raise _error(errno.ENOENT, path)
            if isinstance(node, Directory):
                raise _error(errno.EISDIR, path)
            node.names -= 1
            self._take(directory, name)

    def remove_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        """See ``FileSystem``."""
        with self._mutex:
            directory, name = self._place(path, dir_fd)
            node = self._entry(directory, name)
            if node is None:
                raise _error(errno.ENOENT, path)
            if isinstance(node, File):
                raise _error(errno.ENOTDIR, path)
            if name in ("", "."):
                raise _error(errno.EBUSY if node is self._top else errno.EINVAL, path)
            if node.entries or name == "..":
                raise _error(errno.ENOTEMPTY, path)
            if node.device != directory.device:
                raise _error(errno.EBUSY, path)
            node.removed = True
            self._take(directory, name)

    def status(self, fd: int) -> os.stat_result:
        """See ``FileSystem``."""
        with self._mutex:
            return _status(self._description(fd).node)

    def status_at(self, path: str, *, dir_fd: int | None = None) -> os.stat_result:
        """See ``FileSystem``."""
        with self._mutex:
            return _status(self._node(path, dir_fd))

    def names(self, directory: str | int) -> list[str]:
        """See ``FileSystem``."""
        with self._mutex:
            node = self._named(directory)
            if isinstance(node, File):
                raise _error(errno.ENOTDIR)
            return sorted(node.entries)

    def lock(self, fd: int) -> bool:
        """See ``FileSystem``."""
        with self._mutex:
            own = self._description(fd)
            others = (each for each in self._descriptors.values() if each is not own)
            if any(each.locked and each.node is own.node for each in others):
                return False
            own.locked = True
            return True

    def free_bytes(self, path: str | int) -> int:
        """Always the same."""
        with self._mutex:
            self._named(path)
            return _FREE_BYTES

    def resolve(self, path: str) -> str:
        """There are no links."""
        return os.path.normpath(path)

    def first_hole(self, fd: int, offset: int) -> int:
        """No file has any."""
        with self._mutex:
            node = self._description(fd).node
            size = 0 if isinstance(node, Directory) else len(node.content)
            if offset >= size:
                raise _error(errno.ENXIO)
            return size

    def tells_mounts(self) -> bool:
        """See ``mount``."""
        return True

    def mount_id(self, fd: int) -> int:
        """See ``FileSystem``."""
        with self._mutex:
            return self._description(fd).node.device

    def file_system_type(self, fd: int) -> str:
        """Its own."""
        with self._mutex:
            self._description(fd)
            return "snapstore-memory"

    # -- inside, the mutex held ---------------------------------------------------------------------------------

    def _happened(self, change: Change) -> None:
        """For those who keep a record of it."""

    def _description(self, fd: int) -> _Open:
        try:
            return self._descriptors[fd]
        except KeyError:
            raise _error(errno.EBADF) from None

    def _named(self, path: str | int) -> Node:
        return self._description(path).node if isinstance(path, int) else self._node(path, None)

    def _open(self, node: Node, *, readable: bool, writable: bool) -> int:
        fd, self._next_fd = self._next_fd, self._next_fd + 1
        self._descriptors[fd] = _Open(node, readable, writable)
        return fd

    def _start(self, path: str, dir_fd: int | None) -> Directory:
        if path.startswith("/") or dir_fd is None:
            return self._top
        node = self._description(dir_fd).node
        if isinstance(node, File):
            raise _error(errno.ENOTDIR, path)
        return node

    def _place(self, path: str, dir_fd: int | None) -> tuple[Directory, str]:
        """The directory that a path's last part is in, and that last part (empty for ``/``)."""
        if not path:
            raise _error(errno.ENOENT, path)
        parts = [part for part in path.split("/") if part]
        node: Node | None = self._start(path, dir_fd)
        for part in parts[:-1]:
            assert node is not None
            if isinstance(node, File):
                raise _error(errno.ENOTDIR, path)
            node = self._entry(node, part)
            if node is None:
                raise _error(errno.ENOENT, path)
        if isinstance(node, File):
            raise _error(errno.ENOTDIR, path)
        assert node is not None
        return node, parts[-1] if parts else ""

    def _entry(self, directory: Directory, name: str) -> Node | None:
        if name in ("", "."):
            return directory
        if name == "..":
            return directory.parent or directory
        if len(os.fsencode(name)) > _NAME_BYTES_MAX:
            raise _error(errno.ENAMETOOLONG, name)
        return directory.entries.get(name)

    def _node(self, path: str, dir_fd: int | None) -> Node:
        node = self._entry(*self._place(path, dir_fd))
        if node is None:
            raise _error(errno.ENOENT, path)
        return node

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _make_directory(self, path: str, dir_fd: int | None, mode: int, device: int | None) -> None:
        directory, name = self._place(path, dir_fd)
        if self._entry(directory, name) is not None:
            raise _error(errno.EEXIST, path)
        made = Directory(self._number(), device or directory.device, mode, parent=directory)
        self._put(directory, name, made, path)

    def _make_if_missing(self, path: str, *, last: bool) -> None:
        try:
            self._make_directory(path, None, 0o755, None)
        except FileExistsError:
            if last and isinstance(self._node(path, None), File):
                raise

    def _make_file(self, directory: Directory, name: str, path: str) -> File:
        file = File(self._number(), directory.device, 0o600, names=1)
        self._put(directory, name, file, path)
        return file

    def _put(self, directory: Directory, name: str, node: Node, path: str) -> None:
        if directory.removed:
            raise _error(errno.ENOENT, path)
        directory.entries[name] = node
        directory.changed_s = time.time()
        self._happened(Named(((directory.number, name, node.number),), isinstance(node, Directory)))

    def _take(self, directory: Directory, name: str) -> None:
        del directory.entries[name]
        directory.changed_s = time.time()
        self._happened(Named(((directory.number, name, None),)))


def _error(number: int, path: str | None = None, other: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path, None, other)


def _why_no_rename(node: Node, there: Directory, replaced: Node | None) -> int:
    """The error of a rename to ``there``, or 0."""
    if there.removed:
        return errno.ENOENT
    if there.device != node.device:
        return errno.EXDEV
    if isinstance(node, Directory) and node in _upwards(there):
        return errno.EINVAL
    if isinstance(replaced, Directory):
        if isinstance(node, File):
            return errno.EISDIR
        return errno.ENOTEMPTY if replaced.entries else 0
    return errno.ENOTDIR if isinstance(node, Directory) and replaced is not None else 0


def _upwards(directory: Directory | None) -> list[Directory]:
    found = []
    while directory is not None:
        found.append(directory)
        directory = directory.parent
    return found


def _replace(node: Node | None) -> None:
    if isinstance(node, File):
        node.names -= 1
    elif node is not None:
        node.removed = True


def _status(node: Node) -> os.stat_result:
    if isinstance(node, File):
        kind, names, size = stat.S_IFREG, node.names, len(node.content)
    else:
        below = sum(isinstance(each, Directory) for each in node.entries.values())
        kind, names, size = stat.S_IFDIR, 0 if node.removed else 2 + below, _BLOCK_BYTES
    blocks = -(-size // _BLOCK_BYTES) * (_BLOCK_BYTES // 512)
    stamp = node.changed_s
    fields = (kind | node.mode, node.number, node.device, names, os.getuid(), os.getgid(), size)
    times = {"st_atime": stamp, "st_mtime": stamp, "st_ctime": stamp, "st_mtime_ns": int(stamp * 1e9)}
    return os.stat_result((*fields, int(stamp), int(stamp), int(stamp)), {**times, "st_blocks": blocks})


def _walk(directory: Directory, path: str) -> list[tuple[str, bytes | None]]:
    found: list[tuple[str, bytes | None]] = []
    for name, node in sorted(directory.entries.items()):
        below = f"{path}/{name}"
        if isinstance(node, File):
            found.append((below, bytes(node.content)))
        else:
            found.append((below, None))
            found += _walk(node, below)
    return found
