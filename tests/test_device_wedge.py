"""A device that stops hurts nothing but itself: its saves fail in time, its memory is kept, everything else goes on."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from devices import PATIENCE_S, PINNED_BYTES, arrays, assert_loads, on, open_store, wait_for

from snapstore import SaveFailedError, SaveState, SnapshotStore, StoreOptions
from snapstore.testing import FakeDevice, FaultyFileSystem
from snapstore.testing._fake_device import FakeMark

TIMEOUT_S = 0.2

Within = Callable[[float], AbstractContextManager[None]]


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def other() -> FakeDevice:
    return FakeDevice("fake:1", automatic=True)


@pytest.fixture
def store(
    root: Path, device: FakeDevice, other: FakeDevice, files: FaultyFileSystem
) -> Iterator[SnapshotStore]:
    with open_store(root, device, other, files=files, device_timeout_s=TIMEOUT_S) as store:
        yield store


def assert_stuck(store: SnapshotStore, device: FakeDevice) -> None:
    health = store.health()
    assert health.status == "stuck"
    assert any(device.name in reason and str(TIMEOUT_S) in reason for reason in health.reasons)
    assert [(each.name, each.status) for each in health.devices if each.status != "ok"] == [
        (device.name, "stuck")
    ]


def wedge(store: SnapshotStore, device: FakeDevice, *, borrow: bool = False) -> None:
    """One save that the device has begun and does not finish, until the watch has given it up."""
    ticket = store.save("wedged", 1, on(device, arrays(1)), borrow=borrow)
    error = ticket.exception(PATIENCE_S)
    assert isinstance(error, SaveFailedError) and isinstance(error.__cause__, TimeoutError)
    assert_stuck(store, device)


@pytest.mark.parametrize("borrow", [False, True])
def test_no_progress_fails_the_save_in_time_and_marks_the_device(
    store: SnapshotStore, device: FakeDevice, borrow: bool
) -> None:
    started_s = time.monotonic()
    ticket = store.save("wedged", 1, on(device, arrays(1)), borrow=borrow)
    error = ticket.exception(PATIENCE_S)
    assert TIMEOUT_S <= time.monotonic() - started_s < TIMEOUT_S + 1
    assert isinstance(error, SaveFailedError) and isinstance(error.__cause__, TimeoutError)
    assert ticket.state is SaveState.FAILED and ticket.released is not borrow
    assert_stuck(store, device)
    with pytest.raises(SaveFailedError) as caught:
        store.load("wedged", 1)
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_further_saves_of_a_stuck_device_fail_at_once(
    store: SnapshotStore, device: FakeDevice, deadline: Within
) -> None:
    wedge(store, device)
    calls = len(device.calls)
    with deadline(0.05), pytest.raises(SaveFailedError, match="stuck") as caught:
        store.save("next", 1, on(device, arrays(2)))
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(device.calls) == calls
    assert store.stats().accepted == 1


def test_everything_else_goes_on_beside_a_stuck_device(
    store: SnapshotStore, device: FakeDevice, other: FakeDevice, deadline: Within
) -> None:
    wedge(store, device)
    with deadline(0.05):
        store.health(), store.stats()
    with deadline(2.0):
        store.save("other", 1, on(other, arrays(2))).result(PATIENCE_S)
        store.save("host", 1, arrays(3)).result(PATIENCE_S)
        assert store.cleanup_request("wedged").clean
        assert store.flush(1)
    assert_loads(store, "other", 1, arrays(2))
    assert_loads(store, "host", 1, arrays(3))


@pytest.mark.parametrize("borrow", [False, True])
def test_drain_says_no_at_its_time(
    store: SnapshotStore, device: FakeDevice, other: FakeDevice, borrow: bool
) -> None:
    wedge(store, device, borrow=borrow)
    store.save("other", 1, on(other, arrays(2)), borrow=True).result(PATIENCE_S)
    for drain in (lambda: store.drain_request("wedged", timeout_s=0.2), lambda: store.drain(0.2)):
        started_s = time.monotonic()
        assert not drain()
        assert 0.2 <= time.monotonic() - started_s < 1.0
    assert store.drain_request("other", timeout_s=0.2)


@pytest.mark.parametrize("borrow", [False, True])
def test_nothing_that_a_stuck_device_may_touch_is_freed_or_used_again(
    store: SnapshotStore, device: FakeDevice, other: FakeDevice, files: FaultyFileSystem, borrow: bool
) -> None:
    """A late copy would land in another save's buffer, which the writer holds just then."""
    device.automatic = True
    store.save("warm", 1, on(device, arrays(0))).result(PATIENCE_S)
    wait_for(lambda: store.stats().pinned_bytes == PINNED_BYTES)
    device.automatic = False
    tensors = on(device, arrays(1))
    remembered = [weakref.ref(tensor) for tensor in tensors.values()]
    ticket = store.save("wedged", 1, tensors, borrow=borrow)
    del tensors
    wait_for(lambda: device.count("start") == 2)
    ticket.exception(PATIENCE_S)
    gc.collect()
    assert [ref() is not None for ref in remembered] == [borrow] * 3
    nbytes = sum(array.nbytes for array in arrays(1).values())
    assert store.stats().leaked_bytes == 2 * nbytes
    with files.pause("write", ".tmp") as gate:
        tickets = [store.save("other", count, on(other, arrays(count))) for count in range(4)]
        gate.wait_reached()
        wait_for(lambda: all(each.state is not SaveState.STAGING for each in tickets))
        device.automatic = True
        wait_for(lambda: store.stats().leaked_bytes == 0)
    for count, each in enumerate(tickets):
        each.result(PATIENCE_S)
        assert_loads(store, "other", count, arrays(count))
    assert device.faults == []


