"""Inside vLLM's own files: its factory builds our tier from configuration, and its file-system tier runs beside it."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import wheels
from vllm_contract import ROW, Contract, finished, job, keys, load, look, row, spec, store, view

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

Make = Callable[..., Any]
WANTED = ("vllm/",)
CONNECTOR = ("distributed", "kv_transfer", "kv_connector", "v1", "offloading")
"""Packages whose own ``__init__`` would import the engine, and more than ours need."""


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> types.ModuleType:
    return wheels.unpacked("vllm", WANTED, tmp_path_factory.mktemp("vllm"))


class Struct:
    """Of ``msgspec``, which vLLM's messages are made with, and which is not here."""

    def __init_subclass__(cls, **_: Any) -> None: ...


@pytest.fixture(scope="session")
def bare(package: types.ModuleType) -> dict[str, types.ModuleType]:
    """What stands in for the parts of vLLM that would bring in all of it."""
    first_rank = stand_ins.module("parallel_state", is_local_first_rank=lambda: True)  # who may log
    bare = {
        "vllm": package,
        "vllm__config": stand_ins.module("vllm.config", VllmConfig=object, KVTransferConfig=object),
        "vllm__distributed__parallel_state": first_rank,
    }
    name, path = "vllm", Path(package.__path__[0])
    for part in CONNECTOR:
        name, path = f"{name}.{part}", path / part
        bare[name.replace(".", "__")] = stand_ins.module(name)
        bare[name.replace(".", "__")].__path__ = [str(path)]
    factory = stand_ins.module("factory", KVConnectorFactory=object)
    bare["vllm__distributed__kv_transfer__kv_connector__factory"] = factory
    region = stand_ins.module("region", SharedOffloadRegion=Region)
    return {**bare, "vllm__v1__kv_offload__cpu__shared_offload_region": region}


@pytest.fixture(scope="session")
def kept() -> dict[str, types.ModuleType]:
    return {}


