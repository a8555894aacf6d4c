"""Sessions of one root: whose they are, what becomes of those whose owner died, and which roots are refused."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from actions import BEFORE, engine_of, everything_in, let_sweeper_finish, save, sessions_in, wait_until
from helpers import assert_same, files_below, tensors
from processes import Processes

from snapstore import RootError, SaveFailedError, SnapshotNotFoundError, SnapshotStore, StoreOptions
from snapstore._cleanup import RECLAIM_S, RECLAIM_SESSIONS
from snapstore._threads import Threads
from snapstore.testing import FaultyFileSystem

ADOPT = StoreOptions(leftovers="adopt")
KEEP = StoreOptions(leftovers="keep")


def leave_dead_session(processes: Processes, root: Path, request_ids: list[str] | None = None) -> Path:
    """A session with snapshots whose process has ended without a word."""
    child = processes.start("dies_with_snapshots", root=str(root), request_ids=request_ids)
    word, name = child.says().split()
    assert word == "saved" and child.wait() == 0
    return root / name


def end(store: SnapshotStore) -> None:
    assert store.shutdown(cleanup=True).clean


# -- several stores -----------------------------------------------------------------------------------------------


def test_stores_on_one_root_never_touch_each_other(root: Path) -> None:
    stores = [SnapshotStore(root) for _ in range(3)]
    for number, store in enumerate(stores):
        store.save("same", 1, tensors(number)).result(10)
    assert stores[0].cleanup_all().clean
    end(stores[0])
    for number, store in list(enumerate(stores))[1:]:
        assert_same(store.load("same", 1), tensors(number))
        assert len(files_below(store.session)) == 1
        end(store)
    assert sessions_in(root) == []


def test_a_session_is_named_by_time_and_process_and_says_who_owns_it(root: Path) -> None:
    store = SnapshotStore(root)
    record = json.loads((store.session / "owner.json").read_text())
    assert record["pid"] == os.getpid() and f"-{os.getpid()}-" in store.session.name
    assert abs(record["opened_at_s"] - time.time()) < 60 and record["host"]
    end(store)


def test_a_live_session_of_another_process_is_left_alone(processes: Processes, root: Path) -> None:
    child = processes.start("holds_a_store", root=str(root))
    theirs = root / child.says()
    store = SnapshotStore(root, ADOPT)
    let_sweeper_finish(store)
    assert len(files_below(theirs)) == len(BEFORE)
    end(store)
    child.tell("end")
    assert child.says() == "True"
    assert child.wait() == 0


# -- leftovers ----------------------------------------------------------------------------------------------------


def test_sessions_whose_owners_died_are_reclaimed_and_counted(
    processes: Processes, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        leave_dead_session(processes, root)
    store = SnapshotStore(root)
    let_sweeper_finish(store)
    assert sessions_in(root) == [store.session] and store.boundaries("a") == ()
    end(store)
    [told] = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert (told.event, told.count) == ("leftovers_reclaimed", 2)  # type: ignore[attr-defined]
    assert told.getMessage() == "leftovers_reclaimed: 2 sessions whose owners are dead"


def test_leftovers_are_kept_where_that_is_asked_for(processes: Processes, root: Path) -> None:
    dead = leave_dead_session(processes, root)
    store = SnapshotStore(root, KEEP)
    let_sweeper_finish(store)
    end(store)
    assert len(files_below(dead)) == len(BEFORE)


def test_a_pid_that_lives_is_no_proof_of_life(processes: Processes, root: Path) -> None:
    """The number was given to another process since: to this very one, even."""
    dead = leave_dead_session(processes, root)
    record = json.loads((dead / "owner.json").read_text())
    (dead / "owner.json").write_text(json.dumps({**record, "pid": os.getpid()}))
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_a_session_of_the_last_boot_is_reclaimed(processes: Processes, root: Path) -> None:
    dead = leave_dead_session(processes, root)
    record = json.loads((dead / "owner.json").read_text())
    (dead / "owner.json").write_text(json.dumps({**record, "boot_id": "an earlier one"}))
    store = SnapshotStore(root)
    wait_until(lambda: not dead.exists())
    end(store)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"host": "another", "boot_id": "another"}, id="another host"),
        pytest.param({"host": "another", "boot_id": ""}, id="another host that tells no boot"),
        pytest.param({"of a later version": True}, id="later version"),
        pytest.param(None, id="torn"),
    ],
)
def test_a_session_of_which_nobody_can_know_is_kept(
    processes: Processes, root: Path, record: dict[str, object] | None
) -> None:
    dead = leave_dead_session(processes, root)
    written = json.loads((dead / "owner.json").read_text())
    (dead / "owner.json").write_text("{" if record is None else json.dumps({**written, **record}))
    for options in (StoreOptions(), ADOPT):
        store = SnapshotStore(root, options)
        let_sweeper_finish(store)
        assert store.stats().live_snapshots == 0
        end(store)
    assert len(files_below(dead)) == len(BEFORE)


def test_a_session_without_a_lock_file_gets_none_and_is_kept(processes: Processes, root: Path) -> None:
    """Its owner is not provably dead: it may be on a disk from which somebody took the file."""
    dead = leave_dead_session(processes, root)
    (dead / "owner.lock").unlink()
    before = files_below(dead)
    for options in (StoreOptions(), ADOPT):
        store = SnapshotStore(root, options)
        let_sweeper_finish(store)
        end(store)
    assert files_below(dead) == before


def test_a_session_is_kept_where_locks_are_not_supported(
    processes: Processes, root: Path, files: FaultyFileSystem
) -> None:
    dead = leave_dead_session(processes, root)
    files.fail("lock", errno.EOPNOTSUPP, skip=1, times=math.inf)
    store = SnapshotStore(root, file_system=files)
    let_sweeper_finish(store)
    end(store)
    assert len(files_below(dead)) == len(BEFORE)


def test_leftovers_go_on_a_thread_of_their_own(
    processes: Processes, root: Path, files: FaultyFileSystem
) -> None:
    """Opening, saving, cleaning and shutting down do not wait for a disk that hangs in a removal of others' files."""
    leave_dead_session(processes, root)
    with files.pause("unlink", ".dead-") as gate:
        store = SnapshotStore(root, StoreOptions(shutdown_timeout_s=0.5), file_system=files)
        gate.wait_reached()
        store.save("own", 1, tensors(1)).result(10)
        assert_same(store.load("own", 1), tensors(1))
        started_s = time.monotonic()
        report = store.shutdown()
        assert time.monotonic() - started_s < 1.0
        assert report.committed + store.stats().committed >= 1 and report.writer_stopped
        assert any("sweeper" in error for error in report.errors)
    engine_of(store).join_briefly(10)


