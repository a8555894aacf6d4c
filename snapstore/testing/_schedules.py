"""Who goes on at each switching point: by a seed, or by a list of the points where the first answer is not taken."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Point(Generic[T]):
    """A switching point. Its answers are numbered: first ``ready``, then ``timers``, then ``faults``.

    Attributes:
        ready: tasks that can go on, the running one first if it can.
        timers: tasks whose time-out may fire, the earliest first.
        faults: numbers of errors with which the operation that comes now may fail.
        stays: the running task can go on.
    """

    ready: list[T]
    timers: list[T]
    faults: Sequence[int]
    stays: bool

    def add_ready(self, task: T, *, running: bool) -> None:
        """One more that can go on."""
        if running:
            self.stays = True
            self.ready.insert(0, task)
        else:
            self.ready.append(task)

    @property
    def answers(self) -> int:
        return len(self.ready) + len(self.timers) + len(self.faults)


class Schedule(Protocol):
    """What a run asks at each of its switching points.

    Attributes:
        fine: also where the clock is looked at, and where a lock is let go.
    """

    fine: bool

    def choose(self, point: Point[Any]) -> int:
        """The number of an answer. The first lets the running task go on, if it can."""


class Seeded:
    """Tasks have priorities, which change at a few points (PCT), or each point is a throw of the dice.

    How often, and how readily time-outs fire and operations fail, is drawn once from the seed.
    """

    def __init__(self, seed: int) -> None:
        self._random = draw = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        horizon = int(2 ** draw.uniform(4, 10))
        self._changes = {draw.randrange(horizon) for _ in range(draw.randrange(6))}
        self._restless = draw.choice((0.0, 0.0, 0.02, 0.2))
        self._impatience = draw.choice((0.0, 0.005, 0.05))
        self._breakage = draw.choice((0.01, 0.05))
        self.fine = draw.random() < 0.5
        self._priorities: dict[Hashable, float] = {}
        self._points = 0

    def choose(self, point: Point[Any]) -> int:
        """See ``Schedule``."""
        self._points += 1
        chance = self._random.random
        ready, timers = point.ready, point.timers
        if point.faults and chance() < self._breakage:
            return len(ready) + len(timers) + self._random.randrange(len(point.faults))
        if timers and (not ready or (self._impatience and chance() < self._impatience)):
            return len(ready) + self._random.randrange(len(timers))
        if len(ready) == 1:
            return 0
        if self._restless:
            stays = point.stays and chance() >= self._restless
            return 0 if stays else self._random.randrange(len(ready))
        return self._highest(point)

    def _highest(self, point: Point[Any]) -> int:
        priorities = self._priorities
        for task in point.ready:
            if task not in priorities:
                priorities[task] = self._random.random()
        if point.stays and self._points in self._changes:
            priorities[point.ready[0]] = -self._points
        return max(range(len(point.ready)), key=lambda index: priorities[point.ready[index]])


class Guided:
    """The first answer everywhere but at these points. Remembers how many answers the points after them had."""

    def __init__(self, deviations: Sequence[tuple[int, int]] = (), *, fine: bool = False) -> None:
        self.fine = fine
        self._deviations = dict(deviations)
        self._last = max(self._deviations, default=-1)
        self._points = -1
        self.branches: list[tuple[int, int]] = []
        """Points after the last deviation, and the number of answers there."""

    def choose(self, point: Point[Any]) -> int:
        """See ``Schedule``."""
        self._points += 1
        if self._points <= self._last:
            return min(self._deviations.get(self._points, 0), point.answers - 1)
        self.branches.append((self._points, point.answers))
        return 0


class Noted:
    """Another schedule, and which of its answers were not the first."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.fine = schedule.fine
        self._points = -1
        self.deviations: list[tuple[int, int]] = []

    def choose(self, point: Point[Any]) -> int:
        """See ``Schedule``."""
        self._points += 1
        answer = self._schedule.choose(point)
        if answer:
            self.deviations.append((self._points, answer))
        return answer


def schedule_of(text: str) -> Schedule:
    """From ``seed 17``, or from deviations as ``12:1 40:2``, or ``fine 12:1 40:2``; the empty text has none."""
    if text.startswith("seed "):
        return Seeded(int(text.removeprefix("seed ")))
    fine = text.startswith("fine")
    pairs = (each.split(":") for each in text.removeprefix("fine").split())
    return Guided([(int(point), int(answer)) for point, answer in pairs], fine=fine)


def in_words(deviations: Sequence[tuple[int, int]], *, fine: bool = False) -> str:
    """What ``schedule_of`` reads."""
    return " ".join([*["fine"] * fine, *(f"{point}:{answer}" for point, answer in deviations)])
