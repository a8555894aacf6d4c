"""What the tests of devices share: arrays on a fake device, stores that give up soon, and a look at what arrived."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from snapstore import SnapshotStore, StoreOptions
from snapstore.testing import FakeDevice, FaultyFileSystem

PINNED_BYTES = 1024 * 1024
PATIENCE_S = float(os.environ.get("SNAPSTORE_PATIENCE_S", "10"))
"""How long a test waits for what must come; less where it is known that it will not (``test_device_faults``)."""


@contextmanager
def open_store(
    root: Path, *devices: FakeDevice, files: FaultyFileSystem | None = None, **options: Any
) -> Iterator[SnapshotStore]:
    """A store, and at the end everything let go: it ends clean, and no device has read what was freed."""
    own = {"device_timeout_s": 20.0, "shutdown_timeout_s": PATIENCE_S, "max_pinned_bytes": PINNED_BYTES}
    store = SnapshotStore(root, StoreOptions(**own | options), file_system=files)
    yield store
    for device in devices:
        device.automatic = True
    wait_for(lambda: not any(each.status == "stuck" for each in store.health().devices))
    report = store.shutdown(cleanup=True)
    assert report.clean, report
    assert [fault for device in devices for fault in device.faults] == []


def arrays(seed: int = 0, nbytes: int = 4096) -> dict[str, np.ndarray]:
    """Three arrays whose widths differ, so that the file has them in another order than the caller."""
    random = np.random.default_rng(seed)
    return {
        "conv": random.integers(0, 255, max(1, nbytes // 4), dtype=np.uint8),
        "ssm": random.standard_normal((2, max(1, nbytes // 16))),
        "state": random.integers(-9, 9, (3, 5, 1), dtype=np.int16),
    }


def on(device: FakeDevice, host: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: device.tensor(array) for name, array in host.items()}


def assert_holds(tensors: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        got = np.asarray(tensors[name])
        assert (got.dtype, got.shape) == (array.dtype, array.shape), name
        assert got.tobytes() == array.tobytes(), name


def assert_loads(store: SnapshotStore, request_id: str, token_count: int, expected: dict[str, Any]) -> None:
    assert_holds(store.load(request_id, token_count).tensors, expected)


def wait_for(predicate: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """For what no event announces: that a thread of the store has come to a call."""
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.001)