def test_what_is_asked_of_the_store_comes_before_the_leftovers(
    processes: Processes, root: Path, files: FaultyFileSystem
) -> None:
    """A cleanup is answered between two removals of leftovers, and its own bytes are freed before the rest of them.

    At once, that is: no time passes on this store's clock.
    """
    leave_dead_session(processes, root)
    gate = files.pause("unlink", ".dead-")
    store = SnapshotStore(root, file_system=files, threads=Threads(monotonic_s=lambda: 0.0))
    gate.wait_reached()
    store.save("own", 1, tensors(1)).result(10)
    left_at_cleanup: list[int] = []
    with ThreadPoolExecutor(1) as cleaner:
        cleaning = cleaner.submit(store.cleanup_request, "own", timeout_s=10)
        wait_until(lambda: not store.has("own", 1))
        files.call("unlink", lambda: left_at_cleanup.append(files.count("unlink", ".dead-")), ".trash")
        gate.open()
        assert cleaning.result(10).clean
    wait_until(lambda: sessions_in(root) == [store.session])
    assert left_at_cleanup and left_at_cleanup[0] < files.count("unlink", ".dead-")
    end(store)


@pytest.mark.parametrize(("durability", "syncs"), [("none", 0), ("data", 1), ("full", 1)])
def test_a_leftover_is_out_of_the_way_for_good_before_its_files_go(
    root: Path, files: FaultyFileSystem, durability: Literal["none", "data", "full"], syncs: int
) -> None:
    """Or a power cut could bring back its name, with a part of its files."""
    leave_session_with(root, {("a", 1): 1})
    store = SnapshotStore(root, StoreOptions(durability=durability), file_system=files)
    wait_until(lambda: sessions_in(root) == [store.session])
    calls = [(call.operation, [Path(path).name for path in call.paths]) for call in files.calls]
    aside = next(
        index
        for index, (operation, names) in enumerate(calls)
        if operation == "rename" and names[-1].startswith(".dead-")
    )
    first = next(
        index for index, (operation, _) in enumerate(calls) if operation == "unlink" and index > aside
    )
    assert calls[aside:first].count(("sync_directory", [root.name])) == syncs
    end(store)


def test_the_free_space_is_looked_at_now_and_then_while_leftovers_go(
    root: Path, files: FaultyFileSystem
) -> None:
    """Savers that were told that the disk is full learn of the room; but not a look for each file that goes."""
    leave_session_with(root, {(f"request-{number}", 1): 1 for number in range(60)})
    files.delay("unlink", 0.005, ".dead-")
    started_s = time.monotonic()
    store = SnapshotStore(root, file_system=files)
    wait_until(lambda: sessions_in(root) == [store.session])
    looks, took_s = files.count("free_bytes"), time.monotonic() - started_s
    end(store)
    assert 3 <= looks <= 3 + took_s / 0.1


