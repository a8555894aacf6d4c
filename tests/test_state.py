"""Every row of ``_state``'s transition table and every one of its invariants: no disk, and no threads but in one test.

What other threads do while a call waits is a script, run inside the wait on this one thread. A wait that nobody ends
fails the test instead of hanging it, and a wait with a time-out ends at once, on the script's own clock.
Numbers of invariants are those of the header of ``_state``.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from snapstore import (
    DiskQuotaError,
    SaveCancelledError,
    SaveFailedError,
    SaveState,
    SnapshotInfo,
    SnapshotKey,
    SnapshotNotFoundError,
    StoreClosedError,
    StoreFullError,
    StoreOptions,
)
from snapstore._format import Layout, TensorSpec
from snapstore._latency import Reasons
from snapstore._memory import HostImage
from snapstore._records import Cleanup, Commit, Content, End, Job, Life, Published
from snapstore._state import State
from snapstore._threads import Lock, Threads

CONTENT = Content("numpy", "null")
PATIENCE_S = 10.0


# -- the stage --------------------------------------------------------------------------------------------------


class WaitsForEverError(AssertionError):
    """A call waits, and nobody is left to wake it."""


class Script:
    """Clock and conditions for a ``State``, and what happens during each of its waits, in order."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.steps: deque[Callable[[], object]] = deque()
        self.waits = 0
        self.timeouts = 0
        self.timeouts_foreseen = 0
        self.threads = Threads(
            monotonic_s=lambda: self.now_s, condition=lambda lock: ScriptedCondition(self, lock)
        )

    def meanwhile(self, *steps: Callable[[], object]) -> None:
        """One step for each of the waits to come."""
        self.steps.extend(steps)

    def foresee_timeouts(self, count: int) -> None:
        """So many waits will end by their time-outs; any other must be ended by a wake."""
        self.timeouts_foreseen = count

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds


class ScriptedCondition:
    def __init__(self, script: Script, lock: Lock) -> None:
        self._script = script
        self._lock = lock
        self._wakes = 0

    def notify(self, n: int = 1) -> None:
        assert self._lock.locked()
        self._wakes += 1

    def notify_all(self) -> None:
        self.notify()

    def wait(self, timeout: float | None = None) -> bool:
        self._script.waits += 1
        woken_before = self._wakes
        started_s = self._script.now_s
        if self._script.steps:
            step = self._script.steps.popleft()
            self._lock.release()
            try:
                step()
            finally:
                self._lock.acquire()
        if self._wakes > woken_before:
            return True
        if timeout is None:
            raise WaitsForEverError
        self._script.timeouts += 1
        self._script.now_s = max(self._script.now_s, started_s + timeout)
        return False

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        deadline_s = None if timeout is None else self._script.now_s + timeout
        while not predicate():
            remaining_s = None if deadline_s is None else deadline_s - self._script.now_s
            if remaining_s is not None and remaining_s <= 0:
                return False
            self.wait(remaining_s)
        return True


class WatchedState(State):
    """Looks at every value in the moment in which it is published (10), and that the sums never go down."""

    def _publish_locked(self) -> None:
        before = self.published
        super()._publish_locked()
        now = self.published
        assert now.accepted == now.committed + now.cancelled + now.failed + now.pending
        assert (
            now.accepted_bytes
            == now.committed_bytes + now.cancelled_bytes + now.failed_bytes + now.pending_bytes
        )
        for name in ("accepted", "committed", "cancelled", "failed", "rejected"):
            assert getattr(now, name) >= getattr(before, name)
            assert getattr(now, f"{name}_bytes") >= getattr(before, f"{name}_bytes")
        assert all(value >= 0 for value in now if isinstance(value, int))


class Hands:
    """Does what the threads of a store do, one call at a time, and counts what it is told."""

    def __init__(self, threads: Threads, **options: object) -> None:
        self.state = WatchedState(StoreOptions(**options), threads)  # type: ignore[arg-type]
        self.releases: Counter[Job] = Counter()
        self.endings: Counter[Job] = Counter()
        self.imaged: set[Job] = set()

    @property
    def now(self) -> Published:
        return self.state.published

    def reserve(self, request_id: str = "a", tokens: int = 1, nbytes: int = 10) -> Job:
        job = self.state.reserve(SnapshotKey(request_id, tokens), nbytes, CONTENT)
        job.ticket.add_done_callback(lambda _: self.endings.update([job]))
        return job

    def admit(self, job: Job) -> bool:
        self.imaged.add(job)
        layout = Layout.of([TensorSpec("x", "U8", (job.nbytes,))])
        image = HostImage(
            layout, lambda: [memoryview(bytes(job.nbytes))], on_release=lambda: self.releases.update([job])
        )
        return self.state.admit(job, image)

    def queue(self, request_id: str = "a", tokens: int = 1, nbytes: int = 10) -> Job:
        job = self.reserve(request_id, tokens, nbytes)
        assert self.admit(job)
        return job

    def claim(self) -> Job:
        job = self.state.claim()
        assert job is not None
        return job

    def start(self, request_id: str = "a", tokens: int = 1, nbytes: int = 10) -> Job:
        """Have it in the writer's hand."""
        job = self.queue(request_id, tokens, nbytes)
        assert self.claim() is job
        return job

    def commit(self, job: Job, disk_bytes: int | None = None) -> bool:
        return self.state.commit(job, info_of(job), job.nbytes + 90 if disk_bytes is None else disk_bytes)

    def write(self, request_id: str = "a", tokens: int = 1, nbytes: int = 10) -> Job:
        job = self.start(request_id, tokens, nbytes)
        assert self.commit(job)
        return job

    def clean(self, *request_ids: str) -> Cleanup:
        return self.state.begin_cleanup(request_ids or None)

    def sweep(self) -> list[int]:
        """Generations whose directories went."""
        lives = self.state.take_dirt()
        for life in lives:
            self.state.swept([(life, life.doomed_bytes)])
        return [life.generation for life in lives]

    def hold(self, request_id: str = "a", tokens: int = 1) -> tuple[Life, Commit]:
        held = self.state.hold_commit(SnapshotKey(request_id, tokens), 0.0)
        assert held is not None
        return held

    def find(self, request_id: str = "a", tokens: int = 1) -> Job | Commit:
        """Where it is; the memory is let go again."""
        found = self.state.find(SnapshotKey(request_id, tokens))
        if isinstance(found, Job):
            self.state.let_go_memory(found)
        return found

    def finds_nothing(self, request_id: str = "a", tokens: int = 1) -> bool:
        assert not self.state.has(SnapshotKey(request_id, tokens))
        assert tokens not in self.state.boundaries(request_id)
        with pytest.raises(SnapshotNotFoundError, match="never saved here, or cleaned up") as caught:
            self.find(request_id, tokens)
        return caught.value.key == SnapshotKey(request_id, tokens)

    def is_settled(self, job: Job, state: SaveState) -> bool:
        """Once, with its memory given back once, its tensors let go, and everyone told once."""
        assert job.ticket.state is state
        assert job.ticket.done() and job.ticket.released
        assert self.endings[job] == 1
        assert self.releases[job] == int(job in self.imaged)
        assert job.ticket not in self.state.tickets()
        assert job.ticket not in self.state.tickets(job.key.request_id)
        return True


def info_of(job: Job) -> SnapshotInfo:
    path = Path("session") / f"{job.key.request_id}.g{job.ticket.generation}" / f"{job.key.token_count}"
    return SnapshotInfo(job.key, job.ticket.generation, path, job.nbytes)


@pytest.fixture(autouse=True)
def script() -> Iterator[Script]:
    script = Script()
    yield script
    assert not script.steps, "the test foresaw a wait that did not come"
    assert script.timeouts == script.timeouts_foreseen


@pytest.fixture
def hands(script: Script) -> Hands:
    return Hands(script.threads)


# -- the transition table ---------------------------------------------------------------------------------------


def test_reserve_starts_a_save_in_staging_and_charges_it_before_the_copy(hands: Hands) -> None:
    job = hands.reserve("a", 64, 10)
    assert job.ticket.state is SaveState.STAGING and not job.ticket.done() and not job.ticket.released
    assert (job.key, job.nbytes, job.ticket.generation) == (SnapshotKey("a", 64), 10, job.life.generation)
    assert (hands.now.accepted, hands.now.accepted_bytes) == (1, 10)
    assert (hands.now.pending, hands.now.pending_bytes, hands.now.in_flight) == (1, 10, 0)
    assert hands.state.tickets() == [job.ticket]
    assert hands.finds_nothing("a", 64)


def test_admit_queues_a_save_and_makes_it_readable(hands: Hands) -> None:
    job = hands.reserve("a", 64)
    assert hands.admit(job)
    assert job.ticket.state is SaveState.QUEUED and not job.ticket.done()
    assert hands.find("a", 64) is job
    assert hands.state.has(job.key) and hands.state.boundaries("a") == (64,)
    assert (hands.now.pending, hands.now.pending_bytes, hands.now.in_flight) == (1, 10, 0)


def test_admit_cancels_a_save_whose_life_ended_while_it_was_staged(hands: Hands) -> None:
    job = hands.reserve()
    hands.clean("a")
    assert job.ticket.state is SaveState.STAGING and not job.ticket.done()
    assert not hands.admit(job)
    assert hands.is_settled(job, SaveState.CANCELLED) and hands.releases[job] == 1
    assert hands.finds_nothing()


def test_admit_cancels_a_save_that_a_later_one_of_its_key_overtook(hands: Hands) -> None:
    earlier, later = hands.reserve(), hands.reserve()
    assert hands.admit(later)
    assert not hands.admit(earlier)
    assert hands.is_settled(earlier, SaveState.CANCELLED)
    assert hands.find() is later
    assert hands.claim() is later


def test_abandon_fails_a_save_with_its_cause(hands: Hands) -> None:
    job = hands.reserve()
    cause = RuntimeError("no copy")
    hands.state.abandon(job, cause)
    assert hands.is_settled(job, SaveState.FAILED)
    error = job.ticket.exception(0)
    assert isinstance(error, SaveFailedError) and error.__cause__ is cause and error.key == job.key
    assert (hands.now.failed, hands.now.failed_bytes, hands.now.pending) == (1, 10, 0)


def test_claim_takes_the_oldest_save_and_its_life_in_one_step(hands: Hands) -> None:
    first, second = hands.queue("a"), hands.queue("b")
    assert hands.state.job_in_hand() is None
    assert hands.claim() is first
    assert first.ticket.state is SaveState.WRITING and first.life.busy
    assert second.ticket.state is SaveState.QUEUED and not second.life.busy
    assert hands.state.job_in_hand() is first and hands.now.in_flight == 1
    assert (hands.now.pending, hands.now.pending_bytes) == (2, 20)
    assert hands.find("a") is first, "it is readable from memory until its commit"


