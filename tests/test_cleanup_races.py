"""A writer and a cleaner meet at every point of a write. Each race is forced through a gate, never by sleeping."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import assert_at_rest, assert_same, files_below, tensors

from snapstore import (
    SaveCancelledError,
    SaveState,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreOptions,
)
from snapstore.testing import FaultyFileSystem

GATES = [
    ("create", ".tmp", "before"),
    ("create", ".tmp", "after"),
    ("write", ".tmp", "before"),
    ("write", ".tmp", "after"),
    ("make_directory", ".g", "before"),
    ("rename", ".safetensors", "before"),
    ("rename", ".safetensors", "after"),
]
"""Where a write can be stopped: before it has a file, in the middle of it, before and after it has its name."""


def settle(store: SnapshotStore) -> None:
    """Everything accepted has an end, and the sweeper has put away what it was given."""
    assert store.flush(10)
    assert store.cleanup_request("nobody", timeout_s=5).clean


@pytest.mark.parametrize("gate_at", GATES, ids=lambda gate: f"{gate[2]}-{gate[0]}")
def test_a_cleanup_that_times_out_while_the_writer_is_in_the_job_leaves_the_file_to_the_writer(
    store: SnapshotStore,
    files: FaultyFileSystem,
    eventually: Callable[..., None],
    gate_at: tuple[str, str, str],
) -> None:
    operation, path, when = gate_at
    with files.pause(operation, path, when=when) as gate:
        ticket = store.save("aborted", 64, tensors(1))
        gate.wait_reached()
        report = store.cleanup_request("aborted", timeout_s=0.05)
        assert (report.clean, report.cancelled, report.left_to_writer) == (False, 1, 1)
        assert not store.has("aborted", 64)
        with pytest.raises(SnapshotNotFoundError):
            store.load("aborted", 64)
        assert store.stats().cancelled_in_hand == 1
    assert isinstance(ticket.exception(10), SaveCancelledError)
    assert ticket.state is SaveState.CANCELLED
    assert store.cleanup_request("aborted", timeout_s=10).clean
    assert store.stats().cancelled_in_hand == store.stats().writer_restarts == 0
    eventually(lambda: store.stats().trash_bytes == 0)
    assert [name for name in files_below(store.session) if not name.startswith(".trash")] == []


@pytest.mark.parametrize("gate_at", GATES, ids=lambda gate: f"{gate[2]}-{gate[0]}")
def test_a_cleanup_that_waits_is_clean_once_the_writer_has_let_go(
    store: SnapshotStore, files: FaultyFileSystem, gate_at: tuple[str, str, str]
) -> None:
    operation, path, when = gate_at
    gate = files.pause(operation, path, when=when)
    store.save("aborted", 64, tensors(1))
    gate.wait_reached()
    with ThreadPoolExecutor(1) as cleaner:
        waiting = cleaner.submit(store.cleanup_request, "aborted", timeout_s=10)
        wait_until_forgotten(store, "aborted", 64)
        assert not waiting.done()
        gate.open()
        report = waiting.result(10)
    assert report.clean and report.cancelled == 1 and report.left_to_writer == 0
    assert [name for name in files_below(store.session) if not name.startswith(".trash")] == []


@pytest.mark.parametrize("operation", ["write", "status", "close"])
def test_a_file_whose_save_was_cancelled_before_its_rename_is_given_no_name(
    store: SnapshotStore, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture, operation: str
) -> None:
    with files.pause(operation, ".tmp") as gate:
        ticket = store.save("aborted", 64, tensors(1))
        gate.wait_reached()
        assert not store.cleanup_request("aborted", timeout_s=0).clean
    assert isinstance(ticket.exception(10), SaveCancelledError)
    assert files.count("rename", ".safetensors") == files.count("make_directory", ".g") == 0
    assert files_below(store.session) == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_whose_save_was_cancelled_in_its_rename_goes_before_the_sweeper_comes(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("rename", ".trash") as sweeping:
        with files.pause("rename", ".safetensors", when="after") as writing:
            ticket = store.save("aborted", 64, tensors(1))
            writing.wait_reached()
            assert not store.cleanup_request("aborted", timeout_s=0).clean
            assert len(files_below(store.session)) == 1
        assert isinstance(ticket.exception(10), SaveCancelledError)
        sweeping.wait_reached()
        assert files_below(store.session) == []


def wait_until_forgotten(store: SnapshotStore, request_id: str, token_count: int) -> None:
    deadline_s = time.monotonic() + 10
    while store.has(request_id, token_count):
        assert time.monotonic() < deadline_s


def test_a_cleanup_before_the_writer_comes_to_the_job_cancels_it_without_a_file(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("create", ".tmp") as gate:
        store.save("busy", 1, tensors(1))
        gate.wait_reached()
        ticket = store.save("aborted", 64, tensors(2))
        report = store.cleanup_request("aborted", timeout_s=0)
        assert report.clean and report.cancelled == 1
        assert ticket.state is SaveState.CANCELLED
    settle(store)
    assert len(files_below(store.session)) == 1
    assert_at_rest(store)


def test_a_cleanup_after_the_commit_removes_the_file_and_says_how_much(store: SnapshotStore) -> None:
    ticket = store.save("done", 64, tensors(1))
    info = ticket.result(10)
    report = store.cleanup_request("done")
    assert (report.clean, report.cancelled, report.removed, report.removed_bytes) == (True, 0, 1, info.nbytes)
    assert not info.path.exists() and not info.path.parent.exists()


def test_a_cleanup_says_how_much_of_what_was_replaced_or_detached_it_still_removed(
    store: SnapshotStore, tmp_path: Path
) -> None:
    for count in range(4):
        store.save("done", count, tensors(count, 1000 * (count + 1))).result(10)
    replaced = store.save("done", 1, tensors(9, 9000)).result(10)
    store.detach("done", 3, tmp_path / "detached")
    left = [store.save("done", count, tensors(count, 500)).result(10).nbytes for count in (0, 2)]
    report = store.cleanup_request("done")
    assert (report.removed, report.removed_bytes) == (3, replaced.nbytes + sum(left))


def test_a_cleanup_of_files_that_somebody_else_removed_is_clean(store: SnapshotStore) -> None:
    info = store.save("done", 64, tensors(1)).result(10)
    shutil.rmtree(info.path.parent)
    assert store.cleanup_request("done", timeout_s=10).clean
    assert store.stats().trash_bytes == 0


def test_new_saves_of_an_id_are_readable_after_both_cleanups_timed_out(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("rename", ".safetensors") as gate:
        store.save("again", 1, tensors(1))
        gate.wait_reached()
        assert not store.cleanup_request("again", timeout_s=0.02).clean
        assert not store.cleanup_all(timeout_s=0.02).clean
        later = {count: tensors(10 + count) for count in (1, 2, 3)}
        tickets = [store.save("again", count, value) for count, value in later.items()]
        for count, value in later.items():
            assert_same(store.load("again", count), value)
    for ticket in tickets:
        ticket.result(10)
    for count, value in later.items():
        snapshot = store.load("again", count)
        assert snapshot.source == "disk"
        assert_same(snapshot, value)
    settle(store)


def test_a_save_of_the_same_id_while_its_cleanup_waits_survives(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    gate = files.pause("write", ".tmp")
    store.save("again", 1, tensors(1))
    gate.wait_reached()
    with ThreadPoolExecutor(1) as cleaner:
        waiting = cleaner.submit(store.cleanup_request, "again", timeout_s=10)
        wait_until_forgotten(store, "again", 1)
        ticket = store.save("again", 1, tensors(2))
        gate.open()
        assert waiting.result(10).clean
    ticket.result(10)
    assert_same(store.load("again", 1), tensors(2))


def test_cleanups_of_one_id_may_overlap_and_the_mark_is_counted_once(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    gate = files.pause("rename", ".safetensors")
    store.save("again", 1, tensors(1))
    gate.wait_reached()
    with ThreadPoolExecutor(4) as cleaners:
        first = store.cleanup_request("again", timeout_s=0)
        waiting = [cleaners.submit(store.cleanup_request, "again", timeout_s=10) for _ in range(4)]
        assert store.stats().cancelled_in_hand == 1
        gate.open()
        reports = [each.result(10) for each in waiting]
    assert not first.clean and first.cancelled == 1
    assert all(report.clean and report.cancelled == 0 for report in reports)
    assert store.stats().cancelled_in_hand == 0


def test_a_cleanup_of_an_id_with_nothing_leaves_no_mark(store: SnapshotStore) -> None:
    report = store.cleanup_request("nobody")
    assert report.clean and (report.cancelled, report.removed, report.removed_bytes) == (0, 0, 0)
    assert report.left_to_writer == 0
    assert store.stats().cancelled_in_hand == 0
    store.save("nobody", 1, tensors(1)).result(10)
    assert_same(store.load("nobody", 1), tensors(1))


def test_a_cleanup_returns_at_once_while_the_writer_is_pinned_on_another_request(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    store.save("done", 1, tensors(1)).result(10)
    with files.pause("write", ".tmp") as gate:
        store.save("pinned", 1, tensors(2))
        gate.wait_reached()
        store.save("queued", 1, tensors(3))
        started_s = time.monotonic()
        assert store.cleanup_request("done").clean
        assert store.cleanup_request("queued").clean
        assert time.monotonic() - started_s < 1.5
    settle(store)


def test_a_hung_write_does_not_hold_up_the_removal_of_another_request_after_a_cleanup_of_its_own(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    store.save("done", 1, tensors(1)).result(10)
    with files.pause("write", ".tmp") as gate:
        store.save("pinned", 1, tensors(2))
        gate.wait_reached()
        assert not store.cleanup_request("pinned", timeout_s=0.02).clean
        assert store.cleanup_request("done", timeout_s=5).clean
    settle(store)


def test_a_cleanup_of_fifty_requests_on_a_pinned_writer_costs_one_time_out(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("write", ".tmp") as gate:
        for number in range(50):
            store.save(f"request-{number}", 1, tensors(number))
        gate.wait_reached()
        started_s = time.monotonic()
        report = store.cleanup_all(timeout_s=0.3)
        waited_s = time.monotonic() - started_s
    assert 0.3 <= report.waited_s <= waited_s < 1.5
    assert (report.clean, report.cancelled, report.left_to_writer) == (False, 50, 1)
    assert store.stats().cleanup_timeouts == 1
    settle(store)


@pytest.mark.parametrize("operation", ["rename", "unlink"])
def test_a_cleanup_is_bounded_when_the_disk_hangs_in_a_removal(
    store: SnapshotStore, files: FaultyFileSystem, operation: str
) -> None:
    store.save("first", 1, tensors(1)).result(10)
    store.save("second", 1, tensors(2)).result(10)
    with files.pause(operation, ".trash") as gate:
        started_s = time.monotonic()
        store.cleanup_request("first", timeout_s=0.2)
        gate.wait_reached()
        report = store.cleanup_request("second", timeout_s=0.2)
        assert time.monotonic() - started_s < 1.0
        assert not report.clean and report.left_to_writer == 0
        assert not store.has("first", 1) and not store.has("second", 1)
    assert store.cleanup_request("second", timeout_s=10).clean


def test_a_cleanup_waits_for_no_more_than_one_removal_of_another_requests_bytes(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    for count in range(4):
        store.save("first", count, tensors(1)).result(10)
    store.save("second", 1, tensors(2)).result(10)
    removals = [files.pause("unlink", ".trash", skip=skip) for skip in (0, 1)]
    with removals[1]:
        with removals[0]:
            assert store.cleanup_request("first", timeout_s=10).clean
            removals[0].wait_reached()
            assert not store.cleanup_request("second", timeout_s=0).clean
        removals[1].wait_reached()
        assert store.cleanup_request("second", timeout_s=0).clean


def test_a_removal_that_fails_is_reported_and_tried_again(
    store: SnapshotStore, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    store.save("kept", 1, tensors(1)).result(10)
    files.fail("rename", errno.EIO, ".trash")
    assert not store.cleanup_request("kept", timeout_s=5).clean
    assert store.health().status == "degraded"
    assert "could not remove" in caplog.text
    assert store.cleanup_request("kept", timeout_s=5).clean
    settle(store)


def test_a_request_that_waits_for_room_when_it_is_cleaned_up_is_not_saved(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, StoreOptions(max_pending_jobs=1, save_timeout_s=10), file_system=files)
    with files.pause("write", ".tmp") as gate, ThreadPoolExecutor(1) as saver:
        store.save("pinned", 1, tensors(1))
        gate.wait_reached()
        waiting: Future[object] = saver.submit(store.save, "aborted", 1, tensors(2))
        wait_for_waiter(store)
        store.cleanup_request("aborted", timeout_s=0)
        with pytest.raises(SaveCancelledError, match="waited for room"):
            waiting.result(10)
    assert store.shutdown(cleanup=True).clean


def wait_for_waiter(store: SnapshotStore) -> None:
    deadline_s = time.monotonic() + 10
    while store.stats().live_requests < 2:
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.001)
