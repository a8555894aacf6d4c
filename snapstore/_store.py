"""``SnapshotStore``: what a scheduler talks to."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from snapstore._arguments import check_token_count, checked_key, checked_request_id, timeout_or
from snapstore._committed import gone
from snapstore._detach import move_out
from snapstore._door import Tier
from snapstore._engine import Engine
from snapstore._errors import ShutdownTimeoutError, SnapshotNotFoundError
from snapstore._files import FileSystem, unlink_surely
from snapstore._format import decode_metadata
from snapstore._loading import Loaded, Loader
from snapstore._look import Moment, health_at, stats_at
from snapstore._options import StoreOptions, seconds
from snapstore._reasons import reason_of
from snapstore._records import Commit, Job, Life
from snapstore._saving import fulfil, offered
from snapstore._threads import Thread, Threads
from snapstore._ticket import SaveTicket
from snapstore._types import (
    CleanupReport,
    Framework,
    ShutdownReport,
    Snapshot,
    SnapshotInfo,
    SnapshotKey,
    Source,
    StoreHealth,
    StoreStats,
)
from snapstore.adapters import adapter_named

_EXIT_JOIN_S = 0.5
"""What the interpreter's exit waits for stores that were not shut down."""

_log = logging.getLogger("snapstore")


class SnapshotStore:
    """Snapshots of requests' state at token boundaries: taken at once, written in the background, forgotten on demand.

    Every method may be called from any thread. ``save``, ``has``, ``boundaries``, ``latest``, ``stats`` and ``health``
    never wait for a disk. As a context manager it shuts down at the end and keeps the files.

    Not in a signal handler or a finalizer (``__del__``): those run in the midst of a thread, which may be one that has
    the store's lock, and would wait for it for ever. Start a thread there; ``stats`` and ``health`` take no lock.

    Args:
        root: directory of the store, made if missing. Several stores, in one process or many, may share it.
        options: see ``StoreOptions``.
        file_system: the disk, for tests; see ``snapstore.testing``.
        threads: locks, threads and the clock, for tests; see there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        options: StoreOptions | None = None,
        *,
        file_system: FileSystem | None = None,
        threads: Threads | None = None,
    ) -> None:
        if options is not None and not isinstance(options, StoreOptions):
            raise TypeError(f"options must be StoreOptions, not {type(options).__name__}")
        self._options = options or StoreOptions()
        path = os.path.abspath(os.fsdecode(root))
        self._engine = Engine(path, self._options, file_system or FileSystem(), threads or Threads())
        self._state = self._engine.state
        _open_engines.add(self._engine)
        self._finalizer = weakref.finalize(self, _dropped, self._engine)
        self._finalizer.atexit = False

    @property
    def root(self) -> Path:
        """The directory that all sessions share."""
        return Path(self._engine.session.root)

    @property
    def session(self) -> Path:
        """The directory of this store's own session."""
        return Path(self._engine.session.path)

    @property
    def options(self) -> StoreOptions:
        return self._options

    # -- save and load ------------------------------------------------------------------------------------------

    def save(
        self,
        request_id: str,
        token_count: int,
        tensors: Mapping[str, Any],
        *,
        metadata: Any = None,
        borrow: bool = False,
    ) -> SaveTicket:
        """Take a snapshot. When it returns, the caller may overwrite or free the tensors.

        Blocks for one copy of the bytes to host memory (none for MLX, none with ``borrow``), and for room at most
        ``save_timeout_s``; never for a disk. Saving a key again replaces it.

        CUDA tensors are packed by the caller's current stream and brought to the host by a background thread: nothing
        is waited for but room, and the tensors may be overwritten or freed in the order of that stream. Of a stream
        that is capturing a graph nothing can be saved. MPS tensors are copied to the host before it returns.

        Args:
            request_id: any text that UTF-8 can encode.
            token_count: the boundary, 0 or more.
            tensors: name -> tensor, all of one framework.
            metadata: any JSON value (no tuples, no NaN, string keys), up to 1 MiB; comes back equal.
            borrow: do not copy; the caller leaves the tensors alone until ``ticket.released``.

        Raises:
            UnsupportedTensorError, TypeError, ValueError: bad arguments; nothing was reserved.
            StoreFullError: no room in time. DiskQuotaError: a disk limit. StoreClosedError: shut down.
            SaveCancelledError: the request was cleaned up while this call waited for room.
            SaveFailedError: the tensors' device is stuck or lost, as ``health`` says. RuntimeError: it is capturing.
            MemoryError: no host memory for the copy; nothing stays reserved.
        """
        self._engine.check_process()
        offer = offered(self._engine, checked_key(request_id, token_count), tensors, metadata, borrow=borrow)
        return fulfil(self._engine, offer, self._state.reserve(*offer.wanted))

    def load(
        self,
        request_id: str,
        token_count: int,
        *,
        framework: Framework | None = None,
        device: Any = None,
    ) -> Snapshot:
        """The snapshot in memory of the caller's own: from memory while it is pending, from its file after.

        What is not here is looked for in the remote store, if there is one: that blocks for the network, at most
        ``timeout_s`` of ``remote_options`` for each answer. What comes from there is kept here if there is room.

        Blocks for one copy, or for one read and one checksum of the file; before that, for a snapshot that is still on
        its way from a device at most ``device_timeout_s``, then ``TimeoutError``. To a CUDA device it is copied by a
        stream of its own, for which the caller's current stream waits, and not the host.

        Args:
            framework: ``"numpy"``, ``"torch"`` or ``"mlx"``; the one it was saved with by default.
            device: where the tensors go, in the framework's own words; the host by default.

        Raises:
            SnapshotNotFoundError: never saved, or cleaned up. RemoteUnavailableError, which is one too: not here, and
            the remote store can not be asked. SaveFailedError: its save failed, with the cause.
            SnapshotCorruptError: the file is not what was written. UnsupportedTensorError: a dtype that the framework
            does not have.
        """
        self._engine.check_process()
        started_s = self._engine.monotonic_s()
        key = checked_key(request_id, token_count)
        if framework is not None:
            adapter_named(framework)
        loader = Loader(self._engine.staging, framework, device)
        try:
            (tensors, metadata_json), source = self._load_here(key, loader)
        except SnapshotNotFoundError:
            if self._engine.remote is None:
                raise
            (tensors, metadata_json), source = self._load_there(self._engine.remote, key, loader)
        self._state.note(f"load_{source}", self._engine.monotonic_s() - started_s)
        return Snapshot(key, tensors, decode_metadata(metadata_json), source)

    def _load_here(self, key: SnapshotKey, loader: Loader) -> tuple[Loaded, Source]:
        missing: Commit | None = None
        while True:
            found = self._state.find(key, self._options.device_timeout_s)
            if isinstance(found, Job):
                return loader.from_memory(self._state, found), "memory"
            try:
                verify = self._options.verify_on_load
                return loader.from_file(self._engine.files, found, verify=verify), "disk"
            except FileNotFoundError as error:
                if found is missing:
                    raise gone(found.info) from error
                missing = found  # a cleanup or a later save may have come before the open: look again

    def _load_there(self, tier: Tier, key: SnapshotKey, loader: Loader) -> tuple[Loaded, Source]:
        try:
            verify = self._options.verify_on_load
            return loader.from_remote(self._state, tier, key, verify=verify), "remote"
        except SnapshotNotFoundError:
            if not self._state.has(key):
                raise
            return self._load_here(key, loader)  # saved here meanwhile, and so in place of what was there

    # -- look ---------------------------------------------------------------------------------------------------

    def has(self, request_id: str, token_count: int, *, remote: bool = False) -> bool:
        """True if ``load`` would find it here, pending or committed. Never blocks for a disk.

        ``remote``: or in the remote store, for which it blocks. ``RemoteUnavailableError``: that can not be asked.
        """
        self._engine.check_process()
        key = checked_key(request_id, token_count)
        return self._state.has(key) or (remote and token_count in self._remote_boundaries(request_id))

    def boundaries(self, request_id: str) -> tuple[int, ...]:
        """Token counts of the request's snapshots, ascending, pending and committed. Never blocks for a disk."""
        self._engine.check_process()
        return self._state.boundaries(checked_request_id(request_id))

    def latest(self, request_id: str, *, at_most: int | None = None, remote: bool = False) -> int | None:
        """The largest boundary, or the largest that is ``at_most`` so many tokens; ``None`` if there is none.

        ``remote``: here or in the remote store; that blocks for the network. ``RemoteUnavailableError`` likewise.
        """
        if at_most is not None:
            check_token_count(at_most, "at_most")
        known = self.boundaries(request_id) + (self._remote_boundaries(request_id) if remote else ())
        return max((count for count in known if at_most is None or count <= at_most), default=None)

    def _remote_boundaries(self, request_id: str) -> tuple[int, ...]:
        tier = self._engine.remote
        return () if tier is None else tier.boundaries(request_id)

    def stats(self) -> StoreStats:
        """Counters and sizes of one moment. Takes no lock: never blocks, nor is ever torn."""
        return stats_at(Moment.of(self._engine))

    def health(self) -> StoreHealth:
        """How the store is. Asks neither disk nor device, takes no lock, never blocks."""
        return health_at(self._engine, Moment.of(self._engine))

    # -- wait ---------------------------------------------------------------------------------------------------

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything accepted before the call is settled; False if that took longer than ``timeout_s``."""
        self._engine.check_process()
        return self._all_in_time(self._state.tickets(), timeout_s, _ended)

    def drain_request(self, request_id: str, *, timeout_s: float) -> bool:
        """Wait until no tensor lent or given by this request is read any more; False if not within ``timeout_s``.

        That is more than ``ticket.released`` for device tensors, which holds in the order of the caller's stream: here
        nothing in any stream reads them. What was lent, and what the device has not been asked for by then, is taken
        back: that save fails.
        """
        self._engine.check_process()
        return self._drain(checked_request_id(request_id), seconds(timeout_s, "timeout_s"))

    def drain(self, timeout_s: float | None = None) -> bool:
        """``drain_request`` for every request."""
        self._engine.check_process()
        return self._drain(None, None if timeout_s is None else seconds(timeout_s, "timeout_s"))

    def _drain(self, request_id: str | None, timeout_s: float | None) -> bool:
        now_s = self._engine.monotonic_s
        deadline_s = None if timeout_s is None else now_s() + timeout_s
        tickets = self._state.tickets(request_id)
        self._all_in_time(tickets, timeout_s, lambda ticket, left_s: ticket.wait_released(left_s))
        left_s = None if deadline_s is None else max(0.0, deadline_s - now_s())
        return self._engine.staging.drain(request_id, left_s) and all(each.released for each in tickets)

    def _all_in_time(self, tickets: list[SaveTicket], timeout_s: float | None, wait: Any) -> bool:
        now_s = self._engine.monotonic_s
        deadline_s = None if timeout_s is None else now_s() + seconds(timeout_s, "timeout_s")
        return all(
            wait(ticket, None if deadline_s is None else max(0.0, deadline_s - now_s())) for ticket in tickets
        )

    def detach(
        self,
        request_id: str,
        token_count: int,
        destination: str | os.PathLike[str],
        *,
        timeout_s: float = 30.0,
    ) -> Path:
        """Wait for the commit, then move the file out to ``destination``, which no cleanup can touch any more.

        Atomic: a rename, or across file systems a copy, an fsync and a rename. The snapshot is the store's no longer.
        Blocks for the disk; ``TimeoutError`` if commit and writer take longer than ``timeout_s``.
        """
        self._engine.check_process()
        key = checked_key(request_id, token_count)
        deadline_s = self._engine.monotonic_s() + seconds(timeout_s, "timeout_s")
        while True:
            held = self._state.hold_commit(key, deadline_s)
            if held is not None:
                break
            self._await_commit(key, deadline_s)
        remote = self._engine.remote
        with self._given_up(*held, remote.leaving if remote is not None else None) as path:
            full = self._options.durability == "full"
            return move_out(self._engine.files, self._engine.session, path, destination, durable=full)

    def _discard(self, key: SnapshotKey) -> bool:
        """Remove one committed snapshot, for the package's own stores above this one. Blocks for the disk.

        False: it is not there, not on disk yet, or the writer is busy with its request. ``OSError``: it is still there.
        """
        self._engine.check_process()
        try:
            held = self._state.hold_commit(key, self._engine.monotonic_s())
        except TimeoutError:
            return False
        if held is None:
            return False
        with self._given_up(*held) as path:
            unlink_surely(self._engine.files, path)
        return True

    @contextmanager
    def _given_up(
        self, life: Life, commit: Commit, leaving: Callable[[Commit], Callable[[], None]] | None = None
    ) -> Iterator[str]:
        """The path of a file that the index names no more. If the block raises, it is still there, and named again."""
        try:
            left = leaving(commit) if leaving is not None else None
            yield str(commit.info.path)
        except BaseException:
            self._state.end_hold(life, put_back=commit)
            raise
        self._state.end_hold(life, left=left)

    def _await_commit(self, key: SnapshotKey, deadline_s: float) -> None:
        now_s = self._engine.monotonic_s
        found = self._state.find(key, max(0.0, deadline_s - now_s()))
        if isinstance(found, Job):
            self._state.let_go_memory(found)
            if not _ended(found.ticket, max(0.0, deadline_s - now_s())):
                raise TimeoutError(f"{key} is not on disk yet; try again later, or with a longer timeout_s")

    # -- publish ------------------------------------------------------------------------------------------------

    def publish(
        self, request_id: str, token_count: int | None = None, *, timeout_s: float
    ) -> tuple[SnapshotInfo, ...]:
        """Wait until a boundary, or all that the request has now, can be loaded on other nodes. What was published.

        Blocks for the disk and the network, at most ``timeout_s``; then ``TimeoutError``, and it goes on behind.
        ``SaveCancelledError``: the request was cleaned up, here or on another node, or another node has taken it over.
        """
        self._engine.check_process()
        tier = self._engine.remote
        if tier is None:
            raise ValueError("this store has no remote store: open it with StoreOptions(remote=URL)")
        deadline_s = self._engine.monotonic_s() + seconds(timeout_s, "timeout_s")
        counts = self.boundaries(request_id) if token_count is None else (token_count,)
        keys = [checked_key(request_id, count) for count in counts]
        commits = [self._committed(key, deadline_s) for key in keys]
        tier.publish(commits, deadline_s)
        return tuple(commit.info for commit in commits)

    def _committed(self, key: SnapshotKey, deadline_s: float) -> Commit:
        while (commit := self._state.commit_of(key)) is None:
            self._await_commit(key, deadline_s)
            if self._engine.monotonic_s() >= deadline_s:
                raise TimeoutError(f"{key} is not on disk yet; publish it later")
        return commit

    # -- forget -------------------------------------------------------------------------------------------------

    def cleanup_request(self, request_id: str, *, timeout_s: float | None = None) -> CleanupReport:
        """Forget a request: cancel what is pending, remove what is committed. What comes later is not touched.

        ``load`` and ``has`` say no from the moment it returns, clean or not. Waits at most ``timeout_s``
        (``cleanup_request_timeout_s`` by default; 0: marks and returns) for the writer to let go of this very request
        and for its files to be out of the way; never for another request's I/O.
        """
        self._engine.check_process()
        default_s = self._options.cleanup_request_timeout_s
        return self._engine.clean([checked_request_id(request_id)], timeout_or(timeout_s, default_s))

    def cleanup_all(self, *, timeout_s: float | None = None) -> CleanupReport:
        """``cleanup_request`` for every request at once, with one wait (``cleanup_all_timeout_s`` by default)."""
        self._engine.check_process()
        return self._engine.clean(None, timeout_or(timeout_s, self._options.cleanup_all_timeout_s))

    def shutdown(self, *, cleanup: bool = False, timeout_s: float | None = None) -> ShutdownReport:
        """End the store within ``timeout_s`` (``shutdown_timeout_s`` by default), once; later callers get that report.

        Refuses new saves, then writes what is accepted, or with ``cleanup`` forgets everything and removes the session
        directory; then stops its threads. Without ``cleanup`` the files stay, for the next store to adopt or discard.

        ``RuntimeError`` in a done callback on a thread that it would wait for: it has begun all the same, and goes on.
        """
        ending = self.begin_shutdown(cleanup=cleanup, timeout_s=timeout_s)
        if not ending.done() and self._engine.waits_for_this_thread:
            raise RuntimeError(
                "shutdown can not be waited for in a done callback: it waits for this thread; "
                "it goes on when the callback returns. Call begin_shutdown() there"
            )
        return ending.result()

    def begin_shutdown(
        self, *, cleanup: bool = False, timeout_s: float | None = None
    ) -> Future[ShutdownReport]:
        """``shutdown`` without the wait: where its report will be. Not to be cancelled."""
        self._engine.check_process()
        timeout_s = timeout_or(timeout_s, self._options.shutdown_timeout_s)
        self._finalizer.detach()
        return self._engine.begin_shutdown(cleanup=cleanup, timeout_s=timeout_s)

    def __enter__(self) -> SnapshotStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._engine.belongs_here:
            return  # a forked child leaves the block too; the store is its parent's
        report = self.shutdown(cleanup=False)
        if error is None:
            check_ending(self, report)

    def __repr__(self) -> str:
        return f"<SnapshotStore {self._engine.session.path} {self.health().status}>"


def check_ending(store: SnapshotStore, report: ShutdownReport) -> None:
    """``ShutdownTimeoutError`` at the end of a ``with`` block that would leave saves unwritten in silence."""
    if report.abandoned:
        raise ShutdownTimeoutError(
            f"{len(report.abandoned)} saves were not written in time, the first of them {report.abandoned[0]}; "
            "call shutdown() yourself for the report",
            key=report.abandoned[0],
            path=store.session,
        )


def shutdown_all(
    stores: Iterable[SnapshotStore], *, cleanup: bool = False, timeout_s: float | None = None
) -> list[ShutdownReport]:
    """Shut down every store, all at once, each within its own deadline; one bad store does not stop the others.

    Reports come in the order of ``stores``. Whatever a shutdown raises is in its report.
    """
    stores = list(stores)
    reports: list[ShutdownReport | None] = [None] * len(stores)

    def end(index: int, store: SnapshotStore) -> None:
        try:
            reports[index] = store.shutdown(cleanup=cleanup, timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001 - the next store is ended all the same; this one's report says why
            reports[index] = _failed_report(error)

    started: list[Thread] = []
    for index, store in enumerate(stores):
        thread = Threads().thread("snapstore-shutdown-all", partial(end, index, store))
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends, or no thread more may be: one by one, then
            end(index, store)
        else:
            started.append(thread)
    for thread in started:
        thread.join()
    return [report for report in reports if report is not None]


def _failed_report(error: Exception) -> ShutdownReport:
    extra = {"event": "shutdown_failed", "reason": reason_of(error)}
    _log.warning("shutdown_failed: %s: %s", type(error).__name__, error, extra=extra)
    return ShutdownReport(0, 0, 0, (), 0, False, False, (f"{type(error).__name__}: {error}",), 0.0)


_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _dropped(engine: Engine) -> None:
    """The store was collected. On a thread of its own: collection may strike while this very thread holds the lock."""
    if not engine.belongs_here:
        return
    try:
        engine.threads.thread("snapstore-dropped", engine.let_go).start()
    except RuntimeError:
        return  # the interpreter ends: `_at_exit` has let it go, or it is too late
    warnings.warn(
        f"a SnapshotStore on {engine.session.root} was dropped without shutdown()",
        ResourceWarning,
        stacklevel=2,
    )


@atexit.register
def _at_exit() -> None:
    """Stores that are still open when the interpreter ends get a moment to write what they accepted."""
    now_s = Threads().monotonic_s
    deadline_s = now_s() + _EXIT_JOIN_S
    engines = [engine for engine in _open_engines if engine.belongs_here]
    for engine in engines:
        engine.let_go()
    for engine in engines:
        unwritten = engine.join_briefly(max(0.0, deadline_s - now_s()))
        if unwritten:
            extra = {"event": "exit_unwritten", "count": unwritten}
            _log.warning(
                "exit_unwritten: %d saves of %s were not written before exit",
                unwritten,
                engine.session.path,
                extra=extra,
            )


def _ended(ticket: SaveTicket, timeout_s: float | None) -> bool:
    try:
        ticket.exception(timeout_s)
    except TimeoutError:
        return False
    return True