def test_begin_cleanup_cancels_what_is_queued(hands: Hands) -> None:
    job = hands.queue()
    cleanup = hands.clean("a")
    assert hands.is_settled(job, SaveState.CANCELLED)
    assert (cleanup.cancelled, cleanup.removed, cleanup.lives) == (1, 0, [])
    with pytest.raises(SaveCancelledError, match=r"cancelled: its request was cleaned up$"):
        job.ticket.result(0)
    assert (hands.now.cancelled, hands.now.cancelled_bytes, hands.now.pending) == (1, 10, 0)


def test_a_later_save_of_a_key_cancels_the_queued_one(hands: Hands) -> None:
    earlier = hands.queue()
    later = hands.queue()
    assert hands.is_settled(earlier, SaveState.CANCELLED)
    with pytest.raises(SaveCancelledError, match=r"cancelled: a later save of the same key replaced it$"):
        earlier.ticket.result(0)
    assert hands.find() is later and hands.claim() is later


def test_abandon_rest_cancels_what_is_queued_now_and_what_is_staged_when_it_comes(hands: Hands) -> None:
    writing, queued, staged = hands.start("a"), hands.queue("b"), hands.reserve("c")
    hands.state.close("over")
    assert hands.now.closing == "over"
    assert hands.state.abandon_rest() == (writing.key, queued.key, staged.key)
    assert hands.is_settled(queued, SaveState.CANCELLED)
    assert (hands.now.cancelled, hands.now.pending, hands.now.live_requests) == (1, 2, 2)
    with pytest.raises(SaveCancelledError, match=r"cancelled: the store was shut down before its turn came$"):
        queued.ticket.result(0)
    assert staged.ticket.state is SaveState.STAGING and writing.ticket.state is SaveState.WRITING
    assert not hands.admit(staged)
    assert hands.is_settled(staged, SaveState.CANCELLED)
    assert hands.commit(writing), "what the writer has in hand may still be committed"
    assert hands.state.claim() is None
    assert (hands.now.committed, hands.now.cancelled, hands.now.pending) == (1, 2, 0)


def test_commit_puts_the_snapshot_into_the_index(hands: Hands) -> None:
    job = hands.start("a", 64)
    assert hands.commit(job, disk_bytes=4096)
    assert hands.is_settled(job, SaveState.COMMITTED) and not job.life.busy
    found = hands.find("a", 64)
    assert isinstance(found, Commit) and found.info is job.ticket.result(0)
    assert hands.state.has(job.key) and hands.state.boundaries("a") == (64,)
    assert (hands.now.committed, hands.now.committed_bytes, hands.now.pending) == (1, 10, 0)
    assert (hands.now.live_snapshots, hands.now.session_bytes, hands.now.in_flight) == (1, 4096, 0)


def test_finish_cancelled_settles_a_save_whose_file_is_undone(hands: Hands) -> None:
    job = hands.start()
    hands.clean("a")
    assert not hands.commit(job)
    assert job.ticket.state is SaveState.WRITING and not job.ticket.done()
    hands.state.finish_cancelled(job)
    assert hands.is_settled(job, SaveState.CANCELLED)
    assert (hands.now.cancelled, hands.now.committed, hands.now.pending, hands.now.in_flight) == (1, 0, 0, 0)
    assert hands.now.live_snapshots == 0 and hands.now.session_bytes == 0


def test_fail_settles_a_save_with_its_cause_and_the_writer_goes_on(hands: Hands) -> None:
    job = hands.start("a")
    other = hands.queue("b")
    cause = OSError(5, "Input/output error")
    assert hands.state.fail(job, cause)
    assert hands.is_settled(job, SaveState.FAILED)
    with pytest.raises(SaveFailedError, match="Input/output error") as caught:
        job.ticket.result(0)
    assert caught.value.__cause__ is cause
    assert "Input/output error" in (hands.now.last_error or "")
    assert hands.claim() is other and hands.commit(other)
    assert hands.now.last_error is None


# -- 1: settled exactly once, by its owner ----------------------------------------------------------------------


def _overtaken(hands: Hands) -> Job:
    earlier, later = hands.reserve(), hands.reserve()
    hands.admit(later)
    hands.admit(earlier)
    return earlier


def _cleaned_while_staged(hands: Hands) -> Job:
    job = hands.reserve()
    hands.clean()
    hands.admit(job)
    return job


def _abandoned(hands: Hands) -> Job:
    job = hands.reserve()
    hands.state.abandon(job, ValueError("copy"))
    return job


def _cleaned_then_abandoned(hands: Hands) -> Job:
    job = hands.reserve()
    hands.clean()
    hands.state.abandon(job, ValueError("copy"))
    return job


def _cleaned_while_queued(hands: Hands) -> Job:
    job = hands.queue()
    hands.clean()
    return job


def _replaced(hands: Hands) -> Job:
    job = hands.queue()
    hands.queue()
    return job


def _left_at_shutdown(hands: Hands) -> Job:
    job = hands.queue()
    hands.state.close("over")
    hands.state.abandon_rest()
    return job


def _staged_at_shutdown(hands: Hands) -> Job:
    job = hands.reserve()
    hands.state.close("over")
    hands.state.abandon_rest()
    hands.admit(job)
    return job


def _written(hands: Hands) -> Job:
    return hands.write()


def _undone(hands: Hands) -> Job:
    job = hands.start()
    hands.clean()
    hands.commit(job)
    hands.state.finish_cancelled(job)
    return job


def _failed(hands: Hands) -> Job:
    job = hands.start()
    hands.state.fail(job, OSError("disk"))
    return job


def _cleaned_then_failed(hands: Hands) -> Job:
    job = hands.start()
    hands.clean()
    assert not hands.state.fail(job, OSError("disk"))
    return job


def _in_hand_of_a_writer_that_died(hands: Hands) -> Job:
    job = hands.start()
    hands.state.writer_died(KeyError("bug"), for_good=False)
    return job


def _cleaned_in_hand_of_a_writer_that_died(hands: Hands) -> Job:
    job = hands.start()
    hands.clean()
    hands.state.writer_died(KeyError("bug"), for_good=False)
    return job


def _queued_when_the_writer_died_for_good(hands: Hands) -> Job:
    job = hands.queue()
    hands.state.writer_died(KeyError("bug"), for_good=True)
    return job


ENDINGS = [
    (_overtaken, SaveState.CANCELLED),
    (_cleaned_while_staged, SaveState.CANCELLED),
    (_abandoned, SaveState.FAILED),
    (_cleaned_then_abandoned, SaveState.CANCELLED),
    (_cleaned_while_queued, SaveState.CANCELLED),
    (_replaced, SaveState.CANCELLED),
    (_left_at_shutdown, SaveState.CANCELLED),
    (_staged_at_shutdown, SaveState.CANCELLED),
    (_written, SaveState.COMMITTED),
    (_undone, SaveState.CANCELLED),
    (_failed, SaveState.FAILED),
    (_cleaned_then_failed, SaveState.CANCELLED),
    (_in_hand_of_a_writer_that_died, SaveState.FAILED),
    (_cleaned_in_hand_of_a_writer_that_died, SaveState.CANCELLED),
    (_queued_when_the_writer_died_for_good, SaveState.FAILED),
]
each_ending = pytest.mark.parametrize(
    ("end", "state"), [pytest.param(end, state, id=end.__name__.lstrip("_")) for end, state in ENDINGS]
)


@each_ending
def test_1_every_ending_settles_a_save_once_and_leaves_nothing_behind(
    hands: Hands, end: Callable[[Hands], Job], state: SaveState
) -> None:
    job = end(hands)
    assert hands.is_settled(job, state)
    hands.state.begin_cleanup()
    hands.state.close("over")
    hands.state.abandon_rest()
    hands.sweep()
    assert hands.is_settled(job, state), "nothing that comes later settles it again"
    assert (hands.now.pending, hands.now.pending_bytes, hands.now.in_flight) == (0, 0, 0)
    assert not hands.state.cancelled_in_hand
    assert hands.state.claim() is None


@each_ending
def test_1_the_ticket_says_how_it_ended(hands: Hands, end: Callable[[Hands], Job], state: SaveState) -> None:
    ticket = end(hands).ticket
    error = ticket.exception(0)
    if state is SaveState.COMMITTED:
        assert error is None and ticket.result(0).key == ticket.key
    else:
        kind = SaveCancelledError if state is SaveState.CANCELLED else SaveFailedError
        assert type(error) is kind and error.key == ticket.key
        with pytest.raises(kind):
            ticket.result(0)


@each_ending
def test_8_memory_goes_back_once_and_only_when_nobody_reads_it(
    hands: Hands, end: Callable[[Hands], Job], state: SaveState
) -> None:
    """A reader takes hold as soon as there is something to read; the ending must leave it its memory."""
    readers: list[Job] = []
    admit = hands.admit

    def admit_and_read(job: Job) -> bool:
        admitted = admit(job)
        if admitted:
            found = hands.state.find(job.key)
            assert found is job
            readers.append(job)
        return admitted

    hands.admit = admit_and_read  # type: ignore[method-assign]
    job = end(hands)
    assert job.ticket.done()
    if job in readers:
        assert hands.releases[job] == 0 and not job.ticket.released
        assert job.image is not None and len(job.image.segments) == 1
        assert job.ticket in hands.state.tickets("a"), (
            "its tensors are still being read: a drain waits for it"
        )
        hands.state.let_go_memory(job)
    assert hands.is_settled(job, state)


def test_1_memory_is_released_before_the_ticket_says_that_it_is_over(hands: Hands) -> None:
    job = hands.start()
    seen: list[tuple[bool, int, int]] = []
    job.ticket.add_done_callback(
        lambda ticket: seen.append((ticket.released, hands.releases[job], hands.now.committed))
    )
    hands.commit(job)
    assert seen == [(True, 1, 1)]


def test_1_everyone_is_told_whatever_one_callback_raises(hands: Hands) -> None:
    """An interruption that strikes in user code reaches the caller after all tickets are resolved."""
    jobs = [hands.queue("a", tokens) for tokens in (1, 2, 3)]

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    jobs[1].ticket.add_done_callback(interrupted)
    with pytest.raises(KeyboardInterrupt):
        hands.clean("a")
    assert all(hands.is_settled(job, SaveState.CANCELLED) for job in jobs)
    assert hands.queue("a") and hands.now.pending == 1


def test_1_all_memory_is_back_before_the_first_of_many_is_told(hands: Hands) -> None:
    jobs = [hands.queue("a", tokens) for tokens in (1, 2, 3)]
    seen: list[int] = []
    jobs[0].ticket.add_done_callback(lambda _: seen.append(hands.releases.total()))
    hands.clean("a")
    assert seen == [3]


