"""Roots and sessions that somebody outside moves away and back between two operations, and errors that lie.

A network file system may repeat what it had no answer to, and then say that it failed: it is done all the same.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import roots
from actions import let_sweeper_finish, sessions_in, wait_until
from helpers import assert_same, files_below, tensors
from processes import Processes
from pruning import prune

from snapstore import SaveFailedError, SnapshotStore, StoreOptions, _paths
from snapstore.blocks import BlockStore
from snapstore.testing import FaultyFileSystem

ADOPT = StoreOptions(leftovers="adopt")
FULL = StoreOptions(durability="full")


def saved(store: SnapshotStore, request_id: str = "request", token_count: int = 1, seed: int = 1) -> None:
    store.save(request_id, token_count, tensors(seed)).result(10)


def assert_adoptable(root: Path) -> None:
    store = SnapshotStore(root, ADOPT)
    assert_same(store.load("request", 1), tensors(1))
    assert store.shutdown(cleanup=True).clean


def make_again(store: SnapshotStore) -> None:
    """Have a save find out that the session is gone."""
    with pytest.raises(SaveFailedError):
        saved(store, "finds out")
    wait_until((store.session / ".trash").exists)


def die_with_snapshots(processes: Processes, root: Path) -> Path:
    child = processes.start("dies_with_snapshots", root=str(root), request_ids=["a", "b"])
    _, name = child.says().split()
    assert child.wait() == 0
    return root / name


class Aside:
    """A place to which a directory is moved, and from where it comes back."""

    def __init__(self, path: Path, place: Path) -> None:
        self._path = path
        self._place = place
        path.rename(place)

    def come_back(self) -> None:
        """Also in place of what was made there meanwhile."""
        if self._path.exists():
            shutil.rmtree(self._path)
        self._place.rename(self._path)


@pytest.fixture
def place(root: Path) -> Path:
    return root.with_name("aside")


# -- the end of a session -----------------------------------------------------------------------------------------


def test_a_root_that_comes_back_while_its_store_is_shut_down_keeps_its_snapshots(
    root: Path, files: FaultyFileSystem, place: Path
) -> None:
    """The store has just looked, and nothing was left of its session."""
    store = SnapshotStore(root, file_system=files)
    saved(store)
    aside = Aside(root, place)
    files.call("rename", aside.come_back, ".dead-")
    store.shutdown()
    if place.exists():
        aside.come_back()
    assert_adoptable(root)


def test_a_session_that_comes_back_in_place_of_an_empty_one_is_not_removed_for_it(
    root: Path, files: FaultyFileSystem, place: Path
) -> None:
    store = SnapshotStore(root, file_system=files)
    saved(store)
    aside = Aside(store.session, place)
    make_again(store)
    let_sweeper_finish(store)
    files.call("rename", aside.come_back, ".dead-")
    assert not store.shutdown().session_removed
    assert_adoptable(root)


def test_a_request_that_is_cleaned_up_while_the_root_is_away_does_not_come_back_with_it(
    root: Path, store: SnapshotStore, place: Path
) -> None:
    saved(store)
    aside = Aside(root, place)
    clean = store.cleanup_request("request").clean
    aside.come_back()
    assert clean or store.cleanup_request("request").clean
    let_sweeper_finish(store)
    assert files_below(store.session) == []


def test_a_session_that_is_away_is_not_said_to_be_removed(root: Path, place: Path) -> None:
    for cleanup in (True, False):
        store = SnapshotStore(root)
        saved(store)
        aside = Aside(root, place)
        report = store.shutdown(cleanup=cleanup)
        assert not report.session_removed and report.clean is not cleanup
        aside.come_back()
        assert store.session.exists()


def test_an_empty_session_that_is_moved_away_while_it_is_removed_is_not_said_to_be_removed(
    root: Path, files: FaultyFileSystem
) -> None:
    store = SnapshotStore(root, file_system=files)
    files.call("rename", lambda: store.session.rename(root.parent / "moved"), ".dead-")
    report = store.shutdown()
    assert not report.session_removed and len(report.errors) == 1
    assert (root.parent / "moved").exists()


# -- a session that is made again ---------------------------------------------------------------------------------


def test_a_session_that_comes_back_after_another_was_made_for_it_is_still_owned(
    root: Path, store: SnapshotStore, place: Path
) -> None:
    saved(store)
    aside = Aside(store.session, place)
    make_again(store)
    saved(store, "other")
    aside.come_back()
    second = SnapshotStore(root)
    let_sweeper_finish(second)
    assert_same(store.load("request", 1), tensors(1))
    assert second.shutdown(cleanup=True).clean


def test_a_session_that_was_restored_under_a_live_store_is_owned(
    root: Path, store: SnapshotStore, place: Path
) -> None:
    """Its lock file is a copy, on which nobody has a lock, until a save finds that out."""
    saved(store)
    shutil.copytree(store.session, place)
    Aside(store.session, root.with_name("original"))
    place.rename(store.session)
    with pytest.raises(SaveFailedError):
        saved(store, "finds out")
    saved(store, "other")
    second = SnapshotStore(root)
    let_sweeper_finish(second)
    for request_id in ("request", "other"):
        assert_same(store.load(request_id, 1), tensors(1))
    assert second.shutdown(cleanup=True).clean


@pytest.mark.parametrize("original", ["moved", "removed"])
def test_a_request_that_is_cleaned_up_after_its_session_was_restored_is_gone_from_that_too(
    root: Path, store: SnapshotStore, place: Path, original: str
) -> None:
    """Also with the first one still open, and no save since that could have found out."""
    saved(store)
    shutil.copytree(store.session, place)
    if original == "moved":
        store.session.rename(root.with_name("original"))
    else:
        shutil.rmtree(store.session)
    place.rename(store.session)
    assert_same(store.load("request", 1), tensors(1))
    assert store.cleanup_request("request").clean
    let_sweeper_finish(store)
    assert files_below(store.session) == []
    with pytest.raises(SaveFailedError):
        saved(store, "finds out")
    saved(store)
    second = SnapshotStore(root)
    let_sweeper_finish(second)
    assert_same(store.load("request", 1), tensors(1))
    assert second.shutdown(cleanup=True).clean


def test_of_sessions_that_are_made_again_and_again_no_descriptor_is_kept(store: SnapshotStore) -> None:
    def opened() -> int:
        let_sweeper_finish(store)
        return len(list(Path("/dev/fd").iterdir()))

    saved(store)
    before = opened()
    for _ in range(5):
        shutil.rmtree(store.session)
        make_again(store)
    wait_until(lambda: opened() == before)


def test_a_session_whose_making_could_not_be_synced_leaves_the_one_that_came_back(
    root: Path, files: FaultyFileSystem, place: Path
) -> None:
    store = SnapshotStore(root, FULL, file_system=files)
    saved(store)
    aside = Aside(store.session, place)

    def fail() -> None:
        aside.come_back()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.call("sync_directory", fail, skip=1)
    with pytest.raises(SaveFailedError):
        saved(store, "finds out")
    wait_until(lambda: not place.exists())
    saved(store, "other")
    assert_same(store.load("request", 1), tensors(1))
    assert store.shutdown(cleanup=True).clean


def test_a_session_that_was_made_again_is_owned_also_where_its_rename_lied(
    root: Path, store: SnapshotStore, files: FaultyFileSystem
) -> None:
    shutil.rmtree(store.session)
    files.fail("rename", errno.ENOENT, ".new-", when="after")
    make_again(store)
    saved(store)
    second = SnapshotStore(root)
    let_sweeper_finish(second)
    assert_same(store.load("request", 1), tensors(1))
    assert second.shutdown(cleanup=True).clean


# -- sessions of others -------------------------------------------------------------------------------------------


def test_a_session_that_is_just_being_made_is_not_emptied_by_a_reclaimer(root: Path) -> None:
    """It is empty and not locked yet, the disk fails to remove it, and then it is found without a lock."""
    assert SnapshotStore(root).shutdown().clean
    maker, reclaimer = FaultyFileSystem(), FaultyFileSystem()
    with ThreadPoolExecutor(1) as pool, maker.pause("make_directory", ".new-", when="after") as made:
        making = pool.submit(SnapshotStore, root, file_system=maker)
        made.wait_reached()

        def let_it_be_made() -> None:
            made.open()
            saved(making.result(10))

        reclaimer.fail("remove_directory", errno.EIO, ".new-")
        reclaimer.call("names", let_it_be_made, ".new-")
        second = SnapshotStore(root, file_system=reclaimer)
        let_sweeper_finish(second)
        made.open()
        store = making.result(10)
    saved(store, "other")
    if reclaimer.count("names", ".new-"):
        assert_same(store.load("request", 1), tensors(1))
    assert (store.session / "owner.lock").exists()
    for each in (second, store):
        assert each.shutdown(cleanup=True).clean


def swapped(dead: Path, place: Path) -> Callable[[], None]:
    """Put what was restored from a backup in place of a session."""
    restored = place.with_name("restored")
    shutil.copytree(dead, restored)

    def swap() -> None:
        dead.rename(place)
        restored.rename(dead)

    return swap


def test_a_session_that_was_restored_just_before_it_is_reclaimed_stays(
    root: Path, files: FaultyFileSystem, processes: Processes, place: Path
) -> None:
    dead = die_with_snapshots(processes, root)
    before = files_below(dead)
    files.call("rename", swapped(dead, place), dead.name)
    store = SnapshotStore(root, file_system=files)
    let_sweeper_finish(store)
    assert files_below(dead) == before and sessions_in(root) == sorted([dead, store.session])
    assert store.shutdown(cleanup=True).clean


def test_a_session_that_was_restored_just_before_it_is_pruned_stays(
    root: Path, files: FaultyFileSystem, place: Path
) -> None:
    roots.killed(root)
    (dead,) = (each for each in root.iterdir() if _paths.is_session_name(each.name))
    before = files_below(dead)
    files.call("rename", swapped(dead, place), dead.name)
    assert prune(root, files).sessions == 0
    assert files_below(dead) == before


@pytest.mark.parametrize("number", [errno.EPERM, errno.EIO], ids=errno.errorcode.get)
def test_a_save_that_prune_moved_aside_is_put_back_where_there_are_no_hard_links(
    root: Path, store: SnapshotStore, number: int
) -> None:
    saved(store)
    pruning = FaultyFileSystem()
    pruning.call("rename", lambda: saved(store, seed=2), ".safetensors")
    pruning.fail("link", number)
    assert prune(root, pruning, older_than_s=0, include_live=True).changed == 1
    assert_same(store.load("request", 1), tensors(2))
    assert len(files_below(store.session)) == 1


def test_what_prune_moved_aside_and_can_not_look_at_is_put_back(root: Path, store: SnapshotStore) -> None:
    saved(store)
    pruning = FaultyFileSystem()
    pruning.call("rename", lambda: saved(store, seed=2), ".safetensors")
    pruning.fail("status_at", errno.EIO, ".trash/")
    assert len(prune(root, pruning, older_than_s=0, include_live=True).errors) == 1
    assert_same(store.load("request", 1), tensors(2))
    assert len(files_below(store.session)) == 1


# -- errors that lie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["none", "full"])
def test_a_save_whose_rename_lied_is_committed(root: Path, files: FaultyFileSystem, durability: Any) -> None:
    """Else the earlier one would be named, and the later one be given."""
    store = SnapshotStore(root, StoreOptions(durability=durability), file_system=files)
    saved(store)
    files.fail("rename", errno.EIO, ".tmp", when="after")
    saved(store, seed=2)
    assert_same(store.load("request", 1), tensors(2))
    assert len(files_below(store.session)) == 1
    assert store.shutdown(cleanup=True).clean


@pytest.mark.parametrize("durability", ["none", "full"])
def test_a_save_whose_rename_failed_is_not_taken_for_the_one_that_it_was_to_replace(
    root: Path, files: FaultyFileSystem, durability: Any
) -> None:
    store = SnapshotStore(root, StoreOptions(durability=durability), file_system=files)
    saved(store)
    files.fail("rename", errno.EIO, ".tmp")
    with pytest.raises(SaveFailedError):
        saved(store, seed=2)
    assert_same(store.load("request", 1), tensors(1))
    assert store.shutdown(cleanup=True).clean


def test_a_link_that_lied_leaves_nothing(root: Path, files: FaultyFileSystem) -> None:
    store = SnapshotStore(root, FULL, file_system=files)
    saved(store)
    files.fail("link", errno.EIO, when="after")
    with pytest.raises(SaveFailedError):
        saved(store, seed=2)
    assert len(files_below(store.session)) == 1
    assert store.shutdown(cleanup=True).clean


def test_what_would_be_taken_back_is_left_if_it_is_another_by_then(
    root: Path, files: FaultyFileSystem, place: Path
) -> None:
    """A save into the session that was made again can not be synced, since the first one comes back."""
    store = SnapshotStore(root, FULL, file_system=files)
    saved(store)
    aside = Aside(store.session, place)
    make_again(store)

    def fail() -> None:
        aside.come_back()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.call("sync_directory", fail, ".g")
    with pytest.raises(SaveFailedError):
        saved(store, seed=2)
    assert_same(store.load("request", 1), tensors(1))
    assert store.shutdown(cleanup=True).clean


def test_what_was_moved_to_the_trash_by_a_rename_that_lied_is_removed(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    saved(store)
    files.fail("rename", errno.EIO, ".trash", when="after")
    assert store.cleanup_request("request").clean
    let_sweeper_finish(store)
    assert files_below(store.session) == []


def test_what_was_adopted_by_a_rename_that_lied_is_known(
    root: Path, files: FaultyFileSystem, processes: Processes
) -> None:
    """Else no cleanup would remove it, and the start after would adopt it."""
    die_with_snapshots(processes, root)
    files.fail("rename", errno.EIO, ".g", when="after")
    store = SnapshotStore(root, ADOPT, file_system=files)
    assert len(files_below(store.session)) == store.stats().live_snapshots > 1
    assert store.shutdown(cleanup=True).clean


@pytest.mark.parametrize("across", [False, True])
def test_a_detach_whose_last_operation_lied_is_done(
    root: Path, store: SnapshotStore, files: FaultyFileSystem, across: bool
) -> None:
    """``across`` file systems, where it is a copy."""
    saved(store)
    if across:
        files.fail("rename", errno.EXDEV, ".safetensors")
        files.fail("unlink", errno.EIO, ".safetensors", when="after")
    else:
        files.fail("rename", errno.EIO, ".safetensors", when="after")
    out = store.detach("request", 1, root.with_name("out"))
    assert out.exists() and not store.has("request", 1) and files_below(store.session) == []


def test_a_detach_that_can_not_remove_what_it_copied_takes_the_copy_back(
    root: Path, store: SnapshotStore, files: FaultyFileSystem
) -> None:
    saved(store)
    files.fail("rename", errno.EXDEV, ".safetensors")
    files.fail("unlink", errno.EIO, ".safetensors")
    out = root.with_name("out")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        store.detach("request", 1, out)
    assert not out.exists()
    assert_same(store.load("request", 1), tensors(1))


@pytest.mark.parametrize("across", [False, True])
def test_a_detach_that_fails_leaves_what_somebody_else_put_in_its_place(
    root: Path, files: FaultyFileSystem, across: bool
) -> None:
    store = SnapshotStore(root, FULL, file_system=files)
    saved(store)
    out, theirs = root.with_name("out"), root.with_name("theirs")
    theirs.write_bytes(b"theirs")
    if across:
        files.fail("rename", errno.EXDEV, ".safetensors")

    def fail() -> None:
        theirs.rename(out)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.call("sync_directory", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        store.detach("request", 1, out)
    assert out.read_bytes() == b"theirs"
    assert store.shutdown(cleanup=True).clean


def test_a_block_whose_unlink_lied_is_gone(root: Path, files: FaultyFileSystem) -> None:
    with BlockStore(root, file_system=files) as blocks:
        ticket = blocks.put("key", b"block")
        assert ticket is not None and ticket.result(10)
        files.fail("unlink", errno.EIO, ".safetensors", when="after")
        assert blocks.discard("key")
        assert not blocks.has("key")
