"""Run a scenario in many schedules, and say how to repeat the one that failed.

    def saves_against_cleanups(world):
        with world.calm():
            store = SnapshotStore("/root", threads=world.threads, file_system=world.files)
        saver = world.go("saver", lambda: store.save("request-1", 64, tensors))
        store.cleanup_request("request-1")
        saver.result()
        with world.calm():
            assert store.shutdown().writer_stopped

    explore(saves_against_cleanups, range(1000))                   # by seeds, with priorities
    explore_all(saves_against_cleanups, deviations=1)              # all that deviate so often from the plainest one
    replay(saves_against_cleanups, "seed 17")                      # or "12:1 40:2", as a ``ScheduleError`` says

Needs greenlet. One scenario at a time, on one thread; a scenario is run again and again, so it makes all that it uses.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from snapstore.testing._schedules import Guided, Noted, Schedule, in_words, schedule_of
from snapstore.testing._world import World

__all__ = ["ScheduleError", "explore", "explore_all", "replay"]

Scenario = Callable[[World], object]

_COLLECT_EVERY = 200
_SHOWN = 120


class ScheduleError(AssertionError):
    """A schedule that failed; its cause is what the scenario raised.

    Attributes:
        schedule: for ``replay``: the points where the plainest answer was not taken.
        found_by: ``seed 17``, or the same.
        tried: how many schedules it took.
    """

    def __init__(
        self, name: str, schedule: str, found_by: str, tried: int, trace: Sequence[str], error: BaseException
    ) -> None:
        shown = "\n".join(f"  {line}" for line in trace[-_SHOWN:])
        super().__init__(
            f"{name} fails at schedule {tried} ({found_by}): {type(error).__name__}: {error}\n"
            f"what was done, the last of {len(trace)} steps:\n{shown}\nreplay it with {schedule!r}"
        )
        self.schedule = schedule
        self.found_by = found_by
        self.tried = tried


def explore(scenario: Scenario, seeds: Iterable[int]) -> int:
    """One schedule a seed; how many that was. Raises ``ScheduleError`` at the first that fails."""
    tried = 0
    with _quiet():
        for seed in seeds:
            tried += 1
            _run(scenario, schedule_of(f"seed {seed}"), f"seed {seed}", tried)
    return tried


def explore_all(scenario: Scenario, *, deviations: int, at_most: int | None = None) -> int:
    """Every schedule with so many deviations from the plainest one, in which each goes on until it waits.

    A deviation is a switch, a time-out that fires while somebody could go on, or a fault. How many schedules that was,
    ``at_most`` so many. Raises ``ScheduleError`` at the first that fails.
    """
    tried = 0
    level: list[tuple[tuple[int, int], ...]] = [()]
    with _quiet():
        for depth in range(deviations + 1):
            following: list[tuple[tuple[int, int], ...]] = []
            for path in level:
                if at_most is not None and tried >= at_most:
                    return tried
                tried += 1
                guided = Guided(path)
                _run(scenario, guided, in_words(path), tried)
                if depth < deviations:
                    following += [
                        (*path, (point, answer))
                        for point, answers in guided.branches
                        for answer in range(1, answers)
                    ]
            level = following
    return tried


def replay(scenario: Scenario, schedule: str) -> None:
    """One schedule, by its seed or its deviations. Raises ``ScheduleError`` if it fails."""
    with _quiet():
        _run(scenario, schedule_of(schedule), schedule, 1)


def _run(scenario: Scenario, schedule: Schedule, name: str, tried: int) -> None:
    noted = Noted(schedule)
    try:
        World(noted).run(scenario)
    except Exception as error:
        deviations = in_words(noted.deviations, fine=noted.fine)
        trace = _trace(scenario, deviations)
        title = getattr(scenario, "__name__", str(scenario))
        raise ScheduleError(title, deviations, name or "the plainest", tried, trace, error) from error
    if tried % _COLLECT_EVERY == 0:
        gc.collect()


def _trace(scenario: Scenario, deviations: str) -> list[str]:
    """The same once more, written down."""
    trace: list[str] = []
    try:
        World(schedule_of(deviations), trace=trace).run(scenario)
    except Exception:  # noqa: BLE001 - it is known already
        return trace
    return [*trace, "(and this time it did not fail: the scenario does more than its schedule says)"]


@contextmanager
def _quiet() -> Iterator[None]:
    """No collection in the middle of a run, where a finalizer would switch; no log, which runs fill by the thousand."""
    collects, disabled = gc.isenabled(), logging.root.manager.disable
    gc.disable()
    logging.disable()
    try:
        yield
    finally:
        logging.disable(disabled)
        if collects:
            gc.enable()
        gc.collect()