@pytest.fixture
def engine(
    bare: dict[str, types.ModuleType], kept: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """vLLM's factory of secondary tiers."""
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    msgspec = stand_ins.module("msgspec", Struct=Struct, field=lambda **_: None)
    monkeypatch.setitem(sys.modules, "msgspec", msgspec)
    with stand_ins.modules(kept, **bare):
        yield importlib.import_module("vllm.v1.kv_offload.tiering.factory").SecondaryTierFactory


@pytest.fixture
def make_tier(engine: Any, root: Path) -> Iterator[Make]:
    """``make_tier(memory, type=..., ...)`` as ``secondary_tiers`` of the connector's extra config says it."""
    made: list[Any] = []

    def make(memory: memoryview, *, offloading_spec: Any = None, **config: Any) -> Any:
        tier = engine.create_secondary_tier(
            {"root_dir": str(root), **config}, memory, offloading_spec or spec()
        )
        made.append(tier)
        return tier

    yield make
    for tier in made:
        tier.shutdown()


OURS = {"type": "SnapstoreTier", "module_path": "snapstore.integrations.vllm"}


class TestSnapstore(Contract):
    @pytest.fixture
    def make(self, make_tier: Make) -> Make:
        return lambda memory, **config: make_tier(memory, **OURS, **config)


class TestTheEnginesOwnTier(Contract):
    @pytest.fixture
    def make(self, make_tier: Make) -> Make:
        threads = {"n_read_threads": 2, "n_write_threads": 2}
        return lambda memory, **config: make_tier(memory, type="fs", **threads, **config)


def test_every_row_is_the_same_from_both(make_tier: Make) -> None:
    memory = view(24, seed=1)
    ours, theirs = make_tier(memory, **OURS), make_tier(memory, type="fs")
    assert (
        store(ours, 1, keys(8), list(range(8))).success and store(theirs, 1, keys(8), list(range(8))).success
    )
    assert load(ours, 2, keys(8), list(range(8, 16))).success
    assert load(theirs, 2, keys(8), list(range(16, 24))).success
    for number in range(8):
        assert row(memory, number) == row(memory, 8 + number) == row(memory, 16 + number)


def test_a_tier_of_ours_is_one_of_theirs_and_knows_its_disk(make_tier: Make) -> None:
    base = importlib.import_module("vllm.v1.kv_offload.tiering.base")
    tier = make_tier(view(1), **OURS, locality="LOCAL", max_bytes=1 << 30, threads=2)
    assert isinstance(tier, base.SecondaryTierManager)
    assert tier.tier_type == "SnapstoreTier" and tier.block_size_bytes == ROW
    assert tier.cache_hit_source.name == "DISK"
    assert not tier.has_pending_work() and list(tier.take_events()) == []
    assert tier.config_info() == {} and type(tier).config_info_keys({}) == ()


def test_the_figures_are_what_vllm_collects(make_tier: Make) -> None:
    tier = make_tier(view(4, seed=1), **OURS)
    assert store(tier, 1, keys(2), [0, 1]).success
    declared = type(tier).build_metric_definitions({})
    stats = tier.get_stats()
    said = stats.reduce()
    assert said["vllm:kv_offload_snapstore_stored:('SnapstoreTier',)"] == 2
    assert {name.rsplit(":", 1)[0] for name in said} <= declared.keys()
    later = tier.get_stats().aggregate(stats).reduce()
    assert later["vllm:kv_offload_snapstore_blocks:('SnapstoreTier',)"] == 2


def test_the_same_folder_serves_the_next_engine_but_not_one_beside_it(make_tier: Make) -> None:
    first = make_tier(view(4, seed=1), **OURS)
    assert store(first, 1, keys(2), [0, 1]).success
    beside = make_tier(view(4), **OURS)
    assert look(beside, keys(1)[0]) == "MISS" and look(first, keys(1)[0]) == "HIT"
    first.shutdown()
    beside.shutdown()
    after = make_tier(view(4), **OURS)
    assert [look(after, key) for key in keys(3)] == ["HIT", "HIT", "MISS"]


def test_an_eviction_is_a_miss(make_tier: Make) -> None:
    tier = make_tier(view(12, seed=1), **OURS, max_bytes=4 * 2 * ROW)
    for number in range(12):
        assert store(tier, number, keys(1, number), [number]).success
    assert [look(tier, key) for key in keys(12)] == ["MISS"] * 8 + ["HIT"] * 4
    tier.submit_load(job(100, keys(2), [0, 1], load=True))
    assert not finished(tier, 100)[100].success


class Region:
    """Where the primary tier keeps its rows, without the memory that vLLM's workers share."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory

    def create_kv_memoryview(self) -> memoryview:
        return self.memory

    def cleanup(self) -> None: ...


@pytest.mark.parametrize("config", [OURS, {"type": "fs"}], ids=["ours", "theirs"])
def test_blocks_that_left_the_primary_tier_come_back_through_the_engines_own_manager(
    make_tier: Make, config: dict[str, str], eventually: Any
) -> None:
    manager_of = importlib.import_module("vllm.v1.kv_offload.tiering.manager")
    base = importlib.import_module("vllm.v1.kv_offload.base")
    memory = view(4)
    primary = manager_of.CPUPrimaryTierOffloadingManager(4, Region(memory))
    manager = manager_of.TieringOffloadingManager(primary, [make_tier(memory, **config)])
    written: dict[bytes, bytes] = {}
    request = base.ReqContext("request-1")

    def step() -> None:
        manager.on_schedule_end(base.ScheduleEndContext((), ()))

    def settle() -> bool:
        step()
        return not manager.has_pending_work()

    def arrive(key: bytes) -> bool:
        found = manager.lookup(key, request)
        step()
        assert found is not base.LookupResult.MISS
        return found is base.LookupResult.HIT

    manager.on_new_request(request)
    for number, key in enumerate(keys(12)):  # three times what the primary tier holds
        prepared = manager.prepare_store([key], request)
        (chunk,) = prepared.store_spec.chunk_ids
        memory.cast("B")[chunk * ROW : (chunk + 1) * ROW] = written[key] = bytes([number + 1]) * ROW
        manager.complete_store([key], request)
        eventually(settle)
    assert primary.lookup(keys(1)[0], request) is base.LookupResult.MISS
    for key in keys(12):
        eventually(lambda key=key: arrive(key))
        (chunk,) = manager.prepare_load([key], request).chunk_ids
        assert row(memory, chunk) == written[key]
        manager.complete_load([key], request)
    stats = manager.get_stats()
    assert stats is not None and not stats.is_empty()
    manager.on_request_finished(request)
    manager.shutdown()
