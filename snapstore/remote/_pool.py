"""The transfer threads: what somebody waits for goes first, uploads last, and bytes in flight are bounded.

ask        somebody waits for the answer; fails at once while the breaker is open
end        a cleanup's remote end; tried again until it is carried out
local      work for the local disk alone, whatever the remote store does
upload     tried again until it is done; on at most half of the threads
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from snapstore._errors import RemoteUnavailableError
from snapstore._threads import Condition, Threads
from snapstore.remote._breaker import Breaker
from snapstore.remote._objects import RemoteFailure


class Kind(enum.IntEnum):
    """In the order in which they go."""

    ASK = 0
    END = 1
    LOCAL = 2
    UPLOAD = 3


@dataclass(slots=True, eq=False)
class Task:
    """Work for a transfer thread. ``failed`` hears of whatever ``work`` raises, unless it is to be tried again."""

    kind: Kind
    work: Callable[[], None]
    failed: Callable[[BaseException], None]
    nbytes: int = 0
    of: object = None

    @property
    def lasting(self) -> bool:
        """Tried again when the remote store fails."""
        return self.kind in (Kind.END, Kind.UPLOAD)


class Pool:
    """The threads, and the breaker that they share.

    Args:
        threads: how many.
        max_bytes: of uploads under way at once; a larger one goes alone.
        ping: asks the remote store for a sign of life; raises if there is none.
        told: hears of each failure, and of ``None`` when it works again.
    """

    def __init__(
        self,
        threads: int,
        max_bytes: int,
        ping: Callable[[], None],
        told: Callable[[BaseException | None], None],
        made_by: Threads,
    ) -> None:
        self.threads = made_by
        self._lock = made_by.lock()
        self._idle: list[Condition] = []
        self._settled = made_by.condition(self._lock)
        self._waiting: dict[Kind, deque[Task]] = {kind: deque() for kind in Kind}
        self._running: dict[Task, None] = {}
        self._breaker = Breaker(made_by.monotonic_s)
        self._max_bytes = max_bytes
        self._most_uploads = max(1, threads // 2)
        self._ping = ping
        self._started = False
        self._told = told
        self._opened = False
        self._closing = False
        self._threads = [
            made_by.thread(f"snapstore-remote-{index + 1}", self._serve) for index in range(threads)
        ]

    def start(self) -> None:
        """Start the threads; the first of them pings."""
        self._started = True
        for thread in self._threads:
            thread.start()

    def put(self, task: Task) -> None:
        """Have it done. Never blocks."""
        with self._lock:
            refused = self._closing or (task.kind is Kind.ASK and self._opened and not self._breaker.closed)
            if not refused:
                self._waiting[task.kind].append(task)
                self._wake_one_locked()
            error = self._unavailable_locked()
        if refused:
            task.failed(error)

    def take_back(self, wanted: Callable[[Task], bool]) -> list[Task]:
        """What has not begun, and goes no more."""
        with self._lock:
            return [task for kind in Kind for task in self._take_back_locked(kind, wanted)]

    def await_idle(self, deadline_s: float) -> bool:
        """Wait until nothing lasting is left, or the remote store does not answer."""
        with self._lock:
            self._settled.wait_for(
                lambda: not self._lasting_locked() or (self._opened and not self._breaker.closed),
                max(0.0, deadline_s - self.threads.monotonic_s()),
            )
            return not self._lasting_locked()

    def close(self) -> None:
        """Take nothing more, begin nothing more. What is asked fails. Never blocks."""
        with self._lock:
            self._closing = True
            dropped = [task for kind in Kind for task in self._take_back_locked(kind, lambda _: True)]
            error = self._unavailable_locked()
            self._wake_all_locked()
        for task in dropped:
            task.failed(error)

    def join(self, deadline_s: float) -> bool:
        """Wait for the threads; False if one is still in a request."""
        for thread in self._threads:
            if self._started:
                thread.join(max(0.0, deadline_s - self.threads.monotonic_s()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def opened(self) -> bool:
        """The remote store has answered once."""
        return self._opened

    @property
    def reachable(self) -> bool:
        """The breaker is closed. Read without the lock."""
        return self._breaker.closed

    @property
    def error(self) -> str | None:
        """The last failure, while it counts."""
        return self._breaker.error

    @property
    def in_flight_bytes(self) -> int:
        """Of what is under way now."""
        return sum(task.nbytes for task in tuple(self._running))

    # -- the threads --------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        woken = self.threads.condition(self._lock)
        while self._serve_one(woken):
            pass

    def _serve_one(self, woken: Condition) -> bool:
        """A function of its own, so that an idle thread keeps nothing of the last task alive."""
        task = self._take(woken)
        if task is None:
            return False
        try:
            task.work()
        except RemoteFailure as error:
            self._note_failure(task, error)
        except BaseException as error:  # noqa: BLE001 - a thread's top: the error is the task's
            self._over(task)
            task.failed(error)
        else:
            self._over(task, worked=task.kind is not Kind.LOCAL)
        return True

    def _take(self, woken: Condition) -> Task | None:
        """The next task, running from here on; ``None``: the end."""
        with self._lock:
            while not self._closing:
                task = self._next_locked()
                if task is not None:
                    self._running[task] = None
                    if any(self._waiting.values()):
                        self._wake_one_locked()
                    return task
                self._idle.append(woken)
                woken.wait(self._breaker.ping_due_s)
                if woken in self._idle:
                    self._idle.remove(woken)
            return None

    def _next_locked(self) -> Task | None:
        if self._breaker.ping_due_s == 0.0:
            self._breaker.begin_ping()
            return Task(Kind.ASK, self._pinging, lambda _: None)
        local = self._waiting[Kind.LOCAL]
        if local:
            return local.popleft()
        if not self._breaker.closed:
            return None
        for kind in (Kind.ASK, Kind.END):
            if self._waiting[kind]:
                return self._waiting[kind].popleft()
        uploads = self._waiting[Kind.UPLOAD]
        return uploads.popleft() if uploads and self._may_upload_locked(uploads[0]) else None

    def _may_upload_locked(self, task: Task) -> bool:
        under_way = [each for each in self._running if each.kind is Kind.UPLOAD]
        if not under_way:
            return True
        nbytes = sum(each.nbytes for each in under_way) + task.nbytes
        return len(under_way) < self._most_uploads and nbytes <= self._max_bytes

    def _pinging(self) -> None:
        try:
            self._ping()
        except BaseException as error:  # noqa: BLE001 - whatever it says, it is no sign of life
            with self._lock:
                self._opened = True
                self._breaker.failed(error, ping=True)
                failing = self._take_back_locked(Kind.ASK, lambda _: True)
                unavailable = self._unavailable_locked()
                self._wake_all_locked()
            self._told(error)
            for task in failing:
                task.failed(unavailable)
        else:
            with self._lock:
                self._opened = True
                self._breaker.worked(ping=True)
                self._wake_all_locked()
            self._told(None)

    def _over(self, task: Task, *, worked: bool = False) -> None:
        with self._lock:
            self._running.pop(task, None)
            if worked:
                self._breaker.worked()
            self._settled.notify_all()

    def _note_failure(self, task: Task, error: RemoteFailure) -> None:
        """What lasts is tried again, behind the others of its kind; what was asked fails."""
        failing = []
        with self._lock:
            self._running.pop(task, None)
            if self._breaker.failed(error):
                failing = self._take_back_locked(Kind.ASK, lambda _: True)
            unavailable = self._unavailable_locked(error)
            again = task.lasting and not self._closing
            if again:
                self._waiting[task.kind].append(task)
            else:
                failing.append(task)
            self._wake_all_locked()
        self._told(error)
        for each in failing:
            each.failed(unavailable)

    def _wake_one_locked(self) -> None:
        """The thread that worked last, whose memory is warm; each that finds work wakes the next."""
        if self._idle:
            self._idle.pop().notify()

    def _wake_all_locked(self) -> None:
        while self._idle:
            self._wake_one_locked()
        self._settled.notify_all()

    def _take_back_locked(self, kind: Kind, wanted: Callable[[Task], bool]) -> list[Task]:
        taken = [task for task in self._waiting[kind] if wanted(task)]
        if taken:
            self._waiting[kind] = deque(task for task in self._waiting[kind] if task not in taken)
        return taken

    def _lasting_locked(self) -> bool:
        waiting = any(self._waiting[kind] for kind in (Kind.END, Kind.LOCAL, Kind.UPLOAD))
        return waiting or any(task.kind is not Kind.ASK for task in self._running)

    def _unavailable_locked(self, error: BaseException | None = None) -> RemoteUnavailableError:
        why = "the store is shut down" if self._closing else error or self._breaker.error
        return RemoteUnavailableError(f"the remote store can not be asked now: {why}; try again later")
