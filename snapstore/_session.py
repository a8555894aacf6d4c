"""Session directories: make, hold, adopt, reclaim, leave.

A session becomes visible under its name only with its lock held. A reclaimer takes the lock without waiting, checks that
the path still names the file that it locked, renames the directory aside, deletes, the lock file last; so each leftover
is reclaimed exactly once, a half-deleted one is found again, and no live one is ever touched.
"""

from __future__ import annotations

import errno
import json
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from snapstore import _paths
from snapstore._errors import RootError, SnapshotCorruptError
from snapstore._files import FileSystem, disk_bytes, opened, read_exactly, remove_tree
from snapstore._owner import OwnerLock, OwnerRecord, read_record
from snapstore._paths import join
from snapstore._reader import read_header

MARKER_FORMAT = 1
_MAKE_ATTEMPTS = 16


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
class Budget:
    """Bounds of one reclaim: how many sessions, and until when (monotonic seconds)."""

    sessions: int
    deadline_s: float
    errors: list[OSError] = field(default_factory=list)

    @property
    def spent(self) -> bool:
        return self.sessions <= 0 or time.monotonic() >= self.deadline_s


class Session:
    """One session directory, with its owner lock held."""

    def __init__(self, files: FileSystem, root: str, path: str, lock: OwnerLock) -> None:
        self._files = files
        self._lock = lock
        self.root = root
        self.path = path
        self.temporary = join(path, _paths.TEMPORARY)
        self.trash = join(path, _paths.TRASH)

    @classmethod
    def open(cls, files: FileSystem, root: str) -> Session:
        """Make the root if it is missing, and a new session in it. Blocks for the disk; ``RootError`` if it can not be."""
        try:
            prepare_root(files, root)
            for _ in range(_MAKE_ATTEMPTS):
                session = cls._make(files, root)
                if session is not None:
                    return session
        except RootError:
            raise
        except OSError as error:
            raise root_error(root, f"no session can be made in it: {error.strerror}", error.errno) from error
        raise root_error(root, "other processes took every session that was being made", errno.EBUSY)

    @classmethod
    def _make(cls, files: FileSystem, root: str) -> Session | None:
        """``None``: a reclaimer took the directory for an abandoned one before its lock was held."""
        unborn = join(root, _paths.unborn_session_name())
        files.make_directory(unborn)
        try:
            lock = OwnerLock.take(files, unborn, create=True)
        except FileNotFoundError:
            return None
        if lock is None:
            return None
        record = OwnerRecord.of_this_process()
        path = join(root, _paths.new_session_name(record.opened_at_s, record.pid))
        try:
            _write_file(files, join(unborn, _paths.OWNER_RECORD), record.to_json())
            files.make_directory(join(unborn, _paths.TEMPORARY))
            files.make_directory(join(unborn, _paths.TRASH))
            files.rename(unborn, path)
        except BaseException:
            remove_tree(files, unborn, keep_last=_paths.OWNER_LOCK)
            lock.release()
            raise
        return cls(files, root, path, lock)

    def generation_path(self, request_id: str, generation: int) -> str:
        return join(self.path, _paths.generation_name(request_id, generation))

    def snapshot_path(self, request_id: str, generation: int, token_count: int) -> str:
        return join(self.generation_path(request_id, generation), _paths.snapshot_name(token_count))

    def temporary_path(self) -> str:
        return join(self.temporary, _paths.random_name())

    def trash_path(self) -> str:
        return join(self.trash, _paths.random_name())

    def mend(self) -> None:
        """Make the working directories again, should somebody have removed them. ``OSError`` if it can not be."""
        for path in (self.temporary, self.trash):
            _make_directory_if_missing(self._files, path)

    def remove(self, between: Callable[[], None]) -> list[OSError]:
        """Remove the directory, the lock file last. What would not go stays for a reclaimer."""
        aside = join(self.root, _paths.dead_session_name())
        try:
            self._files.rename(self.path, aside)
        except FileNotFoundError:
            return []
        except OSError as error:
            return [error]
        return remove_tree(self._files, aside, between=between, keep_last=_paths.OWNER_LOCK)[1]

    def is_empty(self) -> bool:
        """True if no snapshot and no trash is left in it."""
        names = set(self._files.names(self.path))
        housekeeping = {_paths.TEMPORARY, _paths.TRASH, _paths.OWNER_LOCK, _paths.OWNER_RECORD}
        return names <= housekeeping and not self._files.names(self.trash)

    def release(self) -> None:
        """Give the ownership up. Twice is fine."""
        self._lock.release()

    def adopt(self) -> Iterator[Found]:
        """Move committed snapshots of dead sessions here, newest session first; of a request, one life only.

        Files are checked by header, size and identity; what is torn or foreign stays behind, to be reclaimed.
        """
        taken: set[str] = set()
        for dead in dead_sessions(self._files, self.root, newest_first=True):
            try:
                for name in _generations(self._files, dead.path):
                    yield from self._adopt_generation(dead.path, name, taken)
            finally:
                dead.lock.release()

    def _adopt_generation(self, session: str, name: str, taken: set[str]) -> list[Found]:
        parsed = _paths.parse_generation_name(name)
        assert parsed is not None
        if parsed.request_hash in taken:
            return []
        directory = join(session, name)
        found = list(_sound_snapshots(self._files, directory, name))
        sound = {_paths.snapshot_name(each.token_count) for each in found}
        for other in self._files.names(directory):
            if other not in sound:
                self._files.rename(join(directory, other), self.trash_path())
        if found:
            taken.add(parsed.request_hash)
            self._files.rename(directory, join(self.path, name))
        return [
            Found(each.request_id, each.token_count, each.generation,
                  join(self.path, name, _paths.snapshot_name(each.token_count)), each.nbytes, each.disk_bytes)
            for each in found
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeadSession:
    """A session directory whose owner is dead, its lock held by us now."""

    path: str
    lock: OwnerLock


def prepare_root(files: FileSystem, root: str) -> None:
    """Make the root and its marker, or see that it is ours."""
    try:
        files.make_directory(root)
    except FileExistsError:
        pass
    except FileNotFoundError:
        files.make_parents(root)
        _make_directory_if_missing(files, root)
    check_root(files, root, may_be_empty=True)
    if _paths.MARKER not in files.names(root):
        staged = join(root, f"{_paths.MARKER}.{_paths.random_name()}")
        _write_file(files, staged, json.dumps({"format": MARKER_FORMAT}).encode())
        files.rename(staged, join(root, _paths.MARKER))


def check_root(files: FileSystem, root: str, *, may_be_empty: bool = False) -> None:
    """``RootError`` unless ``root`` is a directory that carries our marker, in a format that we know."""
    try:
        status = files.status_at(root)
    except FileNotFoundError as error:
        raise root_error(root, "there is no such directory", errno.ENOENT) from error
    if stat.S_ISLNK(status.st_mode):
        raise root_error(root, "it is a symbolic link; name the directory itself", errno.ELOOP)
    if not stat.S_ISDIR(status.st_mode):
        raise root_error(root, "it is not a directory", errno.ENOTDIR)
    names = files.names(root)
    if _paths.MARKER in names:
        _check_marker(files, root)
    elif not may_be_empty or any(not name.startswith(_paths.MARKER) for name in names):
        raise root_error(
            root,
            f"it has no {_paths.MARKER} marker, so it is not ours; name an empty directory",
            errno.EEXIST,
        )


def root_error(root: str, why: str, number: int | None) -> RootError:
    error = RootError(f"{root} can not be a snapstore root: {why}", path=root)
    error.errno = number
    return error


def dead_sessions(files: FileSystem, root: str, *, newest_first: bool = False) -> Iterator[DeadSession]:
    """Each session of a dead owner, with its lock taken: whoever gets one from here is alone with it."""
    for name in sorted(files.names(root), reverse=newest_first):
        if not _paths.is_session_name(name):
            continue
        path = join(root, name)
        record = read_record(files, path)
        if record is None or not record.same_machine:
            continue
        lock = _try_lock(files, path)
        if lock is not None:
            yield DeadSession(path, lock)


def reclaim(files: FileSystem, root: str, budget: Budget, between: Callable[[], None]) -> int:
    """Remove the sessions of dead owners and what crashes left half-made or half-removed. How many went.

    Blocks for the disk; ``between`` is called before each removal. Errors are collected in the budget.
    """
    gone = 0
    for dead in dead_sessions(files, root):
        try:
            if budget.spent:
                return gone
            gone += _delete(files, root, dead, budget, between)
        finally:
            dead.lock.release()
    for name in files.names(root):
        if _paths.is_unfinished_session_name(name) and not budget.spent:
            gone += _reclaim_unfinished(files, root, name, budget, between)
    return gone


def _delete(
    files: FileSystem, root: str, dead: DeadSession, budget: Budget, between: Callable[[], None]
) -> int:
    aside = join(root, _paths.dead_session_name())
    try:
        files.rename(dead.path, aside)
    except OSError as error:
        budget.errors.append(error)
        return 0
    budget.sessions -= 1
    budget.errors += remove_tree(files, aside, between=between, keep_last=_paths.OWNER_LOCK)[1]
    return 1


def _reclaim_unfinished(
    files: FileSystem, root: str, name: str, budget: Budget, between: Callable[[], None]
) -> int:
    """A ``.new-`` or ``.dead-`` directory: empty ones go at once (a maker tries again), others under their lock."""
    path = join(root, name)
    try:
        files.remove_directory(path)
        return 0
    except FileNotFoundError:
        return 0
    except OSError:
        lock = _try_lock(files, path)
    if lock is None:
        return 0
    try:
        budget.sessions -= 1
        budget.errors += remove_tree(files, path, between=between, keep_last=_paths.OWNER_LOCK)[1]
    finally:
        lock.release()
    return 1


def _try_lock(files: FileSystem, path: str) -> OwnerLock | None:
    try:
        return OwnerLock.take(files, path, create=False)
    except OSError:
        return None  # no lock file, or no lock support here: not provably dead


def _generations(files: FileSystem, session: str) -> list[str]:
    """Directories of generations, the latest of a request first."""
    names = [name for name in files.names(session) if _paths.parse_generation_name(name)]
    return sorted(names, key=lambda name: -_generation_number(name))


def _generation_number(name: str) -> int:
    parsed = _paths.parse_generation_name(name)
    return parsed.generation if parsed else -1


def _sound_snapshots(files: FileSystem, directory: str, generation_name: str) -> Iterator[Found]:
    for name in files.names(directory):
        token_count = _paths.parse_snapshot_name(name)
        if token_count is None:
            continue
        path = join(directory, name)
        try:
            with opened(files, files.open_read(path)) as fd:
                header = read_header(files, fd)
                size = disk_bytes(files.status(fd))
        except (OSError, SnapshotCorruptError):
            continue
        facts = header.facts
        if facts is None or facts.token_count != token_count:
            continue
        if _paths.generation_name(facts.request_id, facts.generation) == generation_name:
            yield Found(facts.request_id, token_count, facts.generation, path, header.layout.nbytes, size)


def _check_marker(files: FileSystem, root: str) -> None:
    buffer = memoryview(bytearray(256))
    try:
        with opened(files, files.open_read(join(root, _paths.MARKER))) as fd:
            count = read_exactly(files, fd, buffer, 0)
        marker = json.loads(bytes(buffer[:count]))
    except (OSError, ValueError, RecursionError) as error:
        raise root_error(root, f"its marker can not be read: {error}", errno.EINVAL) from error
    if not isinstance(marker, dict) or marker.get("format") != MARKER_FORMAT:
        raise root_error(
            root,
            f"its marker says {marker!r}, this snapstore knows format {MARKER_FORMAT}; upgrade",
            errno.EINVAL,
        )


def _make_directory_if_missing(files: FileSystem, path: str) -> None:
    try:
        files.make_directory(path)
    except FileExistsError:
        pass


def _write_file(files: FileSystem, path: str, content: bytes) -> None:
    with opened(files, files.create(path)) as fd:
        files.write(fd, [memoryview(content)])
