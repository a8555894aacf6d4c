"""Tensors -> host memory that the store owns.

Host tensors are copied on the calling thread, into a reused buffer; what can not change any more (evaluated MLX arrays)
and what the caller lends (``borrow``) is only looked at. Device tensors are packed by the caller's own stream and
brought to the host by a thread of their device (``Staging``); nothing on the calling thread waits for a device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from snapstore._device import Channel, Device, DeviceLostError
from snapstore._device_records import DeviceFacts, Landing, Lane, Submission, Unfit, Verdict
from snapstore._errors import SaveFailedError, SnapstoreError, StoreClosedError
from snapstore._flights import Flights
from snapstore._format import Layout
from snapstore._memory import BufferPool, HostImage, segments_of
from snapstore._options import StoreOptions
from snapstore._pinned import HostBuffer, PinnedPool, pageable
from snapstore._placing import Placed, copy_host_tensors, moves_of_part, part_of
from snapstore._reasons import reason_of
from snapstore._records import Job
from snapstore._state import State
from snapstore._threads import Thread, Threads
from snapstore._types import SnapshotKey
from snapstore.adapters import Adapter

_FASTEST_BYTES_PER_S = 50e9
_SHORT_PAUSE_S, _LONG_PAUSE_S, _STUCK_PAUSE_S = 50e-6, 2e-3, 50e-3
_LATE = 0.05
"""When to look at the oldest copy: not before it can be there, then so often that a twentieth of its time is lost."""

_log = logging.getLogger("snapstore.device")

_lost: list[Lane] = []
"""Devices that were lost with copies under way: nobody knows who still reads that memory, so it stays."""


def stage(
    adapter: Adapter, sources: Sequence[Any], layout: Layout, pool: BufferPool, *, borrow: bool
) -> HostImage:
    """The snapshot's bytes in host memory. Blocks for one copy of them, or not at all where they are only looked at."""
    if borrow or adapter.frozen_views:
        return HostImage(layout, adapter.view(sources))
    buffer = pool.take(layout.nbytes)
    try:
        adapter.copy_into(sources, layout, buffer[: layout.nbytes])
    except BaseException:
        pool.give_back(buffer)
        raise
    return HostImage(layout, partial(segments_of, layout, buffer), partial(pool.give_back, buffer))


