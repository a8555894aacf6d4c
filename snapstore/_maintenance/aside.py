"""Taking a file away from under a store that may be about to replace it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
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
    if is_it(files.status_at(target, dir_fd=to_fd)):
        return True
    with suppress(FileExistsError):
        files.link(target, name, from_fd=to_fd, to_fd=from_fd)
    files.unlink(target, dir_fd=to_fd)
    return False
