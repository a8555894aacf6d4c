"""Ways below a root: through no link, from directories that are held open, each closed once and never too early."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from actions import let_sweeper_finish, wait_until
from helpers import assert_same, tensors
from scenarios import cause_of

from snapstore import SnapshotStore
from snapstore._files import FileSystem, opened
from snapstore.testing import FaultyFileSystem, MemoryFileSystem


@pytest.fixture
def disk(tmp_path: Path) -> FileSystem:
    """Guards ``tmp_path``, in which there is ``a/b``."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    files = FileSystem()
    files.ways.guard(str(tmp_path))
    return files


def open_below(path: Path) -> set[str]:
    """What of a directory this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        if target.startswith(str(path)):
            found.add(target.removeprefix(str(path)))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc here")


@pytest.mark.parametrize("held", [(), ("a",), ("a/b",), ("a", "a/b")])
def test_a_name_is_the_same_file_from_wherever_the_way_begins(
    disk: FileSystem, tmp_path: Path, held: tuple[str, ...]
) -> None:
    for each in held:
        disk.hold(f"{tmp_path}/{each}")
    path = f"{tmp_path}/a/b/file"
    os.close(disk.create(path))
    disk.rename(path, f"{tmp_path}/a/file")
    assert (tmp_path / "a" / "file").exists() and not (tmp_path / "a" / "b" / "file").exists()
    for each in held:
        disk.ways.let_go(f"{tmp_path}/{each}")


@pytest.mark.parametrize("held", [False, True])
def test_no_way_goes_through_a_link(disk: FileSystem, tmp_path: Path, held: bool) -> None:
    if held:
        disk.hold(f"{tmp_path}/a")
    (tmp_path / "a" / "b").rmdir()
    outside = tmp_path.with_name(tmp_path.name + ".outside")
    outside.mkdir()
    (tmp_path / "a" / "b").symlink_to(outside)
    with pytest.raises(OSError, match="file") as raised:
        disk.create(f"{tmp_path}/a/b/file")
    assert raised.value.errno in (errno.ENOTDIR, errno.ELOOP)
    assert raised.value.filename == f"{tmp_path}/a/b/file", "the whole path"
    assert list(outside.iterdir()) == []
    disk.ways.let_go(f"{tmp_path}/a")


@pytest.mark.parametrize("last", ["a/b", "a/b/file"])
def test_a_link_at_the_place_of_what_is_held_leads_nobody_out(
    disk: FileSystem, tmp_path: Path, last: str
) -> None:
    disk.hold(f"{tmp_path}/a/b")
    (tmp_path / "a" / "b").rename(tmp_path / "moved")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "a" / "b").symlink_to(outside)
    with pytest.raises(FileNotFoundError):
        disk.look_for(f"{tmp_path}/a/b")
    os.close(disk.create(f"{tmp_path}/a/b/file"))
    assert (tmp_path / "moved" / "file").exists() and list(outside.iterdir()) == []
    disk.ways.let_go(f"{tmp_path}/a/b")


def test_what_is_looked_for_is_that_directory_and_no_other(disk: FileSystem, tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    path = str(directory)
    disk.look_for(path)
    disk.hold(path)
    disk.look_for(path)
    directory.rename(tmp_path / "kept")  # with its inode, or the next one may get the same
    with pytest.raises(FileNotFoundError):
        disk.look_for(path)
    directory.mkdir()
    with pytest.raises(FileNotFoundError, match="another directory"):
        disk.look_for(path)
    disk.hold(path)
    disk.look_for(path)
    disk.ways.let_go(path)


def test_what_is_read_is_what_stands_under_the_path_now(disk: FileSystem, tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    disk.hold(str(directory))
    directory.rename(tmp_path / "moved")
    directory.mkdir()
    (directory / "file").write_text("this one")
    with opened(disk, disk.open_read(f"{directory}/file")) as fd:
        assert os.read(fd, 100) == b"this one"
    disk.ways.let_go(str(directory))


def test_what_is_not_there_can_not_be_held(disk: FileSystem, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        disk.hold(f"{tmp_path}/a/none")
    assert raised.value.filename == f"{tmp_path}/a/none"
    disk.ways.let_go(f"{tmp_path}/a/none")


@needs_proc
def test_a_directory_is_closed_when_the_last_way_from_it_has_ended(disk: FileSystem, tmp_path: Path) -> None:
    path = f"{tmp_path}/a"
    disk.hold(path)
    with disk.ways.to(f"{path}/file") as (name, fd):
        disk.ways.let_go(path)
        assert open_below(tmp_path) == {"/a"}, "somebody is on the way"
        assert fd is not None
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    assert open_below(tmp_path) == set()
    assert (tmp_path / "a" / "file").exists()


@needs_proc
def test_to_hold_again_is_to_hold_what_is_there_now(disk: FileSystem, tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    path = str(directory)
    disk.hold(path)
    directory.rename(tmp_path / "moved")
    directory.mkdir()
    disk.hold(path)
    assert open_below(tmp_path) == {"/a/b"}
    disk.ways.let_go(path)
    disk.ways.let_go(path)
    assert open_below(tmp_path) == set()


@needs_proc
def test_a_store_holds_three_directories_until_its_end(root: Path) -> None:
    store = SnapshotStore(root)
    name = "/" + store.session.name
    held = {name, f"{name}/.tmp", f"{name}/.trash", f"{name}/owner.lock"}
    for token_count in range(8):
        store.save("request", token_count, tensors(1)).result(10)
        store.load("request", token_count)
    assert store.cleanup_request("request").clean
    wait_until(lambda: open_below(root) == held)  # the sweeper frees what was forgotten
    assert store.shutdown().clean
    assert open_below(root) == set()


@needs_proc
def test_a_forked_child_keeps_nothing_of_a_store_open(root: Path) -> None:
    """Beside stores whose descriptors are none of the process, which it can not close."""
    beside = [SnapshotStore("/root", file_system=MemoryFileSystem()) for _ in range(8)]
    store = SnapshotStore(root)
    let_sweeper_finish(store)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, repr(sorted(open_below(root))).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 4096) == b"[]"
    os.close(reader)
    os.close(writer)
    store.save("request", 1, tensors(1)).result(10)
    assert_same(store.load("request", 1), tensors(1))
    assert all(each.shutdown(cleanup=True).clean for each in [*beside, store])


def test_nothing_is_written_into_a_session_that_was_moved_away(root: Path) -> None:
    """What it would write is in no root, and its path would be no file's."""
    with SnapshotStore(root) as store:
        store.save("request", 1, tensors(1)).result(10)
        aside = root.with_name("aside")
        store.session.rename(aside)
        before = sorted(aside.rglob("*"))
        assert cause_of(store.save("request", 2, tensors(2))) == errno.ENOENT
        assert sorted(aside.rglob("*")) == before
        shutil.rmtree(aside)


