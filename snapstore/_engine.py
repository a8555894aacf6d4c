"""The threads of one store, their birth and their end. They know each other and the state; never the store's face.

So a store that is dropped without shutdown can be collected, and its threads end.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from snapstore._adopt import adopt
from snapstore._cleanup import Ending, Sweeper, clean
from snapstore._door import open_tier
from snapstore._errors import StoreClosedError
from snapstore._files import FileSystem
from snapstore._memory import BufferPool
from snapstore._options import StoreOptions
from snapstore._records import Published
from snapstore._session import Session
from snapstore._staging import Staging
from snapstore._state import State
from snapstore._threads import Threads
from snapstore._types import CleanupReport, ShutdownReport, SnapshotInfo, SnapshotKey
from snapstore._writer import Writer

_STARTS = 2
"""How often a thread that dies of a bug is started."""
_DEVICE_SHARE = 0.5
"""Of shutdown's deadline, what device copies may take before those that have not arrived are given up."""
_SWEEPER_SHARE = 0.1
"""Of shutdown's deadline, what is kept back for removing files when the writer takes all it is given."""

_log = logging.getLogger("snapstore")


class Engine:
    """One open session with its state, its buffers, its writer thread and its sweeper thread."""

    def __init__(self, root: str, options: StoreOptions, files: FileSystem, threads: Threads) -> None:
        self.options = options
        self.files = files
        self.threads = threads
        self.monotonic_s = threads.monotonic_s
        self.state = State(options, threads)
        self.pool = BufferPool(options.max_pending_bytes)
        self.staging = Staging(self.state, self.pool, options, threads)
        self._pid = os.getpid()
        self._ending = threads.lock()
        self._report: Future[ShutdownReport] = threads.future()
        self._deaths: list[str] = []
        self._waited_for: list[object] = []
        self._leaving = threads.lock()
        self._inside = 2
        durable = options.durability != "none"
        self.session = Session.open(files, root, durable=durable)
        try:
            only = self._adopt(durable) if options.leftovers == "adopt" else None
            self._look_at_space()
            self.remote = self.state.observer = open_tier(
                options, self.state, self.session, files, self.pool, threads
            )
            self._writer = Writer(self.state, self.session, files, options)
            reclaim = options.leftovers != "keep"
            full = options.durability == "full"
            self._sweeper = Sweeper(self.state, self.session, files, reclaim=reclaim, only=only, full=full)
            self._sweeper_thread = threads.thread("snapstore-sweeper", self._run_sweeper)
            self._writer_thread = threads.thread("snapstore-writer", self._run_writer)
            self._start()
        except BaseException:
            if self._inside == 2:
                self._give_back_session()
            raise

    def check_process(self) -> None:
        """A forked child has neither the threads nor the session; ``StoreClosedError`` there."""
        if os.getpid() != self._pid:
            raise StoreClosedError(
                f"this store belongs to process {self._pid}, which forked this one; open a store of its own here"
            )

    @property
    def belongs_here(self) -> bool:
        return os.getpid() == self._pid

    @property
    def waits_for_this_thread(self) -> bool:
        """The caller runs on the writer's thread, or on that which ends the store: in a callback of a ticket."""
        return self.threads.this_thread() in self._waited_for

    @property
    def writer_alive(self) -> bool:
        return self._writer_thread.is_alive()

    @property
    def removing_since_s(self) -> float | None:
        """When the removal of files that is under way began, on the monotonic clock."""
        return self._sweeper.busy_since_s

    def clean(self, request_ids: list[str] | None, timeout_s: float) -> CleanupReport:
        """See ``_cleanup.clean``."""
        return clean(self.state, request_ids, timeout_s)

    def refuse(self, why: str) -> None:
        """Take no more saves. What is accepted is still written."""
        self.state.close(why)

    def begin_shutdown(self, *, cleanup: bool, timeout_s: float) -> Future[ShutdownReport]:
        """End everything within ``timeout_s``; only the first call counts, the others get its report. Never blocks.

        It happens on a thread of its own, so that no caller's interruption stops it half-way.
        """
        deadline_s = self.monotonic_s() + timeout_s
        if not self._ending.locked():
            thread = self.threads.thread("snapstore-shutdown", lambda: self._end(cleanup, deadline_s))
            try:
                thread.start()
            except RuntimeError:  # the interpreter ends, or the process has as many threads as it may
                self._end(cleanup, deadline_s)
        return self._report

    def let_go(self) -> None:
        """The store was dropped, or the interpreter ends: the threads write what is accepted, and go. Never blocks."""
        if self._ending.locked():
            return
        self.state.close("the store was dropped without shutdown")
        self.staging.let_go()
        if self.remote is not None:
            self.remote.let_go()
        self._sweeper.end_so(Ending(remove_if_empty=True))
        self.state.end_sweeper(after_writer=True)

    def join_briefly(self, timeout_s: float) -> int:
        """For the interpreter's exit: what is queued may still reach the disk in this time. How many saves did not."""
        deadline_s = self.monotonic_s() + timeout_s
        for thread in (self._writer_thread, self._sweeper_thread):
            thread.join(self._left_s(deadline_s))
        return self.state.published.pending

    # -- the beginning ------------------------------------------------------------------------------------------

    def _adopt(self, durable: bool) -> frozenset[str]:
        """The dead sessions that nothing is left in, and only they may be reclaimed."""
        adoption = adopt(self.files, self.session, durable=durable)
        for found in adoption.found:
            key = SnapshotKey(found.request_id, found.token_count)
            info = SnapshotInfo(key, found.generation, Path(found.path), found.nbytes)
            self.state.adopt(info, found.disk_bytes)
        if adoption.errors:
            _log.warning(
                "leftovers_not_adopted: %d are kept for the next start, the first: %s",
                len(adoption.errors),
                adoption.errors[0],
                extra={"event": "leftovers_not_adopted", "count": len(adoption.errors)},
            )
        return frozenset(adoption.emptied)

    def _look_at_space(self) -> None:
        try:
            self.state.note_free_bytes(self.files.free_bytes(self.session.root))
        except OSError as error:
            _log.debug("the free space is not to be known: %s", error)

    def _start(self) -> None:
        self._sweeper_thread.start()
        try:
            self._writer_thread.start()
        except BaseException:
            self.state.writer_ended()
            self._leave()
            self.let_go()
            raise
        if self.remote is not None:
            self.remote.start()

    def _give_back_session(self) -> None:
        """Nothing was started. What was adopted stays, for the next store."""
        try:
            self.session.remove_if_empty(lambda: None)
        except OSError as error:
            _log.debug("%s is left to the next store: %s", self.session.path, error)
        finally:
            self.session.release()

    # -- the threads --------------------------------------------------------------------------------------------

    def _run_writer(self) -> None:
        """The writer thread's top: a bug that ends it is recorded, and the writer is started once more."""
        self._waited_for.append(self.threads.this_thread())
        try:
            self._run("writer", self._writer.run, self.state.writer_died)
        finally:
            self.state.writer_ended()
            self._leave()

    def _run_sweeper(self) -> None:
        """The sweeper thread's top, likewise."""
        try:
            self._run("sweeper", self._sweeper.run, lambda error, **_: self.state.sweeper_died(error))
        finally:
            self.state.sweeper_ended()
            self._leave()

    def _run(self, name: str, run: Callable[[], None], died: Callable[..., None]) -> None:
        for start in range(_STARTS):
            try:
                run()
            except BaseException as error:  # noqa: BLE001 - a thread's top
                last = start + 1 == _STARTS
                what = f"the {name} thread died of {type(error).__name__}: {error}"
                extra = {"event": "thread_died", "reason": "bug", "role": name}
                more = "" if last else "; it is started again"
                _log.critical("thread_died: %s%s", what, more, exc_info=error, extra=extra)
                if last or self._ending.locked():
                    self._deaths.append(what)
                _guarded(lambda error=error, last=last: died(error, for_good=last))  # type: ignore[misc]
            else:
                return

    def _leave(self) -> None:
        """The last of the two threads gives up the session's lock: while one may touch its files, it has an owner."""
        with self._leaving:
            self._inside -= 1
            last = self._inside == 0
        if last:
            self.session.release()

    # -- the end ------------------------------------------------------------------------------------------------

    def _end(self, cleanup: bool, deadline_s: float) -> None:
        """All of a shutdown. Whatever a step raises, the next ones are made, and the report says it."""
        if not self._ending.acquire(blocking=False):
            return
        self._waited_for.append(self.threads.this_thread())
        ending = _Shutdown(
            self.monotonic_s(), self.state.published, Ending(remove=cleanup, remove_if_empty=True)
        )
        steps: list[Callable[[], object]] = [
            lambda: self.refuse("the store is shut down"),
            lambda: (
                clean(self.state, None, self._left_s(deadline_s) * (1 - _SWEEPER_SHARE)) if cleanup else None
            ),
            lambda: self._end_copies(ending, deadline_s),
            lambda: self._end_writer(ending, deadline_s),
            lambda: self._end_remote(ending, deadline_s),
            lambda: self._end_sweeper(ending, deadline_s),
            self.pool.close,
            lambda: ending.errors.extend(self.staging.close(self._left_s(deadline_s))),
        ]
        ending.errors += filter(None, map(_guarded, steps))
        try:
            self._report.set_result(self._reported(ending))
        except BaseException as error:  # noqa: BLE001 - whoever waits for the report is told
            self._report.set_exception(error)

    def _end_copies(self, ending: _Shutdown, deadline_s: float) -> None:
        ending.not_copied = self.staging.finish(self._left_s(deadline_s) * _DEVICE_SHARE)

    def _end_writer(self, ending: _Shutdown, deadline_s: float) -> None:
        self._writer_thread.join(self._left_s(deadline_s) * (1 - _SWEEPER_SHARE))
        if self._writer_thread.is_alive():
            ending.abandoned = self.state.abandon_rest()
            self._writer_thread.join(self._left_s(deadline_s) * (1 - _SWEEPER_SHARE))

    def _end_remote(self, ending: _Shutdown, deadline_s: float) -> None:
        if self.remote is not None:
            ending.unpublished = self.remote.close(self._left_s(deadline_s) * (1 - _SWEEPER_SHARE))

    def _end_sweeper(self, ending: _Shutdown, deadline_s: float) -> None:
        """The sweeper is the last to leave: it removes the session, once the writer is gone.

        With the writer stuck that is after this shutdown has returned, or never.
        """
        gone = not self._writer_thread.is_alive()
        ending.of_sweeper.give_up_s = (
            deadline_s - self._left_s(deadline_s) * _SWEEPER_SHARE if gone else math.inf
        )
        self._sweeper.end_so(ending.of_sweeper)
        self.state.end_sweeper(after_writer=True)
        if gone:
            self._sweeper_thread.join(self._left_s(deadline_s))

    def _left_s(self, deadline_s: float) -> float:
        return max(0.0, deadline_s - self.monotonic_s())

    def _reported(self, ending: _Shutdown) -> ShutdownReport:
        before, after = ending.before, self.state.published
        errors = (*ending.errors, *self._deaths, *self._stuck(ending), *ending.of_sweeper.errors)
        for error in errors:
            extra = {"event": "shutdown_problem", "path": self.session.path}
            _log.warning("shutdown_problem: %s: %s", self.session.path, error, extra=extra)
        return ShutdownReport(
            committed=after.committed - before.committed,
            cancelled=after.cancelled - before.cancelled,
            failed=after.failed - before.failed,
            abandoned=ending.not_copied + ending.abandoned,
            trash_left=self._sweeper.trash_left,
            writer_stopped=not self._writer_thread.is_alive(),
            session_removed=ending.of_sweeper.removed,
            errors=errors,
            waited_s=self.monotonic_s() - ending.started_s,
            leaked_bytes=self.staging.facts.leaked_bytes,
            unpublished=ending.unpublished,
        )

    def _stuck(self, ending: _Shutdown) -> list[str]:
        if self._writer_thread.is_alive():
            kept = "its memory and the session's lock are kept until it comes back or the process ends"
            left = len(ending.abandoned)
            return [f"the writer thread is stuck in a disk operation; {kept} ({left} saves abandoned)"]
        if self._sweeper_thread.is_alive():
            return ["the sweeper thread is still in a disk operation; the rest is left to the next store"]
        return []


class _Shutdown:
    """A shutdown under way: what was before it, and what it has to report."""

    def __init__(self, started_s: float, before: Published, of_sweeper: Ending) -> None:
        self.started_s = started_s
        self.before = before
        self.of_sweeper = of_sweeper
        self.abandoned: tuple[SnapshotKey, ...] = ()
        self.not_copied: tuple[SnapshotKey, ...] = ()
        self.unpublished: tuple[SnapshotKey, ...] = ()
        self.errors: list[str] = []


def _guarded(step: Callable[[], object]) -> str | None:
    """For a thread's top: what a step raised, in words, so that the next step is made all the same."""
    try:
        step()
    except BaseException as error:  # noqa: BLE001 - a thread's top
        extra = {"event": "shutdown_step_failed", "reason": "bug"}
        _log.critical("shutdown_step_failed: the others are made", exc_info=error, extra=extra)
        return f"{type(error).__name__}: {error}"
    return None
