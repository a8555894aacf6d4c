"""The slab of pinned memory: locked once, in the background, within its limit; what finds no place does without."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from devices import PATIENCE_S, PINNED_BYTES, arrays, assert_loads, on, open_store, wait_for

from snapstore import StoreOptions
from snapstore._pinned import CHUNK_BYTES, HostBuffer, PinnedPool, default_limit_bytes
from snapstore._threads import Thread, Threads
from snapstore.testing import FakeDevice

PAGE = 4096


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice(automatic=True)


def started(device: FakeDevice, limit_bytes: int) -> PinnedPool:
    pool = PinnedPool(limit_bytes, Threads())
    pool.start(device)
    assert pool.await_started(10)
    return pool


def taken(pool: PinnedPool, nbytes: int) -> HostBuffer:
    buffer = pool.take(nbytes)
    assert buffer is not None
    return buffer


def test_nothing_is_pinned_after_the_first_use(root: Path, device: FakeDevice) -> None:
    with open_store(root, device) as store:
        store.save("warm", 1, on(device, arrays(0))).result(PATIENCE_S)
        wait_for(lambda: store.stats().pinned_bytes == PINNED_BYTES)
        before, pageable = device.count("pin"), store.stats().pageable_copies
        for count in range(100):
            store.save("request", count, on(device, arrays(count, 1000 + 97 * count))).result(PATIENCE_S)
        assert device.count("pin") == before
        assert store.stats().pageable_copies == pageable
        assert store.stats().pinned_bytes == PINNED_BYTES
        for count in range(100):
            assert_loads(store, "request", count, arrays(count, 1000 + 97 * count))
    assert device.pinned == {}


def test_a_save_does_not_wait_for_pages_to_be_locked(root: Path, device: FakeDevice) -> None:
    with open_store(root, device) as store, device.pause("pin") as gate:
        store.save("request", 1, on(device, arrays(1))).result(PATIENCE_S)
        gate.wait_reached()
        assert store.stats().pageable_copies == 1 and store.stats().pinned_bytes == 0
        assert_loads(store, "request", 1, arrays(1))
        assert threading.current_thread().name not in {
            call.thread for call in device.calls if call.operation == "pin"
        }


def test_a_refusal_to_pin_makes_saves_slower_and_not_wrong(
    root: Path, device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    device.fail("pin", OSError("out of lockable memory"), times=math.inf)
    with open_store(root, device) as store:
        for count in range(3):
            store.save("request", count, on(device, arrays(count))).result(PATIENCE_S)
            assert_loads(store, "request", count, arrays(count))
        assert store.stats().pageable_copies == 3 and store.stats().pinned_bytes == 0
    assert caplog.text.count("could be locked") == 1 and "out of lockable memory" in caplog.text


def test_without_a_slab_everything_works(root: Path, device: FakeDevice) -> None:
    with open_store(root, device, max_pinned_bytes=0) as store:
        store.save("request", 1, on(device, arrays(1))).result(PATIENCE_S)
        assert_loads(store, "request", 1, arrays(1))
        assert device.count("pin") == 0 and store.stats().pageable_copies == 1


def test_the_slab_is_pinned_in_chunks_and_what_is_there_can_be_used(device: FakeDevice) -> None:
    pool = started(device, CHUNK_BYTES + 3 * PAGE)
    assert sorted(device.pinned.values()) == [3 * PAGE, CHUNK_BYTES]
    assert pool.pinned_bytes == CHUNK_BYTES + 3 * PAGE
    whole = taken(pool, CHUNK_BYTES + 3 * PAGE)
    assert [len(piece) for piece in whole.pieces(PAGE, len(whole.view))] == [CHUNK_BYTES - PAGE, 3 * PAGE]
    assert [len(piece) for piece in whole.pieces(0, PAGE)] == [PAGE]
    assert list(whole.pieces(7, 7)) == []
    assert pool.take(1) is None
    whole.give_back()
    assert pool.close(10) and device.pinned == {}


def test_a_chunk_that_is_refused_leaves_those_before_it(device: FakeDevice) -> None:
    device.pause("pin").open()
    pool = PinnedPool(2 * CHUNK_BYTES, Threads())
    device.pin, pin = lambda area: pin(area) if not device.pinned else _refuse(), device.pin  # type: ignore[method-assign]
    pool.start(device)
    assert pool.await_started(10)
    assert pool.pinned_bytes == CHUNK_BYTES and pool.refused == "OSError: no more"
    assert pool.take(CHUNK_BYTES + 1) is None
    taken(pool, CHUNK_BYTES).give_back()
    assert pool.close(10)


def _refuse() -> None:
    raise OSError("no more")


class NoThread:
    """A thread of a process that has as many as it may, or of an interpreter that ends."""

    name = "none"

    def start(self) -> None:
        raise RuntimeError("can't start new thread")

    def join(self, timeout: float | None = None) -> None:
        raise RuntimeError("cannot join thread before it is started")

    def is_alive(self) -> bool:
        return False


def test_without_a_thread_for_it_nothing_is_locked_and_nothing_is_refused(device: FakeDevice) -> None:
    pool = PinnedPool(16 * PAGE, Threads(thread=lambda name, target: NoThread()))
    pool.start(device)
    assert pool.await_started(10)
    assert pool.take(1) is None and pool.refused == "snapstore-pinner did not start: can't start new thread"
    assert pool.close(10)


def test_without_a_thread_for_it_memory_stays_locked_at_the_end(device: FakeDevice) -> None:
    """As at the exit of Python 3.12, which starts no thread any more: the next store has its turn all the same."""

    def thread(name: str, target: Callable[[], None]) -> Thread:
        return NoThread() if name == "snapstore-unpinner" else Threads().thread(name, target)

    pool = PinnedPool(PAGE, Threads(thread=thread))
    pool.start(device)
    assert pool.await_started(10)
    assert not pool.close(10) and device.pinned
    assert pool.pinned_bytes == PAGE and pool.take(1) is None
    again = PinnedPool(PAGE, Threads())
    again.start(device)
    assert again.await_started(10) and again.close(10)


def test_buffers_never_overlap_and_the_slab_is_whole_again_at_the_end(device: FakeDevice) -> None:
    pool = started(device, 256 * PAGE)
    chance = random.Random(1)
    held: list[tuple[HostBuffer, int]] = []
    for number in range(3000):
        if held and chance.random() < 0.5:
            buffer, mark = held.pop(chance.randrange(len(held)))
            assert (buffer.view[0], buffer.view[-1]) == (mark, mark)
            buffer.give_back()
        else:
            buffer = pool.take(chance.randrange(1, 40 * PAGE))
            if buffer is not None:
                mark = number % 251
                buffer.view[0] = buffer.view[-1] = mark
                held.append((buffer, mark))
    for buffer, _ in held:
        buffer.give_back()
    taken(pool, 256 * PAGE).give_back()
    assert pool.close(10)


def test_the_slab_stays_while_somebody_has_a_buffer_of_it(device: FakeDevice) -> None:
    pool = started(device, 16 * PAGE)
    first, second = taken(pool, PAGE), taken(pool, PAGE)
    assert not pool.close(0.05) and device.pinned
    assert pool.take(1) is None, "it is closing"
    first.give_back()
    assert device.pinned
    second.view[:] = b"x" * PAGE
    second.give_back()
    wait_for(lambda: not device.pinned)


def test_a_pinner_that_the_driver_keeps_does_not_hold_up_the_end(device: FakeDevice) -> None:
    pool = PinnedPool(16 * PAGE, Threads())
    with device.pause("pin") as gate:
        pool.start(device)
        gate.wait_reached()
        pool.close(0.05)
    wait_for(lambda: pool.await_started(0))
    assert device.pinned == {}


def test_the_default_limit_is_a_share_of_the_memory_and_at_most_2_gib() -> None:
    assert 0 < default_limit_bytes() <= 2 * 1024**3
    assert StoreOptions().max_pinned_bytes is None
    with pytest.raises(ValueError, match="max_pinned_bytes"):
        StoreOptions(max_pinned_bytes=-1)
    with pytest.raises(TypeError, match="max_pinned_bytes"):
        StoreOptions(max_pinned_bytes=True)


def test_a_copy_is_cut_where_a_chunk_ends(
    root: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of one page: the moves of one snapshot never cross a boundary, and the bytes are right."""
    monkeypatch.setattr("snapstore._pinned.CHUNK_BYTES", PAGE)
    with open_store(root, device) as store:
        store.save("warm", 1, on(device, arrays(0))).result(PATIENCE_S)
        wait_for(lambda: store.stats().pinned_bytes == PINNED_BYTES)
        for count in range(5):
            store.save("request", count, on(device, arrays(count, 50_000))).result(PATIENCE_S)
            assert_loads(store, "request", count, arrays(count, 50_000))
            loaded = store.load("request", count, device=device).tensors
            assert all(np.array_equal(loaded[name], array) for name, array in arrays(count, 50_000).items())
        assert store.stats().pageable_copies <= 1
