"""Moving a committed file out of its session, to where the store never looks again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from snapstore import _paths
from snapstore._files import FileSystem, opened, read_exactly, write_all
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
    try:
        files.rename(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_out(files, path, target)
        if durable:
            _sync_or(files, target, lambda: files.unlink(target))
        files.unlink(path)
    else:
        if durable:
            _sync_or(files, target, lambda: files.rename(target, path))
    return Path(target)


def _sync_or(files: FileSystem, target: str, undo: Callable[[], None]) -> None:
    try:
        files.sync_directory(os.path.dirname(target))
    except BaseException:
        undo()
        raise


def _copy_out(files: FileSystem, path: str, target: str) -> None:
    staged = f"{target}.{_paths.random_name()}"
    try:
        with opened(files, files.open_read(path)) as source, opened(files, files.create(staged)) as copy:
            _copy(files, source, copy)
            files.sync_data(copy)
        files.rename(staged, target)
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
