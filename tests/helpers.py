"""What the tests of the store share: small tensors, comparisons, and a look at what is really on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from snapstore import Snapshot, SnapshotStore


def tensors(seed: int = 0, nbytes: int = 4096) -> dict[str, Any]:
    """A small snapshot of two tensors that differs with the seed."""
    random = np.random.default_rng(seed)
    return {
        "ssm": random.standard_normal((2, max(1, nbytes // 16)), dtype=np.float32),
        "conv": random.integers(0, 255, max(1, nbytes // 2), dtype=np.uint8),
    }


def assert_same(snapshot: Snapshot, expected: dict[str, Any]) -> None:
    assert list(snapshot.tensors) == list(expected)
    for name, tensor in expected.items():
        got = snapshot.tensors[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert got.tobytes() == tensor.tobytes(), name


def files_below(path: Path) -> list[str]:
    """Every snapshot, temporary file and piece of trash of a session, by path; it may change meanwhile."""
    housekeeping = {"owner.lock", "owner.json"}
    return sorted(
        (Path(folder) / name).relative_to(path).as_posix()
        for folder, _, names in os.walk(path)
        for name in names
        if name not in housekeeping
    )


def assert_at_rest(store: SnapshotStore) -> None:
    """Nothing pending, nothing left over, counters in balance, and the files are exactly the live snapshots."""
    stats = store.stats()
    assert stats.pending == 0 and stats.pending_bytes == 0
    assert stats.accepted == stats.committed + stats.cancelled + stats.failed
    assert stats.accepted_bytes == stats.committed_bytes + stats.cancelled_bytes + stats.failed_bytes
    assert stats.live_snapshots == len(files_below(store.session))
