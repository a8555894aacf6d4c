"""What the workloads share: snapshots of a size, stores on a fresh root, files written raw."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from snapstore import SnapshotStore, StoreOptions

KiB, MiB = 1024, 1024 * 1024
FOLDER = os.environ.get("SNAPSTORE_BENCH_DIR")
"""Where the files go; the machine's temporary folder by default."""


def numpy_tensors(count: int, nbytes: int) -> dict[str, Any]:
    """``count`` arrays of 16-bit numbers, ``nbytes`` in all."""
    random = np.random.default_rng(0)
    return {
        f"layer.{i}": random.integers(0, 60000, nbytes // count // 2, dtype=np.uint16) for i in range(count)
    }


def torch_tensors(count: int, nbytes: int) -> dict[str, Any]:
    """The same in bfloat16."""
    import torch

    return {name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for name, array in
            numpy_tensors(count, nbytes).items()}  # fmt: skip


def mlx_tensors(count: int, nbytes: int) -> dict[str, Any]:
    """The same in MLX, evaluated."""
    import mlx.core as mx

    arrays = {name: mx.array(array).view(mx.bfloat16) for name, array in numpy_tensors(count, nbytes).items()}
    mx.eval(*arrays.values())
    return arrays


@contextmanager
def fresh_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="snapstore-bench-", dir=FOLDER) as folder:
        yield Path(folder)


@contextmanager
def fresh_store(**options: Any) -> Iterator[SnapshotStore]:
    """A store on a root of its own, gone at the end."""
    with fresh_folder() as folder:
        store = SnapshotStore(folder / "root", StoreOptions(**options))
        try:
            yield store
        finally:
            store.shutdown(cleanup=True, timeout_s=120)


def write_raw(path: Path, buffer: memoryview) -> None:
    """One buffer to one new file, by one ``write`` after another: the limit of every drain."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        while buffer:
            buffer = buffer[os.write(fd, buffer) :]
    finally:
        os.close(fd)
