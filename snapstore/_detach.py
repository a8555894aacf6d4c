"""Moving a committed file out of its session, to where the store never looks again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snapstore import _paths
from snapstore._files import (
    FileSystem,
    opened,
    read_exactly,
    rename_surely,
    same_file,
    unlink_surely,
    write_all,
)
from snapstore._paths import join
from snapstore._session import Session

_CHUNK_BYTES = 8 * 1024 * 1024


def move_out(
    files: FileSystem, session: Session, path: str, destination: str | os.PathLike[str], *, durable: bool
) -> Path:
    """Rename ``path`` to ``destination``; across file systems copy, fsync, rename, unlink. Blocks for the disk.

    ``durable``: a power cut from then on leaves it there. On an error the file is still at ``path``, and nothing is at
    ``destination`` that was not there before.
    """
    target = os.path.abspath(os.fsdecode(destination))
    real = join(files.resolve(os.path.dirname(target)), os.path.basename(target))
    if join(real, "").startswith(join(files.resolve(session.root), "")):
        raise ValueError(
            f"destination {target} is inside the store's root, where files are the store's; name another"
        )
    moved = files.status_at(path)
    try:
        rename_surely(files, path, target, lambda status: same_file(status, moved))
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with _undone(files, target, _copy_out(files, path, target), files.unlink):
            if durable:
                files.sync_directory(os.path.dirname(target))
            unlink_surely(files, path)
    else:
        with _undone(files, target, moved, lambda target: files.rename(target, path)):
            if durable:
                files.sync_directory(os.path.dirname(target))
    return Path(target)


@contextmanager
def _undone(
    files: FileSystem, target: str, moved: os.stat_result, undo: Callable[[str], None]
) -> Iterator[None]:
    """On an error, if ``target`` is still what was moved there: by then it may be somebody else's."""
    try:
        yield
    except BaseException:
        with suppress(FileNotFoundError):
            if same_file(files.status_at(target), moved):
                undo(target)
        raise


def _copy_out(files: FileSystem, path: str, target: str) -> os.stat_result:
    staged = f"{target}.{_paths.random_name()}"
    try:
        with opened(files, files.open_read(path)) as source, opened(files, files.create(staged)) as copy:
            _copy(files, source, copy)
            files.sync_data(copy)
            made = files.status(copy)
        rename_surely(files, staged, target, lambda status: same_file(status, made))
        return made
    except BaseException:
        with suppress(FileNotFoundError):  # it may never have come to be
            files.unlink(staged)
        raise


def _copy(files: FileSystem, source: int, copy: int) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    offset = 0
    while count := read_exactly(files, source, buffer, offset):
        write_all(files, copy, [buffer[:count]], offset)
        offset += count
