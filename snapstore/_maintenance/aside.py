"""Taking a file away from under a store that may be about to replace it."""

from __future__ import annotations

from collections.abc import Callable
from os import stat_result

from snapstore._files import FileSystem


def move_aside(
    files: FileSystem, name: str, from_fd: int, target: str, to_fd: int, is_it: Callable[[stat_result], bool]
) -> bool:
    """Rename a file into another directory, if it is the one that is meant. Names are below open directories.

    A save may replace it between a look and a rename, so what was renamed is looked at again: another one gets its
    name back, unless a still newer one has that by then. ``FileNotFoundError`` if the file is gone.
    """
    if not is_it(files.status_at(name, dir_fd=from_fd)):
        return False
    files.rename(name, target, from_fd=from_fd, to_fd=to_fd)
    mine = False
    try:
        mine = is_it(files.status_at(target, dir_fd=to_fd))
    finally:
        if not mine:
            _give_back(files, target, to_fd, name, from_fd)
    return mine


def _give_back(files: FileSystem, aside: str, aside_fd: int, name: str, within: int) -> None:
    try:
        files.link(aside, name, from_fd=aside_fd, to_fd=within)
    except FileExistsError:
        pass  # the newer one
    except OSError:  # this file system has no second names: the newer one can not be told for certain
        if not _is_there(files, name, within):
            files.rename(aside, name, from_fd=aside_fd, to_fd=within)
            return
    files.unlink(aside, dir_fd=aside_fd)


def _is_there(files: FileSystem, name: str, within: int) -> bool:
    try:
        files.status_at(name, dir_fd=within)
    except FileNotFoundError:
        return False
    return True
