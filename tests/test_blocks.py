"""Plain keys on a store: bytes as they were, spread over folders, within a limit, found again after a restart."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_rest, files_below

from snapstore import DiskQuotaError, StoreFullError, StoreOptions
from snapstore.blocks import FOLDERS, BlockStore
from snapstore.testing import FaultyFileSystem

KiB = 1024


@pytest.fixture
def blocks(root: Path, files: FaultyFileSystem) -> Iterator[BlockStore]:
    blocks = BlockStore(root, file_system=files)
    yield blocks
    files.heal()
    assert blocks.shutdown(cleanup=True).clean


def content(seed: int, nbytes: int = 4 * KiB) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def flush(blocks: BlockStore) -> None:
    assert blocks.snapshots.flush(10)


@pytest.mark.parametrize("nbytes", [0, 1, 7, 4096, 1_000_003])
def test_a_block_comes_back_from_memory_and_from_disk(
    blocks: BlockStore, files: FaultyFileSystem, nbytes: int
) -> None:
    block = content(1, nbytes)
    with files.pause("create", ".tmp") as gate:
        blocks.put("key", block)
        gate.wait_reached()
        assert bytes(blocks.get("key") or b"") == block
    flush(blocks)
    assert bytes(blocks.get("key") or b"") == block
    target = bytearray(b"x" * nbytes)
    assert blocks.get_into("key", target) and bytes(target) == block


def test_when_put_returns_the_buffer_may_be_overwritten(blocks: BlockStore, files: FaultyFileSystem) -> None:
    buffer = bytearray(content(1))
    with files.pause("create", ".tmp"):
        blocks.put("key", buffer)
        buffer[:] = bytes(len(buffer))
    flush(blocks)
    assert bytes(blocks.get("key") or b"") == content(1)


def test_rows_of_a_larger_view_are_read_and_written_in_place(blocks: BlockStore) -> None:
    rows = memoryview(np.frombuffer(content(1, 8 * KiB), np.int8).reshape(8, KiB).copy())
    flat = rows.cast("B")
    for number in range(8):
        blocks.put(f"row-{number}", flat[number * KiB : (number + 1) * KiB])
    into = memoryview(np.zeros((8, KiB), np.int8))
    for number in range(8):
        assert blocks.get_into(f"row-{number}", into.cast("B")[(7 - number) * KiB : (8 - number) * KiB])
    assert np.array_equal(np.asarray(into)[::-1], np.asarray(rows))


def test_a_miss_is_no_error_and_no_warning(blocks: BlockStore, caplog: pytest.LogCaptureFixture) -> None:
    assert blocks.get("nothing") is None and not blocks.has("nothing")
    target = bytearray(b"as it was")
    assert not blocks.get_into("nothing", target) and target == b"as it was"
    assert not blocks.discard("nothing")
    assert not caplog.records
    stats = blocks.stats()
    assert (stats.hits, stats.misses, stats.blocks) == (0, 2, 0)


def test_a_block_of_another_length_is_a_miss(blocks: BlockStore, caplog: pytest.LogCaptureFixture) -> None:
    blocks.put("key", content(1))
    target = bytearray(100)
    assert not blocks.get_into("key", target) and target == bytes(100)
    assert [each.levelname for each in caplog.records] == ["WARNING"]


def test_what_is_there_is_not_written_again(blocks: BlockStore) -> None:
    assert blocks.put("key", content(1)) is not None
    assert blocks.put("key", content(2)) is None
    flush(blocks)
    assert bytes(blocks.get("key") or b"") == content(1)
    assert blocks.stats().stored == 1 and blocks.snapshots.stats().accepted == 1


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "/", "a\x00b", "\u4e2d", "k" * 10_000, ".", "CON"])
def test_any_text_is_a_key(blocks: BlockStore, key: str) -> None:
    blocks.put(key, content(3))
    flush(blocks)
    assert bytes(blocks.get(key) or b"") == content(3)
    assert len(files_below(blocks.snapshots.session)) == 1


@pytest.mark.parametrize("key", [None, 7, b"bytes"])
def test_nothing_else_is(blocks: BlockStore, key: Any) -> None:
    with pytest.raises(TypeError, match="a key must be a str"):
        blocks.put(key, b"")
    with pytest.raises(TypeError, match="a key must be a str"):
        blocks.has(key)


def test_blocks_are_spread_over_folders(blocks: BlockStore) -> None:
    for number in range(3000):
        blocks.put(f"{number:064x}", b"12345678")
    flush(blocks)
    found = Counter(each.split("/")[0] for each in files_below(blocks.snapshots.session))
    assert sum(found.values()) == 3000
    assert len(found) > 0.85 * FOLDERS and max(found.values()) < 20


def test_a_prefix_is_counted_up_to_its_first_gap(blocks: BlockStore) -> None:
    keys = [f"page-{number}" for number in range(6)]
    for number in (0, 1, 2, 4, 5):
        blocks.put(keys[number], b"x")
    assert blocks.count_leading(keys) == 3
    assert blocks.count_leading(keys[4:]) == 2
    assert blocks.count_leading([]) == 0 == blocks.count_leading(keys[3:])


def test_another_key_in_the_same_place_is_a_miss(blocks: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapstore import SnapshotKey
    from snapstore import blocks as module

    monkeypatch.setattr(module, "_place", lambda key: SnapshotKey("blocks/000", 1))
    blocks.put("one", content(1))
    assert blocks.get("another") is None
    assert bytes(blocks.get("one") or b"") == content(1)


# --- the limit ---


def limited(root: Path, blocks: int, **more: Any) -> BlockStore:
    """Room for so many blocks of 4 KiB, each of which takes two pages of the disk."""
    return BlockStore(root, max_bytes=blocks * 8 * KiB, **more)


def test_the_blocks_that_were_used_longest_ago_make_room(root: Path) -> None:
    with limited(root, 8) as blocks:
        for number in range(8):
            blocks.put(f"key-{number}", content(number))
            flush(blocks)
        assert bytes(blocks.get("key-0") or b"") == content(0)
        blocks.mark_used(["key-2", "no such key"])
        assert blocks.put("key-1", content(1)) is None
        for number in range(8, 11):
            blocks.put(f"key-{number}", content(number))
            flush(blocks)
        there = [number for number in range(11) if blocks.has(f"key-{number}")]
        assert there == [0, 1, 2, 6, 7, 8, 9, 10]
        for number in there:
            assert bytes(blocks.get(f"key-{number}") or b"") == content(number)
        assert len(files_below(blocks.snapshots.session)) == 8 == blocks.stats().blocks
        assert blocks.stats().discarded == 3
        assert blocks.stats().used_bytes <= 64 * KiB
        assert blocks.shutdown(cleanup=True).clean


def test_a_block_that_can_not_fit_is_refused(root: Path) -> None:
    with limited(root, 4) as blocks:
        blocks.put("small", content(1))
        flush(blocks)
        with pytest.raises(DiskQuotaError) as caught:
            blocks.put("large", content(2, 40 * KiB))
        assert (caught.value.nbytes, caught.value.limit_bytes) == (40 * KiB, 32 * KiB)
        assert not blocks.has("large") and blocks.snapshots.stats().accepted == 1
        assert blocks.shutdown(cleanup=True).clean
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="max_bytes"):
            BlockStore(root, max_bytes=wrong)  # type: ignore[arg-type]


def test_what_is_on_its_way_to_the_disk_is_not_discarded(root: Path, files: FaultyFileSystem) -> None:
    with limited(root, 4, file_system=files) as blocks:
        with files.pause("rename", ".safetensors") as gate:
            blocks.put("writing", content(1))
            gate.wait_reached()
            blocks.put("waiting", content(2))
            blocks.put("too", content(3))
            for number in range(8):
                with pytest.raises(DiskQuotaError):
                    blocks.put(f"more-{number}", content(4, 20 * KiB))
        flush(blocks)
        assert [bytes(blocks.get(key) or b"") for key in ("writing", "waiting", "too")] == [
            content(1),
            content(2),
            content(3),
        ]
        assert blocks.stats().discarded == 0
        blocks.put("later", content(4, 20 * KiB))
        assert not blocks.has("writing") and blocks.has("later")
        assert blocks.shutdown(cleanup=True).clean


def test_what_was_discarded_leaves_no_memory_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that discards as much as it takes goes on for weeks."""
    monkeypatch.setattr("snapstore.blocks.FOLDERS", 1)  # one that is never empty, as all are in a full store
    with BlockStore(root) as blocks:
        blocks.put("stays", b"1")

        def traced_after(keys: list[str]) -> int:
            for key in keys:
                blocks.put(key, b"1")
            flush(blocks)
            assert all(map(blocks.discard, keys))
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            first, second = (traced_after([f"{turn}.{number}" for number in range(400)]) for turn in range(2))
        finally:
            tracemalloc.stop()
        assert (second - first) / 400 < 64


