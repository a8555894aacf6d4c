"""Faults on demand, for snapstore's tests and for its users': a disk and a device that do what a test tells them.

``FaultyFileSystem`` pauses, fails, delays and shortens file operations; ``MemoryFileSystem`` is a disk in memory,
and ``RecordingFileSystem`` one that tells what a power cut at any moment may leave of it;
``FakeDevice`` (needs numpy) has tensors whose copies complete when the test says so. A ``Gate`` is where they stop a
thread.
"""

from typing import TYPE_CHECKING, Any

from snapstore.testing._faults import OPERATIONS, FaultyFileSystem, Gate
from snapstore.testing._memory import MemoryFileSystem
from snapstore.testing._power import PowerCut, RecordingFileSystem

if TYPE_CHECKING:
    from snapstore.testing._fake_device import FakeDevice, FakeTensor

__all__ = [
    "OPERATIONS",
    "FakeDevice",
    "FakeTensor",
    "FaultyFileSystem",
    "Gate",
    "MemoryFileSystem",
    "PowerCut",
    "RecordingFileSystem",
]


def __getattr__(name: str) -> Any:
    """``FakeDevice`` and ``FakeTensor``, imported on use: the rest works without numpy."""
    if name not in ("FakeDevice", "FakeTensor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from snapstore.testing import _fake_device

    return getattr(_fake_device, name)
