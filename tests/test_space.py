"""Disks that are full, gone or stuck, and threads that die: what a store refuses, survives, and says of itself."""

from __future__ import annotations

import errno
import gc
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from actions import engine_of, let_sweeper_finish, sessions_in, state_of, wait_until
from helpers import assert_same, files_below, tensors
from processes import TESTS, Processes
from scenarios import cause_of

from snapstore import (
    DiskQuotaError,
    RootError,
    SaveFailedError,
    SaveState,
    SnapshotCorruptError,
    SnapshotStore,
    StoreClosedError,
    StoreOptions,
)
from snapstore._files import FileSystem
from snapstore.testing import FaultyFileSystem

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE]
WRITING = {
    "create": ".tmp",
    "write": ".tmp",
    "status": ".tmp",
    "close": ".tmp",
    "make_directory": ".g",
    "rename": ".tmp",
}


@pytest.fixture
def store(root: Path, files: FaultyFileSystem):
    store = SnapshotStore(root, file_system=files)
    yield store
    files.heal()
    assert store.shutdown(cleanup=True).writer_stopped
    assert sessions_in(root) == []


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- durability ---------------------------------------------------------------------------------------------------


def operations(files: FaultyFileSystem, since: int) -> list[str]:
    """What counts for durability, in order."""
    telling = {"write", "sync_data", "rename", "sync_directory", "make_directory"}
    return [call.operation for call in files.calls[since:] if call.operation in telling]


@pytest.mark.parametrize(
    ("durability", "first", "second"),
    [
        ("none", ["write", "make_directory", "rename"], ["write", "make_directory", "rename"]),
        (
            "data",
            ["write", "sync_data", "make_directory", "rename"],
            ["write", "sync_data", "make_directory", "rename"],
        ),
        (
            "full",
            ["write", "sync_data", "make_directory", "sync_directory", "rename", "sync_directory"],
            ["write", "sync_data", "make_directory", "rename", "sync_directory"],
        ),
    ],
)
def test_durability_is_made_of_these_operations(
    root: Path, files: FaultyFileSystem, durability: Any, first: list[str], second: list[str]
) -> None:
    """The second save of a request finds its directory made, and synced."""
    store = SnapshotStore(root, StoreOptions(durability=durability), file_system=files)
    for token_count, expected in enumerate([first, second]):
        since = len(files.calls)
        store.save("request", token_count, tensors(1)).result(10)
        wait_until(lambda: store.stats().pending == 0)
        assert operations(files, since) == expected
    store.shutdown(cleanup=True)


STRACE = shutil.which("strace")


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="there is no strace here")
@pytest.mark.parametrize(
    ("durability", "expected"),
    [
        ("none", ["rename"]),
        ("data", ["fdatasync file", "rename"]),
        ("full", ["fdatasync file", "fsync directory", "rename", "fsync directory"]),
    ],
)
def test_durability_is_made_of_these_system_calls(
    tmp_path: Path, durability: str, expected: list[str]
) -> None:
    """As the kernel sees it: of the save alone, between two marks."""
    script = f"""
import os, numpy
from snapstore import SnapshotStore, StoreOptions
store = SnapshotStore({str(tmp_path / "root")!r}, StoreOptions(durability={durability!r}))
os.access("/begin", os.F_OK)
store.save("request", 1, {{"x": numpy.arange(1000)}}).result(10)
os.access("/end", os.F_OK)
store.shutdown()
"""
    trace = tmp_path / "trace"
    command = [str(STRACE), "-f", "-y", "-e", "trace=access,fsync,fdatasync,rename,renameat,renameat2", "-o"]
    done = subprocess.run(
        [*command, str(trace), sys.executable, "-c", script], capture_output=True, check=False
    )
    if b"ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    lines = trace.read_text().splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if mark in line) for mark in ('"/begin"', '"/end"'))
    seen = []
    for line in lines[begin + 1 : end]:
        call = line.split("(")[0].split()[-1]
        if call in ("fsync", "fdatasync"):
            seen.append(f"{call} {'file' if '/.tmp/' in line else 'directory'}")
        elif "rename" in call:
            seen.append("rename")
    assert seen == expected


def test_a_session_that_is_to_last_is_synced_before_it_is_used(root: Path, files: FaultyFileSystem) -> None:
    """Else a power cut could take the directory, and all that was synced in it."""
    store = SnapshotStore(root, StoreOptions(durability="full"), file_system=files)
    calls = [(call.operation, Path(call.paths[0]).name) for call in files.calls]
    named = next(i for i, (operation, _) in enumerate(calls) if operation == "rename" and i > 10)
    assert ("sync_data", "owner.json") in calls[:named]
    assert ("sync_directory", root.name) in calls[named:]
    store.shutdown(cleanup=True)


