"""``BlockStore``: plain keys -> opaque bytes, for engines whose interface knows blocks and no requests.

    blocks = BlockStore(root, max_bytes=20 * GiB)
    blocks.put(key, memoryview)          # a key names its content: what is there already is not written again
    blocks.get_into(key, memoryview)     # True, or False: a miss
    blocks.count_leading(keys)           # how many of a prefix are there

It is a way to name things in a ``SnapshotStore``, which does all the rest: a key's hash says which of ``FOLDERS``
"requests" it belongs to, so which directory, and which "boundary" it is there. The key itself is in the file, and is
compared. Over ``max_bytes`` the blocks that were used longest ago are discarded. One process owns a store; with
``leftovers="adopt"`` (the default here) the next one goes on with what it left, in no order of use.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from snapstore._errors import (
    DiskQuotaError,
    SaveFailedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
)
from snapstore._files import FileSystem
from snapstore._options import StoreOptions
from snapstore._store import SnapshotStore
from snapstore._ticket import SaveTicket
from snapstore._types import ShutdownReport, SnapshotKey

__all__ = ["FOLDERS", "BlockStats", "BlockStore"]

FOLDERS = 1024
"""Directories that the blocks are spread over."""

FILE_BYTES = 4096
"""What a file takes at most beside its data: its header, and the rest of its last block."""

_BYTES = "bytes"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlockStats:
    """What happened since the store was opened.

    Attributes:
        blocks: blocks that are there now, pending ones included.
        used_bytes: bytes on disk and pending, now.
        hits, misses: of ``get`` and ``get_into``.
        stored, stored_bytes: blocks that were accepted; those that were there already are not counted.
        discarded: blocks that made room for others, or could not be read.
    """

    blocks: int
    used_bytes: int
    hits: int
    misses: int
    stored: int
    stored_bytes: int
    discarded: int


class BlockStore:
    """See the header of this module. Every method may be called from any thread.

    Args:
        root: directory of the store; one for each process that is to find its blocks again.
        options: of the store behind it; ``leftovers="adopt"`` by default.
        max_bytes: most bytes on disk and pending, or ``None``.
        file_system: the disk, for tests; see ``snapstore.testing``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        options: StoreOptions | None = None,
        *,
        max_bytes: int | None = None,
        file_system: FileSystem | None = None,
    ) -> None:
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise ValueError(
                f"max_bytes must be a whole number of bytes, 1 or more, or None, not {max_bytes!r}"
            )
        self._max_bytes = max_bytes
        self._store = SnapshotStore(root, options or StoreOptions(leftovers="adopt"), file_system=file_system)
        self._lock = threading.Lock()
        self._tally = dict.fromkeys(("hits", "misses", "stored", "stored_bytes", "discarded"), 0)
        folders = ((folder, self._store.boundaries(folder)) for folder in map(_folder_name, range(FOLDERS)))
        self._used: OrderedDict[SnapshotKey, None] = OrderedDict(
            (SnapshotKey(folder, number), None) for folder, numbers in folders for number in numbers
        )
        """The order of use, the oldest first. May name a block that is gone; never misses one that is there."""

    @property
    def snapshots(self) -> SnapshotStore:
        """The store behind it: statistics, health, flush."""
        return self._store

    def put(self, key: str, block: Any, *, borrow: bool = False) -> SaveTicket | None:
        """Take the bytes of a contiguous buffer; ``None`` if the key is there already. Waits for room, bounded.

        When it returns, the buffer may be overwritten; with ``borrow`` not before ``ticket.released``. Blocks for a
        disk only where room must be made for it. Raises what ``SnapshotStore.save`` raises, ``DiskQuotaError`` too.
        """
        where = _place(key)
        if self._store.has(*_pair(where)):
            self._touch(where)
            return None
        flat = np.frombuffer(block, dtype=np.uint8)
        self._make_room(flat.nbytes)
        self._touch(where)  # before it is there: a block that nobody could discard would stay for ever
        ticket = self._store.save(*_pair(where), {_BYTES: flat}, metadata={"key": key}, borrow=borrow)
        self._touch(where)  # again: an earlier block in its place may have been discarded in between
        self._count(stored=1, stored_bytes=flat.nbytes)
        return ticket

    def get(self, key: str) -> memoryview | None:
        """The bytes, in memory of the caller's own, or ``None``. What can not be read is one WARNING, and discarded."""
        where = _place(key)
        try:
            snapshot = self._store.load(*_pair(where), framework="numpy")
        except SnapshotNotFoundError:
            self._count(misses=1)
            return None
        except (SaveFailedError, SnapshotCorruptError, OSError) as error:
            _log.warning("block %.64r is lost: %s: %s", key, type(error).__name__, error)
            self._count(misses=1)
            self.discard(key)
            return None
        if snapshot.metadata != {"key": key} or _BYTES not in snapshot.tensors:
            self._count(misses=1)
            return None
        self._touch(where)
        self._count(hits=1)
        return memoryview(snapshot.tensors[_BYTES])

    def get_into(self, key: str, target: Any) -> bool:
        """Copy the bytes to a writable contiguous buffer of exactly that length; False if there are no such bytes."""
        place = memoryview(target).cast("B")
        found = self.get(key)
        if found is not None and len(found) != len(place):
            _log.warning("block %.64r has %d bytes, and %d were asked for", key, len(found), len(place))
            found = None
        if found is None:
            return False
        np.copyto(np.frombuffer(place, dtype=np.uint8), np.frombuffer(found, dtype=np.uint8))
        return True

    def has(self, key: str) -> bool:
        """True if it is there, pending or on disk. Never blocks for a disk."""
        return self._store.has(*_pair(_place(key)))

    def count_leading(self, keys: Iterable[str]) -> int:
        """How many keys are there before the first that is not. Never blocks for a disk."""
        count = 0
        for key in keys:
            if not self.has(key):
                break
            count += 1
        return count

    def mark_used(self, keys: Iterable[str]) -> None:
        """These were used just now: they are discarded later than others."""
        for key in keys:
            if self.has(key):
                self._touch(_place(key))

    def discard(self, key: str) -> bool:
        """Remove one block that is on disk. Blocks for the disk. False: it is not there, or is being written."""
        where = _place(key)
        with self._lock:
            self._used.pop(where, None)
        return self._discard(where)

    def clear(self, *, timeout_s: float | None = None) -> bool:
        """Forget every block, with one wait; False if something is still in the making, to be undone."""
        report = self._store.cleanup_all(timeout_s=timeout_s)
        with self._lock:
            kept = [where for where in self._used if self._store.has(*_pair(where))]  # put since
            self._used = OrderedDict.fromkeys(kept)
        return report.clean

    def stats(self) -> BlockStats:
        """Counters of now. Never blocks for a disk."""
        stats = self._store.stats()
        with self._lock:
            return BlockStats(
                stats.live_snapshots + stats.pending, stats.session_bytes + stats.pending_bytes, **self._tally
            )

    def shutdown(self, *, cleanup: bool = False, timeout_s: float | None = None) -> ShutdownReport:
        """``SnapshotStore.shutdown``: what was accepted is written, and stays for the next one."""
        return self._store.shutdown(cleanup=cleanup, timeout_s=timeout_s)

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, trace)

    # -- room ---------------------------------------------------------------------------------------------------

    def _make_room(self, nbytes: int) -> None:
        """Discard from the oldest on until there is room for so much more; each block is tried once.

        Nothing is discarded for what would not fit into an empty store.
        """
        if self._max_bytes is None:
            return
        if nbytes + FILE_BYTES > self._max_bytes:
            raise _no_room(nbytes, self._max_bytes, self._missing_bytes(nbytes), "which its file exceeds")
        with self._lock:
            tries = len(self._used)
        while (missing := self._missing_bytes(nbytes)) > 0:
            with self._lock:
                where = self._used.popitem(last=False)[0] if self._used and tries else None
            if where is None:
                raise _no_room(nbytes, self._max_bytes, missing, "and nothing else can be discarded now")
            tries -= 1
            self._discard(where)

    def _missing_bytes(self, nbytes: int) -> int:
        stats = self._store.stats()
        return stats.session_bytes + stats.pending_bytes + nbytes + FILE_BYTES - (self._max_bytes or 0)

    def _discard(self, where: SnapshotKey) -> bool:
        """What was taken out of the order of use is put back if it stays: it is on its way to the disk."""
        gone = False
        try:
            gone = self._store._discard(where)
        finally:
            if not gone and self._store.has(*_pair(where)):
                self._touch(where)
        self._count(discarded=gone)
        return gone

    def _touch(self, where: SnapshotKey) -> None:
        with self._lock:
            self._used[where] = None
            self._used.move_to_end(where)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, count in more.items():
                self._tally[name] += count


def _no_room(nbytes: int, limit_bytes: int, missing_bytes: int, why: str) -> DiskQuotaError:
    error = DiskQuotaError(f"a block of {nbytes} bytes does not fit: max_bytes is {limit_bytes}, {why}")
    error.nbytes, error.limit_bytes = nbytes, limit_bytes
    error.used_bytes = limit_bytes + missing_bytes - nbytes
    return error


def _folder_name(number: int) -> str:
    return f"blocks/{number:03x}"


def _place(key: str) -> SnapshotKey:
    """Which folder, and which number in it: 10 and 63 bits of the key's hash."""
    if not isinstance(key, str):
        raise TypeError(f"a key must be a str, not {type(key).__name__}")
    digest = hashlib.sha256(key.encode()).digest()
    folder = int.from_bytes(digest[:2], "big") % FOLDERS
    return SnapshotKey(_folder_name(folder), int.from_bytes(digest[8:16], "big") >> 1)


def _pair(where: SnapshotKey) -> tuple[str, int]:
    return where.request_id, where.token_count