def test_1_user_code_runs_without_the_lock_and_may_come_back(hands: Hands) -> None:
    """A done callback cleans up the very request whose end it is told of."""
    job = hands.start()
    job.ticket.add_done_callback(lambda _: hands.clean("a"))
    assert hands.commit(job)
    assert job.ticket.state is SaveState.COMMITTED and hands.finds_nothing()
    assert hands.sweep() == [job.life.generation]


def test_1_fail_tells_how_it_settled_the_save_whatever_comes_right_after(hands: Hands) -> None:
    job = hands.start()
    job.ticket.add_done_callback(lambda _: hands.clean("a"))
    assert hands.state.fail(job, OSError("disk"))
    assert job.ticket.state is SaveState.FAILED


# -- 2: WRITING implies busy ------------------------------------------------------------------------------------


def test_2_the_writer_holds_a_life_from_claim_until_its_save_is_settled(hands: Hands) -> None:
    for end in (
        hands.commit,
        lambda job: hands.state.fail(job, OSError("disk")),
        lambda job: hands.state.writer_died(KeyError("bug"), for_good=False),
    ):
        job = hands.start()
        assert job.life.busy
        end(job)
        assert not job.life.busy


def test_2_a_refused_commit_keeps_the_life_until_the_file_is_undone(hands: Hands) -> None:
    job = hands.start()
    hands.clean("a")
    assert job.life.busy and not hands.commit(job) and job.life.busy
    hands.state.finish_cancelled(job)
    assert not job.life.busy


def test_2_claim_passes_over_a_life_that_a_detach_holds(hands: Hands) -> None:
    hands.write("a", 1)
    life, _ = hands.hold("a", 1)
    held_up, other = hands.queue("a", 2), hands.queue("b", 1)
    assert hands.claim() is other and hands.commit(other)
    hands.state.end_hold(life)
    assert hands.claim() is held_up


def test_2_claim_waits_for_the_life_of_the_only_save(hands: Hands, script: Script) -> None:
    hands.write("a", 1)
    life, _ = hands.hold("a", 1)
    job = hands.queue("a", 2)
    script.meanwhile(lambda: hands.state.end_hold(life))
    assert hands.claim() is job and script.waits == 1


def test_2_a_detach_waits_until_the_writer_lets_go_of_the_life(hands: Hands, script: Script) -> None:
    hands.write("a", 1)
    job = hands.start("a", 2)
    script.meanwhile(lambda: hands.commit(job))
    held = hands.state.hold_commit(SnapshotKey("a", 1), script.now_s + 0.5)
    assert held is not None and held[0] is job.life and script.waits == 1


def test_2_a_detach_waits_no_longer_than_its_deadline(hands: Hands, script: Script) -> None:
    hands.write("a", 1)
    hands.start("a", 2)
    hands.queue("b")
    started_s = script.now_s
    script.foresee_timeouts(1)
    script.meanwhile(lambda: (script.pass_time(3), hands.clean("b")))
    with pytest.raises(TimeoutError, match="not detached"):
        hands.state.hold_commit(SnapshotKey("a", 1), started_s + 5)
    assert script.now_s == started_s + 5
    assert hands.state.has(SnapshotKey("a", 1)), "it is where it was"


def test_2_a_detach_waits_for_no_other_request(hands: Hands) -> None:
    hands.write("a", 1)
    hands.start("b", 1)
    assert hands.hold("a", 1)[0].request_id == "a"


# -- 3: a generation is used once -------------------------------------------------------------------------------


def test_3_a_cleanup_ends_a_generation_and_the_next_save_starts_a_new_one(hands: Hands) -> None:
    generations = []
    for _ in range(3):
        generations += [hands.write("a").ticket.generation, hands.write("b").ticket.generation]
        hands.clean()
    assert sorted(set(generations)) == generations


def test_3_saves_of_one_life_share_its_generation(hands: Hands) -> None:
    assert len({hands.write("a", tokens).ticket.generation for tokens in (1, 2, 2, 3)}) == 1


def test_3_a_generation_that_a_rejected_save_began_never_comes_back(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1, on_full="reject")
    first = hands.start("a")
    with pytest.raises(StoreFullError):
        hands.reserve("b")
    hands.commit(first)
    assert hands.reserve("c").ticket.generation > first.ticket.generation


def test_3_removing_a_dead_generation_does_not_touch_a_save_that_came_later(hands: Hands) -> None:
    old = hands.write("a")
    hands.clean("a")
    new = hands.write("a")
    assert info_of(old).path != info_of(new).path
    assert hands.sweep() == [old.ticket.generation]
    found = hands.find("a")
    assert isinstance(found, Commit) and found.info.generation == new.ticket.generation


# -- 4: only current saves commit -------------------------------------------------------------------------------


def test_4_a_save_is_current_until_its_life_ends(hands: Hands) -> None:
    job = hands.start()
    assert hands.state.is_current(job)
    hands.clean("b")
    assert hands.state.is_current(job)
    hands.clean("a")
    assert not hands.state.is_current(job)


def test_4_a_save_of_an_ended_life_does_not_commit_though_its_request_lives_again(hands: Hands) -> None:
    old = hands.start()
    hands.clean("a")
    new = hands.queue()
    assert not hands.state.is_current(old) and not hands.commit(old)
    assert hands.find() is new and hands.now.live_snapshots == 0
    hands.state.finish_cancelled(old)
    assert hands.claim() is new and hands.commit(new)
    found = hands.find()
    assert isinstance(found, Commit) and found.info.generation == new.ticket.generation


# -- 5: the counter of cancelled saves in hand ------------------------------------------------------------------


def test_5_what_is_drained_is_never_counted(hands: Hands) -> None:
    hands.write("b", 1)
    hands.queue("a", 1)
    hands.reserve("a", 2)
    hands.clean()
    assert dict(hands.state.cancelled_in_hand) == {}


def test_5_what_the_writer_has_in_hand_is_counted_by_generation(hands: Hands) -> None:
    job = hands.start("a")
    hands.clean("a")
    assert dict(hands.state.cancelled_in_hand) == {job.ticket.generation: 1}
    again = hands.queue("a")
    assert again.ticket.generation not in hands.state.cancelled_in_hand


def test_5_reentrant_cleanups_count_each_life_once(hands: Hands) -> None:
    job = hands.start("a")
    assert hands.clean("a").cancelled == 1
    assert hands.clean("a").cancelled == 0
    hands.queue("a")
    assert hands.clean().cancelled == 1
    assert dict(hands.state.cancelled_in_hand) == {job.ticket.generation: 1}
    hands.state.finish_cancelled(job)
    assert dict(hands.state.cancelled_in_hand) == {}


@pytest.mark.parametrize("end", ["finish_cancelled", "fail", "writer_died"])
def test_5_whoever_takes_it_to_zero_hands_the_dead_life_to_the_sweeper(hands: Hands, end: str) -> None:
    job = hands.start()
    hands.clean("a")
    assert hands.state.take_dirt() == [], "the writer holds it"
    if end == "finish_cancelled":
        hands.state.finish_cancelled(job)
    elif end == "fail":
        hands.state.fail(job, OSError("disk"))
    else:
        hands.state.writer_died(KeyError("bug"), for_good=False)
    assert list(hands.state.cancelled_in_hand) == []
    assert hands.state.take_dirt() == [job.life]
    assert hands.state.take_dirt() == []


# -- 6: room ----------------------------------------------------------------------------------------------------


def test_6_bytes_are_charged_from_reserve_until_the_save_is_settled(hands: Hands) -> None:
    job = hands.reserve(nbytes=30)
    seen = [hands.now.pending_bytes]
    hands.admit(job)
    seen.append(hands.now.pending_bytes)
    hands.claim()
    seen.append(hands.now.pending_bytes)
    hands.commit(job)
    assert seen == [30, 30, 30] and hands.now.pending_bytes == 0


@pytest.mark.parametrize("limit", [{"max_pending_jobs": 2}, {"max_pending_bytes": 20}])
def test_6_jobs_and_bytes_stay_within_their_limits(script: Script, limit: dict[str, int]) -> None:
    hands = Hands(script.threads, on_full="reject", **limit)
    hands.queue("a"), hands.reserve("b")
    with pytest.raises(StoreFullError):
        hands.reserve("c")
    assert (hands.now.pending, hands.now.pending_bytes) == (2, 20)


def test_6_a_save_larger_than_the_limit_is_taken_when_nothing_else_is_pending(script: Script) -> None:
    hands = Hands(script.threads, max_pending_bytes=20, on_full="reject")
    large = hands.start("a", nbytes=100)
    assert hands.now.pending_bytes == 100
    with pytest.raises(StoreFullError):
        hands.reserve("b", nbytes=0)
    hands.commit(large)
    small = hands.reserve("b", nbytes=1)
    with pytest.raises(StoreFullError):
        hands.reserve("a", nbytes=100)
    hands.state.abandon(small, ValueError("copy"))
    assert hands.reserve("a", nbytes=100)


def test_6_a_rejected_save_leaves_no_trace(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1, on_full="reject")
    job = hands.start("a")
    before = hands.now
    with pytest.raises(StoreFullError) as caught:
        hands.reserve("b", 2, 7)
    assert hands.now == before._replace(rejected=1, rejected_bytes=7, rejections=Reasons((("full", 1, 7),)))
    assert hands.state.boundaries("b") == () and hands.finds_nothing("b", 2)
    assert hands.clean("b").lives == []
    error = caught.value
    assert (error.key, error.nbytes, error.waited_s) == (SnapshotKey("b", 2), 7, 0)
    assert (error.pending_jobs, error.pending_bytes) == (1, 10)
    assert hands.state.tickets() == [job.ticket]


def test_6_a_rejected_resave_leaves_the_earlier_one_as_it_was(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1, on_full="reject")
    job = hands.queue("a")
    with pytest.raises(StoreFullError):
        hands.reserve("a")
    assert hands.find("a") is job and hands.claim() is job and hands.commit(job)


def test_6_a_save_waits_for_room_at_most_its_time(script: Script) -> None:
    """Wakes that bring no room do not stretch it: one deadline."""
    hands = Hands(script.threads, max_pending_jobs=1, save_timeout_s=2.0)
    hands.start("a")
    started_s = script.now_s
    script.foresee_timeouts(1)
    script.meanwhile(
        lambda: (script.pass_time(1.5), hands.clean("c")), lambda: (script.pass_time(0.25), hands.clean("c"))
    )
    with pytest.raises(StoreFullError) as caught:
        hands.reserve("b")
    assert script.now_s - started_s == 2.0 and caught.value.waited_s == 2.0


