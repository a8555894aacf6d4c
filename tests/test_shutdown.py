"""The end of a store: in time, with a report, with nothing dropped silently."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers import assert_same, files_below, tensors

import snapstore
from snapstore import SaveCancelledError, SaveState, SaveTicket, SnapshotStore, StoreClosedError, StoreOptions
from snapstore.testing import FaultyFileSystem


def test_shutdown_writes_what_was_accepted_and_keeps_the_files(root: Path, files: FaultyFileSystem) -> None:
    store = SnapshotStore(root, file_system=files)
    with files.pause("create", ".tmp") as gate:
        tickets = [store.save("request", count, tensors(count)) for count in range(8)]
        gate.wait_reached()
    report = store.shutdown()
    assert report.clean and report.committed + store.stats().committed >= 8
    assert not report.session_removed
    assert all(ticket.state is SaveState.COMMITTED for ticket in tickets)
    assert len(files_below(store.session)) == 8


def test_shutdown_with_cleanup_removes_the_session(root: Path) -> None:
    store = SnapshotStore(root)
    for count in range(8):
        store.save("request", count, tensors(count))
    report = store.shutdown(cleanup=True)
    assert report.clean and report.session_removed and report.trash_left == 0
    assert [path.name for path in root.iterdir()] == [".snapstore"]


def test_an_empty_session_is_removed_without_cleanup_too(root: Path) -> None:
    store = SnapshotStore(root)
    assert store.shutdown().session_removed
    assert not store.session.exists()


def test_a_closed_store_refuses_saves_and_says_so(root: Path) -> None:
    store = SnapshotStore(root)
    store.shutdown()
    with pytest.raises(StoreClosedError, match="shut down"):
        store.save("late", 1, tensors(1))
    assert store.health().status == "dead"


def test_shutdown_is_idempotent_and_concurrent_callers_get_the_same_report(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    with files.pause("write", ".tmp") as gate, ThreadPoolExecutor(4) as callers:
        store.save("request", 1, tensors(1))
        gate.wait_reached()
        waiting = [callers.submit(store.shutdown) for _ in range(4)]
        gate.open()
        reports = {id(each.result(10)) for each in waiting}
    assert len(reports) == 1
    assert id(store.shutdown(cleanup=True)) in reports


def test_two_callers_at_the_same_moment_end_it_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SnapshotStore(root)
    begin, both = threading.Thread.start, threading.Barrier(2)

    def start(thread: threading.Thread) -> None:
        if thread.name == "snapstore-shutdown":
            both.wait(10)
        begin(thread)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as callers:
        patch.setattr(threading.Thread, "start", start)
        first, second = [callers.submit(store.shutdown) for _ in range(2)]
        assert first.result(10) is second.result(10)


@pytest.mark.parametrize("cleanup", [False, True])
def test_shutdown_with_a_pinned_writer_returns_in_time_and_says_what_it_left(
    root: Path, files: FaultyFileSystem, cleanup: bool
) -> None:
    store = SnapshotStore(root, file_system=files)
    with files.pause("write", ".tmp") as gate:
        pinned = store.save("pinned", 1, tensors(1))
        gate.wait_reached()
        queued = store.save("queued", 2, tensors(2))
        started_s = time.monotonic()
        report = store.shutdown(cleanup=cleanup, timeout_s=0.5)
        assert time.monotonic() - started_s < 1.0
        assert not report.clean and not report.writer_stopped and not report.session_removed
        assert pinned.key in report.abandoned
        assert (queued.key in report.abandoned) is not cleanup
        assert any("stuck" in error for error in report.errors)
        assert isinstance(queued.exception(5), SaveCancelledError)
        assert (store.session / "owner.lock").exists()
    pinned.exception(10)
    assert [name for name in files_below(store.session) if name.startswith(".tmp")] == []


def save_until_refused(store: SnapshotStore, number: int, begun: threading.Event) -> list[SaveTicket]:
    tickets = []
    for count in itertools.count():
        try:
            tickets.append(store.save(f"request-{number}", count, tensors(count, 64)))
        except StoreClosedError:
            return tickets
        begun.set()
    raise AssertionError("unreachable")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_saves_during_shutdown_either_commit_or_are_refused(root: Path, rounds: int) -> None:
    for _ in range(rounds):
        store = SnapshotStore(root)
        begun = threading.Event()
        with ThreadPoolExecutor(16) as savers:
            done = [savers.submit(save_until_refused, store, number, begun) for number in range(16)]
            assert begun.wait(10)
            report = store.shutdown(timeout_s=10)
            tickets = [ticket for each in done for ticket in each.result(10)]
        assert report.clean
        assert tickets and all(ticket.state is SaveState.COMMITTED for ticket in tickets)
        assert store.stats().accepted == store.stats().committed == len(tickets)


def test_a_callback_on_a_thread_that_shutdown_waits_for_can_begin_it_and_not_wait(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    told: list[str] = []

    def end(_: object) -> None:
        try:
            store.shutdown(timeout_s=20)
        except RuntimeError as error:
            told.append(str(error))

    gate = files.pause("create", ".tmp")
    first = store.save("a", 1, tensors(1))
    first.add_done_callback(end)
    store.save("a", 2, tensors(2))
    gate.open()
    first.result(10)
    report = store.shutdown()
    assert report.clean and report.committed + first.done() == 2 and not report.abandoned
    assert len(told) == 1 and "begin_shutdown" in told[0]


def test_a_callback_that_shuts_down_does_not_stop_the_shutdown_that_cancels_its_save(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    with files.pause("create", ".tmp") as gate:
        tickets = [store.save("a", count, tensors(count)) for count in range(3)]
        gate.wait_reached()
        for ticket in tickets[1:]:
            ticket.add_done_callback(lambda _: store.shutdown())
        ending = store.begin_shutdown(cleanup=True, timeout_s=20)
        for ticket in tickets[1:]:
            assert isinstance(ticket.exception(10), SaveCancelledError)
        gate.open()
        assert ending.result(20).clean


def test_the_context_manager_drains_and_keeps(root: Path) -> None:
    with SnapshotStore(root) as store:
        store.save("request", 1, tensors(1))
    assert len(files_below(store.session)) == 1


def test_a_store_dropped_without_shutdown_warns_once_and_its_threads_end(root: Path) -> None:
    before = set(threading.enumerate())
    store = SnapshotStore(root)
    store.save("request", 1, tensors(1)).result(10)
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert len(threads) == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del store
        gc.collect()
    assert [each.category for each in caught] == [ResourceWarning]
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_shutdown_all_ends_every_store_though_one_is_stuck(root: Path, files: FaultyFileSystem) -> None:
    stuck = SnapshotStore(root, StoreOptions(shutdown_timeout_s=0.3), file_system=files)
    others = [SnapshotStore(root) for _ in range(3)]
    with files.pause("write", ".tmp") as gate:
        stuck.save("pinned", 1, tensors(1))
        gate.wait_reached()
        reports = snapstore.shutdown_all([others[0], stuck, *others[1:]], cleanup=True)
        assert [report.clean for report in reports] == [True, False, True, True]


def test_a_snapshot_that_was_loaded_outlives_the_store(root: Path) -> None:
    store = SnapshotStore(root)
    store.save("request", 1, tensors(1)).result(10)
    snapshot = store.load("request", 1)
    store.shutdown(cleanup=True)
    assert_same(snapshot, tensors(1))


def test_a_cleanup_after_shutdown_waits_for_nobody_and_says_that_the_files_stay(
    root: Path, deadline: Callable[[float], AbstractContextManager[None]]
) -> None:
    store = SnapshotStore(root)
    info = store.save("request", 1, tensors()).result(10)
    assert store.shutdown().clean
    with deadline(1.0):
        report = store.cleanup_request("request")
    assert not report.clean and report.removed == 1 and not store.has("request", 1)
    assert info.path.exists(), "for the next store, which discards or adopts it"
