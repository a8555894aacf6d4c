"""The decisions behind device copies, without a thread or a device: which bytes go where, and who ends a save."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapstore import StoreOptions
from snapstore._device import Block
from snapstore._device_records import Part, Submission, Verdict
from snapstore._flights import Flights
from snapstore._format import Layout, TensorSpec
from snapstore._memory import BufferPool, HostImage, segments_of
from snapstore._pinned import HostBuffer, pageable
from snapstore._placing import moves_of
from snapstore._records import Content, Job
from snapstore._state import State
from snapstore._threads import Threads
from snapstore._types import SnapshotKey
from snapstore.testing import FakeDevice

KEY = SnapshotKey("request", 64)


@pytest.fixture
def state() -> State:
    return State(StoreOptions(), Threads())


def job_of(state: State, count: int = 64, nbytes: int = 8) -> Job:
    return state.reserve(SnapshotKey("request", count), nbytes, Content("numpy", "null"))


def image_of(layout: Layout, buffer: HostBuffer) -> HostImage:
    return HostImage(layout, lambda: segments_of(layout, buffer.view))


def layout_of(sizes: Sequence[int]) -> Layout:
    return Layout.of(TensorSpec(str(number), "U8", (size,)) for number, size in enumerate(sizes))


# -- which bytes go where -------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12)


class Cut(HostBuffer):
    """Memory that must be copied to in pieces of at most seven bytes."""

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        while begin < end:
            cut = min(end, begin - begin % 7 + 7)
            yield self.view[begin:cut]
            begin = cut


@settings(max_examples=300)
@given(
    sizes=SIZES,
    homes=st.lists(st.booleans(), min_size=12, max_size=12),
    grain=st.integers(1, 60),
    cut=st.booleans(),
)
def test_moves_bring_every_byte_of_a_part_to_its_place_and_touch_no_other(
    sizes: list[int], homes: list[bool], grain: int, cut: bool
) -> None:
    layout = layout_of(sizes)
    whole = np.random.default_rng(0).integers(1, 255, layout.nbytes, dtype=np.uint8)
    target = bytearray(layout.nbytes)
    buffer = (Cut if cut else HostBuffer)(memoryview(target), lambda: None)
    indices = [index for index in layout.file_order if homes[index]]
    mine = np.concatenate([np.zeros(0, np.uint8), *(place(layout, whole, index) for index in indices)])
    blocks = [Block(mine[at : at + grain], len(mine[at : at + grain])) for at in range(0, len(mine), grain)]
    for move in moves_of(blocks, indices, layout, buffer):
        assert len(move.target) > 0
        move.target[:] = move.data[move.offset : move.offset + len(move.target)].data
    for index in range(len(sizes)):
        expected = place(layout, whole, index) if homes[index] else np.zeros(sizes[index], np.uint8)
        assert place(layout, np.frombuffer(bytes(target), np.uint8), index).tobytes() == expected.tobytes()


def place(layout: Layout, data: np.ndarray, index: int) -> np.ndarray:
    return data[layout.offsets[index] : layout.offsets[index] + layout.sizes[index]]


def test_a_snapshot_of_one_device_is_one_move() -> None:
    layout = layout_of([8] * 1000)
    buffer = pageable(BufferPool(0), layout.nbytes)
    assert len(list(moves_of([Block(None, 8000)], layout.file_order, layout, buffer))) == 1


# -- what is listed, and who waits ----------------------------------------------------------------------------------


def test_a_key_is_listed_from_when_its_copy_is_in_other_hands(state: State) -> None:
    job = job_of(state)
    assert not state.has(KEY) and state.boundaries("request") == ()
    state.on_its_way(job)
    assert state.has(KEY) and state.boundaries("request") == (64,)
    started_s = time.monotonic()
    with pytest.raises(TimeoutError, match="on its way"):
        state.find(KEY, 0.05)
    assert 0.05 <= time.monotonic() - started_s < 0.5
    state.abandon(job, RuntimeError("no"))
    assert not state.has(KEY) and state.boundaries("request") == ()


def test_a_settled_job_is_released_by_whoever_reads_its_sources_not_by_the_state(state: State) -> None:
    job = job_of(state)
    state.on_its_way(job)
    state.abandon(job, RuntimeError("no"))
    assert job.ticket.done() and not job.ticket.released


# -- who ends a save ------------------------------------------------------------------------------------------------


class Hands:
    """Flights with their verdicts carried out, and what became of each submission."""

    def __init__(self, state: State, timeout_s: float = 60.0, count: int = 2) -> None:
        self.state = state
        self.flights = Flights(timeout_s, Threads())
        self.devices = [FakeDevice(f"fake:{number}") for number in range(count)]
        self.lanes = [self.flights.lane(device) for device in self.devices]
        self.given_back: list[Submission] = []
        self.over: list[Part] = []
        self.count = 0

    def submit(self, *numbers: int, gathers: bool = False) -> Submission:
        self.count += 1
        job = job_of(self.state, self.count)
        self.state.on_its_way(job)
        layout = layout_of([4] * len(numbers))
        submission = Submission(
            job, layout, HostBuffer(memoryview(bytearray(4 * len(numbers))), lambda: None)
        )
        for index, number in enumerate(numbers):
            block = Block(object(), 4)
            submission.parts.append(Part(submission, self.devices[number], [index], [block], None, gathers))
        assert self.flights.submit(submission) is None
        return submission

    def act(self, verdict: Verdict) -> None:
        self.over += verdict.over
        for submission in verdict.admit:
            self.state.admit(submission.job, image_of(submission.layout, submission.buffer))
        for submission, error in verdict.abandon:
            self.state.abandon(submission.job, error)
        self.given_back += [each for each in verdict.at_rest if each not in verdict.admit]

    def start(self, number: int) -> Part | None:
        part, verdict = self.flights.take(self.lanes[number])
        self.act(verdict)
        return part

    def land(self, number: int) -> None:
        self.act(self.flights.landed(self.lanes[number]))

    def flying(self, number: int) -> bool:
        return self.flights.oldest(self.lanes[number])[0] is not None


def test_a_save_is_admitted_when_its_last_part_has_landed(state: State) -> None:
    hands = Hands(state)
    submission = hands.submit(0, 1)
    hands.start(0), hands.start(1)
    hands.land(1)
    assert not submission.ended and state.published.pending == 1
    hands.land(0)
    assert submission.ended and submission.job.image is not None


def test_a_loss_ends_what_the_device_had_and_drops_what_others_have_not_begun(state: State) -> None:
    hands = Hands(state)
    both, mine, theirs = hands.submit(0, 1), hands.submit(0), hands.submit(1)
    hands.start(0)
    hands.act(hands.flights.lose(hands.lanes[0], RuntimeError("gone")))
    assert both.ended and mine.ended and not theirs.ended
    assert both.parts_left == 1, "it flew, so it is kept"
    assert hands.given_back == [mine]
    assert hands.start(1) is theirs.parts[0]
    unfit = hands.flights.unfit(hands.devices)
    assert unfit is not None and (unfit.device, unfit.status) == (hands.devices[0], "lost")
    assert hands.flights.published.leaked_bytes == 8 + 4


def test_what_its_caller_s_stream_gathers_is_kept_until_it_has(state: State) -> None:
    hands = Hands(state)
    gathering, lent = hands.submit(0, gathers=True), hands.submit(0)
    hands.act(hands.flights.give_up(TimeoutError("the end")))
    assert gathering.ended and lent.ended and hands.given_back == [lent]
    assert hands.flights.published.leaked_bytes == 4 + 4
    assert hands.start(0) is None and hands.flying(0)
    assert hands.flights.published.leaked_bytes == 4 + 4
    hands.land(0)
    assert hands.given_back == [lent, gathering] and hands.flights.published.leaked_bytes == 0


def test_nothing_is_handed_over_to_a_lane_that_is_lost(state: State) -> None:
    hands = Hands(state)
    hands.act(hands.flights.lose(hands.lanes[1], RuntimeError("gone")))
    job = job_of(state, 9)
    submission = Submission(job, layout_of([4]), HostBuffer(memoryview(bytearray(4)), lambda: None))
    submission.parts = [Part(submission, device, [0], [], None) for device in hands.devices]
    unfit = hands.flights.submit(submission)
    assert unfit is not None and (unfit.device, unfit.status) == (hands.devices[1], "lost")
    assert not submission.handed_over and hands.start(0) is None


def test_why_a_device_took_nothing_stays_what_it_was_when_the_device_recovers(state: State) -> None:
    hands = Hands(state, timeout_s=0.0)
    hands.submit(0)
    hands.start(0)
    verdict = hands.flights.await_overdue()
    assert verdict is not None
    hands.act(verdict)
    unfit = hands.flights.unfit(hands.devices[:1])
    hands.land(0)
    assert hands.lanes[0].status == "ok"
    assert unfit is not None and unfit.status == "stuck" and isinstance(unfit.error, TimeoutError)


@pytest.mark.parametrize("seed", range(20))
def test_however_it_goes_each_save_ends_once_and_all_memory_comes_back(state: State, seed: int) -> None:
    """Random starts, landings, time-outs, cleanups, drains and recoveries over three devices."""
    chance = random.Random(seed)
    hands = Hands(state, timeout_s=0.0, count=3)
    made: list[Submission] = []
    for _ in range(120):
        number, turn = chance.randrange(3), chance.random()
        if turn < 0.35 and hands.flights.unfit(hands.devices) is None:
            made.append(
                hands.submit(*chance.sample(range(3), chance.randint(1, 3)), gathers=chance.random() < 0.5)
            )
        elif turn < 0.6:
            hands.start(number)
        elif turn < 0.85 and hands.flying(number):
            hands.land(number)
        elif turn < 0.9 and any(lane.busy and lane.status == "ok" for lane in hands.lanes):
            verdict = hands.flights.await_overdue()
            assert verdict is not None
            hands.act(verdict)
        elif turn < 0.95:
            hands.act(hands.flights.drop_waiting(hands.flights.fence("request"), TimeoutError("back")))
        else:
            state.begin_cleanup(["request"])
    hands.act(hands.flights.give_up(TimeoutError("the end")))
    for number in range(3):
        assert hands.start(number) is None, "nothing is asked for any more"
        while hands.flying(number):
            hands.land(number)
    published = state.published
    assert all(each.ended and each.parts_left == 0 for each in made)
    assert len(hands.over) == sum(len(each.parts) for each in made) == len(set(map(id, hands.over)))
    admitted = [each for each in made if each not in hands.given_back]
    assert len(hands.given_back) == len(set(map(id, hands.given_back)))
    assert published.accepted == len(made)
    assert published.failed + published.cancelled + published.pending == len(made)
    assert published.pending <= len(admitted)
    assert hands.flights.published.leaked_bytes == 0 and hands.flights.published.on_their_way == 0


def test_the_watch_sleeps_while_no_device_is_busy(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told to wait without a limit, and nobody but new work wakes it."""
    hands = Hands(state)
    waits: list[Any] = []

    class Ended(Exception):
        pass

    def wait(timeout_s: float | None = None) -> None:
        waits.append(timeout_s)
        if len(waits) == 2:
            raise Ended
        hands.lanes[0].since_s = time.monotonic()
        hands.lanes[0].landings.append(object())  # type: ignore[arg-type]

    monkeypatch.setattr(hands.flights, "_watch", type("Bell", (), {"wait": staticmethod(wait)})())
    with pytest.raises(Ended):
        hands.flights.await_overdue()
    assert waits[0] is None and 59 < waits[1] <= 60
