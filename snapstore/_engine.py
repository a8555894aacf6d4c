"""The threads of one store, their birth and their end. They know each other and the state; never the store's face.

So a store that is dropped without shutdown can be collected, and its threads end.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from snapstore._cleanup import Ending, Sweeper, clean
from snapstore._errors import StoreClosedError
from snapstore._files import FileSystem
from snapstore._memory import BufferPool
from snapstore._options import StoreOptions
from snapstore._session import Session
from snapstore._state import State
from snapstore._types import CleanupReport, ShutdownReport, SnapshotInfo, SnapshotKey
from snapstore._writer import Writer

_WRITER_STARTS = 2
_SWEEPER_SHARE = 0.1
"""Of shutdown's deadline, what is kept back for removing files when the writer takes all it is given."""

_log = logging.getLogger("snapstore")


class Engine:
    """One open session with its state, its buffers, its writer thread and its sweeper thread."""

    def __init__(self, root: str, options: StoreOptions, files: FileSystem) -> None:
        self.options = options
        self.files = files
        self.session = Session.open(files, root)
        self.state = State(options)
        self.pool = BufferPool(options.max_pending_bytes)
        self._pid = os.getpid()
        self._writer = Writer(self.state, self.session, files, options)
        self._sweeper = Sweeper(
            self.state, self.session, files, reclaim_leftovers=options.leftovers != "keep"
        )
        self._ending = threading.Lock()
        self._report: Future[ShutdownReport] | None = None
        try:
            if options.leftovers == "adopt":
                self._adopt()
            self.state.note_free_bytes(files.free_bytes(self.session.path))
        except BaseException:
            self.session.release()
            raise
        self._sweeper_thread = _start("snapstore-sweeper", self._sweeper.run)
        self._writer_thread = _start("snapstore-writer", self._run_writer)

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
    def writer_alive(self) -> bool:
        return self._writer_thread.is_alive()

    def clean(self, request_ids: list[str] | None, timeout_s: float) -> CleanupReport:
        """See ``_cleanup.clean``."""
        return clean(self.state, request_ids, timeout_s)

    def shutdown(self, *, cleanup: bool, timeout_s: float) -> ShutdownReport:
        """End everything within ``timeout_s``. On a thread of its own, so that no caller's interruption stops it half-way."""
        with self._ending:
            if self._report is None:
                self._report = Future()
                self.state.close("the store is shut down")
                args = (self._report, cleanup, time.monotonic() + timeout_s)
                threading.Thread(target=self._end, args=args, name="snapstore-shutdown", daemon=True).start()
        return self._report.result()

    def let_go(self) -> None:
        """The store was dropped, or the interpreter ends: let the threads write what is accepted and leave. Never blocks."""
        self.state.close("the store was dropped without shutdown")
        self._sweeper.ending = Ending(remove_if_empty=True)
        self.state.end_sweeper(after_writer=True)

    def join_briefly(self, timeout_s: float) -> None:
        """For the interpreter's exit: what is queued may still reach the disk in this time."""
        deadline_s = time.monotonic() + timeout_s
        for thread in (self._writer_thread, self._sweeper_thread):
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _end(self, report: Future[ShutdownReport], cleanup: bool, deadline_s: float) -> None:
        try:
            report.set_result(self._end_in_time(cleanup, deadline_s))
        except BaseException as error:
            report.set_exception(error)
            raise

    def _end_in_time(self, cleanup: bool, deadline_s: float) -> ShutdownReport:
        started_s = time.monotonic()
        before = self.state.published
        if cleanup:
            clean(self.state, None, _left(deadline_s))
        self._writer_thread.join(_left(deadline_s) * (1 - _SWEEPER_SHARE))
        abandoned: tuple[SnapshotKey, ...] = ()
        if self._writer_thread.is_alive():
            abandoned = self.state.abandon_rest()
            self._writer_thread.join(_left(deadline_s) * (1 - _SWEEPER_SHARE))
        ending = self._end_sweeper(cleanup, deadline_s)
        self.pool.clear()
        after = self.state.published
        return ShutdownReport(
            committed=after.committed - before.committed,
            cancelled=after.cancelled - before.cancelled,
            failed=after.failed - before.failed,
            abandoned=abandoned,
            trash_left=self._sweeper.trash_left,
            writer_stopped=not self._writer_thread.is_alive(),
            session_removed=ending.removed,
            errors=self._errors(ending, abandoned),
            waited_s=time.monotonic() - started_s,
        )

    def _end_sweeper(self, cleanup: bool, deadline_s: float) -> Ending:
        """The sweeper is the last to leave: it removes the session and gives up its lock, once the writer is gone.

        With the writer stuck that is after this shutdown has returned, or never.
        """
        gone = not self._writer_thread.is_alive()
        ending = Ending(remove=cleanup, remove_if_empty=True, give_up_s=deadline_s if gone else math.inf)
        self._sweeper.ending = ending
        self.state.end_sweeper(after_writer=True)
        if gone:
            self._sweeper_thread.join(_left(deadline_s))
        return ending

    def _errors(self, ending: Ending, abandoned: tuple[SnapshotKey, ...]) -> tuple[str, ...]:
        errors = list(ending.errors)
        if self._writer_thread.is_alive():
            errors.append(
                "the writer thread is stuck in a disk operation; its memory and the session's lock are kept "
                f"until the process ends ({len(abandoned)} saves abandoned)"
            )
        elif self._sweeper_thread.is_alive():
            errors.append(
                "the sweeper thread is stuck in a disk operation; what it removes is left to the next store"
            )
        for error in errors:
            _log.warning("shutdown of %s: %s", self.session.path, error)
        return tuple(errors)

    def _run_writer(self) -> None:
        """The writer thread's top: a bug that ends it is recorded, and the writer is started once more."""
        for start in range(_WRITER_STARTS):
            try:
                self._writer.run()
            except BaseException as error:
                last = start + 1 == _WRITER_STARTS
                self.state.writer_died(error, for_good=last)
                _log.critical(
                    "the writer thread died%s", "" if last else "; it is started again", exc_info=error
                )
            else:
                break
        self.state.writer_ended()

    def _adopt(self) -> None:
        for found in self.session.adopt():
            key = SnapshotKey(found.request_id, found.token_count)
            info = SnapshotInfo(key, found.generation, Path(found.path), found.nbytes)
            self.state.adopt(info, found.disk_bytes)


def _start(name: str, target: object) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def _left(deadline_s: float) -> float:
    return max(0.0, deadline_s - time.monotonic())
