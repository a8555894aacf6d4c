"""Host memory that a device can reach by itself: one slab, locked in the background, taken and given back by the piece.

Locking pages costs 0.04 to 0.19 s a GB (``cudaHostAlloc``: 0.8), and stalls the process while it lasts, so it is done
once: at the first tensor of a device, chunk by chunk, on a thread that ends when it is done. ``take`` never locks
anything; where it has nothing to give, the caller copies into ordinary memory, which the device's thread waits for.

A copy must not cross from one chunk into the next, which is locked on its own: ``HostBuffer.pieces`` cuts there.
The slab is not inherited by a forked child (the parent's pages would change under the device), and stays mapped as
long as a page of it is locked: an address that is mapped again while a driver takes it for locked would be read wrong.
"""

from __future__ import annotations

import bisect
import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from snapstore._device import Device
from snapstore._memory import BufferPool, allocate, size_class
from snapstore._threads import Thread, Threads

CHUNK_BYTES = 64 * 1024 * 1024
_DEFAULT_SHARE = 0.05
_DEFAULT_BYTES = 2 * 1024**3

_log = logging.getLogger("snapstore.device")

_locked_slabs: list[memoryview] = []
"""Slabs with locked pages: they outlive their stores, since nobody may map those addresses again."""


@dataclass(slots=True, eq=False)
class HostBuffer:
    """Host memory for the data part of one file. ``give_back`` once, when nobody reads or writes it any more."""

    view: memoryview
    give_back: Callable[[], None]
    pinned: bool = False
    start: int = 0

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """Bytes ``begin`` to ``end``, cut where one copy must not go on."""
        while begin < end:
            room = CHUNK_BYTES - (self.start + begin) % CHUNK_BYTES if self.pinned else end - begin
            cut = min(end, begin + room)
            yield self.view[begin:cut]
            begin = cut


def pageable(pool: BufferPool, nbytes: int) -> HostBuffer:
    """Ordinary memory from a pool."""
    buffer = pool.take(nbytes)
    return HostBuffer(buffer[:nbytes], lambda: pool.give_back(buffer))


def default_limit_bytes() -> int:
    """2 GiB, or a twentieth of the memory that this process may have if that is less."""
    return min(_DEFAULT_BYTES, int(_memory_bytes() * _DEFAULT_SHARE))


def _memory_bytes() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.strip().isdigit() else machine


