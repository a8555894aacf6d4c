"""Where the store that this one grew from failed: one test each, named after the right behaviour."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same, files_below, tensors

from snapstore import (
    SaveCancelledError,
    SaveFailedError,
    SaveState,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreClosedError,
    StoreFullError,
    StoreOptions,
)
from snapstore.testing import FaultyFileSystem


@pytest.fixture
def store(root: Path, files: FaultyFileSystem) -> Iterator[SnapshotStore]:
    store = SnapshotStore(root, StoreOptions(save_timeout_s=0.3), file_system=files)
    yield store
    files.heal()
    assert store.shutdown(cleanup=True).clean


def test_01_saves_after_both_cleanups_timed_out_are_kept(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("rename", ".safetensors") as gate:
        store.save("request", 1, tensors(1))
        gate.wait_reached()
        assert not store.cleanup_request("request", timeout_s=0.01).clean
        assert not store.cleanup_all(timeout_s=0.01).clean
        ticket = store.save("request", 1, tensors(2))
    assert ticket.result(10).path.exists()
    assert_same(store.load("request", 1), tensors(2))


def test_02_a_save_that_lands_while_a_cleanup_waits_is_kept(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    gate = files.pause("rename", ".safetensors")
    store.save("request", 1, tensors(1))
    gate.wait_reached()
    with ThreadPoolExecutor(1) as cleaner:
        waiting = cleaner.submit(store.cleanup_all, timeout_s=10)
        while store.has("request", 1):
            assert not waiting.done()
        ticket = store.save("request", 2, tensors(2))
        gate.open()
        assert waiting.result(10).clean
    ticket.result(10)
    assert store.boundaries("request") == (2,)
    assert_same(store.load("request", 2), tensors(2))


def test_03_a_file_that_appears_after_a_timed_out_cleanup_is_never_served(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("rename", ".safetensors", when="after") as gate:
        store.save("request", 1, tensors(1))
        gate.wait_reached()
        assert len(files_below(store.session)) == 1
        assert not store.cleanup_all(timeout_s=0.01).clean
        with pytest.raises(SnapshotNotFoundError):
            store.load("request", 1)
    assert store.cleanup_all(timeout_s=10).clean
    with pytest.raises(SnapshotNotFoundError):
        store.load("request", 1)


def test_04_an_abort_waits_for_no_other_request_and_a_reset_costs_one_wait(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("write", ".tmp") as gate:
        store.save("stuck", 1, tensors(0))
        gate.wait_reached()
        for number in range(8):
            store.save(f"request-{number}", 1, tensors(number))
        started_s = time.monotonic()
        assert store.cleanup_request("request-3", timeout_s=10).clean
        assert time.monotonic() - started_s < 1.0
        assert not store.cleanup_all(timeout_s=0.3).clean
        assert time.monotonic() - started_s < 2.0


def test_05_a_save_over_the_byte_cap_waits_no_longer_than_its_bound(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, StoreOptions(max_pending_bytes=8192, save_timeout_s=0.3), file_system=files)
    with files.pause("write", ".tmp") as gate:
        store.save("stuck", 1, tensors(1))
        gate.wait_reached()
        started_s = time.monotonic()
        with pytest.raises(StoreFullError):
            store.save("large", 1, tensors(2, 1 << 20))
        assert time.monotonic() - started_s < 1.5
    assert store.shutdown(cleanup=True).clean


@pytest.mark.parametrize("operation", ["create", "write", "rename"])
def test_06_a_failed_overwrite_keeps_the_good_file(
    store: SnapshotStore, files: FaultyFileSystem, operation: str
) -> None:
    store.save("request", 1, tensors(1)).result(10)
    files.fail(operation, errno.ENOSPC, ".tmp")
    ticket = store.save("request", 1, tensors(2))
    error = ticket.exception(10)
    assert isinstance(error, SaveFailedError) and isinstance(error.__cause__, OSError)
    assert_same(store.load("request", 1), tensors(1))
    assert len(files_below(store.session)) == 1


def test_07_the_writer_survives_an_error_of_one_job(
    store: SnapshotStore, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    files.fail("write", errno.EIO, ".tmp")
    bad, good = store.save("bad", 1, tensors(1)), store.save("good", 1, tensors(2))
    assert isinstance(bad.exception(10), SaveFailedError) and bad.state is SaveState.FAILED
    assert good.result(10).path.exists()
    with pytest.raises(SaveFailedError, match="Input/output error"):
        store.load("bad", 1)
    warnings = [record for record in caplog.records if "failed" in record.getMessage()]
    assert (
        len(
            [
                record
                for record in warnings
                if record.levelname == "WARNING" and "'bad'" in record.getMessage()
            ]
        )
        == 1
    )


def test_08_shutdown_writes_what_was_accepted_and_takes_nothing_new(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    gate = files.pause("create", ".tmp")
    tickets = [store.save("request", count, tensors(count)) for count in range(10)]
    gate.wait_reached()
    with ThreadPoolExecutor(1) as ender:
        ending = ender.submit(store.shutdown)
        while store.health().status != "dead":
            assert not ending.done()
        with pytest.raises(StoreClosedError):
            store.save("late", 1, tensors(1))
        gate.open()
        report = ending.result(10)
    assert report.clean and all(ticket.result(0).path.exists() for ticket in tickets)


def test_09_a_second_store_leaves_a_live_session_alone(root: Path) -> None:
    first = SnapshotStore(root)
    info = first.save("request", 1, tensors(1)).result(10)
    second = SnapshotStore(root)
    assert second.cleanup_all(timeout_s=10).clean
    assert second.shutdown(cleanup=True).clean
    assert info.path.exists()
    assert_same(first.load("request", 1), tensors(1))
    assert first.shutdown(cleanup=True).clean


def test_10_a_load_of_a_pending_snapshot_holds_up_nobody(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    big = {"state": np.arange(64 << 20, dtype=np.uint8)}
    looks = 0
    with files.pause("create", ".tmp") as gate, ThreadPoolExecutor(1) as loader:
        store.save("big", 1, big)
        gate.wait_reached()
        loading = loader.submit(lambda: [store.load("big", 1) for _ in range(4)])
        while not loading.done():
            store.has("big", 1)
            store.stats()
            looks += 1
        assert_same(loading.result(10)[0], big)
    assert looks > 40, "who waits for a load has one look in each"


def test_11_a_flipped_byte_is_found_and_scalars_and_gaps_come_back(store: SnapshotStore) -> None:
    metadata = {
        "state": [None, 1, 2.5, "text", True, None],
        "nested": {"empty": [], "unicode": "\u00fc\u4e2d"},
    }
    info = store.save("request", 1, tensors(1), metadata=metadata).result(10)
    assert store.load("request", 1).metadata == metadata
    content = bytearray(info.path.read_bytes())
    content[-7] ^= 1
    info.path.write_bytes(content)
    with pytest.raises(SnapshotCorruptError) as caught:
        store.load("request", 1)
    assert caught.value.key == info.key and caught.value.path is not None


def test_12_of_two_pending_saves_of_a_key_the_last_wins_and_the_first_is_told(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("create", ".tmp") as gate:
        store.save("other", 1, tensors(0))
        gate.wait_reached()
        first = store.save("request", 1, tensors(1))
        second = store.save("request", 1, tensors(2))
        assert isinstance(first.exception(10), SaveCancelledError)
        assert_same(store.load("request", 1), tensors(2))
    second.result(10)
    assert_same(store.load("request", 1), tensors(2))


def test_13_wide_and_complex_numbers_are_kept(store: SnapshotStore) -> None:
    wide = {
        "double": np.array([1.0, -0.0, np.nan], dtype=np.float64),
        "complex": np.array([[1 + 2j, 3 - 4j]], dtype=np.complex64),
        "unsigned": np.array(2**64 - 1, dtype=np.uint64),
    }
    store.save("request", 1, wide).result(10)
    assert_same(store.load("request", 1), wide)
    torch = pytest.importorskip("torch", reason="fp8 needs torch")
    eight = torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    store.save("request", 2, {"eight": eight}).result(10)
    loaded = store.load("request", 2).tensors["eight"]
    assert loaded.dtype == torch.float8_e4m3fn
    assert torch.equal(loaded.view(torch.uint8), eight.view(torch.uint8))


def test_an_idle_store_uses_no_processor_time(store: SnapshotStore) -> None:
    store.save("request", 1, tensors(1)).result(10)
    started_s = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - started_s < 0.02, sys.version
