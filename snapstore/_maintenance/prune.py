"""Carry out a plan: remove exactly what it names, by descriptor, and say what came of it.

In a session whose owner is dead, under its lock: so a second prune, or a store that starts, leaves it alone meanwhile.
In a session that is in use (only with ``include_live``), by the owner's own rule: a file is renamed into the session's
trash, looked at again, and then deleted; directories stay, since the owner may be about to put a file there.

Whatever is not the file that was planned (other inode, other time) stays. A process that is killed here leaves a root
in which every remaining snapshot is whole, and what it had half removed is found by the next prune.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from os import stat_result

from snapstore import _paths
from snapstore._files import freed_by_unlinking, remove_tree, same_file
from snapstore._maintenance.aside import move_aside
from snapstore._maintenance.plan import Plan, SessionPlan
from snapstore._maintenance.root import Root
from snapstore._maintenance.survey import Loose, SnapshotFile
from snapstore._owner import OwnerLock
from snapstore._paths import join


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune did.

    Attributes:
        snapshots, requests, freed_bytes: what was removed, by this prune itself.
        sessions: session directories that are gone, half-removed ones included.
        in_use: snapshots that the rules select and that stayed, because their owner is alive or not to be known.
        changed: planned snapshots that were somebody's newer ones by the time.
        gone: planned snapshots that were gone by the time.
        over_bytes: by how much ``max_bytes`` is missed.
        errors: what would not go, and why.
        interrupted: it was told to stop before the end.
    """

    snapshots: int
    requests: int
    freed_bytes: int
    sessions: int
    in_use: int
    changed: int
    gone: int
    over_bytes: int
    errors: tuple[str, ...]
    interrupted: bool


@dataclass(slots=True)
class _Tally:
    snapshots: int = 0
    requests: set[str] = field(default_factory=set)
    freed_bytes: int = 0
    sessions: int = 0
    in_use: int = 0
    changed: int = 0
    gone: int = 0
    errors: list[str] = field(default_factory=list)


class _Stopped(Exception):
    """Told to stop, seen between two removals."""


def carry_out(
    root: Root,
    plan: Plan,
    *,
    progress: Callable[[int], None] = lambda _: None,
    go_on: Callable[[], bool] = lambda: True,
) -> PruneReport:
    """Remove what the plan names.

    ``progress`` hears of freed bytes; when ``go_on`` says no, it ends between two files.
    """
    work, interrupted = _Work(root, progress, go_on), False
    try:
        for part in plan.sessions:
            work.session(part)
        for loose in plan.unfinished:
            work.unfinished(loose)
    except _Stopped:
        interrupted = True
    return _report(work.tally, plan, interrupted)


def _report(tally: _Tally, plan: Plan, interrupted: bool) -> PruneReport:
    return PruneReport(
        snapshots=tally.snapshots,
        requests=len(tally.requests),
        freed_bytes=tally.freed_bytes,
        sessions=tally.sessions,
        in_use=plan.in_use + tally.in_use,
        changed=tally.changed,
        gone=tally.gone,
        over_bytes=plan.over_bytes,
        errors=tuple(tally.errors),
        interrupted=interrupted,
    )


