"""vLLM's secondary tier on snapstore, with a stand-in for vLLM's interface; see ``tests/engines`` for its own."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from helpers import files_below
from vllm_contract import REQUEST, ROW, Contract, finished, job, keys, load, look, row, spec, store, view

from snapstore.blocks import BlockStore
from snapstore.testing import FaultyFileSystem

Make = Callable[..., Any]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> FaultyFileSystem:
    """Under every tier of the test."""
    files, init = FaultyFileSystem(), BlockStore.__init__

    def faulty(self: BlockStore, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "file_system": files})

    monkeypatch.setattr(BlockStore, "__init__", faulty)
    return files


@pytest.fixture
def make(root: Path) -> Iterator[Make]:
    made: list[Any] = []

    def make(memory: memoryview, *, offloading_spec: Any = None, **config: Any) -> Any:
        module = importlib.import_module("snapstore.integrations.vllm")
        tier = module.SnapstoreTier(
            offloading_spec or spec(), memory, "SnapstoreTier", root_dir=str(root), **config
        )
        made.append(tier)
        return tier

    with stand_ins.modules(**stand_ins.vllm()):
        yield make
    for tier in made:
        tier.shutdown()


class TestSnapstore(Contract):
    pass


def test_a_hung_disk_never_holds_up_the_scheduler(make: Make, files: FaultyFileSystem, deadline: Any) -> None:
    memory = view(300, seed=1)
    tier = make(memory, threads=2)
    assert store(tier, 0, keys(1), [0]).success
    with files.pause("write", ".tmp") as gate:
        tier.submit_store(job(1, keys(1, 1), [1]))
        gate.wait_reached()
        with deadline(3):
            for number in range(2, 300):
                tier.submit_store(job(number, keys(1, number), [number]))
                assert tier.lookup(keys(1)[0], REQUEST).name == "HIT"
                tier.touch(keys(3), REQUEST)
                assert list(tier.get_finished_jobs()) == []
                tier.get_stats()
        tier.submit_load(job(1000, keys(1), [5], load=True))
    results = finished(tier, *range(1, 300), 1000)
    assert all(each.success for each in results.values())


def test_loads_go_before_the_stores_that_wait(make: Make, files: FaultyFileSystem) -> None:
    memory = view(32, seed=1)
    tier = make(memory, threads=1)
    assert store(tier, 0, keys(1), [0]).success
    with files.pause("write", ".tmp") as gate:
        tier.submit_store(job(1, keys(1, 1), [1]))
        gate.wait_reached()
        for number in range(2, 20):
            tier.submit_store(job(number, keys(1, number), [number]))
        tier.submit_load(job(100, keys(1), [31], load=True))
    tier.drain_jobs()
    order = [each.job_id for each in tier.get_finished_jobs()]
    assert order[:2] == [1, 100] and order[2:] == list(range(2, 20))


def test_a_row_is_not_read_any_more_when_its_job_has_ended(make: Make, files: FaultyFileSystem) -> None:
    memory = view(4, seed=1)
    tier, expected = make(memory), row(memory, 0)
    with files.pause("rename", ".safetensors") as gate:
        tier.submit_store(job(1, keys(1), [0]))
        gate.wait_reached()
        assert list(tier.get_finished_jobs()) == []
    assert finished(tier, 1)[1].success
    memory.cast("B")[:ROW] = bytes(ROW)
    assert load(tier, 2, keys(1), [3]).success and row(memory, 3) == expected


def test_a_row_that_is_not_written_fails_its_job_only(make: Make, files: FaultyFileSystem) -> None:
    memory = view(8, seed=1)
    tier = make(memory, threads=1)
    files.fail("write", errno.EIO, ".tmp", skip=1)
    tier.submit_store(job(1, keys(3), [0, 1, 2]))
    tier.submit_store(job(2, keys(1, 5), [5]))
    results = finished(tier, 1, 2)
    assert (results[1].success, results[2].success) == (False, True)
    assert [look(tier, key) for key in keys(3)].count("MISS") == 1
    assert store(tier, 3, keys(3), [0, 1, 2]).success
    assert load(tier, 4, keys(3), [5, 6, 7]).success
    assert [row(memory, number) for number in (5, 6, 7)] == [row(memory, number) for number in range(3)]


def test_a_damaged_row_is_a_miss_from_then_on(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    memory = view(4, seed=1)
    tier = make(memory)
    assert store(tier, 1, keys(2), [0, 1]).success
    damaged = min(tier.blocks.snapshots.session.glob("*/*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    result = load(tier, 2, keys(2), [2, 3])
    assert not result.success and len(result.successful_keys) == 1
    assert sorted(look(tier, key) for key in keys(2)) == ["HIT", "MISS"]
    assert [each.levelname for each in caplog.records] == ["WARNING"]


def test_a_row_of_another_length_is_not_found_for_ever(make: Make) -> None:
    tier = make(view(4, seed=1))
    tier.blocks.put(keys(1)[0].hex(), bytes(10))
    assert tier.blocks.snapshots.flush(10)
    assert not load(tier, 1, keys(1), [0]).success
    assert look(tier, keys(1)[0]) == "MISS"


def test_the_rows_that_were_used_longest_ago_make_room(make: Make) -> None:
    memory = view(16, seed=1)
    tier = make(memory, max_bytes=6 * 2 * ROW)
    for number in range(12):
        assert store(tier, number, keys(1, number), [number]).success
        tier.touch(keys(1), REQUEST)
    assert [number for number in range(12) if look(tier, keys(1, number)[0]) == "HIT"] == [0, 7, 8, 9, 10, 11]
    assert tier.blocks.stats().used_bytes <= 12 * ROW
    result = load(tier, 100, keys(2), [14, 15])
    assert not result.success and list(result.successful_keys) == keys(1)


def test_a_job_that_can_not_fit_fails_and_says_why(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    tier = make(view(4, seed=1), max_bytes=ROW)
    assert not store(tier, 1, keys(2), [0, 1]).success
    assert "DiskQuotaError" in caplog.records[0].getMessage() and len(caplog.records) == 1


@pytest.mark.parametrize("wrong", [4, -1, 10**9])
def test_rows_outside_the_memory_fail_their_job_only(
    make: Make, caplog: pytest.LogCaptureFixture, wrong: int
) -> None:
    memory = view(4, seed=1)
    tier, before = make(memory, threads=1), bytes(memory.cast("B"))
    assert not store(tier, 1, keys(2), [0, wrong]).success
    assert store(tier, 2, keys(2, 5), [0, 1]).success
    assert not load(tier, 3, keys(1, 5), [wrong]).success
    assert bytes(memory.cast("B")) == before
    assert [each.exc_info is not None for each in caplog.records] == [True, True]


def test_shutdown_fails_what_waits_and_lets_go_of_the_memory(make: Make, files: FaultyFileSystem) -> None:
    memory = view(16, seed=1)
    tier = make(memory, threads=1)
    with files.pause("write", ".tmp") as gate, ThreadPoolExecutor(1) as ender:
        for number in range(8):
            tier.submit_store(job(number, keys(1, number), [number]))
        gate.wait_reached()
        ending, late = ender.submit(tier.shutdown), 8
        while not (refused := list(tier.get_finished_jobs())):  # until shutdown has begun
            assert not ending.done()
            tier.submit_store(job(late, keys(1, 8), [8]))
            late += 1
        assert not any(each.success for each in refused)
        gate.open()
        ending.result(20)
    tier.shutdown()
    tier.drain_jobs()
    results = {each.job_id: each.success for each in [*refused, *tier.get_finished_jobs()]}
    assert results == {0: True, **dict.fromkeys(range(1, late), False)}
    memory.release()  # as the primary tier does: no view of it is left


def test_the_figures_are_declared_and_reported(make: Make) -> None:
    tier = make(view(8, seed=1))
    declared = type(tier).build_metric_definitions({})
    assert all(each.labelnames == ("tier",) and each.documentation for each in declared.values())
    store(tier, 1, keys(3), [0, 1, 2])
    load(tier, 2, keys(4), [4, 5, 6, 7])
    reported = tier.get_stats().values
    assert reported.keys() <= declared.keys()
    said = {name.removeprefix("vllm:kv_offload_snapstore_"): value for name, (_, value) in reported.items()}
    used = said.pop("used_bytes")
    assert said == {"blocks": 3, "stored": 3, "stored_bytes": 3 * ROW, "hits": 3, "misses": 1}
    assert 3 * ROW < used < 8 * ROW
    assert set(tier.get_stats().values) == {
        f"vllm:kv_offload_snapstore_{name}" for name in ("used_bytes", "blocks")
    }


def test_rows_lie_in_a_folder_of_the_model_spread_over_directories(make: Make, root: Path) -> None:
    tier = make(view(1, seed=1))
    assert store(tier, 1, keys(200), [0] * 200).success
    (folder,) = root.iterdir()
    assert folder.name.startswith("org_Tiny-Hybrid")
    assert len({each.split("/")[0] for each in files_below(tier.blocks.snapshots.session)}) > 150


def test_where_the_disk_is_is_published(make: Make) -> None:
    assert make(view(1), locality="REMOTE").locality is stand_ins.Locality.REMOTE
    assert make(view(1)).medium is stand_ins.Medium.STORAGE


@pytest.mark.parametrize(
    "config", [{"threads": 0}, {"threads": True}, {"max_bytes": 0}, {"locality": "MARS"}, {"leftovers": "x"}]
)
def test_what_can_not_work_is_refused_at_the_start(make: Make, config: Any) -> None:
    with pytest.raises(ValueError, match=r"threads|max_bytes|MARS|leftovers"):
        make(view(1), **config)
