"""The way back: a snapshot's object -> memory of the caller's own, in parts at once, each checked before it counts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from snapstore._errors import RemoteUnavailableError, SnapshotCorruptError, SnapshotNotFoundError
from snapstore._format import Facts, Header, decode_header, header_size, verify_checksums
from snapstore._memory import HostImage, allocate, copy_bytes, segments_of
from snapstore._reader import check_identity
from snapstore._records import Content, Life
from snapstore._state import State
from snapstore._types import SnapshotKey
from snapstore.remote._manifest import Entry, RemoteLife
from snapstore.remote._objects import ObjectStore
from snapstore.remote._pool import Kind, Pool, Task

FIRST_BYTES = 1024 * 1024
PART_BYTES = 16 * 1024 * 1024
"""The first part is small: while the others are on their way, its header tells what memory to get ready for them."""

_PREFIX_BYTES = 8
_HUGE_PAGE_BYTES = 2 * 1024 * 1024

_R = TypeVar("_R")


class Figures(Protocol):
    """Who counts."""

    def note_fetched(self, nbytes: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """The bytes of an object, in order, in memory that nobody writes to."""

    chunks: tuple[memoryview, ...]
    header: Header
    facts: Facts

    def copy_data(self, target: memoryview) -> None:
        """The tensors' part. Blocks for one copy."""
        for start, chunk in _offsets(iter(self.chunks)):
            _place(chunk, start - self.header.data_offset, target)


@dataclass(slots=True)
class RangedFetch:
    """One load. See ``_door.Fetch``."""

    key: SnapshotKey
    look: Callable[[], RemoteLife | None]
    objects: ObjectStore
    pool: Pool
    state: State
    timeout_s: float
    figures: Figures
    life: str = ""
    _parts: Parts | None = field(default=None)

    def read(self, memory: Callable[[Header], memoryview], *, verify: bool) -> tuple[Header, str]:
        """See ``_door.Fetch.read``."""
        for last in (False, True):  # what is gone since the look, or came altered, is looked for again
            found = self.look()
            entry = found.boundaries.get(self.key.token_count) if found else None
            if found is None or entry is None:
                raise SnapshotNotFoundError(
                    f"no snapshot of {self.key}: neither here nor in the remote store, or cleaned up",
                    key=self.key,
                )
            try:
                parts = self._read(entry, memory, verify=verify)
            except (FileNotFoundError, SnapshotCorruptError) as error:
                if last:
                    raise self._corrupt(entry, error) from error
                continue
            self.life, self._parts = found.name, parts
            self.figures.note_fetched(entry.nbytes)
            return parts.header, parts.facts.metadata_json
        raise AssertionError("the last try returns or raises")

    def keep(self, life: Life) -> None:
        """See ``_door.Fetch.keep``."""
        work = functools.partial(self._keep, life)
        self.pool.put(Task(Kind.LOCAL, work, lambda _: self.state.end_fetch(life)))

    def _read(self, entry: Entry, memory: Callable[[Header], memoryview], *, verify: bool) -> Parts:
        starts = [0, *range(min(FIRST_BYTES, PART_BYTES), entry.nbytes, PART_BYTES)]
        bounds = list(zip(starts, [*starts[1:], entry.nbytes], strict=True))
        wanted = [
            ask(self.pool, functools.partial(self._part, entry.name, *each), each[1] - each[0])
            for each in bounds
        ]
        chunks: list[memoryview] = []
        try:
            header = self._header(wanted, chunks, entry)
            facts = check_identity(header, self.key, entry.generation)
            target = memory(header)
            pages = target[::_HUGE_PAGE_BYTES]
            pages[:] = bytes(len(pages))  # faults them in while others travel
            for start, chunk in _offsets(self._arriving(wanted, chunks)):
                _place(chunk, start - header.data_offset, target)
        except BaseException:
            for each in wanted:
                each.cancel()
            raise
        if verify:
            verify_checksums(header, segments_of(header.layout, target))
        return Parts(tuple(chunks), header, facts)

    def _part(self, name: str, start: int, stop: int) -> memoryview:
        part = self.objects.get_range(name, start, stop) if stop > start else memoryview(b"")
        if len(part) != stop - start:
            raise SnapshotCorruptError(f"it ends after {start + len(part)} bytes")
        return part

    def _header(self, wanted: list[Future[memoryview]], chunks: list[memoryview], entry: Entry) -> Header:
        """From as many parts as it takes, which is one unless there are very many tensors."""
        arriving = self._arriving(wanted, chunks)
        first = next(arriving)
        size = header_size(first[:_PREFIX_BYTES], entry.nbytes)
        raw = bytes(first[:size])
        while len(raw) < size:
            raw += next(arriving)
        return decode_header(raw[:size], entry.nbytes)

    def _arriving(self, wanted: list[Future[memoryview]], chunks: list[memoryview]) -> Iterator[memoryview]:
        """Every chunk from the first on, also those that have come already."""
        for index, future in enumerate(wanted):
            if index == len(chunks):
                chunks.append(answer(future, self.timeout_s))
            yield chunks[index]

    def _corrupt(self, entry: Entry, error: Exception) -> SnapshotCorruptError:
        return SnapshotCorruptError(
            f"{entry.name} in the remote store is not the snapshot of {self.key} that was published: {error}; "
            "publish it again",
            key=self.key,
            path=entry.name,
        )

    def _keep(self, life: Life) -> None:
        parts, self._parts = self._parts, None
        assert parts is not None
        layout = parts.header.layout
        content = Content(parts.facts.framework, parts.facts.metadata_json)  # type: ignore[arg-type]
        job = self.state.keep(life, self.key, layout.nbytes, content)
        try:
            if job is None:
                return
            try:
                buffer = allocate(layout.nbytes)
                parts.copy_data(buffer)
            except BaseException as error:  # noqa: BLE001 - nobody waits for it: the save that it was has failed
                self.state.abandon(job, error)
                return
            self.state.admit(job, HostImage(layout, functools.partial(segments_of, layout, buffer)))
        finally:
            self.state.end_fetch(life)


def ask(pool: Pool, work: Callable[[], _R], nbytes: int = 0) -> Future[_R]:
    """Have a transfer thread find out."""
    future: Future[_R] = Future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            future.set_result(work())

    def failed(error: BaseException) -> None:
        with suppress(InvalidStateError):  # nobody waits any more
            future.set_exception(error)

    pool.put(Task(Kind.ASK, run, failed, nbytes))
    return future


def answer(future: Future[_R], timeout_s: float) -> _R:
    """Wait for it. ``RemoteUnavailableError``, or what the work raised."""
    try:
        return future.result(timeout_s)
    except (TimeoutError, FutureTimeoutError):
        future.cancel()
        raise RemoteUnavailableError(
            f"the remote store did not answer within {timeout_s} s; try again later"
        ) from None


def _offsets(chunks: Iterator[memoryview]) -> Iterator[tuple[int, memoryview]]:
    start = 0
    for chunk in chunks:
        yield start, chunk
        start += len(chunk)


def _place(chunk: memoryview, offset: int, target: memoryview) -> None:
    """Copy what of a chunk belongs to the target, where it would begin at ``offset``, which may be before it."""
    skipped = max(0, -offset)
    begin = max(0, offset)
    piece = chunk[skipped : skipped + max(0, len(target) - begin)]
    if len(piece):
        copy_bytes(piece, target[begin : begin + len(piece)])
