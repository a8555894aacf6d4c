"""``AsyncSnapshotStore``: the same verbs as coroutines. The event loop never waits for a disk or a device.

What needs neither (``has``, ``boundaries``, ``latest``, ``stats``, ``health``) is answered on the loop. Everything else
runs on a few threads of the store's own: a call that hangs costs one of them, never the loop, and never more than there
are. Cancelling an await abandons the wait, not the work: a cleanup is done although nobody waits for it any more.

    async with AsyncSnapshotStore("/var/tmp/engine") as store:
        ticket = await store.save("request-1", 1024, tensors)
        info = await ticket
        async for chunk in await store.stream("request-1", 1024):
            ...

For asyncio (the files are read with aiofiles, which is for asyncio only).
"""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import aiofiles

from snapstore._errors import StoreClosedError, StoreFullError
from snapstore._options import StoreOptions
from snapstore._store import SnapshotStore
from snapstore._ticket import SaveTicket
from snapstore._types import (
    CleanupReport,
    Framework,
    ShutdownReport,
    Snapshot,
    StoreHealth,
    StoreStats,
)

__all__ = ["AsyncSnapshotStore"]

THREADS = 8
"""Calls that may wait for a disk at once; further ones wait for their turn."""

MiB = 1024 * 1024

_P = ParamSpec("_P")
_R = TypeVar("_R")