class PinnedPool:
    """The slab of one store. ``take`` and ``give_back`` hold a lock for microseconds; nothing here waits for a device.

    Free memory is a list of extents in the order of their addresses, joined where they touch. Sizes are rounded to few
    classes, so that in steady state each buffer finds the place of an earlier one.
    """

    def __init__(self, limit_bytes: int | None, threads: Threads) -> None:
        self._limit_bytes = limit_bytes
        self._threads = threads
        self._lock = threads.lock()
        self._slab: memoryview | None = None
        self._device: Device | None = None
        self._free: list[tuple[int, int]] = []
        self._chunks: list[memoryview] = []
        self._taken = 0
        self._closing = False
        self._thread: Thread | None = None
        self.refused: str | None = None
        """Why not all of it could be locked."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes of locked memory."""
        return sum(len(chunk) for chunk in tuple(self._chunks))

    def start(self, device: Device) -> None:
        """Begin to lock memory, if that was not begun. Returns at once."""
        if self._device is not None:
            return
        with self._lock:
            if self._device is None and not self._closing:
                self._device = device
                self._run_locked("snapstore-pinner", self._pin_all)

    def take(self, nbytes: int) -> HostBuffer | None:
        """Locked memory, if there is some free; first come, first fit."""
        with self._lock:
            if self._slab is None or self._closing:
                return None
            for size in (size_class(nbytes), -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE):
                index = next((index for index, (_, free) in enumerate(self._free) if free >= size), None)
                if index is not None:
                    break
            else:
                return None
            start, free = self._free[index]
            self._free[index : index + 1] = [(start + size, free - size)] if free > size else []
            self._taken += 1
            view = self._slab[start : start + nbytes]
        return HostBuffer(view, lambda: self._give_back(start, size), pinned=True, start=start)

    def await_started(self, timeout_s: float) -> bool:
        """Wait until the locking that was begun is over, for tests and benchmarks; False if not in time."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def close(self, timeout_s: float = 0.0) -> bool:
        """Unlock everything as soon as nobody has a buffer, on a thread; True if that has happened within the time.

        A buffer that never comes back keeps the slab: a device may still write to it.
        """
        deadline_s = self._threads.monotonic_s() + timeout_s
        with self._lock:
            self._closing = True
            self._end_locked()
            taken = self._taken
        thread = self._thread
        if thread is not None and not taken:
            thread.join(max(0.0, deadline_s - self._threads.monotonic_s()))
        return not self._chunks

    def _give_back(self, start: int, size: int) -> None:
        with self._lock:
            self._taken -= 1
            self._add_locked(start, size)
            self._end_locked()

    def _add_locked(self, start: int, size: int) -> None:
        at = bisect.bisect(self._free, (start, size))
        if at < len(self._free) and self._free[at][0] == start + size:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start:
            start, before = self._free.pop(at - 1)
            size += before
            at -= 1
        self._free.insert(at, (start, size))

    def _end_locked(self) -> None:
        busy = self._thread is not None and self._thread.is_alive()
        if self._closing and self._chunks and not self._taken and not busy:
            self._run_locked("snapstore-unpinner", self._unpin_all)

    def _run_locked(self, name: str, target: Callable[[], None]) -> None:
        thread = self._threads.thread(name, target)
        try:
            thread.start()
        except RuntimeError as error:  # the interpreter ends, or the process has as many threads as it may
            self.refused = f"{name} did not start: {error}"
            extra = {"event": "no_pinner", "reason": "device"}
            _log.warning("no_pinner: %s; host memory stays as it is", self.refused, extra=extra)
        else:
            self._thread = thread

    # -- the pinner's thread ------------------------------------------------------------------------------------

    def _pin_all(self) -> None:
        """The thread's top. Where one chunk is refused, those before it are what there is."""
        limit_bytes = default_limit_bytes() if self._limit_bytes is None else self._limit_bytes
        limit_bytes -= limit_bytes % mmap.PAGESIZE
        try:
            slab = self._slab = _map(limit_bytes)
            for start in range(0, limit_bytes, CHUNK_BYTES):
                if not self._pin(slab, start):
                    break
        except Exception as error:  # noqa: BLE001 - recorded; without it the copies are slower, and that is all
            self.refused = f"{type(error).__name__}: {error}"
            _log.warning(
                "not_pinned: only %d of %d bytes of host memory could be locked for device copies (%s); "
                "what finds no place there is copied through ordinary memory, slower",
                self.pinned_bytes,
                limit_bytes,
                self.refused,
                extra={"event": "not_pinned", "reason": "device"},
            )
        if self._closing:
            self._unpin_all()

    def _pin(self, slab: memoryview, start: int) -> bool:
        if self._closing:
            return False
        assert self._device is not None
        chunk = slab[start : start + CHUNK_BYTES]
        _touch(chunk)
        if not self._chunks:
            _locked_slabs.append(slab)
        self._device.pin(chunk)
        with self._lock:
            self._chunks.append(chunk)
            self._add_locked(start, len(chunk))
        return True

    def _unpin_all(self) -> None:
        assert self._device is not None
        with self._lock:
            if self._taken:
                return
            self._free.clear()
        try:
            while self._chunks:
                self._device.unpin(self._chunks[-1])
                self._chunks.pop()
        except Exception as error:  # noqa: BLE001 - recorded; the slab stays where it is
            extra = {"event": "stays_pinned", "reason": "device"}
            _log.warning(
                "stays_pinned: %d bytes of host memory stay locked: %s", self.pinned_bytes, error, extra=extra
            )
            return
        _locked_slabs[:] = [each for each in _locked_slabs if each is not self._slab]
        self._slab = None


def _map(nbytes: int) -> memoryview:
    slab = allocate(nbytes)
    area = slab.obj
    if isinstance(area, mmap.mmap) and hasattr(mmap, "MADV_DONTFORK"):
        area.madvise(mmap.MADV_DONTFORK)
    return slab


def _touch(chunk: memoryview) -> None:
    """Have every page there, without the GIL: what the driver locks page by page is there already."""
    start = (ctypes.c_char * len(chunk)).from_buffer(chunk)
    ctypes.memset(start, 0, len(chunk))
