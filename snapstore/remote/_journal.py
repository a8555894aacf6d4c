"""Ends of lives that are not carried out yet, each a small file below the root: what a restart goes on with.

Any store of the root may carry one out, and twice does no harm, so nobody owns them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from snapstore import _paths
from snapstore._files import FileSystem, opened, read_exactly, write_all
from snapstore._paths import join
from snapstore.remote._manifest import EndLives

_MOST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Recorded:
    """Ends that are on the local disk, under this path."""

    path: str
    ends: tuple[EndLives, ...]


class Journal:
    """Of one remote store: ends of another, to which the same root was opened before, are left for that one.

    Every method blocks for the local disk.
    """

    def __init__(self, files: FileSystem, root: str, url: str, *, durable: bool) -> None:
        self._files = files
        self._directory = join(root, _paths.ENDINGS)
        self._url = url
        self._durable = durable

    def record(self, ends: Iterable[EndLives]) -> Recorded:
        """Write them down: by a rename, so that what is read back is whole."""
        recorded = Recorded(join(self._directory, _paths.ending_name()), tuple(ends))
        try:
            self._write(recorded)
        except FileNotFoundError:
            with suppress(FileExistsError):  # another store of this root was here first
                self._files.make_directory(self._directory)
            self._write(recorded)
        return recorded

    def done(self, recorded: Recorded) -> None:
        """They are carried out."""
        try:
            self._files.unlink(recorded.path)
        except FileNotFoundError:
            return  # another store of this root has carried them out too

    def left(self) -> list[Recorded]:
        """What earlier stores of this root, and others that are open, have not carried out yet."""
        try:
            names = self._files.names(self._directory)
        except FileNotFoundError:
            return []
        found = [self._read(join(self._directory, name)) for name in names if _paths.is_ending_name(name)]
        return [each for each in found if each is not None]

    def _write(self, recorded: Recorded) -> None:
        content = {
            "url": self._url,
            "ends": [[end.request_id, sorted(end.lives), end.before_s] for end in recorded.ends],
        }
        raw = json.dumps(content).encode()
        staged = join(self._directory, _paths.random_name())
        with opened(self._files, self._files.create(staged)) as fd:
            write_all(self._files, fd, [memoryview(raw)], 0)
            if self._durable:
                self._files.sync_data(fd)
        self._files.rename(staged, recorded.path)
        if self._durable:
            self._files.sync_directory(self._directory)

    def _read(self, path: str) -> Recorded | None:
        try:
            with opened(self._files, self._files.open_read(path)) as fd:
                size = min(self._files.status(fd).st_size, _MOST_BYTES)
                raw = bytearray(size)
                read_exactly(self._files, fd, memoryview(raw), 0)
            content = json.loads(bytes(raw))
            if content["url"] != self._url:
                return None
            ends = [
                EndLives(request_id, frozenset(lives), at_s) for request_id, lives, at_s in content["ends"]
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # carried out just now, or not written by us
        return Recorded(path, tuple(ends))
