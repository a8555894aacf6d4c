"""A world of its own for one run: threads that take turns at switching points, a clock, and a disk in memory.

Every lock, condition, event, future, thread and look at the clock that the store gets from ``world.threads``, and every
operation of ``world.files``, is a switching point: there a schedule says who goes on, whose time-out fires, or that the
operation fails. Between two of them nothing else runs, so a run is its schedule, and can be repeated.

Threads are greenlets. Time stands still but for time-outs that fire. A thread that is woken while its time-out fires
has used up the wake, as with ``threading.Condition``.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from snapstore._threads import Lock, Threads
from snapstore.testing._faults import OPERATIONS
from snapstore.testing._memory import MemoryFileSystem
from snapstore.testing._schedules import Point, Schedule

__all__ = ["DeadlockError", "Task", "World"]

T = TypeVar("T")

_POINTS_MAX = 100_000
_SURE_OPERATIONS = frozenset({"close", "lock", "resolve", "tells_mounts"})
"""Operations that no planted fault strikes."""


class DeadlockError(AssertionError):
    """Nobody can go on, and no time-out is left; or everybody goes on for ever."""


class Task(Generic[T]):
    """A thread of the world. ``wants``: what it waits for; ``None`` if it can go on."""

    __slots__ = (
        "_work",
        "_world",
        "deadline_s",
        "done",
        "error",
        "greenlet",
        "looked_at",
        "name",
        "number",
        "timed_out",
        "value",
        "wants",
        "where",
    )

    def __init__(self, world: World, number: int, name: str, work: Callable[[], T]) -> None:
        self._world = world
        self._work = work
        self.number = number
        self.name = name
        self.greenlet = greenlet(self._run, world.root)
        self.wants: Callable[[], bool] | None = None
        self.deadline_s: float | None = None
        self.timed_out = False
        self.where: tuple[object, ...] = ("start",)
        self.done = self.looked_at = False
        self.value: T | None = None
        self.error: BaseException | None = None

    def result(self) -> T:
        """Wait for its end: what it returned, or what it raised."""
        self._world.wait(lambda: self.done, None, "result of", self.name)
        self.looked_at = True
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self.value = self._work()
        except GreenletExit:
            pass
        except BaseException as error:  # noqa: BLE001 - for whoever asks for the result, else for the run
            self.error = error
        self.done = True


class World:
    """See the module's header. What the scenario of a run is given.

    Attributes:
        threads, files: for ``SnapshotStore(root, threads=world.threads, file_system=world.files)``.
        now_s: the time.
        stalls: how often nobody could go on until a time-out fired.
        faults: how many operations may still fail; 0 unless the scenario says otherwise.
        fault_numbers: with what.
        hanging: operations on the disk that hang as long as their names are in here.
        trace: what was done, if it is kept.
        checks: called after each operation on the disk, with its name; whatever they raise fails the run.
    """

    def __init__(self, schedule: Schedule, *, trace: list[str] | None = None) -> None:
        self.root = getcurrent()
        self.now_s = 1000.0
        self.stalls = 0
        self.faults = 0
        self.fault_numbers: Sequence[int] = ()
        self.hanging: set[str] = set()
        self.trace = trace
        self.checks: list[Callable[[str], object]] = []
        self.points = 0
        self.files = _Files(self)
        self.threads = Threads(
            monotonic_s=self._look_at_clock,
            lock=partial(_Lock, self),
            condition=partial(_Condition, self),
            event=partial(_Event, self),
            future=partial(_Future, self),
            thread=partial(_Thread, self),
            queue=partial(_Queue, self),
            this_thread=getcurrent,
        )
        self._schedule = schedule
        self._tasks: list[Task[Any]] = []
        self._running: Task[Any] | None = None
        self._calm = False
        self._over = False
        self._failure: BaseException | None = None

    # -- for scenarios ------------------------------------------------------------------------------------------

    def go(self, name: str, work: Callable[[], T]) -> Task[T]:
        """Run ``work`` beside everything else; what it raises is raised by ``result``, or fails the run."""
        task = self._add(name, work)
        self.switch("go", name)
        return task

    @contextmanager
    def calm(self) -> Iterator[None]:
        """Within, no schedule is asked: each goes on until it waits. At the end everybody waits."""
        before, self._calm = self._calm, True
        try:
            yield
            self.settle()
        finally:
            self._calm = before

    def settle(self) -> None:
        """Wait until everybody else waits."""
        me = self._running
        others = [task for task in self._tasks if task is not me]
        self.wait(lambda: not any(self._can_go_on(task) for task in others), None, "settle")

    # -- for what the store gets --------------------------------------------------------------------------------

    def switch(self, *where: object) -> None:
        """A switching point."""
        self.wait(None, None, *where)

    def switch_finely(self, *where: object) -> None:
        """One more, for schedules that are fine enough."""
        if self._schedule.fine:
            self.wait(None, None, *where)

    def wait(
        self,
        wants: Callable[[], bool] | None,
        timeout_s: float | None,
        *where: object,
        faults: Sequence[int] = (),
    ) -> bool:
        """A switching point, and on it a wait until ``wants`` says so. False: the time-out fired, or a fault is due."""
        me = self._running
        if me is None:
            return self._wait_outside(wants, timeout_s)
        if self._over or getcurrent() is not me.greenlet:
            raise GreenletExit
        if self._calm and (wants is None or wants()):
            self.points += 1
            me.where = where
            self._note(me)
            return True
        me.wants = wants
        me.deadline_s = None if timeout_s is None else self.now_s + max(0.0, timeout_s)
        me.timed_out = False
        me.where = where
        answer = self._ask(me, faults)
        if isinstance(answer, int):
            self._note(me, f" fails with {errno.errorcode[answer]}")
            raise OSError(answer, os.strerror(answer), str(where[-1]))
        if answer is not me:
            if answer is None:
                self.root.switch()
            else:
                self._running = answer
                answer.greenlet.switch()
        if self._over:
            raise GreenletExit
        self._note(me, " (its time-out fired)" if me.timed_out else "")
        me.wants = me.deadline_s = None
        return not me.timed_out

    def _wait_outside(self, wants: Callable[[], bool] | None, timeout_s: float | None) -> bool:
        """After the run, for who looks at what is left: every wait is over at once."""
        met = wants is None or wants()
        if not met and timeout_s is None:
            raise RuntimeError("this world is over: nobody will end that wait")
        self.now_s += 0.0 if met or timeout_s is None else timeout_s
        return met

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self, scenario: Callable[[World], object]) -> None:
        """All of it, until every thread has ended. Raises what the scenario raises, or ``DeadlockError``."""
        task: Task[Any] | None = self._add("main", partial(scenario, self))
        try:
            while task is not None:
                self._running = task
                task.greenlet.switch()
                self._raise_failure()
                answer = self._ask(None, ())
                assert not isinstance(answer, int)
                task = answer
            self._raise_failure()
        finally:
            self._end()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        for task in self._tasks:
            if task.error is not None and not task.looked_at and (task.number == 0 or self._all_done):
                raise task.error

    @property
    def _all_done(self) -> bool:
        return all(task.done for task in self._tasks)

    def _end(self) -> None:
        """Who has not ended by now is stopped where it is: whatever it asks of the world from here on ends it."""
        self._over = True
        for task in self._tasks:
            if not task.done:
                self._running = task
                task.greenlet.throw(GreenletExit)
                task.done = True
        self._running = None

    def _add(self, name: str, work: Callable[[], T]) -> Task[T]:
        if self._over:
            raise RuntimeError("this world is over")
        task = Task(self, len(self._tasks), name, work)
        self._tasks.append(task)
        return task

    def _can_go_on(self, task: Task[Any]) -> bool:
        return not task.done and (task.wants is None or task.wants())

    def _ask(self, me: Task[Any] | None, faults: Sequence[int]) -> Task[Any] | int | None:
        """Who goes on, or with what the operation fails. ``None``: nobody is left, or the run has failed."""
        point: Point[Task[Any]] = Point([], [], faults if self.faults > 0 else (), False)
        for task in self._tasks:
            if task.done:
                continue
            if task.wants is None or task.wants():
                point.add_ready(task, running=task is me)
            elif task.deadline_s is not None:
                point.timers.append(task)
        self.points += 1
        if self.points > _POINTS_MAX:
            self._fail(f"after {self.points} switching points it still goes on")
        elif point.ready or point.timers:
            point.timers.sort(key=_deadline)
            return self._answer(point)
        elif not self._all_done:
            self._fail("nobody can go on")
        return None

    def _answer(self, point: Point[Task[Any]]) -> Task[Any] | int:
        ready, timers = point.ready, point.timers
        self.stalls += not ready
        index = 0 if self._calm or point.answers == 1 else self._schedule.choose(point)
        if index < len(ready):
            return ready[index]
        index -= len(ready)
        if index < len(timers):
            task = timers[index]
            self.now_s = max(self.now_s, _deadline(task))
            task.timed_out = True
            task.wants = None
            return task
        self.faults -= 1
        return point.faults[index - len(timers)]

    def _fail(self, why: str) -> None:
        lines = [f"  {task.name}: {_words(task.where)}" for task in self._tasks if not task.done]
        self._failure = DeadlockError("\n".join([f"{why}:", *lines]))

    def fail(self, error: BaseException) -> None:
        """End the run here and now, whatever thread this is and whatever it would make of an error."""
        self._failure = self._failure or error
        if getcurrent() is not self.root:
            self.root.switch()
        raise GreenletExit

    def _note(self, task: Task[Any], what: str = "") -> None:
        if self.trace is not None:
            self.trace.append(f"{task.name}: {_words(task.where)}{what}")

    def _look_at_clock(self) -> float:
        if any(task.deadline_s is not None for task in self._tasks):
            self.switch_finely("clock")
        return self.now_s

    def make_thread(self, name: str, target: Callable[[], None]) -> Task[None]:
        """Start a thread of the store's own."""
        task = self._add(name, target)
        self.switch("start", name)
        return task

    @property
    def over(self) -> bool:
        """The run has ended: nothing switches any more."""
        return self._over


