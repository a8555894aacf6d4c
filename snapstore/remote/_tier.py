"""``RemoteTier``: what the core opens. Its own thread hears of everything in order, and only that thread decides.

It touches the local disk for the journal alone, and never the network: that is for the transfer threads, whose work is
in ``_exchange``. So a cleanup is written down within a moment, whatever the remote store does.
"""

from __future__ import annotations

import functools
import logging
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from snapstore._committed import CommittedFile
from snapstore._errors import RemoteUnavailableError, SnapshotNotFoundError, StoreClosedError
from snapstore._events import Repeats
from snapstore._files import FileSystem
from snapstore._memory import BufferPool
from snapstore._options import StoreOptions
from snapstore._records import Commit, End, Job
from snapstore._session import Session
from snapstore._state import State
from snapstore._threads import Threads
from snapstore._types import RemoteHealth, RemoteStats, SnapshotKey
from snapstore.remote import _names
from snapstore.remote._asking import answer, ask
from snapstore.remote._exchange import Exchange
from snapstore.remote._fetch import Hints, RemoteFetch
from snapstore.remote._journal import Journal, Recorded
from snapstore.remote._lives import Batch, Binding, Ending, Upload, upload_of
from snapstore.remote._manifest import EndLives, RemoteLife, visible
from snapstore.remote._objects import ObjectStore
from snapstore.remote._options import split_options
from snapstore.remote._pool import Pool

_log = logging.getLogger("snapstore.remote")


