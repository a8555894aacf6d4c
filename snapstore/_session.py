"""Session directories: make, hold, reclaim, leave.

A session becomes visible under its name only with its lock held. A reclaimer takes the lock without waiting, checks
that the path still names the file that it locked, renames the directory aside, deletes, the lock file last; so each
leftover is reclaimed exactly once, a half-deleted one is found again, and no live one is ever touched.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from snapstore import _paths
from snapstore._errors import RootError
from snapstore._files import FileSystem, exists, opened, read_exactly, remove_tree, rename_surely, write_all
from snapstore._owner import LACKING, OwnerLock, OwnerRecord, read_record
from snapstore._paths import join

MARKER_FORMAT = 1
_GIVEN = "given"
"""In the marker of a root that was there before the first store: its mode is its maker's affair."""
_ATTEMPTS = 16
_NOT_EMPTY = frozenset({errno.ENOTEMPTY, errno.EEXIST})
"""What removing a directory says where something is in it."""
_CLOCK_AHEAD_S = 7 * 86400


@dataclass(slots=True)
class Budget:
    """Bounds of one reclaim, and what it did: how many sessions, until when, ``only`` which ones.

    ``durable``: whatever is left of one after a power cut can be reclaimed.
    """

    monotonic_s: Callable[[], float]
    sessions: int
    deadline_s: float
    only: frozenset[str] | None = None
    durable: bool = False
    gone: int = 0
    errors: list[OSError] = field(default_factory=list)

    @property
    def spent(self) -> bool:
        return self.sessions <= 0 or self.monotonic_s() >= self.deadline_s


