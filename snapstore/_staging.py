"""Tensors -> host memory that the store owns.

Host tensors are copied on the calling thread, into a reused buffer; what can not change any more (evaluated MLX arrays)
and what the caller lends (``borrow``) is only looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from snapstore._format import Layout
from snapstore._memory import BufferPool, HostImage, segments_of
from snapstore.adapters import Adapter


def stage(
    adapter: Adapter, sources: Sequence[Any], layout: Layout, pool: BufferPool, *, borrow: bool
) -> HostImage:
    """The snapshot's bytes in host memory. Blocks for one copy of them, or not at all where they are only looked at."""
    if borrow or adapter.frozen_views:
        segments, keeps = adapter.view(sources)
        return HostImage(layout, segments, keeps=keeps)
    buffer = pool.take(layout.nbytes)
    try:
        adapter.copy_into(sources, layout, buffer[: layout.nbytes])
    except BaseException:
        pool.give_back(buffer)
        raise
    return HostImage(layout, segments_of(layout, buffer), on_release=_giver(pool, buffer))


def _giver(pool: BufferPool, buffer: memoryview) -> Callable[[], None]:
    return lambda: pool.give_back(buffer)