def _deadline(task: Task[Any]) -> float:
    assert task.deadline_s is not None
    return task.deadline_s


def _words(where: tuple[object, ...]) -> str:
    return " ".join(map(str, where))


class _Lock:
    def __init__(self, world: World) -> None:
        self._world = world
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not blocking:
            self._world.switch("try a lock")
            if self._held:
                return False
        elif not self._world.wait(self.is_free, None if timeout < 0 else timeout, "lock"):
            return False
        self._held = True
        return True

    def release(self) -> None:
        if not self._held and not self._world.over:
            raise RuntimeError("release of a lock that nobody holds")
        self._held = False
        if not self._world.over:
            self._world.switch_finely("unlock")

    def locked(self) -> bool:
        return self._held

    def is_free(self) -> bool:
        return not self._held

    def give_up(self) -> None:
        """``release`` for one who waits at once."""
        self._held = False

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _Waiter:
    __slots__ = ("woken",)

    def __init__(self) -> None:
        self.woken = False


class _Condition:
    def __init__(self, world: World, lock: Lock) -> None:
        assert isinstance(lock, _Lock)
        self._world = world
        self._lock = lock
        self._waiters: list[_Waiter] = []

    def wait(self, timeout: float | None = None) -> bool:
        self._check()
        waiter = _Waiter()
        self._waiters.append(waiter)
        self._lock.give_up()
        woken = self._world.wait(lambda: waiter.woken, timeout, "condition")
        self._lock.acquire()
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        return woken

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        deadline_s = None if timeout is None else self._world.now_s + timeout
        while not (met := predicate()):
            left_s = None if deadline_s is None else deadline_s - self._world.now_s
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
        return met

    def notify(self, n: int = 1) -> None:
        self._check()
        for waiter in self._waiters[:n]:
            waiter.woken = True
        del self._waiters[:n]

    def notify_all(self) -> None:
        self.notify(len(self._waiters))

    def _check(self) -> None:
        if not self._lock.locked():
            raise RuntimeError("the condition's lock is not held")


