"""The explorer itself: it finds what is wrong, says which schedule did it, and that schedule does it again."""

from __future__ import annotations

import errno
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from snapstore import SnapshotStore, StoreOptions
from snapstore.testing import DeadlockError, ScheduleError, World, explore, explore_all, replay

Scenario = Callable[[World], None]

SEEDS = range(300)


def failing(scenario: Scenario) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        explore(scenario, SEEDS)
    return caught.value


# -- what it finds --------------------------------------------------------------------------------------------------


def a_lost_update(world: World) -> None:
    lock = world.threads.lock()
    total = 0

    def add() -> None:
        nonlocal total
        with lock:
            seen = total
        with lock:
            total = seen + 1

    adders = [world.go(f"adder {number}", add) for number in range(2)]
    for adder in adders:
        adder.result()
    assert total == 2


def no_lost_update(world: World) -> None:
    lock = world.threads.lock()
    total = 0

    def add() -> None:
        nonlocal total
        with lock:
            seen = total
            world.switch("in the middle")
            total = seen + 1

    adders = [world.go(f"adder {number}", add) for number in range(2)]
    for adder in adders:
        adder.result()
    assert total == 2


def two_locks_in_two_orders(world: World) -> None:
    first, second = world.threads.lock(), world.threads.lock()

    def take(one: object, other: object) -> None:
        with one, other:  # type: ignore[attr-defined]
            pass

    tasks = [world.go("here", lambda: take(first, second)), world.go("there", lambda: take(second, first))]
    for task in tasks:
        task.result()


def a_wake_before_the_wait(world: World) -> None:
    lock = world.threads.lock()
    bell = world.threads.condition(lock)

    def ring() -> None:
        with lock:
            bell.notify()

    ringer = world.go("ringer", ring)
    with lock:
        bell.wait()
    ringer.result()


def test_a_lost_update_is_found_and_repeated_by_its_seed_and_by_its_deviations() -> None:
    error = failing(a_lost_update)
    assert error.found_by.startswith("seed ") and error.found_by in str(error)
    for schedule in (error.found_by, error.schedule):
        with pytest.raises(ScheduleError, match="a_lost_update fails at schedule 1"):
            replay(a_lost_update, schedule)


def test_what_is_right_passes_in_every_schedule() -> None:
    assert explore(no_lost_update, SEEDS) == len(SEEDS)
    assert explore_all(no_lost_update, deviations=3) > 50


def test_a_lost_update_needs_one_deviation() -> None:
    assert explore_all(a_lost_update, deviations=0) == 1
    with pytest.raises(ScheduleError) as caught:
        explore_all(a_lost_update, deviations=1)
    assert len(caught.value.schedule.split()) == 1
    with pytest.raises(ScheduleError):
        replay(a_lost_update, caught.value.schedule)


@pytest.mark.parametrize("scenario", [two_locks_in_two_orders, a_wake_before_the_wait])
def test_a_deadlock_is_found_and_says_who_waits_for_what(scenario: Scenario) -> None:
    error = failing(scenario)
    assert isinstance(error.__cause__, DeadlockError)
    assert "nobody can go on" in str(error) and "main: " in str(error)


def test_the_last_steps_are_told() -> None:
    error = failing(a_lost_update)
    assert "what was done" in str(error) and "adder 0: lock" in str(error) and "replay it with" in str(error)


def test_who_goes_on_for_ever_is_stopped() -> None:
    def for_ever(world: World) -> None:
        while True:
            world.switch("again")

    with pytest.raises(ScheduleError, match="it still goes on"):
        explore(for_ever, [1])


def test_what_a_task_raises_is_raised_though_nobody_asks_for_it() -> None:
    def careless(world: World) -> None:
        world.go("task", lambda: math.sqrt(-1))

    with pytest.raises(ScheduleError, match="ValueError"):
        explore(careless, [1])


def test_a_task_that_fails_and_is_asked_fails_whoever_asked() -> None:
    def careful(world: World) -> None:
        task = world.go("task", lambda: math.sqrt(-1))
        with pytest.raises(ValueError, match=r"math domain|nonnegative"):
            task.result()

    assert explore(careful, SEEDS) == len(SEEDS)