def test_nothing_makes_room_for_a_block_that_can_never_fit(root: Path) -> None:
    with limited(root, 4) as blocks:
        for number in range(3):
            blocks.put(f"key-{number}", content(number))
        flush(blocks)
        for nbytes in (4 * 8 * KiB, 1024 * KiB):
            with pytest.raises(DiskQuotaError, match="exceeds"):
                blocks.put("large", content(4, nbytes))
        assert blocks.stats().discarded == 0 and blocks.count_leading(f"key-{n}" for n in range(3)) == 3
        assert blocks.shutdown(cleanup=True).clean


def test_a_file_that_will_not_go_stays_a_block(root: Path, files: FaultyFileSystem) -> None:
    with BlockStore(root, file_system=files) as blocks:
        blocks.put("key", content(1))
        flush(blocks)
        files.fail("unlink", errno.EIO, ".safetensors")
        with pytest.raises(OSError, match="Input/output"):
            blocks.discard("key")
        assert bytes(blocks.get("key") or b"") == content(1)
        assert blocks.discard("key") and not blocks.has("key")
        assert_at_rest(blocks.snapshots)
        assert blocks.shutdown(cleanup=True).clean


def test_many_threads_within_the_limit(root: Path) -> None:
    def work(seed: int) -> int:
        wrong = 0
        for step in range(60):
            number = (seed * 31 + step * 7) % 50
            blocks.put(f"key-{number}", content(number))
            found = blocks.get(f"key-{(number + 3) % 50}")
            wrong += found is not None and bytes(found) != content((number + 3) % 50)
        return wrong

    with limited(root, 60) as blocks:
        with ThreadPoolExecutor(4) as crew:
            assert list(crew.map(work, range(4))) == [0] * 4
        flush(blocks)
        assert blocks.stats().used_bytes <= 60 * 8 * KiB + 4 * 8 * KiB
        assert len(files_below(blocks.snapshots.session)) == blocks.stats().blocks
        assert blocks.shutdown(cleanup=True).clean


