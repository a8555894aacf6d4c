"""The records that ``_flights`` is made of. They change only under its lock, but for what a part lets go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from snapstore._device import Block, Device
from snapstore._format import Layout
from snapstore._pinned import HostBuffer
from snapstore._records import Job
from snapstore._threads import Condition, Thread
from snapstore._types import DeviceHealth, DeviceStatus


@dataclass(slots=True, eq=False)
class Submission:
    """The device side of one save."""

    job: Job
    layout: Layout
    buffer: HostBuffer
    parts: list[Part] = field(default_factory=list)
    parts_left: int = 0
    handed_over: bool = False
    ended: bool = False

    @property
    def leaks(self) -> bool:
        return self.ended and self.parts_left > 0


@dataclass(slots=True, eq=False)
class Part:
    """What one device has to do for a submission: copy ``blocks``, which hold the tensors ``indices`` in this order.

    ``gathers``: the caller's stream was asked to read the tensors for it. Until ``after`` is reached, it may.
    """

    submission: Submission
    device: Device
    indices: Sequence[int]
    blocks: Sequence[Block]
    after: Any
    gathers: bool = False
    flying: bool = False
    over: bool = False
    mark: Any = None

    @property
    def waiting(self) -> bool:
        return not (self.flying or self.over)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def let_go(self) -> None:
        """The device does not read it any more: outside the lock, since it frees memory of the device."""
        self.blocks, self.after, self.mark = (), None, None


class Landing(NamedTuple):
    """A copy to the device that is under way, and what to do when ``mark`` is reached."""

    mark: Any
    landed: Callable[[], None]


@dataclass(slots=True, eq=False)
class Lane:
    """One device of one store. ``discarded``: what dropped parts held. Only its own thread frees that."""

    device: Device
    work: Condition
    status: DeviceStatus = "ok"
    error: BaseException | None = None
    since_s: float = 0.0
    waiting: deque[Part] = field(default_factory=deque)
    flying: deque[Part] = field(default_factory=deque)
    landings: deque[Landing] = field(default_factory=deque)
    discarded: list[Any] = field(default_factory=list)
    thread: Thread | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.flying or self.landings)


class Unfit(NamedTuple):
    """Why a device takes no more copies, at the moment of the look: it may be well again by now.

    ``ok``: the device is, and the store is at its end.
    """

    device: Device
    status: DeviceStatus
    error: BaseException | None


@dataclass(slots=True)
class Verdict:
    """What is to be done after the lock: parts to let go, submissions at rest, ends that the caller has taken."""

    over: list[Part] = field(default_factory=list)
    at_rest: list[Submission] = field(default_factory=list)
    admit: list[Submission] = field(default_factory=list)
    abandon: list[tuple[Submission, BaseException]] = field(default_factory=list)


class DeviceFacts(NamedTuple):
    """One moment of all devices of a store, for whoever looks."""

    on_their_way: int = 0
    leaked_bytes: int = 0
    pageable_copies: int = 0
    devices: tuple[DeviceHealth, ...] = ()
