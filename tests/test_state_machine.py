"""A random walk over ``_state``, on one thread and without a disk, beside a model made of plain dicts and lists.

Each rule is one step of a caller, the device thread, the writer, the sweeper, a reader, a cleaner or a detacher. After
every step the ten invariants of ``_state``'s header are checked (cited by number), through public methods only. At the
end of the walk everything is finished: then the files are exactly the committed snapshots, and after one cleanup none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snapstore import (
    DiskQuotaError,
    SaveCancelledError,
    SaveFailedError,
    SaveState,
    SnapshotInfo,
    SnapshotKey,
    SnapshotNotFoundError,
    SnapstoreError,
    StoreClosedError,
    StoreFullError,
    StoreOptions,
)
from snapstore._format import Layout, TensorSpec
from snapstore._memory import HostImage
from snapstore._records import Cleanup, Commit, Content, Job, Life, Turn
from snapstore._state import State
from snapstore._threads import Lock, Threads

REQUESTS = ("a", "b", "c")
TOKENS = (1, 2)
CONTENT = Content("numpy", "null")
HEADER_BYTES = 7
MAX_JOBS, MAX_BYTES = 5, 100
PATIENCE_S = 2.0

request_ids = st.sampled_from(REQUESTS)
token_counts = st.sampled_from(TOKENS)
sizes = st.sampled_from((1, 5, 10, 20, 40, 0, 150))
picks = st.integers(0, 11)
seldom = st.sampled_from((False,) * 7 + (True,))
mostly = st.sampled_from((True,) * 3 + (False,))

QUEUED, WRITING, STAGING = SaveState.QUEUED, SaveState.WRITING, SaveState.STAGING
COMMITTED, CANCELLED, FAILED = SaveState.COMMITTED, SaveState.CANCELLED, SaveState.FAILED


class WouldWait(Exception):
    """A call waits without a time-out."""


class Clock:
    """Time passes only while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0

        self.threads = Threads(monotonic_s=lambda: self.now_s, condition=self.condition)

    def condition(self, lock: Lock) -> threading.Condition:
        """On one thread nobody wakes anybody: a wait is over at once, as if its time had passed."""
        clock = self

        class ImpatientCondition(threading.Condition):
            def wait(self, timeout: float | None = None) -> bool:
                if timeout is None:
                    raise WouldWait
                clock.now_s += timeout
                return False

        return ImpatientCondition(lock)


# -- the model --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Stored:
    """A committed snapshot, as the index should know it. ``content`` tells one file's bytes from another's."""

    info: SnapshotInfo
    disk_bytes: int
    content: int


@dataclass(eq=False)
class Era:
    """One life, as it should be."""

    request_id: str
    generation: int
    alive: bool = True
    holder: Literal["writer", "detacher"] | None = None
    on_disk: bool = False
    waiting: int = 0
    sweep: Literal["unneeded", "held", "dirty", "taken", "failed", "swept"] = "unneeded"
    doomed_bytes: int = 0
    index: dict[int, Stored] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)
    failed: dict[int, OSError] = field(default_factory=dict)


@dataclass(eq=False)
class Save:
    """One accepted save, as it should be; ``released`` and ``told`` count what really happened."""

    job: Job
    era: Era
    order: int
    phase: SaveState = STAGING
    outcome: SnapshotInfo | OSError | None = None
    readers: int = 0
    has_image: bool = False
    released: int = 0
    told: int = 0

    @property
    def key(self) -> SnapshotKey:
        return self.job.key

    @property
    def nbytes(self) -> int:
        return self.job.nbytes


@dataclass(eq=False)
class Queued:
    """A save that waits for room without blocking, as it should be."""

    turn: Turn
    era: Era


PathKey = tuple[str, int, int]  # request id, generation, token count