# --- faults, and the end ---


def test_a_damaged_block_is_a_miss_once_and_can_be_put_again(
    blocks: BlockStore, caplog: pytest.LogCaptureFixture
) -> None:
    blocks.put("key", content(1))
    flush(blocks)
    (path,) = blocks.snapshots.session.glob("*/*.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert blocks.get("key") is None
    assert ["SnapshotCorruptError" in each.getMessage() for each in caplog.records] == [True]
    assert not blocks.has("key") and files_below(blocks.snapshots.session) == []
    blocks.put("key", content(1))
    flush(blocks)
    assert bytes(blocks.get("key") or b"") == content(1)


def test_a_block_that_was_not_written_is_a_miss_and_can_be_put_again(
    blocks: BlockStore, files: FaultyFileSystem
) -> None:
    files.fail("write", errno.ENOSPC, ".tmp")
    ticket = blocks.put("key", content(1))
    assert ticket is not None and ticket.exception(10) is not None
    assert not blocks.has("key") and blocks.get("key") is None
    assert blocks.put("key", content(1)) is not None
    flush(blocks)
    assert bytes(blocks.get("key") or b"") == content(1)


def test_a_full_queue_is_said(root: Path, files: FaultyFileSystem) -> None:
    options = StoreOptions(max_pending_jobs=1, on_full="reject")
    with BlockStore(root, options, file_system=files) as blocks:
        with files.pause("create", ".tmp") as gate:
            blocks.put("one", content(1))
            gate.wait_reached()
            with pytest.raises(StoreFullError):
                blocks.put("two", content(2))
        assert blocks.shutdown(cleanup=True).clean


def test_clear_forgets_everything_and_nothing_later(blocks: BlockStore, files: FaultyFileSystem) -> None:
    for number in range(20):
        blocks.put(f"key-{number}", content(number))
    with files.pause("rename", ".safetensors", skip=3) as gate:
        gate.wait_reached()
        assert not blocks.clear(timeout_s=0.01)
        assert blocks.stats().blocks <= 1 and blocks.count_leading(["key-0"]) == 0
        blocks.put("key-0", content(7))
    flush(blocks)
    assert bytes(blocks.get("key-0") or b"") == content(7)
    assert blocks.clear(timeout_s=10) and blocks.stats().blocks == 0


def test_the_next_store_goes_on_with_what_the_last_one_left(root: Path) -> None:
    with limited(root, 16) as blocks:
        for number in range(12):
            blocks.put(f"key-{number}", content(number))
    with limited(root, 16) as blocks:
        assert blocks.stats().blocks == 12 == blocks.count_leading(f"key-{number}" for number in range(13))
        assert all(bytes(blocks.get(f"key-{number}") or b"") == content(number) for number in range(12))
        for number in range(12, 24):
            blocks.put(f"key-{number}", content(number))
            flush(blocks)
        assert blocks.stats().used_bytes <= 16 * 8 * KiB
        assert all(blocks.has(f"key-{number}") for number in range(12, 24))
    with BlockStore(root, StoreOptions(leftovers="discard")) as blocks:
        assert blocks.stats().blocks == 0
        assert blocks.shutdown(cleanup=True).clean


OTHER = """
import sys
from snapstore.blocks import BlockStore
blocks = BlockStore(sys.argv[1])
for number in range(4):
    blocks.put(f"key-{number}", bytes([number]) * 4096)
assert blocks.snapshots.flush(10)
print("ready", flush=True)
sys.stdin.readline()
assert all(bytes(blocks.get(f"key-{number}")) == bytes([number]) * 4096 for number in range(4))
print("mine are still there", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_touch_each_others_blocks_until_one_is_dead(root: Path) -> None:
    command, pipe = [sys.executable, "-c", OTHER, str(root)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin and other.stdout and other.stdout.readline() == "ready\n"
        with BlockStore(root) as blocks:
            assert not blocks.has("key-0")
            blocks.put("key-0", content(1))
            assert blocks.clear(timeout_s=10)
            assert blocks.shutdown(cleanup=True).clean
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "mine are still there\n"
        other.kill()
        other.wait()
    with BlockStore(root) as blocks:
        assert bytes(blocks.get("key-3") or b"") == bytes([3]) * 4096
        assert blocks.shutdown(cleanup=True).clean
