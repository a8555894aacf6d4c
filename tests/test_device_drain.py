"""Who forgets a request, or wants its tensors back, and a device that is in the middle of copying them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import pytest
from devices import PATIENCE_S, arrays, assert_loads, on, open_store, wait_for
from helpers import assert_at_rest, files_below

from snapstore import SaveCancelledError, SaveFailedError, SaveState, SnapshotNotFoundError, SnapshotStore
from snapstore.testing import FakeDevice


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def store(root: Path, device: FakeDevice) -> Iterator[SnapshotStore]:
    with open_store(root, device) as store:
        yield store


def test_drain_waits_for_a_copy_that_is_under_way_also_of_a_packed_save(
    store: SnapshotStore, device: FakeDevice
) -> None:
    """``released`` holds in the order of the stream; that nothing reads the tensors any more is known later."""
    ticket = store.save("request", 64, on(device, arrays(1)))
    assert ticket.released and not store.drain_request("request", timeout_s=0.05)
    with ThreadPoolExecutor(1) as drainer:
        waiting = drainer.submit(store.drain_request, "request", timeout_s=PATIENCE_S)
        device.automatic = True
        assert waiting.result(PATIENCE_S)
    ticket.result(PATIENCE_S)
    assert_loads(store, "request", 64, arrays(1))


@pytest.mark.parametrize("borrow", [False, True])
def test_drain_counts_a_save_from_when_it_was_handed_over_not_from_its_event(
    store: SnapshotStore, device: FakeDevice, borrow: bool
) -> None:
    """The device's thread stands in the driver: there is no event yet that anybody could look at."""
    with device.pause("start") as gate:
        ticket = store.save("request", 64, on(device, arrays(1)), borrow=borrow)
        gate.wait_reached()
        assert not store.drain_request("request", timeout_s=0.05)
        assert not store.drain(0.05)
        assert store.drain_request("another", timeout_s=0.05)
    device.automatic = True
    assert store.drain_request("request", timeout_s=PATIENCE_S)
    assert ticket.released


@pytest.mark.parametrize("over_by", ["cleanup", "timeout", "timeout, and cut of a view"])
def test_drain_waits_for_a_pack_though_its_save_is_over(root: Path, device: FakeDevice, over_by: str) -> None:
    """The device's thread has not asked for the copy, and never will; the caller's stream will read all the same."""
    tensors = {"a": device.tensor(range(64))}
    if "view" in over_by:
        tensors = {"a": tensors["a"][::2]}
    with open_store(root, device, device_timeout_s=60.0 if over_by == "cleanup" else 0.1) as store:
        with device.pause("open") as gate:
            ticket = store.save("request", 64, tensors, borrow="view" in over_by)
            gate.wait_reached()
            if over_by == "cleanup":
                store.cleanup_request("request")
            else:
                assert isinstance(ticket.exception(PATIENCE_S), SaveFailedError)
            assert device.waiting and not store.drain_request("request", timeout_s=0.05)
        assert not store.drain(0.05)
        device.automatic = True
        assert store.drain_request("request", timeout_s=PATIENCE_S)
        assert ticket.done() and ticket.released and device.count("start") == 0


def test_drain_takes_back_at_its_deadline_what_was_lent_and_not_asked_for(
    store: SnapshotStore, device: FakeDevice
) -> None:
    with device.pause("open") as gate:
        lent = store.save("request", 1, on(device, arrays(1)), borrow=True)
        packed = store.save("request", 2, on(device, arrays(2)))
        other = store.save("another", 1, on(device, arrays(3)), borrow=True)
        gate.wait_reached()
        assert not store.drain_request("request", timeout_s=0.05), "the pack may be reading"
        assert lent.released and isinstance(lent.exception(0), SaveFailedError)
        assert not other.released and not packed.done()
    device.automatic = True
    packed.result(PATIENCE_S), other.result(PATIENCE_S)
    assert device.count("start") == 2
    with pytest.raises(SaveFailedError, match="asked back"):
        store.load("request", 1)
    assert_loads(store, "request", 2, arrays(2))


