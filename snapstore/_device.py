"""What snapstore asks of a device that tensors live on: torch's CUDA (and ROCm), and ``snapstore.testing.FakeDevice``.

Three kinds of thread call a device, and no other:

    thread                           calls                                       and the device may
    the one that saves or loads      check_stream, pack, lend, mark, upload      never make it wait
    the device's own                 open, and all of the channel                keep it, even for ever
    the pinner                       pin, unpin                                  keep it, even for ever

Whoever only looks (health, stats, drain, the watch) calls nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from snapstore._errors import SnapstoreError
from snapstore._format import Layout

LABEL = "__snapstore_device__"
"""A tensor class with this attribute says itself on which device its tensors are (``None``: in host memory)."""


class DeviceLostError(RuntimeError):
    """The device answers every call with the same error from here on: nothing that it was asked for will happen."""


class StreamCaptureError(SnapstoreError, RuntimeError):
    """The current stream is capturing a graph: a copy asked for now would be made at each replay, and not now."""


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes that lie side by side on a device. Whoever holds ``data`` keeps them."""

    data: Any
    nbytes: int


@dataclass(frozen=True, slots=True)
class Move:
    """One copy to the host: ``len(target)`` bytes of a block, from ``offset`` on."""

    data: Any
    offset: int
    target: memoryview


class Channel(Protocol):
    """A stream of its own on a device, for one thread. A *mark* is a point in a stream: reached, or not yet."""

    def start(self, after: Any, moves: Sequence[Move]) -> Any:
        """Copy these once ``after`` is reached; a mark behind them. ``RuntimeError``: some may be under way."""

    def mark(self) -> Any:
        """A mark behind all that was started here."""

    def done(self, mark: Any) -> bool:
        """Whether a mark is reached. Does not wait, nor hold the GIL. ``DeviceLostError``: it never will be."""


class Device(Protocol):
    """One device of the process; safe from any thread, as the module says."""

    name: str

    def check_stream(self) -> None:
        """``StreamCaptureError`` if the caller's current stream is capturing."""

    def pack(self, tensors: Sequence[Any]) -> list[Block]:
        """Have the caller's current stream put the bytes of these side by side, in few launches. Fresh memory."""

    def lend(self, tensors: Sequence[Any]) -> list[Block]:
        """The tensors' own memory; what is not contiguous is copied by the caller's current stream."""

    def mark(self) -> Any:
        """A mark in the caller's current stream, behind all that it was given."""

    def open(self) -> Channel:
        """A channel for the calling thread, which does not disturb the capture of graphs from here on."""

    def pin(self, area: memoryview) -> None:
        """Lock pages of host memory, so that copies need no host. ``RuntimeError`` or ``OSError``: refused."""

    def unpin(self, area: memoryview) -> None:
        """The end of ``pin``."""

    def upload(self, layout: Layout, pieces: Sequence[memoryview]) -> tuple[dict[str, Any], Any]:
        """Tensors on the device, copied there by a stream of its own, for which the caller's current stream waits.

        ``pieces`` make up the data part of the file, and are to be kept until the mark that comes with the tensors.
        """