def test_a_directory_that_could_not_be_synced_is_synced_by_the_next_save(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, StoreOptions(durability="full"), file_system=files)
    files.fail("sync_directory", errno.EIO)
    assert cause_of(store.save("request", 1, tensors(1))) == errno.EIO
    since = len(files.calls)
    store.save("request", 2, tensors(2)).result(10)
    assert operations(files, since).count("sync_directory") == 2
    assert len(files_below(store.session)) == 1
    assert store.shutdown(cleanup=True).clean


def test_a_save_that_fails_after_its_rename_gives_the_earlier_one_its_place_back(
    root: Path, files: FaultyFileSystem
) -> None:
    """With ``full`` the directory is synced after the rename, when the earlier file had no name any more."""
    store = SnapshotStore(root, StoreOptions(durability="full"), file_system=files)
    store.save("request", 1, tensors(1)).result(10)
    files.fail("sync_directory", errno.EIO, times=math.inf)
    assert cause_of(store.save("request", 1, tensors(2))) == errno.EIO
    assert_same(store.load("request", 1), tensors(1))
    assert cause_of(store.save("request", 2, tensors(3))) == errno.EIO
    with pytest.raises(SaveFailedError):
        store.load("request", 2)
    files.heal()
    assert len(files_below(store.session)) == 1
    assert store.shutdown(cleanup=True).clean


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_full_durability_works_where_there_are_no_hard_links(
    root: Path, files: FaultyFileSystem, number: int
) -> None:
    store = SnapshotStore(root, StoreOptions(durability="full"), file_system=files)
    files.fail("link", number, times=math.inf)
    for version in range(3):
        store.save("request", 1, tensors(version)).result(10)
    assert_same(store.load("request", 1), tensors(2))
    assert store.shutdown(cleanup=True).clean


@pytest.mark.parametrize("across", [False, True])
def test_a_detach_that_would_not_outlast_a_power_cut_leaves_the_file_where_it_was(
    root: Path, files: FaultyFileSystem, across: bool
) -> None:
    """``across`` file systems, where it is a copy."""
    store = SnapshotStore(root, StoreOptions(durability="full"), file_system=files)
    store.save("request", 1, tensors(1)).result(10)
    before = files_below(store.session)
    if across:
        files.fail("rename", errno.EXDEV, ".safetensors")
    files.fail("sync_directory", errno.EIO)
    target = root.parent / "out"
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        store.detach("request", 1, target)
    assert not target.exists() and files_below(store.session) == before
    assert_same(store.load("request", 1), tensors(1))
    assert store.detach("request", 1, target) == target
    assert target.exists() and not files_below(store.session)
    assert store.shutdown(cleanup=True).clean


