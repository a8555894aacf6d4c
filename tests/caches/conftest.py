"""A real store for the caches, with a file system that can be stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from snapstore import SnapshotStore
from snapstore.testing import FaultyFileSystem


@pytest.fixture
def files() -> FaultyFileSystem:
    return FaultyFileSystem()


@pytest.fixture
def store(root: Path, files: FaultyFileSystem) -> Iterator[SnapshotStore]:
    store = SnapshotStore(root, file_system=files)
    yield store
    files.heal()
    assert store.shutdown(cleanup=True).clean
