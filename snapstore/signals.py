"""SIGTERM ends the stores, if you say so: ``install_sigterm_handler(store)`` once, in the main thread.

A Python signal handler runs when the main thread comes back to Python, which may take seconds, and it must not take a
lock that the main thread may hold. So nothing is done in it. The interpreter's C handler writes a byte into a pipe as
the signal arrives (``signal.set_wakeup_fd``), the Python handler writes one too, for when somebody else has taken the
wakeup descriptor, and a thread that waits for bytes acts:

    refuse      no store takes saves any more
    copies      what is on its way to host memory arrives (nothing to wait for where no device was used)
    end         every store writes what it has, or with ``cleanup`` forgets it and removes its session; all at once
    chain       what was there before: the default action is to leave with status 0

A main thread that leaves by itself meanwhile, say because its saves are refused, waits for the end first: in
``uninstall``, or as the interpreter exits.

Each step has its share of the grace, none waits for one store longer than for another, and whatever a step raises, the
next one is made. A second SIGTERM changes nothing; the end of the grace does.
"""

from __future__ import annotations

import atexit
import enum
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from snapstore._options import seconds
from snapstore._store import SnapshotStore, shutdown_all

__all__ = ["SigtermHandler", "install_sigterm_handler"]

_REFUSED_BY = 0.05
_COPIED_BY = 0.4
_ENDED_BY = 0.85
_REPORTED_BY = 0.9
"""When each step is over, as a share of the grace. What is left is for the main thread to leave in."""
_MAIN_THREAD_S = 1.0
"""How long the main thread may take to come back to Python, before the process is ended without it."""
_STOP = b"\0"
_SIGTERM_BYTE = bytes([signal.SIGTERM])

_log = logging.getLogger("snapstore.signals")