@pytest.mark.parametrize("end", ["commit", "fail", "clean", "replace", "abandon", "died"])
def test_6_whatever_makes_room_wakes_the_save_that_waits_for_it(script: Script, end: str) -> None:
    hands = Hands(script.threads, max_pending_jobs=2, max_pending_bytes=20)
    job = hands.start("a")
    staged = hands.reserve("b")
    queued_steps: dict[str, Callable[[], object]] = {
        "commit": lambda: hands.commit(job),
        "fail": lambda: hands.state.fail(job, OSError("disk")),
        "clean": lambda: (hands.admit(staged), hands.clean("b")),
        "replace": lambda: (hands.clean("b"), hands.admit(staged)),
        "abandon": lambda: hands.state.abandon(staged, ValueError("copy")),
        "died": lambda: hands.state.writer_died(KeyError("bug"), for_good=False),
    }
    script.meanwhile(queued_steps[end])
    assert hands.reserve("c").ticket.state is SaveState.STAGING
    assert script.waits == 1 and hands.now.pending == 2


def test_6_a_small_save_does_not_overtake_a_large_one_that_waits(script: Script) -> None:
    """It fits when it comes, and fits again while it waits; still the large one goes first."""
    hands = Hands(script.threads, max_pending_bytes=100, save_timeout_s=2.0)
    job = hands.start("a", nbytes=60)

    def try_to_overtake() -> None:
        with pytest.raises(StoreFullError):
            hands.reserve("small", nbytes=1)

    script.foresee_timeouts(1)
    script.meanwhile(try_to_overtake, lambda: hands.commit(job))
    assert hands.reserve("large", nbytes=100).ticket.state is SaveState.STAGING
    assert (hands.now.accepted, hands.now.rejected) == (2, 1)


def test_6_first_come_first_served() -> None:
    """The one test with threads: a gate in the wait tells when a saver stands in line."""
    in_line = threading.Semaphore(0)

    class TellingCondition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            in_line.release()
            return super().wait(timeout)

    hands = Hands(Threads(condition=TellingCondition), max_pending_bytes=100, save_timeout_s=PATIENCE_S)
    pinned = hands.start("pinned", nbytes=60)
    accepted: list[Job] = []
    sizes = {"large": 100, "small": 10, "smaller": 1}

    def save(request_id: str) -> None:
        accepted.append(hands.reserve(request_id, nbytes=sizes[request_id]))

    savers = {name: threading.Thread(target=save, args=(name,), name=f"saver-{name}") for name in sizes}
    for saver in savers.values():
        saver.start()
        assert in_line.acquire(timeout=PATIENCE_S)
    hands.commit(pinned)
    savers["large"].join(PATIENCE_S)
    assert [job.key.request_id for job in accepted] == ["large"]
    hands.state.abandon(accepted[0], ValueError("copy"))
    for saver in savers.values():
        saver.join(PATIENCE_S)
        assert not saver.is_alive()
    by_acceptance = sorted(accepted, key=lambda job: job.sequence)
    assert [job.key.request_id for job in by_acceptance] == ["large", "small", "smaller"]


def test_6_a_turn_is_a_reserve_for_those_who_must_not_block(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1, save_timeout_s=2.0)
    job = hands.start("a")
    turn = hands.state.queue_up(SnapshotKey("b", 1), 10, CONTENT)
    assert (hands.now.accepted, hands.now.live_requests) == (1, 2)
    assert hands.state.enter(turn) is None
    hands.commit(job)
    entered = hands.state.enter(turn)
    assert (hands.now.accepted, hands.now.pending) == (2, 1)
    assert entered is not None and entered.ticket.state is SaveState.STAGING and entered.life is turn.life
    assert entered.content is CONTENT
    hands.state.leave(turn)
    assert hands.admit(entered) and hands.find("b") is entered
    assert (hands.now.accepted, hands.now.rejected, script.waits) == (2, 0, 0)


def test_6_a_turn_ends_at_its_deadline_and_leaves_no_trace(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1, save_timeout_s=2.0)
    hands.start("a")
    before = hands.now
    turn = hands.state.queue_up(SnapshotKey("b", 1), 10, CONTENT)
    script.pass_time(1.9)
    assert hands.state.enter(turn) is None
    script.pass_time(0.1)
    with pytest.raises(StoreFullError) as caught:
        hands.state.enter(turn)
    assert caught.value.waited_s == 2.0
    hands.state.leave(turn, caught.value)
    assert hands.now == before._replace(rejected=1, rejected_bytes=10, rejections=Reasons((("full", 1, 10),)))


def test_6_a_turn_that_is_given_up_lets_the_next_one_go(script: Script) -> None:
    """Neither a save that blocks nor one that does not overtakes one that came before it."""
    hands = Hands(script.threads, max_pending_bytes=100, save_timeout_s=2.0)
    hands.start("a", nbytes=60)
    large = hands.state.queue_up(SnapshotKey("large", 1), 100, CONTENT)
    small = hands.state.queue_up(SnapshotKey("small", 1), 1, CONTENT)
    assert hands.state.enter(small) is None, "it fits, and is not the first"
    script.meanwhile(lambda: hands.state.leave(large), lambda: hands.state.leave(small))
    assert hands.reserve("last", nbytes=1).ticket.state is SaveState.STAGING
    assert script.waits == 2 and hands.now.rejected == 0 and hands.now.live_requests == 2


@pytest.mark.parametrize("which", [("b",), ()], ids=["its request", "all"])
def test_6_a_cleanup_or_a_close_ends_a_turn(script: Script, which: tuple[str, ...]) -> None:
    hands = Hands(script.threads, max_pending_jobs=1)
    hands.start("a")
    first = hands.state.queue_up(SnapshotKey("b", 1), 10, CONTENT)
    hands.clean(*which)
    with pytest.raises(SaveCancelledError) as caught:
        hands.state.enter(first)
    assert caught.value.key == first.key
    hands.state.leave(first)
    second = hands.state.queue_up(SnapshotKey("b", 1), 10, CONTENT)
    assert second.life.generation > first.life.generation
    hands.state.close("over")
    with pytest.raises(StoreClosedError):
        hands.state.enter(second)
    hands.state.leave(second)
    with pytest.raises(StoreClosedError):
        hands.state.queue_up(SnapshotKey("b", 1), 10, CONTENT)
    assert hands.now.rejections == Reasons((("closed", 1, 10),))


def test_6_two_turns_keep_their_life_until_the_last_one_leaves(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1)
    job = hands.start("a")
    first, second = (hands.state.queue_up(SnapshotKey("b", tokens), 10, CONTENT) for tokens in (1, 2))
    hands.state.leave(first)
    hands.commit(job)
    entered = hands.state.enter(second)
    assert entered is not None and entered.life is first.life
    hands.state.leave(second)


def test_6_bells_ring_outside_the_lock_after_whatever_may_end_a_wait(hands: Hands) -> None:
    rung: list[int] = []

    def rings(act: Callable[..., object], *args: object) -> bool:
        before = len(rung)
        act(*args)
        return len(rung) > before

    with hands.state.watched(lambda: rung.append(len(hands.state.tickets()))):
        assert rings(hands.reserve, "a", 9), "the next one in the line may go"
        job = hands.reserve("a", 1)
        assert rings(hands.admit, job)
        hands.claim()
        assert rings(hands.commit, job)
        assert rings(hands.state.abandon, hands.reserve("a", 2), ValueError("copy"))
        assert rings(hands.clean, "a")
        assert hands.state.take_dirt() == [job.life]
        assert rings(hands.state.not_swept, job.life, OSError("busy"))
        assert rings(hands.state.swept, [(job.life, 0)])
        assert rings(hands.state.leave, hands.state.queue_up(SnapshotKey("b", 1), 1, CONTENT))
        assert rings(hands.state.fail, hands.start("b"), OSError("disk"))
        job = hands.start("b")
        hands.clean("b")
        assert rings(hands.state.finish_cancelled, job)
        hands.start("b")
        assert rings(lambda: hands.state.writer_died(KeyError("bug"), for_good=False))
        assert rings(lambda: hands.state.sweeper_died(KeyError("bug")))
        assert rings(hands.state.close, "over")
        assert rings(hands.state.abandon_rest)
    assert not rings(hands.clean)


@pytest.mark.parametrize("which", [("b",), ()], ids=["its request", "all"])
def test_6_a_cleanup_ends_the_wait_for_room_of_its_request(script: Script, which: tuple[str, ...]) -> None:
    hands = Hands(script.threads, max_pending_jobs=1)
    job = hands.start("a")
    script.meanwhile(lambda: hands.clean(*which))
    with pytest.raises(SaveCancelledError, match="waited for room"):
        hands.reserve("b")
    assert (hands.now.accepted, hands.now.rejected) == (1, 1)
    script.meanwhile(lambda: hands.commit(job) or hands.state.finish_cancelled(job))
    assert hands.reserve("b").ticket.state is SaveState.STAGING, "what comes after the cleanup is not touched"


def test_6_a_cleanup_of_another_request_leaves_the_wait_for_room_alone(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1)
    job = hands.start("a")
    script.meanwhile(lambda: hands.clean("c"), lambda: hands.commit(job))
    assert hands.reserve("b").ticket.state is SaveState.STAGING and script.waits == 2


def test_6_close_ends_every_wait_for_room(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1)
    hands.start("a")
    script.meanwhile(lambda: hands.state.close("the store is shut down"))
    with pytest.raises(StoreClosedError, match="the store is shut down") as caught:
        hands.reserve("b")
    assert caught.value.key == SnapshotKey("b", 1) and hands.now.rejected == 1


def says_what_to_do(error: DiskQuotaError, facts: str, number: int) -> None:
    assert error.key == SnapshotKey("c", 1) and error.errno == number
    assert f"{facts}; clean up requests, or change the option" in str(error)


def test_6_the_session_limit_counts_files_trash_and_what_is_pending(script: Script) -> None:
    hands = Hands(script.threads, max_session_bytes=100)
    job = hands.start("a", nbytes=40)
    assert hands.commit(job, disk_bytes=50)
    hands.reserve("b", nbytes=20)
    with pytest.raises(DiskQuotaError) as caught:
        hands.reserve("c", nbytes=31)
    assert (caught.value.nbytes, caught.value.limit_bytes, caught.value.used_bytes) == (31, 100, 70)
    says_what_to_do(caught.value, "70 bytes are used and max_session_bytes is 100", errno.EDQUOT)
    assert hands.state.claim_dirt() == [], "the sweeper is asked to look for space"
    hands.clean("a")
    hands.sweep()
    assert (hands.now.session_bytes, hands.now.trash_bytes) == (0, 50)
    with pytest.raises(DiskQuotaError):
        hands.reserve("c", nbytes=31)
    hands.state.freed(50)
    assert hands.now.trash_bytes == 0
    assert hands.reserve("c", nbytes=80)
    assert (hands.now.rejected, hands.now.rejected_bytes) == (2, 62)