def test_what_is_forgotten_is_synced_once_for_all_and_a_sync_that_fails_is_said(
    root: Path, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    """Or a power cut could bring it back. It is gone all the same, so the cleaner is told so."""
    store = SnapshotStore(root, StoreOptions(durability="full"), file_system=files)
    for number in range(20):
        store.save(f"request {number}", 1, tensors(1)).result(10)
    since = len(files.calls)
    files.fail("sync_directory", errno.EIO)
    assert store.cleanup_all(timeout_s=10).clean
    wait_until(lambda: store.stats().trash_bytes == 0)
    assert operations(files, since).count("sync_directory") == 1
    assert os.strerror(errno.EIO) in str(store.health().reasons)
    [warning] = warnings_in(caplog)
    assert warning.startswith("removal_failed (io_error): ") and os.strerror(errno.EIO) in warning
    assert files_below(store.session) == []
    store.save("request", 1, tensors(1)).result(10)
    assert store.cleanup_request("request", timeout_s=10).clean
    wait_until(lambda: store.health().status == "ok")
    assert store.shutdown(cleanup=True).clean


def test_forgetting_syncs_nothing_where_that_is_not_asked_for(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    store.save("request", 1, tensors(1)).result(10)
    since = len(files.calls)
    assert store.cleanup_request("request", timeout_s=10).clean
    wait_until(lambda: store.stats().trash_bytes == 0)
    assert "rename" in operations(files, since) and "sync_directory" not in operations(files, since)


def test_forgetting_what_came_to_no_file_syncs_nothing(root: Path, files: FaultyFileSystem) -> None:
    store = SnapshotStore(root, StoreOptions(durability="full"), file_system=files)
    with files.pause("create", ".tmp") as gate:
        store.save("request", 1, tensors(1))
        gate.wait_reached()
        since = len(files.calls)
        assert not store.cleanup_request("request", timeout_s=0).clean
    assert store.cleanup_request("request", timeout_s=10).clean
    assert "sync_directory" not in operations(files, since)
    assert store.shutdown(cleanup=True).clean


def test_a_root_whose_way_may_not_be_opened_is_made_to_last_as_far_as_may_be(
    root: Path, files: FaultyFileSystem
) -> None:
    """A directory that we may not open is one that we did not make."""
    files.fail("sync_directory", errno.EACCES, skip=1)  # the first one is the root's own, for its marker
    store = SnapshotStore(root, StoreOptions(durability="full"), file_system=files)
    synced = [call.paths[0] for call in files.calls if call.operation == "sync_directory"]
    assert synced[:3] == [str(root), str(root.parent), str(root.parent.parent)]
    store.save("request", 1, tensors(1)).result(10)
    assert store.shutdown(cleanup=True).clean
    files.fail("sync_directory", errno.EIO)
    with pytest.raises(RootError, match="no session can be made"):
        SnapshotStore(root, StoreOptions(durability="full"), file_system=files)


# -- limits -------------------------------------------------------------------------------------------------------


class Disk(FileSystem):
    """So much is free on it, as it says."""

    def __init__(self, free_bytes: int) -> None:
        super().__init__()
        self.free = free_bytes

    def free_bytes(self, path: str | int) -> int:
        return self.free


def test_a_limit_refuses_before_the_copy_and_is_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SnapshotStore(root, StoreOptions(max_session_bytes=100 * 1024))
    copies: list[object] = []
    monkeypatch.setattr(engine_of(store).pool, "take", copies.append)
    with pytest.raises(DiskQuotaError) as caught:
        store.save("request", 1, tensors(1, 200 * 1024))
    monkeypatch.undo()
    assert copies == []
    error, stats = caught.value, store.stats()
    assert isinstance(error, OSError) and error.errno == errno.EDQUOT
    assert (error.limit_bytes, error.used_bytes) == (100 * 1024, 0) and error.nbytes >= 199 * 1024
    assert (stats.rejected, stats.rejected_bytes, stats.accepted, stats.pending_bytes) == (
        1,
        error.nbytes,
        0,
        0,
    )
    assert store.shutdown(cleanup=True).clean


def test_sizes_are_blocks_on_disk(store: SnapshotStore) -> None:
    infos = [store.save("request", count, {"x": tensors(1)["conv"][:10]}).result(10) for count in range(5)]
    blocks = sum(info.path.stat().st_blocks * 512 for info in infos)
    assert store.stats().session_bytes == blocks > 5 * 4000 > sum(info.nbytes for info in infos)


def test_what_is_forgotten_counts_until_it_is_off_the_disk(root: Path, files: FaultyFileSystem) -> None:
    """Also while the sweeper has not come to it: a disk that hangs gives nobody room."""
    store = SnapshotStore(root, StoreOptions(max_session_bytes=100 * 1024), file_system=files)
    store.save("first", 1, tensors(1, 80 * 1024)).result(10)
    with files.pause("rename", ".trash") as gate:
        assert not store.cleanup_request("first", timeout_s=0).clean
        gate.wait_reached()
        assert store.stats().session_bytes == 0 and store.stats().trash_bytes >= 80 * 1024
        with pytest.raises(DiskQuotaError):
            store.save("second", 1, tensors(1, 80 * 1024))
    wait_until(lambda: store.stats().trash_bytes == 0)
    store.save("second", 1, tensors(1, 80 * 1024)).result(10)
    assert store.shutdown(cleanup=True).clean


def test_the_free_space_is_what_it_is_after_each_write_and_each_removal(root: Path) -> None:
    """Not what it was when the store opened."""
    disk = Disk(free_bytes=1_000_000)
    store = SnapshotStore(root, StoreOptions(min_free_bytes=500_000), file_system=disk)
    store.save("request", 1, tensors(1, 100_000)).result(10)
    disk.free = 550_000
    store.save("request", 2, tensors(1, 40_000)).result(10)
    with pytest.raises(DiskQuotaError, match="min_free_bytes") as caught:
        store.save("request", 3, tensors(1, 100_000))
    assert caught.value.errno == errno.ENOSPC
    assert (caught.value.limit_bytes, caught.value.used_bytes) == (500_000, 550_000)
    assert store.health().free_bytes == 550_000
    disk.free = 800_000
    assert store.cleanup_request("request", timeout_s=10).clean
    wait_until(lambda: store.health().free_bytes == 800_000)
    assert store.shutdown(cleanup=True).clean


def test_room_comes_back_when_somebody_else_makes_it(root: Path, eventually: Callable[..., None]) -> None:
    """A refusal has the space looked at again."""
    disk = Disk(free_bytes=1000)
    store = SnapshotStore(root, StoreOptions(min_free_bytes=500_000), file_system=disk)
    with pytest.raises(DiskQuotaError):
        store.save("request", 1, tensors(1))
    disk.free = 10_000_000

    def is_taken() -> bool:
        try:
            return store.save("request", 1, tensors(1)).result(10) is not None
        except DiskQuotaError:
            return False

    eventually(is_taken)
    assert store.shutdown(cleanup=True).clean


# -- errors of the disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", WRITING)
def test_a_save_that_the_disk_refuses_fails_with_its_cause_and_nothing_else_does(
    store: SnapshotStore,
    files: FaultyFileSystem,
    caplog: pytest.LogCaptureFixture,
    operation: str,
    number: int,
) -> None:
    caplog.set_level(logging.INFO, "snapstore")
    store.save("request", 1, tensors(1)).result(10)
    when: Any = "after" if operation == "close" else "before"
    files.fail(operation, number, WRITING[operation], times=4, when=when)
    tickets = [store.save("request", token_count, tensors(9)) for token_count in (1, 2, 3, 4)]
    assert [cause_of(ticket) for ticket in tickets] == [number] * 4
    health = store.health()
    assert health.status == "degraded" and os.strerror(number) in health.reasons[0]
    assert os.strerror(number) in (health.last_error or "")
    assert len(warnings_in(caplog)) == 1, "at the change, not one a job"
    assert_same(store.load("request", 1), tensors(1))
    with pytest.raises(SaveFailedError) as caught:
        store.load("request", 2)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(files_below(store.session)) == 1, "no temporary file is left"
    store.save("request", 1, tensors(2)).result(10)
    wait_until(lambda: "works again after 4 failures" in caplog.text)
    assert store.health().status == "ok"
    assert_same(store.load("request", 1), tensors(2))
    assert len(warnings_in(caplog)) == 1
    files.fail(operation, number, WRITING[operation], when=when)
    assert cause_of(store.save("request", 1, tensors(3))) == number
    assert len(warnings_in(caplog)) == 2, "the next change"


def test_the_error_of_a_save_keeps_none_of_its_tensors(store: SnapshotStore, files: FaultyFileSystem) -> None:
    """Whoever keeps the error, or the ticket, keeps no frame of the writer, and so no memory of a request."""
    files.fail("write", errno.EIO, ".tmp")
    saved = tensors(1)
    ticket = store.save("request", 1, saved, borrow=True)
    error = ticket.exception(10)
    assert error is not None and ticket.wait_released(10)
    arrays = [weakref.ref(array) for array in saved.values()]
    del saved
    gc.collect()
    assert [array() for array in arrays] == [None, None]


def test_a_disk_that_refuses_everything_for_a_while_leaves_nothing_behind(
    store: SnapshotStore, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    """Temporary files that would not go are removed when writes work again."""
    store.save("request", 1, tensors(1)).result(10)
    for operation in ("rename", "unlink"):
        files.fail(operation, errno.EROFS, ".tmp", times=math.inf)
    for token_count in range(2, 5):
        assert cause_of(store.save("request", token_count, tensors(1))) == errno.EROFS
    assert len([name for name in files_below(store.session) if name.startswith(".tmp")]) == 3
    assert len(warnings_in(caplog)) == 1
    files.heal()
    store.save("request", 2, tensors(2)).result(10)
    wait_until(lambda: len(files_below(store.session)) == 2)


def test_removals_that_fail_warn_once_and_are_well_again_when_they_work(
    store: SnapshotStore, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        store.save(f"request-{number}", 1, tensors(1)).result(10)
    files.fail("unlink", errno.EIO, ".trash", times=math.inf)
    for number in range(4):
        assert store.cleanup_request(f"request-{number}").clean, "its files are out of the way"
    let_sweeper_finish(store)
    [warning] = warnings_in(caplog)
    assert warning.startswith("removal_failed (io_error): ")
    assert store.health().status == "degraded" and os.strerror(errno.EIO) in str(store.health().reasons)
    store.save("other", 1, tensors(1)).result(10)
    assert store.health().status == "degraded", "a write that works does not free the trash"
    files.heal()
    let_sweeper_finish(store)
    assert store.health().status == "ok" and store.stats().trash_bytes == 0


# -- directories that vanish --------------------------------------------------------------------------------------


def vanish(store: SnapshotStore, what: str) -> None:
    pattern = {"temporary files": ".tmp", "generation": "*.g*", "session": "."}[what]
    for path in list(store.session.glob(pattern)) if pattern != "." else [store.session]:
        shutil.rmtree(path)


@pytest.mark.parametrize("what", ["temporary files", "generation", "session"])
def test_a_store_whose_directories_vanished_recovers(
    store: SnapshotStore, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    store.save("request", 1, tensors(1)).result(10)
    vanish(store, what)
    causes = [cause_of(store.save("other", token_count, tensors(2))) for token_count in range(3)]
    assert causes == [None if what == "generation" else errno.ENOENT, None, None]
    assert store.health().status == "ok"
    assert len(warnings_in(caplog)) == causes.count(errno.ENOENT)
    assert_same(store.load("other", 2), tensors(2))
    if what == "temporary files":
        assert_same(store.load("request", 1), tensors(1))
    else:
        with pytest.raises(SnapshotCorruptError, match="not by this store"):
            store.load("request", 1)
    store.save("request", 1, tensors(3)).result(10)
    assert_same(store.load("request", 1), tensors(3))
    assert store.cleanup_all().clean


def test_a_session_that_was_made_again_is_owned_again(store: SnapshotStore, root: Path) -> None:
    vanish(store, "session")
    assert cause_of(store.save("request", 1, tensors(1))) == errno.ENOENT
    store.save("request", 2, tensors(2)).result(10)
    other = SnapshotStore(root)
    let_sweeper_finish(other)
    assert_same(store.load("request", 2), tensors(2))
    assert other.shutdown(cleanup=True).clean


@pytest.mark.parametrize(("operation", "skip"), [("rename", 0), ("sync_directory", 1)])
def test_a_session_that_could_not_be_made_again_leaves_nothing_and_is_made_the_next_time(
    root: Path, operation: str, skip: int
) -> None:
    files = FaultyFileSystem()
    with SnapshotStore(root, StoreOptions(durability="full"), file_system=files) as store:
        vanish(store, "session")
        files.fail(operation, errno.EIO, skip=skip)
        causes = [cause_of(store.save("request", token_count, tensors(1))) for token_count in range(3)]
        assert causes == [errno.ENOENT, errno.ENOENT, None], "it is made at the second time"
        assert_same(store.load("request", 2), tensors(1))
        assert [path.name for path in root.iterdir() if path.name.startswith(".new-")] == []


def test_a_root_that_lost_its_marker_is_not_filled_again(store: SnapshotStore, root: Path) -> None:
    """What is there now may be the empty place that a disk was mounted on. It is back when its root is."""
    aside = root.with_name("aside")
    root.rename(aside)
    root.mkdir()
    for token_count in range(3):
        assert cause_of(store.save("request", token_count, tensors(1))) == errno.ENOENT
    assert list(root.iterdir()) == [] and store.health().status == "degraded"
    root.rmdir()
    assert cause_of(store.save("request", 4, tensors(1))) == errno.ENOENT
    assert not root.exists()
    aside.rename(root)
    store.save("request", 5, tensors(5)).result(10)
    assert store.health().status == "ok"
    assert_same(store.load("request", 5), tensors(5))


def test_a_session_that_comes_back_while_it_is_made_again_keeps_its_snapshots(
    store: SnapshotStore, files: FaultyFileSystem, root: Path
) -> None:
    store.save("request", 1, tensors(1)).result(10)
    aside = root.with_name("aside")
    store.session.rename(aside)
    with files.pause("rename", ".new-") as gate:
        ticket = store.save("request", 2, tensors(2))
        assert cause_of(ticket) == errno.ENOENT
        gate.wait_reached()
        aside.rename(store.session)
    store.save("request", 3, tensors(3)).result(10)
    for token_count in (1, 3):
        assert_same(store.load("request", token_count), tensors(token_count))
    assert sessions_in(root) == [store.session], "the one that was made meanwhile is gone"


def test_a_store_whose_session_is_gone_shuts_down(root: Path) -> None:
    for cleanup in (False, True):
        store = SnapshotStore(root)
        store.save("request", 1, tensors(1)).result(10)
        shutil.rmtree(store.session)
        report = store.shutdown(cleanup=cleanup)
        assert report.clean and report.session_removed, report
    assert sessions_in(root) == []


# -- real full disks ----------------------------------------------------------------------------------------------

GOOD = {
    "kept": True,
    "temporaries": [],
    "health": ["degraded", "ok"],
    "warnings": 1,
    "after": 1,
    "warnings since": 0,
    "clean": True,
    "left": [],
}


def on_a_small_disk(tmp_path: Path, function: str, options: str = "size=512k") -> dict[str, Any]:
    """In a mount namespace of its own, so that nothing stays mounted, whatever happens."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"import sys; sys.path[:0] = [{str(TESTS)!r}]; import scenarios; scenarios.{function}({str(disk)!r})"
    )
    mount = f"mount -t tmpfs -o {options} tmpfs {disk} || exit 77"
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f'{mount}; exec "$0" -c "$1"', sys.executable, script],
        capture_output=True,
        check=False,
    )
    if done.returncode == 77 or b"unshare:" in done.stderr:
        pytest.skip("no small disk can be mounted here: " + done.stderr.decode().strip())
    assert done.returncode == 0, done.stderr.decode()
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def test_a_disk_that_fills_up_and_has_room_again(tmp_path: Path) -> None:
    seen = on_a_small_disk(tmp_path, "fills_a_small_disk")
    assert set(seen.pop("errors")) == {errno.ENOSPC}
    assert seen == GOOD


def test_a_disk_whose_inodes_run_out_and_come_back(tmp_path: Path) -> None:
    seen = on_a_small_disk(tmp_path, "runs_out_of_inodes", "size=64m,nr_inodes=100")
    assert set(seen.pop("errors")) == {errno.ENOSPC}
    assert seen == GOOD


def test_a_disk_that_stays_full(tmp_path: Path) -> None:
    seen = on_a_small_disk(tmp_path, "stays_full")
    assert seen["errors"] == [errno.ENOSPC] and 0 < seen["failed"] < 64
    assert seen["all settled"] and seen["stopped"]
    assert seen["reopened"] in ("opened", "ENOSPC") and seen["adopted"] is not False


def test_a_limit_on_the_size_of_files(processes: Processes, root: Path) -> None:
    seen = json.loads(processes.start("writes_within_a_limit", root=str(root)).says())
    assert set(seen.pop("errors")) == {errno.EFBIG}
    assert seen == GOOD


def test_a_process_that_runs_out_of_descriptors(processes: Processes, root: Path) -> None:
    seen = json.loads(processes.start("runs_out_of_descriptors", root=str(root)).says())
    assert set(seen.pop("errors")) == {errno.EMFILE}
    assert seen == GOOD


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")
def test_a_process_that_runs_out_of_memory(processes: Processes, root: Path) -> None:
    seen = json.loads(processes.start("runs_out_of_memory", root=str(root)).says())
    assert "Cannot allocate memory" in seen.pop("save") and "Cannot allocate memory" in seen.pop("load")
    assert seen == {
        "charged": [0, 0, 0],
        "small ones go on": True,
        "next": [True, True],
        "health": "ok",
        "clean": True,
    }


ON_THE_CALLER = [
    *("snapstore._saving.encode_metadata", "snapstore._saving.Content", "snapstore._saving.Offer"),
    *("snapstore._state.Life", "snapstore._room.Turn", "snapstore._state.SaveTicket", "snapstore._state.Job"),
    *("snapstore._memory.allocate", "snapstore._staging.HostImage"),
]
IN_THE_WRITER = [
    *("snapstore._filing.Checksums", "snapstore._filing.HeaderDraft", "snapstore._filing.write_all"),
    *("snapstore._paths.random_name", "snapstore._writer.SnapshotInfo"),
]


def no_memory(*args: object, **options: object) -> None:
    raise MemoryError("on purpose")


def assert_nothing_is_charged(store: SnapshotStore) -> None:
    stats = store.stats()
    assert (stats.pending, stats.pending_bytes, stats.in_flight) == (0, 0, 0)
    assert stats.accepted == stats.committed + stats.cancelled + stats.failed
    assert len(files_below(store.session)) == stats.live_snapshots


@pytest.mark.parametrize("allocation", ON_THE_CALLER)
def test_a_save_that_finds_no_memory_is_refused_and_the_next_one_works(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    store.save("request", 1, tensors(1, 100)).result(10)
    with monkeypatch.context() as patch:
        patch.setattr(allocation, no_memory)
        for request_id in ("request", "another")[allocation.endswith(".Life") :]:
            with pytest.raises(MemoryError):
                store.save(request_id, 1, tensors(2, 300_000))
    assert_nothing_is_charged(store)
    refused_or_failed = store.stats().live_requests - 1, store.stats().failed
    assert refused_or_failed in ((0, 0), (1, 2)) and not store.has("another", 1)
    assert_same(store.load("request", 1), tensors(1, 100))
    store.save("request", 1, tensors(3, 300_000)).result(10)
    assert_same(store.load("request", 1), tensors(3, 300_000))


@pytest.mark.parametrize("allocation", IN_THE_WRITER)
def test_a_writer_that_finds_no_memory_fails_that_save_with_its_cause(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    store.save("request", 1, tensors(1)).result(10)
    with monkeypatch.context() as patch:
        patch.setattr(allocation, no_memory)
        ticket = store.save("request", 1, tensors(2))
        error = ticket.exception(10)
        assert isinstance(error, SaveFailedError) and isinstance(error.__cause__, MemoryError)
        wait_until(lambda: store.stats().in_flight == 0)
    assert_nothing_is_charged(store)
    assert store.health().status == "degraded"
    assert_same(store.load("request", 1), tensors(1))
    store.save("request", 1, tensors(3)).result(10)
    assert store.health().status == "ok"


def test_a_load_that_finds_no_memory_says_so_and_the_next_one_works(
    store: SnapshotStore, files: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file, and from the memory of a save that is pending, which is let go all the same."""
    store.save("request", 1, tensors(1)).result(10)
    with files.pause("create", ".tmp") as gate:
        store.save("request", 2, tensors(2))
        gate.wait_reached()
        with monkeypatch.context() as patch:
            patch.setattr("snapstore._memory.BufferPool.lend", no_memory)
            for token_count in (1, 2):
                with pytest.raises(MemoryError):
                    store.load("request", token_count)
    assert store.flush(10)
    assert_nothing_is_charged(store)
    for token_count in (1, 2):
        assert_same(store.load("request", token_count), tensors(token_count))


# -- health -------------------------------------------------------------------------------------------------------

LONGEST_S = 0.005


def slowest_health_s(store: SnapshotStore, calls: int = 200) -> float:
    """The median call of the slowest tenth: one call may lose its processor to another process."""
    taken = []
    for _ in range(calls):
        started_s = time.perf_counter()
        store.health()
        taken.append(time.perf_counter() - started_s)
    return sorted(taken)[-calls // 20]


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("create", ".tmp"),
        ("write", ".tmp"),
        ("close", ".tmp"),
        ("make_directory", ".g"),
        ("rename", ".tmp"),
        ("free_bytes", ""),
    ],
)
def test_health_answers_at_once_and_says_what_is_stuck_in_a_write(
    root: Path, files: FaultyFileSystem, operation: str, path: str
) -> None:
    store = SnapshotStore(root, StoreOptions(stuck_after_s=0.1), file_system=files)
    with files.pause(operation, path) as gate:
        store.save("request", 1, tensors(1))
        gate.wait_reached()
        assert store.health().status == "ok"
        assert slowest_health_s(store) < LONGEST_S
        wait_until(lambda: store.health().status == "stuck")
        health = store.health()
        assert 0.1 < health.writing_s <= health.oldest_pending_s < 5
        assert "write has taken" in health.reasons[0]
        assert slowest_health_s(store) < LONGEST_S
    assert store.flush(10)
    assert store.health().status == "ok"
    assert store.shutdown(cleanup=True).clean


@pytest.mark.parametrize("operation", ["rename", "unlink", "remove_directory"])
def test_health_says_when_a_removal_is_stuck(root: Path, files: FaultyFileSystem, operation: str) -> None:
    store = SnapshotStore(root, StoreOptions(stuck_after_s=0.1), file_system=files)
    store.save("request", 1, tensors(1)).result(10)
    with files.pause(operation, ".trash") as gate:
        store.cleanup_request("request", timeout_s=0)
        gate.wait_reached()
        assert slowest_health_s(store) < LONGEST_S
        wait_until(lambda: store.health().status == "stuck")
        assert "removal has taken" in store.health().reasons[0]
        store.save("request", 2, tensors(1)).result(10)
    wait_until(lambda: store.health().status == "ok")
    assert store.shutdown(cleanup=True).clean


def test_health_answers_at_once_while_sixteen_threads_save(root: Path) -> None:
    store = SnapshotStore(root)
    over = threading.Event()

    def hammer(number: int) -> None:
        while not over.is_set():
            store.save(f"request-{number}", 1, tensors(1, 64)).result(10)

    with ThreadPoolExecutor(16) as pool:
        saving = [pool.submit(hammer, number) for number in range(16)]
        with state_of(store)._lock:  # noqa: SLF001 - as if somebody never let it go
            assert slowest_health_s(store) < LONGEST_S, "it takes no lock"
        over.set()
        for each in saving:
            each.result(10)
    assert store.shutdown(cleanup=True).clean


def test_health_tells_free_space_ages_and_the_end(root: Path, files: FaultyFileSystem) -> None:
    store = SnapshotStore(root, file_system=files)
    health = store.health()
    assert (health.status, health.reasons, health.writing_s, health.oldest_pending_s) == ("ok", (), 0.0, 0.0)
    assert health.free_bytes is not None and health.free_bytes > 0
    with files.pause("create", ".tmp") as gate:
        store.save("request", 1, tensors(1))
        gate.wait_reached()
        store.save("request", 2, tensors(1))
        wait_until(lambda: store.health().oldest_pending_s > 0.01)
    store.shutdown(cleanup=True)
    assert store.health().status == "dead" and "shut down" in store.health().reasons[-1]


# -- threads that die ---------------------------------------------------------------------------------------------


def die() -> None:
    raise SystemExit("a bug")


@pytest.mark.thread_dies
def test_a_writer_that_dies_is_started_once_more_with_its_queue(
    root: Path, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    store = SnapshotStore(root, file_system=files)
    gate = files.pause("create", ".tmp")
    files.call("create", die, ".tmp")
    victim = store.save("request", 1, tensors(1))
    gate.wait_reached()
    queued = [store.save("request", count, tensors(count)) for count in (2, 3, 4)]
    gate.open()
    assert isinstance(victim.exception(10), SaveFailedError)
    assert isinstance(victim.exception(0).__cause__, SystemExit)  # type: ignore[union-attr]
    for count, ticket in enumerate(queued, start=2):
        ticket.result(10)
        assert_same(store.load("request", count), tensors(count))
    assert store.stats().writer_restarts == store.health().writer_restarts == 1
    assert "writer thread died of SystemExit: a bug; it is started again" in caplog.text
    assert store.health().status == "ok"
    assert store.shutdown(cleanup=True).clean


@pytest.mark.thread_dies
def test_a_writer_that_dies_twice_is_dead_and_says_so(root: Path, files: FaultyFileSystem) -> None:
    store = SnapshotStore(root, file_system=files)
    store.save("kept", 1, tensors(1)).result(10)
    gate = files.pause("create", ".tmp", skip=1)
    files.call("create", die, ".tmp", times=math.inf)
    tickets = [store.save("request", count, tensors(count)) for count in range(4)]
    gate.open()
    for ticket in tickets:
        assert isinstance(ticket.exception(10), SaveFailedError)
        assert ticket.state is SaveState.FAILED
    wait_until(lambda: store.health().status == "dead")
    assert any("SystemExit: a bug" in reason for reason in store.health().reasons)
    with pytest.raises(StoreClosedError, match="writer thread died"):
        store.save("late", 1, tensors(1))
    assert_same(store.load("kept", 1), tensors(1))
    assert store.stats().pending == 0 and store.stats().pending_bytes == 0
    report = store.shutdown(cleanup=True)
    assert report.writer_stopped and report.session_removed
    assert any("writer thread died of SystemExit" in error for error in report.errors)
    assert sessions_in(root) == []


@pytest.mark.thread_dies
def test_a_sweeper_that_dies_is_started_once_more_and_the_session_keeps_its_owner(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    for number in range(4):
        store.save(f"request-{number}", 1, tensors(1)).result(10)
    files.call("rename", die, ".trash")
    assert store.cleanup_request("request-0", timeout_s=10).clean, (
        "what it had in hand is done after its restart"
    )
    files.call("rename", die, ".trash")
    assert not store.cleanup_request("request-1", timeout_s=10).clean
    other = SnapshotStore(root)
    let_sweeper_finish(other)
    assert_same(store.load("request-2", 1), tensors(1))
    other.shutdown(cleanup=True)
    assert store.health().status == "degraded"
    report = store.shutdown(cleanup=True, timeout_s=1)
    assert any("sweeper thread died" in error for error in report.errors) and not report.session_removed
    store = SnapshotStore(root)
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown(cleanup=True).clean