def install_sigterm_handler(
    *stores: SnapshotStore, grace_s: float = 25.0, cleanup: bool = True
) -> SigtermHandler:
    """End ``stores`` at SIGTERM, within ``grace_s``, and then do what was done at SIGTERM before.

    To be called in the main thread. What comes after the stores have ended: the default action leaves the process with
    status 0 (``SystemExit`` in the main thread; where that is not in Python, without it); a Python handler is called in
    the main thread, and says itself what comes next; where SIGTERM was ignored, the process goes on. Handlers of an
    event loop that was running already (``loop.add_signal_handler``) are called then, too.

    Args:
        stores: what to end.
        grace_s: for all of it; choose less than the time until SIGKILL (30 s in Kubernetes, 10 s in Docker).
        cleanup: forget everything and remove the sessions; otherwise write what is accepted, and keep the files.

    Returns:
        The handler, whose ``uninstall()`` puts everything back.

    Raises:
        ValueError: not in the main thread, or no store given. TypeError: something else than a store.
        RuntimeError: a handler is installed that Python knows nothing of, and could not chain.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("a signal handler can be installed in the main thread only; call this at start-up")
    for store in stores:
        if not isinstance(store, SnapshotStore):
            kind = type(store).__name__
            raise TypeError(f"stores must be SnapshotStore (`.store` of an AsyncSnapshotStore), not {kind}")
        store._engine.check_process()
    if not stores:
        raise ValueError("name at least one store to end at SIGTERM")
    if not isinstance(cleanup, bool):
        raise TypeError(f"cleanup must be a bool, not {type(cleanup).__name__}")
    return SigtermHandler(stores, seconds(grace_s, "grace_s"), cleanup)


class _Phase(enum.Enum):
    WAITING = "waiting for SIGTERM"
    ENDING = "ending the stores"
    ENDED = "the stores have ended; SIGTERM goes to what was there before"
    OFF = "uninstalled"


class SigtermHandler:
    """What ``install_sigterm_handler`` has installed. As a context manager it uninstalls itself at the end."""

    def __init__(self, stores: Iterable[SnapshotStore], grace_s: float, cleanup: bool) -> None:
        previous = signal.getsignal(signal.SIGTERM)
        if previous is None:
            raise RuntimeError(
                "SIGTERM has a handler that was not installed from Python; it can not be chained"
            )
        self._previous = previous
        self._stores = tuple(stores)
        self._grace_s = grace_s
        self._cleanup = cleanup
        self._phase = _Phase.WAITING
        self._main_leaves = threading.Event()
        self._over = threading.Event()
        self._deadline_s = float("inf")
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._watcher = threading.Thread(target=self._watch, name="snapstore-sigterm", daemon=True)
        self._watcher.start()
        signal.signal(signal.SIGTERM, self._on_signal)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # A copy: the number may be closed and mean something else by the time there is a byte to pass on.
        self._pass_on_to = os.dup(self._previous_wakeup) if self._previous_wakeup != -1 else -1
        _installed.append(self)
        _register_once()

    def uninstall(self) -> None:
        """Put back the handler and the wakeup descriptor that were there. Twice is fine; in the main thread only.

        While SIGTERM is ending the stores, it waits for that first, at most for what is left of the grace.
        Where somebody has installed a handler on top, that one stays, and SIGTERM passes through this one untouched.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("a signal handler can be uninstalled in the main thread only")
        if self._phase is _Phase.OFF:
            return
        self._await_end()
        self._restore()
        os.set_blocking(self._writer, True)
        os.write(self._writer, _STOP)
        self._watcher.join()

    def __enter__(self) -> SigtermHandler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()

    def _await_end(self) -> None:
        """Whoever leaves while the stores are being ended would take the threads with it that end them."""
        if self._phase is _Phase.ENDING:
            self._over.wait(max(0.0, self._deadline_s - time.monotonic()))

    def _restore(self) -> None:
        self._phase = _Phase.OFF
        _installed.remove(self)
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._previous)
        current = signal.set_wakeup_fd(-1)
        wanted = self._previous_wakeup if current == self._writer else current
        try:
            signal.set_wakeup_fd(wanted, warn_on_full_buffer=False)
        except (OSError, ValueError):
            _log.debug("the wakeup descriptor that was there before is closed by now")

    def _close(self) -> None:
        for fd in (self._reader, self._writer, self._pass_on_to):
            if fd != -1:
                os.close(fd)

    # -- in the main thread ---------------------------------------------------------------------------------------

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._phase in (_Phase.ENDED, _Phase.OFF):
            self._chain(signum, frame)
        else:
            _tell(self._writer, _SIGTERM_BYTE)

    def _chain(self, signum: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(signum, frame)
        elif self._previous == signal.SIG_DFL and self._phase is _Phase.ENDED:
            self._main_leaves.set()
            raise SystemExit(0)
        elif self._previous == signal.SIG_DFL:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    # -- on threads -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """The watcher's top. It stays free for bytes that are somebody else's while the stores are ended."""
        while True:
            for byte in os.read(self._reader, 512):
                if byte == _STOP[0]:
                    self._close()
                    return
                if byte != signal.SIGTERM or self._phase is _Phase.ENDED:
                    _tell(self._pass_on_to, bytes([byte]))
                elif self._phase is _Phase.WAITING:
                    self._deadline_s = time.monotonic() + self._grace_s
                    self._phase = _Phase.ENDING
                    _start("snapstore-sigterm-end", self._end)

    def _end(self) -> None:
        deadline_s = self._deadline_s
        _log.info("SIGTERM: ending %d stores within %.1f s", len(self._stores), self._grace_s)
        self._for_each_store("refuse", self._refuse, self._until(deadline_s, _REFUSED_BY))
        copied_by_s = self._until(deadline_s, _COPIED_BY)
        self._for_each_store("copies", lambda store: self._await_copies(store, copied_by_s), copied_by_s)
        ended_by_s, reported_by_s = self._until(deadline_s, _ENDED_BY), self._until(deadline_s, _REPORTED_BY)
        self._for_each_store("end", lambda store: self._end_store(store, ended_by_s), reported_by_s)
        if self._phase is not _Phase.ENDING:
            return  # uninstalled meanwhile
        self._phase = _Phase.ENDED
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)
        self._over.set()
        if self._previous == signal.SIG_DFL:
            self._leave(deadline_s)

    def _until(self, deadline_s: float, share: float) -> float:
        return deadline_s - self._grace_s * (1 - share)

    def _for_each_store(self, step: str, act: Callable[[SnapshotStore], object], until_s: float) -> None:
        """All stores at once, until ``until_s`` at the most; who is not done by then is left behind."""

        def guarded(store: SnapshotStore) -> None:
            try:
                act(store)
            except BaseException as error:  # noqa: BLE001 - a thread's top
                _log.warning("SIGTERM: %s of %r failed", step, store, exc_info=error)

        threads = [_start(f"snapstore-sigterm-{step}", guarded, store) for store in self._stores]
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, until_s - time.monotonic()))
        late = sum(thread.is_alive() for thread in threads)
        if late:
            _log.warning("SIGTERM: %s took longer than its share of the grace for %d stores", step, late)

    def _refuse(self, store: SnapshotStore) -> None:
        store._engine.refuse("the process was told to end (SIGTERM)")

    def _await_copies(self, store: SnapshotStore, until_s: float) -> None:
        if not store._state.await_staged(max(0.0, until_s - time.monotonic())):
            _log.warning("SIGTERM: copies to host memory of %r are still under way", store)

    def _end_store(self, store: SnapshotStore, until_s: float) -> None:
        left_s = max(0.0, until_s - time.monotonic())
        (report,) = shutdown_all([store], cleanup=self._cleanup, timeout_s=left_s)
        _log.info("SIGTERM: %r: %s", store, report)

    def _leave(self, deadline_s: float) -> None:
        """The default action. The main thread leaves by ``SystemExit``, if it comes back to Python; else without it."""
        left_s = deadline_s - time.monotonic()
        if self._main_leaves.wait(max(0.0, min(left_s, _MAIN_THREAD_S))):
            time.sleep(max(0.0, deadline_s - time.monotonic()))
        os._exit(0)


_installed: list[SigtermHandler] = []


def _tell(fd: int, byte: bytes) -> None:
    """A byte into a pipe that nobody may be reading from any more."""
    if fd == -1:
        return
    try:
        os.write(fd, byte)
    except OSError:
        _log.debug("a signal's byte was not taken: the pipe is full, or its reader gone")


def _start(name: str, target: Callable[..., None], *args: Any) -> threading.Thread:
    """Where no more threads are to be had, here and now."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        target(*args)
    return thread


# -- fork -----------------------------------------------------------------------------------------------------------
# A child has the parent's handler and its pipe: a SIGTERM for the child would end the parent's stores. So it is taken
# out there, and SIGTERM waits until that is done.

_mask = threading.local()
_registered: list[bool] = []


def _register_once() -> None:
    if not _registered:
        _registered.append(True)
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
        atexit.register(_at_exit)


def _at_exit() -> None:
    with suppress(SystemExit):  # the default action: it is leaving already
        for handler in _installed:
            handler._await_end()


def _before_fork() -> None:
    if _installed:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    before = _mask.__dict__.pop("before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_child() -> None:
    for handler in reversed(list(_installed)):
        handler._restore()
        handler._close()
    _after_fork()
