"""Saves of device tensors: right bytes whatever is written after them, and nothing that waits for the device."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from devices import PATIENCE_S, PINNED_BYTES, arrays, assert_holds, assert_loads, on, open_store, wait_for
from helpers import assert_at_rest

from snapstore import SaveCancelledError, SaveState, SnapshotStore, StoreFullError, UnsupportedTensorError
from snapstore._device import StreamCaptureError
from snapstore.testing import FakeDevice, FaultyFileSystem


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def other() -> FakeDevice:
    return FakeDevice("fake:1")


@pytest.fixture
def store(root: Path, device: FakeDevice, other: FakeDevice) -> Iterator[SnapshotStore]:
    with open_store(root, device, other) as store:
        yield store


def test_a_save_returns_before_the_device_has_done_anything(store: SnapshotStore, device: FakeDevice) -> None:
    expected = arrays(1)
    ticket = store.save("request", 64, on(device, expected), metadata={"step": 3})
    assert ticket.released
    assert ticket.state is SaveState.STAGING and not ticket.done()
    assert store.has("request", 64) and store.boundaries("request") == (64,)
    assert store.stats().on_devices == 1 and store.stats().pending == 1
    device.automatic = True
    ticket.result(PATIENCE_S)
    snapshot = store.load("request", 64)
    assert_holds(snapshot.tensors, expected)
    assert snapshot.metadata == {"step": 3}
    assert store.stats().on_devices == 0
    assert_at_rest(store)


def test_a_save_that_finds_no_host_memory_is_not_charged_for_and_the_next_one_works(
    store: SnapshotStore, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too large for what is pinned, and nothing else is to be had."""
    device.automatic = True
    expected = arrays(1, 2 * PINNED_BYTES)

    def no_memory(nbytes: int) -> memoryview:
        raise MemoryError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr("snapstore._memory.allocate", no_memory)
        with pytest.raises(MemoryError):
            store.save("request", 64, on(device, expected))
    assert store.stats().pending == store.stats().pending_bytes == 0
    assert_at_rest(store)
    store.save("request", 64, on(device, expected)).result(PATIENCE_S)
    assert_loads(store, "request", 64, expected)


def test_a_source_that_is_overwritten_behind_the_stream_corrupts(
    store: SnapshotStore, device: FakeDevice
) -> None:
    """The control: without it, the tests below could not fail."""
    expected = arrays(1)
    tensors = on(device, expected)
    ticket = store.save("request", 64, tensors)
    np.asarray(tensors["conv"])[...] = 7
    device.automatic = True
    ticket.result(PATIENCE_S)
    assert (np.asarray(store.load("request", 64).tensors["conv"]) == 7).all()


@pytest.mark.parametrize("seed", range(8))
def test_no_save_sees_what_its_stream_writes_after_it(
    store: SnapshotStore, device: FakeDevice, other: FakeDevice, seed: int
) -> None:
    """Fifty saves a seed, on two devices and three streams of each; operations happen in any order that these allow."""
    chance = random.Random(seed)
    homes = [(each, f"stream {number}") for each in (device, other) for number in range(3)]
    buffers = {home: on(home[0], arrays(0)) for home in homes}
    saved = {}
    for count in range(50):
        home = chance.choice(homes)
        expected = arrays(100 * seed + count)
        with home[0].stream(home[1]):
            for name, array in expected.items():
                home[0].overwrite(buffers[home][name], array)
            saved[count] = store.save("request", count, buffers[home]), expected
            for tensor in buffers[home].values():
                home[0].overwrite(tensor, 0)
        for each in (device, other):
            each.complete(chance.randrange(8), by=chance)
    while not all(ticket.done() for ticket, _ in saved.values()):
        for each in (device, other):
            each.complete(by=chance)
    for count, (ticket, expected) in saved.items():
        ticket.result(0)
        assert_loads(store, "request", count, expected)
    assert device.faults == other.faults == []
    assert_at_rest(store)


def test_a_copy_waits_for_whoever_makes_the_values(store: SnapshotStore, device: FakeDevice) -> None:
    """The copy is asked for, and its stream is free, while the pack stands behind a kernel in the caller's stream."""
    expected = arrays(1)
    tensors = on(device, arrays(0))
    kernel = device.kernel()
    for name, array in expected.items():
        device.overwrite(tensors[name], array)
    ticket = store.save("request", 64, tensors)
    wait_for(lambda: device.count("start"))
    device.complete()
    assert not ticket.done()
    kernel.finish()
    device.automatic = True
    ticket.result(PATIENCE_S)
    assert_loads(store, "request", 64, expected)


