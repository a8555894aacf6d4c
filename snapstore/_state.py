"""What a store knows: one lock, every transition, all counters. No I/O, no threads, no tensor contents.

    from -> to             function              thread
    -       -> STAGING     reserve               caller: charges jobs and bytes, waits for room until its deadline
    -       -> STAGING     keep                  the remote tier's: what was loaded from afar, if there is room at once
    STAGING -> QUEUED      admit                 caller or device thread: readable from here
    STAGING -> CANCELLED   admit, abandon        its life has ended, or a later save of its key is here already
    STAGING -> FAILED      abandon               caller, or whoever has taken the end of a device's copy
    QUEUED  -> WRITING     claim                 writer, which holds the life's `busy` from here to its settling
    QUEUED  -> CANCELLED   begin_cleanup         cleaner: drain, forget, mark and count in one critical section
    QUEUED  -> CANCELLED   admit                 by a later save of the same key
    QUEUED  -> CANCELLED   abandon_rest          shutdown, at its deadline
    WRITING -> COMMITTED   commit                writer, after the rename
    WRITING -> CANCELLED   finish_cancelled      writer, after it has undone its file
    WRITING -> FAILED      fail                  writer, its temporary file removed

A *life* is one generation of a request id, from its first save to the cleanup that ends it.

 1. A job is settled exactly once, by its owner: in STAGING the caller, or once it is on its way from a device whoever
    takes the end of that (``_flights``); drainer in QUEUED, writer in WRITING.
 2. WRITING implies that the writer holds `life.busy`, the writer-busy lock of that generation. A detach holds it while
    it renames a file out. It is a flag under the state lock with conditions to wait on: one lock, no order to keep.
    It belongs to a generation, not to the store, so that nobody ever waits for another request's write.
 3. A path contains its generation; generations are never reused. Removing a dead one can not touch a later save.
 4. A job is current iff its life is alive and is the life of its request id. Only current jobs commit.
 5. `cancelled_in_hand[generation]` = jobs of it that are WRITING and not current. Drained jobs are never counted; at
    zero the key goes, and whoever takes it there hands the dead life to the sweeper.
 6. `pending_bytes` = bytes in STAGING + QUEUED + WRITING, within the limit unless one job is alone. Charged before the
    copy.
 7. A key is readable from `admit` until its life ends; entries leave by identity (`pending[key] is job`), never by key.
    A job that is on its way from a device is listed from `on_its_way`, and a reader waits for it.
    The later accepted save of a key wins, whatever order they are admitted in.
 8. QUEUED jobs hold host memory only. A job's memory goes back when it is settled and nobody reads from it.
 9. A dead life goes to the sweeper when nobody holds it: at its end, or when its holder lets go. After `swept`, no file
    of it exists or will appear.
10. accepted = committed + cancelled + failed + pending, jobs and bytes, in every value that is published.

Decide under the lock, act outside: tickets are resolved, memory is given back and bells are rung after it is let go.
"""

from __future__ import annotations

import errno
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from snapstore._errors import (
    DiskQuotaError,
    SaveCancelledError,
    SaveFailedError,
    SnapshotNotFoundError,
    StoreClosedError,
)
from snapstore._ledger import Ledger, in_words
from snapstore._memory import HostImage
from snapstore._observer import Observer
from snapstore._options import StoreOptions
from snapstore._records import Cleanup, Commit, Content, End, Job, Life, Published, Turn
from snapstore._room import Room
from snapstore._threads import Threads
from snapstore._ticket import SaveTicket
from snapstore._types import SaveState, SnapshotInfo, SnapshotKey

_Outcome = SnapshotInfo | BaseException
_Settled = list[tuple[Job, _Outcome]]


