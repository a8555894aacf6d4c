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
def modules(kept: dict[str, types.ModuleType] | None = None, **stood_in: types.ModuleType) -> Iterator[None]:
    """No engine but these modules, and nothing that has seen another one, within the block.

    What was imported meanwhile is in ``kept`` afterwards, to be given again: some of an engine loads only once.
    """
    before = _take_out()
    sys.modules.update(kept or {})
    sys.modules.update({name.replace("__", "."): each for name, each in stood_in.items()})
    try:
        yield
    finally:
        loaded = _take_out()
        if kept is not None:
            kept.update(loaded)
        sys.modules.update(before)


def _take_out() -> dict[str, types.ModuleType]:
    roots = tuple(f"{name}." for name in FORGET)
    names = [name for name in sys.modules if name in FORGET or name.startswith(roots)]
    return {name: sys.modules.pop(name) for name in names}


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


def around_sglang(folder: str) -> dict[str, types.ModuleType]:
    """SGLang's own files in ``folder``. Of ``sglang.srt.utils``, which imports all the rest, one function is enough."""
    package = module("sglang")
    package.__path__ = [folder]
    return {
        "sglang": package,
        "sglang__srt__utils": module("sglang.srt.utils"),
        "sglang__srt__utils__common": module("sglang.srt.utils.common", human_readable_int=str),
    }


# --- vLLM ---


class LookupResult(enum.Enum):
    MISS = enum.auto()
    HIT = enum.auto()
    HIT_PENDING = enum.auto()
    RETRY = enum.auto()


class Medium(str, enum.Enum):
    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(str, enum.Enum):
    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


@dataclass(frozen=True)
class MetricMetadata:
    documentation: str
    labelnames: tuple[str, ...] = ()


@dataclass
class RequestOffloadingContext:
    policy: str = "chunk_level"


@dataclass
class TransferJob:
    job_id: int
    keys: Any
    chunk_ids: Any
    is_promotion: bool
    req_context: Any


@dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: Any = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


@dataclass
class OffloadingConnectorStats:
    values: dict[str, Any] = field(default_factory=dict)

    def set_gauge(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        self.values[name] = (labels, value)

    increase_counter = set_gauge


@dataclass
class FileMapper:
    base_path: str
    rank: int = 0

    @classmethod
    def from_offloading_spec(
        cls, root_dir: str, offloading_spec: Any, blocks_per_file: int, parallel_agnostic: bool
    ) -> FileMapper:
        assert blocks_per_file == offloading_spec.blocks_per_chunk and parallel_agnostic
        return cls(f"{root_dir}/{offloading_spec.config.model.name.replace('/', '_')}_{blocks_per_file}")


class SecondaryTierManager(abc.ABC):
    medium: Any = None

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
    ) -> None:
        self._primary_kv_view = primary_kv_view
        self.block_size_bytes = (primary_kv_view.strides or (0,))[0]
        self.tier_type = tier_type
        self.locality: Any = None

    @abc.abstractmethod
    def lookup(self, key: Any, req_context: Any) -> Any: ...

    @abc.abstractmethod
    def submit_store(self, job_metadata: Any) -> None: ...

    @abc.abstractmethod
    def submit_load(self, job_metadata: Any) -> None: ...

    @abc.abstractmethod
    def get_finished_jobs(self) -> Any: ...

    @abc.abstractmethod
    def on_new_request(self, req_context: Any) -> Any: ...

    @abc.abstractmethod
    def drain_jobs(self) -> None: ...

    def on_schedule_end(self, context: Any) -> None:
        return None


def vllm() -> dict[str, types.ModuleType]:
    """For ``modules(**vllm())``."""
    base = module(
        "vllm.v1.kv_offload.base",
        Locality=Locality,
        LookupResult=LookupResult,
        Medium=Medium,
        OffloadKey=bytes,
        OffloadingCounterMetadata=MetricMetadata,
        OffloadingGaugeMetadata=MetricMetadata,
        ReqContext=object,
        RequestOffloadingContext=RequestOffloadingContext,
    )
    tiering = module(
        "vllm.v1.kv_offload.tiering.base",
        TIER_LABEL="tier",
        JobResult=JobResult,
        SecondaryTierManager=SecondaryTierManager,
        TransferJob=TransferJob,
    )
    connector = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics"
    made = {
        "vllm.v1.kv_offload.base": base,
        "vllm.v1.kv_offload.file_mapper": module("file_mapper", FileMapper=FileMapper),
        "vllm.v1.kv_offload.tiering.base": tiering,
        connector: module("metrics", OffloadingConnectorStats=OffloadingConnectorStats),
    }
    for name in list(made):
        parts = name.split(".")
        for count in range(1, len(parts)):
            parent = ".".join(parts[:count])
            made.setdefault(parent, module(parent))
    return {name.replace(".", "__"): each for name, each in made.items()}
