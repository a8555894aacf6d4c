"""Forgetting: the cleaner marks and waits; the sweeper thread removes.

A cleaner's own call touches no disk, so its time-out holds also when the disk hangs in a rename. The sweeper renames
the directory of a dead generation into ``.trash``, which is when the cleaner may return, and frees the bytes when
nobody waits; between two removals it looks for new dead generations, so that no cleaner waits for an ``unlink``.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from snapstore._events import Repeats
from snapstore._files import GONE, FileSystem, exists, remove_tree, rename_surely
from snapstore._reasons import reason_of
from snapstore._records import Life
from snapstore._session import Budget, Session, reclaim
from snapstore._state import State
from snapstore._types import CleanupReport

RECLAIM_SESSIONS = 64
RECLAIM_S = 30.0
"""Bounds of the leftovers that one store reclaims at its start; the next start goes on."""

_LOOK_EVERY_S = 0.1
"""While leftovers are reclaimed: how often this store's own trash and the free space are looked at."""

_BATCH = 32
"""Renames between two looks of those who wait for them: each look costs as much as a rename, and a turn of the GIL."""

_log = logging.getLogger("snapstore.cleanup")


class Cleaning:
    """A cleanup under way. What it ends is ended when it is made; only waiting for the files is left."""

    def __init__(self, state: State, request_ids: Iterable[str] | None) -> None:
        self._state = state
        self._started_s = state.monotonic_s()
        self._cleanup = state.begin_cleanup(request_ids)

    @property
    def over(self) -> bool:
        """Nothing is left to wait for. Takes no lock: it may be learnt of late, never too early."""
        return all(each.settled for each in self._cleanup.waits)

    def wait(self, timeout_s: float) -> CleanupReport:
        """Wait at most ``timeout_s`` for the files to go."""
        waits = self._cleanup.waits
        return self._report(self._state.await_swept(waits, timeout_s) if waits else 0)

    def end(self, *, waited: bool) -> CleanupReport:
        """For those who have ``waited`` in their own way, or not at all. Never blocks."""
        return self._report(self._state.end_cleanup(self._cleanup.waits, waited=waited))

    def _report(self, left_to_writer: int) -> CleanupReport:
        cleanup, waited_s = self._cleanup, self._state.monotonic_s() - self._started_s
        self._state.note("cleanup_wait", waited_s)
        return CleanupReport(
            clean=all(life.swept for life in cleanup.lives) and (cleanup.end is None or cleanup.end.recorded),
            cancelled=cleanup.cancelled,
            removed=cleanup.removed,
            removed_bytes=cleanup.removed_bytes,
            left_to_writer=left_to_writer,
            waited_s=waited_s,
        )


def clean(state: State, request_ids: Iterable[str] | None, timeout_s: float) -> CleanupReport:
    """End the lives of these requests (all for ``None``), then wait at most ``timeout_s`` for their files to go."""
    return Cleaning(state, request_ids).wait(timeout_s)


@dataclass(slots=True)
class Ending:
    """How the sweeper is to end; written before the state lets it end, read and answered by its thread."""

    remove: bool = False
    remove_if_empty: bool = False
    give_up_s: float = math.inf
    removed: bool = False
    errors: list[str] = field(default_factory=list)