def test_6_the_free_space_limit_counts_what_is_pending(script: Script) -> None:
    hands = Hands(script.threads, min_free_bytes=100)
    assert hands.reserve("a", nbytes=1000), "nothing is known of the disk yet"
    hands.state.note_free_bytes(1150)
    assert hands.now.free_bytes == 1150
    assert hands.reserve("b", nbytes=50)
    with pytest.raises(DiskQuotaError) as caught:
        hands.reserve("c", nbytes=1)
    assert (caught.value.nbytes, caught.value.limit_bytes, caught.value.used_bytes) == (1, 100, 100)
    says_what_to_do(caught.value, "100 bytes are free and min_free_bytes is 100", errno.ENOSPC)
    assert hands.state.claim_dirt() == []
    hands.state.note_free_bytes(1151)
    assert hands.reserve("c", nbytes=1)


def test_6_a_limit_that_is_reached_while_a_save_waits_for_room_ends_its_wait(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1, max_session_bytes=100)
    job = hands.start("a", nbytes=40)
    script.meanwhile(lambda: hands.commit(job, disk_bytes=60))
    with pytest.raises(DiskQuotaError):
        hands.reserve("b", nbytes=50)
    assert (hands.now.live_requests, hands.now.rejected) == (1, 1)


# -- 7: readable from admit until the life ends -----------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("early", [True, False], ids=["written at once", "written at the end"])
def test_7_the_last_accepted_save_wins_in_whatever_order_they_arrive(
    hands: Hands, order: tuple[int, ...], early: bool
) -> None:
    jobs = [hands.reserve(nbytes=nbytes) for nbytes in (1, 2, 3)]
    newest = -1
    for index in order:
        admitted = hands.admit(jobs[index])
        assert admitted is (index > newest)
        newest = max(newest, index)
        if early and admitted:
            assert hands.claim() is jobs[index] and hands.commit(jobs[index])
        found = hands.find()
        assert (found.info.nbytes if isinstance(found, Commit) else found.nbytes) == jobs[newest].nbytes
    if not early:
        assert hands.claim() is jobs[2] and hands.commit(jobs[2])
    assert jobs[2].ticket.state is SaveState.COMMITTED
    found = hands.find()
    assert isinstance(found, Commit) and found.info.nbytes == 3
    assert (hands.now.live_snapshots, hands.now.session_bytes, hands.now.pending) == (1, 93, 0)


def test_7_a_save_that_is_being_written_goes_on_and_is_replaced_after_its_commit(hands: Hands) -> None:
    writing = hands.start(nbytes=1)
    later = hands.queue(nbytes=2)
    assert writing.ticket.state is SaveState.WRITING and hands.state.is_current(writing)
    assert hands.find() is later
    assert hands.commit(writing) and hands.is_settled(writing, SaveState.COMMITTED)
    assert hands.find() is later, "the finishing writer took its own entry, not the later one's"
    assert hands.claim() is later and hands.commit(later)
    found = hands.find()
    assert isinstance(found, Commit) and found.info.nbytes == 2
    assert (hands.now.committed, hands.now.live_snapshots, hands.now.session_bytes) == (2, 1, 92)


@pytest.mark.parametrize("end", ["fail", "writer_died"])
def test_7_a_failing_writer_takes_its_own_entry_not_the_later_ones(hands: Hands, end: str) -> None:
    writing = hands.start(nbytes=1)
    later = hands.queue(nbytes=2)
    if end == "fail":
        assert hands.state.fail(writing, OSError("disk"))
    else:
        hands.state.writer_died(OSError("disk"), for_good=False)
    assert hands.find() is later
    assert hands.claim() is later and hands.commit(later)
    hands.hold()
    assert hands.finds_nothing(), "the later save made the earlier failure history"


def test_7_a_save_in_hand_is_readable_again_when_its_successor_is_abandoned(hands: Hands) -> None:
    writing = hands.start()
    hands.queue()
    hands.state.close("over")
    hands.state.abandon_rest()
    assert hands.find() is writing and hands.state.has(writing.key)
    assert hands.commit(writing)
    assert isinstance(hands.find(), Commit)


def test_7_a_save_in_hand_whose_successor_is_abandoned_may_still_fail(hands: Hands) -> None:
    writing = hands.start()
    hands.queue()
    hands.state.close("over")
    hands.state.abandon_rest()
    hands.state.fail(writing, OSError("disk"))
    with pytest.raises(SaveFailedError):
        hands.find()


@pytest.mark.parametrize("how", ["abandon", "fail", "writer_died", "overtaken"])
def test_7_a_failed_resave_keeps_the_earlier_commit(hands: Hands, how: str) -> None:
    first = hands.write()
    again = hands.reserve()
    if how == "abandon":
        hands.state.abandon(again, ValueError("copy"))
    elif how == "overtaken":
        last = hands.start()
        assert not hands.admit(again)
        assert hands.state.fail(last, OSError("disk"))
    else:
        hands.admit(again)
        hands.claim()
        if how == "fail":
            hands.state.fail(again, OSError("disk"))
        else:
            hands.state.writer_died(KeyError("bug"), for_good=False)
    found = hands.find()
    assert isinstance(found, Commit) and found.info == info_of(first)
    assert (hands.now.live_snapshots, hands.now.session_bytes, hands.now.pending) == (1, 100, 0)


def test_7_a_failed_first_save_is_told_with_its_cause_until_it_is_saved_again(hands: Hands) -> None:
    cause = OSError(28, "No space left on device")
    hands.state.fail(hands.start(), cause)
    key = SnapshotKey("a", 1)
    assert not hands.state.has(key) and hands.state.boundaries("a") == ()
    with pytest.raises(SaveFailedError, match="No space left") as caught:
        hands.find()
    assert caught.value.__cause__ is cause and caught.value.key == key
    assert hands.write() and isinstance(hands.find(), Commit)
    hands.state.end_hold(hands.hold()[0])
    assert hands.finds_nothing() and hands.now.live_requests == 0, "nothing of the failure is left"


def test_7_a_cleanup_makes_a_failure_forgotten(hands: Hands) -> None:
    hands.state.fail(hands.start(), OSError("disk"))
    hands.clean("a")
    assert hands.finds_nothing()


def test_7_an_older_save_that_fails_says_nothing_about_a_later_one(hands: Hands) -> None:
    """It failed to be staged, after the later one of its key was written and moved out."""
    older = hands.reserve()
    hands.write()
    hands.state.abandon(older, ValueError("copy"))
    assert isinstance(hands.find(), Commit)
    hands.state.end_hold(hands.hold()[0])
    assert hands.finds_nothing()
    assert hands.now.live_requests == 0 and len(hands.sweep()) == 1


@pytest.mark.parametrize("how", ["admit", "abandon"])
def test_7_a_life_ends_when_the_last_thing_in_it_was_a_save_that_came_too_late(
    hands: Hands, how: str
) -> None:
    older = hands.reserve()
    hands.write()
    hands.state.end_hold(hands.hold()[0])
    assert hands.now.live_requests == 1
    if how == "admit":
        assert not hands.admit(older)
    else:
        hands.state.abandon(older, ValueError("copy"))
    assert hands.now.live_requests == 0
    assert hands.sweep() == [older.ticket.generation], "its empty directory goes"


def test_7_nothing_of_a_life_is_readable_after_its_end(hands: Hands) -> None:
    hands.write("a", 1)
    hands.start("a", 2)
    hands.queue("a", 3)
    hands.reserve("a", 4)
    assert hands.state.boundaries("a") == (1, 2, 3)
    hands.clean("a")
    assert hands.state.boundaries("a") == ()
    assert all(hands.finds_nothing("a", tokens) for tokens in (1, 2, 3, 4))


def test_7_a_save_on_its_way_from_a_device_is_listed_and_waited_for(hands: Hands, script: Script) -> None:
    job = hands.reserve("a", 1)
    assert not hands.state.has(job.key)
    hands.state.on_its_way(job)
    assert hands.state.has(job.key) and hands.state.boundaries("a") == (1,)
    assert hands.state.commit_of(job.key) is None and hands.state.hold_commit(job.key, 0.0) is None
    with pytest.raises(TimeoutError, match="still on its way"):
        hands.find("a", 1)
    script.foresee_timeouts(1)
    with pytest.raises(TimeoutError, match=r"still on its way from its device after 2\.0 s"):
        hands.state.find(job.key, 2.0)
    script.meanwhile(lambda: hands.admit(job))
    assert hands.state.find(job.key, 2.0) is job
    hands.state.let_go_memory(job)
    assert hands.state.commit_of(job.key) is None
    hands.claim()
    hands.commit(job)
    commit = hands.state.commit_of(job.key)
    assert commit is hands.find("a", 1) and not job.ticket.released, "its sources are the device thread's"


def test_7_a_resave_on_its_way_is_waited_for_though_an_earlier_commit_is_there(
    hands: Hands, script: Script
) -> None:
    earlier = hands.write("a", 1)
    again = hands.reserve("a", 1)
    assert hands.state.find(again.key) is hands.state.commit_of(again.key), (
        "staged by its caller: not saved yet"
    )
    hands.state.on_its_way(again)
    assert hands.state.commit_of(again.key) is None and hands.state.hold_commit(again.key, 0.0) is None
    script.meanwhile(lambda: hands.state.abandon(again, ValueError("device")))
    found = hands.state.find(again.key, 2.0)
    assert isinstance(found, Commit) and found.info == info_of(earlier)


@pytest.mark.parametrize("end", ["fail", "clean"])
def test_7_a_reader_waits_no_longer_than_there_is_something_to_come(
    hands: Hands, script: Script, end: str
) -> None:
    job = hands.reserve("a", 1)
    hands.state.on_its_way(job)
    if end == "fail":
        script.meanwhile(lambda: hands.state.abandon(job, ValueError("device")))
    else:
        script.meanwhile(lambda: hands.clean("a"))
    with pytest.raises(SaveFailedError if end == "fail" else SnapshotNotFoundError):
        hands.state.find(job.key, 2.0)


def test_7_what_comes_too_late_is_neither_listed_nor_waited_for(hands: Hands) -> None:
    """A later save of its key was written and moved out: the earlier one will be refused."""
    late = hands.reserve("a", 1)
    hands.state.on_its_way(late)
    hands.write("a", 1)
    assert isinstance(hands.state.commit_of(late.key), Commit)
    hands.hold("a", 1)
    assert hands.finds_nothing("a", 1)
    with pytest.raises(SnapshotNotFoundError):
        hands.state.commit_of(late.key)
    assert not hands.admit(late)