class State:
    """See the module's header. Every public method takes the lock once and lets it go before anything slow."""

    def __init__(self, options: StoreOptions, threads: Threads) -> None:
        self.monotonic_s = threads.monotonic_s
        self._threads = threads
        self._lock = threads.lock()
        self._work = threads.condition(self._lock)  # the writer waits: a job to claim, or the end
        self._space = threads.condition(self._lock)  # savers wait, first come, first served
        self._dirt = threads.condition(self._lock)  # the sweeper waits: something to remove, or the end
        self._rest = threads.condition(self._lock)  # cleaners and detachers wait: a life swept or let go
        self._lives: dict[str, Life] = {}
        self._dying: dict[str, list[Life]] = {}
        self._queue: OrderedDict[Job, None] = OrderedDict()
        self._held: OrderedDict[Job, None] = OrderedDict()
        self._writing: tuple[Job, float] | None = None
        self._bells: tuple[Callable[[], object], ...] = ()
        self._to_sweep: deque[Life] = deque()
        self._next_generation = 1
        self._next_sequence = 1
        self._staging = 0
        self._closing: str | None = None
        self._writer_may_end = False
        self._writer_gone = False
        self._sweeper_may_end = False
        self._sweeper_gone = False
        self._sweeper_waits_for_writer = False
        self._sweep_asked = False
        self._ledger = Ledger()
        self._room = Room(options)
        self.observer: Observer | None = None
        self.cancelled_in_hand: Counter[int] = Counter()
        self.published = Published()

    # -- save ---------------------------------------------------------------------------------------------------

    def reserve(self, key: SnapshotKey, nbytes: int, content: Content) -> Job:
        """``- -> STAGING``. Waits for room at most ``save_timeout_s``; whatever it raises, nothing stays behind."""
        try:
            with self._lock:
                try:
                    return self._reserve_locked(key, nbytes, content)
                except BaseException as error:
                    self._ledger.reject(nbytes, error)
                    raise
                finally:
                    self._publish_locked()
        finally:
            self._ring()

    def queue_up(self, key: SnapshotKey, nbytes: int, content: Content) -> Turn:
        """``reserve`` for those who must not block: then ``enter`` at each ring of a bell; in any case ``leave``."""
        with self._lock:
            try:
                return self._queue_up_locked(key, nbytes, content)
            except BaseException as error:
                self._ledger.reject(nbytes, error)
                raise
            finally:
                self._publish_locked()

    def enter(self, turn: Turn) -> Job | None:
        """``- -> STAGING`` if it is its turn and there is room. ``None``: not yet. Raises what ``reserve`` raises."""
        with self._lock:
            job = self._enter_locked(turn)
            self._publish_locked()
            return job

    def leave(self, turn: Turn, error: BaseException | None = None) -> None:
        """The end of a turn that ``queue_up`` began; with the error that ended it, if one did."""
        with self._lock:
            self._leave_locked(turn)
            if error is not None:
                self._ledger.reject(turn.nbytes, error)
            self._publish_locked()
        self._ring()

    def admit(self, job: Job, image: HostImage) -> bool:
        """``STAGING -> QUEUED``: readable from here. False: cancelled while it was being staged."""
        settled: _Settled = []
        with self._lock:
            life, token_count = job.life, job.key.token_count
            job.image = image
            life.staging.discard(job)
            self._staging -= 1
            admitted = (
                life.alive and life.newest.get(token_count, 0) < job.sequence and not self._writer_may_end
            )
            if admitted:
                self._drop_queued_locked(life, token_count, settled)
                life.newest[token_count] = job.sequence
                life.pending[token_count] = job
                self._queue[job] = None
                job.ticket._move(SaveState.QUEUED)
            else:
                self._cancel_locked(job, settled)
                self._forget_if_empty_locked(life)
            self._note_staged_locked()
            self._publish_locked()
        self._announce(settled)
        return admitted

    def on_its_way(self, job: Job) -> None:
        """Its copy is in devices' hands: ``find`` waits for it from here on, ``has`` and ``boundaries`` list it."""
        with self._lock:
            job.on_its_way = True

    def abandon(self, job: Job, error: BaseException) -> None:
        """``STAGING -> FAILED``: the copy to host memory did not work."""
        settled: _Settled = []
        with self._lock:
            job.life.staging.discard(job)
            self._staging -= 1
            if job.life.alive:
                self._fail_locked(job, error, settled)
            else:
                self._cancel_locked(job, settled)
            self._forget_if_empty_locked(job.life)
            self._note_staged_locked()
            self._publish_locked()
        self._announce(settled)

    # -- writer -------------------------------------------------------------------------------------------------

    def claim(self) -> Job | None:
        """``QUEUED -> WRITING``: waits for a job whose life nobody holds, and takes both at once. ``None``: the end."""
        with self._lock:
            while True:
                job = next((job for job in self._queue if not job.life.busy), None)
                if job is not None:
                    break
                if self._writer_may_end or (self._closing and not self._queue and not self._staging):
                    return None
                self._work.wait()
            del self._queue[job]
            job.life.busy = True
            job.life.on_disk = True
            job.ticket._move(SaveState.WRITING)
            now_s = self.monotonic_s()
            self._writing = (job, now_s)
            self._ledger.note("queue_wait", now_s - job.since_s)
            self._publish_locked()
            return job

    def is_current(self, job: Job) -> bool:
        """Invariant 4. Read without the lock: the writer looks between chunks and may learn of it one chunk late."""
        return job.life.alive

    def commit(self, job: Job, info: SnapshotInfo, disk_bytes: int, free_bytes: int | None = None) -> bool:
        """``WRITING -> COMMITTED`` if the job is current. False: the writer undoes its file, and says so.

        ``free_bytes``: on the disk, as just measured.
        """
        settled: _Settled = []
        with self._lock:
            life, token_count = job.life, job.key.token_count
            if not life.alive:
                return False
            if free_bytes is not None:
                self._ledger.free_bytes = free_bytes
            self._leave_pending_locked(job)
            self._unlist_locked(life, token_count)
            commit = Commit(info, disk_bytes)
            self._list_locked(life, commit)
            life.failed.pop(token_count, None)
            self._ledger.commit(job.nbytes)
            self._settle_locked(job, SaveState.COMMITTED, info, settled)
            if self.observer is not None:
                self.observer.committed(job, commit)
            self._let_go_locked(life)
            self._publish_locked()
        self._announce(settled)
        return True

    def finish_cancelled(self, job: Job) -> None:
        """``WRITING -> CANCELLED``: its file is undone. The counter goes down, the dead life to the sweeper."""
        settled: _Settled = []
        with self._lock:
            self._cancel_locked(job, settled)
            self._unmark_locked(job)
            self._let_go_locked(job.life)
            self._publish_locked()
        self._announce(settled)

    def fail(self, job: Job, error: BaseException) -> bool:
        """``WRITING -> FAILED``, or ``CANCELLED`` where its life has ended meanwhile (then False)."""
        settled: _Settled = []
        with self._lock:
            self._ledger.write_error = in_words(error)
            failed = job.life.alive
            self._end_in_writer_locked(job, error, settled)
            self._publish_locked()
        self._announce(settled)
        return failed

    def job_in_hand(self) -> Job | None:
        """The job that is WRITING."""
        with self._lock:
            return self._writing[0] if self._writing else None

    def writer_died(self, error: BaseException, *, for_good: bool) -> None:
        """The writer thread ended by a bug. Its job fails; ``for_good``: all that is accepted, and the store closes."""
        settled: _Settled = []
        with self._lock:
            self._ledger.write_error = in_words(error)
            doomed = [self._writing[0]] if self._writing else []
            if for_good:
                self._closing = self._closing or f"its writer thread died of {in_words(error)}"
                self._writer_may_end = True
                doomed += self._queue
                self._queue.clear()
            else:
                self._ledger.writer_restarts += 1
            for job in doomed:
                self._end_in_writer_locked(job, error, settled)
            self._space.notify_all()
            self._publish_locked()
        self._announce(settled)

    def sweeper_died(self, error: BaseException) -> None:
        """The sweeper thread ended by a bug, and may be started again: what it had in hand is tried again."""
        with self._lock:
            self._ledger.removal_error = in_words(error)
            unswept = [life for lives in self._dying.values() for life in lives if not life.busy]
            self._to_sweep.clear()
            self._to_sweep += [life for life in unswept if life.sweep_error is None]
            self._rest.notify_all()
            self._publish_locked()
        self._ring()

    def sweeper_ended(self) -> None:
        """The sweeper thread is about to be gone: nobody waits for it any more."""
        with self._lock:
            self._leave_unswept_locked()
            self._rest.notify_all()
        self._ring()

    def writer_ended(self) -> None:
        """The writer thread is about to be gone."""
        with self._lock:
            self._writer_gone = True
            self._dirt.notify_all()

    # -- read ---------------------------------------------------------------------------------------------------

    def find(self, key: SnapshotKey, wait_s: float = 0.0) -> Job | Commit:
        """Where the snapshot is: a pending job, whose memory is held until ``let_go_memory``, or a commit.

        Waits at most ``wait_s`` for a later save of the key that is on its way from a device, then ``TimeoutError``.
        """
        with self._lock:
            if not self._rest.wait_for(lambda: not self._is_coming_locked(key), wait_s):
                raise TimeoutError(
                    f"{key} is still on its way from its device after {wait_s} s; try again later"
                )
            found = self._find_locked(key)
            if isinstance(found, Job):
                found.holds += 1
            return found

    def commit_of(self, key: SnapshotKey) -> Commit | None:
        """Where the snapshot is on disk; ``None``: not yet. Raises what ``find`` raises. Never waits."""
        with self._lock:
            if self._is_coming_locked(key):
                return None
            found = self._find_locked(key)
            return None if isinstance(found, Job) else found

    def note(self, name: str, seconds: float) -> None:
        """One more observation for a histogram of ``_latency.Latencies``."""
        with self._lock:
            self._ledger.note(name, seconds)
            self._publish_locked()

    @contextmanager
    def watched(self, ring: Callable[[], object]) -> Iterator[None]:
        """Have ``ring`` called, within, after every change that may end a wait, on the thread that made it.

        For those who can not wait on a condition. It must be quick and must not raise.
        """
        with self._lock:
            self._bells = (*self._bells, ring)
        try:
            yield
        finally:
            with self._lock:
                self._bells = tuple(each for each in self._bells if each is not ring)

    def let_go_memory(self, job: Job) -> None:
        """The end of a read that ``find`` began."""
        with self._lock:
            job.holds -= 1
            last = job.holds == 0
            if last:
                del self._held[job]
        if last:
            _give_memory_back(job)

    def boundaries(self, request_id: str) -> tuple[int, ...]:
        with self._lock:
            life = self._lives.get(request_id)
            if life is None:
                return ()
            coming = (job.key.token_count for job in life.staging if self._is_coming_locked(job.key))
            return tuple(sorted({*life.pending, *life.committed, *coming}))

    def has(self, key: SnapshotKey) -> bool:
        with self._lock:
            life = self._lives.get(key.request_id)
            return life is not None and self._has_locked(life, key)

    def tickets(self, request_id: str | None = None) -> list[SaveTicket]:
        """Tickets of what is in flight now, oldest first.

        Of one request id: of its dead lives too, and of what is settled while a load still reads its memory.
        """
        with self._lock:
            if request_id is None:
                return [job.ticket for job in self._room.in_flight]
            return [job.ticket for job in self._held if job.life.request_id == request_id]

    # -- detach -------------------------------------------------------------------------------------------------

    def hold_commit(self, key: SnapshotKey, deadline_s: float) -> tuple[Life, Commit] | None:
        """Take `busy` of the life and its commit of ``key`` out of the index; ``None`` if there is none (any more)."""
        with self._lock:
            while True:
                life = self._lives.get(key.request_id)
                if life is None or key.token_count in life.pending or key.token_count not in life.committed:
                    return None
                if self._is_coming_locked(key):
                    return None
                if not life.busy:
                    break
                remaining_s = deadline_s - self.monotonic_s()
                if remaining_s <= 0:
                    raise TimeoutError(f"the writer is busy with {key.request_id!r}; {key} was not detached")
                self._rest.wait(remaining_s)
            life.busy = True
            commit = self._unlist_locked(life, key.token_count)
            assert commit is not None
            if not any(job.key == key for job in life.staging):
                # Nobody is to be compared with it; or lives that last fill up.
                life.newest.pop(key.token_count, None)
            self._publish_locked()
            return life, commit

    def end_hold(
        self, life: Life, put_back: Commit | None = None, left: Callable[[], object] | None = None
    ) -> None:
        """The detach is over; ``put_back`` if the file is still where it was. ``left`` only takes note."""
        with self._lock:
            if left is not None and life.alive:
                left()
            if put_back is not None and life.alive:
                self._list_locked(life, put_back)
            self._let_go_locked(life)
            self._forget_if_empty_locked(life)
            self._publish_locked()

    # -- cleanup ------------------------------------------------------------------------------------------------

    def begin_cleanup(self, request_ids: Iterable[str] | None = None) -> Cleanup:
        """Drain, forget, mark and count, in one critical section; all requests for ``None``.

        What it ends stays ended, whatever becomes of the waits after it. Lives that earlier cleanups ended and nobody
        has swept yet are in the answer too, to be waited for; what will not be swept is tried again.
        """
        cleanup = Cleanup()
        settled: _Settled = []
        named = None if request_ids is None else list(request_ids)
        with self._lock:
            for request_id in list({**self._lives, **self._dying}) if named is None else named:
                life = self._lives.get(request_id)
                if life is not None:
                    self._end_life_locked(life, cleanup, settled)
                cleanup.lives += self._dying.get(request_id, ())
            if self._sweeper_gone:
                self._leave_unswept_locked()
            else:
                self._retry_sweeps_locked(cleanup.lives)
            if self.observer is not None:
                cleanup.end = self.observer.ended(named)
            if self._closing:
                self._work.notify()  # with nothing left to write, the writer may end
            self._dirt.notify()
            self._space.notify_all()
            self._rest.notify_all()
            self._publish_locked()
        self._announce(settled)
        return cleanup

    def await_swept(self, lives: Sequence[Life | End], timeout_s: float) -> int:
        """Wait until the sweeper is done with these lives, or failed. How many the writer has in hand at the end."""
        left = list(reversed(lives))  # the sweeper goes from their first to their last: one look at each

        def over() -> bool:
            while left and left[-1].settled:
                left.pop()
            return not left

        with self._lock:
            self._rest.wait_for(over, timeout_s)
            return self._end_cleanup_locked(lives, waited=timeout_s > 0)

    def end_cleanup(self, lives: Sequence[Life | End], *, waited: bool) -> int:
        """The end of ``await_swept`` for a caller that waits in another way."""
        with self._lock:
            return self._end_cleanup_locked(lives, waited=waited)

    def end_noted(self) -> None:
        """The remote end of a cleanup is settled: somebody may wait for it."""
        with self._lock:
            self._rest.notify_all()
        self._ring()

    # -- fetch --------------------------------------------------------------------------------------------------

    def begin_fetch(self, request_id: str) -> Life:
        """Hold on to a life of the request while something of it is on its way from afar: a cleanup ends it."""
        with self._lock:
            life = self._life_locked(request_id)
            life.waiting += 1
            return life

    def join(self, life: Life, key: SnapshotKey, remote_life: str) -> bool:
        """It has come. False: the request was cleaned up meanwhile, and it is not to be had any more."""
        with self._lock:
            if life.alive and self.observer is not None:
                self.observer.joined(key, remote_life)
            return life.alive

    def keep(self, life: Life, key: SnapshotKey, nbytes: int, content: Content) -> Job | None:
        """``- -> STAGING`` of what was fetched, to be admitted at once; ``None``: no room, or no need. Never waits."""
        with self._lock:
            if not life.alive or self._room.waiting or not self._room.fits(nbytes):
                return None
            if self._has_locked(life, key) or any(job.key == key for job in life.staging):
                return None  # what is saved here is later, also while it is being copied
            try:
                self._refuse_locked(key, nbytes)
            except (DiskQuotaError, StoreClosedError):
                return None
            job = self._accept_locked(life, key, nbytes, content)
            job.fetched = True
            self._publish_locked()
            return job

    def end_fetch(self, life: Life) -> None:
        """The end of what ``begin_fetch`` began."""
        with self._lock:
            life.waiting -= 1
            self._forget_if_empty_locked(life)
            self._publish_locked()

    # -- sweeper ------------------------------------------------------------------------------------------------

    def claim_dirt(self) -> list[Life] | None:
        """Wait for dead lives that nobody holds; ``[]``: only asked to look at the trash; ``None``: the end."""
        with self._lock:
            while not (self._to_sweep or self._sweep_asked):
                if self._sweeper_may_end and (self._writer_gone or not self._sweeper_waits_for_writer):
                    return None
                self._dirt.wait()
            self._sweep_asked = False
            return self._take_dirt_locked()

    def take_dirt(self) -> list[Life]:
        """Dead lives that came meanwhile, without waiting."""
        with self._lock:
            return self._take_dirt_locked()

    def swept(self, lives: Sequence[tuple[Life, int]]) -> None:
        """Directories of dead lives are out of the way (invariant 9); so many bytes of each wait in the trash."""
        with self._lock:
            for life, trashed_bytes in lives:
                self._bury_locked(life)
                self._ledger.trash_bytes += trashed_bytes - life.doomed_bytes
            self._rest.notify_all()
            self._publish_locked()
        self._ring()

    def not_swept(self, life: Life, error: OSError) -> None:
        """The directory would not go; the next cleanup of the request, or shutdown, tries again."""
        with self._lock:
            life.sweep_error = error
            self._ledger.removal_error = in_words(error)
            self._rest.notify_all()
            self._publish_locked()
        self._ring()

    def not_freed(self, error: OSError) -> None:
        """Something in the trash would not go; it is tried again with the next removals."""
        with self._lock:
            self._ledger.removal_error = in_words(error)
            self._publish_locked()

    def removals_work(self) -> bool:
        """The sweeper has removed all that it was given. False: some life is still there, to be tried again."""
        with self._lock:
            if any(life.sweep_error for lives in self._dying.values() for life in lives):
                return False
            self._ledger.removal_error = None
            self._publish_locked()
            return True

    def freed(self, nbytes: int) -> None:
        """Bytes of trash are free again."""
        with self._lock:
            self._ledger.trash_bytes -= nbytes
            self._publish_locked()

    def ask_sweeper(self) -> None:
        """Have the sweeper look at the trash and the free space."""
        with self._lock:
            self._sweep_asked = True
            self._dirt.notify()

    def note_free_bytes(self, free_bytes: int) -> None:
        """Free space on the disk, as just measured."""
        with self._lock:
            self._ledger.free_bytes = free_bytes
            self._publish_locked()

    # -- sessions and shutdown ----------------------------------------------------------------------------------

    def adopt(self, info: SnapshotInfo, disk_bytes: int) -> None:
        """Put a snapshot of a dead session into the index; before the first save, generation by generation."""
        with self._lock:
            life = self._lives.setdefault(info.key.request_id, Life(info.key.request_id, info.generation))
            life.on_disk = True
            self._list_locked(life, Commit(info, disk_bytes))
            self._next_generation = max(self._next_generation, info.generation + 1)
            self._publish_locked()

    def close(self, why: str) -> None:
        """Refuse saves from here on; the writer ends when everything accepted is settled."""
        with self._lock:
            self._closing = self._closing or why
            self._work.notify_all()
            self._space.notify_all()
            self._publish_locked()
        self._ring()

    def await_staged(self, timeout_s: float) -> bool:
        """Wait until nothing is on its way to host memory; False if something still is after ``timeout_s``."""
        with self._lock:
            return self._rest.wait_for(lambda: self._staging == 0, timeout_s)

    def abandon_rest(self) -> tuple[SnapshotKey, ...]:
        """Shutdown's deadline: what is queued is cancelled, what is staged will be; the keys of all in flight."""
        settled: _Settled = []
        with self._lock:
            self._writer_may_end = True
            keys = tuple(job.key for job in self._room.in_flight)
            for job in list(self._queue):
                self._drop_queued_locked(job.life, job.key.token_count, settled)
                self._read_from_hand_locked(job)
                self._forget_if_empty_locked(job.life)
            self._work.notify_all()
            self._publish_locked()
        self._announce(settled)
        return keys

    def end_sweeper(self, *, after_writer: bool = False) -> None:
        """Let the sweeper end when nothing is left to remove; ``after_writer``: and the writer is gone."""
        with self._lock:
            self._sweeper_may_end = True
            self._sweeper_waits_for_writer = after_writer
            self._retry_sweeps_locked([life for lives in self._dying.values() for life in lives])
            self._dirt.notify_all()

    # -- under the lock -----------------------------------------------------------------------------------------

    def _life_locked(self, request_id: str) -> Life:
        life = self._lives.get(request_id)
        if life is None:
            life = self._lives[request_id] = Life(request_id, self._next_generation)
            self._next_generation += 1
        return life

    def _note_staged_locked(self) -> None:
        """A job has left STAGING: there may be one to claim, and somebody may wait for it or for the last of them."""
        self._work.notify()
        self._rest.notify_all()

    def _find_locked(self, key: SnapshotKey) -> Job | Commit:
        life = self._lives.get(key.request_id)
        if life is not None:
            found = life.pending.get(key.token_count) or life.committed.get(key.token_count)
            if found is not None:
                return found
            error = life.failed.get(key.token_count)
            if error is not None:
                raise SaveFailedError(f"the save of {key} failed: {error}; save it again", key=key) from error
        raise SnapshotNotFoundError(f"no snapshot of {key}: never saved here, or cleaned up", key=key)

    def _has_locked(self, life: Life, key: SnapshotKey) -> bool:
        token_count = key.token_count
        return token_count in life.pending or token_count in life.committed or self._is_coming_locked(key)

    def _is_coming_locked(self, key: SnapshotKey) -> bool:
        """A save of the key later than what is readable is on its way from a device."""
        life = self._lives.get(key.request_id)
        if life is None or not life.staging:
            return False
        newest = life.newest.get(key.token_count, 0)
        return any(job.on_its_way and job.key == key and job.sequence > newest for job in life.staging)

    def _forget_if_empty_locked(self, life: Life) -> None:
        """A life with nothing in it ends: its first save was rejected or abandoned, its last snapshot detached."""
        if life.alive and life.empty:
            self._end_life_locked(life, Cleanup(), [])
            self._dirt.notify()

    def _end_life_locked(self, life: Life, cleanup: Cleanup, settled: _Settled) -> None:
        life.alive = False
        del self._lives[life.request_id]
        for job in [job for job in life.pending.values() if job in self._queue]:
            del self._queue[job]
            self._cancel_locked(job, settled)
            cleanup.cancelled += 1
        if self._writing is not None and self._writing[0].life is life:
            self.cancelled_in_hand[life.generation] += 1
            cleanup.cancelled += 1
        cleanup.cancelled += len(life.staging)
        cleanup.removed += len(life.committed)
        cleanup.removed_bytes += life.committed_bytes
        life.doomed_bytes = life.disk_bytes
        self._ledger.unlist(len(life.committed), life.disk_bytes)
        self._ledger.trash_bytes += life.disk_bytes
        if life.on_disk:
            self._dying.setdefault(life.request_id, []).append(life)
            if not life.busy:
                self._to_sweep.append(life)

    def _end_cleanup_locked(self, lives: Sequence[Life | End], *, waited: bool) -> int:
        if waited and not all(life.settled for life in lives):
            self._ledger.cleanup_timeouts += 1
            self._publish_locked()
        return int(self._writing is not None and self._writing[0].life in lives)

    def _leave_unswept_locked(self) -> None:
        """Nobody removes files any more: whoever waits for it is told so, now and from here on."""
        self._sweeper_gone = True
        for lives in self._dying.values():
            for life in lives:
                life.sweep_error = OSError(errno.EIO, "the sweeper thread is gone")

    def _retry_sweeps_locked(self, lives: list[Life]) -> None:
        for life in lives:
            if life.sweep_error is not None:
                life.sweep_error = None
                self._to_sweep.append(life)

    def _bury_locked(self, life: Life) -> None:
        life.swept = True
        dying = self._dying[life.request_id]
        dying.remove(life)
        if not dying:
            del self._dying[life.request_id]

    def _let_go_locked(self, life: Life) -> None:
        life.busy = False
        if not life.alive:
            self._to_sweep.append(life)
            self._dirt.notify()
        self._work.notify()
        self._rest.notify_all()

    def _take_dirt_locked(self) -> list[Life]:
        lives = list(self._to_sweep)
        self._to_sweep.clear()
        return lives

    def _reserve_locked(self, key: SnapshotKey, nbytes: int, content: Content) -> Job:
        turn = self._queue_up_locked(key, nbytes, content)
        try:
            while (job := self._enter_locked(turn)) is None:
                self._publish_locked()
                self._space.wait(turn.deadline_s - self.monotonic_s())
            return job
        finally:
            self._leave_locked(turn)

    def _queue_up_locked(self, key: SnapshotKey, nbytes: int, content: Content) -> Turn:
        self._refuse_locked(key, nbytes)
        life = self._life_locked(key.request_id)
        try:
            turn = self._room.queue_up(life, key, nbytes, content, self.monotonic_s())
        except BaseException:  # no memory
            self._forget_if_empty_locked(life)
            raise
        life.waiting += 1
        return turn

    def _enter_locked(self, turn: Turn) -> Job | None:
        self._refuse_locked(turn.key, turn.nbytes)
        if not turn.life.alive:
            raise SaveCancelledError(
                f"{turn.key} was cleaned up while its save waited for room", key=turn.key
            )
        if not self._room.is_there_for(turn, self.monotonic_s()):
            return None
        return self._accept_locked(turn.life, turn.key, turn.nbytes, turn.content)

    def _leave_locked(self, turn: Turn) -> None:
        self._room.waiting.remove(turn)
        if self._room.waiting:
            self._space.notify_all()
        turn.life.waiting -= 1
        self._forget_if_empty_locked(turn.life)

    def _accept_locked(self, life: Life, key: SnapshotKey, nbytes: int, content: Content) -> Job:
        ticket = SaveTicket(key, life.generation, nbytes, self._threads, publishes=self.observer is not None)
        job = Job(life, ticket, self._next_sequence, self.monotonic_s(), content=content)
        self._next_sequence += 1
        life.staging.add(job)
        self._held[job] = None
        self._staging += 1
        self._room.charge(job)
        self._ledger.accept(nbytes)
        return job

    def _refuse_locked(self, key: SnapshotKey, nbytes: int) -> None:
        if self._closing:
            raise StoreClosedError(f"{key} was not saved: {self._closing}; open a new store", key=key)
        used = self._ledger.session_bytes + self._ledger.trash_bytes
        try:
            self._room.check_quota(key, nbytes, used=used, free=self._ledger.free_bytes)
        except DiskQuotaError:
            self._sweep_asked = True
            self._dirt.notify()
            raise

    def _drop_queued_locked(self, life: Life, token_count: int, settled: _Settled) -> None:
        """Cancel the job of this key if it is QUEUED; one that is WRITING goes on and is replaced after its commit."""
        job = life.pending.get(token_count)
        if job is not None and job in self._queue:
            del self._queue[job]
            self._cancel_locked(job, settled)

    def _read_from_hand_locked(self, dropped: Job) -> None:
        """With its successor dropped, the job of this key that is WRITING is the newest one again (invariant 7)."""
        job = self._writing[0] if self._writing is not None else None
        if job is not None and job.life is dropped.life and job.key == dropped.key:
            job.life.pending[job.key.token_count] = job
            job.life.newest[job.key.token_count] = job.sequence

    def _leave_pending_locked(self, job: Job) -> None:
        if job.life.pending.get(job.key.token_count) is job:
            del job.life.pending[job.key.token_count]

    def _list_locked(self, life: Life, commit: Commit) -> None:
        life.committed[commit.info.key.token_count] = commit
        life.committed_bytes += commit.info.nbytes
        life.disk_bytes += commit.disk_bytes
        self._ledger.list(commit.disk_bytes)

    def _unlist_locked(self, life: Life, token_count: int) -> Commit | None:
        commit = life.committed.pop(token_count, None)
        if commit is not None:
            life.committed_bytes -= commit.info.nbytes
            life.disk_bytes -= commit.disk_bytes
            self._ledger.unlist(1, commit.disk_bytes)
        return commit

    def _cancel_locked(self, job: Job, settled: _Settled) -> None:
        self._leave_pending_locked(job)
        self._ledger.cancel(job.nbytes)
        self._settle_locked(job, SaveState.CANCELLED, self._why_cancelled_locked(job), settled)

    def _fail_locked(self, job: Job, error: BaseException, settled: _Settled) -> None:
        if job.life.newest.get(job.key.token_count, 0) <= job.sequence and not job.fetched:
            job.life.failed[job.key.token_count] = error  # what was fetched is where it was
        self._ledger.fail(job.nbytes, error)
        outcome = SaveFailedError(f"the save of {job.key} failed: {error}; save it again", key=job.key)
        outcome.__cause__ = error
        self._settle_locked(job, SaveState.FAILED, outcome, settled)

    def _why_cancelled_locked(self, job: Job) -> SaveCancelledError:
        if not job.life.alive:
            why = "its request was cleaned up"
        elif self._writer_may_end:
            why = "the store was shut down before its turn came"
        else:
            why = "a later save of the same key replaced it"
        return SaveCancelledError(f"the save of {job.key} was cancelled: {why}", key=job.key)

    def _settle_locked(self, job: Job, state: SaveState, outcome: _Outcome, settled: _Settled) -> None:
        job.ticket._move(state)
        if self._writing is not None and self._writing[0] is job:
            self._ledger.note("write", self.monotonic_s() - self._writing[1])
            self._writing = None
        self._room.give_back(job)
        self._space.notify_all()
        settled.append((job, outcome))

    def _end_in_writer_locked(self, job: Job, error: BaseException, settled: _Settled) -> None:
        """A job that the writer has in hand, or would have had next, ends without a file."""
        in_hand = self._writing is not None and self._writing[0] is job
        if job.life.alive:
            self._leave_pending_locked(job)
            self._fail_locked(job, error, settled)
        else:
            self._cancel_locked(job, settled)
            self._unmark_locked(job)
        if in_hand:
            self._let_go_locked(job.life)
        self._forget_if_empty_locked(job.life)

    def _unmark_locked(self, job: Job) -> None:
        generation = job.life.generation
        self.cancelled_in_hand[generation] -= 1
        if self.cancelled_in_hand[generation] <= 0:  # pragma: no branch - a life is cancelled once
            del self.cancelled_in_hand[generation]

    def _publish_locked(self) -> None:
        self.published = self._ledger.publish(
            self._room,
            cancelled_in_hand=self.cancelled_in_hand.total(),
            live_requests=len(self._lives),
            writing_since_s=self._writing[1] if self._writing else None,
            closing=self._closing,
        )

    def _ring(self) -> None:
        """After the lock."""
        for ring in self._bells:
            ring()

    def _announce(self, settled: _Settled) -> None:
        """After the lock: give memory back and resolve tickets, in that order, so that a result finds it released.

        All of them, whatever a callback of one ticket raises: that of the first is raised when all are told.
        """
        raised: BaseException | None = None
        for job, _ in settled:
            try:
                self.let_go_memory(job)
            except BaseException as error:  # noqa: BLE001 - it is raised below
                raised = raised or error
        for job, outcome in settled:
            try:
                job.ticket._settle(outcome)
            except BaseException as error:  # noqa: BLE001 - it is raised below
                raised = raised or error
        self._ring()
        try:
            if raised is not None:
                raise raised
        finally:
            del raised  # with its frames it would keep the jobs


def _give_memory_back(job: Job) -> None:
    image, job.image = job.image, None
    if image is not None:
        image.release()
    if not job.on_its_way:
        job.ticket._release()