class StateMachine(RuleBasedStateMachine):
    """The open store."""

    def __init__(self) -> None:
        super().__init__()
        self.saves: list[Save] = []
        self.eras: list[Era] = []
        self.line: list[Queued] = []
        self.queue: list[Save] = []
        self.hand: Save | None = None
        self.hand_at: Literal["writing", "renamed", "undoing"] = "writing"
        self.detaching: list[tuple[Era, Life, Commit, Stored]] = []
        self.sweeping: list[Life] = []
        self.files: dict[PathKey, tuple[int, int]] = {}  # content, disk bytes
        self.last_content = 0
        self.trash: list[int] = []
        self.rejected = [0, 0]
        self.free_bytes: int | None = None
        self.restarts = 0
        self.closed = False
        self.abandoned = False
        self.asked = False
        self.looks = 0
        self.write_error: str | None = None
        self.removal_error: str | None = None

    @initialize(
        session_limit=st.sampled_from((None, None, None, 300)),
        free_limit=st.sampled_from((None, None, None, 50)),
        adopted=st.sets(st.tuples(st.sampled_from(("a", "b")), token_counts), max_size=2),
        saved=st.lists(st.tuples(request_ids, token_counts, st.integers(0, 4)), max_size=6),
    )
    def open(
        self,
        session_limit: int | None,
        free_limit: int | None,
        adopted: set[tuple[str, int]],
        saved: list[tuple[str, int, int]],
    ) -> None:
        self.options = StoreOptions(
            save_timeout_s=PATIENCE_S,
            max_pending_jobs=MAX_JOBS,
            max_pending_bytes=MAX_BYTES,
            max_session_bytes=session_limit,
            min_free_bytes=free_limit,
        )
        self.clock = Clock()
        self.state = State(self.options, self.clock.threads)
        for request_id, token_count in sorted(adopted):
            self.adopt(request_id, token_count, {"a": 7, "b": 4}[request_id])
        for request_id, token_count, then in saved:
            self.save(request_id, token_count, 10, then)

    def adopt(self, request_id: str, token_count: int, generation: int) -> None:
        era = self.living(request_id)
        if era is None:
            era = Era(request_id, generation, on_disk=True)
            self.eras.append(era)
        key = SnapshotKey(request_id, token_count)
        stored = self.store_file((request_id, generation, token_count), key, 10)
        era.index[token_count] = stored
        self.state.adopt(stored.info, stored.disk_bytes)

    # -- what the model knows ---------------------------------------------------------------------------------------

    def living(self, request_id: str) -> Era | None:
        return next((era for era in self.eras if era.alive and era.request_id == request_id), None)

    def of(self, era: Era, *phases: SaveState) -> list[Save]:
        return [save for save in self.saves if save.era is era and save.phase in phases]

    def in_flight(self) -> list[Save]:
        return [save for save in self.saves if not save.phase.settled]

    def is_coming(self, key: SnapshotKey) -> bool:
        """From a device, and later than whatever is readable."""
        era = self.living(key.request_id)
        return era is not None and any(
            save.key == key and save.job.on_its_way and save.order > era.newest.get(key.token_count, 0)
            for save in self.of(era, STAGING)
        )

    def readable(self, key: SnapshotKey) -> Save | Stored | None:
        """(7) The latest accepted of the admitted saves in memory, else the commit, of the living era only."""
        era = self.living(key.request_id)
        if era is None:
            return None
        waiting = [save for save in self.of(era, QUEUED, WRITING) if save.key == key]
        if waiting:
            return max(waiting, key=lambda save: save.order)
        return era.index.get(key.token_count)

    def used_bytes(self) -> int:
        live = sum(stored.disk_bytes for era in self.eras for stored in era.index.values())
        return live + self.trash_bytes() + sum(save.nbytes for save in self.in_flight())

    def trash_bytes(self) -> int:
        """What is forgotten and still on disk: in the trash, or on its way there."""
        return sum(self.trash) + sum(era.doomed_bytes for era in self.eras if era.sweep != "swept")

    def dying(self, request_ids: Iterable[str]) -> list[Era]:
        return [
            era
            for request_id in request_ids
            for era in self.eras
            if era.request_id == request_id and era.sweep not in ("unneeded", "swept")
        ]

    # -- how the model moves ----------------------------------------------------------------------------------------

    def store_file(self, path: PathKey, key: SnapshotKey, nbytes: int) -> Stored:
        self.last_content += 1
        self.files[path] = (self.last_content, nbytes + HEADER_BYTES)
        name = Path("session") / f"{path[0]}.g{path[1]}" / f"{path[2]}.safetensors"
        info = SnapshotInfo(key, path[1], name, nbytes)
        return Stored(info, nbytes + HEADER_BYTES, self.last_content)

    def settle(self, save: Save, phase: SaveState, outcome: SnapshotInfo | OSError | None = None) -> None:
        save.phase, save.outcome = phase, outcome
        if save in self.queue:
            self.queue.remove(save)
        if phase is FAILED and save.era.newest.get(save.key.token_count, 0) <= save.order:
            assert isinstance(outcome, OSError)
            save.era.failed[save.key.token_count] = outcome

    def let_go(self, era: Era) -> None:
        era.holder = None
        if not era.alive:
            era.sweep = "dirty"

    def settle_in_hand(self, phase: SaveState, outcome: SnapshotInfo | OSError | None = None) -> None:
        assert self.hand is not None
        save, self.hand = self.hand, None
        self.settle(save, phase if save.era.alive else CANCELLED, outcome)
        self.let_go(save.era)

    def end(self, era: Era) -> None:
        era.alive = False
        for save in self.of(era, QUEUED):
            self.settle(save, CANCELLED)
        era.doomed_bytes = sum(stored.disk_bytes for stored in era.index.values())
        era.index.clear()
        era.failed.clear()
        if era.on_disk:
            era.sweep = "held" if era.holder else "dirty"

    def end_empty_eras(self) -> None:
        for era in self.eras:
            busy = era.holder or era.waiting or self.of(era, STAGING, QUEUED, WRITING)
            if era.alive and not (busy or era.index or era.failed):
                self.end(era)

    # -- callers ----------------------------------------------------------------------------------------------------

    @rule(request_id=request_ids, token_count=token_counts, nbytes=sizes, then=st.integers(0, 4))
    def save(self, request_id: str, token_count: int, nbytes: int, then: int) -> None:
        """And the writer takes a few steps."""
        self.save_at_once(SnapshotKey(request_id, token_count), nbytes)
        self.work(then)

    @rule(request_id=request_ids, token_count=token_counts, nbytes=sizes)
    def stage(self, request_id: str, token_count: int, nbytes: int) -> None:
        """To be admitted later, in any order."""
        self.reserve(SnapshotKey(request_id, token_count), nbytes)

    @precondition(lambda self: any(save.era.alive for save in self.saves))
    @rule(pick=picks, nbytes=sizes)
    def save_again(self, pick: int, nbytes: int) -> None:
        known = [save.key for save in self.saves if save.era.alive]
        self.save_at_once(known[pick % len(known)], nbytes)

    def save_at_once(self, key: SnapshotKey, nbytes: int) -> None:
        save = self.reserve(key, nbytes)
        if save is not None:
            self.everything_agrees()
            self.admit_one(save)
            self.everything_agrees()

    def reserve(self, key: SnapshotKey, nbytes: int) -> Save | None:
        """Waits for room that does not come; those who wait without blocking have waited as long then."""
        refusal = self.refusal(nbytes)
        if refusal is None and (self.line or not self.fits(nbytes)):
            refusal = StoreFullError
        if refusal is not None:
            self.expect_refusal(refusal, lambda: self.state.reserve(key, nbytes, CONTENT), key, nbytes)
            return None
        job = self.state.reserve(key, nbytes, CONTENT)
        return self.accepted(job, self.era_of(job.life))

    def expect_refusal(
        self, refusal: type[SnapstoreError], call: Callable[[], object], key: SnapshotKey, nbytes: int
    ) -> SnapstoreError:
        self.asked = self.asked or refusal is DiskQuotaError
        with pytest.raises(refusal) as caught:
            call()
        assert caught.value.key == key
        self.rejected = [self.rejected[0] + 1, self.rejected[1] + nbytes]
        return caught.value

    def era_of(self, life: Life) -> Era:
        era = self.living(life.request_id)
        if era is None:
            assert all(life.generation > old.generation for old in self.eras), "(3)"
            era = Era(life.request_id, life.generation)
            self.eras.append(era)
        return era

    def accepted(self, job: Job, era: Era) -> Save:
        save = Save(job, era, order=len(self.saves) + 1)
        self.saves.append(save)
        job.ticket.add_done_callback(lambda _: self.tell(save))
        return save

    @rule(request_id=request_ids, token_count=token_counts, nbytes=sizes)
    def queue_up(self, request_id: str, token_count: int, nbytes: int) -> None:
        key = SnapshotKey(request_id, token_count)
        refusal = self.refusal(nbytes)
        if refusal is not None:
            self.expect_refusal(refusal, lambda: self.state.queue_up(key, nbytes, CONTENT), key, nbytes)
            return
        turn = self.state.queue_up(key, nbytes, CONTENT)
        era = self.era_of(turn.life)
        era.waiting += 1
        self.line.append(Queued(turn, era))

    @precondition(lambda self: self.line)
    @rule(pick=picks)
    def enter(self, pick: int) -> None:
        """Whoever tries, the first in the line is the first to get in."""
        self.enter_one(self.line[pick % len(self.line)])

    def enter_one(self, queued: Queued) -> None:
        turn = queued.turn
        refusal = self.refusal(turn.nbytes)
        first_and_fits = self.line[0] is queued and self.fits(turn.nbytes)
        if refusal is None and not queued.era.alive:
            refusal = SaveCancelledError
        elif refusal is None and not first_and_fits and self.clock.now_s >= turn.deadline_s:
            refusal = StoreFullError
        if refusal is not None:
            error = self.expect_refusal(refusal, lambda: self.state.enter(turn), turn.key, turn.nbytes)
            self.leave_one(queued, error)
            return
        job = self.state.enter(turn)
        assert (job is not None) is first_and_fits, "(6)"
        if job is not None:
            assert job.life is turn.life
            self.accepted(job, queued.era)
            self.leave_one(queued, None)

    @precondition(lambda self: self.line)
    @rule(pick=picks)
    def give_up(self, pick: int) -> None:
        self.leave_one(self.line[pick % len(self.line)], None)

    def leave_one(self, queued: Queued, error: BaseException | None) -> None:
        self.state.leave(queued.turn, error)
        self.line.remove(queued)
        queued.era.waiting -= 1

    def tell(self, save: Save) -> None:
        save.told += 1

    def refusal(self, nbytes: int) -> type[SnapstoreError] | None:
        pending = sum(save.nbytes for save in self.in_flight())
        limit, least = self.options.max_session_bytes, self.options.min_free_bytes
        if self.closed:
            return StoreClosedError
        if limit is not None and self.used_bytes() + nbytes > limit:
            return DiskQuotaError
        free_bytes = None if self.free_bytes is None else self.free_bytes - pending
        if least is not None and free_bytes is not None and free_bytes - nbytes < least:
            return DiskQuotaError
        return None

    def fits(self, nbytes: int) -> bool:
        pending = [save.nbytes for save in self.in_flight()]
        return not pending or (len(pending) < MAX_JOBS and sum(pending) + nbytes <= MAX_BYTES)

    @precondition(lambda self: any(save.phase is STAGING for save in self.saves))
    @rule(pick=picks)
    def admit(self, pick: int) -> None:
        """Whichever of the staged ones comes first, also long after its life has ended."""
        self.admit_one(self.staged(pick))

    def admit_one(self, save: Save) -> None:
        era, token_count = save.era, save.key.token_count
        overtaken = era.newest.get(token_count, 0) > save.order
        expected = era.alive and not overtaken and not self.abandoned
        layout = Layout.of([TensorSpec("x", "U8", (save.nbytes,))])
        save.has_image = True
        image = HostImage(
            layout, lambda: [memoryview(bytes(save.nbytes))], on_release=lambda: self.release(save)
        )
        assert self.state.admit(save.job, image) is expected
        if not expected:
            self.settle(save, CANCELLED)
            return
        for other in list(self.queue):
            if other.era is era and other.key == save.key:
                self.settle(other, CANCELLED)
        era.newest[token_count] = save.order
        save.phase = QUEUED
        self.queue.append(save)

    @precondition(lambda self: any(save.phase is STAGING for save in self.saves))
    @rule(pick=picks)
    def send_from_device(self, pick: int) -> None:
        self.state.on_its_way(self.staged(pick).job)

    def release(self, save: Save) -> None:
        save.released += 1

    def staged(self, pick: int) -> Save:
        staged = [save for save in self.saves if save.phase is STAGING]
        return staged[pick % len(staged)]

    @precondition(lambda self: any(save.phase is STAGING for save in self.saves))
    @rule(pick=picks)
    def abandon(self, pick: int) -> None:
        save = self.staged(pick)
        error = OSError(f"copy {save.order}")
        self.state.abandon(save.job, error)
        self.settle(save, FAILED if save.era.alive else CANCELLED, error)

    # -- the writer -------------------------------------------------------------------------------------------------

    @rule(steps=st.integers(1, 4))
    def write(self, steps: int) -> None:
        """So many steps of its way: claim, rename, commit, and undo what was refused."""
        self.work(steps)

    def work(self, steps: int) -> None:
        for _ in range(steps):
            self.work_once()
            self.everything_agrees()

    @precondition(lambda self: self.hand is not None and self.hand_at == "writing")
    @rule()
    def fail(self) -> None:
        assert self.hand is not None
        error = OSError(f"disk {self.hand.order}")
        assert self.state.fail(self.hand.job, error) is self.hand.era.alive
        self.write_error = f"OSError: {error}"
        self.settle_in_hand(FAILED, error)

    @precondition(lambda self: self.hand is not None and self.hand_at == "writing")
    @rule(really=seldom)
    def writer_dies(self, really: bool) -> None:
        if really:
            error = OSError("bug")
            self.state.writer_died(error, for_good=False)
            self.restarts += 1
            self.write_error = "OSError: bug"
            self.settle_in_hand(FAILED, error)

    def work_once(self) -> None:
        if self.hand is None:
            self.claim()
        elif self.hand_at == "writing":
            self.rename(self.hand)
        elif self.hand_at == "renamed":
            self.commit(self.hand)
        else:
            self.undo(self.hand)

    def claim(self) -> None:
        free = [save for save in self.queue if save.era.holder is None]
        if free:
            save = free[0]
            assert self.state.claim() is save.job
            self.queue.remove(save)
            save.phase, save.era.holder, save.era.on_disk = WRITING, "writer", True
            self.hand, self.hand_at = save, "writing"
        elif self.writer_is_over():
            assert self.state.claim() is None
        else:
            with pytest.raises(WouldWait):
                self.state.claim()

    def writer_is_over(self) -> bool:
        nothing_to_come = not self.queue and not any(save.phase is STAGING for save in self.saves)
        return self.abandoned or (self.closed and nothing_to_come)

    def rename(self, save: Save) -> None:
        """The writer looks before it; every other time the save is cancelled right after that look."""
        self.looks += 1
        if not self.state.is_current(save.job) and self.looks % 2:
            self.state.finish_cancelled(save.job)
            self.settle_in_hand(CANCELLED)
            return
        path = (save.key.request_id, save.era.generation, save.key.token_count)
        self.made = self.store_file(path, save.key, save.nbytes)
        self.hand_at = "renamed"

    def commit(self, save: Save) -> None:
        made = self.made
        assert self.state.commit(save.job, made.info, made.disk_bytes) is save.era.alive, "(4)"
        if not save.era.alive:
            self.hand_at = "undoing"
            return
        save.era.index[save.key.token_count] = made
        save.era.failed.pop(save.key.token_count, None)
        self.write_error = None
        self.settle_in_hand(COMMITTED, made.info)

    def undo(self, save: Save) -> None:
        del self.files[save.key.request_id, save.era.generation, save.key.token_count]
        self.state.finish_cancelled(save.job)
        self.settle_in_hand(CANCELLED)

    # -- readers ----------------------------------------------------------------------------------------------------

    @rule(request_id=request_ids, token_count=token_counts)
    def begin_read(self, request_id: str, token_count: int) -> None:
        key = SnapshotKey(request_id, token_count)
        expected = self.readable(key)
        if isinstance(expected, Save) and not self.is_coming(key):
            assert self.state.find(expected.key) is expected.job
            expected.readers += 1

    @precondition(lambda self: any(save.readers for save in self.saves))
    @rule(pick=picks)
    def end_read(self, pick: int) -> None:
        read = [save for save in self.saves if save.readers]
        save = read[pick % len(read)]
        save.readers -= 1
        self.state.let_go_memory(save.job)

    # -- detachers --------------------------------------------------------------------------------------------------

    @rule(request_id=request_ids, token_count=token_counts)
    def begin_detach(self, request_id: str, token_count: int) -> None:
        key = SnapshotKey(request_id, token_count)
        stored, era = self.readable(key), self.living(request_id)
        if era is None or not isinstance(stored, Stored) or self.is_coming(key):
            assert self.state.hold_commit(key, 0.0) is None
        elif era.holder is not None:
            with pytest.raises(TimeoutError):
                self.state.hold_commit(key, 0.0)
        else:
            held = self.state.hold_commit(key, 0.0)
            assert held is not None and held[1].info == stored.info
            era.holder = "detacher"
            del era.index[token_count]
            self.detaching.append((era, *held, stored))

    @precondition(lambda self: self.detaching)
    @rule(pick=picks, moved=st.booleans())
    def end_detach(self, pick: int, moved: bool) -> None:
        era, life, commit, stored = self.detaching.pop(pick % len(self.detaching))
        key = stored.info.key
        if moved:
            assert self.files.pop((key.request_id, era.generation, key.token_count))[0] == stored.content
        elif era.alive:
            era.index[key.token_count] = stored
        self.state.end_hold(life, put_back=None if moved else commit)
        self.let_go(era)

    @precondition(lambda self: any(era.alive for era, *_ in self.detaching))
    @rule(pick=picks, token_count=token_counts)
    def save_beside_detach(self, pick: int, token_count: int) -> None:
        """Into the very life that a detach holds: the writer passes it over."""
        held = [era for era, *_ in self.detaching if era.alive]
        self.save_at_once(SnapshotKey(held[pick % len(held)].request_id, token_count), 1)
        self.work(1)

    # -- cleaners ---------------------------------------------------------------------------------------------------

    @rule(request_id=request_ids)
    def cleanup_request(self, request_id: str) -> None:
        self.clean((request_id,), self.state.begin_cleanup((request_id,)))

    @rule(really=seldom)
    def cleanup_all(self, really: bool) -> None:
        if really:
            self.clean(REQUESTS, self.state.begin_cleanup())

    @precondition(lambda self: self.hand is not None)
    @rule(then=st.integers(0, 2))
    def cleanup_in_hand(self, then: int) -> None:
        """Of the very request that the writer is busy with."""
        assert self.hand is not None
        self.cleanup_request(self.hand.key.request_id)
        self.work(then)

    def clean(self, request_ids: tuple[str, ...], cleanup: Cleanup) -> None:
        ended = [era for era in self.eras if era.alive and era.request_id in request_ids]
        stored = [each for era in ended for each in era.index.values()]
        assert cleanup.cancelled == sum(len(self.of(era, STAGING, QUEUED, WRITING)) for era in ended)
        assert cleanup.removed == len(stored)
        assert cleanup.removed_bytes == sum(each.info.nbytes for each in stored)
        for era in ended:
            self.end(era)
        waited_for = self.dying(request_ids)
        for era in waited_for:
            era.sweep = "dirty" if era.sweep == "failed" else era.sweep
        assert sorted(life.generation for life in cleanup.lives) == sorted(
            era.generation for era in waited_for
        )
        in_hand = sum(era.holder == "writer" for era in waited_for)
        assert self.state.await_swept(cleanup.lives, 0) == in_hand
        assert [life for life in cleanup.lives if life.swept] == []

    # -- the sweeper ------------------------------------------------------------------------------------------------

    @rule(steps=st.integers(1, 3), goes=mostly)
    def sweep(self, steps: int, goes: bool) -> None:
        for _ in range(steps):
            self.sweep_one(goes) if self.sweeping else self.take_dirt()
            self.everything_agrees()

    def take_dirt(self) -> None:
        dirty = [era for era in self.eras if era.sweep == "dirty"]
        if not dirty and not self.asked:
            with pytest.raises(WouldWait):
                self.state.claim_dirt()
            assert self.state.take_dirt() == []
            return
        lives = self.state.claim_dirt()
        self.asked = False
        assert lives is not None, "(9)"
        assert sorted(life.generation for life in lives) == sorted(era.generation for era in dirty), "(9)"
        for era in dirty:
            era.sweep = "taken"
        self.sweeping = lives

    def sweep_one(self, goes: bool) -> None:
        life = self.sweeping.pop(0)
        era = next(era for era in self.eras if era.generation == life.generation)
        assert not life.busy and era.holder is None, "(2) nobody makes or moves a file of it now"
        if not goes:
            self.state.not_swept(life, OSError("busy"))
            era.sweep = "failed"
            self.removal_error = "OSError: busy"
            return
        for path in [path for path in self.files if path[:2] == (life.request_id, life.generation)]:
            del self.files[path]
        self.trash.append(life.doomed_bytes)
        self.state.swept([(life, life.doomed_bytes)])
        era.sweep = "swept"

    @precondition(lambda self: self.sweeping or self.trash)
    @rule(really=seldom)
    def sweeper_dies(self, really: bool) -> None:
        """And is started again."""
        if not really:
            return
        self.state.sweeper_died(OSError("bug"))
        self.removal_error = "OSError: bug"
        self.sweeping = []
        for era in self.eras:
            if era.sweep == "taken":
                era.sweep = "dirty"

    @precondition(lambda self: self.trash)
    @rule()
    def trash_stays(self) -> None:
        self.state.not_freed(OSError("not empty"))
        self.removal_error = "OSError: not empty"

    @rule(free_bytes=st.sampled_from((10_000, 150, 60)))
    def empty_trash(self, free_bytes: int) -> None:
        while self.trash:
            self.state.freed(self.trash.pop())
        all_gone = not any(era.sweep == "failed" for era in self.eras)
        assert self.state.removals_work() is all_gone
        self.removal_error = None if all_gone else self.removal_error
        self.state.note_free_bytes(free_bytes)
        self.free_bytes = free_bytes

    # -- after every step -------------------------------------------------------------------------------------------

    @invariant()
    def everything_agrees(self) -> None:
        self.end_empty_eras()
        self.check_published()
        self.check_saves()
        self.check_lives()
        self.check_readable()
        self.check_files()

    def check_published(self) -> None:
        now = self.state.published
        assert now.accepted == now.committed + now.cancelled + now.failed + now.pending, "(10)"
        assert (
            now.accepted_bytes
            == now.committed_bytes + now.cancelled_bytes + now.failed_bytes + now.pending_bytes
        ), "(10)"
        for phase, jobs, nbytes in (
            (COMMITTED, now.committed, now.committed_bytes),
            (CANCELLED, now.cancelled, now.cancelled_bytes),
            (FAILED, now.failed, now.failed_bytes),
        ):
            expected = [save.nbytes for save in self.saves if save.phase is phase]
            assert (jobs, nbytes) == (len(expected), sum(expected)), phase
        assert now.accepted == len(self.saves)
        pending = [save.nbytes for save in self.in_flight()]
        assert (now.pending, now.pending_bytes) == (len(pending), sum(pending)), "(6)"
        assert now.pending <= MAX_JOBS and (now.pending_bytes <= MAX_BYTES or now.pending == 1), "(6)"
        assert [now.rejected, now.rejected_bytes] == self.rejected
        assert now.in_flight == (self.hand is not None) == (now.writing_since_s is not None)
        live = [stored for era in self.eras for stored in era.index.values()]
        assert (now.live_requests, now.live_snapshots) == (sum(era.alive for era in self.eras), len(live))
        assert now.session_bytes == sum(stored.disk_bytes for stored in live)
        assert now.trash_bytes == self.trash_bytes()
        assert (now.writer_restarts, now.cleanup_timeouts) == (self.restarts, 0)
        assert (now.last_error, now.free_bytes) == (self.write_error or self.removal_error, self.free_bytes)
        oldest = next(iter(self.in_flight()), None)
        assert now.oldest_since_s == (oldest.job.since_s if oldest else None)

    def check_saves(self) -> None:
        for save in self.saves:
            ticket = save.job.ticket
            assert ticket.state is save.phase and ticket.done() is save.phase.settled
            assert save.told == save.phase.settled, "(1)"
            over = save.phase.settled and not save.readers
            assert save.released == (over and save.has_image) and ticket.released is (
                over and not save.job.on_its_way
            ), "(8)"
            assert save.has_image or save.phase in (STAGING, CANCELLED, FAILED), "(8)"
            if save.phase.settled:
                self.check_outcome(save)
            elif save.phase is not STAGING:
                assert save.job.image is not None and save.job.image.segments, "(8)"
        assert self.state.await_staged(0) is not any(save.phase is STAGING for save in self.saves)
        assert self.state.tickets() == [save.job.ticket for save in self.in_flight()]
        for request_id in REQUESTS:
            used = [save for save in self.saves if not save.phase.settled or save.readers]
            expected = [save.job.ticket for save in used if save.key.request_id == request_id]
            assert self.state.tickets(request_id) == expected

    def check_outcome(self, save: Save) -> None:
        error = save.job.ticket.exception(0)
        if save.phase is COMMITTED:
            assert error is None and save.job.ticket.result(0) == save.outcome
        elif save.phase is FAILED:
            assert isinstance(error, SaveFailedError) and error.__cause__ is save.outcome
        else:
            assert isinstance(error, SaveCancelledError)

    def check_lives(self) -> None:
        job = self.hand.job if self.hand is not None else None
        assert self.state.job_in_hand() is job
        if self.hand is not None:
            assert self.hand.era.holder == "writer" and self.hand.job.life.busy, "(2)"
            assert self.state.is_current(self.hand.job) is self.hand.era.alive, "(4)"
        marked = {self.hand.era.generation: 1} if self.hand is not None and not self.hand.era.alive else {}
        assert dict(self.state.cancelled_in_hand) == marked, "(5)"
        lives: dict[int, Life] = {}
        for save in self.saves:
            life, era = save.job.life, save.era
            assert lives.setdefault(life.generation, life) is life, "(3)"
            assert (life.request_id, life.generation) == (era.request_id, era.generation)
            assert (life.alive, life.busy) == (era.alive, era.holder is not None), "(2, 4)"
            assert life.swept is (era.sweep == "swept") and (life.sweep_error is None) == (
                era.sweep != "failed"
            )
            assert (save.job in life.staging) is (save.phase is STAGING)
            if era.alive:
                newest = self.readable(save.key)
                pending = newest.job if isinstance(newest, Save) else None
                assert life.pending.get(save.key.token_count) is pending, "(7)"

    def check_readable(self) -> None:
        for request_id in REQUESTS:
            keys = [SnapshotKey(request_id, token_count) for token_count in TOKENS]
            found = [key.token_count for key in keys if self.readable(key) or self.is_coming(key)]
            assert self.state.boundaries(request_id) == tuple(found)
            for token_count in TOKENS:
                self.check_key(SnapshotKey(request_id, token_count))

    def check_key(self, key: SnapshotKey) -> None:
        expected, era = self.readable(key), self.living(key.request_id)
        coming = self.is_coming(key)
        assert self.state.has(key) is (coming or expected is not None), "(7)"
        if coming:
            with pytest.raises(TimeoutError):
                self.state.find(key)
            assert self.state.commit_of(key) is None
        elif isinstance(expected, Save):
            assert self.state.commit_of(key) is None
            assert self.state.find(key) is expected.job, "(7)"
            self.state.let_go_memory(expected.job)
        elif isinstance(expected, Stored):
            found = self.state.find(key)
            assert isinstance(found, Commit) and found.info == expected.info, "(7)"
            assert self.state.commit_of(key) is found
        elif era is not None and key.token_count in era.failed:
            with pytest.raises(SaveFailedError) as failed:
                self.state.find(key)
            assert failed.value.__cause__ is era.failed[key.token_count]
        else:
            with pytest.raises(SnapshotNotFoundError):
                self.state.find(key)

    def check_files(self) -> None:
        swept = {era.generation for era in self.eras if era.sweep == "swept"}
        assert not [path for path in self.files if path[1] in swept], "(9)"
        for era in self.eras:
            assert era.alive or era.sweep != "unneeded" or not self.files_of(era), "(9)"
            for token_count, stored in era.index.items():
                content, _ = self.files[era.request_id, era.generation, token_count]
                in_hand = self.hand is not None and self.hand_at == "renamed" and self.made.content == content
                assert content == stored.content or in_hand, "a save that was refused touched a file"

    def files_of(self, era: Era) -> list[PathKey]:
        return [path for path in self.files if path[:2] == (era.request_id, era.generation)]

    # -- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if hasattr(self, "state"):
            self.finish()

    def finish(self) -> None:
        self.come_to_rest()
        expected = {
            (era.request_id, era.generation, token_count): (stored.content, stored.disk_bytes)
            for era in self.eras
            for token_count, stored in era.index.items()
        }
        assert self.files == expected, "at rest the files are exactly the committed snapshots"
        now = self.state.published
        assert (now.pending, now.pending_bytes, now.trash_bytes, now.in_flight) == (0, 0, 0, 0)
        self.cleanup_all(really=True)
        self.everything_agrees()
        self.come_to_rest()
        assert self.files == {} and self.state.published.live_requests == 0
        assert not self.state.cancelled_in_hand
        assert self.state.begin_cleanup().lives == []
        self.state.close("over")
        assert self.state.claim() is None
        self.state.end_sweeper()
        assert self.state.claim_dirt() is None

    def come_to_rest(self) -> None:
        """Everybody does what is left to do, and each sweep works in the end."""
        while any(save.readers for save in self.saves):
            self.end_read(0)
        while self.detaching:
            self.end_detach(0, moved=False)
        while self.line:
            self.leave_one(self.line[-1], None)
            self.everything_agrees()
        while any(save.phase is STAGING for save in self.saves):
            self.admit(0)
            self.everything_agrees()
        while self.queue or self.hand is not None:
            self.work_once()
            self.everything_agrees()
        self.retry_failed_sweeps()
        while self.sweeping or self.asked or any(era.sweep == "dirty" for era in self.eras):
            self.sweep_one(goes=True) if self.sweeping else self.take_dirt()
            self.everything_agrees()
        self.empty_trash(10_000)
        self.everything_agrees()

    def retry_failed_sweeps(self) -> None:
        """What a cleanup of a request that lives again must not do here: end its new life."""
        while self.sweeping:
            self.sweep_one(goes=True)
        if any(era.sweep == "failed" for era in self.eras):
            self.state.end_sweeper()
            for era in self.eras:
                era.sweep = "dirty" if era.sweep == "failed" else era.sweep