def test_shutdown_leaves_the_rest_of_the_leftovers_to_the_next_store(
    processes: Processes, root: Path, files: FaultyFileSystem
) -> None:
    for _ in range(3):
        leave_dead_session(processes, root)
    gate = files.pause("unlink", ".dead-")
    store = SnapshotStore(root, file_system=files)
    gate.wait_reached()
    with ThreadPoolExecutor(1) as ending:
        report = ending.submit(store.shutdown, cleanup=True)
        sweeper = engine_of(store)._sweeper  # noqa: SLF001 - nothing else tells that it was told to end
        wait_until(lambda: sweeper._ending is not None)  # noqa: SLF001
        gate.open()
        assert report.result(10).clean and report.result(10).session_removed
    assert len(sessions_in(root)) == 3
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_one_start_reclaims_a_bounded_number_of_sessions(
    processes: Processes, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapstore._cleanup.RECLAIM_SESSIONS", 2)
    for _ in range(5):
        leave_dead_session(processes, root, ["a"])
    for left in (3, 1, 0):
        store = SnapshotStore(root)
        let_sweeper_finish(store)
        assert len(sessions_in(root)) == left + 1
        end(store)


def test_one_start_reclaims_for_a_bounded_time(
    processes: Processes, root: Path, files: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of one session; the next start goes on there."""
    monkeypatch.setattr("snapstore._cleanup.RECLAIM_S", 0.2)
    leave_dead_session(processes, root, [str(number) for number in range(40)])
    files.delay("unlink", 0.02, ".dead-")
    store = SnapshotStore(root, file_system=files)
    wait_until(lambda: files.count("unlink", ".dead-") > 0)
    let_sweeper_finish(store)
    assert 0 < files.count("unlink", ".dead-") < 40
    assert any(path.name.startswith(".dead-") for path in sessions_in(root))
    end(store)
    monkeypatch.undo()
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_a_reclaim_whose_time_is_up_begins_no_other_removal(
    processes: Processes, root: Path, files: FaultyFileSystem
) -> None:
    leave_dead_session(processes, root)
    clock_s = [0.0]
    files.call("unlink", lambda: clock_s.append(RECLAIM_S), ".dead-")
    store = SnapshotStore(root, file_system=files, threads=Threads(monotonic_s=lambda: clock_s[-1]))
    let_sweeper_finish(store)
    assert files.count("unlink", ".dead-") == 1
    end(store)


def test_what_could_not_be_removed_of_a_leftover_is_found_again(
    processes: Processes, root: Path, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lock file is the last to go, or nobody could prove it dead any more."""
    for _ in range(2):
        leave_dead_session(processes, root)
    files.fail("unlink", errno.EIO, ".safetensors", times=math.inf)
    store = SnapshotStore(root, file_system=files)
    wait_until(lambda: "could not be removed" in caplog.text)
    [record] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    count: int = record.count  # type: ignore[attr-defined]
    assert count >= 2 * len(BEFORE)
    assert (record.event, record.reason) == ("leftovers_stay", "io_error")  # type: ignore[attr-defined]
    assert record.getMessage().startswith(
        f"leftovers_stay: {count} could not be removed, the first: [Errno 5]"
    )
    left = [path for path in sessions_in(root) if path != store.session]
    assert [(path / "owner.lock").exists() for path in left] == [True, True]
    end(store)
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_a_leftover_that_somebody_puts_a_file_into_meanwhile_keeps_its_lock_until_that_is_gone(
    processes: Processes, root: Path, files: FaultyFileSystem
) -> None:
    leave_dead_session(processes, root)
    beside_the_lock: list[list[str]] = []

    def put_a_file() -> None:
        (dead,) = root.glob(".dead-*")
        (dead / "late").write_text("mine")

    def look() -> None:
        (dead,) = root.glob(".dead-*")
        beside_the_lock.append(sorted(path.name for path in dead.iterdir()))

    files.call("unlink", put_a_file, "owner.json")
    files.call("unlink", look, "owner.lock", times=math.inf)
    store = SnapshotStore(root, file_system=files)
    wait_until(lambda: sessions_in(root) == [store.session])
    assert beside_the_lock == [["owner.lock"]]
    end(store)


@pytest.mark.parametrize("operation", ["open_directory", "names"])
def test_a_directory_that_the_disk_says_is_gone_is_not_taken_for_freed(
    root: Path, files: FaultyFileSystem, operation: str
) -> None:
    store = SnapshotStore(root, file_system=files)
    save(store, ("a", 1), 1).result(10)
    files.fail(operation, errno.ENOENT, ".trash/")
    assert store.cleanup_request("a").clean
    wait_until(lambda: store.health().status == "degraded")
    let_sweeper_finish(store)
    assert store.health().status == "ok" and files_below(store.session) == []
    end(store)


@pytest.mark.parametrize("name", [".new-0123456789abcdef", ".dead-0123456789abcdef"])
@pytest.mark.parametrize(
    "within",
    [
        [],
        ["owner.lock"],
        ["owner.lock", "owner.json", "a.g1/1.safetensors"],
        ["owner.json", "a.g1/1.safetensors"],  # as a power cut may leave it: nobody is at work without a lock
    ],
)
def test_what_a_crash_left_half_made_or_half_removed_goes(root: Path, name: str, within: list[str]) -> None:
    end(SnapshotStore(root))
    for each in within:
        (root / name / each).parent.mkdir(parents=True, exist_ok=True)
        (root / name / each).write_bytes(b"{}")
    (root / name).mkdir(exist_ok=True)
    (root / ".snapstore.0123456789abcdef01234567").write_bytes(b"{")
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


@pytest.mark.parametrize("operation", ["make_directory", "open_lock", "create"])
def test_a_maker_whose_unborn_session_was_taken_makes_another(
    root: Path, files: FaultyFileSystem, operation: str
) -> None:
    """An empty ``.new-`` directory may be removed by anyone, so its maker must be able to lose it."""
    end(SnapshotStore(root))

    def take_it() -> None:
        for path in root.glob(".new-*"):
            shutil.rmtree(path)

    files.call(operation, take_it, ".new-", when="before" if operation != "make_directory" else "after")
    store = SnapshotStore(root, file_system=files)
    assert store.save("own", 1, tensors(1)).result(10)
    assert sessions_in(root) == [store.session]
    end(store)


def test_the_lock_of_a_session_that_was_reclaimed_meanwhile_counts_for_nothing(
    processes: Processes, root: Path, files: FaultyFileSystem
) -> None:
    """Between its look and its lock another reclaimer has removed it all: the second one touches nothing."""
    dead = leave_dead_session(processes, root)
    with files.pause("lock", dead.name) as gate:
        second = SnapshotStore(root, file_system=files)
        gate.wait_reached()
        first = SnapshotStore(root)
        wait_until(lambda: not dead.exists() and not list(root.glob(".dead-*")))
    let_sweeper_finish(second)
    assert not [call for call in files.calls if call.operation == "rename" and str(dead) in call.paths]
    end(first)
    end(second)


def test_two_reclaimers_of_one_session_never_meet_in_it(
    processes: Processes, root: Path, files: FaultyFileSystem
) -> None:
    dead = leave_dead_session(processes, root)
    other = FaultyFileSystem()
    with files.pause("unlink", ".dead-") as gate:
        first = SnapshotStore(root, file_system=files)
        gate.wait_reached()
        second = SnapshotStore(root, file_system=other)
        let_sweeper_finish(second)
        assert other.count("unlink", ".dead-") == 0 and other.count("rename", dead.name) == 0
    wait_until(lambda: sessions_in(root) == sorted([first.session, second.session]))
    end(first)
    end(second)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rounds", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_eight_processes_that_start_work_and_leave_together(
    processes: Processes, root: Path, rounds: int
) -> None:
    """Each leftover is reclaimed exactly once, no live session is touched, and in the end nothing is left."""
    for number in range(rounds):
        leftovers = [leave_dead_session(processes, root, ["a", "b"]).name for _ in range(4)]
        children = [
            processes.start("starts_with_others", root=str(root), name=f"p{each}") for each in range(8)
        ]
        assert {child.says() for child in children} == {"ready"}
        for child in children:
            child.tell("start")
        reclaimed: Counter[str] = Counter()
        for child in children:
            word, _, said = child.says().partition(" ")
            assert word == "worked", said
            assert json.loads(said)["found"] == [0, 0, 0]
            reclaimed.update(json.loads(said)["reclaimed"])
        assert reclaimed == Counter(leftovers), f"round {number}"
        for child in children:
            child.tell("leave")
        for child in children:
            assert child.says() == "left True True"
            assert child.wait() == 0
        assert sessions_in(root) == []
        processes.end_children()


# -- adopting -----------------------------------------------------------------------------------------------------


def test_an_engine_that_restarts_finds_its_boundaries(processes: Processes, root: Path) -> None:
    dead = leave_dead_session(processes, root)
    inodes = {path.name: path.stat().st_ino for path in dead.glob("*.g*/*")}
    store = SnapshotStore(root, ADOPT)
    assert everything_in(store, set(BEFORE)) == BEFORE
    assert {path.name: path.stat().st_ino for path in store.session.glob("*.g*/*")} == inodes, "by rename"
    stats = store.stats()
    assert stats.session_bytes == sum(path.stat().st_blocks * 512 for path in store.session.glob("*.g*/*"))
    assert stats.accepted == 0
    wait_until(lambda: sessions_in(root) == [store.session])
    save(store, ("a", 3), 1).result(10)
    assert store.boundaries("a") == (1, 2, 3)
    assert store.cleanup_request("a").clean
    assert store.boundaries("a") == ()
    end(store)
    assert sessions_in(root) == []


def test_adopted_snapshots_are_adopted_again(processes: Processes, root: Path) -> None:
    leave_dead_session(processes, root)
    for _ in range(3):
        store = SnapshotStore(root, ADOPT)
        assert everything_in(store, set(BEFORE)) == BEFORE
        store.shutdown()
    end(SnapshotStore(root, ADOPT))


def spoil(path: Path, how: str) -> None:
    raw = path.read_bytes()
    spoilt = {
        "empty": b"",
        "cut in the header": raw[:40],
        "cut in the data": raw[:-1],
        "longer": raw + b"x",
        "a flipped bit in the header": raw[:60] + bytes([raw[60] ^ 1]) + raw[61:],
    }[how]
    path.write_bytes(spoilt)


@pytest.mark.parametrize(
    "how", ["empty", "cut in the header", "cut in the data", "longer", "a flipped bit in the header"]
)
def test_a_torn_file_is_not_adopted_and_its_neighbours_are(
    processes: Processes, root: Path, how: str
) -> None:
    dead = leave_dead_session(processes, root)
    (torn,) = dead.glob("*.g*/2.safetensors")
    spoil(torn, how)
    store = SnapshotStore(root, ADOPT)
    assert everything_in(store, set(BEFORE)) == {**BEFORE, ("a", 2): None}
    wait_until(lambda: sessions_in(root) == [store.session])
    assert len(files_below(store.session)) == 2
    end(store)


def plant(dead: Path, what: str) -> None:
    (generation,) = {path.parent for path in dead.glob("*.g*/2.safetensors")}
    sound = generation / "2.safetensors"
    if what == "temporary files":
        (dead / ".tmp" / "0123456789").write_bytes(sound.read_bytes())
        (dead / ".trash" / "0123456789").mkdir()
    elif what == "a file under another name":
        shutil.copy(sound, generation / "7.safetensors")
    elif what == "a file of another request":
        shutil.copytree(generation, dead / f"{'0' * 32}.g9")
    elif what == "a file of another generation":
        shutil.copytree(generation, dead / generation.name.replace(".g1", ".g9"))
        shutil.rmtree(generation)
    elif what == "a link to a file":
        (generation / "7.safetensors").symlink_to(sound)
    elif what == "a link to a directory":
        (dead / f"{'1' * 32}.g9").symlink_to(generation)
    elif what == "a FIFO":
        os.mkfifo(generation / "7.safetensors")
    elif what == "directories and files of somebody":
        (generation / "notes.txt").write_text("hello")
        (generation / "9.safetensors").mkdir()
        (dead / f"{'2' * 32}.g1").write_text("no directory")


@pytest.mark.parametrize(
    ("what", "lost"),
    [
        ("temporary files", []),
        ("a file under another name", []),
        ("a file of another request", []),
        ("a file of another generation", [("a", 1), ("a", 2)]),
        ("a link to a file", []),
        ("a link to a directory", []),
        ("a FIFO", []),
        ("directories and files of somebody", []),
    ],
)
def test_what_is_no_snapshot_of_that_session_is_not_adopted(
    processes: Processes, root: Path, what: str, lost: list[tuple[str, int]]
) -> None:
    plant(leave_dead_session(processes, root), what)
    store = SnapshotStore(root, ADOPT)
    expected = {key: None if key in lost else version for key, version in BEFORE.items()}
    assert everything_in(store, {*BEFORE, ("a", 7), ("a", 9)}) == {**expected, ("a", 7): None, ("a", 9): None}
    wait_until(lambda: sessions_in(root) == [store.session])
    assert all(path.is_file() and not path.is_symlink() for path in store.session.glob("*.g*/*"))
    end(store)


def leave_session_with(root: Path, versions: dict[tuple[str, int], int]) -> Path:
    """A session whose store has gone, and kept its files."""
    store = SnapshotStore(root, KEEP)
    for key, version in versions.items():
        save(store, key, version).result(10)
    store.shutdown()
    return store.session


def test_of_a_request_in_two_dead_sessions_the_newest_life_is_adopted_and_no_other(root: Path) -> None:
    leave_session_with(root, {("a", 1): 1, ("a", 2): 1, ("b", 1): 1})
    leave_session_with(root, {("a", 1): 2, ("c", 1): 2})
    store = SnapshotStore(root, ADOPT)
    found = everything_in(store, {("a", 1), ("a", 2), ("b", 1), ("c", 1)})
    assert found == {("a", 1): 2, ("a", 2): None, ("b", 1): 1, ("c", 1): 2}
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_an_earlier_life_is_nobody_elses_to_adopt_either(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who adopts the newest life puts the earlier ones away, so that nobody finds them before they are reclaimed."""
    leave_session_with(root, {("a", 1): 1})
    leave_session_with(root, {("a", 1): 2})
    with monkeypatch.context() as patch:
        patch.setattr("snapstore._cleanup.RECLAIM_SESSIONS", 0)
        first = SnapshotStore(root, ADOPT)
        let_sweeper_finish(first)
        assert len(sessions_in(root)) == 3
    second = SnapshotStore(root, ADOPT)
    assert everything_in(first, {("a", 1)}) == {("a", 1): 2}
    assert everything_in(second, {("a", 1)}) == {("a", 1): None}
    end(second)
    end(first)


def test_the_newest_session_is_the_one_that_was_opened_last_also_within_one_second(root: Path) -> None:
    """Names tell seconds and process numbers, of which 1000 comes before 999."""
    older, newer = (leave_session_with(root, {("a", 1): version}) for version in (1, 2))
    for session, number, name in ((older, 999, "00000000"), (newer, 1000, "11111111")):
        record = json.loads((session / "owner.json").read_text())
        (session / "owner.json").write_text(json.dumps({**record, "pid": number}))
        session.rename(root / f"20260101T000000Z-{number}-{name}")
    store = SnapshotStore(root, ADOPT)
    assert everything_in(store, {("a", 1)}) == {("a", 1): 2}
    end(store)


def test_an_earlier_life_does_not_come_back_when_the_newest_is_torn(root: Path) -> None:
    leave_session_with(root, {("a", 1): 1})
    newer = leave_session_with(root, {("a", 1): 2})
    (torn,) = newer.glob("*.g*/1.safetensors")
    spoil(torn, "cut in the data")
    store = SnapshotStore(root, ADOPT)
    with pytest.raises(SnapshotNotFoundError):
        store.load("a", 1)
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_new_saves_of_an_adopted_request_go_into_its_life_and_new_requests_into_later_ones(
    processes: Processes, root: Path
) -> None:
    leave_dead_session(processes, root)
    store = SnapshotStore(root, ADOPT)
    adopted = {path.name for path in store.session.glob("*.g*")}
    replaced = save(store, ("a", 1), 5).result(10)
    assert replaced.path.parent.name in adopted
    new = save(store, ("new", 1), 5).result(10)
    assert new.generation > max(int(name.rpartition(".g")[2]) for name in adopted)
    assert everything_in(store, {*BEFORE, ("new", 1)}) == {**BEFORE, ("a", 1): 5, ("new", 1): 5}
    end(store)


@pytest.mark.parametrize("operation", ["open_read", "read_into", "names", "open_lock", "lock", "rename"])
def test_what_can_not_be_read_at_a_start_is_neither_adopted_nor_lost(
    processes: Processes,
    root: Path,
    files: FaultyFileSystem,
    operation: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Too many open files, say: the next start adopts it."""
    dead = leave_dead_session(processes, root)
    path, skip = ("", 2) if operation == "names" else (dead.name, 0)  # two listings are the opening's own
    files.fail(operation, errno.EMFILE, path, skip=skip, times=5)
    store = SnapshotStore(root, ADOPT, file_system=files)
    files.heal()
    let_sweeper_finish(store)
    store.shutdown()
    assert "leftovers_not_adopted" in caplog.text, "nor is it passed over in silence"
    store = SnapshotStore(root, ADOPT)
    assert everything_in(store, set(BEFORE)) == BEFORE
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("open_directory", ".g1"),
        ("open_read", ".safetensors"),
        ("read_into", ".safetensors"),
        ("status", ".safetensors"),
        ("rename", ".g1"),
    ],
)
def test_a_dead_session_that_could_not_be_read_to_the_end_is_not_reclaimed(
    processes: Processes, root: Path, files: FaultyFileSystem, operation: str, path: str
) -> None:
    """Nobody has adopted what is in it, though the disk is well again when leftovers are removed."""
    leave_dead_session(processes, root)
    files.fail(operation, errno.EIO, path)
    store = SnapshotStore(root, ADOPT, file_system=files)
    let_sweeper_finish(store)
    assert store.stats().live_snapshots < len(BEFORE)
    store.shutdown()
    store = SnapshotStore(root, ADOPT)
    assert everything_in(store, set(BEFORE)) == BEFORE
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_what_was_adopted_and_could_not_be_synced_leaves_the_session_that_it_came_from(
    root: Path, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    """Were that reclaimed, a power cut could leave the snapshots in neither."""
    dead = leave_session_with(root, {("a", 1): 1})
    files.fail("sync_directory", errno.EIO, f"Z-{os.getpid()}-", skip=1)  # not of the request's directory
    options = StoreOptions(leftovers="adopt", durability="full")
    store = SnapshotStore(root, options, file_system=files)
    let_sweeper_finish(store)
    assert "leftovers_not_adopted" in caplog.text
    assert everything_in(store, {("a", 1)}) == {("a", 1): 1}
    assert set(sessions_in(root)) == {dead, store.session}
    store.shutdown()
    store = SnapshotStore(root, options, file_system=files)
    assert everything_in(store, {("a", 1)}) == {("a", 1): 1}
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


# -- roots --------------------------------------------------------------------------------------------------------


def refused(root: Path, why: str) -> str:
    """The whole of what is said of a root that can not be one."""
    return "^" + re.escape(f"{root} can not be a snapstore root: {why}")


def test_a_root_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    why = "it is a symbolic link; name the directory itself"
    with pytest.raises(RootError, match=refused(tmp_path / "link", why)) as caught:
        SnapshotStore(tmp_path / "link")
    assert caught.value.errno == errno.ELOOP and str(caught.value.path) == str(tmp_path / "link")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_root_that_is_a_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RootError, match="symbolic link"):
        SnapshotStore(tmp_path / "link")