class Sweeper:
    """What the sweeper thread runs. It only removes.

    ``reclaim``: first the sessions of dead owners, or ``only`` these. ``full``: what it has moved to the trash stays
    there after a power cut.
    """

    def __init__(
        self,
        state: State,
        session: Session,
        files: FileSystem,
        *,
        reclaim: bool,
        only: frozenset[str] | None,
        full: bool,
    ) -> None:
        self._state = state
        self._full = full
        self._monotonic_s = state.monotonic_s
        self._session = session
        self._files = files
        self._reclaims = reclaim
        self._only = only
        self._trash: deque[tuple[str, int]] = deque()
        self._ending: Ending | None = None
        self._failing = False
        self._failed_now = False
        self._failures = Repeats(_log, "removal_failed", state.monotonic_s)
        self._looked_s = -math.inf
        self.busy_since_s: float | None = None
        """When the removal that is under way began; ``None`` while there is none."""

    @property
    def trash_left(self) -> int:
        """Forgotten directories whose bytes are not freed yet."""
        return len(self._trash)

    def end_so(self, ending: Ending) -> None:
        """How to end; to be followed by ``state.end_sweeper``. What is reclaimed of others is left at once."""
        self._ending = ending

    def run(self) -> None:
        """Until the state says that it is over; then the trash, within its time, and the session, as it was told."""
        try:
            self._reclaim()
            while (lives := self._next_dirt()) is not None:
                self._failed_now = False
                self._sweep(lives)
                del lives
                self._look_at_space()
                self._empty_trash()
                self._note_recovery()
            self._leave(self._ending or Ending())
        except _TimeIsUp:
            assert self._ending is not None
            self._ending.errors.append(
                "shutdown's time ended before the trash was empty; the next store frees it"
            )
        finally:
            self.busy_since_s = None

    def _next_dirt(self) -> list[Life] | None:
        self.busy_since_s = None
        lives = self._state.claim_dirt()
        self.busy_since_s = self._monotonic_s()
        return lives

    def _sweep(self, lives: list[Life]) -> None:
        for start in range(0, len(lives), _BATCH):
            swept: list[tuple[Life, int]] = []
            in_trash = len(self._trash)
            self._session.follow()
            for life in lives[start : start + _BATCH]:
                try:
                    swept.append((life, self._rename_aside(life)))
                except OSError as error:
                    self._note_failure(error)
                    self._state.not_swept(life, error)
            if self._full and len(self._trash) > in_trash:
                self._sync_session()
            self._state.swept(swept)

    def _sync_session(self) -> None:
        """So that no power cut brings back what was forgotten. The cleaner is answered all the same: it is gone."""
        try:
            self._files.sync_directory(self._session.path)
        except OSError as error:
            self._note_failure(error)
            self._state.not_freed(error)

    def _rename_aside(self, life: Life) -> int:
        """Bytes that now wait in the trash: none where there was no directory, which is what a sweep wants."""
        directory = self._session.generation_path(life.request_id, life.generation)
        path = self._session.trash_path()
        try:
            rename_surely(self._files, directory, path)
        except OSError as error:
            if error.errno not in GONE:
                raise
            if not exists(self._files, directory):
                if life.committed and self._session.is_away():
                    raise  # with all that was committed, which would be back with it
                return 0
            self._session.mend_trash()
            rename_surely(self._files, directory, path)
        self._trash.append((path, life.doomed_bytes))
        return life.doomed_bytes

    def _sweep_what_came(self) -> None:
        """Called between two removals: a cleaner may be waiting, or shutdown's time be up.

        What was forgotten is out of the way first, or the next store could adopt it.
        """
        self.busy_since_s = now_s = self._monotonic_s()
        self._sweep(self._state.take_dirt())
        if self._ending is not None and now_s >= self._ending.give_up_s:
            raise _TimeIsUp

    def _empty_trash(self) -> None:
        """Free the bytes of all that waits, and of what comes meanwhile; what will not go waits for the next round."""
        stubborn: list[tuple[str, int]] = []
        try:
            while self._trash:
                path, nbytes = self._trash[0]
                errors = remove_tree(self._files, path, between=self._sweep_what_came)[1]
                self._trash.popleft()
                if errors:
                    self._note_failure(errors[0])
                    self._state.not_freed(errors[0])
                    stubborn.append((path, nbytes))
                else:
                    self._state.freed(nbytes)
        finally:
            self._trash.extend(stubborn)

    def _look_at_space(self) -> None:
        self._looked_s = self._monotonic_s()
        try:
            self._state.note_free_bytes(self._files.free_bytes(self._session.root))
        except OSError as error:
            _log.debug("the free space is not to be known: %s", error)

    def _reclaim(self) -> None:
        """Once. Whatever is asked of this store meanwhile comes first."""
        if not self._reclaims:
            return
        self._reclaims = False
        now_s = self._monotonic_s
        durable = self._session.durable
        budget = Budget(now_s, RECLAIM_SESSIONS, now_s() + RECLAIM_S, self._only, durable)
        try:
            reclaim(self._files, self._session.root, budget, lambda: self._attend(budget))
        except _Enough:
            _log.debug("the rest of the leftovers is for the next store")
        except OSError as error:
            budget.errors.append(error)
        if budget.gone:
            _log.info(
                "leftovers_reclaimed: %d sessions whose owners are dead",
                budget.gone,
                extra={"event": "leftovers_reclaimed", "count": budget.gone},
            )
        if budget.errors:
            _log.warning(
                "leftovers_stay: %d could not be removed, the first: %s",
                len(budget.errors),
                budget.errors[0],
                extra={
                    "event": "leftovers_stay",
                    "count": len(budget.errors),
                    "reason": reason_of(budget.errors[0]),
                },
            )

    def _attend(self, budget: Budget) -> None:
        """Called between two removals of leftovers."""
        self._sweep_what_came()
        if self._ending is not None or self._monotonic_s() >= budget.deadline_s:
            raise _Enough
        if (self._trash and not self._failing) or self._monotonic_s() - self._looked_s > _LOOK_EVERY_S:
            self._look_at_space()
            self._empty_trash()

    def _leave(self, ending: Ending) -> None:
        """The end of the session directory: removed as a whole, or if nothing is left in it."""
        self._empty_trash()
        try:
            if ending.remove:
                errors = self._session.remove(self._sweep_what_came)
                ending.removed = not errors
            elif ending.remove_if_empty:
                ending.removed, errors = self._session.remove_if_empty(self._sweep_what_came)
            else:
                return
            ending.errors += [f"could not remove: {error}" for error in errors]
        except OSError as error:
            ending.errors.append(f"could not remove the session: {error}")

    def _note_failure(self, error: OSError) -> None:
        """One warning at the change, not one a directory."""
        self._failing = self._failed_now = True
        self._failures.failed(
            error, "could not remove; it is tried again at the next cleanup and at shutdown"
        )

    def _note_recovery(self) -> None:
        if self._failing and not self._failed_now and self._state.removals_work():
            self._failing = False
            self._failures.worked()


class _TimeIsUp(Exception):
    """Shutdown's deadline, seen between two removals."""


class _Enough(Exception):
    """The bounds of a reclaim, or the end of the store, seen between two removals."""
