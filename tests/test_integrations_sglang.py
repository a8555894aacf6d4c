"""SGLang's storage backend on snapstore, with a stand-in for SGLang's interface; see ``tests/engines`` for its own."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from helpers import files_below
from sglang_contract import (
    WIDTH,
    Contract,
    HostPool,
    Servers,
    TwoServers,
    config,
    hashes,
    indices,
    same,
    torch,
)

from snapstore.blocks import BlockStore
from snapstore.testing import FaultyFileSystem

Make = Callable[..., Any]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> FaultyFileSystem:
    """Under every backend of the test."""
    files, init = FaultyFileSystem(), BlockStore.__init__

    def faulty(self: BlockStore, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "file_system": files})

    monkeypatch.setattr(BlockStore, "__init__", faulty)
    return files


@pytest.fixture
def make(root: Path) -> Iterator[Make]:
    made: list[Any] = []

    def make(extra: dict[str, Any] | None = None, **changes: Any) -> Any:
        module = importlib.import_module("snapstore.integrations.sglang")
        made.append(module.SnapstoreHiCache(config({"root_dir": str(root), **(extra or {})}, **changes), {}))
        return made[-1]

    with stand_ins.modules(**stand_ins.sglang()):
        yield make
    for backend in made:
        backend.close()


class TestSnapstore(Contract):
    pass


class TestTwoServers(TwoServers):
    @pytest.fixture
    def servers(self, root: Path) -> Iterator[Servers]:
        with Servers(str(root)) as servers:
            yield servers


def test_pages_move_by_index_with_the_first_interface_too(make: Make) -> None:
    backend, pool, keys = make(), HostPool(), hashes(5)
    backend.register_mem_pool_host(pool)
    pool.fill(1)
    expected = [pool.page(number).clone() for number in range(4)]
    assert backend.batch_set_v1(keys[:4], indices([0, 1, 2, 3])) == [True] * 4
    pool.fill(2)
    kept = pool.page(8).clone()
    assert backend.batch_get_v1(keys, indices([4, 5, 6, 7, 8])) == [True] * 4 + [False]
    assert all(same(pool.page(4 + number), expected[number]) for number in range(4))
    assert same(pool.page(8), kept)
    assert backend.batch_get_v1(keys, indices([4])) == [False] * 5


def test_a_page_without_a_target_comes_as_bytes_and_one_that_is_not_contiguous_is_filled(make: Make) -> None:
    backend, page = make(), torch.arange(12.0).reshape(3, 4)
    assert backend.set("key", page.T)
    flat = backend.get("key")
    assert same(flat.view(torch.float32), page.T.contiguous().flatten())
    target = torch.zeros(3, 4).T
    assert backend.get("key", target) is target and torch.equal(target, page.T)
    assert backend.set("scalar", torch.tensor(7.5)) and float(backend.get("scalar", torch.tensor(0.0))) == 7.5


def test_the_target_may_be_given_as_where_the_value_is(make: Make) -> None:
    backend = make()
    assert backend.set("key", target_location=torch.ones(4))
    assert backend.batch_set(["other"], target_locations=[torch.ones(4)])
    assert backend.batch_exists(["key", "other"]) == 2
    with pytest.raises(ValueError, match="a value or a target_location"):
        backend.set("key")
    with pytest.raises(ValueError, match="values or target_locations"):
        backend.batch_set(["key"])


def test_a_batch_ends_at_the_first_page_that_is_not_taken(
    make: Make, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make({"max_bytes": 64 * 1024})
    keys, pages = hashes(3), [torch.ones(64), torch.ones(64 * 1024), torch.ones(64)]
    assert backend.batch_set(keys, pages) is False
    assert [backend.exists(key) for key in keys] == [True, False, False]
    warnings = [each.getMessage() for each in caplog.records]
    assert len(warnings) == 1 and keys[1] in warnings[0] and "DiskQuotaError" in warnings[0]


def test_partial_failures_are_told_page_by_page(make: Make, files: FaultyFileSystem) -> None:
    backend, kv, keys = make(), HostPool(), hashes(5)
    backend.register_mem_host_pool_v2(kv, stand_ins.PoolName.KV)
    kv.fill(1)
    expected = [kv.page(number).clone() for number in range(5)]
    files.fail("write", errno.EIO, ".tmp", skip=1)
    transfer = [stand_ins.PoolTransfer(stand_ins.PoolName.KV, indices(list(range(5))), keys=keys)]
    assert backend.batch_set_v2(transfer) == {
        "kv": [True] * 5
    }  # taken; one of them fails on its way to the disk
    assert backend.blocks.snapshots.flush(10)
    there = [backend.exists(key) for key in keys]
    assert there.count(False) == 1
    kv.fill(2)
    assert backend.batch_get_v2(transfer) == {"kv": there}
    assert all(same(kv.page(number), expected[number]) for number in range(5) if there[number])


def test_pages_that_were_used_longest_ago_make_room(make: Make) -> None:
    backend, keys = make({"max_bytes": 8 * 8192}), hashes(20)
    for number, key in enumerate(keys):
        assert backend.set(key, torch.full((1024,), float(number)))
        assert backend.blocks.snapshots.flush(10)
        assert backend.get(keys[0], torch.zeros(1024)) is not None
    assert [number for number in range(20) if backend.exists(keys[number])] == [0, *range(13, 20)]
    assert backend.blocks.stats().used_bytes <= 8 * 8192


def test_a_disk_that_hangs_holds_up_neither_set_nor_get(
    make: Make, files: FaultyFileSystem, deadline: Any
) -> None:
    backend, keys = make(), hashes(10)
    with files.pause("create", ".tmp") as gate, deadline(2):
        assert backend.batch_set(keys, [torch.ones(1024)] * 10)
        gate.wait_reached()
        assert backend.batch_exists(keys) == 10
        assert all(page is not None for page in backend.batch_get(keys, [torch.zeros(1024) for _ in keys]))


def test_pages_lie_below_a_folder_of_the_rank_spread_over_directories(make: Make, root: Path) -> None:
    backend = make(tp_rank=1, tp_size=2, model_name="../../org/M\u00f6del 7B")
    for key in hashes(200):
        assert backend.set(key, torch.ones(8))
    assert backend.blocks.snapshots.flush(10)
    (rank,) = root.iterdir()
    assert rank.name.startswith("M-del-7B-tp1of2-")
    folders = {each.split("/")[0] for each in files_below(backend.blocks.snapshots.session)}
    assert len(folders) > 150


@pytest.mark.parametrize(
    ("extra", "changes", "match"),
    [
        ({"root_dir": None}, {}, "root_dir|NoneType"),
        ({}, {"is_mla_model": True, "tp_size": 2}, "MLA"),
        ({"max_bytes": 0}, {}, "max_bytes"),
        ({"leftovers": "burn"}, {}, "leftovers"),
    ],
)
def test_what_can_not_work_is_refused_at_the_start(make: Make, extra: Any, changes: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make(extra, **changes)


def test_no_folder_is_refused(make: Make) -> None:
    module = importlib.import_module("snapstore.integrations.sglang")
    with pytest.raises(ValueError, match="root_dir"):
        module.SnapstoreHiCache(config({}), {})


def test_one_rank_of_mla_is_fine(make: Make) -> None:
    assert make(is_mla_model=True).set("key", torch.ones(4))


def test_the_figures_are_what_sglang_collects(make: Make) -> None:
    backend, kv, keys = make(enable_storage_metrics=True), HostPool(), hashes(3)
    backend.register_mem_pool_host(kv)
    assert backend.batch_set_v1(keys, indices([0, 1, 2])) == [True] * 3
    assert backend.batch_get_v1([*keys, "missing"], indices([0, 1, 2, 3])) == [True] * 3 + [False]
    backend.batch_get(["missing"], [torch.zeros(4)])
    stats = backend.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [3])
    assert len(stats.backup_bandwidth) == 1 and stats.prefetch_bandwidth[0] > 0
    assert backend.get_stats() == stand_ins.StorageMetrics()
    assert make(tp_rank=1, tp_size=2).get_stats() is None
    counted = backend.blocks.stats()
    assert (counted.stored, counted.stored_bytes, counted.hits, counted.misses) == (
        3,
        3 * 4 * WIDTH * 2,
        3,
        2,
    )


def test_close_writes_what_was_taken_and_twice_is_fine(
    make: Make, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make()
    with files.pause("create", ".tmp") as gate:
        assert backend.set("key", torch.ones(4))
        gate.wait_reached()
    backend.close()
    backend.close()
    assert not caplog.records
    assert backend.set("late", torch.ones(4)) is False
    assert "StoreClosedError" in caplog.records[0].getMessage()
