"""A committed file as an async iterator of its bytes."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from aiofiles.threadpool import wrap

from snapstore._committed import CommittedFile
from snapstore._types import SnapshotInfo
from snapstore.aio._crew import Crew

MiB = 1024 * 1024

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Stream(AsyncIterator[bytes]):
    """The bytes of a committed file, in chunks of ``chunk_bytes`` (the last one shorter).

    The file is opened by ``open``, ``async with`` or the first chunk, whichever comes first; from then on no cleanup
    can cut it short, nor can a shutdown. It is closed at its end, by ``close``, by ``async with``, or on collection.
    """

    def __init__(
        self,
        opening: Callable[[], Awaitable[CommittedFile]],
        crew: Crew,
        chunk_bytes: int,
        start: int,
        stop: int | None,
    ) -> None:
        self._opening = opening
        self._crew = crew
        self._chunk_bytes = chunk_bytes
        self._start = start
        self._stop = stop
        self._opened: _Opened | None = None
        self._closed = False

    @property
    def info(self) -> SnapshotInfo:
        """What is read. Once it is open."""
        return self._file.info

    @property
    def nbytes(self) -> int:
        """Length of the whole file, header included. Once it is open."""
        return self._file.nbytes

    @property
    def tag(self) -> str:
        """Differs for every file, also for two saves of one key. Once it is open."""
        return self._file.tag

    @property
    def _file(self) -> CommittedFile:
        if self._opened is None:
            raise ValueError("the stream is not open yet, or closed")
        return self._opened.file

    async def open(self) -> Stream:
        """Wait for the commit and open the file. Raises what ``load`` raises."""
        if self._closed:
            raise ValueError("the stream is closed")
        if self._opened is None:
            self._opened = _Opened(await self._opening(), self._crew)
            self._opened.file.seek(self._start)
        return self

    def limit(self, start: int, stop: int) -> None:
        """Read from byte ``start`` up to, not with, ``stop``. Before the first chunk, once it is open."""
        self._start, self._stop = start, stop
        self._file.seek(start)

    def close(self) -> None:
        """Let the file go, when the read that is under way has ended. Never blocks."""
        self._closed = True
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    async def __anext__(self) -> bytes:
        if self._closed:
            raise StopAsyncIteration
        await self.open()
        wanted = self._chunk_bytes
        if self._stop is not None:
            wanted = min(wanted, self._stop - self._start)
        chunk = b"" if wanted <= 0 or self._opened is None else await self._opened.read(wanted)
        if not chunk:
            self.close()
            raise StopAsyncIteration
        self._start += len(chunk)
        return chunk

    async def __aenter__(self) -> Stream:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """``close``, by the name that asynchronous generators have for it."""
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_opened", None) is not None:
            self.close()


class _Opened:
    """An open file, and the executor that aiofiles reads it with: it remembers the last read, so that none is cut."""

    def __init__(self, file: CommittedFile, crew: Crew) -> None:
        self.file = file
        self._lane = _Lane(crew)
        self._buffered = io.BufferedReader(file, 1)
        self._reader: Any = wrap(self._buffered, executor=self._lane)
        crew.hold()

    async def read(self, nbytes: int) -> bytes:
        chunk: bytes = await self._reader.read(nbytes)
        return chunk

    def close(self) -> None:
        self._lane.last.add_done_callback(lambda _: self._close_on_the_crew())

    def _close_on_the_crew(self) -> None:
        crew = self._lane.crew
        try:
            crew.submit(self._buffered.close)
        finally:
            crew.release()


class _Lane(Executor):
    """The crew, for one file: one read after the other."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.last: Future[Any] = Future()
        self.last.set_result(None)

    def submit(self, work: Callable[_P, _R], /, *args: _P.args, **options: _P.kwargs) -> Future[_R]:
        future = self.crew.submit(work, *args, **options)
        self.last = future
        return future


def close_unused(opening: Future[CommittedFile]) -> None:
    """For an open that nobody waits for any more: on the thread that makes it, when it comes."""
    if not opening.cancel():
        opening.add_done_callback(_close_if_opened)


def _close_if_opened(opening: Future[CommittedFile]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