def test_the_tensors_of_a_packed_save_are_let_go_when_it_returns(
    store: SnapshotStore, device: FakeDevice
) -> None:
    tensors = on(device, arrays(1))
    remembered = [weakref.ref(tensor) for tensor in tensors.values()]
    ticket = store.save("request", 64, tensors)
    del tensors
    assert ticket.released and device.waiting
    assert [ref() for ref in remembered] == [None] * 3
    device.automatic = True
    ticket.result(PATIENCE_S)
    assert_loads(store, "request", 64, arrays(1))


def test_lent_tensors_are_kept_until_released_and_not_longer(
    store: SnapshotStore, device: FakeDevice
) -> None:
    tensors = on(device, arrays(1))
    remembered = [weakref.ref(tensor) for tensor in tensors.values()]
    ticket = store.save("request", 64, tensors, borrow=True)
    del tensors
    wait_for(lambda: device.count("start"))
    gc.collect()
    assert not ticket.released and not ticket.wait_released(0)
    assert all(ref() is not None for ref in remembered)
    device.automatic = True
    assert ticket.wait_released(PATIENCE_S)
    assert [ref() for ref in remembered] == [None] * 3
    ticket.result(PATIENCE_S)
    assert device.count("pack") == 0
    assert_loads(store, "request", 64, arrays(1))


def test_the_thread_keeps_nothing_of_the_last_copy_alive(store: SnapshotStore, device: FakeDevice) -> None:
    device.automatic = True
    scratch = []
    pack = device.pack
    device.pack = lambda tensors: remember(scratch, pack(tensors))  # type: ignore[method-assign]
    store.save("request", 64, on(device, arrays(1))).result(PATIENCE_S)
    assert [ref() for ref in scratch] == [None]


def remember(refs: list[weakref.ref], blocks: list) -> list:
    refs += [weakref.ref(block.data) for block in blocks]
    return blocks


def test_a_thousand_tensors_are_one_launch_and_one_copy(store: SnapshotStore, device: FakeDevice) -> None:
    expected = {f"layer.{number}": np.full(8, number, np.uint16) for number in range(1000)}
    ticket = store.save("request", 64, on(device, expected))
    assert device.launches == 1 and device.count("mark") == 1
    device.automatic = True
    ticket.result(PATIENCE_S)
    assert device.count("start") == 1
    assert_loads(store, "request", 64, expected)


def test_host_and_device_tensors_go_into_one_snapshot(
    store: SnapshotStore, device: FakeDevice, other: FakeDevice
) -> None:
    expected = {
        "host": np.arange(7, dtype=np.int32), "here": np.arange(5.0), "there": np.arange(9, dtype=np.uint8),
        "empty": np.zeros((0, 3), np.int16), "scalar": np.array(3, np.int64), "last": np.arange(3, dtype=np.int32),
    }  # fmt: skip
    tensors = {
        **expected,
        "here": device.tensor(expected["here"]),
        "empty": device.tensor(expected["empty"]),
        "scalar": other.tensor(expected["scalar"]),
        "there": other.tensor(expected["there"]),
        "last": device.tensor(expected["last"]),
    }
    host = tensors["host"].copy()
    tensors["host"] = host
    ticket = store.save("request", 64, tensors)
    host[...] = 0
    other.automatic = True
    wait_for(lambda: other.waiting == 0 and other.count("start"))
    assert ticket.state is SaveState.STAGING
    device.automatic = True
    ticket.result(PATIENCE_S)
    assert_loads(store, "request", 64, expected)


@pytest.mark.parametrize("borrow", [False, True])
def test_views_of_device_tensors_are_saved_as_they_look(
    store: SnapshotStore, device: FakeDevice, borrow: bool
) -> None:
    base = device.tensor(np.arange(60).reshape(3, 4, 5))
    views = {
        "whole": base,
        "turned": base.T,
        "cut": base[1:, ::2],
        "row": base[2, 1],
        "item": base[:1, :1, :1],
    }
    expected = {name: np.ascontiguousarray(np.asarray(view)) for name, view in views.items()}
    device.automatic = True
    store.save("request", 64, views, borrow=borrow).result(PATIENCE_S)
    assert_loads(store, "request", 64, expected)