# -- time, faults ---------------------------------------------------------------------------------------------------


def test_a_time_out_fires_in_some_schedules_and_moves_the_clock() -> None:
    seen: Counter[tuple[bool, float]] = Counter()

    def patient(world: World) -> None:
        event = world.threads.event()
        setter = world.go("setter", event.set)
        began_s = world.threads.monotonic_s()
        met = event.wait(2.0)
        seen[met, world.threads.monotonic_s() - began_s] += 1
        setter.result()

    explore(patient, SEEDS)
    assert set(seen) == {(True, 0.0), (False, 2.0)}


def test_a_time_out_fires_when_nothing_else_can_happen() -> None:
    def alone(world: World) -> None:
        assert world.threads.event().wait(3.0) is False
        assert not world.threads.lock().locked()

    assert explore(alone, range(20)) == 20


def test_who_has_given_up_may_take_the_only_wake() -> None:
    """As with ``threading.Condition``: one wake, for two who wait, of whom one has a time-out."""
    slept: set[bool] = set()

    def one_wake(world: World) -> None:
        lock = world.threads.lock()
        bell = world.threads.condition(lock)
        waiting = [0]

        def wait(timeout_s: float | None) -> bool:
            with lock:
                waiting[0] += 1
                return bell.wait(timeout_s)

        hasty = world.go("hasty", lambda: wait(1.0))
        world.wait(lambda: waiting[0] == 1, None, "the hasty one waits")
        patient = world.go("patient", lambda: wait(5.0))
        world.wait(lambda: waiting[0] == 2, None, "both wait")
        with lock:
            bell.notify()
        told = hasty.result(), patient.result()
        slept.add(any(told))

    explore(one_wake, SEEDS)
    assert slept == {True, False}


def test_each_operation_of_the_disk_may_fail_once() -> None:
    failed: Counter[int | None] = Counter()

    def make(world: World) -> None:
        world.fault_numbers, world.faults = (errno.EIO, errno.ENOSPC), 1
        numbers: list[int | None] = []
        for path in ("/one", "/two"):
            try:
                world.files.make_directory(path)
            except OSError as error:
                numbers.append(error.errno)
        assert len(numbers) <= 1
        failed.update(numbers or [None])

    assert explore_all(make, deviations=1) == 1 + 2 * 2
    assert failed == {None: 1, errno.EIO: 2, errno.ENOSPC: 2}


# -- with a store ---------------------------------------------------------------------------------------------------


def test_a_store_runs_in_a_world_and_can_be_looked_at_after() -> None:
    seen: list[SnapshotStore] = []

    def use(world: World) -> None:
        with world.calm():
            store = SnapshotStore("/root", StoreOptions(), threads=world.threads, file_system=world.files)
        ticket = store.save("a", 1, {"x": np.arange(3)})
        assert ticket.result(None).key.token_count == 1
        assert store.load("a", 1).tensors["x"].tolist() == [0, 1, 2]
        assert store.shutdown(cleanup=True).session_removed or world.now_s > 1000.0
        seen.append(store)

    assert explore(use, range(50)) == 50
    assert {store.stats().committed for store in seen} == {1}


def test_a_store_that_is_left_open_fails_the_run() -> None:
    kept: list[SnapshotStore] = []

    def leave(world: World) -> None:
        kept.append(SnapshotStore("/root", threads=world.threads, file_system=world.files))

    with pytest.raises(ScheduleError, match="snapstore-writer: condition"):
        explore(leave, [1])


def test_the_same_seed_makes_the_same_steps() -> None:
    steps: list[list[str]] = []

    def note(world: World) -> None:
        with world.calm():
            store = SnapshotStore("/root", threads=world.threads, file_system=world.files)
        world.trace = trace = []
        saver = world.go("saver", lambda: store.save("a", 1, {"x": np.arange(3)}))
        store.cleanup_all(timeout_s=1.0)
        saver.result()
        store.shutdown(cleanup=True)
        steps.append([step.partition("/")[0] for step in trace])

    for seed in range(20):
        explore(note, [seed, seed])
        assert steps[-1] == steps[-2] and len(steps[-1]) > 30
    assert len({tuple(each) for each in steps}) > 5
