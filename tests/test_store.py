"""What a scheduler relies on: saved as given, loaded as saved, each wrong answer a different error."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same, files_below, tensors

import snapstore
from snapstore import (
    SaveFailedError,
    SaveState,
    SnapshotCorruptError,
    SnapshotInfo,
    SnapshotKey,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreOptions,
    UnsupportedTensorError,
)
from snapstore.testing import FaultyFileSystem


def nothing_was_reserved(store: SnapshotStore) -> bool:
    stats = store.stats()
    return (stats.accepted, stats.pending, stats.live_requests) == (0, 0, 0)


class Boundary(int):
    """An int that is written in another way, as members of an ``IntEnum`` or of ``int, Enum`` are."""

    def __format__(self, how: str) -> str:
        return "../prefill"

    __str__ = __repr__ = lambda self: "prefill"


class Name(str):
    """A str that is a key of its own in every dict."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


# -- save and load --------------------------------------------------------------------------------------------------


def test_a_snapshot_is_readable_from_memory_while_pending_and_from_disk_after(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("create", ".tmp") as gate:
        ticket = store.save("request", 64, tensors(1), metadata={"layer": 3})
        gate.wait_reached()
        assert ticket.state is SaveState.WRITING and not ticket.done()
        pending = store.load("request", 64)
    info = ticket.result(10)
    committed = store.load("request", 64)
    for snapshot, source in ((pending, "memory"), (committed, "disk")):
        assert (snapshot.key, snapshot.source) == (SnapshotKey("request", 64), source)
        assert snapshot.metadata == {"layer": 3}
        assert_same(snapshot, tensors(1))
    assert info == SnapshotInfo(SnapshotKey("request", 64), ticket.generation, info.path, ticket.nbytes)
    assert ticket.nbytes == sum(tensor.nbytes for tensor in tensors(1).values())


def test_the_caller_may_overwrite_the_tensors_when_save_returns(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("create", ".tmp"):
        value = tensors(1)
        ticket = store.save("request", 1, value)
        assert ticket.released
        for tensor in value.values():
            tensor.fill(0)
        assert_same(store.load("request", 1), tensors(1))
    ticket.result(10)
    assert_same(store.load("request", 1), tensors(1))


def test_borrowed_tensors_are_read_until_released_and_not_after(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    value = tensors(1)
    with files.pause("create", ".tmp") as gate:
        ticket = store.save("request", 1, value, borrow=True)
        gate.wait_reached()
        assert not ticket.released and not ticket.wait_released(0.01)
        assert not store.drain_request("request", timeout_s=0.01)
    assert ticket.wait_released(10) and store.drain_request("request", timeout_s=0)
    for tensor in value.values():
        tensor.fill(0)
    ticket.result(10)
    assert_same(store.load("request", 1), tensors(1))


def test_a_cancelled_borrow_is_released_at_once(store: SnapshotStore, files: FaultyFileSystem) -> None:
    with files.pause("create", ".tmp") as gate:
        store.save("pinned", 1, tensors(1))
        gate.wait_reached()
        ticket = store.save("request", 1, tensors(2), borrow=True)
        store.cleanup_request("request", timeout_s=0)
        assert ticket.released


def test_two_loads_share_no_memory(store: SnapshotStore, files: FaultyFileSystem) -> None:
    with files.pause("create", ".tmp"):
        ticket = store.save("request", 1, tensors(1))
        first, second = store.load("request", 1), store.load("request", 1)
        first.tensors["ssm"].fill(0)
        assert_same(second, tensors(1))
    ticket.result(10)
    first, second = store.load("request", 1), store.load("request", 1)
    first.tensors["ssm"].fill(0)
    assert_same(second, tensors(1))


def test_a_loaded_snapshot_survives_the_truncation_of_its_file(store: SnapshotStore) -> None:
    info = store.save("request", 1, tensors(1, 1 << 20)).result(10)
    snapshot = store.load("request", 1)
    os.truncate(info.path, 0)
    assert_same(snapshot, tensors(1, 1 << 20))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")
def test_a_load_takes_the_memory_of_its_file_and_no_more(store: SnapshotStore) -> None:
    nbytes = 128 << 20
    store.save("request", 1, {"state": np.arange(nbytes // 8)}).result(30)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_kib("VmRSS")
    snapshot = store.load("request", 1)
    grown = resident_kib("VmHWM") - before
    assert snapshot.tensors["state"][-1] == nbytes // 8 - 1
    assert grown <= (nbytes >> 10) + 4096


def resident_kib(name: str) -> int:
    """A line of this process's status: what it occupies now, or did at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_saving_a_key_again_replaces_it(store: SnapshotStore) -> None:
    first = store.save("request", 1, tensors(1)).result(10)
    second = store.save("request", 1, tensors(2)).result(10)
    assert first.path == second.path and first.generation == second.generation
    assert_same(store.load("request", 1), tensors(2))
    assert store.stats().live_snapshots == len(files_below(store.session)) == 1


def test_a_save_of_a_key_that_is_being_written_replaces_it_afterwards(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    with files.pause("rename", ".safetensors") as gate:
        first = store.save("request", 1, tensors(1))
        gate.wait_reached()
        second = store.save("request", 1, tensors(2))
        assert_same(store.load("request", 1), tensors(2))
    first.result(10)
    second.result(10)
    assert_same(store.load("request", 1), tensors(2))


def test_boundaries_and_latest_see_pending_and_committed(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    store.save("request", 128, tensors(1)).result(10)
    with files.pause("create", ".tmp"):
        store.save("request", 64, tensors(2))
        store.save("request", 256, tensors(3))
        assert store.boundaries("request") == (64, 128, 256)
        assert store.latest("request") == 256
        assert store.latest("request", at_most=255) == 128
        assert store.latest("request", at_most=63) is None
        assert store.latest("other") is None and store.boundaries("other") == ()
        assert store.has("request", 64) and not store.has("request", 65)


def test_an_empty_snapshot_with_metadata_is_a_snapshot(store: SnapshotStore) -> None:
    store.save("request", 0, {}, metadata=["only", "words"]).result(10)
    snapshot = store.load("request", 0)
    assert snapshot.tensors == {} and snapshot.metadata == ["only", "words"]


def test_metadata_comes_back_equal_up_to_a_megabyte(store: SnapshotStore) -> None:
    for count, metadata in enumerate(
        [
            None,
            True,
            0,
            -1.5,
            "",
            "\u00fc\U0001f600\x00\ud800",
            {"a": {"b": [[], {}, None, [1, [2, [3]]]]}},
            "x" * 1_000_000,
        ]
    ):
        store.save("request", count, tensors(1, 64), metadata=metadata).result(10)
        assert store.load("request", count).metadata == metadata


@pytest.mark.parametrize(
    "request_id",
    ["", "../..", "/etc/passwd", "a\x00b", "\n", "x" * 10_000, "\u202e\U0001f600", ".trash", "CON"],
)
def test_any_text_is_a_request_id_and_never_a_file_name(store: SnapshotStore, request_id: str) -> None:
    info = store.save(request_id, 1, tensors(1)).result(10)
    assert info.path.parent.parent == store.session
    assert info.path.name == "1.safetensors"
    assert_same(store.load(request_id, 1), tensors(1))
    assert store.cleanup_request(request_id).clean


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("request", True), TypeError, "token_count must be an int"),
        (("request", 1.0), TypeError, "token_count must be an int"),
        (("request", -1), ValueError, "token_count must be between"),
        (("request", 2**63), ValueError, "token_count must be between"),
        ((b"request", 1), TypeError, "request_id must be a str"),
        (("\ud800", 1), ValueError, "can not be encoded"),
    ],
)
def test_bad_keys_are_refused_before_anything_is_reserved(
    store: SnapshotStore, arguments: tuple[Any, Any], error: type[Exception], words: str
) -> None:
    for call in (
        lambda: store.save(*arguments, tensors(1)),
        lambda: store.load(*arguments),
        lambda: store.has(*arguments),
    ):
        with pytest.raises(error, match=words):
            call()
    assert nothing_was_reserved(store)


@pytest.mark.parametrize(
    ("value", "metadata", "error", "words"),
    [
        ({"good": np.zeros(2), "bad": np.array(["text"])}, None, UnsupportedTensorError, "'bad'"),
        ({"bad": [1, 2]}, None, UnsupportedTensorError, "'bad'"),
        ({1: np.zeros(2)}, None, TypeError, "name"),
        ({Name("plain"): np.zeros(2)}, None, TypeError, "name"),
        ({"__metadata__": np.zeros(2)}, None, ValueError, "__metadata__"),
        ({"fine": np.zeros(2)}, {"shape": (1, 2)}, TypeError, "list"),
        ({"fine": np.zeros(2)}, float("nan"), ValueError, "nan"),
        ({"fine": np.zeros(2)}, {1: 2}, TypeError, "str"),
        ({"fine": np.zeros(2)}, "x" * (1 << 20), ValueError, "1"),
    ],
)
def test_bad_contents_are_refused_before_anything_is_reserved(
    store: SnapshotStore, value: Any, metadata: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        store.save("request", 1, value, metadata=metadata)
    assert nothing_was_reserved(store)


# -- wrong answers that differ ----------------------------------------------------------------------------------------


def test_subclasses_of_str_and_int_are_the_key_that_they_stand_for(store: SnapshotStore) -> None:
    info = store.save(Name("request"), Boundary(64), tensors(1)).result(10)
    assert info.path.name == "64.safetensors" and type(info.key.request_id) is str
    assert_same(store.load("request", 64), tensors(1))
    assert store.boundaries(Name("request")) == (64,) and store.has(Name("request"), Boundary(64))
    assert store.cleanup_request(Name("request")).removed == 1


class Restless(Mapping[str, Any]):
    """A mapping that gives its names in another order, and new tensors, at each look."""

    def __init__(self, framework: Any) -> None:
        self.framework = framework
        self.looks = self.gets = 0

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[str]:
        self.looks += 1
        return iter(("one", "two") if self.looks % 2 else ("two", "one"))

    def __getitem__(self, name: str) -> Any:
        self.gets += 1
        return self.framework.ones(1) * {"one": 1, "two": 2}[name]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_mapping_is_looked_at_once(store: SnapshotStore, framework: str) -> None:
    """A lazy one (an ``np.load``, a checkpoint) reads each tensor once, and one that changes mixes no names up."""
    given = Restless(pytest.importorskip(framework))
    store.save("request", 1, given)
    assert {name: float(value[0]) for name, value in store.load("request", 1).tensors.items()} == {
        "one": 1,
        "two": 2,
    }
    assert given.gets == 2


def test_what_was_never_saved_is_not_found(store: SnapshotStore) -> None:
    store.save("request", 1, tensors(1)).result(10)
    for request_id, count in (("request", 2), ("other", 1)):
        with pytest.raises(SnapshotNotFoundError) as caught:
            store.load(request_id, count)
        assert caught.value.key == SnapshotKey(request_id, count)
        assert isinstance(caught.value, KeyError) and "no snapshot" in str(caught.value)


def test_a_failed_save_says_why_until_it_is_saved_again(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    files.fail("rename", errno.ENOSPC, ".safetensors")
    ticket = store.save("request", 1, tensors(1))
    assert isinstance(ticket.exception(10), SaveFailedError)
    with pytest.raises(SaveFailedError) as caught:
        store.load("request", 1)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert not store.has("request", 1)
    store.save("request", 1, tensors(2)).result(10)
    assert_same(store.load("request", 1), tensors(2))


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_is_found(store: SnapshotStore, bit: int) -> None:
    info = store.save("request", 1, tensors(1, 64), metadata={"n": 1}).result(10)
    good = info.path.read_bytes()
    for index in range(len(good)):
        bad = bytearray(good)
        bad[index] ^= 1 << bit
        info.path.write_bytes(bad)
        with pytest.raises(SnapshotCorruptError):
            store.load("request", 1)
    info.path.write_bytes(good)
    assert_same(store.load("request", 1), tensors(1, 64))


def test_a_file_cut_short_anywhere_is_found(store: SnapshotStore) -> None:
    info = store.save("request", 1, tensors(1, 64)).result(10)
    for size in range(info.path.stat().st_size):
        os.truncate(info.path, info.path.stat().st_size)
        good = info.path.read_bytes()
        info.path.write_bytes(good[:size])
        with pytest.raises(SnapshotCorruptError):
            store.load("request", 1)
        info.path.write_bytes(good)


@pytest.mark.parametrize("checksum", [True, False])
def test_two_files_that_were_swapped_are_found_out(root: Path, checksum: bool) -> None:
    store = SnapshotStore(root, StoreOptions(checksum=checksum))
    keys = [("a", 1), ("a", 2), ("b", 1)]
    paths = [store.save(*key, tensors(1)).result(10).path for key in keys]
    for one, other in itertools.combinations(range(3), 2):
        swap(paths[one], paths[other])
        for index in (one, other):
            with pytest.raises(SnapshotCorruptError, match="says that it is of"):
                store.load(*keys[index])
        swap(paths[one], paths[other])
    assert store.shutdown(cleanup=True).clean


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("kind", ["missing", "fifo", "link", "directory"])
def test_what_is_no_regular_file_is_refused_without_waiting(store: SnapshotStore, kind: str) -> None:
    info = store.save("request", 1, tensors(1)).result(10)
    elsewhere = store.session / "elsewhere"
    info.path.rename(elsewhere)
    if kind == "fifo":
        os.mkfifo(info.path)
    elif kind == "link":
        info.path.symlink_to(elsewhere)
    elif kind == "directory":
        info.path.mkdir()
    with pytest.raises((SnapshotCorruptError, OSError)):
        store.load("request", 1)
    elsewhere.unlink()


def test_without_verification_a_flipped_bit_is_the_callers_own_risk(root: Path) -> None:
    store = SnapshotStore(root, StoreOptions(verify_on_load=False))
    info = store.save("request", 1, tensors(1)).result(10)
    content = bytearray(info.path.read_bytes())
    content[-1] ^= 1
    info.path.write_bytes(content)
    assert store.load("request", 1).source == "disk"
    assert store.shutdown(cleanup=True).clean


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_are_private_and_standard(store: SnapshotStore) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    info = store.save("request", 1, tensors(1)).result(10)
    assert info.path.stat().st_mode & 0o777 == 0o600
    for folder in (
        info.path.parent,
        store.session,
        store.root,
        store.session / ".tmp",
        store.session / ".trash",
    ):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    loaded = safetensors.load_file(info.path)
    for name, tensor in tensors(1).items():
        assert np.array_equal(loaded[name], tensor)
    assert (store.root / ".snapstore").read_text() == '{"format": 1}'


def test_a_detached_file_is_out_of_reach_of_cleanup(store: SnapshotStore, tmp_path: Path) -> None:
    store.save("request", 1, tensors(1)).result(10)
    path = store.detach("request", 1, tmp_path / "mine.safetensors")
    assert path == tmp_path / "mine.safetensors" and path.is_file()
    assert not store.has("request", 1)
    with pytest.raises(SnapshotNotFoundError):
        store.load("request", 1)
    assert store.cleanup_all().clean
    assert path.is_file()
    assert store.stats().live_snapshots == 0
    assert store.flush(10) and store.cleanup_request("request", timeout_s=5).clean


def test_detach_waits_for_the_commit(store: SnapshotStore, files: FaultyFileSystem, tmp_path: Path) -> None:
    gate = files.pause("write", ".tmp")
    store.save("request", 1, tensors(1))
    gate.wait_reached()
    with pytest.raises(TimeoutError, match="'request' at 1 tokens is not on disk yet"):
        store.detach("request", 1, tmp_path / "mine", timeout_s=0.05)
    timer = threading.Timer(0.05, gate.open)
    timer.start()
    assert store.detach("request", 1, tmp_path / "mine", timeout_s=10).is_file()
    timer.join()


def test_detach_across_file_systems_copies_and_leaves_nothing(
    store: SnapshotStore, files: FaultyFileSystem, tmp_path: Path
) -> None:
    info = store.save("request", 1, tensors(1)).result(10)
    content = info.path.read_bytes()
    files.fail("rename", errno.EXDEV, "mine.safetensors")
    path = store.detach("request", 1, tmp_path / "mine.safetensors")
    assert path.read_bytes() == content
    assert not info.path.exists()
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["mine.safetensors"]


def test_a_detach_that_fails_leaves_the_snapshot_where_it_was(
    store: SnapshotStore, files: FaultyFileSystem, tmp_path: Path
) -> None:
    store.save("request", 1, tensors(1)).result(10)
    with pytest.raises(FileNotFoundError):
        store.detach("request", 1, tmp_path / "no such folder" / "mine")
    (tmp_path / "link").symlink_to(store.session, target_is_directory=True)
    for inside in (
        store.session / "mine",
        os.fsencode(store.root / "mine"),
        tmp_path / "link" / "mine",
        store.root,
    ):
        with pytest.raises(ValueError, match="inside the store's root"):
            store.detach("request", 1, inside)
    assert_same(store.load("request", 1), tensors(1))


def test_a_request_that_is_cleaned_up_while_it_is_detached_is_swept_afterwards(
    store: SnapshotStore, files: FaultyFileSystem, tmp_path: Path
) -> None:
    for count in (1, 2):
        store.save("request", count, tensors(count)).result(10)
    gate = files.pause("rename", "mine")
    detacher = threading.Thread(target=store.detach, args=("request", 1, tmp_path / "mine"))
    detacher.start()
    gate.wait_reached()
    assert not store.cleanup_request("request", timeout_s=0.05).clean
    gate.open()
    detacher.join(10)
    assert store.cleanup_request("request", timeout_s=10).clean
    assert (tmp_path / "mine").is_file()


# -- tickets ----------------------------------------------------------------------------------------------------------


def test_a_ticket_is_a_future_in_every_way(store: SnapshotStore, files: FaultyFileSystem) -> None:
    called: list[Any] = []
    with files.pause("create", ".tmp") as gate:
        ticket = store.save("request", 1, tensors(1))
        ticket.add_done_callback(called.append)
        gate.wait_reached()
        with pytest.raises(TimeoutError):
            ticket.result(0.01)
    assert ticket.exception(10) is None and ticket.done()
    assert store.flush(10) and called == [ticket]

    async def wait() -> SnapshotInfo:
        return await ticket

    assert asyncio.run(wait()) == ticket.result(0)
    assert "committed" in repr(ticket)


def test_a_cancelled_await_abandons_the_wait_and_not_the_save(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    async def give_up(ticket: snapstore.SaveTicket) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(wait_for(ticket), 0.02)

    async def wait_for(ticket: snapstore.SaveTicket) -> SnapshotInfo:
        return await ticket

    with files.pause("create", ".tmp"):
        ticket = store.save("request", 1, tensors(1))
        asyncio.run(give_up(ticket))
    assert ticket.result(10).path.exists()


def test_a_callback_that_raises_does_not_stop_the_writer(
    store: SnapshotStore, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(_: object) -> None:
        raise RuntimeError("the caller's own bug")

    with files.pause("create", ".tmp"), caplog.at_level(logging.CRITICAL):
        store.save("request", 1, tensors(1)).add_done_callback(bad)
    assert store.save("request", 2, tensors(2)).result(10)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_callback_that_would_end_its_thread_does_not_end_the_writer(
    store: SnapshotStore, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    def ends(_: object) -> None:
        raise kind

    for count in range(3):  # a thread that dies is started once more
        others: list[object] = []
        with files.pause("create", ".tmp"), caplog.at_level(logging.CRITICAL):
            ticket = store.save("request", count, tensors(1))
            ticket.add_done_callback(ends)
            ticket.add_done_callback(others.append)
        assert store.flush(10) and store.save("other", count, tensors(1)).result(10)
        assert others == [ticket]
    assert store.health().status == "ok" and store.stats().writer_restarts == 0


def test_flush_covers_what_was_accepted_before_it(store: SnapshotStore, files: FaultyFileSystem) -> None:
    with files.pause("create", ".tmp"):
        tickets = [store.save("request", count, tensors(count)) for count in range(5)]
        assert not store.flush(0.01)
    assert store.flush(10)
    assert all(ticket.done() for ticket in tickets)
    assert store.flush()


# -- options and the package ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"durability": "some"}, ValueError),
        ({"on_full": True}, ValueError),
        ({"save_timeout_s": -1}, ValueError),
        ({"save_timeout_s": float("inf")}, ValueError),
        ({"save_timeout_s": "2"}, TypeError),
        ({"save_timeout_s": 1e10}, ValueError),
        ({"shutdown_timeout_s": 10**400}, ValueError),
        ({"max_pending_jobs": 0}, ValueError),
        ({"max_pending_bytes": 1.5}, TypeError),
        ({"max_pending_jobs": True}, TypeError),
        ({"checksum": 1}, TypeError),
        ({"min_free_bytes": -1}, ValueError),
        ({"leftovers": "burn"}, ValueError),
    ],
)
def test_options_are_checked_when_they_are_made(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        StoreOptions(**options)


def test_options_must_be_options(root: Path) -> None:
    with pytest.raises(TypeError, match="StoreOptions"):
        SnapshotStore(root, {"durability": "full"})  # type: ignore[arg-type]
    assert not root.exists()


def test_saving_from_numpy_imports_neither_torch_nor_mlx(tmp_path: Path) -> None:
    program = """
import sys, numpy, snapstore
with snapstore.SnapshotStore(sys.argv[1]) as store:
    store.save("request", 1, {"a": numpy.ones(4)}).result(10)
    assert store.load("request", 1).tensors["a"].sum() == 4
assert not {"torch", "mlx"} & {name.partition(".")[0] for name in sys.modules}
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "root")], check=True, timeout=60)