class Staging:
    """The device copies of one store, and the threads that make them: none before the first device tensor.

    One thread a device (``snapstore-device-...``) asks for copies and polls the oldest; the watch sees what these
    threads can not see of themselves: a call of the driver that does not come back.
    """

    def __init__(self, state: State, pool: BufferPool, options: StoreOptions, threads: Threads) -> None:
        self._state = state
        self._pool = pool
        self._flights = Flights(options.device_timeout_s, threads)
        self.pinned = PinnedPool(options.max_pinned_bytes, threads)
        self._threads = threads
        self._starting = threads.lock()
        self._watch_thread: Thread | None = None

    @property
    def facts(self) -> DeviceFacts:
        """How the devices are, without asking them. Takes no lock."""
        return self._flights.published

    # -- the thread that saves or loads -------------------------------------------------------------------------

    def check(self, key: SnapshotKey, placed: Placed) -> None:
        """Before anything is reserved: ``StreamCaptureError``; ``SaveFailedError`` if a device is stuck or lost."""
        unfit = self._flights.unfit(placed.distinct_devices)
        if unfit is not None:
            raise _refusal(key, unfit)
        for device in placed.distinct_devices:
            device.check_stream()

    def submit(self, job: Job, placed: Placed) -> None:
        """Hand the copy over to the devices' threads, who settle the job; or abandon it, and raise.

        Blocks for the copy of what is in host memory, for nothing else.
        """
        try:
            buffer = self._take_buffer(placed.layout.nbytes)
        except BaseException as error:
            self._state.abandon(job, error)
            raise
        submission = Submission(job, placed.layout, buffer)
        try:
            copy_host_tensors(placed, buffer.view)
            for device in placed.distinct_devices:
                self._open_lane(device)
                submission.parts.append(part_of(submission, device, placed))
            self._state.on_its_way(job)
            unfit = self._flights.submit(submission)
            if unfit is not None:
                raise _refusal(job.key, unfit)
        except BaseException as error:
            if not submission.handed_over:
                buffer.give_back()
                self._state.abandon(job, error)
            raise

    def lend(self, nbytes: int) -> HostBuffer:
        """Host memory for a load to the host: the caller's own, until its last view is gone."""
        return HostBuffer(self._pool.lend(nbytes), lambda: None)

    def host_buffer(self, device: Device, nbytes: int) -> HostBuffer:
        """Host memory for a load to this device, pinned if there is some."""
        self._open_lane(device)
        return self._take_buffer(nbytes)

    def upload(
        self, device: Device, layout: Layout, buffer: HostBuffer, landed: Callable[[], None]
    ) -> dict[str, Any]:
        """Tensors on the device, for which the caller's current stream waits. Later, ``landed`` is called, once."""
        try:
            device.check_stream()
            self._open_lane(device)
            unfit = self._flights.unfit([device])
            if unfit is not None:
                raise SnapstoreError(f"{_how(unfit)}; load to the host instead") from unfit.error
            tensors, mark = device.upload(layout, list(buffer.pieces(0, layout.nbytes)))
        except DeviceLostError:
            raise  # it may have begun to read the buffer
        except BaseException:
            landed()
            raise
        self._flights.expect(device, Landing(mark, landed))
        return tensors

    def _take_buffer(self, nbytes: int) -> HostBuffer:
        return self.pinned.take(nbytes) or pageable(self._pool, nbytes)

    def _open_lane(self, device: Device) -> None:
        lane = self._flights.lane(device)
        if lane.thread is None:
            with self._starting:
                if self._watch_thread is None:
                    self._watch_thread = self._start("snapstore-device-watch", self._watch)
                if lane.thread is None:
                    lane.thread = self._start(f"snapstore-device-{device.name}", partial(self._serve, lane))
        self.pinned.start(device)

    def _start(self, name: str, target: Callable[[], None]) -> Thread:
        thread = self._threads.thread(name, target)
        thread.start()
        return thread

    # -- the device's thread ------------------------------------------------------------------------------------

    def _serve(self, lane: Lane) -> None:
        """The thread's top: whatever ends it but the store's end, the device is lost."""
        try:
            channel = lane.device.open()
            while self._flights.await_work(lane, self._pause_s(lane)):
                while self._start_one(lane, channel):
                    pass
                while self._land_one(lane, channel):
                    pass
                self._flights.take_discarded(lane).clear()
        except BaseException as error:  # noqa: BLE001 - recorded, and in every ticket and report from here on
            extra = {"event": "device_lost", "reason": "device", "device": lane.device.name}
            _log.critical(
                "device_lost: %s, and with it what it had to copy",
                lane.device.name,
                exc_info=error,
                extra=extra,
            )
            self._act(self._flights.lose(lane, error.with_traceback(None)))
            if lane.busy:
                _lost.append(lane)

    def _start_one(self, lane: Lane, channel: Channel) -> bool:
        """A function of its own, so that the thread keeps nothing of the last copy alive while it waits."""
        part, verdict = self._flights.take(lane)
        self._act(verdict)
        if part is None:
            return False
        try:
            part.mark = channel.start(part.after, moves_of_part(part))
        except DeviceLostError:
            raise
        except RuntimeError as error:
            _log.warning(
                "device_refused: %s did not take the copy of %s",
                lane.device.name,
                part.submission.job.key,
                exc_info=error,
                extra={"event": "device_refused", "reason": reason_of(error), "device": lane.device.name},
            )
            self._act(self._flights.failed(part, error.with_traceback(None)))
            part.mark = channel.mark()
        return True

    def _land_one(self, lane: Lane, channel: Channel) -> bool:
        """Only the oldest is looked at: what was started after it has not arrived before it."""
        part, landing = self._flights.oldest(lane)
        if part is not None and channel.done(part.mark):
            self._act(self._flights.landed(lane))
            return True
        if landing is not None and channel.done(landing.mark):
            self._flights.upload_landed(lane)
            landing.landed()
            return True
        return False

    def _pause_s(self, lane: Lane) -> float:
        """Until the next look at what flies."""
        if lane.status == "stuck":
            return _STUCK_PAUSE_S
        taken_s = self._threads.monotonic_s() - lane.since_s
        needed_s = lane.flying[0].nbytes / _FASTEST_BYTES_PER_S if lane.flying else 0.0
        return min(max(needed_s - taken_s, _LATE * taken_s, _SHORT_PAUSE_S), _LONG_PAUSE_S)

    # -- the watch ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while (verdict := self._flights.await_overdue()) is not None:
            for why in dict.fromkeys(str(error) for _, error in verdict.abandon):
                _log.error("device_stuck: %s", why, extra={"event": "device_stuck", "reason": "timeout"})
            self._act(verdict)
            del verdict

    # -- whoever has a verdict ----------------------------------------------------------------------------------

    def _act(self, verdict: Verdict) -> None:
        for part in verdict.over:
            part.let_go()
        for submission in verdict.at_rest:
            submission.job.ticket._release()
        for submission in verdict.admit:
            self._state.admit(submission.job, _image(submission))
        for submission, error in verdict.abandon:
            self._state.abandon(submission.job, error)
        for submission in verdict.at_rest:
            if submission not in verdict.admit:
                submission.buffer.give_back()

    # -- whoever waits ------------------------------------------------------------------------------------------

    def drain(self, request_id: str | None, timeout_s: float | None) -> bool:
        """Wait until no device reads or writes for what was saved before; of one request id, or of all.

        At the deadline, what was lent and has not been asked for yet is taken back: its save fails.
        """
        fenced = self._flights.fence(request_id)
        if self._flights.await_rest(fenced, timeout_s):
            return True
        self._act(
            self._flights.drop_waiting(
                fenced, TimeoutError("its tensors were asked back before their copy began")
            )
        )
        return self._flights.await_rest(fenced, 0.0)

    def resting(self, request_id: str | None) -> Callable[[], bool]:
        """For those who wait in another way than ``drain``: whether what is under way now has come to rest."""
        fenced = self._flights.fence(request_id)
        return lambda: not any(each.parts_left for each in fenced)

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self, timeout_s: float) -> tuple[SnapshotKey, ...]:
        """Shutdown: give the copies this time, then give up what has not arrived. The keys of that."""
        deadline_s = self._threads.monotonic_s() + timeout_s
        self._state.await_staged(timeout_s)
        self._flights.await_ended(max(0.0, deadline_s - self._threads.monotonic_s()))
        verdict = self._flights.give_up(
            TimeoutError("the store was shut down before the device had copied it")
        )
        self._act(verdict)
        return tuple(submission.job.key for submission, _ in verdict.abandon)

    def let_go(self) -> None:
        """The store was dropped, or the interpreter ends: let the threads end when they are done. Never blocks."""
        self._flights.close()
        self.pinned.close()

    def close(self, timeout_s: float) -> list[str]:
        """Join the threads and unlock memory within this time; what could not be, in words."""
        deadline_s = self._threads.monotonic_s() + timeout_s
        threads = self._flights.ending_threads()
        for thread in threads:
            thread.join(max(0.0, deadline_s - self._threads.monotonic_s()))
        unlocked = self.pinned.close(max(0.0, deadline_s - self._threads.monotonic_s()))
        errors = [
            f"{device.name} is {device.status} ({device.error})"
            for device in self.facts.devices
            if device.status != "ok"
        ]
        if self.facts.leaked_bytes:
            errors.append(f"{self.facts.leaked_bytes} bytes that a device may still touch are kept")
        errors += [f"{thread.name} does not end" for thread in threads if thread.is_alive()]
        if not unlocked:
            errors.append(f"{self.pinned.pinned_bytes} bytes of host memory stay locked")
        return errors


def _image(submission: Submission) -> HostImage:
    buffer, layout = submission.buffer, submission.layout
    return HostImage(layout, partial(segments_of, layout, buffer.view), buffer.give_back, keeps=buffer)


def _how(unfit: Unfit) -> str:
    if unfit.status == "ok":
        return f"the store is shut down, and {unfit.device.name} copies no more for it"
    return f"{unfit.device.name} is {unfit.status}: {unfit.error}"


def _refusal(key: SnapshotKey, unfit: Unfit) -> SnapstoreError:
    if unfit.status == "ok":
        return StoreClosedError(f"{key} was not saved: the store is shut down; open a new store", key=key)
    refusal = SaveFailedError(f"{key} was not saved: {_how(unfit)}; save it from the host", key=key)
    refusal.__cause__ = unfit.error
    return refusal
