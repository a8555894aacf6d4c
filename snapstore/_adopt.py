"""Adopting: the committed snapshots of dead sessions become this session's own.

Files are checked by header, size and identity. What is torn or foreign, and all but the newest life of a request, goes
into the dead session's own trash, so whoever comes to that session next finds nothing to adopt in it. A generation
moves with one rename: wherever a crash strikes, each snapshot is in exactly one session, and can be adopted again.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from snapstore import _paths
from snapstore._errors import SnapshotCorruptError
from snapstore._files import FileSystem, disk_bytes, opened, rename_surely
from snapstore._paths import join
from snapstore._reader import read_header
from snapstore._session import Session, dead_sessions

_NOT_OURS = frozenset({errno.EINVAL, errno.ELOOP, errno.ENOTDIR, errno.ENXIO})
"""What opening says of a link, a FIFO, a device, a directory for a file or a file for a directory."""


@dataclass(frozen=True, slots=True)
class Found:
    """A snapshot of a dead session that this store has made its own."""

    request_id: str
    token_count: int
    generation: int
    path: str
    nbytes: int
    disk_bytes: int


@dataclass(slots=True)
class Adoption:
    """What was adopted, and the dead sessions in which nothing is left to adopt: only those may be reclaimed.

    One that could not be read just now, or that another process has in hand, may hold what nobody has adopted yet.
    """

    found: list[Found] = field(default_factory=list)
    emptied: set[str] = field(default_factory=set)
    errors: list[OSError] = field(default_factory=list)


def adopt(files: FileSystem, session: Session, *, durable: bool = False) -> Adoption:
    """Move committed snapshots of dead sessions here, newest session first; of a request, one life only.

    Blocks for the disk: one read of a header a file. What an error of the disk concerns is left for the next start.
    ``durable``: all that was found outlives a power cut, however durable it was where it came from.
    """
    adoption = Adoption()
    heir = _Heir(files, session.path, durable)
    try:
        for dead in dead_sessions(files, session.root, newest_first=True):
            try:
                errors = heir.take_session(dead.path, adoption.found)
                adoption.errors += errors
                if not errors:
                    adoption.emptied.add(dead.path)
            finally:
                dead.lock.release()
        if durable and adoption.found:
            files.sync_directory(session.path)
    except OSError as error:
        adoption.errors.append(error)
        adoption.emptied.clear()  # what was moved may not be on the medium yet: leave them for the next start
    return adoption


@dataclass(frozen=True, slots=True)
class _Heir:
    """The session that adopts; ``lives``: the requests of which it has seen the newest life."""

    files: FileSystem
    path: str
    durable: bool
    lives: set[str] = field(default_factory=set)

    def take_session(self, dead: str, found: list[Found]) -> list[OSError]:
        """What could not be read or moved; the rest is adopted all the same."""
        errors = []
        try:
            for name in _generations(self.files, dead):
                try:
                    found += self._take_generation(dead, name)
                except OSError as error:
                    errors.append(error)
        except OSError as error:
            errors.append(error)
        return errors

    def _take_generation(self, dead: str, name: str) -> list[Found]:
        parsed = _paths.parse_generation_name(name)
        source, target = join(dead, name), join(self.path, name)
        # A later life of this request was seen already, so this one had ended. Else it is the newest one, sound or not.
        if parsed is None or parsed.request_hash in self.lives:
            _drop(self.files, source, dead)
            return []
        self.lives.add(parsed.request_hash)
        found = []
        for each in _names_in(self.files, source):
            snapshot = self._examined(join(source, each), name, each, join(target, each))
            if snapshot is None:
                _drop(self.files, join(source, each), dead)
            else:
                found.append(snapshot)
        if found and self.durable:
            self.files.sync_directory(source)
        if found:
            rename_surely(self.files, source, target)
        return found

    def _examined(self, path: str, generation_name: str, name: str, target: str) -> Found | None:
        """``None`` if it is no snapshot of this generation, or torn. ``OSError`` where that could not be found out."""
        token_count = _paths.parse_snapshot_name(name)
        if token_count is None:
            return None
        files = self.files
        try:
            with opened(files, files.open_read(path)) as fd:
                files.tighten(fd)
                header = read_header(files, fd)
                size = disk_bytes(files.status(fd))
                if self.durable:
                    files.sync_data(fd)
        except SnapshotCorruptError:
            return None
        except OSError as error:
            if error.errno in _NOT_OURS:
                return None
            raise
        facts = header.facts
        if facts is None or facts.token_count != token_count:
            return None
        if _paths.generation_name(facts.request_id, facts.generation) != generation_name:
            return None
        return Found(facts.request_id, token_count, facts.generation, target, header.layout.nbytes, size)


def _generations(files: FileSystem, session: str) -> list[str]:
    """Directories of generations, the latest first."""
    dated = [
        (parsed.generation, name)
        for name in files.names(session)
        if (parsed := _paths.parse_generation_name(name)) is not None
    ]
    return [name for _, name in sorted(dated, reverse=True)]


def _names_in(files: FileSystem, directory: str) -> list[str]:
    """The names in a generation's directory, which is made private again; none in what is no directory."""
    try:
        with opened(files, files.open_directory(directory)) as fd:
            files.tighten(fd)
            return files.names(fd)
    except OSError as error:
        if error.errno in _NOT_OURS:
            return []
        raise


def _drop(files: FileSystem, path: str, dead: str) -> None:
    trash = join(dead, _paths.TRASH)
    try:
        files.rename(path, join(trash, _paths.random_name()))
    except FileNotFoundError:
        files.make_directory(trash)
        files.rename(path, join(trash, _paths.random_name()))
