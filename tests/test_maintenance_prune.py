"""Prune beside others: under a dead owner's lock, through a live owner's trash, against a second prune, and killed."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import roots
from helpers import assert_same
from processes import Processes
from pruning import planned, prune

from snapstore import SnapshotCorruptError, SnapshotStore, StoreOptions, _paths
from snapstore._files import FileSystem
from snapstore._maintenance.prune import PruneReport, carry_out
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.verify import verify_root
from snapstore._owner import OwnerLock
from snapstore.testing import FaultyFileSystem


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "root"
    roots.killed(root)
    return root


@pytest.fixture
def dead(template: Path, root: Path) -> Path:
    """A root with the session of a killed process."""
    return roots.copy_of(template, root)


def assert_sound(path: Path) -> None:
    with opened_root(FileSystem(), str(path)) as root:
        assert verify_root(root, on_read=lambda _: None).wrong == ()


def names(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


# --- sessions of dead owners ---


def test_leftovers_go_without_a_trace(dead: Path) -> None:
    snapshots = len(roots.snapshots_in(dead))
    blocks = sum(each.stat().st_blocks * 512 for each in dead.glob("2*/*/**/*") if each.is_file())
    report = prune(dead)
    assert names(dead) == {_paths.MARKER}
    assert (report.snapshots, report.requests, report.sessions) == (snapshots, len(roots.REQUESTS), 1)
    assert report.freed_bytes == blocks
    assert report.errors == () and not report.interrupted


def test_what_the_rules_keep_is_still_a_session_that_a_store_adopts(dead: Path) -> None:
    report = prune(dead, keep_latest=1)
    assert report.snapshots == len(roots.REQUESTS) * (len(roots.TOKENS) - 1)
    with SnapshotStore(dead, StoreOptions(leftovers="adopt")) as store:
        for request in roots.REQUESTS:
            assert store.boundaries(request) == (max(roots.TOKENS),)
            assert_same(store.load(request, max(roots.TOKENS)), roots.tensors(max(roots.TOKENS)))


def test_the_lock_is_held_while_anything_is_removed(dead: Path) -> None:
    """A store that starts in the middle neither adopts nor reclaims the session."""
    files = FaultyFileSystem()
    adopted: list[int] = []

    def start_a_store() -> None:
        with SnapshotStore(dead, StoreOptions(leftovers="adopt")) as store:
            adopted.extend(count for request in roots.REQUESTS for count in store.boundaries(request))

    files.call("unlink", start_a_store, skip=3)
    report = prune(dead, files)
    assert adopted == []
    assert report.errors == () and report.snapshots == 9
    assert names(dead) == {_paths.MARKER}


def test_a_session_that_somebody_has_locked_since_the_plan_is_left(dead: Path) -> None:
    with opened_root(FileSystem(), str(dead)) as root:
        plan = planned(root)
        with SnapshotStore(dead, StoreOptions(leftovers="adopt")) as store:
            report = carry_out(root, plan)
            assert report.snapshots == 0
            assert report.gone + report.in_use == 9
            assert store.boundaries("alpha") == roots.TOKENS


def test_a_lock_that_is_taken_after_the_plan_is_respected(dead: Path) -> None:
    before = roots.everything_in(dead)
    with opened_root(FileSystem(), str(dead)) as root:
        plan = planned(root)
        lock = OwnerLock.take(FileSystem(), str(next(dead.glob("2*"))), create=False)
        assert lock is not None
        report = carry_out(root, plan)
        assert (report.snapshots, report.in_use, report.errors) == (0, 9, ())
        assert roots.everything_in(dead) == before
        lock.release()
        assert carry_out(root, plan).snapshots == 9


def test_a_session_that_was_replaced_after_the_plan_is_left(dead: Path) -> None:
    session = next(dead.glob("2*"))
    with opened_root(FileSystem(), str(dead)) as root:
        plan = planned(root)
        session.rename(dead.parent / "planned")
        roots.copy_of(dead.parent / "planned", session)
        before = roots.everything_in(dead)
        report = carry_out(root, plan)
    assert (report.snapshots, report.gone, report.sessions) == (0, 9, 0)
    assert roots.everything_in(dead) == before


@contextmanager
def in_a_thread(path: Path, files: FaultyFileSystem) -> Iterator[list[PruneReport]]:
    reports: list[PruneReport] = []
    thread = threading.Thread(target=lambda: reports.append(prune(path, files)))
    thread.start()
    try:
        yield reports
    finally:
        thread.join(30)
    assert len(reports) == 1


@pytest.mark.parametrize("skip", [0, 4, 9, 11, 12])
def test_a_second_prune_leaves_a_session_to_the_first_wherever_that_stands(dead: Path, skip: int) -> None:
    files = FaultyFileSystem()
    gate = files.pause("unlink", skip=skip)
    with in_a_thread(dead, files) as reports, gate:
        gate.wait_reached()
        second = prune(dead)
        assert (second.snapshots, second.freed_bytes) == (0, 0)
    assert reports[0].snapshots == 9 and reports[0].errors == ()
    assert names(dead) == {_paths.MARKER}


def test_two_prunes_that_planned_the_same_remove_each_file_once(dead: Path) -> None:
    with opened_root(FileSystem(), str(dead)) as one, opened_root(FileSystem(), str(dead)) as other:
        plans = planned(one), planned(other)
        first, second = carry_out(one, plans[0]), carry_out(other, plans[1])
    assert first.snapshots == 9 and second.snapshots == 0 and second.freed_bytes == 0
    assert second.errors == () and second.gone == 9


@pytest.mark.parametrize("operation", ["unlink", "remove_directory", "rename", "open_directory", "status_at"])
def test_a_disk_that_refuses_is_reported_and_the_next_prune_finishes(dead: Path, operation: str) -> None:
    files = FaultyFileSystem()
    with opened_root(files, str(dead)) as root:
        plan = planned(root)
        files.fail(operation, errno.EIO, times=float("inf"))
        report = carry_out(root, plan)
        assert any("Input/output error" in each for each in report.errors)
        files.heal()
    prune(dead)
    assert names(dead) == {_paths.MARKER}


# --- sessions in use ---


def test_live_sessions_are_left_alone_and_counted(root: Path) -> None:
    with SnapshotStore(root) as store:
        roots.fill(store)
        before = roots.everything_in(root)
        report = prune(root, older_than_s=0)
        assert (report.snapshots, report.in_use) == (0, 9)
        assert roots.everything_in(root) == before


def test_what_is_in_use_goes_through_its_owners_trash(root: Path) -> None:
    files = FaultyFileSystem()
    with SnapshotStore(root) as store:
        roots.fill(store)
        report = prune(root, files, request="alpha", include_live=True)
        assert report.snapshots == 3 and report.errors == ()
        unlinked = [call.paths[0] for call in files.calls if call.operation == "unlink"]
        assert len(unlinked) == 3
        assert all(Path(path).parent.name == _paths.TRASH for path in unlinked)
        assert not any((store.session / _paths.TRASH).iterdir())
        with pytest.raises(SnapshotCorruptError, match="gone"):
            store.load("alpha", 64)
        assert_same(store.load("beta", 64), roots.tensors(64))
        store.save("alpha", 64, roots.tensors(64)).result(30)
        assert_same(store.load("alpha", 64), roots.tensors(64))


def test_a_save_between_the_plan_and_the_prune_is_never_removed(root: Path) -> None:
    with SnapshotStore(root) as store, opened_root(FileSystem(), str(root)) as opened:
        roots.fill(store)
        plan = planned(opened, older_than_s=0, include_live=True)
        store.save("alpha", 64, roots.tensors(65)).result(30)
        report = carry_out(opened, plan)
        assert (report.snapshots, report.changed) == (8, 1)
        assert_same(store.load("alpha", 64), roots.tensors(65))


def test_a_save_between_the_last_look_and_the_rename_is_put_back(root: Path) -> None:
    files = FaultyFileSystem()
    with SnapshotStore(root) as store, opened_root(files, str(root)) as opened:
        store.save("alpha", 64, roots.tensors(64)).result(30)
        plan = planned(opened, older_than_s=0, include_live=True)
        files.call("rename", lambda: store.save("alpha", 64, roots.tensors(65)).result(30) and None)
        report = carry_out(opened, plan)
        assert (report.snapshots, report.changed) == (0, 1)
        assert_same(store.load("alpha", 64), roots.tensors(65))


def test_a_still_newer_save_wins_over_what_is_put_back(root: Path) -> None:
    files = FaultyFileSystem()
    with SnapshotStore(root) as store, opened_root(files, str(root)) as opened:
        store.save("alpha", 64, roots.tensors(64)).result(30)
        plan = planned(opened, older_than_s=0, include_live=True)
        files.call("rename", lambda: store.save("alpha", 64, roots.tensors(65)).result(30) and None)
        files.call("link", lambda: store.save("alpha", 64, roots.tensors(66)).result(30) and None)
        assert carry_out(opened, plan).changed == 1
        assert_same(store.load("alpha", 64), roots.tensors(66))
        assert not any((store.session / _paths.TRASH).iterdir())


def test_a_live_store_keeps_saving_while_all_it_has_is_pruned_again_and_again(root: Path) -> None:
    with SnapshotStore(root) as store:
        tickets = []
        for number in range(60):
            tickets.append(store.save(f"request-{number % 3}", number, roots.tensors(8)))
            if number % 6 == 5:
                report = prune(root, older_than_s=0, include_live=True)
                assert report.errors == ()
        assert [ticket.exception(30) for ticket in tickets] == [None] * 60


def test_stores_come_and_go_while_prunes_run_and_no_live_snapshot_is_ever_lost(root: Path) -> None:
    SnapshotStore(root).shutdown()
    done = threading.Event()

    def live(number: int) -> int:
        loaded = 0
        for life in range(12):
            leftovers: Any = ("discard", "adopt", "keep")[(number + life) % 3]
            with SnapshotStore(root, StoreOptions(leftovers=leftovers)) as store:
                for count in (3, 5, 8):
                    store.save(f"request-{number}-{life}", count, roots.tensors(count))
                assert store.flush(30)
                for count in (3, 5, 8):
                    assert_same(store.load(f"request-{number}-{life}", count), roots.tensors(count))
                    loaded += 1
        return loaded

    def tidy() -> list[PruneReport]:
        reports = [prune(root)]
        while not done.is_set():
            reports.append(prune(root, older_than_s=0))
        return reports

    with ThreadPoolExecutor(6) as pool:
        pruning = [pool.submit(tidy) for _ in range(2)]
        living = [pool.submit(live, number) for number in range(4)]
        try:
            loaded = sum(each.result(60) for each in living)
        finally:
            done.set()
        reports = [report for each in pruning for report in each.result(60)]
    reports.append(prune(root))
    assert loaded == 4 * 12 * 3
    assert sum(report.snapshots for report in reports) > 0
    assert [report.errors for report in reports if report.errors] == []
    assert names(root) == {_paths.MARKER}


# --- interrupted ---


def test_told_to_stop_it_stops_between_two_files_and_leaves_them_whole(dead: Path) -> None:
    with opened_root(FileSystem(), str(dead)) as root:
        left = iter([True] * 4)
        report = carry_out(root, planned(root), go_on=lambda: next(left, False))
    assert report.interrupted and report.snapshots == 4
    assert len(roots.snapshots_in(dead)) == 5
    assert_sound(dead)


def changes(template: Path, root: Path, **rules: Any) -> int:
    """How many operations a prune makes that change the disk."""
    files = FaultyFileSystem()
    prune(roots.copy_of(template, root), files, **rules)
    return sum(call.operation in ("unlink", "rename", "remove_directory") for call in files.calls)


@pytest.mark.parametrize("rules", [{}, {"keep_latest": 1}], ids=["whole", "partly"])
def test_killed_at_any_moment_it_leaves_a_sound_root_and_the_next_prune_finishes(
    processes: Processes, template: Path, tmp_path: Path, rules: dict[str, Any]
) -> None:
    moments = changes(template, tmp_path / "count", **rules)
    assert moments > 8
    for moment in range(moments):
        root = roots.copy_of(template, tmp_path / f"killed-{moment}")
        child = processes.start("prunes_and_dies", root=str(root), moment=moment, rules=rules)
        assert child.wait() == -signal.SIGKILL
        assert_sound(root)
        report = prune(root, **rules)
        assert report.errors == ()
        if rules:
            assert len(roots.snapshots_in(root)) == len(roots.REQUESTS)
        else:
            assert names(root) == {_paths.MARKER}