class AsyncSnapshotStore:
    """A ``SnapshotStore`` for event loops. Its methods are the store's, and raise what those raise.

    Args:
        root: directory of a store that is opened by ``async with`` (or ``open``), or an open ``SnapshotStore``.
        options: of the store that is opened.
        threads: how many calls may wait for disk or device at once.
    """

    def __init__(
        self,
        root: SnapshotStore | str | os.PathLike[str],
        options: StoreOptions | None = None,
        *,
        threads: int = THREADS,
    ) -> None:
        if isinstance(root, SnapshotStore) and options is not None:
            raise ValueError(
                "the store is open already and has its options; give either it or a root with options"
            )
        self._root = root
        self._options = options
        self._opened = root if isinstance(root, SnapshotStore) else None
        self._crew = _Crew(threads)

    @property
    def store(self) -> SnapshotStore:
        """The store behind it."""
        if self._opened is None:
            raise StoreClosedError("the store is not open yet; use `async with`, or await open()")
        return self._opened

    async def open(self) -> AsyncSnapshotStore:
        """Open the store. ``RootError`` if the directory can not be used."""
        if self._opened is None:
            self._opened = await self._run(SnapshotStore, self._root, self._options)  # type: ignore[arg-type]
        return self

    async def save(
        self,
        request_id: str,
        token_count: int,
        tensors: Mapping[str, Any],
        *,
        metadata: Any = None,
        borrow: bool = False,
    ) -> SaveTicket:
        """``SnapshotStore.save``: the copy is made here, on the loop's thread; only room is awaited.

        Cancelled while it awaits room, it saves nothing.
        """
        store = self.store
        offer = store._offer(request_id, token_count, tensors, metadata=metadata, borrow=borrow)
        try:
            job = store._reserve(offer, wait=False)
        except StoreFullError:
            if store.options.on_full == "reject":
                raise
            waiting = self._crew.submit(store._reserve, offer, wait=True)
            try:
                job = await asyncio.shield(asyncio.wrap_future(waiting))
            except asyncio.CancelledError as error:
                waiting.add_done_callback(functools.partial(store._withdraw, error))
                raise
        return store._fulfil(offer, job)

    async def load(
        self, request_id: str, token_count: int, *, framework: Framework | None = None, device: Any = None
    ) -> Snapshot:
        """``SnapshotStore.load``."""
        return await self._run(self.store.load, request_id, token_count, framework=framework, device=device)

    async def has(self, request_id: str, token_count: int) -> bool:
        """``SnapshotStore.has``, answered on the loop."""
        return self.store.has(request_id, token_count)

    async def boundaries(self, request_id: str) -> tuple[int, ...]:
        """``SnapshotStore.boundaries``, answered on the loop."""
        return self.store.boundaries(request_id)

    async def latest(self, request_id: str, *, at_most: int | None = None) -> int | None:
        """``SnapshotStore.latest``, answered on the loop."""
        return self.store.latest(request_id, at_most=at_most)

    async def detach(
        self,
        request_id: str,
        token_count: int,
        destination: str | os.PathLike[str],
        *,
        timeout_s: float = 30.0,
    ) -> Path:
        """``SnapshotStore.detach``."""
        return await self._run(self.store.detach, request_id, token_count, destination, timeout_s=timeout_s)

    async def cleanup_request(self, request_id: str, *, timeout_s: float | None = None) -> CleanupReport:
        """``SnapshotStore.cleanup_request``: forgotten before the first await, whatever becomes of the wait."""
        return await self._finish(self.store._begin_cleanup([request_id], timeout_s))

    async def cleanup_all(self, *, timeout_s: float | None = None) -> CleanupReport:
        """``SnapshotStore.cleanup_all``: forgotten before the first await."""
        return await self._finish(self.store._begin_cleanup(None, timeout_s))

    async def flush(self, timeout_s: float | None = None) -> bool:
        """``SnapshotStore.flush``."""
        return await self._run(self.store.flush, timeout_s)

    async def drain_request(self, request_id: str, *, timeout_s: float) -> bool:
        """``SnapshotStore.drain_request``."""
        return await self._run(self.store.drain_request, request_id, timeout_s=timeout_s)

    def stats(self) -> StoreStats:
        """``SnapshotStore.stats``: never blocks."""
        return self.store.stats()

    def health(self) -> StoreHealth:
        """``SnapshotStore.health``: never blocks."""
        return self.store.health()

    async def stream(
        self, request_id: str, token_count: int, *, chunk_bytes: int = MiB
    ) -> AsyncIterator[bytes]:
        """The bytes of a committed file, in chunks. It is open when this returns: a cleanup can not cut it short.

        A snapshot that is pending is committed first. Awaited, it gives the iterator.
        """
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be 1 or more, not {chunk_bytes}")
        fd = await self._run(self.store._open_committed, request_id, token_count)
        return _chunks(fd, chunk_bytes, self._crew)

    async def shutdown(self, *, cleanup: bool = False, timeout_s: float | None = None) -> ShutdownReport:
        """``SnapshotStore.shutdown``: goes on although the await is cancelled."""
        ending = self.store._begin_shutdown(cleanup=cleanup, timeout_s=timeout_s)
        report = await asyncio.shield(asyncio.wrap_future(ending))
        self._crew.shutdown(wait=False)
        return report

    async def __aenter__(self) -> AsyncSnapshotStore:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown(cleanup=False)

    async def _finish(self, wait: Callable[[], CleanupReport] | CleanupReport) -> CleanupReport:
        return wait if isinstance(wait, CleanupReport) else await self._run(wait)

    async def _run(self, work: Callable[_P, _R], *args: _P.args, **options: _P.kwargs) -> _R:
        """On one of the threads. The shield lets the work go on when the await is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(self._crew.submit(work, *args, **options)))


async def _chunks(fd: int, chunk_bytes: int, crew: Executor) -> AsyncIterator[bytes]:
    async with aiofiles.open(fd, "rb", buffering=0, executor=crew) as file:
        while chunk := await file.read(chunk_bytes):
            yield chunk


class _Crew(Executor):
    """At most so many daemon threads, started as they are needed: a call that hangs can not keep the process from ending."""

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"threads must be 1 or more, not {most}")
        self._most = most
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, work: Callable[_P, _R], /, *args: _P.args, **options: _P.kwargs) -> Future[_R]:
        """Have a thread do it; ``StoreClosedError`` after shutdown."""
        future: Future[_R] = Future()
        with self._lock:
            if self._closed:
                raise StoreClosedError("the store is shut down; open a new one")
            self._work.put((future, functools.partial(work, *args, **options)))
            if self._idle:
                self._idle -= 1
            elif self._threads < self._most:
                self._threads += 1
                name = f"snapstore-aio-{self._threads}"
                threading.Thread(target=self._serve, name=name, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end when what is submitted is done; never waits."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in range(self._threads):
                    self._work.put(None)

    def _serve(self) -> None:
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """A function of its own, so that an idle thread keeps nothing of the last call alive."""
        item = self._work.get()
        if item is None:
            return False
        future, work = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - a thread's top: the error is the caller's
                future.set_exception(error)
        with self._lock:
            self._idle += 1
        return True
