"""The promise of ``snapstore.caches``, for any model: a restored cache continues as the live one did, byte for byte.

The comparison is with the live cache that went on, not with one pass over the whole prompt: the libraries themselves
do not give the same bytes for a prompt in chunks and in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from snapstore import SnapshotStore, caches
from snapstore.testing import FaultyFileSystem

TOKENS = 21
BOUNDARIES = (6, 17, 19)
"""After chunks: before the sliding windows of the tiny models are full, and after. Then amid the decoding."""

STEPS = ((0, 3), (3, 6), (6, 12), (12, 17), *((token, token + 1) for token in range(17, TOKENS)))
"""Prefill in chunks, then decode token by token, as (start, stop) in tokens."""

Step = Callable[[Any, int, int], bytes]
"""Run a model over tokens [start, stop) with a cache, which it updates; the logits, as bytes."""


def check(store: SnapshotStore, files: FaultyFileSystem, fresh: Callable[[], Any], step: Step) -> None:
    """Save at the boundaries of a live run, go on; then continue from memory, and from disk."""
    with files.pause("create", ".tmp") as gate:
        expected = _live_run(store, fresh(), step)
        gate.wait_reached()  # the writer holds the first snapshot, the others are queued: nothing is on disk
        for boundary in BOUNDARIES:
            _continue(store, boundary, "memory", fresh, step, expected)
    assert store.flush(10)
    for boundary in BOUNDARIES:
        _continue(store, boundary, "disk", fresh, step, expected)
        start, stop = next(each for each in STEPS if each[0] == boundary)
        assert step(fresh(), start, stop) != expected[start], (
            "an empty cache gives the same: nothing was tested"
        )


def _live_run(store: SnapshotStore, cache: Any, step: Step) -> dict[int, bytes]:
    answers = {}
    for start, stop in STEPS:
        if start in BOUNDARIES:
            tensors, metadata = caches.capture(cache)
            store.save("request", start, tensors, metadata=metadata)
        answers[start] = step(cache, start, stop)
    return answers


def _continue(
    store: SnapshotStore,
    boundary: int,
    source: str,
    fresh: Callable[[], Any],
    step: Step,
    expected: dict[int, bytes],
) -> None:
    snapshot = store.load("request", boundary)
    assert snapshot.source == source
    passed = fresh()
    cache = caches.restore(snapshot, passed)
    assert cache is passed
    assert caches.capture(cache)[1] == snapshot.metadata
    for start, stop in STEPS:
        if start >= boundary:
            assert step(cache, start, stop) == expected[start], f"tokens {start} to {stop}, from {source}"


def logits(tensor: Any) -> bytes:
    """The bytes of a model's output, of either framework. float32 holds what a smaller type can."""
    if type(tensor).__module__ == "torch":
        return bytes(tensor.float().numpy().tobytes())
    import mlx.core as mx

    return np.array(tensor.astype(mx.float32)).tobytes()