def test_nothing_is_named_in_a_session_that_is_moved_away_while_it_is_written(
    root: Path, files: FaultyFileSystem
) -> None:
    with SnapshotStore(root, file_system=files) as store:
        store.save("request", 1, tensors(1)).result(10)
        aside = root.with_name("aside")
        files.call("write", lambda: store.session.rename(aside), ".tmp")
        assert cause_of(store.save("request", 2, tensors(2))) == errno.ENOENT
        assert [path.name for path in aside.rglob("*.safetensors")] == ["1.safetensors"]
        shutil.rmtree(aside)


def test_a_root_that_is_a_link_by_now_is_none(root: Path) -> None:
    with SnapshotStore(root) as store:
        root.rename(root.with_name("elsewhere"))
        root.symlink_to("elsewhere")
        assert cause_of(store.save("request", 1, tensors(1))) == errno.ENOTDIR
        root.unlink()
        root.with_name("elsewhere").rename(root)
        store.save("request", 1, tensors(1)).result(10)
        assert_same(store.load("request", 1), tensors(1))


def test_a_working_directory_that_a_network_file_system_lost_is_made_again(
    root: Path, files: FaultyFileSystem
) -> None:
    with SnapshotStore(root, file_system=files) as store:
        shutil.rmtree(store.session / ".tmp")
        files.fail("create", errno.ESTALE, ".tmp")
        assert cause_of(store.save("request", 1, tensors(1))) == errno.ESTALE
        store.save("request", 2, tensors(2)).result(10)
        assert_same(store.load("request", 2), tensors(2))


@needs_proc
def test_an_interruption_on_the_way_closes_nothing_twice(
    disk: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C strikes right after a close: by then another thread may have opened a file of that number."""
    close, closed = os.close, []

    def interrupted(fd: int) -> None:
        close(fd)
        closed.append(fd)
        if len(closed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        disk.status_at(f"{tmp_path}/a/b/file")
    monkeypatch.undo()
    assert len(closed) == 2, "the root, and the directory that was opened from it"
    assert open_below(tmp_path) == set()


def test_a_store_that_can_hold_no_directory_walks(root: Path, files: FaultyFileSystem) -> None:
    files.fail("hold", errno.EMFILE, times=float("inf"))
    with SnapshotStore(root, file_system=files) as store:
        store.save("request", 1, tensors(1)).result(10)
        assert_same(store.load("request", 1), tensors(1))
        assert store.cleanup_request("request").clean