@pytest.mark.parametrize("borrow", [False, True])
def test_a_late_event_brings_the_device_back(store: SnapshotStore, device: FakeDevice, borrow: bool) -> None:
    tensors = on(device, arrays(1))
    ticket = store.save("wedged", 1, tensors, borrow=borrow)
    wait_for(lambda: device.count("start"))
    ticket.exception(PATIENCE_S)
    with pytest.raises(SaveFailedError):
        store.save("wedged", 2, tensors)
    device.automatic = True
    assert store.drain_request("wedged", timeout_s=PATIENCE_S)
    assert ticket.released and ticket.state is SaveState.FAILED
    wait_for(lambda: store.health().status == "ok")
    assert store.stats().leaked_bytes == 0
    store.save("wedged", 2, tensors).result(PATIENCE_S)
    assert_loads(store, "wedged", 2, arrays(1))


@pytest.mark.parametrize("operation", ["open", "start", "done"])
def test_a_call_of_the_driver_that_never_returns_is_seen_as_well(
    store: SnapshotStore, device: FakeDevice, other: FakeDevice, operation: str
) -> None:
    with device.pause(operation) as gate:
        stuck = store.save("wedged", 1, on(device, arrays(1)))
        gate.wait_reached()
        behind = store.save("behind", 1, on(device, arrays(2)), borrow=True)
        for ticket in (stuck, behind):
            assert isinstance(ticket.exception(PATIENCE_S), SaveFailedError)
        assert_stuck(store, device)
        assert behind.released, "it was never asked for, so it is taken back"
        assert store.drain_request("behind", timeout_s=0.1)
        assert not store.drain_request("wedged", timeout_s=0.1), "its pack may be reading, whoever copies it"
        assert store.stats().leaked_bytes > 0
        store.save("other", 1, on(other, arrays(3))).result(PATIENCE_S)
        device.automatic = True
    wait_for(lambda: store.health().status == "ok")
    assert store.drain(PATIENCE_S) and store.stats().leaked_bytes == 0
    store.save("again", 1, on(device, arrays(4))).result(PATIENCE_S)


@pytest.mark.parametrize("asked_back", [False, True])
def test_only_the_device_s_thread_frees_what_calls_the_driver(
    store: SnapshotStore, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, asked_back: bool
) -> None:
    """The mark and the tensors of a save that was never asked for: not the watch, not who asks for them back.

    Where the driver keeps one thread, it may keep the next one too.
    """
    freed_by: list[str] = []
    mark_of = device.mark

    def mark() -> FakeMark:
        return watched(mark_of())

    def watched(thing: Any) -> Any:
        weakref.finalize(thing, lambda: freed_by.append(threading.current_thread().name))
        return thing

    monkeypatch.setattr(device, "mark", mark)
    with device.pause("open") as gate:
        ticket = store.save("wedged", 1, {"a": watched(device.tensor([1]))}, borrow=True)
        gate.wait_reached()
        if asked_back:
            assert store.drain_request("wedged", timeout_s=0)
        ticket.exception(PATIENCE_S)
        assert ticket.wait_released(PATIENCE_S)
        device.complete()
        assert freed_by == []
    wait_for(lambda: len(freed_by) == 2)
    assert set(freed_by) == {f"snapstore-device-{device.name}"}