class _Event:
    def __init__(self, world: World) -> None:
        self._world = world
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._world.switch("set an event")
        self._set = True

    def wait(self, timeout: float | None = None) -> bool:
        self._world.wait(self.is_set, timeout, "event")
        return self._set


class _Future(Future[Any]):
    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def result(self, timeout: float | None = None) -> Any:
        self._world.wait(self.done, timeout, "result")
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._world.wait(self.done, timeout, "exception")
        return super().exception(0)

    def set_result(self, result: Any) -> None:
        self._world.switch("set a result")
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        self._world.switch("set an exception")
        super().set_exception(exception)


class _Queue:
    def __init__(self, world: World) -> None:
        self._world = world
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._world.switch("put")
        self._items.append(item)

    def get(self) -> Any:
        self._world.wait(lambda: bool(self._items), None, "get")
        return self._items.popleft()


class _Thread:
    def __init__(self, world: World, name: str, target: Callable[[], None]) -> None:
        self._world = world
        self._target = target
        self._task: Task[None] | None = None
        self.name = name

    def start(self) -> None:
        self._task = self._world.make_thread(self.name, self._target)

    def join(self, timeout: float | None = None) -> None:
        if self._task is None:
            raise RuntimeError("cannot join a thread that was not started")
        task = self._task
        self._world.wait(lambda: task.done, timeout, "join", self.name)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done


class _Files(MemoryFileSystem):
    """Every operation is a switching point, then one step."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def at(self, operation: str, subject: object) -> None:
        faults = () if operation in _SURE_OPERATIONS else self._world.fault_numbers
        self._world.wait(
            lambda: operation not in self._world.hanging, None, operation, subject, faults=faults
        )

    def look(self, operation: str) -> None:
        try:
            for check in self._world.checks:
                check(operation)
        except AssertionError as error:
            self._world.fail(error)


def _switching(operation: str) -> Callable[..., Any]:
    perform = getattr(MemoryFileSystem, operation)

    def switching(self: _Files, *args: Any, **options: Any) -> Any:
        self.at(operation, args[0] if args else "")
        result = perform(self, *args, **options)
        self.look(operation)
        return result

    return switching


for _operation in OPERATIONS:
    setattr(_Files, _operation, _switching(_operation))
