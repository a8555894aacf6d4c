"""Room is bounded in jobs and bytes; waiting for it is bounded in time, also when the writer never comes back."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same, files_below, tensors

from snapstore import DiskQuotaError, SnapshotNotFoundError, SnapshotStore, StoreFullError, StoreOptions
from snapstore._memory import BufferPool
from snapstore.testing import FaultyFileSystem, Gate


def pinned_store(root: Path, files: FaultyFileSystem, **options: object) -> tuple[SnapshotStore, Gate]:
    """A store whose writer stands in its first write until the gate is opened."""
    store = SnapshotStore(root, StoreOptions(**options), file_system=files)  # type: ignore[arg-type]
    gate = files.pause("write", ".tmp")
    store.save("pinned", 1, tensors(1))
    gate.wait_reached()
    return store, gate


def test_a_full_queue_rejects_at_once_and_leaves_no_trace(root: Path, files: FaultyFileSystem) -> None:
    store, gate = pinned_store(root, files, max_pending_jobs=2, on_full="reject")
    with gate:
        store.save("second", 1, tensors(2))
        before = store.stats()
        started_s = time.monotonic()
        with pytest.raises(StoreFullError, match="no room") as caught:
            store.save("third", 1, tensors(3))
        assert time.monotonic() - started_s < 1.0, "it would wait 2 s"
        assert caught.value.key is not None and caught.value.pending_jobs == 2
        after = store.stats()
        assert (after.rejected, after.accepted) == (before.rejected + 1, before.accepted)
        assert after.live_requests == before.live_requests
        assert store.boundaries("third") == ()
        with pytest.raises(SnapshotNotFoundError):
            store.load("third", 1)
    assert store.flush(10)
    assert store.shutdown(cleanup=True).clean


def test_a_full_queue_waits_no_longer_than_its_bound_when_the_writer_is_stuck_for_ever(
    root: Path, files: FaultyFileSystem
) -> None:
    store, gate = pinned_store(root, files, max_pending_jobs=1, save_timeout_s=0.3)
    with gate:
        started_s = time.monotonic()
        with pytest.raises(StoreFullError) as caught:
            store.save("second", 1, tensors(2))
        waited_s = time.monotonic() - started_s
        assert 0.3 <= caught.value.waited_s <= waited_s < 1.5
    assert store.shutdown(cleanup=True).clean


def test_the_byte_limit_counts_what_is_pending_and_a_larger_job_goes_alone(
    root: Path, files: FaultyFileSystem
) -> None:
    store, gate = pinned_store(root, files, max_pending_bytes=8192, save_timeout_s=0.05)
    with gate:
        for number in range(2):
            with pytest.raises(StoreFullError, match="max_pending_bytes"):
                store.save("large", number, tensors(2, 64 * 1024))
    store.flush(10)
    ticket = store.save("large", 1, tensors(2, 64 * 1024))
    assert ticket.nbytes > 8192
    ticket.result(10)
    assert_same(store.load("large", 1), tensors(2, 64 * 1024))
    assert store.shutdown(cleanup=True).clean


def test_a_save_that_waits_goes_on_when_room_comes(root: Path, files: FaultyFileSystem) -> None:
    store, gate = pinned_store(root, files, max_pending_jobs=1, save_timeout_s=10)
    with gate, ThreadPoolExecutor(1) as saver:
        waiting = saver.submit(store.save, "second", 1, tensors(2))
        gate.open()
        waiting.result(10).result(10)
    assert_same(store.load("second", 1), tensors(2))
    assert store.shutdown(cleanup=True).clean


def test_a_session_quota_refuses_before_the_copy_and_cleanup_makes_room_again(root: Path) -> None:
    store = SnapshotStore(root, StoreOptions(max_session_bytes=64 * 1024))
    store.save("first", 1, tensors(1, 48 * 1024)).result(10)
    with pytest.raises(DiskQuotaError, match="max_session_bytes") as caught:
        store.save("second", 1, tensors(2, 48 * 1024))
    assert caught.value.limit_bytes == 64 * 1024 and caught.value.used_bytes >= 48 * 1024
    assert store.stats().rejected == 1
    assert store.cleanup_request("first").clean
    deadline_s = time.monotonic() + 10
    while store.stats().trash_bytes:
        assert time.monotonic() < deadline_s
    store.save("second", 1, tensors(2, 48 * 1024)).result(10)
    assert store.stats().session_bytes >= 48 * 1024
    assert len(files_below(store.session)) == 1
    assert store.shutdown(cleanup=True).clean


def test_min_free_bytes_refuses_when_the_disk_would_be_too_full(root: Path) -> None:
    store = SnapshotStore(root, StoreOptions(min_free_bytes=2**62))
    with pytest.raises(DiskQuotaError, match="min_free_bytes"):
        store.save("first", 1, tensors(1))
    assert store.shutdown(cleanup=True).clean


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def test_buffers_are_reused_within_what_may_be_kept() -> None:
    pool = BufferPool(keep_bytes=1 << 20)
    first = pool.take(210_000)
    address, nbytes = address_of(first), len(first)
    pool.give_back(first)
    assert pool.idle_bytes == nbytes >= 210_000
    del first
    assert address_of(pool.take(200_000)) == address and pool.idle_bytes == 0
    pool.give_back(pool.take(2 << 20))
    assert pool.idle_bytes == 0
    pool.give_back(pool.take(210_000))
    pool.close()
    assert pool.idle_bytes == 0


def test_idle_buffers_of_other_sizes_make_room_and_no_more_than_that() -> None:
    pool = BufferPool(keep_bytes=1 << 20)
    for buffer in [pool.take(256 << 10) for _ in range(4)]:
        pool.give_back(buffer)
    assert pool.idle_bytes == 1 << 20
    pool.give_back(pool.take(512 << 10))
    assert pool.idle_bytes == 1 << 20, "two of the four went"
    assert [len(pool.take(size << 10)) >> 10 for size in (256, 512, 256)] == [256, 512, 256]
    assert pool.idle_bytes == 0
    pool.give_back(pool.take(512 << 10))
    pool.give_back(pool.take(2 << 20))
    assert pool.idle_bytes == 512 << 10, "what can not be kept at all makes nobody go"


@pytest.mark.parametrize("left", [lambda view: view[5:7], lambda view: np.frombuffer(view, np.uint8)])
def test_a_buffer_that_comes_back_too_early_is_handed_to_nobody(left: Callable[[memoryview], Any]) -> None:
    pool = BufferPool(keep_bytes=1 << 20)
    early = pool.take(4096)
    kept, address = left(early), address_of(early)
    pool.give_back(early)
    del early
    assert address_of(pool.take(4096)) != address
    del kept


def test_memory_that_a_finalizer_of_a_cycle_keeps_is_not_used_again(root: Path) -> None:
    """The cyclic collector tells of the memory's end before it lets such an object keep it."""
    kept: list[Any] = []

    class Keeper:
        def __init__(self, memory: Any) -> None:
            self.memory, self.itself = memory, self

        def __del__(self) -> None:
            kept.append(self.memory)

    with SnapshotStore(root) as store:
        for count in (1, 2):
            store.save("request", count, {"a": np.full(4096, count, np.uint8)}).result(30)
        Keeper(store.load("request", 1).tensors["a"].base)
        gc.collect()
        later = store.load("request", 2)
        assert bytes(kept.pop()) == bytes([1]) * 4096, "and it is of this snapshot alone"
        del later