def test_progress_is_what_counts_not_the_age_of_the_oldest(root: Path, device: FakeDevice) -> None:
    """Copies that come one by one, together for longer than the timeout, are no wedge."""
    with open_store(root, device, device_timeout_s=1.0) as store:
        kernels, tickets = [], []
        for count in range(5):
            kernels.append(device.kernel())
            tickets.append(store.save("slow", count, on(device, arrays(count))))
        started_s = time.monotonic()
        for kernel, ticket in zip(kernels, tickets, strict=True):
            with pytest.raises(TimeoutError):
                ticket.exception(0.3)
            kernel.finish()
            wait_for(lambda ticket=ticket: device.complete() + 1 and ticket.done())
        assert time.monotonic() - started_s > 1.3
        assert store.health().status == "ok"
        for ticket in tickets:
            ticket.result(0)


def test_a_lost_device_is_lost_for_good_and_what_the_host_has_is_still_written(
    root: Path, device: FakeDevice, other: FakeDevice, files: FaultyFileSystem
) -> None:
    with open_store(root, other, files=files) as store:
        with files.pause("write", ".tmp") as gate:
            arrived = store.save("request", 1, arrays(1) | {"more": device.tensor([1.0])})
            host = store.save("host", 1, arrays(2))
            wait_for(lambda: device.complete() + 1 and arrived.state is not SaveState.STAGING)
            gate.wait_reached()
            flying = store.save("request", 2, on(device, arrays(3)), borrow=True)
            wait_for(lambda: device.count("start") == 2)
            device.poison(RuntimeError("an illegal memory access was encountered"))
            error = flying.exception(PATIENCE_S)
        assert isinstance(error, SaveFailedError) and "illegal memory access" in str(error.__cause__)
        assert arrived.result(PATIENCE_S) and host.result(PATIENCE_S)
        health = store.health()
        assert health.status == "degraded" and [each.status for each in health.devices] == ["lost"]
        for _ in range(2):
            with pytest.raises(SaveFailedError, match="lost"):
                store.save("request", 3, on(device, arrays(3)))
        store.save("other", 1, on(other, arrays(4))).result(PATIENCE_S)
        assert not flying.released and not store.drain(0.1)
        assert store.stats().leaked_bytes > 0
        report = store.shutdown(timeout_s=5)
        assert not report.clean and report.leaked_bytes == store.stats().leaked_bytes
        assert any("is lost" in each for each in report.errors)
        # What `open_store` checks at its end does not hold for a device that is lost.
        store.shutdown = lambda **_: type("Report", (), {"clean": True})()  # type: ignore[method-assign]


@pytest.mark.parametrize("cleanup", [False, True])
@pytest.mark.parametrize("operation", [None, "start"])
def test_shutdown_with_a_stuck_device_ends_in_time_and_says_what_is_kept(
    root: Path, device: FakeDevice, operation: str | None, cleanup: bool
) -> None:
    store = SnapshotStore(root, StoreOptions(max_pinned_bytes=2**20))
    gate = device.pause(operation or "unpin")
    stuck = store.save("wedged", 1, on(device, arrays(1)), borrow=True)
    wait_for(lambda: device.count("start"))
    host = [store.save("host", count, arrays(count)) for count in range(4)]
    started_s = time.monotonic()
    report = store.shutdown(cleanup=cleanup, timeout_s=1.0)
    assert time.monotonic() - started_s < 1.5
    assert report.writer_stopped and report.session_removed is cleanup
    assert stuck.key in report.abandoned and report.leaked_bytes > 0
    assert any(str(report.leaked_bytes) in error for error in report.errors)
    assert not stuck.released
    if not cleanup:
        assert all(ticket.state is SaveState.COMMITTED for ticket in host)
    gate.open()
    device.automatic = True
    assert stuck.wait_released(PATIENCE_S)
    assert store.stats().leaked_bytes == 0 and device.faults == []
    wait_for(lambda: not device.pinned)


def test_shutdown_waits_for_copies_that_arrive(root: Path, device: FakeDevice) -> None:
    store = SnapshotStore(root, StoreOptions(max_pinned_bytes=2**20))
    tickets = [store.save("request", count, on(device, arrays(count))) for count in range(8)]
    device.automatic = True
    report = store.shutdown(timeout_s=PATIENCE_S)
    assert report.clean and report.leaked_bytes == 0
    assert all(ticket.state is SaveState.COMMITTED for ticket in tickets)
    assert not device.pinned
    assert not [each for each in threading.enumerate() if each.name.startswith("snapstore-device")]