class Session:
    """One session directory, with its owner lock held."""

    def __init__(self, files: FileSystem, root: str, path: str, lock: OwnerLock, *, durable: bool) -> None:
        self._files = files
        self._locks = [lock]
        self._swapped = False
        self.durable = durable
        self.root = root
        self.path = path
        self.temporary = join(path, _paths.TEMPORARY)
        self.trash = join(path, _paths.TRASH)
        self._hold(self.path, self.temporary, self.trash)

    @classmethod
    def open(cls, files: FileSystem, root: str, *, durable: bool) -> Session:
        """Make the root if it is missing, and a new session in it. Blocks for the disk; ``RootError`` if it can not be.

        ``durable``: the session outlives a power cut from here on.
        """
        try:
            prepare_root(files, root)
            if durable:
                _sync_way_to(files, root)
            for _ in range(_ATTEMPTS):
                built = _build(files, root, durable)
                if built is not None:
                    return cls._name(files, root, *built, durable)
            check_root(files, root)
        except RootError:
            raise
        except OSError as error:
            raise root_error(root, f"no session can be made in it: {error.strerror}", error.errno) from error
        raise root_error(root, "other processes took every session that was being made", errno.EBUSY)

    @classmethod
    def _name(
        cls, files: FileSystem, root: str, unborn: str, lock: OwnerLock, record: OwnerRecord, durable: bool
    ) -> Session:
        path = join(root, _paths.new_session_name(record.opened_at_s, record.pid))
        try:
            _bear(files, root, unborn, path, lock, durable)
            return cls(files, root, path, lock, durable=durable)
        except BaseException:
            lock.release()
            raise

    def generation_path(self, request_id: str, generation: int) -> str:
        return join(self.path, _paths.generation_name(request_id, generation))

    def snapshot_path(self, request_id: str, generation: int, token_count: int) -> str:
        return join(self.generation_path(request_id, generation), _paths.snapshot_name(token_count))

    def temporary_path(self) -> str:
        return join(self.temporary, _paths.random_name())

    def trash_path(self) -> str:
        return join(self.trash, _paths.random_name())

    def look(self) -> None:
        """``FileNotFoundError`` unless its directory is where its name says: what is written would be in no root."""
        if self._swapped:
            raise FileNotFoundError(errno.ENOENT, "another directory stands here now", self.path)
        self._files.look_for(self.path)

    def follow(self) -> None:
        """Where another directory stands under its name, that is the session from here on: ``look`` says so."""
        with suppress(OSError):  # with nothing there it is away, or gone: what is held will do
            if not self._files.ways.is_held(self.path, self._files.status_at(self.path)):
                self._swapped = True
                self._let_go()

    def mend(self) -> None:
        """Make again what somebody removed: the working directories, or all of it. ``OSError`` if it can not be.

        A root without its marker is not filled again: the disk that it was on may just not be mounted. A session that
        came back meanwhile, with its disk or from a backup, is kept as it is, and owned. For the writer alone: what it
        writes must not be undone.
        """
        self._let_go()
        self._swapped = False
        try:
            _make_directory_if_missing(self._files, self.temporary)
            self.mend_trash()
            self._own_what_stands()
        except FileNotFoundError:
            self._make_again()
        finally:
            self._hold(self.path, self.temporary, self.trash)

    def _hold(self, *paths: str) -> None:
        """So that a save is not a walk from the root for each operation. Where it can not be, it is one."""
        for path in paths:
            with suppress(OSError):
                self._files.hold(path)

    def _let_go(self) -> None:
        for path in (self.path, self.temporary, self.trash):
            self._files.ways.let_go(path)

    def mend_trash(self) -> None:
        """Make the trash again. ``OSError`` if it can not be, as where all of the session is gone."""
        _make_directory_if_missing(self._files, self.trash)
        self._hold(self.trash)

    def _make_again(self) -> None:
        check_root(self._files, self.root)
        built = _build(self._files, self.root, self.durable)
        if built is None:
            return
        unborn, lock, _ = built
        try:
            _bear(self._files, self.root, unborn, self.path, lock, self.durable)
        finally:
            self._own(lock)

    def _own_what_stands(self) -> None:
        if any(lock.is_in(self.path) for lock in self._locks):
            return
        lock = OwnerLock.take(self._files, self.path, create=True)
        if lock is None:
            raise OSError(errno.EBUSY, "it came back, and another process has it in hand", self.path)
        self._own(lock)

    def _own(self, lock: OwnerLock) -> None:
        """Also the lost one's lock is held while it stands anywhere: it may come back."""
        locks, self._locks = [*self._locks, lock], []
        for each in locks:
            self._locks.append(each) if each.stands else each.release()

    def is_away(self) -> bool:
        """It is not under its name, and nobody removed it: somebody moved it, or its root, and it may come back."""
        return not exists(self._files, self.path) and any(lock.stands for lock in self._locks)

    def remove(self, between: Callable[[], None]) -> list[OSError]:
        """Remove the directory, the lock file last. What would not go stays for a reclaimer."""
        return self._remove(lambda _: True, between)[1]

    def remove_if_empty(self, between: Callable[[], None]) -> tuple[bool, list[OSError]]:
        """``remove``, if no snapshot and no trash is left in it; whether it was so."""
        if not self._is_empty(self.path):
            return False, []
        return self._remove(self._is_empty, between)

    def _remove(
        self, is_it: Callable[[str], bool], between: Callable[[], None]
    ) -> tuple[bool, list[OSError]]:
        aside = join(self.root, _paths.dead_session_name())
        try:
            if not _put_aside(self._files, self.path, aside, is_it):
                return False, []
            if self.durable:
                self._files.sync_directory(self.root)
        except FileNotFoundError as error:
            return (False, [error]) if self.is_away() else (True, [])
        except OSError as error:
            return False, [error]
        errors = remove_tree(self._files, aside, between=between, keep_last=_paths.OWNER_LOCK)[1]
        return not errors, errors

    def _is_empty(self, path: str) -> bool:
        """True if no snapshot and no trash is left in this session, or nothing is left of it."""
        housekeeping = {_paths.TEMPORARY, _paths.TRASH, _paths.OWNER_LOCK, _paths.OWNER_RECORD}
        try:
            trash = join(path, _paths.TRASH)
            return set(self._files.names(path)) <= housekeeping and not self._files.names(trash)
        except FileNotFoundError:
            return not exists(self._files, path) and not self.is_away()

    def release(self) -> None:
        """Give the ownership up. Twice is fine."""
        self._let_go()
        for lock in self._locks:
            lock.release()


def _build(files: FileSystem, root: str, durable: bool) -> tuple[str, OwnerLock, OwnerRecord] | None:
    """A session that nobody can see yet, its lock held. ``None``: a reclaimer took it before that."""
    unborn = join(root, _paths.unborn_session_name())
    lock: OwnerLock | None = None
    try:
        files.make_directory(unborn)
        lock = OwnerLock.take(files, unborn, create=True)
        if lock is None:
            return None
        record = OwnerRecord.of_this_process(_opening_time(files, root))
        _write_file(files, join(unborn, _paths.OWNER_RECORD), record.to_json())
        files.make_directory(join(unborn, _paths.TEMPORARY))
        files.make_directory(join(unborn, _paths.TRASH))
        if durable:
            files.sync_directory(unborn)
    except FileNotFoundError:
        _unmake(files, unborn, lock)
        return None
    except BaseException:
        _unmake(files, unborn, lock)
        raise
    return unborn, lock, record


