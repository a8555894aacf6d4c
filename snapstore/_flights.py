"""What is on its way between devices and the host: one leaf lock, every transition. Calls no device, starts no thread.

A *submission* is what devices have to do for one save, a *part* is what one of them has to; a *lane* is a device with
its thread, and a *landing* a copy the other way, of a load.

    part        from -> to              function                    thread
                -       -> waiting      submit                      the one that saves
                waiting -> flying       take                        the device's, before it calls the driver
                waiting -> over         take, await_overdue, lose,  whoever finds its life ended, its device stuck or
                (not if it gathers)     drop_waiting, give_up       lost, its source asked back, the store at its end
                flying  -> over         landed                      the device's, when its mark is reached, however late

    lane        ok -> stuck             await_overdue               the watch: nothing was reached for `timeout_s`
                stuck -> ok             landed, upload_landed,      the device's: something was reached after all, or
                                        await_work                  the driver let it go and nothing is under way
                ok, stuck -> lost       lose                        the device's: final

 1. A submission counts from `submit`, not from when there is a mark; it is at rest when each of its parts is over.
 2. Its *end* (admit or abandon) is taken once, under the lock; who has taken it tells the state, after the lock.
 3. Source, scratch and host buffer are kept until it is at rest. Ended before, with parts flying, they are *leaked*.
 4. A part that has not flown is never read by the copy; one that has may be, until its mark is reached. One that
    gathers is read by its caller's stream in any case: nobody drops it, and unwanted it flies until that is done.
 5. A lane is lost for good; what was flying or gathering there is kept for ever.

Decide under the lock, act outside: what is to be done comes back as a ``Verdict``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from snapstore._device import Device
from snapstore._device_records import DeviceFacts, Landing, Lane, Part, Submission, Unfit, Verdict
from snapstore._threads import Thread, Threads
from snapstore._types import DeviceHealth


class Flights:
    """See the module's header. Nothing here blocks but what says so."""

    def __init__(self, timeout_s: float, threads: Threads) -> None:
        self.monotonic_s = threads.monotonic_s
        self._timeout_s = timeout_s
        self._threads = threads
        self._lock = threads.lock()
        self._watch = threads.condition(self._lock)
        self._rest = threads.condition(self._lock)
        self._lanes: dict[Device, Lane] = {}
        self._outstanding: dict[Submission, None] = {}
        self._armed = False
        self._closing = False
        self._pageable = 0
        self.published = DeviceFacts()

    # -- the thread that saves or loads -------------------------------------------------------------------------

    def lane(self, device: Device) -> Lane:
        """The lane of a device, a new one if it has none."""
        with self._lock:
            lane = self._lanes.get(device)
            if lane is None:
                lane = self._lanes[device] = Lane(device, self._threads.condition(self._lock))
                self._publish_locked()
            return lane

    def unfit(self, devices: Iterable[Device]) -> Unfit | None:
        """The first of these devices that takes no more copies, and why."""
        with self._lock:
            return self._unfit_locked(devices)

    def submit(self, submission: Submission) -> Unfit | None:
        """Hand over; counted from here. Nothing is, if a device takes no more copies: then the answer says why."""
        with self._lock:
            unfit = self._unfit_locked(part.device for part in submission.parts)
            if unfit is not None:
                return unfit
            submission.parts_left = len(submission.parts)
            submission.handed_over = True
            self._outstanding[submission] = None
            self._pageable += not submission.buffer.pinned
            for part in submission.parts:
                lane = self._lanes[part.device]
                self._note_work_locked(lane)
                lane.waiting.append(part)
                lane.work.notify()
            self._publish_locked()
        return None

    def expect(self, device: Device, landing: Landing) -> None:
        """A load's copy to the device is under way."""
        with self._lock:
            lane = self._lanes[device]
            self._note_work_locked(lane)
            lane.landings.append(landing)
            lane.work.notify()

    # -- the device's thread ------------------------------------------------------------------------------------

    def await_work(self, lane: Lane, pause_s: float) -> bool:
        """Wait for something to start, or ``pause_s`` if something may have been reached by then. False: the end."""
        with self._lock:
            while not (lane.waiting or lane.discarded):
                if lane.flying or lane.landings:
                    lane.work.wait(pause_s)
                    return True
                self._recover_locked(lane)  # the driver has let the thread go, and owes it nothing
                if self._closing:
                    return False
                lane.work.wait()
            return True

    def take(self, lane: Lane) -> tuple[Part | None, Verdict]:
        """The next part to start, flying from here on. What nobody wants any more is not started: invariant 4."""
        verdict = Verdict()
        wanted: Part | None = None
        with self._lock:
            while lane.waiting and wanted is None:
                part = lane.waiting.popleft()
                submission = part.submission
                if submission.job.life.alive and not submission.ended:
                    wanted = part
                else:
                    self._end_locked(submission, verdict, _cleaned_up(submission))
                    part.mark = part.after
                if wanted or part.gathers:
                    part.flying = True
                    lane.flying.append(part)
                else:
                    self._over_locked(part, verdict)
            self._publish_locked()
        return wanted, verdict

    def take_discarded(self, lane: Lane) -> list[Any]:
        """What is to be freed on this thread, which the driver may keep, and on no other."""
        with self._lock:
            discarded, lane.discarded = lane.discarded, []
            return discarded

    def oldest(self, lane: Lane) -> tuple[Part | None, Landing | None]:
        """What is reached first, either way: nothing behind it can have been."""
        with self._lock:
            return (
                lane.flying[0] if lane.flying else None,
                lane.landings[0] if lane.landings else None,
            )

    def landed(self, lane: Lane) -> Verdict:
        """The oldest part that flies has arrived."""
        verdict = Verdict()
        with self._lock:
            lane.since_s = self.monotonic_s()
            self._recover_locked(lane)
            self._over_locked(lane.flying.popleft(), verdict)
            self._publish_locked()
        return verdict

    def upload_landed(self, lane: Lane) -> None:
        """The oldest landing is done."""
        with self._lock:
            lane.since_s = self.monotonic_s()
            self._recover_locked(lane)
            lane.landings.popleft()
            if self._closing:
                self._watch.notify()
            self._publish_locked()

    def failed(self, part: Part, error: BaseException) -> Verdict:
        """The driver refused some of this part, which goes on flying."""
        verdict = Verdict()
        with self._lock:
            self._end_locked(part.submission, verdict, error)
            self._publish_locked()
        return verdict

    def lose(self, lane: Lane, error: BaseException) -> Verdict:
        """The device is lost, and with it everything that it was asked for."""
        verdict = Verdict()
        with self._lock:
            lane.status, lane.error = "lost", error
            self._fail_lane_locked(lane, verdict, error)
            self._publish_locked()
        return verdict

    # -- the watch ----------------------------------------------------------------------------------------------

    def await_overdue(self) -> Verdict | None:
        """Wait until a device has reached nothing for the timeout: it is stuck, its saves fail. ``None``: the end.

        Wakes once a timeout while devices are busy, and not at all while they are not.
        """
        with self._lock:
            while True:
                lanes = [lane for lane in self._lanes.values() if lane.busy and lane.status == "ok"]
                if self._closing and not lanes:
                    return None
                self._armed = bool(lanes)
                left_s = (
                    min((lane.since_s + self._timeout_s for lane in lanes), default=0.0) - self.monotonic_s()
                )
                if lanes and left_s <= 0:
                    verdict = Verdict()
                    for lane in lanes:
                        if lane.since_s + self._timeout_s <= self.monotonic_s():
                            self._stick_locked(lane, verdict)
                    self._publish_locked()
                    return verdict
                self._watch.wait(left_s if lanes else None)

    # -- whoever waits ------------------------------------------------------------------------------------------

    def fence(self, request_id: str | None) -> list[Submission]:
        """What is not at rest now, of one request id in all of its lives, or of all."""
        with self._lock:
            return [
                submission
                for submission in self._outstanding
                if request_id is None or submission.job.key.request_id == request_id
            ]

    def await_rest(self, submissions: Sequence[Submission], timeout_s: float | None) -> bool:
        """Wait until no device reads or writes for any of these."""
        with self._lock:
            return self._rest.wait_for(lambda: not any(each.parts_left for each in submissions), timeout_s)

    def drop_waiting(self, submissions: Iterable[Submission], error: BaseException) -> Verdict:
        """Take back what was lent and has not flown; its save has failed."""
        verdict = Verdict()
        with self._lock:
            for submission in submissions:
                if any(part.waiting and not part.gathers for part in submission.parts):
                    self._end_locked(submission, verdict, error)
                    self._drop_parts_locked(submission, verdict)
            self._publish_locked()
        return verdict

    def await_ended(self, timeout_s: float) -> bool:
        """Wait until each submission has its end, in time or not."""
        with self._lock:
            return self._rest.wait_for(lambda: all(each.ended for each in self._outstanding), timeout_s)

    def close(self) -> None:
        """Take nothing more; each thread ends when nothing of its device is under way."""
        with self._lock:
            self._closing = True
            self._notify_all_locked()

    def give_up(self, error: BaseException) -> Verdict:
        """Close, and end what is left: what has not flown never will, and what has is leaked until it lands."""
        verdict = Verdict()
        with self._lock:
            self._closing = True
            for submission in list(self._outstanding):
                self._end_locked(submission, verdict, error)
                self._drop_parts_locked(submission, verdict)
            self._notify_all_locked()
            self._publish_locked()
        return verdict

    def ending_threads(self) -> list[Thread]:
        """Threads of devices that have nothing to wait for: after ``close`` they end."""
        with self._lock:
            lanes = [lane for lane in self._lanes.values() if lane.status == "ok" and not lane.busy]
            return [lane.thread for lane in lanes if lane.thread is not None]

    # -- under the lock -----------------------------------------------------------------------------------------

    def _unfit_locked(self, devices: Iterable[Device]) -> Unfit | None:
        for device in devices:
            lane = self._lanes.get(device)
            if lane is not None and (self._closing or lane.status != "ok"):
                return Unfit(device, lane.status, lane.error)
        return None

    def _note_work_locked(self, lane: Lane) -> None:
        if not lane.busy:
            lane.since_s = self.monotonic_s()
        if not self._armed:
            self._watch.notify()

    def _recover_locked(self, lane: Lane) -> None:
        if lane.status == "stuck":
            lane.status, lane.error = "ok", None
            self._watch.notify()
            self._publish_locked()

    def _end_locked(self, submission: Submission, verdict: Verdict, error: BaseException | None) -> None:
        """Take its end if nobody has: admit it without an error."""
        if submission.ended:
            return
        submission.ended = True
        if error is None:
            verdict.admit.append(submission)
        else:
            verdict.abandon.append((submission, error))
        self._rest.notify_all()

    def _over_locked(self, part: Part, verdict: Verdict) -> None:
        submission = part.submission
        part.over, part.flying = True, False
        verdict.over.append(part)
        if self._closing:
            self._watch.notify()
        submission.parts_left -= 1
        if submission.parts_left == 0:
            self._end_locked(submission, verdict, None)
            del self._outstanding[submission]
            verdict.at_rest.append(submission)
            self._rest.notify_all()

    def _drop_parts_locked(self, submission: Submission, verdict: Verdict) -> None:
        for part in submission.parts:
            if part.waiting and not part.gathers:
                lane = self._lanes[part.device]
                lane.waiting.remove(part)
                lane.discarded.append((part.blocks, part.after))
                lane.work.notify()
                part.let_go()
                self._over_locked(part, verdict)

    def _stick_locked(self, lane: Lane, verdict: Verdict) -> None:
        lane.status = "stuck"
        lane.error = TimeoutError(f"{lane.device.name} reached nothing for {self._timeout_s} s")
        lane.work.notify()
        self._fail_lane_locked(lane, verdict, lane.error)

    def _fail_lane_locked(self, lane: Lane, verdict: Verdict, error: BaseException) -> None:
        for part in [*lane.flying, *lane.waiting]:
            self._end_locked(part.submission, verdict, error)
            self._drop_parts_locked(part.submission, verdict)

    def _notify_all_locked(self) -> None:
        self._watch.notify_all()
        self._rest.notify_all()
        for lane in self._lanes.values():
            lane.work.notify_all()

    def _publish_locked(self) -> None:
        leaking = [submission for submission in self._outstanding if submission.leaks]
        self.published = DeviceFacts(
            sum(not submission.ended for submission in self._outstanding),
            sum(len(submission.buffer.view) for submission in leaking)
            + sum(part.nbytes for submission in leaking for part in submission.parts if not part.over),
            self._pageable,
            tuple(_health_of(lane) for lane in self._lanes.values()),
        )


def _health_of(lane: Lane) -> DeviceHealth:
    leaked = sum(part.nbytes for part in (*lane.flying, *lane.waiting) if part.submission.ended)
    return DeviceHealth(lane.device.name, lane.status, str(lane.error) if lane.error else None, leaked)


def _cleaned_up(submission: Submission) -> Exception:
    return RuntimeError(f"{submission.job.key} was cleaned up before its copy began")
