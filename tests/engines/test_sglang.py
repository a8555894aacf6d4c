"""Inside SGLang's own files: its factory builds our backend from configuration, and its file backend runs beside it."""

from __future__ import annotations

import importlib
import logging
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import wheels
from sglang_contract import Contract, HostPool, Servers, TwoServers, config, hashes, indices, same, torch

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

Make = Callable[..., Any]
WANTED = ("sglang/srt/mem_cache/hicache_storage.py", "sglang/srt/mem_cache/storage/", "sglang/srt/environ.py")


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> types.ModuleType:
    return wheels.unpacked("sglang", WANTED, tmp_path_factory.mktemp("sglang"))


@pytest.fixture
def engine(package: types.ModuleType) -> Iterator[Any]:
    """SGLang's factory."""
    with stand_ins.modules(**stand_ins.around_sglang(package.__path__[0])):
        yield importlib.import_module("sglang.srt.mem_cache.storage").StorageBackendFactory


@pytest.fixture
def close() -> Iterator[list[Any]]:
    made: list[Any] = []
    yield made
    for backend in made:
        backend.close()


@pytest.fixture
def make_ours(engine: Any, root: Path, close: list[Any]) -> Make:
    """As ``--hicache-storage-backend dynamic`` with README's extra config."""

    def make(extra: dict[str, Any] | None = None, **changes: Any) -> Any:
        said = {
            "backend_name": "snapstore",
            "module_path": "snapstore.integrations.sglang",
            "class_name": "SnapstoreHiCache",
            "root_dir": str(root),
        }
        backend = engine.create_backend("dynamic", config({**said, **(extra or {})}, **changes), HostPool())
        assert type(backend).__name__ == "SnapstoreHiCache"
        close.append(backend)
        return backend

    return make


class TestSnapstore(Contract):
    @pytest.fixture
    def make(self, make_ours: Make) -> Make:
        return make_ours


class TestTheEnginesOwnFiles(Contract):
    @pytest.fixture
    def make(self, engine: Any, root: Path) -> Make:
        root.mkdir()
        return lambda **changes: engine.create_backend(
            "file", config({"file_storage_path": str(root)}, **changes), HostPool()
        )


class TestTwoServers(TwoServers):
    @pytest.fixture
    def servers(self, root: Path, package: types.ModuleType) -> Iterator[Servers]:
        with Servers(str(root), package.__path__[0]) as servers:
            yield servers


def test_every_page_is_the_same_from_both(make_ours: Make, engine: Any, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    theirs = engine.create_backend("file", config({"file_storage_path": str(tmp_path / "files")}), HostPool())
    ours, keys = make_ours(), hashes(8)
    pool = HostPool()
    pool.fill(1)
    for backend in (ours, theirs):
        assert backend.batch_set(keys, [pool.page(number) for number in range(8)])
    for key in keys:
        assert same(
            ours.get(key, pool.get_dummy_flat_data_page()), theirs.get(key, pool.get_dummy_flat_data_page())
        )


def test_a_backend_of_ours_is_one_of_theirs(make_ours: Make) -> None:
    storage = importlib.import_module("sglang.srt.mem_cache.hicache_storage")
    assert isinstance(make_ours(), storage.HiCacheStorage)
    assert not getattr(type(make_ours()), "__abstractmethods__", None)


def test_the_engines_proxy_that_injects_faults_works_on_ours(
    make_ours: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = importlib.import_module("sglang.srt.mem_cache.hicache_storage")
    backend, pool, keys = make_ours(), HostPool(), hashes(3)
    proxy = storage.HiCacheStorageFailureInjector(backend, 0.0, 0.0)
    proxy.register_mem_pool_host(pool)
    proxy.register_mem_host_pool_v2(pool, storage.PoolName.KV)
    assert proxy.batch_set_v1(keys, indices([0, 1, 2])) == [True] * 3
    assert proxy.batch_exists_v2(keys).kv_hit_pages == 3
    assert proxy.clear() is True and proxy.batch_exists(keys) == 0
    proxy.close()


def test_an_eviction_shortens_what_the_engine_can_use(make_ours: Make) -> None:
    backend, keys = make_ours({"max_bytes": 6 * 8192}), hashes(10)
    for key in keys:
        assert backend.set(key, torch.ones(1024))
        assert backend.blocks.snapshots.flush(10)
    assert backend.batch_exists_v2(keys).kv_hit_pages == 0
    assert backend.batch_exists_v2(keys[4:]).kv_hit_pages == 6


def test_a_wrong_configuration_is_an_error_of_the_engines_start(
    engine: Any, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = {
        "backend_name": "s",
        "module_path": "snapstore.integrations.sglang",
        "class_name": "SnapstoreHiCache",
    }
    with caplog.at_level(logging.CRITICAL), pytest.raises(ValueError, match="root_dir"):
        engine.create_backend("dynamic", config(said), HostPool())