class _Work:
    """One run. Every method tolerates that what it came for is gone, and notes what will not go."""

    def __init__(self, root: Root, progress: Callable[[int], None], go_on: Callable[[], bool]) -> None:
        self._root = root
        self._files = root.files
        self._progress = progress
        self._go_on = go_on
        self.tally = _Tally()

    def session(self, part: SessionPlan) -> None:
        """Everything that goes from one session."""
        with self._entered(part.name, part.name) as fd:
            if fd is None:
                self.tally.gone += len(part.snapshots)
                return
            try:
                self._session(fd, part)
            except FileNotFoundError:  # its lock: somebody else removed it just now
                self.tally.gone += len(part.snapshots)
            except OSError as error:
                self._note(part.name, error.strerror or str(error))

    def _session(self, fd: int, part: SessionPlan) -> None:
        if self._files.status(fd).st_ino != part.inode:
            self.tally.gone += len(part.snapshots)
            return
        if part.in_use:
            self._session_contents(fd, part)
            return
        lock = self._lock(fd)
        if lock is None:
            self.tally.in_use += len(part.snapshots)
            return
        try:
            self._session_contents(fd, part)
            if part.whole:
                self._remove_session(fd, part)
        finally:
            lock.release()

    def unfinished(self, loose: Loose) -> None:
        """A session half made or half removed: an empty one at once (its maker tries again), others under a lock."""
        self._between()
        try:
            self._files.remove_directory(loose.name, dir_fd=self._root.fd)
        except FileNotFoundError:
            return
        except OSError:
            self._remove_unfinished(loose)
        else:
            self.tally.sessions += 1

    def _remove_unfinished(self, loose: Loose) -> None:
        with self._entered(loose.name, loose.path) as fd:
            if fd is None:
                return
            try:
                self._remove_unfinished_tree(fd, loose)
            except FileNotFoundError:
                if self._files.names(fd):
                    self._note(loose.path, "it has no lock, so nobody can tell whose it is")
            except OSError as error:
                self._note(loose.path, error.strerror or str(error))

    def _remove_unfinished_tree(self, fd: int, loose: Loose) -> None:
        """Under its lock; where somebody has that, it is being made or removed right now."""
        lock = self._lock(fd)
        if lock is None:
            return
        try:
            errors = self._remove_tree(loose.name, self._root.fd, keep_last=_paths.OWNER_LOCK)
        finally:
            lock.release()
        self.tally.sessions += not errors

    def _session_contents(self, fd: int, part: SessionPlan) -> None:
        by_generation = sorted(part.snapshots, key=lambda each: each.of.name)
        for name, snapshots in groupby(by_generation, key=lambda each: each.of.name):
            self._generation(fd, part, name, list(snapshots))
        for directory, kind in ((_paths.TEMPORARY, "temporary"), (_paths.TRASH, "trash")):
            self._loose(fd, part, directory, [each for each in part.loose if each.kind == kind])

    def _generation(
        self, within: int, part: SessionPlan, name: str, snapshots: Sequence[SnapshotFile]
    ) -> None:
        with self._entered(name, join(part.name, name), within) as fd:
            if fd is None:
                self.tally.gone += len(snapshots)
                return
            if part.in_use:
                self._generation_in_use(within, part, snapshots, fd)
                return
            for each in snapshots:
                self._snapshot(each, fd, None)
        self._remove_if_empty(name, within, join(part.name, name))

    def _generation_in_use(
        self, within: int, part: SessionPlan, snapshots: Sequence[SnapshotFile], fd: int
    ) -> None:
        path = join(part.name, _paths.TRASH)
        with self._entered(_paths.TRASH, path, within) as trash:
            if trash is None:
                self._note(path, "can not be entered, and what is in use goes through it or not at all")
                return
            for each in snapshots:
                self._snapshot(each, fd, trash)

    def _snapshot(self, planned: SnapshotFile, within: int, trash: int | None) -> None:
        """Remove one snapshot, through the owner's trash if there is one to go through."""
        self._between()
        try:
            found = self._files.status_at(planned.name, dir_fd=within)
            if not _is_planned(found, planned):
                self.tally.changed += 1
                return
            if trash is None:
                self._files.unlink(planned.name, dir_fd=within)
            elif not self._through_trash(planned, within, trash):
                self.tally.changed += 1
                return
        except FileNotFoundError:
            self.tally.gone += 1
            return
        except OSError as error:
            self._note(planned.path, error.strerror or str(error))
            return
        self.tally.snapshots += 1
        self.tally.requests.add(planned.of.request_hash)
        self._freed(freed_by_unlinking(found))

    def _through_trash(self, planned: SnapshotFile, within: int, trash: int) -> bool:
        """False: a save had replaced the file meanwhile, and that one stays."""
        aside = _paths.random_name()
        if not move_aside(
            self._files, planned.name, within, aside, trash, lambda found: _is_planned(found, planned)
        ):
            return False
        self._files.unlink(aside, dir_fd=trash)
        return True

    def _loose(self, within: int, part: SessionPlan, directory: str, items: Iterable[Loose]) -> None:
        items = list(items)
        if not items:
            return
        with self._entered(directory, join(part.name, directory), within) as fd:
            for each in items if fd is not None else ():
                assert fd is not None
                self._between()
                self._remove_loose(each, fd)

    def _remove_loose(self, loose: Loose, within: int) -> None:
        try:
            found = self._files.status_at(loose.name, dir_fd=within)
            if found.st_ino != loose.inode:
                return
            if stat.S_ISDIR(found.st_mode):
                self._remove_tree(loose.name, within)
            else:
                self._files.unlink(loose.name, dir_fd=within)
                self._freed(freed_by_unlinking(found))
        except FileNotFoundError:
            return
        except OSError as error:
            self._note(loose.path, error.strerror or str(error))

    def _remove_session(self, fd: int, part: SessionPlan) -> None:
        """Remove the directory of a session that has nothing left: renamed aside first, the lock file last."""
        for name in self._files.names(fd):
            if name in (_paths.TEMPORARY, _paths.TRASH) or _paths.parse_generation_name(name) is not None:
                self._remove_if_empty(name, fd, join(part.name, name))
        if set(self._files.names(fd)) - {_paths.OWNER_RECORD, _paths.OWNER_LOCK}:
            return
        aside = _paths.dead_session_name()
        try:
            if not self._put_aside(part.name, aside, fd):
                return
            for name in (_paths.OWNER_RECORD, _paths.OWNER_LOCK):
                with suppress(FileNotFoundError):
                    self._files.unlink(name, dir_fd=fd)
            self._files.remove_directory(aside, dir_fd=self._root.fd)
        except FileNotFoundError:
            return  # a store had renamed it aside, and stopped there: it counts as half removed
        except OSError as error:
            self._note(part.name, error.strerror or str(error))
        else:
            self.tally.sessions += 1

    def _put_aside(self, name: str, aside: str, fd: int) -> bool:
        """False: another directory was put in its place meanwhile, which gets its name back."""
        files, root = self._files, self._root.fd
        files.rename(name, aside, from_fd=root, to_fd=root)
        mine = False
        try:
            mine = same_file(files.status_at(aside, dir_fd=root), files.status(fd))
        finally:
            if not mine:
                files.rename(aside, name, from_fd=root, to_fd=root)
        return mine

    def _remove_tree(self, name: str, within: int, *, keep_last: str | None = None) -> list[OSError]:
        freed_bytes, errors = remove_tree(
            self._files, name, dir_fd=within, between=self._between, keep_last=keep_last
        )
        self._freed(freed_bytes)
        for error in errors:
            self._note(error.filename or name, error.strerror or str(error))
        return errors

    def _remove_if_empty(self, name: str, within: int, path: str) -> None:
        try:
            self._files.remove_directory(name, dir_fd=within)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                self._note(path, error.strerror or str(error))

    def _lock(self, fd: int) -> OwnerLock | None:
        """A session's lock; ``None`` if somebody has it. ``OSError`` if there is none, or none that could be had."""
        if not stat.S_ISREG(self._files.status_at(_paths.OWNER_LOCK, dir_fd=fd).st_mode):
            raise OSError(errno.EINVAL, "its lock is no plain file")
        return OwnerLock.take(self._files, ".", create=False, dir_fd=fd)

    @contextmanager
    def _entered(self, name: str, path: str, within: int | None = None) -> Iterator[int | None]:
        """An open directory; ``None`` if it is gone, or can not be entered, which is noted."""
        try:
            fd = self._root.open(name, within)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            self._note(path, error.strerror or str(error))
            yield None
            return
        try:
            yield fd
        finally:
            self._files.close(fd)

    def _between(self) -> None:
        if not self._go_on():
            raise _Stopped

    def _freed(self, nbytes: int) -> None:
        self.tally.freed_bytes += nbytes
        self._progress(nbytes)

    def _note(self, path: str, why: str) -> None:
        self.tally.errors.append(f"{path}: {why}")


def _is_planned(found: stat_result, planned: SnapshotFile) -> bool:
    """True if this is still the very file that the plan speaks of."""
    said = (planned.inode, planned.nbytes, planned.mtime_ns)
    return stat.S_ISREG(found.st_mode) and (found.st_ino, found.st_size, found.st_mtime_ns) == said
