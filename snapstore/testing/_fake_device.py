"""A device for tests: its tensors are numpy arrays, and what it was asked for happens when the test says so.

    device = FakeDevice()
    state = device.tensor(numpy.arange(8))
    ticket = store.save("request-1", 64, {"state": state})     # returns at once: the device was only asked
    device.overwrite(state, 0)                                 # in the order of the stream: after the copy
    device.complete()                                          # now both happen, as far as they have been asked for
    device.automatic = True                                    # and from here on everything happens at once

Streams are queues of operations; the first of each may be completed, unless it waits for a mark of another one or is a
kernel that has not been told to finish. As on a real device, an operation reads memory when it is completed, not when
it is asked for: who overwrites a tensor behind the stream's back (``numpy.asarray(tensor)[...] = 0``) finds that in
the copy, and who frees memory that another stream is still to read finds it in ``faults``.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from snapstore._device import LABEL, Block, DeviceLostError, Move, StreamCaptureError
from snapstore._format import Layout
from snapstore.adapters._numpy import ADAPTER
from snapstore.testing._faults import Gate

DEVICE_OPERATIONS = (
    "check_stream", "pack", "lend", "mark", "upload", "open", "start", "channel_mark", "done", "pin", "unpin",
)  # fmt: skip
"""What a test can pause or fail: the calls that snapstore makes. (``done`` is not listed in ``calls``.)"""

_MAIN_STREAM = "main"
_GARBAGE = 0xDD

_Bytes = npt.NDArray[np.uint8]


class FakeTensor(np.ndarray[Any, Any]):
    """An array that says it is on a device. Reading it looks behind the device's back."""

    __snapstore_device__: FakeDevice | None = None

    def __array_finalize__(self, source: object) -> None:
        if source is not None:
            self.__snapstore_device__ = getattr(source, LABEL, None)


class FakeMark:
    """A point in a stream. ``reached``: everything before it has happened."""

    def __init__(self) -> None:
        self.reached = False