def _bear(files: FileSystem, root: str, unborn: str, path: str, lock: OwnerLock, durable: bool) -> None:
    """Give a session its name. Where that fails it is gone; what stands under the name is another's, and stays."""
    try:
        rename_surely(files, unborn, path, lambda _: lock.is_in(path))
        if durable:
            files.sync_directory(root)
    except BaseException:
        with suppress(OSError):
            if lock.is_in(path):
                _put_aside(files, path, unborn, lock.is_in)
        remove_tree(files, unborn, keep_last=_paths.OWNER_LOCK)
        raise


def _put_aside(files: FileSystem, path: str, aside: str, is_it: Callable[[str], bool]) -> bool:
    """Rename a session to where nobody looks for it, if it is the one that is meant, which is seen there for certain.

    What stands under a name may be another one by the time that it is renamed: then that gets its name back.
    """
    rename_surely(files, path, aside)
    mine = False
    try:
        mine = is_it(aside)
    finally:
        if not mine:
            files.rename(aside, path)
    return mine


def _opening_time(files: FileSystem, root: str) -> float:
    """Now; but later than every session that stands in the root, also where the clock was set back since.

    Of two sessions the later one is to be known by its time. A name that is far ahead is no clock's.
    """
    now_s = time.time()
    opened = filter(None, map(_paths.session_opened_at, files.names(root)))
    ahead = [at_s for at_s in opened if now_s < at_s <= now_s + _CLOCK_AHEAD_S]
    return max(ahead) + 1.0 if ahead else now_s


def _unmake(files: FileSystem, path: str, lock: OwnerLock | None) -> None:
    remove_tree(files, path, keep_last=_paths.OWNER_LOCK)
    if lock is not None:
        lock.release()


@dataclass(frozen=True, slots=True)
class DeadSession:
    """A session directory whose owner is dead, its lock held by us now."""

    path: str
    lock: OwnerLock


def dead_sessions(files: FileSystem, root: str, *, newest_first: bool = False) -> Iterator[DeadSession]:
    """Each session of a dead owner, its lock taken: whoever gets one from here is alone with it, and releases it.

    ``OSError`` where there is no telling which are dead.
    """
    dated = []
    for name in filter(_paths.is_session_name, files.names(root)):
        record = read_record(files, join(root, name))
        if record is not None and record.same_machine:
            dated.append((record.opened_at_s, name))
    for _, name in sorted(dated, reverse=newest_first):
        lock = _try_lock(files, join(root, name))
        if lock is not None:
            yield DeadSession(join(root, name), lock)


def reclaim(files: FileSystem, root: str, budget: Budget, between: Callable[[], None]) -> None:
    """Remove the sessions of dead owners, and what crashes left half-made or half-removed.

    Blocks for the disk; ``between`` is called before each removal, and may raise to stop. What was done, and what went
    wrong, is in the budget.
    """
    for dead in dead_sessions(files, root):
        try:
            if budget.spent:
                return
            if budget.only is None or dead.path in budget.only:
                _delete(files, root, dead, budget, between)
        finally:
            dead.lock.release()
    for name in files.names(root):
        if budget.spent:
            return
        if _paths.is_unfinished_session_name(name):
            _reclaim_unfinished(files, join(root, name), budget, between)
        elif _paths.is_staged_marker_name(name):
            _remove_staged_marker(files, join(root, name), budget)


def _delete(
    files: FileSystem, root: str, dead: DeadSession, budget: Budget, between: Callable[[], None]
) -> None:
    aside = join(root, _paths.dead_session_name())
    try:
        if not _put_aside(files, dead.path, aside, dead.lock.is_in):
            return  # another one was put in its place; whose that is, the next start finds out
        if budget.durable:
            files.sync_directory(root)
    except OSError as error:
        budget.errors.append(error)
        return
    _empty(files, aside, budget, between)


def _empty(files: FileSystem, path: str, budget: Budget, between: Callable[[], None]) -> None:
    budget.sessions -= 1
    errors = remove_tree(files, path, between=between, keep_last=_paths.OWNER_LOCK)[1]
    budget.errors += errors
    budget.gone += not errors


def _reclaim_unfinished(files: FileSystem, path: str, budget: Budget, between: Callable[[], None]) -> None:
    """A ``.new-`` or ``.dead-`` directory: empty ones go at once (a maker tries again), others under their lock.

    The lock file is the first that comes and the last that goes, so where there is none nobody is at work.
    """
    try:
        files.remove_directory(path)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in _NOT_EMPTY:
            return  # it may be empty: one that is just being made, and not locked yet
        record = read_record(files, path)
    if record is not None and not record.same_machine:
        return
    try:
        lock = OwnerLock.take(files, path, create=False)
    except FileNotFoundError:
        _empty(files, path, budget, between)
        return
    except OSError:
        return
    if lock is None:
        return
    try:
        _empty(files, path, budget, between)
    finally:
        lock.release()