def test_7_tickets_lists_what_is_in_flight_oldest_first_dead_lives_included(hands: Hands) -> None:
    writing = hands.start("a", 1)
    hands.clean("a")
    staged = hands.reserve("b", 1)
    again = hands.queue("a", 1)
    done = hands.reserve("a", 2)
    hands.state.abandon(done, ValueError("copy"))
    assert hands.state.tickets() == [writing.ticket, staged.ticket, again.ticket]
    assert hands.state.tickets("a") == [writing.ticket, again.ticket]
    assert hands.state.tickets("c") == []


# -- 8: memory (see also the endings above) ---------------------------------------------------------------------


def test_8_two_readers_and_the_writer_share_one_memory(hands: Hands) -> None:
    job = hands.start()
    assert hands.state.find(job.key) is job and hands.state.find(job.key) is job
    hands.state.let_go_memory(job)
    hands.commit(job)
    assert hands.releases[job] == 0 and not job.ticket.released and job.ticket.done()
    hands.state.let_go_memory(job)
    assert hands.releases[job] == 1 and job.ticket.released


def test_8_a_drain_waits_for_the_readers_of_a_save_that_is_over(hands: Hands) -> None:
    """Its tensors may be borrowed, and a load that began in time still copies from them."""
    job = hands.start()
    hands.state.find(job.key)
    hands.commit(job)
    assert hands.state.tickets("a") == [job.ticket]
    assert (hands.now.pending, hands.now.pending_bytes) == (0, 0), "it takes no room any more"
    hands.state.let_go_memory(job)
    assert hands.state.tickets("a") == []


def test_8_a_borrowed_source_is_released_with_its_image(hands: Hands) -> None:
    job = hands.queue()
    assert not job.ticket.released and not job.ticket.wait_released(0)
    image = job.image
    assert image is not None
    hands.clean()
    assert job.ticket.wait_released(0) and job.image is None and list(image.segments) == []


# -- 9: dead lives and the sweeper ------------------------------------------------------------------------------


def test_9_a_dead_life_goes_to_the_sweeper_at_once_when_nobody_holds_it(hands: Hands) -> None:
    job = hands.write()
    cleanup = hands.clean("a")
    assert cleanup.lives == [job.life] and not job.life.swept
    assert (hands.now.session_bytes, hands.now.trash_bytes) == (0, 100), "forgotten, and not yet free"
    assert hands.state.take_dirt() == [job.life]
    hands.state.swept([(job.life, 100)])
    assert job.life.swept and hands.now.trash_bytes == 100
    assert hands.clean("a").lives == []


def test_9_a_directory_that_was_gone_already_leaves_nothing_in_the_trash(hands: Hands) -> None:
    job = hands.write()
    hands.clean("a")
    assert hands.state.take_dirt() == [job.life]
    hands.state.swept([(job.life, 0)])
    assert hands.now.trash_bytes == 0


def test_9_a_life_that_never_reached_the_disk_needs_no_sweeping(hands: Hands) -> None:
    hands.queue("a", 1)
    hands.reserve("a", 2)
    cleanup = hands.clean("a")
    assert cleanup.lives == [] and cleanup.cancelled == 2
    assert hands.state.take_dirt() == []


def test_9_a_life_whose_save_failed_is_swept_too(hands: Hands) -> None:
    """Its directory may have been made."""
    job = hands.start()
    hands.state.fail(job, OSError("disk"))
    assert hands.clean("a").lives == [job.life]
    assert hands.sweep() == [job.life.generation]


def test_9_a_dead_life_goes_to_the_sweeper_when_its_detach_lets_go(hands: Hands) -> None:
    hands.write("a", 1), hands.write("a", 2)
    life, commit = hands.hold("a", 1)
    cleanup = hands.clean("a")
    assert cleanup.lives == [life] and (cleanup.removed, cleanup.cancelled) == (1, 0)
    assert hands.state.take_dirt() == []
    hands.state.end_hold(life, put_back=commit)
    assert hands.finds_nothing("a", 1), "what is put back into a dead life stays forgotten"
    assert hands.state.take_dirt() == [life]
    assert (hands.now.live_snapshots, hands.now.session_bytes) == (0, 0)


def test_9_detach_takes_the_commit_out_of_the_index_and_may_put_it_back(hands: Hands) -> None:
    hands.write("a", 1)
    life, commit = hands.hold("a", 1)
    assert life.busy and hands.finds_nothing("a", 1)
    assert (hands.now.live_snapshots, hands.now.session_bytes, hands.now.live_requests) == (0, 0, 1)
    hands.state.end_hold(life, put_back=commit)
    assert not life.busy and hands.find("a", 1) is commit
    assert (hands.now.live_snapshots, hands.now.session_bytes, hands.now.live_requests) == (1, 100, 1)


def test_9_a_life_ends_when_its_last_snapshot_is_detached(hands: Hands) -> None:
    hands.write("a", 1), hands.write("a", 2)
    hands.state.end_hold(hands.hold("a", 1)[0])
    assert hands.now.live_requests == 1 and hands.state.boundaries("a") == (2,)
    life, _ = hands.hold("a", 2)
    hands.state.end_hold(life)
    assert hands.now.live_requests == 0 and not life.alive
    assert hands.clean("a").lives == [life], "a cleanup waits for its directory to go"
    assert hands.state.take_dirt() == [life]


def test_9_a_save_that_waits_for_room_keeps_the_life_that_a_detach_empties(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1)
    generation = hands.write("a", 1).ticket.generation
    pinned = hands.start("b")
    life, _ = hands.hold("a", 1)
    script.meanwhile(lambda: (hands.state.end_hold(life), hands.commit(pinned)))
    job = hands.reserve("a", 2)
    assert job.ticket.generation == generation and life.alive


def test_9_a_life_that_only_a_wait_for_room_kept_ends_with_it(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=1)
    hands.write("a", 1)
    hands.start("b")
    life, _ = hands.hold("a", 1)
    script.foresee_timeouts(1)
    script.meanwhile(lambda: hands.state.end_hold(life))
    with pytest.raises(StoreFullError):
        hands.reserve("a", 2)
    assert not life.alive and hands.state.take_dirt() == [life]


def test_9_there_is_nothing_to_detach_while_a_save_of_the_key_is_pending(hands: Hands) -> None:
    key = SnapshotKey("a", 1)
    assert hands.state.hold_commit(key, 0.0) is None
    hands.write()
    hands.reserve()
    assert hands.state.hold_commit(SnapshotKey("a", 2), 0.0) is None
    hands.queue()
    assert hands.state.hold_commit(key, 0.0) is None
    hands.claim()
    assert hands.state.hold_commit(key, 0.0) is None


def test_9_a_cleanup_ends_the_wait_of_a_detach(hands: Hands, script: Script) -> None:
    hands.write("a", 1)
    hands.start("a", 2)
    script.meanwhile(lambda: hands.clean("a"))
    assert hands.state.hold_commit(SnapshotKey("a", 1), script.now_s + 5) is None


def test_9_a_cleanup_waits_until_its_lives_are_swept(hands: Hands, script: Script) -> None:
    job = hands.start("a")
    lives = hands.clean("a").lives
    script.meanwhile(lambda: hands.state.finish_cancelled(job), hands.sweep)
    assert hands.state.await_swept(lives, 2.0) == 0
    assert job.life.swept and hands.now.cleanup_timeouts == 0


def test_9_a_cleanup_that_times_out_says_what_the_writer_holds(hands: Hands, script: Script) -> None:
    hands.write("a", 1), hands.write("b", 1)
    hands.start("a", 2)
    lives = hands.clean().lives
    started_s = script.now_s
    script.foresee_timeouts(1)
    script.meanwhile(hands.sweep)
    assert hands.state.await_swept(lives, 2.0) == 1
    assert script.now_s == started_s + 2.0 and hands.now.cleanup_timeouts == 1
    assert [life.swept for life in lives] == [False, True]


def test_9_what_a_detach_holds_is_not_the_writers(hands: Hands, script: Script) -> None:
    hands.write("a", 1)
    hands.hold("a", 1)
    script.foresee_timeouts(2)
    lives = hands.clean("a").lives
    for timeouts in (1, 2):
        assert hands.state.await_swept(lives, 0.5) == 0
        assert hands.now.cleanup_timeouts == timeouts


def test_9_a_cleanup_that_does_not_wait_counts_no_timeout(hands: Hands, script: Script) -> None:
    hands.start("a")
    started_s = script.now_s
    assert hands.state.await_swept(hands.clean("a").lives, 0) == 1
    assert script.now_s == started_s and hands.now.cleanup_timeouts == 0
    assert hands.state.await_swept([], 0) == 0


def test_9_a_cleanup_that_waits_in_another_way_counts_its_timeout_too(hands: Hands) -> None:
    job = hands.start("a")
    lives = hands.clean("a").lives
    assert not lives[0].settled
    assert hands.state.end_cleanup(lives, waited=False) == 1 and hands.now.cleanup_timeouts == 0
    assert hands.state.end_cleanup(lives, waited=True) == 1 and hands.now.cleanup_timeouts == 1
    hands.state.finish_cancelled(job)
    hands.sweep()
    assert lives[0].settled
    assert hands.state.end_cleanup(lives, waited=True) == 0 and hands.now.cleanup_timeouts == 1


def test_9_a_cleanup_waits_also_for_what_an_earlier_one_left(hands: Hands) -> None:
    first = hands.start("a")
    hands.clean("a")
    second = hands.queue("a")
    assert hands.clean("a").lives == [first.life]
    assert second.ticket.state is SaveState.CANCELLED and not second.life.on_disk
    hands.state.finish_cancelled(first)
    third = hands.write("a")
    assert hands.clean("a").lives == [first.life, third.life]
    assert hands.sweep() == [first.life.generation, third.life.generation]
    assert hands.clean("a").lives == []


def test_9_a_sweep_that_fails_is_tried_again_by_the_next_cleanup(hands: Hands, script: Script) -> None:
    job = hands.write("a")
    lives = hands.clean("a").lives
    error = OSError(16, "Device or resource busy")

    def fail_to_sweep() -> None:
        assert hands.state.take_dirt() == lives
        hands.state.not_swept(job.life, error)

    script.meanwhile(fail_to_sweep)
    assert hands.state.await_swept(lives, 2.0) == 0, "it does not wait for what will not come"
    assert not job.life.swept and job.life.sweep_error is error
    assert "resource busy" in (hands.now.last_error or "") and hands.now.cleanup_timeouts == 0
    assert hands.state.take_dirt() == []
    hands.clean("b")
    assert hands.state.take_dirt() == []
    assert hands.clean("a").lives == lives
    assert job.life.sweep_error is None and hands.sweep() == [job.life.generation]
    assert hands.clean("a").lives == []