def test_a_capturing_stream_is_refused_and_nothing_was_reserved(
    store: SnapshotStore, device: FakeDevice
) -> None:
    with device.capturing(), pytest.raises(StreamCaptureError, match="capturing"):
        store.save("request", 64, on(device, arrays(1)))
    stats = store.stats()
    assert (stats.accepted, stats.rejected, stats.live_requests) == (0, 0, 0)
    assert device.count("pack") == 0


def test_a_bad_tensor_is_refused_before_the_device_is_asked(store: SnapshotStore, device: FakeDevice) -> None:
    with pytest.raises(UnsupportedTensorError):
        store.save("request", 64, {"bad": device.tensor(np.zeros(3, np.complex128))})
    assert device.calls == []


def test_a_pack_that_fails_raises_and_leaves_no_trace(store: SnapshotStore, device: FakeDevice) -> None:
    device.fail("pack", MemoryError("out of memory"))
    with pytest.raises(MemoryError):
        store.save("request", 64, on(device, arrays(1)))
    stats = store.stats()
    assert (stats.accepted, stats.failed, stats.pending_bytes, stats.on_devices) == (1, 1, 0, 0)
    device.automatic = True
    store.save("request", 64, on(device, arrays(1))).result(PATIENCE_S)
    assert_loads(store, "request", 64, arrays(1))


def test_a_copy_that_the_driver_refuses_fails_its_own_save_only(
    store: SnapshotStore, device: FakeDevice
) -> None:
    device.fail("start", RuntimeError("invalid argument"))
    ticket = store.save("request", 1, on(device, arrays(1)))
    error = ticket.exception(PATIENCE_S)
    assert error is not None and "invalid argument" in str(error.__cause__)
    assert ticket.state is SaveState.FAILED
    later = store.save("request", 2, on(device, arrays(2)))
    device.automatic = True
    later.result(PATIENCE_S)
    assert store.health().status == "ok" and store.stats().leaked_bytes == 0
    assert_loads(store, "request", 2, arrays(2))


def test_two_devices_may_finish_in_any_order_and_the_later_save_of_a_key_wins(
    store: SnapshotStore, device: FakeDevice, other: FakeDevice
) -> None:
    earlier = store.save("request", 64, on(device, arrays(1)))
    later = store.save("request", 64, on(other, arrays(2)))
    other.automatic = True
    later.result(PATIENCE_S)
    assert not earlier.done()
    assert_loads(store, "request", 64, arrays(2))
    device.automatic = True
    assert isinstance(earlier.exception(PATIENCE_S), SaveCancelledError)
    assert_loads(store, "request", 64, arrays(2))


def test_what_is_on_its_way_counts_against_the_limit_of_bytes(root: Path, device: FakeDevice) -> None:
    nbytes = sum(array.nbytes for array in arrays(1).values())
    with open_store(root, device, max_pending_bytes=2 * nbytes, save_timeout_s=0.2) as store:
        tickets = [store.save("request", count, on(device, arrays(count))) for count in (1, 2)]
        started_s = time.monotonic()
        with pytest.raises(StoreFullError):
            store.save("request", 3, on(device, arrays(3)))
        assert time.monotonic() - started_s < 1.0
        assert store.stats().pending_bytes == 2 * nbytes
        device.automatic = True
        for ticket in tickets:
            ticket.result(PATIENCE_S)
        store.save("request", 3, on(device, arrays(3))).result(PATIENCE_S)
        assert store.stats().pending_bytes == 0


def test_only_the_oldest_copy_is_polled(store: SnapshotStore, device: FakeDevice) -> None:
    tickets = [store.save("request", count, on(device, arrays(count))) for count in range(5)]
    wait_for(lambda: device.count("start") == 5 and sum(device.polls.values()) >= 20)
    assert len(device.polls) == 1
    device.automatic = True
    for ticket in tickets:
        ticket.result(PATIENCE_S)