def _remove_staged_marker(files: FileSystem, path: str, budget: Budget) -> None:
    """Of a process that died before it could rename it; one that lives makes it again."""
    try:
        files.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        budget.errors.append(error)


def _try_lock(files: FileSystem, path: str) -> OwnerLock | None:
    try:
        return OwnerLock.take(files, path, create=False)
    except OSError as error:
        if error.errno in LACKING:
            raise
        return None  # no lock file, or no lock support here: not provably dead


def prepare_root(files: FileSystem, root: str) -> None:
    """Make the root and its marker, or see that it is ours. A root that a store has made is kept private."""
    made = _make_root(files, root)
    check_root(files, root, may_be_empty=True)
    if made or not exists(files, join(root, _paths.MARKER)):
        _write_marker(files, root, made=made)
    elif not _read_marker(files, root).get(_GIVEN):
        with opened(files, files.open_directory(root)) as fd:
            files.tighten(fd)


def check_root(files: FileSystem, root: str, *, may_be_empty: bool = False) -> None:
    """``RootError`` unless ``root`` is a directory that carries our marker, in a format that we know.

    From here on this file system reaches what is below ``root`` through no link.
    """
    files.ways.guard(root)
    try:
        status = files.status_at(root)
    except FileNotFoundError as error:
        raise root_error(root, "there is no such directory", errno.ENOENT) from error
    if stat.S_ISLNK(status.st_mode):
        raise root_error(root, "it is a symbolic link; name the directory itself", errno.ELOOP)
    if not stat.S_ISDIR(status.st_mode):
        raise root_error(root, "it is not a directory", errno.ENOTDIR)
    foreign = [name for name in files.names(root) if not name.startswith(_paths.MARKER)]
    # The marker is looked for after the listing: who makes a session beside us writes the marker first.
    if exists(files, join(root, _paths.MARKER)):
        _read_marker(files, root)
    elif foreign or not may_be_empty:
        why = f"it has no {_paths.MARKER} marker, so it is not ours; name an empty directory"
        raise root_error(root, why, errno.EEXIST)


def root_error(root: str, why: str, number: int | None) -> RootError:
    error = RootError(f"{root} can not be a snapstore root: {why}", path=root)
    error.errno = number
    return error


def _make_root(files: FileSystem, root: str) -> bool:
    """True if it was not there before."""
    try:
        try:
            files.make_directory(root)
        except FileNotFoundError:
            files.make_parents(root)
            files.make_directory(root)
    except FileExistsError:
        return False
    return True


def _sync_way_to(files: FileSystem, root: str) -> None:
    """Bring the names that lead to the root to the medium, as far as its file system goes.

    Also where the root was there: who made it may have died before this. What we may not open we did not make.
    """
    path = files.resolve(root)
    device = files.status_at(path).st_dev
    while (above := os.path.dirname(path)) != path and files.status_at(above).st_dev == device:
        with suppress(PermissionError):
            files.sync_directory(above)
        path = above


def _write_marker(files: FileSystem, root: str, *, made: bool) -> None:
    """Once in the life of a root, so it is made to outlive a power cut: without it nothing here is ours any more."""
    content = {"format": MARKER_FORMAT} if made else {"format": MARKER_FORMAT, _GIVEN: True}
    for _ in range(_ATTEMPTS):
        staged = join(root, _paths.staged_marker_name())
        try:
            _write_file(files, staged, json.dumps(content).encode())
            files.rename(staged, join(root, _paths.MARKER))
        except FileNotFoundError:
            continue  # a reclaimer took it for one of a dead process
        files.sync_directory(root)
        return
    check_root(files, root)


def _read_marker(files: FileSystem, root: str) -> dict[str, object]:
    buffer = memoryview(bytearray(256))
    try:
        with opened(files, files.open_read(join(root, _paths.MARKER))) as fd:
            count = read_exactly(files, fd, buffer, 0)
        marker = json.loads(bytes(buffer[:count]))
    except (OSError, ValueError, RecursionError) as error:
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        raise root_error(root, f"its marker can not be read: {error}", number) from error
    if not isinstance(marker, dict) or marker.get("format") != MARKER_FORMAT:
        why = f"its marker says {marker!r}, this snapstore knows format {MARKER_FORMAT}; upgrade"
        raise root_error(root, why, errno.EINVAL)
    return marker


def _make_directory_if_missing(files: FileSystem, path: str) -> None:
    with suppress(FileExistsError):
        files.make_directory(path)


def _write_file(files: FileSystem, path: str, content: bytes) -> None:
    """Synced, whatever the snapshots are: an empty record after a power cut would leave its session to nobody."""
    with opened(files, files.create(path)) as fd:
        write_all(files, fd, [memoryview(content)], 0)
        files.sync_data(fd)
