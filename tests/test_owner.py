"""Owners of sessions: a lock that the kernel drops at any death and no forked child keeps, a record that only tells."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from actions import BEFORE, everything_in, sessions_in, wait_until
from processes import Processes

from snapstore import SnapshotStore, StoreOptions
from snapstore._files import FileSystem
from snapstore._owner import OwnerLock, OwnerRecord, liveness, read_record

FILES = FileSystem()
ADOPT = StoreOptions(leftovers="adopt")


def take(directory: Path) -> OwnerLock | None:
    return OwnerLock.take(FILES, str(directory), create=True)


def liveness_of(session: Path) -> str:
    return liveness(FILES, str(session), read_record(FILES, str(session)))


# -- the lock -----------------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_at_a_time_in_one_process_too(tmp_path: Path) -> None:
    first = take(tmp_path)
    assert first is not None and take(tmp_path) is None
    first.release()
    first.release()
    second = take(tmp_path)
    assert second is not None
    second.release()


def test_a_lock_on_a_file_that_is_not_there_any_more_is_none(tmp_path: Path) -> None:
    class Removing(FileSystem):
        def lock(self, fd: int) -> bool:
            (tmp_path / "owner.lock").unlink()
            return super().lock(fd)

    assert OwnerLock.take(Removing(), str(tmp_path), create=True) is None


def test_a_lock_on_a_file_that_was_replaced_is_none(tmp_path: Path) -> None:
    class Replacing(FileSystem):
        def lock(self, fd: int) -> bool:
            (tmp_path / "owner.lock").unlink()
            (tmp_path / "owner.lock").touch()
            return super().lock(fd)

    assert OwnerLock.take(Replacing(), str(tmp_path), create=True) is None


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "owner.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        take(tmp_path)


def test_a_program_that_is_started_does_not_inherit_the_lock(root: Path) -> None:
    store = SnapshotStore(root)
    save = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    with subprocess.Popen(save, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as program:
        assert program.stdout is not None and program.stdout.readline() == b"up\n"
        store.save("a", 1, {}).result(10)
        store.shutdown()
        assert liveness_of(store.session) == "dead"
        program.communicate()


# -- the record ---------------------------------------------------------------------------------------------------


def test_a_record_tells_process_host_boot_and_start(tmp_path: Path) -> None:
    record = OwnerRecord.of_this_process(1.5)
    assert record.pid == os.getpid() and record.host == socket.gethostname() and record.same_machine
    if sys.platform == "linux":
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        assert record.start_time == fields[19] and len(record.boot_id) == 36
    assert OwnerRecord.from_json(record.to_json()) == record


WRONG_PID = b'{"pid": "one", "host": "", "boot_id": "", "start_time": "", "opened_at_s": 0}'


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"1", b'{"pid": 1}', b"\xff", b"[" * 5000, WRONG_PID],
)
def test_what_is_no_record_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "owner.json").write_bytes(text)
    assert read_record(FILES, str(tmp_path)) is None


def test_a_record_of_no_known_boot_is_of_this_machine_by_its_host_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two machines that tell no boot are not one machine."""
    monkeypatch.setattr("snapstore._owner._boot_id", lambda: "")
    assert OwnerRecord.of_this_process(0.0).same_machine
    assert not OwnerRecord(1, "another", "", "", 0.0).same_machine


def test_liveness_is_alive_dead_or_unknown(root: Path) -> None:
    store = SnapshotStore(root, StoreOptions(leftovers="keep"))
    store.save("a", 1, {}).result(10)
    assert liveness_of(store.session) == "alive"
    store.shutdown()
    assert liveness_of(store.session) == "dead"
    assert (store.session / "owner.lock").exists(), "a look removes nothing"
    (store.session / "owner.json").write_text("{")
    assert liveness_of(store.session) == "unknown"


# -- forks --------------------------------------------------------------------------------------------------------


def test_a_store_used_in_a_forked_child_says_so(processes: Processes, root: Path) -> None:
    child = processes.start("forks_while_it_holds", root=str(root))
    said = {child.says(), child.says()}
    (forked,) = (line for line in said if line.startswith("forked "))
    refusals = json.loads(forked.removeprefix("forked "))
    assert refusals.pop("health") == "dead"
    assert set(refusals.values()) == {"StoreClosedError"}, refusals


@pytest.mark.parametrize(
    "scenario",
    ["forks_while_it_holds", "forks_while_a_lock_is_opened", "forks_while_a_lock_is_given_up"],
)
def test_a_forked_child_does_not_keep_its_parents_session_alive(
    processes: Processes, root: Path, scenario: str
) -> None:
    """The parent is gone and its child lives; the descriptor is closed there, also one that nobody knew at the fork."""
    child = processes.start(scenario, root=str(root))
    said = {child.says(), child.says()}
    (name,) = (line for line in said if not line.startswith("forked"))
    child.kill()
    assert liveness_of(root / name) == "dead"
    store = SnapshotStore(root, ADOPT)
    assert store.stats().live_snapshots == (len(BEFORE) if scenario == "forks_while_it_holds" else 1)
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown(cleanup=True).clean


def test_a_fork_does_not_wait_for_a_disk_that_hangs(processes: Processes, root: Path) -> None:
    """And its child can open stores of its own, though a lock of this package was held at the fork."""
    child = processes.start("forks_while_a_disk_hangs", root=str(root))
    assert child.says() == "took True 7"


def test_a_forked_child_does_not_end_its_parents_session(processes: Processes, root: Path) -> None:
    """Nor does it give up the lock: while the parent lives, the session is its own, whatever its children do."""
    child = processes.start("forks_while_it_holds", root=str(root))
    said = {child.says(), child.says()}
    (name,) = (line for line in said if not line.startswith("forked"))
    assert liveness_of(root / name) == "alive"
    child.kill()


def test_a_forked_child_that_ends_says_nothing_of_its_parents_saves(processes: Processes, root: Path) -> None:
    child = processes.start("forks_with_a_pinned_writer", root=str(root))
    assert child.all_it_said() == ["child 0 2"]


def test_forks_in_the_middle_of_saves_disturb_nobody(processes: Processes, root: Path) -> None:
    child = processes.start("forks_in_the_middle", root=str(root))
    assert [child.says() for _ in range(6)] == ["child 0"] * 6
    assert child.says() == "parent True"
    assert child.says() == "status ok"
    assert child.wait() == 0
    store = SnapshotStore(root, ADOPT)
    assert everything_in(store, {("a", number) for number in range(6)}) == {
        ("a", number): number for number in range(6)
    }
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown(cleanup=True).clean
