"""Faults on demand, for snapstore's tests and for its users': a disk and a device that do what a test tells them.

``FaultyFileSystem`` pauses, fails, delays and shortens file operations; ``MemoryFileSystem`` is a disk in memory,
and ``RecordingFileSystem`` one that tells what a power cut at any moment may leave of it;
``FakeDevice`` (needs numpy) has tensors whose copies complete when the test says so. A ``Gate`` is where they stop a
thread. ``explore`` (needs greenlet) runs a scenario in a ``World`` in many schedules, and ``replay`` one of them again.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from snapstore.testing._faults import OPERATIONS, FaultyFileSystem, Gate
from snapstore.testing._memory import MemoryFileSystem
from snapstore.testing._power import PowerCut, RecordingFileSystem

if TYPE_CHECKING:
    from snapstore.testing._explore import ScheduleError, explore, explore_all, replay
    from snapstore.testing._fake_device import FakeDevice, FakeTensor
    from snapstore.testing._world import DeadlockError, World

__all__ = [
    "OPERATIONS",
    "DeadlockError",
    "FakeDevice",
    "FakeTensor",
    "FaultyFileSystem",
    "Gate",
    "MemoryFileSystem",
    "PowerCut",
    "RecordingFileSystem",
    "ScheduleError",
    "World",
    "explore",
    "explore_all",
    "replay",
]

_ON_USE = {
    "DeadlockError": "_world",
    "FakeDevice": "_fake_device",
    "FakeTensor": "_fake_device",
    "ScheduleError": "_explore",
    "World": "_world",
    "explore": "_explore",
    "explore_all": "_explore",
    "replay": "_explore",
}


def __getattr__(name: str) -> Any:
    """What needs numpy or greenlet, imported on use: the rest works without them."""
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_USE[name]}"), name)