def test_9_the_error_of_a_sweep_stands_until_all_removals_work_again(hands: Hands) -> None:
    """A write that works does not hide it."""
    for request_id in "ab":
        hands.write(request_id)
    hands.clean()
    for life in hands.state.take_dirt():
        hands.state.not_swept(life, OSError("busy"))
    hands.write("c")
    assert hands.now.last_error == "OSError: busy"
    hands.clean("a")
    hands.sweep()
    assert not hands.state.removals_work() and hands.now.last_error == "OSError: busy"
    hands.clean("b")
    hands.sweep()
    assert hands.state.removals_work() and hands.now.last_error is None
    hands.state.not_freed(OSError("not empty"))
    assert hands.now.last_error == "OSError: not empty"
    assert hands.state.removals_work() and hands.now.last_error is None


def test_9_a_sweeper_that_died_is_started_again_with_what_it_had_in_hand(hands: Hands) -> None:
    held = hands.start("held")
    lives = [hands.queue(request_id).life for request_id in "ab"]
    hands.commit(held)
    for _ in lives:
        hands.commit(hands.claim())
    hands.hold("held")
    hands.clean("a"), hands.clean("held")
    assert hands.state.take_dirt() == lives[:1]
    hands.clean("b")
    hands.state.sweeper_died(KeyError("bug"))
    assert "bug" in (hands.now.last_error or "")
    assert hands.state.claim_dirt() == lives, "each once, and not what is held"
    hands.state.end_hold(held.life)
    assert hands.state.take_dirt() == [held.life]


def test_9_a_sweeper_that_died_twice_over_one_life_leaves_the_failed_ones_to_a_cleanup(hands: Hands) -> None:
    failed, other = hands.write("a").life, hands.write("b").life
    hands.clean()
    assert hands.state.take_dirt() == [failed, other]
    hands.state.not_swept(failed, OSError("busy"))
    hands.state.sweeper_died(KeyError("bug"))
    assert hands.state.take_dirt() == [other]
    assert hands.clean("a").lives == [failed] and hands.state.take_dirt() == [failed]


def test_9_nobody_waits_for_a_sweeper_that_has_ended(hands: Hands, script: Script) -> None:
    before, after = hands.write("a").life, hands.write("b").life
    cleanup = hands.clean("a")
    assert hands.state.take_dirt() == [before]
    started_s = script.now_s
    script.meanwhile(hands.state.sweeper_ended)
    for lives in (cleanup.lives, hands.clean("b").lives, hands.clean("a", "b").lives):
        assert lives and hands.state.await_swept(lives, 2.0) == 0 and script.now_s == started_s
    assert not before.swept and not after.swept and after.sweep_error is not None
    assert after.sweep_error.args == (errno.EIO, "the sweeper thread is gone")
    assert not hands.state.removals_work()


def test_9_a_sweep_that_failed_is_tried_again_at_the_end(hands: Hands) -> None:
    job = hands.write("a")
    hands.clean("a")
    for life in hands.state.take_dirt():
        hands.state.not_swept(life, OSError("busy"))
    hands.state.end_sweeper()
    assert hands.state.claim_dirt() == [job.life]
    hands.state.not_swept(job.life, OSError("busy"))
    assert hands.state.claim_dirt() is None, "once"


def test_9_the_sweeper_waits_for_dead_lives(hands: Hands, script: Script) -> None:
    job = hands.start("a")
    script.meanwhile(lambda: hands.clean("a"), lambda: hands.state.finish_cancelled(job))
    assert hands.state.claim_dirt() == [job.life] and script.waits == 2
    script.meanwhile(hands.state.ask_sweeper)
    assert hands.state.claim_dirt() == []
    with pytest.raises(WaitsForEverError):
        hands.state.claim_dirt()


def test_9_the_sweeper_leaves_after_the_writer_when_told_so(hands: Hands, script: Script) -> None:
    job = hands.start("a")
    hands.clean("a")
    hands.state.end_sweeper(after_writer=True)
    script.meanwhile(lambda: hands.state.finish_cancelled(job))
    assert hands.state.claim_dirt() == [job.life]
    hands.state.swept([(job.life, 0)])
    script.meanwhile(hands.state.writer_ended)
    assert hands.state.claim_dirt() is None


def test_9_the_sweeper_leaves_without_the_writer_when_that_is_stuck(hands: Hands) -> None:
    hands.start("a")
    hands.clean("a")
    hands.state.end_sweeper()
    assert hands.state.claim_dirt() is None


def test_9_the_sweeper_removes_what_is_dead_before_it_leaves(hands: Hands) -> None:
    job = hands.write("a")
    hands.clean()
    hands.state.end_sweeper()
    assert hands.state.claim_dirt() == [job.life]
    assert hands.state.claim_dirt() is None


# -- reports ----------------------------------------------------------------------------------------------------


def test_9_a_cleanup_counts_exactly_what_it_ended(hands: Hands) -> None:
    hands.write("a", 1, nbytes=5), hands.write("a", 2, nbytes=7), hands.write("b", 1, nbytes=11)
    writing = hands.start("a", 2)  # a commit of it stays until it is replaced
    replaced_later = hands.queue("a", 2)
    queued, staged = hands.queue("a", 3), hands.reserve("a", 4)
    cleanup = hands.clean("a")
    assert (cleanup.cancelled, cleanup.removed, cleanup.removed_bytes) == (4, 2, 12)
    assert cleanup.lives == [writing.life] and writing.life.doomed_bytes == 95 + 97
    assert (hands.now.live_snapshots, hands.now.session_bytes) == (1, 101)
    assert not hands.admit(staged)
    hands.state.finish_cancelled(writing)
    assert hands.now.cancelled == 4
    for job in (writing, replaced_later, queued, staged):
        assert hands.is_settled(job, SaveState.CANCELLED)
    again = hands.clean("a")
    assert (again.cancelled, again.removed, again.removed_bytes, again.lives) == (0, 0, 0, [writing.life])


def test_9_cleaning_up_everything_counts_every_request(hands: Hands) -> None:
    for request_id in "abc":
        hands.write(request_id, 1, nbytes=1)
    for request_id in "abc":
        hands.queue(request_id, 2)
    cleanup = hands.clean()
    assert (cleanup.cancelled, cleanup.removed, cleanup.removed_bytes, len(cleanup.lives)) == (3, 3, 3, 3)
    assert hands.now.live_requests == 0 and len(hands.sweep()) == 3


def test_9_a_request_that_nobody_knows_leaves_no_mark(hands: Hands) -> None:
    before = hands.now
    cleanup = hands.clean("a")
    assert (cleanup.cancelled, cleanup.removed, cleanup.removed_bytes, cleanup.lives) == (0, 0, 0, [])
    assert hands.now == before and not hands.state.cancelled_in_hand and hands.state.take_dirt() == []


def test_9_a_save_that_comes_while_a_cleanup_waits_survives(hands: Hands, script: Script) -> None:
    old = hands.start("a")
    lives = hands.clean("a").lives
    new: list[Job] = []
    script.foresee_timeouts(1)
    script.meanwhile(lambda: new.append(hands.queue("a")))
    assert hands.state.await_swept(lives, 1.0) == 1
    hands.clean("b")
    hands.state.finish_cancelled(old)
    assert hands.sweep() == [old.life.generation]
    assert hands.find("a") is new[0] and hands.claim() is new[0] and hands.commit(new[0])


# -- 10: balance ------------------------------------------------------------------------------------------------


def test_10_every_published_value_is_one_moment_in_balance(hands: Hands) -> None:
    """The sums are looked at in every value, by ``WatchedState``; here, that each step is in the value after it."""

    def figures() -> tuple[int, ...]:
        now = hands.now
        return now.accepted, now.committed, now.cancelled, now.failed, now.pending, now.in_flight

    first, second, third, fourth = (hands.reserve(tokens=tokens) for tokens in (1, 2, 3, 4))
    assert figures() == (4, 0, 0, 0, 4, 0)
    hands.state.abandon(fourth, ValueError("copy"))
    assert figures() == (4, 0, 0, 1, 3, 0)
    hands.admit(first), hands.admit(second), hands.admit(third)
    assert figures() == (4, 0, 0, 1, 3, 0)
    hands.claim()
    assert figures() == (4, 0, 0, 1, 3, 1)
    hands.commit(first)
    assert figures() == (4, 1, 0, 1, 2, 0)
    hands.claim()
    hands.state.fail(second, OSError("disk"))
    assert figures() == (4, 1, 0, 2, 1, 0)
    hands.claim()
    hands.clean()
    assert figures() == (4, 1, 0, 2, 1, 1)
    hands.state.finish_cancelled(third)
    assert figures() == (4, 1, 1, 2, 0, 0)
    assert (hands.now.committed_bytes, hands.now.cancelled_bytes, hands.now.failed_bytes) == (10, 10, 20)


def test_10_the_ages_are_those_of_the_oldest_save_and_of_the_write(hands: Hands, script: Script) -> None:
    assert hands.now.oldest_since_s is None and hands.now.writing_since_s is None
    started_s = script.now_s
    first = hands.queue("a")
    script.pass_time(3)
    second = hands.reserve("b")
    hands.claim()
    assert (hands.now.oldest_since_s, hands.now.writing_since_s) == (started_s, started_s + 3)
    script.pass_time(3)
    hands.commit(first)
    assert (hands.now.oldest_since_s, hands.now.writing_since_s) == (second.since_s, None)
    hands.state.abandon(second, ValueError("copy"))
    assert hands.now.oldest_since_s is None


def test_10_waits_and_writes_are_timed_whatever_comes_of_them(hands: Hands, script: Script) -> None:
    for request_id, end in (
        ("a", hands.commit),
        ("b", lambda job: hands.state.fail(job, OSError("disk"))),
        ("c", lambda job: (hands.clean("c"), hands.state.finish_cancelled(job))),
    ):
        job = hands.queue(request_id)
        script.pass_time(0.5)
        hands.claim()
        script.pass_time(0.25)
        end(job)
    latencies = hands.now.latencies
    assert (latencies.queue_wait.total, latencies.queue_wait.sum_s) == (3, 1.5)
    assert (latencies.write.total, latencies.write.sum_s) == (3, 0.75)
    hands.state.note("load_disk", 0.125)
    assert (hands.now.latencies.load_disk.total, hands.now.latencies.load_disk.sum_s) == (1, 0.125)
    assert hands.now.failures == Reasons((("io_error", 1, 10),))


# -- the writer's waits, shutdown, adoption ---------------------------------------------------------------------


def test_the_writer_waits_for_a_save(hands: Hands, script: Script) -> None:
    jobs: list[Job] = []
    script.meanwhile(lambda: jobs.append(hands.queue()))
    assert hands.claim() is jobs[0] and script.waits == 1


