"""All the ways in which a store ends: shut down, interrupted, dropped, left open at exit, or with threads that died."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from actions import assert_adoptable, engine_of, everything_in, save, sessions_in, version_of, wait_until
from helpers import files_below
from processes import Processes
from scenarios import cause_of

import snapstore
from snapstore import SaveCancelledError, SaveState, ShutdownReport, SnapshotStore, StoreOptions
from snapstore._files import FileSystem
from snapstore._owner import liveness, read_record
from snapstore.testing import FaultyFileSystem

ADOPT = StoreOptions(leftovers="adopt")


def liveness_of(session: Path) -> str:
    return liveness(FileSystem(), str(session), read_record(FileSystem(), str(session)))


def adopted(root: Path, keys: set[tuple[str, int]]) -> dict[tuple[str, int], int | None]:
    store = SnapshotStore(root, ADOPT)
    found = everything_in(store, keys)
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown(cleanup=True).clean
    return found


# -- the interpreter's end ----------------------------------------------------------------------------------------


def assert_under_a_second(attempt: Callable[[], float]) -> None:
    """Somebody else may have had the processor: the fastest of three counts."""
    taken_s = []
    for _ in range(3):
        taken_s.append(attempt())
        if taken_s[-1] < 1.0:
            return
    pytest.fail(f"it took {taken_s} s")


WAYS = {"return": 0, "sys.exit": 3, "exception": 1}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    "situation",
    ["idle", "writing", "pinned writer", "others save", "shutdown under way", "a handler of ours shuts down"],
)
def test_an_interpreter_ends_in_time_with_a_store_open(
    processes: Processes, root: Path, how: str, situation: str
) -> None:
    """Under a second, whatever the disk does; its status is its own."""

    def end_one() -> float:
        child = processes.start("ends", root=str(root), how=how, situation=situation)
        assert child.says() == "ready"
        started_s = time.monotonic()
        child.tell("end")
        assert child.wait() == WAYS[how]
        took_s = time.monotonic() - started_s
        lines = [line for line in child.all_it_said() if not line.startswith("error")]
        assert lines == (["report True"] if situation.startswith("a handler") else [])
        if situation in ("idle", "shutdown under way") or situation.startswith("a handler"):
            assert sessions_in(root) == []
        return took_s

    assert_under_a_second(end_one)
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown(cleanup=True).clean


def test_what_was_accepted_is_written_at_exit_where_the_disk_lets_it(
    processes: Processes, root: Path
) -> None:
    child = processes.start("ends", root=str(root), how="return", situation="saves just accepted")
    child.tell("end")
    assert child.wait() == 0
    assert adopted(root, {("a", number) for number in range(20)}) == {("a", n): n for n in range(20)}


SCRIPT = """
import logging, sys, numpy
from snapstore import SnapshotStore
from snapstore.testing import FaultyFileSystem
logging.basicConfig(level=logging.WARNING)
files = FaultyFileSystem()
store = SnapshotStore(sys.argv[1], file_system=files)
gate = files.pause("write", ".tmp")
tickets = [store.save("request", count, {"x": numpy.arange(9)}) for count in range(3)]
gate.wait_reached()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_program_that_ends_with_a_pinned_writer_says_what_was_not_written(root: Path) -> None:
    """A whole interpreter of its own, from start to end."""
    command = [sys.executable, "-X", "dev", "-c", SCRIPT, str(root)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def end_one() -> float:
        with subprocess.Popen(command, text=True, **pipes) as program:
            assert program.stdout is not None and program.stdout.readline() == "ready\n"
            started_s = time.monotonic()
            _, errors = program.communicate("end\n")
            took_s = time.monotonic() - started_s
        assert program.returncode == 0
        assert "3 saves" in errors and "were not written before exit" in errors
        assert "Traceback" not in errors
        return took_s

    assert_under_a_second(end_one)


def test_a_process_that_leaves_by_the_back_door_leaves_its_snapshots(
    processes: Processes, root: Path
) -> None:
    child = processes.start("ends", root=str(root), how="os._exit", situation="saves just accepted")
    assert child.says() == "ready"
    time.sleep(0.2)
    child.tell("end")
    assert child.wait() == 4
    (session,) = sessions_in(root)
    assert liveness_of(session) == "dead"
    found = adopted(root, {("a", number) for number in range(20)})
    assert list(found.values()) == [number if found["a", number] is not None else None for _, number in found]


# -- dropped ------------------------------------------------------------------------------------------------------


def dropped_quietly(drop: Callable[[], object]) -> list[type[Warning]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drop()
        gc.collect()
    return [each.category for each in caught]


def test_a_store_dropped_with_saves_pending_writes_them_and_gives_up_its_session(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    with files.pause("create", ".tmp") as gate:
        tickets = [save(store, ("a", number), number) for number in range(5)]
        gate.wait_reached()
        session = store.session
        held = [store]
        del store
        assert dropped_quietly(held.clear) == [ResourceWarning]
    for ticket in tickets:
        assert ticket.result(10)
    wait_until(lambda: liveness_of(session) == "dead")
    assert adopted(root, {("a", number) for number in range(5)}) == {("a", n): n for n in range(5)}


def test_a_store_may_be_collected_while_this_very_thread_holds_its_lock(root: Path) -> None:
    """Collection strikes wherever memory is allocated: also in the middle of a critical section."""
    store = SnapshotStore(root)
    engine = engine_of(store)
    with engine.state._lock:  # noqa: SLF001 - as if collection struck in a critical section
        held = [store]
        del store
        assert dropped_quietly(held.clear) == [ResourceWarning]
    engine.join_briefly(10)
    assert not engine.writer_alive
    assert sessions_in(root) == [], "it was empty"


def test_a_store_that_was_shut_down_is_dropped_without_a_word(root: Path) -> None:
    held = [SnapshotStore(root)]
    held[0].shutdown()
    assert dropped_quietly(held.clear) == []


# -- shutdown is not to be stopped half-way -----------------------------------------------------------------------


@pytest.fixture
def interrupt():
    """Raises ``KeyboardInterrupt`` in the main thread, as Ctrl-C does."""

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_an_interrupted_caller_does_not_stop_a_shutdown(
    root: Path, files: FaultyFileSystem, interrupt: Callable[[], None]
) -> None:
    store = SnapshotStore(root, file_system=files)
    gate = files.pause("write", ".tmp")
    tickets = [save(store, ("a", number), number) for number in range(3)]
    gate.wait_reached()
    threading.Timer(0.1, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        store.shutdown(timeout_s=20)
    assert store.health().status == "dead"
    gate.open()
    for ticket in tickets:
        ticket.result(10)
    report = store.shutdown(cleanup=True, timeout_s=0)
    assert report.clean and report.committed == 3 and not report.session_removed
    held = [store]
    del store
    assert dropped_quietly(held.clear) == []
    assert_adoptable(root, {("a", number): {number} for number in range(3)})


def test_the_end_of_the_interpreter_does_not_meddle_with_a_shutdown_under_way(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    save(store, ("a", 1), 1).result(10)
    with files.pause("unlink", ".trash") as gate, ThreadPoolExecutor(1) as ending:
        shutdown = ending.submit(store.shutdown, cleanup=True)
        gate.wait_reached()
        sweeper = engine_of(store)._sweeper  # noqa: SLF001 - nothing else tells that it was told to end
        wait_until(lambda: sweeper._ending is not None)  # noqa: SLF001
        engine_of(store).let_go()
        gate.open()
        assert shutdown.result(10).session_removed


def test_an_interruption_before_its_thread_runs_leaves_the_shutdown_to_the_next_caller(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SnapshotStore(root)

    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.shutdown()
    assert store.shutdown(cleanup=True).clean


def test_a_shutdown_without_a_thread_to_be_had_is_made_by_the_caller(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an interpreter, from 3.12 on, no thread can be started any more."""
    stores = [SnapshotStore(root) for _ in range(3)]
    for store in stores:
        save(store, ("a", 1), 1)

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        assert stores[0].shutdown(cleanup=True).clean
        reports = snapstore.shutdown_all(stores, cleanup=True)
    assert [report.clean for report in reports] == [True] * 3
    assert sessions_in(root) == []


@pytest.mark.thread_dies
def test_a_step_that_raises_keeps_none_of_the_others_from_being_made(
    root: Path, files: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SnapshotStore(root, file_system=files)
    save(store, ("a", 1), 1).result(10)

    def broken(*args: object, **options: object) -> None:
        raise MemoryError("on purpose")

    monkeypatch.setattr("snapstore._engine.clean", broken)
    report = store.shutdown(cleanup=True)
    assert any("MemoryError: on purpose" in error for error in report.errors)
    assert report.writer_stopped and report.session_removed and not report.clean
    assert sessions_in(root) == []


def test_a_report_that_can_not_be_made_is_waited_for_by_nobody(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has ended all the same."""
    store = SnapshotStore(root)

    def no_memory(**facts: object) -> None:
        raise MemoryError("on purpose")

    monkeypatch.setattr("snapstore._engine.ShutdownReport", no_memory)
    for _ in range(2):
        with pytest.raises(MemoryError, match="on purpose"):
            store.begin_shutdown(cleanup=True).result(10)
    assert sessions_in(root) == []


@pytest.mark.thread_dies
def test_a_writer_that_dies_on_the_way_leaves_nothing_held(root: Path, files: FaultyFileSystem) -> None:
    """Memory, buffers and the session's lock are released all the same, and the report says it."""
    store = SnapshotStore(root, file_system=files)

    def die() -> None:
        raise SystemExit("a bug")

    gate = files.pause("create", ".tmp")
    files.call("create", die, ".tmp", times=2)
    tickets = [save(store, ("a", number), number) for number in range(4)]
    gate.wait_reached()
    with ThreadPoolExecutor(1) as ending:
        shutdown = ending.submit(store.shutdown)
        wait_until(lambda: store.health().status == "dead")
        gate.open()
        report = shutdown.result(10)
    assert [type(ticket.exception(0)).__name__ for ticket in tickets] == ["SaveFailedError"] * 4
    assert report.failed == 4 and report.abandoned == () and report.writer_stopped
    assert sum("writer thread died" in error for error in report.errors) == 2
    assert store.stats().pending_bytes == 0 and engine_of(store).pool.idle_bytes == 0
    assert all(ticket.released for ticket in tickets)
    assert report.session_removed and sessions_in(root) == []


def test_callbacks_that_raise_keep_nobody_from_being_told(
    root: Path, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    store = SnapshotStore(root, file_system=files)
    told: list[int] = []
    with files.pause("write", ".tmp") as gate:
        pinned = save(store, ("pinned", 1), 1)
        gate.wait_reached()
        tickets = [save(store, ("a", number), number) for number in range(4)]
        for number, ticket in enumerate(tickets):
            ticket.add_done_callback(lambda _, number=number: (told.append(number), sys.exit(1)))
        report = store.shutdown(cleanup=True, timeout_s=0.5)
    assert told == [0, 1, 2, 3] and not any("SystemExit" in error for error in report.errors)
    assert all(
        f"a done callback of 'a' at {number} tokens raised SystemExit" in caplog.text for number in told
    )
    assert all(isinstance(ticket.exception(0), SaveCancelledError) for ticket in tickets)
    pinned.exception(10)
    engine_of(store).join_briefly(10)
    assert sessions_in(root) == []


# -- what a report says -------------------------------------------------------------------------------------------


def test_a_report_counts_what_became_of_the_saves(root: Path, files: FaultyFileSystem) -> None:
    store = SnapshotStore(root, file_system=files)
    save(store, ("earlier", 1), 1).result(10)
    gate = files.pause("create", ".tmp")
    files.fail("rename", errno.EIO, ".safetensors", skip=1)
    tickets = [save(store, ("a", number), number) for number in range(3)]
    gate.wait_reached()
    with ThreadPoolExecutor(1) as ending:
        shutdown = ending.submit(store.shutdown)
        wait_until(lambda: store.health().status == "dead")
        gate.open()
        report = shutdown.result(10)
    assert (report.committed, report.failed, report.cancelled) == (2, 1, 0)
    assert report.abandoned == () and report.trash_left == 0 and report.clean
    assert cause_of(tickets[1]) == errno.EIO
    assert report.waited_s < 10


def test_trash_is_emptied_in_the_time_that_is_left_and_no_longer(root: Path, files: FaultyFileSystem) -> None:
    store = SnapshotStore(root, file_system=files)
    for number in range(60):
        save(store, (f"request-{number}", 1), 1).result(10)
    save(store, ("kept", 1), 1).result(10)
    files.delay("unlink", 0.05, ".trash")
    for number in range(60):
        store.cleanup_request(f"request-{number}", timeout_s=0)
    started_s = time.monotonic()
    report = store.shutdown(timeout_s=0.5)
    assert time.monotonic() - started_s < 2.0
    assert 0 < report.trash_left < 60
    assert report.errors in (
        ("shutdown's time ended before the trash was empty; the next store frees it",),
        ("the sweeper thread is still in a disk operation; the rest is left to the next store",),
    )
    wait_until(lambda: liveness_of(store.session) == "dead")
    assert_adoptable(root, {("kept", 1): {1}})


def test_what_was_forgotten_while_the_sweeper_hung_is_not_found_by_the_next_store(
    root: Path, files: FaultyFileSystem
) -> None:
    """Shutdown's time is up when the disk comes back; the bytes may stay, but nobody adopts them."""
    store = SnapshotStore(root, file_system=files)
    for key in (("first", 1), ("first", 2), ("forgotten", 1), ("kept", 1)):
        save(store, key, 1).result(10)
    with files.pause("unlink", ".trash") as gate:
        assert store.cleanup_request("first").clean
        gate.wait_reached()
        assert not store.cleanup_request("forgotten", timeout_s=0).clean
        assert not store.shutdown(timeout_s=0.1).clean
    engine_of(store).join_briefly(10)
    gone: set[int | None] = {None}
    assert_adoptable(root, {("first", 1): gone, ("first", 2): gone, ("forgotten", 1): gone, ("kept", 1): {1}})


def test_the_lock_of_a_session_is_the_last_of_it_that_is_removed(root: Path, files: FaultyFileSystem) -> None:
    """Or nobody could prove dead what a kill leaves of it."""
    store = SnapshotStore(root, file_system=files)
    (store.session / "zebra").touch()  # behind the lock in an ordered listing
    beside_the_lock: list[list[str]] = []

    def look() -> None:
        beside_the_lock.extend(sorted(path.name for path in dead.iterdir()) for dead in root.glob(".dead-*"))

    files.call("unlink", look, "owner.lock")
    assert store.shutdown(cleanup=True).clean
    assert beside_the_lock == [["owner.lock"]]


def test_a_removal_of_the_session_that_fails_is_in_the_report(root: Path, files: FaultyFileSystem) -> None:
    for operation, path, times in (("rename", ".dead-", 1), ("unlink", ".dead-", 2)):
        store = SnapshotStore(root, StoreOptions(leftovers="keep"), file_system=files)
        save(store, ("a", 1), 1).result(10)
        (store.session / "foreign").touch()
        files.fail(operation, errno.EACCES, path, times=times)
        report = store.shutdown(cleanup=True)
        assert not report.clean and not report.session_removed
        told = [error for error in report.errors if error.startswith("could not remove: [Errno 13]")]
        assert len(told) == times
    store = SnapshotStore(root, StoreOptions(leftovers="keep"), file_system=files)
    files.fail("names", errno.EACCES, store.session.name)
    [error] = store.shutdown(cleanup=False).errors
    assert error.startswith("could not remove the session: [Errno 13] ")
    assert len(sessions_in(root)) == 3
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown(cleanup=True).clean


def test_a_writer_that_comes_back_after_the_deadline_still_leaves_a_clean_root(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    with files.pause("write", ".tmp") as gate:
        ticket = save(store, ("pinned", 1), 1)
        gate.wait_reached()
        report = store.shutdown(cleanup=True, timeout_s=0.2)
        assert not report.writer_stopped and not report.session_removed
        assert liveness_of(store.session) == "alive", "nobody else may touch what it still writes"
    assert isinstance(ticket.exception(10), SaveCancelledError)
    wait_until(lambda: sessions_in(root) == [])


def test_shutdown_all_reports_for_each_also_for_what_is_no_store(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = SnapshotStore(root), SnapshotStore(root)
    not_a_store: Any = object()
    reports = snapstore.shutdown_all([first, not_a_store, second, first], cleanup=True)
    assert [report.clean for report in reports] == [True, False, True, True]
    assert isinstance(reports[1], ShutdownReport) and "AttributeError" in reports[1].errors[0]
    assert reports[0] is reports[3]
    assert snapstore.shutdown_all([]) == []


def test_leaving_a_block_by_an_exception_writes_what_was_accepted(root: Path) -> None:
    tickets = []

    def leave_by_an_exception(store: SnapshotStore) -> None:
        with store:
            tickets.extend(save(store, ("a", number), number) for number in range(4))
            raise ValueError("on purpose")

    store = SnapshotStore(root)
    with pytest.raises(ValueError, match="on purpose"):
        leave_by_an_exception(store)
    assert all(ticket.state is SaveState.COMMITTED for ticket in tickets)
    assert len(files_below(store.session)) == 4
    assert [version_of(store, ("a", number)) for number in range(4)] == list(range(4))