def test_a_root_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name, why in (
        ("file", "it is not a directory"),
        ("file/below", "no session can be made in it: Not a"),
    ):
        with pytest.raises(RootError, match=refused(tmp_path / name, why)) as caught:
            SnapshotStore(tmp_path / name)
        assert caught.value.errno == errno.ENOTDIR
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_with_somebody_elses_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    before = tmp_path.stat().st_mode
    why = "it has no .snapstore marker, so it is not ours; name an empty directory"
    with pytest.raises(RootError, match=refused(tmp_path, why)) as caught:
        SnapshotStore(tmp_path)
    assert caught.value.errno == errno.EEXIST
    assert [path.name for path in tmp_path.iterdir()] == ["precious"] and tmp_path.stat().st_mode == before


@pytest.mark.parametrize(
    ("marker", "why"),
    [
        ('{"format": 2}', "its marker says {'format': 2}, this snapstore knows format 1; upgrade"),
        ("[]", "its marker says [], this snapstore knows format 1; upgrade"),
        ("{", "its marker can not be read: Expecting"),
        ("", "its marker can not be read: Expecting"),
    ],
)
def test_a_root_of_another_format_is_refused(root: Path, marker: str, why: str) -> None:
    root.mkdir()
    (root / ".snapstore").write_text(marker)
    with pytest.raises(RootError, match=refused(root, why)) as caught:
        SnapshotStore(root)
    assert caught.value.errno == errno.EINVAL


