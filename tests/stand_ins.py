"""Engines' abstract interfaces, as small as snapstore's integrations need them, for tests without the engines.

The names, fields and signatures are those of the versions that README names; ``tests/engines`` runs the same contracts
inside the engines' own files, which is where a difference would show.
"""

from __future__ import annotations

import abc
import enum
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FORGET = ("sglang", "vllm", "snapstore.integrations.sglang", "snapstore.integrations.vllm")


@contextmanager
def modules(**stood_in: types.ModuleType) -> Iterator[None]:
    """No engine but these modules, and nothing that has seen another one, within the block."""

    def concerned() -> dict[str, types.ModuleType]:
        roots = tuple(f"{name}." for name in FORGET)
        return {name: each for name, each in sys.modules.items() if name in FORGET or name.startswith(roots)}

    before = concerned()
    for name in before:
        del sys.modules[name]
    sys.modules.update({name.replace("__", "."): each for name, each in stood_in.items()})
    try:
        yield
    finally:
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(before)


def module(name: str, **content: Any) -> types.ModuleType:
    """A module with this content; a package, so that others may be below it."""
    made = types.ModuleType(name)
    made.__path__ = []  # type: ignore[attr-defined]
    vars(made).update(content)
    return made


# --- SGLang ---


class PoolName(str, enum.Enum):
    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    INDEXER = "indexer"

    def __str__(self) -> str:
        return self.value


class PoolHitPolicy(str, enum.Enum):
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class HiCacheStorageConfig:
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    dp_rank: int = 0
    extra_config: dict[str, Any] | None = None
    dcp_size: int = 1
    dcp_rank: int = 0


@dataclass
class PoolTransfer:
    name: Any
    host_indices: Any = None
    device_indices: Any = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


@dataclass
class StorageMetrics:
    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


class HiCacheStorage(abc.ABC):
    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        self.registered_pools[host_pool_name] = host_pool  # type: ignore[attr-defined]

    @abc.abstractmethod
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any: ...

    @abc.abstractmethod
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any: ...

    @abc.abstractmethod
    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool: ...

    @abc.abstractmethod
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool: ...

    @abc.abstractmethod
    def exists(self, key: str) -> bool: ...


def sglang() -> dict[str, types.ModuleType]:
    """For ``modules(**sglang())``."""
    storage = module(
        "sglang.srt.mem_cache.hicache_storage",
        HiCacheStorage=HiCacheStorage,
        HiCacheStorageConfig=HiCacheStorageConfig,
        HiCacheStorageExtraInfo=object,
        PoolHitPolicy=PoolHitPolicy,
        PoolName=PoolName,
        PoolTransfer=PoolTransfer,
        PoolTransferResult=PoolTransferResult,
    )
    return {
        **{
            name.replace(".", "__"): module(name) for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache")
        },
        "sglang__srt__observability": module("sglang.srt.observability"),
        "sglang__srt__mem_cache__hicache_storage": storage,
        "sglang__srt__observability__metrics_collector": module("metrics", StorageMetrics=StorageMetrics),
    }
