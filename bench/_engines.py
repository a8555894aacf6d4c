"""Engines' own disk backends, with a snapshot as the one page or chunk that it is to them: flat, under a key.

``make bench-peers`` makes the environment in which they import. Each is given what is easiest for it: a page that
lies in one piece, where the snapshot has its tensors apart.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench._peers import imported
from bench._work import MiB, fresh_folder

PATIENCE_S = 60.0


class DiskBackend(Protocol):
    """Pages of one size, each one file of ``folder``."""

    name: str
    folder: Path

    def page(self) -> Any:
        """The bytes of the case, where the backend writes them from. It is the caller's until ``drop``."""

    def put(self, number: int, page: Any) -> None:
        """Hand a page over, under a key; back when the caller may go on."""

    def settle(self) -> None:
        """Return when all that was put is in its file."""

    def get(self, number: int) -> Any:
        """A page in host memory, to be dropped as well."""

    def drop(self, page: Any) -> None:
        """Give the memory of a page back."""

    def forget(self) -> None:
        """Remove every page."""


def disk_backends(stack: ExitStack, nbytes: int) -> Iterator[DiskBackend]:
    """Those whose packages import here, each on a folder of its own."""
    if (sglang := imported("sglang.srt.mem_cache.hicache_storage", SGLang.name)) is not None:
        yield SGLang(sglang, stack.enter_context(fresh_folder()), nbytes)
    os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
    if (lmcache := imported("lmcache.v1.storage_backend", LMCache.name)) is not None:
        yield LMCache(stack, lmcache, stack.enter_context(fresh_folder()), nbytes)


class SGLang:
    """HiCache's file backend. ``set`` writes and renames, and returns then; ``get`` reads into the caller's page."""

    name = "SGLang's file backend"

    def __init__(self, module: Any, folder: Path, nbytes: int) -> None:
        import torch

        sizes = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
        flags = dict.fromkeys(("is_mla_model", "enable_storage_metrics", "is_page_first_layout"), False)
        config = module.HiCacheStorageConfig(**sizes, **flags, model_name="bench")
        self.folder = folder
        self._backend = module.HiCacheFile(config, str(folder))
        if self._backend.file_path != str(folder):
            raise ValueError("unset SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR: it would be measured there")
        self._nbytes = nbytes
        self._page = torch.from_numpy(_flat(nbytes))

    def page(self) -> Any:
        return self._page

    def put(self, number: int, page: Any) -> None:
        if not self._backend.set(str(number), page):
            raise OSError(f"{self.name} did not take page {number}")

    def settle(self) -> None:
        """It has been written when ``put`` returns."""

    def get(self, number: int) -> Any:
        import torch

        page = self._backend.get(str(number), torch.empty(self._nbytes, dtype=torch.uint8))
        if page is None:
            raise LookupError(f"{self.name} has no page {number}")
        return page

    def drop(self, page: Any) -> None:
        """Tensors free themselves."""

    def forget(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


class LMCache:
    """The local disk backend, behind the pool in host memory that it takes chunks from and gives them back in."""

    name = "LMCache's local disk backend"

    def __init__(self, stack: ExitStack, module: Any, folder: Path, nbytes: int) -> None:
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata

        config = LMCacheEngineConfig.from_defaults(
            local_cpu=False,
            max_local_cpu_size=(3 * nbytes + 64 * MiB) / 2**30,
            local_disk=str(folder),
            max_local_disk_size=2.0**20,
        )
        ranks = {"world_size": 1, "local_world_size": 1, "worker_id": 0, "local_worker_id": 0}
        shape = (1, 2, 256, 1, 1)
        metadata = LMCacheMetadata(model_name="bench", **ranks, kv_dtype=torch.uint8, kv_shape=shape)
        backends = module.CreateStorageBackends(config, metadata, stack.enter_context(_loop()))
        for backend in backends.values():
            stack.callback(backend.close)
        self.folder = folder
        self._pool, self._disk = backends["LocalCPUBackend"], backends["LocalDiskBackend"]
        self._key: Callable[[int], Any] = lambda number: CacheEngineKey("bench", 1, 0, number, torch.uint8)
        self._source = _flat(nbytes)
        self._shape, self._dtype = torch.Size([nbytes]), torch.uint8
        self._put: list[int] = []
        self._written = threading.Semaphore(0)
        self._unwritten = 0

    def page(self) -> Any:
        chunk = self._pool.allocate(self._shape, self._dtype, busy_loop=False)
        if chunk is None:
            raise MemoryError(f"{self.name} has no room for another chunk: one was not dropped")
        np.copyto(chunk.tensor.numpy(), self._source)
        return chunk

    def put(self, number: int, page: Any) -> None:
        self._put.append(number)
        self._unwritten += 1
        self._disk.submit_put_task(self._key(number), page, on_complete_callback=self._on_written)

    def _on_written(self, _: Any) -> None:
        self._written.release()

    def settle(self) -> None:
        while self._unwritten:
            if not self._written.acquire(timeout=PATIENCE_S):
                raise TimeoutError(f"{self.name} did not write {self._unwritten} chunks in {PATIENCE_S} s")
            self._unwritten -= 1

    def get(self, number: int) -> Any:
        chunk = self._disk.get_blocking(self._key(number))
        if chunk is None:
            raise LookupError(f"{self.name} has no chunk {number}")
        return chunk

    def drop(self, page: Any) -> None:
        page.ref_count_down()

    def forget(self) -> None:
        for number in self._put:
            self._disk.remove(self._key(number))
        self._put.clear()


def _flat(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What a snapshot of so many bytes is to an engine."""
    return np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own, as LMCache's storage manager keeps one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="bench-lmcache", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