def test_a_marker_that_can_not_be_read_just_now_is_refused_with_the_cause(
    root: Path, files: FaultyFileSystem
) -> None:
    end(SnapshotStore(root))
    files.fail("read_into", errno.EIO, ".snapstore")
    why = "its marker can not be read: [Errno 5] Input/output error"
    with pytest.raises(RootError, match=refused(root, why)) as caught:
        SnapshotStore(root, file_system=files)
    assert caught.value.errno == errno.EIO


def test_a_root_on_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "disk" / "root"
    root.parent.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(root.parent)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can not be mounted here: " + mounted.stderr.decode())
    try:
        end(SnapshotStore(root))
        for path in (root, root.parent / "new"):
            subprocess.run(["mount", "-o", "remount,ro", str(root.parent)], check=True)
            with pytest.raises(RootError, match="Read-only") as caught:
                SnapshotStore(path)
            assert caught.value.errno == errno.EROFS
    finally:
        subprocess.run(["umount", str(root.parent)], check=True)


@pytest.mark.parametrize(("operation", "path"), [("make_directory", ".trash"), ("rename", ".new-")])
def test_a_root_that_fails_in_the_middle_of_opening_leaves_nothing_behind(
    root: Path, files: FaultyFileSystem, operation: str, path: str
) -> None:
    end(SnapshotStore(root))
    files.fail(operation, errno.ENOSPC, path)
    why = "no session can be made in it: No space left on device"
    with pytest.raises(RootError, match=refused(root, why)) as caught:
        SnapshotStore(root, file_system=files)
    assert caught.value.errno == errno.ENOSPC
    assert sessions_in(root) == []


