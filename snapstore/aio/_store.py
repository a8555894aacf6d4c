"""``AsyncSnapshotStore``: what an asynchronous server talks to."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from snapstore._arguments import checked_key, checked_request_id, timeout_or
from snapstore._cleanup import Cleaning
from snapstore._committed import CommittedFile, gone
from snapstore._engine import Engine
from snapstore._errors import StoreClosedError
from snapstore._options import StoreOptions, seconds
from snapstore._records import Commit, Job
from snapstore._saving import Offer, fulfil, offered
from snapstore._store import SnapshotStore, check_ending
from snapstore._ticket import SaveTicket
from snapstore._types import (
    CleanupReport,
    Framework,
    ShutdownReport,
    Snapshot,
    SnapshotInfo,
    SnapshotKey,
    StoreHealth,
    StoreStats,
)
from snapstore.aio._crew import Crew, outcome_of, ring
from snapstore.aio._stream import MiB, Stream, close_unused
from snapstore.aio._turnstile import Turnstile

THREADS = 8
"""Calls that may wait for a disk at once; further ones wait for their turn."""

_REST_POLL_S = 0.02
"""No bell tells that a device does not read any more: its thread polls the device too."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class AsyncSnapshotStore:
    """A ``SnapshotStore`` for asyncio. Its methods are the store's, and raise what those raise.

    For one event loop; give each loop its own, over the same store.

    Args:
        root: directory of a store that is opened by ``async with`` (or ``open``), or an open ``SnapshotStore``.
        options: of the store that is opened.
        threads: how many calls may wait for the disk at once.
    """

    def __init__(
        self,
        root: SnapshotStore | str | os.PathLike[str],
        options: StoreOptions | None = None,
        *,
        threads: int = THREADS,
    ) -> None:
        if isinstance(root, SnapshotStore) and options is not None:
            raise ValueError("the store is open and has its options; give either it, or a root with options")
        self._crew = Crew(threads)
        self._turnstile = Turnstile()
        self._let_go = weakref.finalize(self, self._crew.release)
        self._let_go.atexit = False
        self._opened = root if isinstance(root, SnapshotStore) else None
        self._opening: Future[SnapshotStore] | None = None
        self._open = functools.partial(SnapshotStore, root, options)  # type: ignore[arg-type]

    @property
    def store(self) -> SnapshotStore:
        """The store behind it. ``StoreClosedError`` before it is open."""
        if self._opened is None:
            raise StoreClosedError("the store is not open yet; use `async with`, or await open()")
        return self._opened

    @property
    def options(self) -> StoreOptions:
        """The store's."""
        return self.store.options

    @property
    def threads(self) -> int:
        """Threads that were started for calls that may hang; never more than the bound."""
        return self._crew.threads

    async def open(self) -> AsyncSnapshotStore:
        """Open the store, once. ``RootError`` if the directory can not be used."""
        if self._opened is None:
            if self._opening is None or (self._opening.done() and self._opening.exception()):
                self._opening = self._crew.submit(self._open)
            self._opened = await outcome_of(self._opening)
        return self

    # -- save and load ------------------------------------------------------------------------------------------

    async def save(
        self,
        request_id: str,
        token_count: int,
        tensors: Mapping[str, Any],
        *,
        metadata: Any = None,
        borrow: bool = False,
    ) -> SaveTicket:
        """``SnapshotStore.save``: checks and copy are made here, on the loop's thread; only room is awaited.

        Cancelled while it awaits room, it saves nothing.
        """
        engine = self._engine
        key = checked_key(request_id, token_count)
        offer = offered(engine, key, tensors, metadata, borrow=borrow)
        return fulfil(engine, offer, await self._reserve(engine, offer))

    async def _reserve(self, engine: Engine, offer: Offer) -> Job:
        """The one way in of ``State``, with a turn of its own. Nothing is awaited between getting room and using it."""
        state = engine.state
        turn = state.queue_up(*offer.wanted)
        ending: BaseException | None = None
        try:
            return await self._until(lambda: state.enter(turn), turn.deadline_s)
        except BaseException as error:
            ending = error
            raise
        finally:
            state.leave(turn, ending)

    async def load(
        self, request_id: str, token_count: int, *, framework: Framework | None = None, device: Any = None
    ) -> Snapshot:
        """``SnapshotStore.load``, on one of the threads; one at a time as long as they are quick."""
        load = self.store.load
        async with self._turnstile.turn():
            return await self._run(load, request_id, token_count, framework=framework, device=device)

    def stream(
        self, key: SnapshotKey, chunk_bytes: int = MiB, *, start: int = 0, stop: int | None = None
    ) -> Stream:
        """The bytes of a committed file, in chunks: an async iterator, and an async context manager.

        A snapshot that is pending is awaited. Opened before its first chunk, it is whole whatever is cleaned up then.

        Args:
            key: of the snapshot, as in ``SnapshotInfo.key``.
            chunk_bytes: at most so many at once.
            start: the first byte.
            stop: the byte after the last; the end of the file by default.
        """
        for name, value, least in (("chunk_bytes", chunk_bytes, 1), ("start", start, 0), ("stop", stop, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, not {value}")
        key = checked_key(key.request_id, key.token_count)
        return Stream(functools.partial(self._open_committed, key), self._crew, chunk_bytes, start, stop)

    async def _open_committed(self, key: SnapshotKey) -> CommittedFile:
        engine = self._engine
        missing: Commit | None = None
        while True:
            commit = await self._committed(key, math.inf)
            opening = self._crew.submit(CommittedFile, engine.files, commit.info)
            try:
                return await outcome_of(opening)
            except asyncio.CancelledError:
                close_unused(opening)
                raise
            except FileNotFoundError as error:
                if commit is missing:
                    raise gone(commit.info) from error
                missing = commit  # a cleanup or a later save came between the look and the open: look again

    # -- look ---------------------------------------------------------------------------------------------------

    async def has(self, request_id: str, token_count: int, *, remote: bool = False) -> bool:
        """``SnapshotStore.has``, answered on the loop; with ``remote`` on one of the threads, if it is not here."""
        if not remote or self.store.has(request_id, token_count):
            return self.store.has(request_id, token_count)
        return await self._run(self.store.has, request_id, token_count, remote=True)

    async def boundaries(self, request_id: str) -> tuple[int, ...]:
        """``SnapshotStore.boundaries``, answered on the loop."""
        return self.store.boundaries(request_id)

    async def latest(
        self, request_id: str, *, at_most: int | None = None, remote: bool = False
    ) -> int | None:
        """``SnapshotStore.latest``, answered on the loop; with ``remote`` on one of the threads."""
        if not remote:
            return self.store.latest(request_id, at_most=at_most)
        return await self._run(self.store.latest, request_id, at_most=at_most, remote=True)

    def stats(self) -> StoreStats:
        """``SnapshotStore.stats``: not a coroutine, since it never blocks."""
        return self.store.stats()

    def health(self) -> StoreHealth:
        """``SnapshotStore.health``: not a coroutine, since it never blocks."""
        return self.store.health()

    # -- wait ---------------------------------------------------------------------------------------------------

    async def flush(self, timeout_s: float | None = None) -> bool:
        """``SnapshotStore.flush``. Takes no thread."""
        deadline_s = _deadline_s(timeout_s)
        tickets = self._engine.state.tickets()
        return await self._until_true(lambda: all(ticket.done() for ticket in tickets), deadline_s)

    async def drain_request(self, request_id: str, *, timeout_s: float) -> bool:
        """``SnapshotStore.drain_request``. Takes no thread."""
        request_id = checked_request_id(request_id)
        deadline_s = time.monotonic() + seconds(timeout_s, "timeout_s")
        engine = self._engine
        tickets, resting = engine.state.tickets(request_id), engine.staging.resting(request_id)

        def at_rest() -> bool:
            return resting() and all(ticket.released for ticket in tickets)

        if await self._until_true(at_rest, deadline_s, poll_s=_REST_POLL_S):
            return True
        # Takes back what no device has begun to read.
        return self.store.drain_request(request_id, timeout_s=0)

    async def detach(
        self,
        request_id: str,
        token_count: int,
        destination: str | os.PathLike[str],
        *,
        timeout_s: float = 30.0,
    ) -> Path:
        """``SnapshotStore.detach``: the commit is awaited here, the file moved on one of the threads.

        Cancelled once a thread has it in hand, it is moved all the same; before, it is not.
        """
        key = checked_key(request_id, token_count)
        deadline_s = time.monotonic() + seconds(timeout_s, "timeout_s")
        await self._committed(key, deadline_s)

        def move() -> Path:
            left_s = max(0.0, deadline_s - time.monotonic())
            return self.store.detach(request_id, token_count, destination, timeout_s=left_s)

        moving = self._crew.submit(move)
        try:
            timer = asyncio.get_running_loop().call_later(deadline_s - time.monotonic(), moving.cancel)
            try:
                return await outcome_of(moving)
            finally:
                timer.cancel()
        except asyncio.CancelledError:
            moving.cancel()
            raise
        except CancelledError:
            raise TimeoutError(f"{key} was not detached: every thread waits for the disk") from None

    async def publish(
        self, request_id: str, token_count: int | None = None, *, timeout_s: float
    ) -> tuple[SnapshotInfo, ...]:
        """``SnapshotStore.publish``, on one of the threads."""
        return await self._run(self.store.publish, request_id, token_count, timeout_s=timeout_s)

    # -- forget -------------------------------------------------------------------------------------------------

    async def cleanup_request(self, request_id: str, *, timeout_s: float | None = None) -> CleanupReport:
        """``SnapshotStore.cleanup_request``: forgotten before the first await, whatever becomes of the wait."""
        request_id = checked_request_id(request_id)
        timeout_s = timeout_or(timeout_s, self.options.cleanup_request_timeout_s)
        return await self._clean([request_id], timeout_s)

    async def cleanup_all(self, *, timeout_s: float | None = None) -> CleanupReport:
        """``SnapshotStore.cleanup_all``: forgotten before the first await. One wait, however many requests."""
        timeout_s = timeout_or(timeout_s, self.options.cleanup_all_timeout_s)
        return await self._clean(None, timeout_s)

    async def _clean(self, request_ids: list[str] | None, timeout_s: float) -> CleanupReport:
        cleaning = Cleaning(self._engine.state, request_ids)
        await self._until_true(lambda: cleaning.over, time.monotonic() + timeout_s)
        return cleaning.end(waited=timeout_s > 0)

    async def shutdown(self, *, cleanup: bool = False, timeout_s: float | None = None) -> ShutdownReport:
        """``SnapshotStore.shutdown``: goes on although the await is cancelled. Ends the threads too."""
        ending = self.store.begin_shutdown(cleanup=cleanup, timeout_s=timeout_s)
        self._let_go()
        return await outcome_of(ending)

    async def __aenter__(self) -> AsyncSnapshotStore:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        report = await self.shutdown(cleanup=False)
        if error is None:
            check_ending(self.store, report)

    def __repr__(self) -> str:
        return f"<AsyncSnapshotStore of {self._opened!r}>"

    # -- how it waits -------------------------------------------------------------------------------------------

    @property
    def _engine(self) -> Engine:
        engine = self.store._engine
        engine.check_process()
        return engine

    async def _run(self, work: Callable[_P, _R], *args: _P.args, **options: _P.kwargs) -> _R:
        """For calls that only look. Cancelled before a thread has it in hand, it is not made."""
        future = self._crew.submit(work, *args, **options)
        try:
            return await outcome_of(future)
        except asyncio.CancelledError:
            future.cancel()
            raise

    async def _committed(self, key: SnapshotKey, deadline_s: float) -> Commit:
        """Wait until the snapshot is on disk; raises what ``load`` raises, and ``TimeoutError``."""
        state = self._engine.state

        def look() -> Commit | None:
            found = state.commit_of(key)
            if found is None and time.monotonic() >= deadline_s:
                raise TimeoutError(f"{key} is not on disk yet; try again later")
            return found

        return await self._until(look, deadline_s)

    async def _until_true(
        self, look: Callable[[], bool], deadline_s: float, *, poll_s: float = math.inf
    ) -> bool:
        """What ``look`` says at the deadline, or True as soon as it does."""

        def over() -> bool | None:
            return True if look() else False if time.monotonic() >= deadline_s else None

        return await self._until(over, deadline_s, poll_s=poll_s)

    async def _until(
        self, look: Callable[[], _R | None], deadline_s: float, *, poll_s: float = math.inf
    ) -> _R:
        """Call ``look`` on the loop, at each change in the store and at the deadline, until it has an answer."""
        answer = look()
        if answer is not None:
            return answer
        loop, bell = asyncio.get_running_loop(), asyncio.Event()
        with self.store._engine.state.watched(functools.partial(ring, loop, bell)):
            while (answer := look()) is None:
                wait_s = min(poll_s, max(0.0, deadline_s - time.monotonic()))
                timer = None if math.isinf(wait_s) else loop.call_later(wait_s, bell.set)
                try:
                    await bell.wait()
                finally:
                    if timer is not None:
                        timer.cancel()
                bell.clear()
        return answer


def _deadline_s(timeout_s: float | None) -> float:
    return math.inf if timeout_s is None else time.monotonic() + seconds(timeout_s, "timeout_s")