def test_a_closed_store_refuses_saves_and_says_why(hands: Hands) -> None:
    hands.state.close("the store is shut down")
    hands.state.close("and again")
    before = hands.now
    assert before.closing == "the store is shut down"
    with pytest.raises(StoreClosedError, match="the store is shut down"):
        hands.reserve()
    assert hands.now == before._replace(
        rejected=1, rejected_bytes=10, rejections=Reasons((("closed", 1, 10),))
    )


def test_the_writer_ends_when_everything_accepted_is_settled(hands: Hands, script: Script) -> None:
    queued, staged, doomed = hands.queue("a"), hands.reserve("b"), hands.reserve("c")
    hands.state.close("over")
    assert hands.claim() is queued and hands.commit(queued)
    script.meanwhile(lambda: hands.admit(staged))
    assert hands.claim() is staged and hands.commit(staged)
    script.meanwhile(lambda: hands.state.abandon(doomed, ValueError("copy")))
    assert hands.state.claim() is None
    assert hands.now.committed == 2


@pytest.mark.parametrize("end", ["close", "abandon_rest", "clean"])
def test_the_writer_is_woken_to_end(hands: Hands, script: Script, end: str) -> None:
    """By whatever makes that there is nothing to wait for; the life of the only save is held, for ever."""
    if end == "close":
        script.meanwhile(lambda: hands.state.close("over"))
    else:
        hands.write("a", 1)
        hands.hold("a", 1)
        hands.queue("a", 2)
        hands.state.close("over")
        script.meanwhile(hands.state.abandon_rest if end == "abandon_rest" else hands.clean)
    assert hands.state.claim() is None and script.waits == 1


def test_shutdown_can_wait_for_what_is_on_its_way_to_host_memory(hands: Hands, script: Script) -> None:
    assert hands.state.await_staged(0)
    first, second = hands.reserve("a"), hands.reserve("b")
    assert not hands.state.await_staged(0)
    script.foresee_timeouts(1)
    script.meanwhile(
        lambda: (hands.admit(first), hands.clean("c")),
        lambda: hands.state.abandon(second, ValueError("copy")),
    )
    assert hands.state.await_staged(2.0) and script.waits == 2
    staged, started_s = hands.reserve("a"), script.now_s
    assert not hands.state.await_staged(2.0) and script.now_s == started_s + 2.0
    script.meanwhile(lambda: hands.admit(staged))
    assert hands.state.await_staged(2.0)


def test_saves_that_are_abandoned_leave_no_empty_life(hands: Hands) -> None:
    hands.queue("a", 1), hands.queue("a", 2)
    staged = hands.reserve("b")
    hands.state.close("over")
    hands.state.abandon_rest()
    hands.admit(staged)
    assert hands.now.live_requests == 0


def test_a_writer_that_died_once_is_started_again(hands: Hands) -> None:
    job, other = hands.start("a"), hands.queue("b")
    bug = KeyError("bug")
    hands.state.writer_died(bug, for_good=False)
    assert hands.is_settled(job, SaveState.FAILED) and job.ticket.exception(0).__cause__ is bug  # type: ignore[union-attr]
    assert (hands.now.writer_restarts, hands.now.closing) == (1, None) and "bug" in (
        hands.now.last_error or ""
    )
    assert hands.claim() is other and hands.commit(other)
    hands.state.writer_died(bug, for_good=False)
    assert hands.now.writer_restarts == 2


def test_a_writer_that_died_between_two_saves_fails_none(hands: Hands) -> None:
    job = hands.queue()
    hands.state.writer_died(KeyError("bug"), for_good=False)
    assert hands.claim() is job


def test_a_writer_that_died_for_good_fails_everything_and_closes_the_store(hands: Hands) -> None:
    writing, queued, staged = hands.start("a"), hands.queue("b"), hands.reserve("c")
    kept = hands.reserve("d")
    hands.state.writer_died(KeyError("bug"), for_good=True)
    assert hands.is_settled(writing, SaveState.FAILED) and hands.is_settled(queued, SaveState.FAILED)
    assert not hands.admit(staged) and hands.is_settled(staged, SaveState.CANCELLED)
    hands.state.abandon(kept, ValueError("copy"))
    assert "writer thread died" in (hands.now.closing or "") and hands.now.pending == 0
    with pytest.raises(StoreClosedError, match="its writer thread died of KeyError"):
        hands.reserve()
    assert hands.state.claim() is None


def test_what_was_committed_is_readable_after_the_writer_died_and_after_the_end(hands: Hands) -> None:
    hands.write("a", 1)
    hands.state.writer_died(KeyError("bug"), for_good=True)
    hands.state.abandon_rest()
    assert isinstance(hands.find("a", 1), Commit)
    cleanup = hands.clean()
    assert (cleanup.removed, hands.sweep()) == (1, [cleanup.lives[0].generation])


def test_3_adopted_snapshots_are_read_and_cleaned_like_any_other(hands: Hands) -> None:
    for tokens in (1, 2):
        info = SnapshotInfo(SnapshotKey("a", tokens), 7, Path("session/a.g7") / str(tokens), 10)
        hands.state.adopt(info, disk_bytes=100)
    assert hands.state.boundaries("a") == (1, 2)
    assert (hands.now.live_snapshots, hands.now.session_bytes, hands.now.accepted) == (2, 200, 0)
    again = hands.write("a", 2)
    other = hands.write("b", 1)
    assert again.ticket.generation == 7 and other.ticket.generation > 7
    assert (hands.now.live_snapshots, hands.now.session_bytes) == (3, 300)
    cleanup = hands.clean("a")
    assert (cleanup.removed, cleanup.removed_bytes) == (2, 20)
    assert hands.sweep() == [7] and hands.now.trash_bytes == 200
    assert hands.reserve("a").ticket.generation > other.ticket.generation


def test_9_adopted_snapshots_are_swept_though_nothing_was_saved_beside_them(hands: Hands) -> None:
    hands.state.adopt(SnapshotInfo(SnapshotKey("a", 1), 7, Path("session/a.g7/1"), 10), disk_bytes=100)
    assert len(hands.clean("a").lives) == 1 and hands.sweep() == [7]


# -- fetch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bring", [Hands.reserve, Hands.queue, Hands.write])
def test_7_what_was_fetched_takes_no_save_s_place(hands: Hands, bring: Callable[[Hands], Job]) -> None:
    """Neither that of one that is being copied, nor of one that waits, nor of one that is on disk."""
    job = bring(hands)
    life = hands.state.begin_fetch("a")
    assert hands.state.keep(life, job.key, 10, CONTENT) is None
    hands.state.end_fetch(life)
    assert bring is not Hands.reserve or hands.admit(job)
    assert hands.find() is not None and hands.now.cancelled == 0


def test_7_a_save_takes_the_place_of_what_was_fetched(hands: Hands) -> None:
    life = hands.state.begin_fetch("a")
    fetched = hands.state.keep(life, SnapshotKey("a", 1), 10, CONTENT)
    assert fetched is not None
    saved = hands.queue("a", 1)
    assert not hands.admit(fetched)
    hands.state.end_fetch(life)
    assert hands.find("a", 1) is saved and fetched.ticket.state is SaveState.CANCELLED


def test_10_what_was_fetched_and_kept_balances_and_is_cleaned_up_as_a_save_is(hands: Hands) -> None:
    life = hands.state.begin_fetch("a")
    fetched = hands.state.keep(life, SnapshotKey("a", 1), 10, CONTENT)
    assert fetched is not None and (hands.now.accepted, hands.now.pending_bytes) == (1, 10)
    assert hands.admit(fetched)
    hands.state.end_fetch(life)
    assert hands.claim() is fetched and hands.commit(fetched)
    assert (hands.now.committed, hands.now.pending, hands.now.live_snapshots) == (1, 0, 1)
    cleanup = hands.clean("a")
    assert (cleanup.removed, hands.sweep()) == (1, [life.generation])
    hands.state.freed(life.doomed_bytes)
    assert (hands.now.live_requests, hands.now.session_bytes, hands.now.trash_bytes) == (0, 0, 0)


def test_6_what_was_fetched_takes_no_room_before_a_save_that_waits_for_it(script: Script) -> None:
    hands = Hands(script.threads, max_pending_jobs=10, max_pending_bytes=100)
    job = hands.reserve("a", 1)
    turn = hands.state.queue_up(SnapshotKey("b", 1), 10_000, CONTENT)
    life = hands.state.begin_fetch("c")
    assert hands.state.keep(life, SnapshotKey("c", 1), 1, CONTENT) is None
    hands.state.leave(turn)
    fetched = hands.state.keep(life, SnapshotKey("c", 1), 1, CONTENT)
    assert fetched is not None
    for each in (job, fetched):
        hands.state.abandon(each, OSError("no more"))
    hands.state.end_fetch(life)


def test_9_a_life_keeps_nothing_of_what_was_detached(hands: Hands) -> None:
    hands.write("a", 1)
    hands.write("a", 2)
    life, _ = hands.hold("a", 1)
    hands.state.end_hold(life)
    assert set(life.newest) == {2}


def test_9_a_life_that_only_fetches_held_ends_with_the_last_of_them(hands: Hands) -> None:
    one, other = hands.state.begin_fetch("a"), hands.state.begin_fetch("a")
    assert one is other and hands.finds_nothing("a")
    hands.state.end_fetch(one)
    assert one.alive
    hands.state.end_fetch(other)
    assert not one.alive and hands.now.live_requests == 0 and hands.sweep() == []


class RemoteTier:
    """Keeps what the state tells it of lives from afar."""

    def __init__(self) -> None:
        self.lives: list[tuple[str, str]] = []

    def committed(self, job: Job, commit: Commit) -> None:
        pass

    def ended(self, request_ids: Sequence[str] | None) -> End:
        return End(recorded=True)

    def joined(self, key: SnapshotKey, life: str) -> None:
        self.lives.append((key.request_id, life))


def test_4_what_comes_from_afar_after_its_cleanup_is_of_no_remote_life(hands: Hands) -> None:
    hands.state.observer = tier = RemoteTier()
    late, life = hands.state.begin_fetch("late"), hands.state.begin_fetch("a")
    hands.clean("late")
    assert not hands.state.join(late, SnapshotKey("late", 1), "remote life")
    assert hands.state.join(life, SnapshotKey("a", 1), "remote life")
    hands.state.end_fetch(late)
    hands.state.end_fetch(life)
    assert tier.lives == [("a", "remote life")]


def test_4_a_cleanup_ends_what_is_on_its_way_from_afar(hands: Hands) -> None:
    life = hands.state.begin_fetch("a")
    hands.clean("a")
    assert not hands.state.join(life, SnapshotKey("a", 1), "remote life")
    assert hands.state.keep(life, SnapshotKey("a", 1), 10, CONTENT) is None
    hands.state.end_fetch(life)
    assert hands.now.live_requests == 0 and hands.now.accepted == 0
