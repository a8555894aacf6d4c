"""SGLang's HiCache on snapstore: a storage backend that SGLang loads by configuration.

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "snapstore",
        "module_path": "snapstore.integrations.sglang", "class_name": "SnapstoreHiCache",
        "root_dir": "/var/tmp/hicache", "max_bytes": 100000000000}'

Each rank has a store of its own below ``root_dir``, named by model and place in the parallel layout; a server that is
started again finds its pages there. A page is readable as soon as ``set`` returns, and written in the background. Pools
with the hit policy ``TRAILING_PAGES`` (Mamba and sliding-window states) hold boundary snapshots: of them only the pages
at a boundary are there, and ``batch_exists_v2`` says at which lengths a prefix can be restored.

What a rank stores only that rank finds. So a model whose ranks share their pages (MLA with more than one rank) is
refused rather than never hit.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from snapstore._errors import SnapstoreError
from snapstore._options import StoreOptions
from snapstore.blocks import BlockStore

__all__ = ["SnapstoreHiCache"]

_READ, _WRITTEN = "read", "written"
_GB = 1e9

_log = logging.getLogger(__name__)


class SnapstoreHiCache(HiCacheStorage):  # type: ignore[misc]
    """Pages of the KV cache by their hash, and of other pools beside them. False or ``None`` is a miss, never an error.

    Args:
        storage_config: SGLang's. Read from ``extra_config``: ``root_dir``; ``max_bytes`` on disk, unlimited by
            default; ``leftovers`` (``"adopt"`` by default) and ``max_pending_bytes``, see ``StoreOptions``.
        kwargs: what SGLang passes beside it; not used.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        extra = dict(storage_config.extra_config or {})
        if "root_dir" not in extra:
            raise ValueError('the extra config of the storage backend must name a "root_dir"')
        if storage_config.is_mla_model and storage_config.tp_size > 1:
            raise ValueError(
                "with MLA all ranks read what one has stored, and a snapstore session is one process's: "
                "use another storage backend, or one rank"
            )
        options = {name: extra[name] for name in ("leftovers", "max_pending_bytes") if name in extra}
        self._blocks = BlockStore(
            Path(extra["root_dir"]) / _rank_name(storage_config),
            StoreOptions(**{"leftovers": "adopt", **options}),
            max_bytes=extra.get("max_bytes"),
        )
        self.registered_pools: dict[str, Any] = {}
        self._measures = storage_config.enable_storage_metrics
        self._meters = threading.Lock()
        self._moved: dict[str, list[tuple[int, float]]] = {_READ: [], _WRITTEN: []}

    @property
    def blocks(self) -> BlockStore:
        """The store behind it."""
        return self._blocks

    # -- one page -----------------------------------------------------------------------------------------------

    def get(
        self, key: str, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> torch.Tensor | None:
        """The page in ``target_location``, or as flat bytes where none is given; ``None`` if it is not there."""
        if target_location is None:
            found = self._blocks.get(key)
            return None if found is None else torch.frombuffer(found, dtype=torch.uint8)
        flat = (
            target_location
            if target_location.is_contiguous()
            else torch.empty_like(target_location).contiguous()
        )
        if not self._blocks.get_into(key, _bytes_of(flat)):
            return None
        if flat is not target_location:
            target_location.copy_(flat)
        return target_location

    def set(
        self,
        key: str,
        value: Any | None = None,
        target_location: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Take a page; when it returns, its memory may be used again. False, with one WARNING: there is no room."""
        source = value if value is not None else target_location
        if source is None:
            raise ValueError("set needs a value or a target_location to take the page from")
        try:
            self._blocks.put(key, _bytes_of(source.contiguous()))
        except (SnapstoreError, OSError) as error:
            _log.warning("page %.64s is not stored: %s: %s", key, type(error).__name__, error)
            return False
        return True

    def exists(self, key: str) -> bool:
        """True if ``get`` would find it. Never waits for a disk."""
        return self._blocks.has(key)

    # -- many pages ---------------------------------------------------------------------------------------------

    def batch_get(
        self, keys: list[str], target_locations: Any | None = None, target_sizes: Any | None = None
    ) -> list[torch.Tensor | None]:
        """``get`` for each key."""
        targets = target_locations if target_locations is not None else [None] * len(keys)
        with self._measured(_READ) as pages:
            found = [self.get(key, target) for key, target in zip(keys, targets, strict=True)]
            pages += [page.nbytes for page in found if page is not None]
        return found

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """``set`` for each key until one fails: pages after a gap are of no use."""
        sources = values if values is not None else target_locations
        if sources is None:
            raise ValueError("batch_set needs values or target_locations to take the pages from")
        with self._measured(_WRITTEN) as pages:
            for key, value in zip(keys, sources, strict=True):
                if not self.set(key, value):
                    return False
                pages.append(value.nbytes)
        return True

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many keys are there before the first that is not."""
        return self._blocks.count_leading(keys)

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Pages into the host pool, ``page_size`` indices each. Whether each was found."""
        return self._with_pages(PoolName.KV, self.mem_pool_host, keys, host_indices, _READ)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Pages out of the host pool. Whether each was taken."""
        return self._with_pages(PoolName.KV, self.mem_pool_host, keys, host_indices, _WRITTEN)

    # -- many pages of several pools ----------------------------------------------------------------------------

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """The longest prefix that the KV pool and every other pool can restore, and all lengths at which they can."""
        pages = self._blocks.count_leading(keys)
        hits: dict[str, int] = {PoolName.KV: pages} if pages else {}
        restorable = list(range(1, pages + 1))
        for transfer in pool_transfers or []:
            if not restorable:
                break
            possible = self._restorable(transfer, keys[:pages])
            if possible:
                hits[transfer.name] = max(possible)
            restorable = [length for length in restorable if length in possible]
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Pages into the host pools. For each pool whether each page was found."""
        return self._with_pools(transfers, _READ)

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Pages out of the host pools. For each pool whether each page was taken."""
        return self._with_pools(transfers, _WRITTEN)

    # -- the end ------------------------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Forget every page. False, with one WARNING: one is still in the making, to be undone."""
        clean = self._blocks.clear()
        if not clean:
            _log.warning("a page is still being written; it will be removed")
        return clean

    def close(self) -> None:
        """Write what was taken, and end the threads. The pages stay for the next start. Twice is fine."""
        report = self._blocks.shutdown()
        if not report.clean:
            _log.warning(
                "%d pages were not written in time; %s", len(report.abandoned), "; ".join(report.errors)
            )

    def get_stats(self) -> Any:
        """SGLang's ``StorageMetrics`` since the last call, or ``None`` if they are not enabled; see also ``blocks``."""
        if not self._measures:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._meters:
            moved, self._moved = self._moved, {_READ: [], _WRITTEN: []}
        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in moved[_READ]],
            backup_pgs=[pages for pages, _ in moved[_WRITTEN]],
            prefetch_bandwidth=[rate for _, rate in moved[_READ]],
            backup_bandwidth=[rate for _, rate in moved[_WRITTEN]],
        )

    # -- within -------------------------------------------------------------------------------------------------

    def _restorable(self, transfer: PoolTransfer, keys: Sequence[str]) -> frozenset[int]:
        """The lengths of a prefix at which this pool has what it needs."""
        there = [self._blocks.has(_pool_key(transfer.name, key)) for key in keys]
        if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
            whole = there.index(False) if False in there else len(there)
            return frozenset(range(1, whole + 1))
        if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
            window = max(1, len(transfer.keys or ()))
            ends = range(1, len(there) + 1)
            return frozenset(end for end in ends if all(there[max(0, end - window) : end]))
        raise ValueError(f"the hit policy {transfer.hit_policy} of pool {transfer.name} is not supported")

    def _with_pools(self, transfers: list[PoolTransfer], way: str) -> dict[str, list[bool]]:
        return {
            each.name: self._with_pages(
                each.name, self.registered_pools[each.name], each.keys or [], each.host_indices, way
            )
            for each in transfers
        }

    def _with_pages(
        self,
        pool_name: str,
        pool: Any,
        keys: Sequence[str],
        host_indices: torch.Tensor | None,
        way: str,
    ) -> list[bool]:
        page_size = getattr(pool, "page_size", 1) or 1
        given = 0 if host_indices is None else host_indices.numel()
        if host_indices is None or given != len(keys) * page_size:
            _log.warning("pool %s: %d indices for %d pages of %d", pool_name, given, len(keys), page_size)
            return [False] * len(keys)
        firsts = host_indices[::page_size].tolist()
        act = self._read if way == _READ else self._write
        with self._measured(way) as pages:
            moved = [
                act(_pool_key(pool_name, key), pool, first) for key, first in zip(keys, firsts, strict=True)
            ]
            pages += [nbytes for nbytes in moved if nbytes is not None]
        return [nbytes is not None for nbytes in moved]

    def _read(self, key: str, pool: Any, index: int) -> int | None:
        page = self.get(key, pool.get_dummy_flat_data_page())
        if page is None:
            return None
        pool.set_from_flat_data_page(index, page)
        return page.nbytes

    def _write(self, key: str, pool: Any, index: int) -> int | None:
        page = pool.get_data_page(index, flat=True)
        return page.nbytes if self.set(key, page) else None

    @contextmanager
    def _measured(self, way: str) -> Iterator[list[int]]:
        """Gives a list for the sizes of the pages that are moved, and notes how many and how fast."""
        pages: list[int] = []
        began_s = time.perf_counter()
        yield pages
        if self._measures and pages:
            rate = sum(pages) / _GB / max(time.perf_counter() - began_s, 1e-9)
            with self._meters:
                self._moved[way].append((len(pages), rate))


def _pool_key(pool_name: str, key: str) -> str:
    return key if pool_name == PoolName.KV else f"{key}.{pool_name!s}"


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous host tensor of any dtype."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _rank_name(config: HiCacheStorageConfig) -> str:
    """A folder's name for this model and this rank: readable, and different wherever pages would be."""
    model = config.model_name or ""
    ranks = ("tp", "pp", "attn_cp", "dcp")
    said = [model, config.dp_rank, config.is_mla_model, config.is_page_first_layout]
    said += [getattr(config, f"{name}_{what}") for name in ranks for what in ("rank", "size")]
    digest = hashlib.sha256(repr(said).encode()).hexdigest()[:12]
    readable = "".join(
        char if char.isalnum() and char.isascii() else "-" for char in model.rsplit("/", 1)[-1]
    )[:40]
    return f"{readable}-tp{config.tp_rank}of{config.tp_size}-{digest}"
