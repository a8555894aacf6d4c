"""A root under maintenance: opened once, and from then on everything goes by descriptor.

Whatever is swapped for a link while a command runs, be it the root itself, can not lead it out: names are looked up
below descriptors that are open already, no link is followed, and a directory on another mount is not entered. A bind
mount of the same device has the same ``st_dev``, so the mount itself is compared. Of the three ways to see it
(``openat2`` with ``RESOLVE_NO_XDEV``, ``statx``, ``/proc/self/fdinfo``) the last is taken: it needs no C calls, is
allowed in every container, and speaks of the very descriptor that is used, which a look into the mount table would not.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from snapstore import _paths
from snapstore._errors import RootError
from snapstore._files import FileSystem, open_within, opened
from snapstore._session import check_root

_BARE_REPOSITORY = {"HEAD", "objects", "refs"}


@dataclass(frozen=True, slots=True)
class Root:
    """A store's root, open. ``path`` is for messages only."""

    files: FileSystem
    path: str
    fd: int
    mount: int

    @contextmanager
    def directory(self, name: str, within: int | None = None) -> Iterator[int]:
        """A directory by its name below the root, or below an open directory of it."""
        with opened(self.files, self.open(name, within)) as fd:
            yield fd

    def open(self, name: str, within: int | None = None) -> int:
        """``OSError`` for a link (``ELOOP``, ``ENOTDIR``) and where another file system is mounted (``EXDEV``)."""
        return open_within(self.files, name, self.fd if within is None else within, mount=self.mount)


@contextmanager
def opened_root(files: FileSystem, path: str, *, to_change: bool = False) -> Iterator[Root]:
    """Open a root that carries our marker; ``RootError`` otherwise, with ``ENOENT`` if nothing is there.

    ``to_change`` also refuses what nobody should point a tidying command at, marker or not.
    """
    path = os.path.abspath(path)
    try:
        fd = files.open_directory(path)
    except OSError as error:
        raise _unusable(files, path, error) from error
    with opened(files, fd):
        root = Root(files, path, fd, files.mount_id(fd))
        if to_change:
            _refuse_dangerous(root)
        _check_marker(root)
        yield root


def _unusable(files: FileSystem, path: str, error: OSError) -> RootError:
    why = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        why = "there is no such directory"
    elif stat.S_ISLNK(files.status_at(path).st_mode):
        why = "it is a symbolic link; name the directory itself"
    return _refusal(path, why, error.errno)


def _check_marker(root: Root) -> None:
    if _paths.MARKER not in root.files.names(root.fd):
        raise _refusal(root.path, f"it has no {_paths.MARKER} marker, so it is no snapstore root")
    check_root(root.files, root.path)
    here, there = root.files.status(root.fd), root.files.status_at(root.path)
    if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
        raise _refusal(root.path, "it was swapped for something else just now")


def _refuse_dangerous(root: Root) -> None:
    real = root.files.resolve(root.path)
    if real == os.path.dirname(real):
        raise _refusal(root.path, "it is the root of the file system; nothing is ever removed there")
    if real in _homes(root.files):
        raise _refusal(root.path, "it is a home directory; give the store a directory of its own below it")
    names = set(root.files.names(root.fd))
    if ".git" in names or names >= _BARE_REPOSITORY:
        raise _refusal(root.path, "it is a git repository; give the store a directory of its own")
    if not root.files.tells_mounts():
        raise _refusal(root.path, "what is mounted below it can not be seen here: mount /proc first")


def _homes(files: FileSystem) -> set[str]:
    """Everybody's home directory as the user database has it, and what ``~`` is here."""
    import pwd

    listed = {entry.pw_dir: entry.pw_uid for entry in pwd.getpwall()}
    own = [home for home, user in listed.items() if user == os.geteuid()]
    return {*listed, *map(files.resolve, [*own, os.path.expanduser("~")])}


def _refusal(path: str, why: str, number: int | None = errno.EPERM) -> RootError:
    error = RootError(f"{path}: {why}", path=path)
    error.errno = number
    return error