class RemoteTier:
    """See ``_door.Tier`` and ``_observer.Observer``."""

    def __init__(
        self,
        options: StoreOptions,
        state: State,
        session: Session,
        files: FileSystem,
        buffers: BufferPool,
        threads: Threads,
    ) -> None:
        assert options.remote is not None
        own, given = split_options(options.remote_options)
        self._policy = options.remote_policy
        self._timeout_s = own.timeout_s
        self._state = state
        self._files = files
        self._threads = threads
        self._hints = Hints(threads)
        self._session = Path(session.path).name
        self._node = own.node or platform.node()
        self._objects = ObjectStore(options.remote, given, own.timeout_s)
        self._journal = Journal(files, session.root, options.remote, durable=options.durability != "none")
        self._failures = Repeats(_log, "remote_failed", threads.monotonic_s)
        self._telling = threads.lock()
        self._pool = Pool(own.transfers, own.max_in_flight_bytes, self._ping, self._told, threads)
        self._exchange = Exchange(self._objects, self._pool, files, buffers, threads)
        self._probed = False
        self._closed = False
        self._inbox = threads.queue()
        self._thread = threads.thread("snapstore-remote", self._run)
        self._bindings: dict[str, Binding] = {}
        self._ends: dict[str, list[Ending]] = {}

    def start(self) -> None:
        """See ``_door.Tier``."""
        self._inbox.put(self._on_start)
        self._thread.start()
        self._pool.start()

    # -- what is told, under the state lock ---------------------------------------------------------------------

    def committed(self, job: Job, commit: Commit) -> None:
        """See ``_observer.Observer``."""
        self._inbox.put(functools.partial(self._on_committed, job.ticket, commit, job.fetched))

    def ended(self, request_ids: Sequence[str] | None) -> End:
        """See ``_observer.Observer``."""
        if self._closed:
            return End(error=StoreClosedError("the store is shut down: nobody is left to write the end down"))
        end = End()
        self._inbox.put(functools.partial(self._on_ended, request_ids, time.time(), end))
        return end

    def joined(self, key: SnapshotKey, life: str) -> None:
        """See ``_observer.Observer``."""
        self._inbox.put(functools.partial(self._on_joined, key.request_id, life))

    # -- what is asked ------------------------------------------------------------------------------------------

    def fetch(self, key: SnapshotKey) -> RemoteFetch:
        """See ``_door.Tier``."""
        look = functools.partial(self._look, key.request_id)
        return RemoteFetch(
            key, look, self._objects, self._pool, self._state, self._timeout_s, self._exchange,
            self._hints.of(key),
        )  # fmt: skip

    def boundaries(self, request_id: str) -> tuple[int, ...]:
        """See ``_door.Tier``."""
        life = self._look(request_id)
        self._hints.note(request_id, life)
        return tuple(sorted(life.boundaries)) if life is not None else ()

    def _look(self, request_id: str) -> RemoteLife | None:
        """What a node may load of a request, in the order of its cleanups and commits. Blocks for the network."""
        if self._closed:
            raise RemoteUnavailableError("the remote store can not be asked now: the store is shut down")
        known: Future[tuple[str | None, tuple[EndLives, ...]]] = self._threads.future()
        self._inbox.put(functools.partial(self._on_look, request_id, known))
        bound, ends = answer(known, self._timeout_s)
        seen = answer(
            ask(self._pool, functools.partial(self._objects.read_manifest, request_id)), self._timeout_s
        )
        return visible(seen.manifest, bound, ends)

    def publish(self, commits: Sequence[Commit], deadline_s: float) -> None:
        """See ``_door.Tier``."""
        waiters: list[Future[None]] = [self._threads.future() for _ in commits]
        self._inbox.put(functools.partial(self._on_publish, list(zip(commits, waiters, strict=True))))
        for commit, waiter in zip(commits, waiters, strict=True):
            try:
                waiter.result(max(0.0, deadline_s - self._threads.monotonic_s()))
            except (TimeoutError, FutureTimeoutError):
                why = f": {self._pool.error}" if self._pool.error else ""
                raise TimeoutError(
                    f"{commit.info.key} is not published yet{why}; it goes on behind"
                ) from None

    def leaving(self, commit: Commit) -> Callable[[], None]:
        """See ``_door.Tier``."""
        if self._policy != "on_detach":
            return lambda: None
        file = CommittedFile(self._files, commit.info)
        return lambda: self._inbox.put(functools.partial(self._on_left, commit, file))

    def health(self) -> RemoteHealth:
        """See ``_door.Tier``."""
        lost = self._objects.lost
        if self._closed:
            return RemoteHealth("closed", None, lost)
        if self._pool.reachable:
            return RemoteHealth("ok", self._pool.error, lost)
        return RemoteHealth("unreachable" if self._pool.opened else "opening", self._pool.error, lost)

    def stats(self) -> RemoteStats:
        """See ``_door.Tier``."""
        return self._exchange.stats()

    # -- the end ------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """See ``_door.Tier``."""
        self._closed = True
        self._inbox.put(None)
        self._pool.close()

    def close(self, timeout_s: float) -> tuple[SnapshotKey, ...]:
        """See ``_door.Tier``."""
        deadline_s = self._threads.monotonic_s() + timeout_s
        heard = self._threads.event()
        self._inbox.put(heard.set)
        if heard.wait(timeout_s):
            self._pool.await_idle(deadline_s)
        unpublished = self._exchange.unpublished()
        self.let_go()
        self._thread.join(max(0.0, deadline_s - self._threads.monotonic_s()))
        self._pool.join(deadline_s)
        self._objects.close()
        return unpublished

    # -- the tier's own thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while (note := self._inbox.get()) is not None:
            try:
                note()
            except Exception as error:  # noqa: BLE001 - a thread's top: what is noted next counts all the same
                extra = {"event": "remote_note_failed", "reason": "bug"}
                _log.critical("remote_note_failed: the others are made", exc_info=error, extra=extra)
            del note

    def _on_start(self) -> None:
        """Go on with what earlier stores of this root have not carried out."""
        try:
            left = self._journal.left()
        except OSError as error:
            self._note_journal(error)
            return
        for recorded in left:
            endings = [Ending(end, attempted=True) for end in recorded.ends]
            for ending in endings:
                self._ends.setdefault(ending.end.request_id, []).append(ending)
            self._carry_out(endings, recorded)

    def _on_committed(self, ticket: Any, commit: Commit, fetched: bool) -> None:
        binding = self._bindings.get(commit.info.key.request_id)
        if fetched:
            if binding is not None:
                binding.published[commit.info.key.token_count] = commit
                ticket._publish()
            return
        if self._policy == "on_commit":
            self._exchange.begin_upload(upload_of(self._threads, self._bound(commit), commit, ticket))
        else:
            self._bound(commit).tickets[commit.info.key.token_count] = (commit, ticket)

    def _on_publish(self, wanted: list[tuple[Commit, Future[None]]]) -> None:
        for commit, waiter in wanted:
            key = commit.info.key
            if self._gone(commit):
                waiter.set_exception(
                    SnapshotNotFoundError(
                        f"{key} was cleaned up or replaced before it was published", key=key
                    )
                )
                continue
            binding = self._bound(commit)
            upload = binding.queued.get(key.token_count)
            if upload is not None and upload.commit is commit and upload.tell(waiter):
                continue
            if binding.published.get(key.token_count) is commit:
                waiter.set_result(None)
                continue
            known, ticket = binding.tickets.get(key.token_count, (None, None))
            upload = upload_of(self._threads, binding, commit, ticket if known is commit else None)
            upload.tell(waiter)
            self._exchange.begin_upload(upload)

    def _gone(self, commit: Commit) -> bool:
        try:
            return self._state.commit_of(commit.info.key) is not commit
        except Exception:  # noqa: BLE001 - whatever it says, the commit is not what is there
            return True

    def _on_left(self, commit: Commit, file: CommittedFile) -> None:
        self._exchange.begin_upload(upload_of(self._threads, self._bound(commit), commit, file=file))

    def _on_joined(self, request_id: str, life: str) -> None:
        binding = self._bindings.get(request_id)
        if binding is None or not binding.used:
            known = {} if binding is None else binding.tickets
            self._bindings[request_id] = Binding(
                request_id, life, self._threads.lock(), begun=True, used=True, tickets=known
            )

    def _on_look(self, request_id: str, known: Future[tuple[str | None, tuple[EndLives, ...]]]) -> None:
        binding = self._bindings.get(request_id)
        self._ends[request_id] = [ending for ending in self._ends.get(request_id, ()) if not ending.over]
        ends = tuple(ending.end for ending in self._ends[request_id])
        if not ends:
            del self._ends[request_id]
        known.set_result((binding.life if binding is not None and binding.used else None, ends))

    def _on_ended(self, request_ids: Sequence[str] | None, now_s: float, end: End) -> None:
        endings = []
        for request_id in list(self._bindings) if request_ids is None else request_ids:
            binding = self._bindings.pop(request_id, None)
            lives = frozenset({binding.life} if binding is not None else ())
            endings.append(
                Ending(EndLives(request_id, lives, now_s), attempted=binding is not None and binding.used)
            )
            if binding is not None:
                binding.over = "its request was cleaned up"
                self._drop_uploads(binding)
            self._ends.setdefault(request_id, []).append(endings[-1])
        try:
            recorded = self._journal.record(each.end for each in endings) if endings else None
        except OSError as error:
            self._note_journal(error)
            end.error, recorded = error, None
        else:
            end.recorded = True
        self._state.end_noted()
        self._carry_out(endings, recorded)

    def _carry_out(self, endings: list[Ending], recorded: Recorded | None) -> None:
        batch = Batch(endings, recorded, len(endings))
        for ending in endings:
            self._exchange.begin_end(
                ending, functools.partial(self._inbox.put, functools.partial(self._on_over, batch))
            )

    def _on_over(self, batch: Batch) -> None:
        batch.left -= 1
        if batch.left == 0 and batch.recorded is not None:
            try:
                self._journal.done(batch.recorded)
            except OSError as error:
                self._note_journal(error)
        for ending in batch.endings:
            if ending.over and ending.end.request_id in self._ends:
                left = [each for each in self._ends[ending.end.request_id] if each is not ending]
                self._ends[ending.end.request_id] = left
                if not left:
                    del self._ends[ending.end.request_id]

    def _bound(self, commit: Commit) -> Binding:
        info = commit.info
        binding = self._bindings.get(info.key.request_id)
        if binding is None:
            life = _names.life_name(self._node, self._session, info.generation)
            binding = self._bindings[info.key.request_id] = Binding(
                info.key.request_id, life, self._threads.lock()
            )
        return binding

    def _drop_uploads(self, binding: Binding) -> None:
        waiting = set(binding.queued.values())
        for task in self._pool.take_back(lambda task: task.of in waiting):
            assert isinstance(task.of, Upload)
            self._exchange.drop(task.of)

    def _note_journal(self, error: OSError) -> None:
        extra = {"event": "remote_journal_failed"}
        _log.warning("remote_journal_failed: %s; a cleanup may be lost at a crash", error, extra=extra)

    # -- the transfer threads -----------------------------------------------------------------------------------

    def _ping(self) -> None:
        if self._probed:
            self._objects.ping()
            return
        self._objects.probe()
        self._probed = True
        for lost in self._objects.lost:
            _log.warning(
                "remote_guarantee_lost: %s does not keep %s",
                self._objects.url,
                lost,
                extra={"event": "remote_guarantee_lost"},
            )

    def _told(self, error: BaseException | None) -> None:
        with self._telling:
            if error is None:
                self._failures.worked()
            else:
                self._exchange.note_failed()
                self._failures.failed(error, f"a request to {self._objects.url} failed; local work goes on")