class FakeKernel:
    """Something long in a stream, which ends when ``finish`` is called."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.finished = False

    def finish(self) -> None:
        """Let the stream go on."""
        self.finished = True
        self._device._go_on()


@dataclass(frozen=True, slots=True)
class DeviceCall:
    """A call that snapstore made, and the thread that made it."""

    operation: str
    thread: str


@dataclass(slots=True, eq=False)
class _Operation:
    number: int
    act: Callable[[], None]
    ready: Callable[[], bool]


@dataclass(slots=True, eq=False)
class _Rule:
    operation: str
    act: Callable[[], None]
    times: float


class FakeDevice:
    """See the module. Safe from any thread.

    Args:
        name: what it is called in health and in the names of threads.
        automatic: everything happens as soon as it is asked for.

    Attributes:
        calls: what snapstore has asked, in order.
        polls: how often each mark was looked at.
        faults: reads of memory that had been freed; to be empty at the end.
        launches: operations that were added to the caller's streams.
        pinned: sizes of the areas of host memory that are pinned, by address.
    """

    __snapstore_device__ = True

    def __init__(self, name: str = "fake:0", *, automatic: bool = False) -> None:
        self.name = name
        self.calls: list[DeviceCall] = []
        self.polls: Counter[FakeMark] = Counter()
        self.faults: list[str] = []
        self.launches = 0
        self.pinned: dict[int, int] = {}
        self._automatic = automatic
        self._mutex = threading.RLock()
        self._streams: dict[str, deque[_Operation]] = {}
        self._asked = 0
        self._channels = 0
        self._here = threading.local()
        self._rules: list[_Rule] = []
        self._poison: BaseException | None = None

    # -- for the test -------------------------------------------------------------------------------------------

    def tensor(self, array: npt.ArrayLike) -> FakeTensor:
        """A copy of ``array`` on this device."""
        tensor = np.array(array).view(FakeTensor)
        tensor.__snapstore_device__ = self
        return tensor

    def overwrite(self, tensor: FakeTensor, value: Any) -> None:
        """Ask the current stream to put ``value`` there."""
        raw = np.asarray(tensor)

        def act() -> None:
            raw[...] = value

        self._ask(self._current, act)

    def kernel(self) -> FakeKernel:
        """Ask the current stream for something that takes until ``finish``."""
        kernel = FakeKernel(self)
        self._ask(self._current, lambda: None, lambda: kernel.finished)
        return kernel

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Make another stream the current one of this thread."""
        before = self._current
        self._here.stream = name
        try:
            yield
        finally:
            self._here.stream = before

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """This thread's current stream is capturing a graph."""
        self._here.capturing = True
        try:
            yield
        finally:
            self._here.capturing = False

    def complete(self, count: int | None = None, *, by: random.Random | None = None) -> int:
        """Have at most ``count`` operations happen (all that can, by default). How many did.

        In the order in which they were asked for, or ``by`` chance in any order that the streams allow.
        """
        done = 0
        with self._mutex:
            while (count is None or done < count) and self._poison is None:
                heads = [queue for queue in self._streams.values() if queue and queue[0].ready()]
                if not heads:
                    break
                queue = by.choice(heads) if by else min(heads, key=lambda each: each[0].number)
                queue.popleft().act()
                done += 1
        return done

    @property
    def automatic(self) -> bool:
        """Whether everything happens as soon as it is asked for. Set it to let go what waits."""
        return self._automatic

    @automatic.setter
    def automatic(self, value: bool) -> None:
        self._automatic = value
        self._go_on()

    @property
    def waiting(self) -> int:
        """Operations that were asked for and have not happened."""
        with self._mutex:
            return sum(map(len, self._streams.values()))

    def pause(self, operation: str) -> Gate:
        """Stop the next thread that makes this call, until the gate is opened."""
        gate = Gate()
        self._plant(operation, gate.pass_through, 1)
        return gate

    def fail(self, operation: str, error: Exception, *, times: float = 1) -> None:
        """Raise ``error`` from this call; ``times=math.inf`` for ever."""

        def act() -> None:
            raise error

        self._plant(operation, act, times)

    def poison(self, error: Exception | None = None) -> None:
        """From here on nothing happens any more, and every call says so."""
        with self._mutex:
            self._poison = error or RuntimeError("an illegal memory access was encountered")

    def count(self, operation: str) -> int:
        """How often snapstore has made this call."""
        with self._mutex:
            return sum(call.operation == operation for call in self.calls)

    # -- for snapstore: see snapstore._device -------------------------------------------------------------------

    def check_stream(self) -> None:
        """Part of the protocol, as is all that follows."""
        self._enter("check_stream")
        if getattr(self._here, "capturing", False):
            raise StreamCaptureError(
                f"the current stream of {self.name} is capturing a graph; save outside of it"
            )

    def pack(self, tensors: Sequence[FakeTensor]) -> list[Block]:
        """One launch."""
        self._enter("pack")
        return [self._gather(tensors)]

    def lend(self, tensors: Sequence[FakeTensor]) -> list[Block]:
        """No launch, but one for each tensor that is not contiguous."""
        self._enter("lend")
        return [
            Block(tensor, tensor.nbytes) if tensor.flags.c_contiguous else self._gather([tensor])
            for tensor in tensors
            if tensor.size
        ]

    def mark(self) -> FakeMark:
        """Of the current stream."""
        self._enter("mark")
        return self._mark_in(self._current)

    def open(self) -> FakeChannel:
        """A channel with a stream of its own."""
        self._enter("open")
        with self._mutex:
            self._channels += 1
            return FakeChannel(self, f"channel {self._channels}")

    def pin(self, area: memoryview) -> None:
        """Only noted."""
        self._enter("pin")
        with self._mutex:
            self.pinned[_address(area)] = len(area)

    def unpin(self, area: memoryview) -> None:
        """Only noted."""
        self._enter("unpin")
        with self._mutex:
            del self.pinned[_address(area)]

    def upload(self, layout: Layout, pieces: Sequence[memoryview]) -> tuple[dict[str, FakeTensor], FakeMark]:
        """The pieces are read when the operation is completed."""
        self._enter("upload")
        arena = np.full(layout.nbytes, _GARBAGE, np.uint8)

        def act() -> None:
            arena[...] = np.frombuffer(b"".join(pieces), np.uint8)

        self._ask("uploads", act)
        mark = self._mark_in("uploads")
        self._ask(self._current, lambda: None, lambda: mark.reached)
        arrays = ADAPTER.from_host(layout, arena.data, None)
        tensors = {name: array.view(FakeTensor) for name, array in arrays.items()}
        for tensor in tensors.values():
            tensor.__snapstore_device__ = self
        return tensors, mark

    # -- streams ------------------------------------------------------------------------------------------------

    @property
    def _current(self) -> str:
        return getattr(self._here, "stream", _MAIN_STREAM)

    def _ask(self, stream: str, act: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        with self._mutex:
            self._asked += 1
            self._streams.setdefault(stream, deque()).append(_Operation(self._asked, act, ready))
        self._go_on()

    def _go_on(self) -> None:
        if self._automatic:
            self.complete()

    def _mark_in(self, stream: str) -> FakeMark:
        mark = FakeMark()

        def act() -> None:
            mark.reached = True

        self._ask(stream, act)
        return mark

    def _gather(self, tensors: Sequence[FakeTensor]) -> Block:
        """Scratch memory of the device. The source may be freed at once: its memory is reused in stream order only."""
        sources = [np.asarray(tensor) for tensor in tensors]
        scratch = self.tensor(np.full(sum(source.nbytes for source in sources), _GARBAGE, np.uint8))
        target = np.asarray(scratch)

        def act() -> None:
            target[...] = np.concatenate([_flat(source) for source in sources])

        self.launches += 1
        self._ask(self._current, act)
        return Block(scratch, scratch.nbytes)

    def _copy(self, stream: str, move: Move) -> None:
        """From another stream's memory: whoever frees that before this has happened has made a mistake."""
        source, owner = _flat(np.asarray(move.data)), weakref.ref(move.data)
        begin, target = move.offset, move.target

        def act() -> None:
            if owner() is None:
                self.faults.append(f"{self.name} copied {len(target)} bytes of memory that had been freed")
                target[:] = bytes([_GARBAGE]) * len(target)
            else:
                target[:] = source[begin : begin + len(target)].data

        self._ask(stream, act)

    # -- faults -------------------------------------------------------------------------------------------------

    def _plant(self, operation: str, act: Callable[[], None], times: float) -> None:
        if operation not in DEVICE_OPERATIONS:
            raise ValueError(f"no operation {operation!r}; there are {', '.join(DEVICE_OPERATIONS)}")
        with self._mutex:
            self._rules.append(_Rule(operation, act, times))

    def _enter(self, operation: str) -> None:
        with self._mutex:
            if operation != "done":
                self.calls.append(DeviceCall(operation, threading.current_thread().name))
            met = [rule for rule in self._rules if rule.operation == operation and rule.times > 0]
            for rule in met:
                rule.times -= 1
        for rule in met:
            rule.act()
        if self._poison is not None:
            raise DeviceLostError(f"{self.name}: {self._poison}") from self._poison


class FakeChannel:
    """A stream of a ``FakeDevice`` for one thread of snapstore; see ``snapstore._device``."""

    def __init__(self, device: FakeDevice, stream: str) -> None:
        self._device = device
        self._stream = stream

    def start(self, after: FakeMark | None, moves: Sequence[Move]) -> FakeMark:
        """Ask for it."""
        self._device._enter("start")
        if after is not None:
            self._device._ask(self._stream, lambda: None, lambda: after.reached)
        for move in moves:
            self._device._copy(self._stream, move)
        return self._device._mark_in(self._stream)

    def mark(self) -> FakeMark:
        """Behind all that was asked for here."""
        self._device._enter("channel_mark")
        return self._device._mark_in(self._stream)

    def done(self, mark: FakeMark) -> bool:
        """Counted in ``polls``."""
        self._device._enter("done")
        self._device.polls[mark] += 1
        return mark.reached


def _flat(array: npt.NDArray[Any]) -> _Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _address(area: memoryview) -> int:
    return np.frombuffer(area, np.uint8).ctypes.data
