"""An object on its way here: asked for in parts at once, copied from as they come, and left as it came."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future

from snapstore._errors import SnapshotCorruptError
from snapstore._memory import copy_bytes
from snapstore.remote._asking import answer, ask
from snapstore.remote._manifest import Entry
from snapstore.remote._objects import ObjectStore
from snapstore.remote._pool import Pool

PART_BYTES = 16 * 1024 * 1024
"""No part is smaller, but of an object that is: below that, a second request costs more than it brings."""


class Arriving:
    """The object that a manifest's entry names. For one thread at a time."""

    def __init__(self, objects: ObjectStore, pool: Pool, entry: Entry, timeout_s: float) -> None:
        self.entry = entry
        self._timeout_s = timeout_s
        count = max(1, entry.nbytes // PART_BYTES)
        self._bounds = [entry.nbytes * index // count for index in range(count + 1)]
        self._coming: list[Future[memoryview]] = [
            ask(pool, functools.partial(_part, objects, entry.name, start, stop), stop - start)
            for start, stop in zip(self._bounds, self._bounds[1:], strict=False)
        ]
        self._parts: list[memoryview] = []

    def fill(self, buffer: memoryview, offset: int) -> int:
        """See ``_reader.Fill``. Blocks for the network, bounded, and for one copy."""
        done = 0
        for piece in self._pieces(offset, offset + len(buffer)):
            copy_bytes(piece, buffer[done : done + len(piece)])
            done += len(piece)
        return done

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes where they lie, which nobody writes to; copied only where they are of several parts."""
        pieces = list(self._pieces(start, stop))
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def give_up(self) -> None:
        """Nobody wants the rest."""
        for each in self._coming:
            each.cancel()

    def _pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        stop = min(stop, self.entry.nbytes)
        while start < stop:
            index = bisect_right(self._bounds, start) - 1
            begin, end = self._bounds[index : index + 2]
            yield self._part(index)[start - begin : min(stop, end) - begin]
            start = end

    def _part(self, index: int) -> memoryview:
        for future in self._coming[len(self._parts) : index + 1]:
            self._parts.append(answer(future, self._timeout_s))
        return self._parts[index]


def _part(objects: ObjectStore, name: str, start: int, stop: int) -> memoryview:
    part = objects.get_range(name, start, stop)
    if len(part) != stop - start:
        raise SnapshotCorruptError(f"it ends after {start + len(part)} bytes")
    return part
