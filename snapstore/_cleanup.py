"""Forgetting: the cleaner marks and waits; the sweeper thread removes.

A cleaner's own call touches no disk, so its time-out holds also when the disk hangs in a rename. The sweeper renames the
directory of a dead generation into ``.trash``, which is when the cleaner may return, and frees the bytes when nobody
waits; between two removals it looks for new dead generations, so that no cleaner waits for an ``unlink``.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from snapstore._files import FileSystem, remove_tree
from snapstore._records import Life
from snapstore._session import Budget, Session, reclaim
from snapstore._state import State
from snapstore._types import CleanupReport

RECLAIM_SESSIONS = 64
RECLAIM_S = 30.0
"""Bounds of the leftovers that one store reclaims at its start; the next start goes on."""

_log = logging.getLogger("snapstore.cleanup")


def clean(state: State, request_ids: Iterable[str] | None, timeout_s: float) -> CleanupReport:
    """End the lives of these requests (all for ``None``), then wait at most ``timeout_s`` for their files to go."""
    started_s = time.monotonic()
    cleanup = state.begin_cleanup(request_ids)
    left_to_writer = state.await_swept(cleanup.lives, timeout_s) if cleanup.lives else 0
    return CleanupReport(
        clean=all(life.swept for life in cleanup.lives),
        cancelled=cleanup.cancelled,
        removed=cleanup.removed,
        removed_bytes=cleanup.removed_bytes,
        left_to_writer=left_to_writer,
        waited_s=time.monotonic() - started_s,
    )


@dataclass(slots=True)
class Ending:
    """How the sweeper is to end; written before the state lets it end, read and answered by its thread."""

    remove: bool = False
    remove_if_empty: bool = False
    give_up_s: float = math.inf
    removed: bool = False
    errors: list[str] = field(default_factory=list)


class Sweeper:
    """What the sweeper thread runs. It only removes, and is the last to leave."""

    def __init__(self, state: State, session: Session, files: FileSystem, *, reclaim_leftovers: bool) -> None:
        self._state = state
        self._session = session
        self._files = files
        self._reclaim_leftovers = reclaim_leftovers
        self._trash: deque[tuple[str, int]] = deque()
        self._warned = False
        self.ending = Ending()

    @property
    def trash_left(self) -> int:
        """Forgotten directories whose bytes are not freed yet."""
        return len(self._trash)

    def run(self) -> None:
        """Until the state says that it is over; then the trash, within its time, and the session, as ``ending`` says."""
        try:
            if self._reclaim_leftovers:
                self._reclaim()
            while (lives := self._state.claim_dirt()) is not None:
                self._sweep(lives)
                del lives
                self._look_at_space()
                self._empty_trash()
            self._leave()
        except _TimeIsUp:
            self.ending.errors.append(
                "shutdown's time ended before the trash was empty; the next store frees it"
            )
        finally:
            self._session.release()

    def _sweep(self, lives: list[Life]) -> None:
        for life in lives:
            try:
                trashed_bytes = self._rename_aside(life)
            except OSError as error:
                self._warn(error)
                self._state.not_swept(life, error)
            else:
                self._state.swept(life, trashed_bytes)

    def _rename_aside(self, life: Life) -> int:
        """Bytes that now wait in the trash: none where there was no directory, which is what a sweep wants."""
        directory = self._session.generation_path(life.request_id, life.generation)
        path = self._session.trash_path()
        try:
            self._files.rename(directory, path)
        except FileNotFoundError:
            if not self._exists(directory):
                return 0
            self._session.mend()
            self._files.rename(directory, path)
        self._trash.append((path, life.doomed_bytes))
        return life.doomed_bytes

    def _exists(self, path: str) -> bool:
        try:
            self._files.status_at(path)
        except FileNotFoundError:
            return False
        return True

    def _sweep_what_came(self) -> None:
        """Called between two removals: a cleaner may be waiting, or shutdown's time be up."""
        if time.monotonic() >= self.ending.give_up_s:
            raise _TimeIsUp
        self._sweep(self._state.take_dirt())

    def _empty_trash(self) -> None:
        """Free the bytes of all that waits, and of what comes meanwhile; what will not go waits for the next round."""
        stubborn: list[tuple[str, int]] = []
        while self._trash:
            path, nbytes = self._trash[0]
            errors = remove_tree(self._files, path, between=self._sweep_what_came)[1]
            self._trash.popleft()
            if errors:
                self._warn(errors[0])
                stubborn.append((path, nbytes))
            else:
                self._state.freed(nbytes)
        self._trash.extend(stubborn)

    def _look_at_space(self) -> None:
        try:
            self._state.note_free_bytes(self._files.free_bytes(self._session.path))
        except OSError as error:
            self._warn(error)

    def _reclaim(self) -> None:
        budget = Budget(RECLAIM_SESSIONS, time.monotonic() + RECLAIM_S)
        try:
            gone = reclaim(self._files, self._session.root, budget, self._sweep_what_came)
        except OSError as error:
            budget.errors.append(error)
            gone = 0
        if gone:
            _log.info("reclaimed %d sessions whose owners are dead", gone)
        if budget.errors:
            _log.warning(
                "%d leftovers could not be removed, the first: %s", len(budget.errors), budget.errors[0]
            )

    def _leave(self) -> None:
        """The end of the session directory: removed as a whole, or if nothing is left in it."""
        ending = self.ending
        self._empty_trash()
        try:
            if ending.remove or (ending.remove_if_empty and self._session.is_empty()):
                errors = self._session.remove(self._sweep_what_came)
                ending.errors += [f"could not remove: {error}" for error in errors]
                ending.removed = not errors
        except OSError as error:
            ending.errors.append(f"could not remove the session: {error}")

    def _warn(self, error: OSError) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        _log.log(level, "could not remove: %s; it is tried again at the next cleanup and at shutdown", error)


class _TimeIsUp(Exception):
    """Shutdown's deadline, seen between two removals."""