def test_parents_of_a_root_are_made(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "a" / "b" / "root")
    end(store)
    assert mode_of(store.root) == 0o700


def test_threads_that_can_not_be_started_leave_nothing_behind(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start
    for name in ("snapstore-sweeper", "snapstore-writer"):

        def start(thread: threading.Thread, name: str = name) -> None:
            if thread.name == name:
                raise RuntimeError("can't start new thread")
            begin(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="new thread"):
                SnapshotStore(root)
        wait_until(lambda: sessions_in(root) == [])


# -- modes --------------------------------------------------------------------------------------------------------


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_everything_is_private_and_usable_whatever_the_umask(root: Path, umask: None) -> None:
    store = SnapshotStore(root)
    store.save("request", 1, tensors(1)).result(10)
    for path in [root, *root.rglob("*")]:
        assert mode_of(path) == (0o700 if path.is_dir() else 0o600), path
    end(store)


def test_a_root_that_a_store_has_made_is_tightened_again(root: Path) -> None:
    end(SnapshotStore(root))
    root.chmod(0o755)
    end(SnapshotStore(root))
    assert mode_of(root) == 0o700


def test_a_root_that_was_given_keeps_its_mode(root: Path) -> None:
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    for _ in range(2):
        store = SnapshotStore(root)
        assert mode_of(root) == 0o755 and mode_of(store.session) == 0o700
        end(store)


def test_adopted_files_are_tightened(processes: Processes, root: Path) -> None:
    dead = leave_dead_session(processes, root)
    for path in dead.rglob("*.g*"):
        path.chmod(0o755)
    for path in dead.rglob("*.safetensors"):
        path.chmod(0o644)
    store = SnapshotStore(root, ADOPT)
    for path in store.session.rglob("*"):
        assert mode_of(path) == (0o700 if path.is_dir() else 0o600), path
    end(store)


def test_a_store_in_use_mends_what_somebody_removed(root: Path, eventually) -> None:
    """See ``test_space`` for what its saves say meanwhile."""
    store = SnapshotStore(root)
    store.save("request", 1, tensors(1)).result(10)
    shutil.rmtree(store.session / ".trash")
    assert store.cleanup_request("request").clean
    eventually(lambda: files_below(store.session) == [])
    end(store)


# -- what other processes, and the disk, take from under it -----------------------------------------------------------


def test_a_maker_that_always_loses_its_session_gives_up(root: Path, files: FaultyFileSystem) -> None:
    end(SnapshotStore(root))

    def take_it() -> None:
        for path in root.glob(".new-*"):
            shutil.rmtree(path)

    files.call("make_directory", take_it, ".new-", when="after", times=math.inf)
    why = "other processes took every session that was being made"
    with pytest.raises(RootError, match=refused(root, why) + "$") as caught:
        SnapshotStore(root, file_system=files)
    assert caught.value.errno == errno.EBUSY
    assert sessions_in(root) == []


def test_a_root_that_is_removed_while_it_is_opened_is_refused(root: Path, files: FaultyFileSystem) -> None:
    end(SnapshotStore(root))
    files.call("make_directory", lambda: shutil.rmtree(root, ignore_errors=True), ".new-", times=math.inf)
    with pytest.raises(RootError, match=refused(root, "there is no such directory") + "$") as caught:
        SnapshotStore(root, file_system=files)
    assert caught.value.errno == errno.ENOENT


def test_an_unborn_session_that_somebody_has_locked_is_left_to_him(
    root: Path, files: FaultyFileSystem
) -> None:
    end(SnapshotStore(root))
    theirs: list[int] = []

    def lock_it() -> None:
        (path,) = root.glob(".new-*/owner.lock")
        theirs.append(os.open(path, os.O_RDWR))
        fcntl.flock(theirs[0], fcntl.LOCK_EX)

    files.call("lock", lock_it, ".new-")
    store = SnapshotStore(root, file_system=files)
    assert store.save("own", 1, tensors(1)).result(10)
    for fd in theirs:
        os.close(fd)
    end(store)
    assert len(theirs) == 1


def test_leftovers_beyond_the_bound_of_one_start_are_for_the_next(root: Path) -> None:
    end(SnapshotStore(root))
    for number in range(RECLAIM_SESSIONS + 3):
        (root / f".dead-{number:016x}").mkdir()
        (root / f".dead-{number:016x}" / "owner.json").write_bytes(b"{}")
    store = SnapshotStore(root)
    let_sweeper_finish(store)
    assert len(sessions_in(root)) == 1 + 3
    end(store)
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_what_another_machine_left_half_removed_is_not_ours(root: Path) -> None:
    first = SnapshotStore(root)
    record = json.loads((first.session / "owner.json").read_text())
    end(first)
    theirs = root / ".dead-0123456789abcdef"
    theirs.mkdir()
    (theirs / "owner.json").write_text(json.dumps(record | {"host": "another", "boot_id": "another"}))
    store = SnapshotStore(root)
    let_sweeper_finish(store)
    assert sessions_in(root) == [theirs, store.session]
    (theirs / "owner.json").write_text(json.dumps(record))
    end(store)
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    end(store)


def test_leftovers_whose_lock_can_not_be_opened_stay(root: Path, files: FaultyFileSystem) -> None:
    end(SnapshotStore(root))
    dead = root / ".dead-0123456789abcdef"
    dead.mkdir()
    (dead / "owner.lock").touch()
    files.fail("open_lock", errno.EACCES, dead.name)
    store = SnapshotStore(root, file_system=files)
    let_sweeper_finish(store)
    assert sessions_in(root) == [dead, store.session]
    end(store)


@pytest.mark.parametrize(("number", "said"), [(errno.ENOENT, False), (errno.EIO, True)])
def test_a_staged_marker_that_will_not_go_is_told_unless_it_is_gone(
    root: Path, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture, number: int, said: bool
) -> None:
    end(SnapshotStore(root))
    (root / ".snapstore.0123456789abcdef01234567").write_bytes(b"{")
    files.fail("unlink", number, ".snapstore.")
    store = SnapshotStore(root, file_system=files)
    let_sweeper_finish(store)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == said
    assert all(
        each.startswith("leftovers_stay: 1 could not be removed, the first: [Errno 5]") for each in told
    )
    end(store)


def test_a_root_that_can_not_be_listed_for_leftovers_is_told(
    root: Path, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        if threading.current_thread().name == "snapstore-sweeper":
            raise OSError(errno.EIO, "no listing")

    files.call("names", refuse, str(root), times=math.inf)
    store = SnapshotStore(root, file_system=files)
    let_sweeper_finish(store)
    files.heal()
    [told] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == "leftovers_stay: 1 could not be removed, the first: [Errno 5] no listing"
    end(store)


def test_a_root_whose_marker_is_always_taken_before_it_stands_is_refused(
    root: Path, files: FaultyFileSystem
) -> None:
    def take_it() -> None:
        for path in root.glob(".snapstore.*"):
            path.unlink()

    files.call("rename", take_it, ".snapstore", times=math.inf)
    why = "it has no .snapstore marker, so it is not ours; name an empty directory"
    with pytest.raises(RootError, match=refused(root, why)):
        SnapshotStore(root, file_system=files)
    assert not (root / ".snapstore").exists()


def test_a_session_that_is_lost_again_while_it_is_made_again_is_made_at_the_next_failure(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    shutil.rmtree(store.session)

    def take_it() -> None:
        for path in root.glob(".new-*"):
            shutil.rmtree(path)

    files.call("make_directory", take_it, ".new-", when="after")
    for token_count in (1, 2):  # the second finds that it was not made again, and makes it
        with pytest.raises(SaveFailedError):
            store.save("a", token_count, tensors(1)).result(10)
    assert store.save("a", 3, tensors(1)).result(10)
    end(store)