def test_nobody_who_only_looks_asks_the_device(store: SnapshotStore, device: FakeDevice) -> None:
    with device.pause("start") as gate:
        ticket = store.save("request", 64, on(device, arrays(1)))
        gate.wait_reached()
        before = len(device.calls), sum(device.polls.values())
        store.health()
        store.stats()
        store.boundaries("request")
        assert store.has("request", 64)
        assert not store.flush(0) and not store.drain(0) and not store.drain_request("request", timeout_s=0)
        assert (len(device.calls), sum(device.polls.values())) == before
    device.automatic = True
    ticket.result(PATIENCE_S)


def test_the_caller_makes_only_calls_that_do_not_wait(store: SnapshotStore, device: FakeDevice) -> None:
    device.automatic = True
    store.save("request", 64, on(device, arrays(1))).result(PATIENCE_S)
    store.load("request", 64, device=device)
    wait_for(lambda: store.stats().pinned_bytes == PINNED_BYTES)
    me = threading.current_thread().name
    mine = {call.operation for call in device.calls if call.thread == me}
    assert mine == {"check_stream", "pack", "mark", "upload"}
    theirs = {call.thread for call in device.calls if call.operation in ("open", "start")}
    assert theirs == {f"snapstore-device-{device.name}"}
    assert {call.thread for call in device.calls if call.operation == "pin"} == {"snapstore-pinner"}


def test_without_device_tensors_no_device_is_called_and_no_thread_started(
    store: SnapshotStore, device: FakeDevice
) -> None:
    store.save("request", 64, arrays(1)).result(PATIENCE_S)
    assert_loads(store, "request", 64, arrays(1))
    assert device.calls == [] and store.stats().pinned_bytes == 0
    assert not [
        each.name for each in threading.enumerate() if each.name.startswith(("snapstore-d", "snapstore-p"))
    ]


def test_the_threads_of_devices_are_daemons_one_a_device(
    store: SnapshotStore, device: FakeDevice, other: FakeDevice
) -> None:
    device.automatic = other.automatic = True
    for count in range(4):
        store.save("request", count, {"a": device.tensor([1]), "b": other.tensor([2])}).result(PATIENCE_S)
    threads = [each for each in threading.enumerate() if each.name.startswith("snapstore-device-")]
    assert sorted(each.name for each in threads) == [
        "snapstore-device-fake:0", "snapstore-device-fake:1", "snapstore-device-watch"
    ]  # fmt: skip
    assert all(each.daemon for each in threads)


def test_saves_from_many_threads_arrive(store: SnapshotStore, device: FakeDevice, other: FakeDevice) -> None:
    device.automatic = other.automatic = True

    def save(number: int) -> None:
        home = (device, other)[number % 2]
        with home.stream(f"stream {number % 3}"):
            for count in range(10):
                store.save(f"request-{number}", count, on(home, arrays(10 * number + count))).result(
                    2 * PATIENCE_S
                )

    with ThreadPoolExecutor(8) as savers:
        for each in [savers.submit(save, number) for number in range(8)]:
            each.result(3 * PATIENCE_S)
    for number in range(8):
        for count in range(10):
            assert_loads(store, f"request-{number}", count, arrays(10 * number + count))
    assert_at_rest(store)


def test_a_buffer_goes_back_only_when_its_file_is_written(root: Path, device: FakeDevice) -> None:
    """Room for one snapshot in the slab: while the writer stands in it, the next save has to do without."""
    files = FaultyFileSystem()
    nbytes = sum(array.nbytes for array in arrays(1).values())
    with open_store(root, device, files=files, max_pinned_bytes=-(-nbytes // 4096) * 4096) as store:
        device.automatic = True
        store.save("warm", 1, on(device, arrays(0))).result(PATIENCE_S)
        wait_for(lambda: store.stats().pinned_bytes > 0)
        pageable = store.stats().pageable_copies
        with files.pause("write", ".tmp") as gate:
            first = store.save("request", 1, on(device, arrays(1)))
            gate.wait_reached()
            second = store.save("request", 2, on(device, arrays(2)))
            wait_for(lambda: second.state is SaveState.QUEUED)
            assert store.stats().pageable_copies == pageable + 1
        first.result(PATIENCE_S), second.result(PATIENCE_S)
        assert_loads(store, "request", 1, arrays(1))
        assert_loads(store, "request", 2, arrays(2))
        store.save("request", 3, on(device, arrays(3))).result(PATIENCE_S)
        assert store.stats().pageable_copies == pageable + 1