class ClosingStateMachine(StateMachine):
    """The same, with a shutdown that may come at any time, go on for as long as it likes, and abandon the rest."""

    @precondition(lambda self: not self.closed and len(self.saves) > 3)
    @rule(really=seldom)
    def close(self, really: bool) -> None:
        if not really:
            return
        self.state.close("the store is shut down")
        self.closed = True
        assert self.state.published.closing == "the store is shut down"

    @precondition(lambda self: self.closed)
    @rule(really=st.booleans())
    def abandon_rest(self, really: bool) -> None:
        if not really:
            return
        assert self.state.abandon_rest() == tuple(save.key for save in self.in_flight())
        self.abandoned = True
        for save in list(self.queue):
            self.settle(save, CANCELLED)
        if self.hand is not None:
            self.hand.era.newest[self.hand.key.token_count] = self.hand.order

    @precondition(lambda self: len(self.saves) > 3 and (not self.hand or self.hand_at == "writing"))
    @rule(really=seldom)
    def writer_dies_for_good(self, really: bool) -> None:
        if not really:
            return
        error = OSError("bug")
        self.state.writer_died(error, for_good=True)
        self.write_error = "OSError: bug"
        self.closed = self.abandoned = True
        for save in list(self.queue):
            self.settle(save, FAILED, error)
        if self.hand is not None:
            self.settle_in_hand(FAILED, error)


walk = settings(max_examples=150, stateful_step_count=50, deadline=None, database=None)
TestWalk = StateMachine.TestCase
TestWalk.settings = walk
TestWalkIntoShutdown = ClosingStateMachine.TestCase
TestWalkIntoShutdown.settings = walk
