"""For tests on a real GPU: CUDA is awake before the checks for leaks look, and nothing of ours is left on it after."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapstore import SnapshotStore


@pytest.fixture(scope="session", autouse=True)
def cuda_is_awake() -> bool:
    import torch
    from gpu_tools import wake

    if torch.cuda.is_available():
        wake()
    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def no_leaked_descriptor(no_stray_file: None) -> None:
    """Not looked for here: a driver opens what it wants."""


@pytest.fixture(autouse=True)
def no_leaked_device_memory(cuda_is_awake: bool) -> Iterator[None]:
    """What a test allocated on the device is free again when it is over."""
    if not cuda_is_awake:
        yield
        return
    import torch

    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.fixture
def store(root: Path) -> Iterator[SnapshotStore]:
    from gpu_tools import open_store

    with open_store(root) as store:
        yield store