def test_drain_gives_a_healthy_device_its_time_before_it_takes_anything_back(
    store: SnapshotStore, device: FakeDevice
) -> None:
    device.automatic = True
    for count in range(20):
        ticket = store.save("request", count, on(device, arrays(count)), borrow=True)
        assert store.drain_request("request", timeout_s=PATIENCE_S)
        assert ticket.released
        ticket.result(PATIENCE_S)


def test_drain_does_not_wait_for_saves_that_come_later(store: SnapshotStore, device: FakeDevice) -> None:
    device.automatic = True
    store.save("request", 1, on(device, arrays(1))).result(PATIENCE_S)
    device.automatic = False
    gate = device.pause("start")
    first = store.save("request", 2, on(device, arrays(2)))
    gate.wait_reached()
    with ThreadPoolExecutor(1) as drainer:
        waiting = drainer.submit(store.drain, PATIENCE_S)
        with pytest.raises(FutureTimeoutError):
            waiting.result(0.1)
        kernel = device.kernel()
        second = store.save("request", 3, on(device, arrays(3)))
        gate.open()
        wait_for(lambda: device.complete() + 1 and first.done())
        assert waiting.result(PATIENCE_S)
        assert not second.done()
    kernel.finish()


def test_a_save_that_is_cancelled_before_it_is_asked_for_never_is(
    store: SnapshotStore, device: FakeDevice
) -> None:
    with device.pause("open") as gate:
        ticket = store.save("aborted", 64, on(device, arrays(1)), borrow=True)
        gate.wait_reached()
        started_s = time.monotonic()
        report = store.cleanup_request("aborted")
        assert time.monotonic() - started_s < 1.0
        assert (report.clean, report.cancelled) == (True, 1)
        assert not store.has("aborted", 64) and store.boundaries("aborted") == ()
        with pytest.raises(SnapshotNotFoundError):
            store.load("aborted", 64)
    assert isinstance(ticket.exception(PATIENCE_S), SaveCancelledError)
    assert ticket.released
    assert device.count("start") == 0
    assert_at_rest(store)


def test_a_save_that_is_cancelled_under_way_ends_when_its_copy_does(
    store: SnapshotStore, device: FakeDevice
) -> None:
    ticket = store.save("aborted", 64, on(device, arrays(1)), borrow=True)
    wait_for(lambda: device.count("start"))
    started_s = time.monotonic()
    assert store.cleanup_request("aborted").clean
    assert time.monotonic() - started_s < 1.0, "a cleanup does not wait for a device"
    assert not store.has("aborted", 64)
    assert not ticket.released and store.stats().pending == 1
    device.automatic = True
    assert isinstance(ticket.exception(PATIENCE_S), SaveCancelledError)
    assert ticket.state is SaveState.CANCELLED and ticket.released
    assert files_below(store.session) == []
    assert_at_rest(store)


def test_a_new_life_of_an_id_is_not_mistaken_for_the_one_that_was_cancelled(
    store: SnapshotStore, device: FakeDevice
) -> None:
    with device.pause("open") as gate:
        old = store.save("again", 64, on(device, arrays(1)))
        gate.wait_reached()
        store.cleanup_request("again")
        new = store.save("again", 64, on(device, arrays(2)))
        assert new.generation > old.generation
        assert store.boundaries("again") == (64,)
    device.automatic = True
    assert isinstance(old.exception(PATIENCE_S), SaveCancelledError)
    new.result(PATIENCE_S)
    assert device.count("start") == 1
    assert_loads(store, "again", 64, arrays(2))


def test_a_drain_fences_the_lives_of_an_id_that_have_ended_too(
    store: SnapshotStore, device: FakeDevice
) -> None:
    store.save("again", 64, on(device, arrays(1)), borrow=True)
    wait_for(lambda: device.count("start"))
    store.cleanup_request("again")
    assert not store.drain_request("again", timeout_s=0.05)
    device.automatic = True
    assert store.drain_request("again", timeout_s=PATIENCE_S)