def test_a_lent_buffer_comes_back_with_its_last_view_and_not_before() -> None:
    pool = BufferPool(keep_bytes=1 << 20)
    lent = pool.lend(200_000)
    assert len(lent) == 200_000
    part = lent[5:7].toreadonly()
    del lent
    gc.collect()
    assert pool.idle_bytes == 0
    del part
    gc.collect()
    kept = pool.idle_bytes
    assert kept >= 200_000
    again = pool.lend(200_000)
    assert pool.idle_bytes == 0
    pool.close()
    del again
    gc.collect()
    assert pool.idle_bytes == 0


@pytest.mark.parametrize("when", ["pending", "committed"])
def test_a_load_reuses_the_memory_of_one_that_is_gone_and_of_no_other(
    root: Path, files: FaultyFileSystem, when: str
) -> None:
    with SnapshotStore(root, file_system=files) as store, files.pause("create", ".tmp") as gate:
        store.save("request", 1, {"a": np.arange(50_000)})
        if when == "committed":
            gate.open()
            assert store.flush(30)
        kept = store.load("request", 1).tensors["a"][7:]
        address = store.load("request", 1).tensors["a"].ctypes.data
        gc.collect()
        others = [store.load("request", 1).tensors["a"] for _ in range(3)]
        assert [each.ctypes.data == address for each in others].count(True) == 1
        others[0][:] = others[1][:] = others[2][:] = 9
        assert np.array_equal(kept, np.arange(7, 50_000))
