"""Loads of what is still on its way from a device, and loads to a device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import numpy as np
import pytest
from devices import PATIENCE_S, arrays, assert_holds, assert_loads, on, open_store, wait_for

from snapstore import (
    SaveFailedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotStore,
    SnapstoreError,
)
from snapstore._device import StreamCaptureError
from snapstore.testing import FakeDevice, FakeTensor, FaultyFileSystem


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def store(root: Path, device: FakeDevice, files: FaultyFileSystem) -> Iterator[SnapshotStore]:
    with open_store(root, device, files=files) as store:
        yield store


def test_a_load_waits_for_a_copy_that_is_on_its_way(store: SnapshotStore, device: FakeDevice) -> None:
    store.save("request", 64, on(device, arrays(1)))
    with ThreadPoolExecutor(1) as reader:
        loading = reader.submit(store.load, "request", 64)
        with pytest.raises(FutureTimeoutError):
            loading.result(0.1)
        device.automatic = True
        assert_holds(loading.result(PATIENCE_S).tensors, arrays(1))


def test_that_wait_is_bounded(root: Path, device: FakeDevice) -> None:
    with open_store(root, device, device_timeout_s=0.2) as store:
        store.save("request", 64, on(device, arrays(1)))
        started_s = time.monotonic()
        with pytest.raises((SaveFailedError, TimeoutError)):
            store.load("request", 64)
        assert time.monotonic() - started_s < 1.0
        with pytest.raises(SaveFailedError):
            store.load("request", 64)


def test_a_load_gives_the_later_save_of_a_key_never_the_one_that_it_replaces(
    store: SnapshotStore, device: FakeDevice
) -> None:
    store.save("request", 64, arrays(1)).result(PATIENCE_S)
    store.save("request", 64, on(device, arrays(2)))
    with ThreadPoolExecutor(1) as reader:
        loading = reader.submit(store.load, "request", 64)
        device.automatic = True
        assert_holds(loading.result(PATIENCE_S).tensors, arrays(2))


def test_a_copy_that_fails_leaves_the_earlier_snapshot_readable(
    store: SnapshotStore, device: FakeDevice
) -> None:
    device.automatic = True
    store.save("request", 64, on(device, arrays(1))).result(PATIENCE_S)
    device.fail("start", RuntimeError("invalid argument"))
    with pytest.raises(SaveFailedError):
        store.save("request", 64, on(device, arrays(2))).result(PATIENCE_S)
    assert_loads(store, "request", 64, arrays(1))


def test_a_cleanup_ends_the_wait_of_a_load(store: SnapshotStore, device: FakeDevice) -> None:
    store.save("request", 64, on(device, arrays(1)))
    with ThreadPoolExecutor(1) as reader:
        loading = reader.submit(store.load, "request", 64)
        with pytest.raises(FutureTimeoutError):
            loading.result(0.1)
        store.cleanup_request("request", timeout_s=0)
        with pytest.raises(SnapshotNotFoundError):
            loading.result(PATIENCE_S)


def test_detach_waits_for_a_copy_that_is_on_its_way(
    store: SnapshotStore, device: FakeDevice, tmp_path: Path
) -> None:
    store.save("request", 64, arrays(1)).result(PATIENCE_S)
    store.save("request", 64, on(device, arrays(2)))
    with ThreadPoolExecutor(1) as detacher:
        detaching = detacher.submit(store.detach, "request", 64, tmp_path / "out.safetensors")
        with pytest.raises(FutureTimeoutError):
            detaching.result(0.1)
        device.automatic = True
        path = detaching.result(PATIENCE_S)
    from safetensors.numpy import load_file

    assert_holds({name: load_file(path)[name] for name in arrays(2)}, arrays(2))


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("from_device", [False, True])
def test_a_load_to_a_device_returns_before_the_copy_and_its_stream_waits_for_it(
    store: SnapshotStore, device: FakeDevice, files: FaultyFileSystem, pending: bool, from_device: bool
) -> None:
    gate = files.pause("write", ".tmp") if pending else None
    device.automatic = True
    ticket = store.save("request", 64, on(device, arrays(1)) if from_device else arrays(1))
    if gate:
        gate.wait_reached()
    else:
        ticket.result(PATIENCE_S)
    device.automatic = False
    snapshot = store.load("request", 64, device=device)
    assert snapshot.source == ("memory" if pending else "disk")
    assert all(
        isinstance(each, FakeTensor) and each.__snapstore_device__ is device
        for each in snapshot.tensors.values()
    )
    copy = device.tensor(np.zeros(arrays(1)["conv"].shape, np.uint8))
    device.overwrite(copy, snapshot.tensors["conv"])
    assert device.waiting
    if gate:
        gate.open()
        ticket.result(PATIENCE_S)
    device.automatic = True
    assert_holds(snapshot.tensors, arrays(1))
    assert np.array_equal(copy, arrays(1)["conv"]), "the caller's stream had to wait"


def test_the_memory_of_a_load_is_used_again_only_when_the_device_has_read_it(
    root: Path, device: FakeDevice
) -> None:
    """Room for one buffer in the slab: the second load does without, and neither sees the other's bytes."""
    with open_store(root, device, max_pinned_bytes=4096) as store:
        device.automatic = True
        for count in (1, 2, 3):
            store.save("request", count, on(device, arrays(count, 1024))).result(PATIENCE_S)
        wait_for(lambda: store.stats().pinned_bytes == 4096)
        device.automatic = False
        loaded = [store.load("request", count, device=device).tensors for count in (1, 2, 3)]
        device.automatic = True
        for count, tensors in zip((1, 2, 3), loaded, strict=True):
            assert_holds(tensors, arrays(count, 1024))


def test_a_corrupt_file_gives_its_memory_back(root: Path, device: FakeDevice) -> None:
    with open_store(root, device, max_pinned_bytes=4096) as store:
        device.automatic = True
        info = store.save("request", 64, on(device, arrays(1, 1024))).result(PATIENCE_S)
        wait_for(lambda: store.stats().pinned_bytes == 4096)
        raw = bytearray(info.path.read_bytes())
        raw[-1] ^= 1
        info.path.write_bytes(raw)
        for _ in range(3):
            with pytest.raises(SnapshotCorruptError):
                store.load("request", 64, device=device)
        assert device.count("upload") == 0
        pageable = store.stats().pageable_copies
        store.save("request", 64, on(device, arrays(1, 1024))).result(PATIENCE_S)
        assert store.stats().pageable_copies == pageable


def test_a_load_to_a_capturing_or_stuck_device_says_so(root: Path, device: FakeDevice) -> None:
    with open_store(root, device, device_timeout_s=0.1) as store:
        store.save("host", 1, arrays(1)).result(PATIENCE_S)
        with device.capturing(), pytest.raises(StreamCaptureError, match="capturing"):
            store.load("host", 1, device=device)
        store.save("wedged", 1, on(device, arrays(2))).exception(PATIENCE_S)
        with pytest.raises(SnapstoreError, match="stuck"):
            store.load("host", 1, device=device)
        assert_loads(store, "host", 1, arrays(1))


def test_an_upload_that_never_lands_makes_its_device_stuck(root: Path, device: FakeDevice) -> None:
    with open_store(root, device, device_timeout_s=0.1) as store:
        store.save("host", 1, arrays(1)).result(PATIENCE_S)
        tensors = store.load("host", 1, device=device).tensors
        wait_for(lambda: store.health().status == "stuck")
        device.automatic = True
        wait_for(lambda: store.health().status == "ok")
        assert_holds(tensors, arrays(1))