def test_the_end_of_a_save_is_taken_once_however_time_outs_and_arrivals_fall(
    root: Path, device: FakeDevice, other: FakeDevice
) -> None:
    """Timeouts of a few milliseconds against copies that complete at about that time."""
    with open_store(root, device, other, device_timeout_s=0.004) as store:
        tickets = []
        for count in range(150):
            try:
                tensors = {"a": device.tensor([count]), "b": other.tensor([count])}
                tickets.append(store.save("request", count, tensors, borrow=bool(count % 2)))
            except SaveFailedError:
                pass  # it is stuck just now
            if count % 3 == 0:
                threading.Event().wait(0.003)
            device.complete()
        device.automatic = True
        wait_for(lambda: all(ticket.done() and ticket.released for ticket in tickets))
        assert store.drain(PATIENCE_S)
        wait_for(lambda: store.health().status == "ok")
        stats = store.stats()
        assert stats.accepted == stats.committed + stats.failed
        assert len(tickets) <= stats.accepted <= 150, (
            "some may have found it stuck when they had room already"
        )
        assert (stats.pending_bytes, stats.on_devices, stats.leaked_bytes) == (0, 0, 0)
        assert all(each.status == "ok" for each in store.health().devices)
        for ticket in tickets:
            if ticket.exception(0) is None:
                value = store.load("request", ticket.key.token_count).tensors
                assert value["a"] == value["b"] == ticket.key.token_count


def test_a_store_that_is_dropped_ends_the_threads_of_its_devices(root: Path, device: FakeDevice) -> None:
    before = set(threading.enumerate())
    store = SnapshotStore(root, StoreOptions(max_pinned_bytes=2**20))
    ticket = store.save("request", 1, on(device, arrays(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del store
        gc.collect()
    device.automatic = True
    ticket.result(PATIENCE_S)
    wait_for(lambda: set(threading.enumerate()) <= before)
    wait_for(lambda: not device.pinned)


# -- processes ------------------------------------------------------------------------------------------------------

PROLOGUE = """
import os, signal, sys, threading, time
import numpy as np
from snapstore import SnapshotStore, StoreClosedError, StoreOptions
from snapstore.testing import FakeDevice

device = FakeDevice()
store = SnapshotStore(sys.argv[1], StoreOptions(device_timeout_s=60.0, shutdown_timeout_s=1.0))
"""


def script(root: Path, text: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + text, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], within_s: float) -> tuple[int, str, str]:
    started_s = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started_s < within_s, err
    return process.returncode, out, err


@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "store.shutdown()"])
def test_a_process_ends_with_a_wedged_copier(root: Path, ending: str) -> None:
    process = script(
        root,
        f"""
gate = device.pause("start")
ticket = store.save("request", 1, {{"a": device.tensor([1.0])}})
gate.wait_reached()
print("wedged", flush=True)
{ending}
""",
    )
    assert process.stdout is not None and process.stdout.readline() == "wedged\n"
    code, _, err = finished(process, 5.0)
    assert code == 0, err
    assert "Traceback" not in err


def test_a_forked_child_is_told_to_open_its_own_store_and_the_parent_goes_on(root: Path) -> None:
    process = script(
        root,
        """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
expected = np.arange(100_000.0)
device.automatic = True
store.save("warm", 1, {"a": device.tensor(expected)}).result(10)
device.automatic = False
ticket = store.save("request", 1, {"a": device.tensor(expected)})
child = os.fork()
if child == 0:
    refused = 0
    for act in (lambda: store.save("request", 2, {"a": device.tensor([1])}), lambda: store.drain(0)):
        try:
            act()
        except StoreClosedError:
            refused += 1
    os._exit(0 if refused == 2 else 1)
status = os.waitpid(child, 0)[1]
device.automatic = True
ticket.result(10)
assert np.array_equal(store.load("request", 1).tensors["a"], expected)
assert store.shutdown(cleanup=True).clean
print(status)
""",
    )
    code, out, err = finished(process, 20.0)
    assert (code, out) == (0, "0\n"), err


@pytest.mark.parametrize("operation", ["start", "never"])
def test_sigterm_during_a_wedge_ends_in_time_and_says_what_is_kept(root: Path, operation: str) -> None:
    process = script(
        root,
        f"""
import logging
logging.basicConfig(level=logging.WARNING)
from snapstore.signals import install_sigterm_handler
install_sigterm_handler(store, grace_s=3.0, cleanup=False)
if {operation!r} == "start":
    device.pause("start")
host = store.save("host", 1, {{"a": np.arange(4)}})
ticket = store.save("request", 1, {{"a": device.tensor([1.0])}}, borrow=True)
while not device.count("start"):
    time.sleep(0.001)
print("wedged", flush=True)
time.sleep(60)
""",
    )
    assert process.stdout is not None and process.stdout.readline() == "wedged\n"
    process.send_signal(signal.SIGTERM)
    code, _, err = finished(process, 4.5)
    assert code == 0, err
    assert "may still touch are kept" in err
    assert [path.name for path in root.rglob("*.safetensors")] == ["1.safetensors"]
