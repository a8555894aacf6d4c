"""torch tensors on CUDA devices (and ROCm's, which torch calls the same) <-> host bytes, without a wait on the host.

The calling thread only adds work to its own current stream. The device's thread calls what may keep it; it looks at
events through the driver itself, since torch holds the GIL for that. Importing this touches no device.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from snapstore._device import Block, Device, DeviceLostError, Move, StreamCaptureError
from snapstore._format import Layout
from snapstore.adapters import unsupported
from snapstore.adapters._torch import _DTYPES, _as_plain_tensors, _keys

_NOT_READY = 600
_RELAXED = 2
_PORTABLE = 1
"""cudaErrorNotReady, cudaStreamCaptureModeRelaxed, cudaHostRegisterPortable; hip has the same numbers."""

_INDEX_MAX = 2**31 - 1
"""``torch.cat`` copies tensor by tensor what it can not index in 32 bits."""

_log = logging.getLogger("snapstore.device")

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# --- which device ---


_is_cuda = operator.attrgetter("is_cuda")


def devices_of(tensors: Mapping[str, torch.Tensor]) -> list[Device | None] | None:
    """The CUDA device of each tensor; ``None``: none is on any. Calls no device."""
    with _as_plain_tensors():
        if not any(map(_is_cuda, tensors.values())):
            return None
        for name, tensor in tensors.items():
            if tensor.is_cuda and tensor.numel() and not tensor.data_ptr():
                raise unsupported(name, "its memory is gone: its storage has been resized to nothing")
        return [device_at(tensor.get_device()) if tensor.is_cuda else None for tensor in tensors.values()]


def device_named(device: Any) -> Device | None:
    """The device that torch calls so, if it is a CUDA one."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"torch has no device {device!r}") from error
    if found.type != "cuda":
        return None
    if not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch has no device {device!r} here")
    return device_at(torch.cuda.current_device() if found.index is None else found.index)


def device_at(index: int) -> CudaDevice:
    """The CUDA device of this number; always the same object."""
    device = _devices.get(index)
    if device is None:
        device = _devices.setdefault(index, CudaDevice(index))
    return device


# --- one device ---


class CudaDevice:
    """See ``snapstore._device``."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._index = index
        self._uploads: torch.cuda.Stream | None = None
        self._making = threading.Lock()

    def check_stream(self) -> None:
        """Asks the runtime, not the device."""
        with self._current():
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            raise StreamCaptureError(
                f"the current stream of {self.name} is capturing a CUDA graph; save and load outside of the capture"
            )

    def pack(self, tensors: Sequence[torch.Tensor]) -> list[Block]:
        """One launch for up to 128 tensors of a width, and one for each that is not contiguous."""
        with _as_they_are():
            return [Block(flat, flat.nbytes) for flat in map(_packed, runs_of(tensors))]

    def lend(self, tensors: Sequence[torch.Tensor]) -> list[Block]:
        """One block a tensor."""
        with _as_they_are():
            return [Block(_dense(tensor), tensor.nbytes) for tensor in tensors if tensor.numel()]

    def mark(self) -> torch.cuda.Event:
        """An event without timing."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._index))
        return event

    def open(self) -> CudaChannel:
        """Makes the device the thread's own, with a stream of its own."""
        return CudaChannel(self._index)

    def pin(self, area: memoryview) -> None:
        """Registers the pages with every context."""
        self._enter_thread()
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(_address(area), len(area), _PORTABLE)
        if int(code):
            raise OSError(
                f"cudaHostRegister of {len(area)} bytes: {runtime.cudaGetErrorString(code)} ({int(code)})"
            )

    def unpin(self, area: memoryview) -> None:
        """May wait for the device."""
        self._enter_thread()
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostUnregister(_address(area))
        if int(code):
            raise OSError(f"cudaHostUnregister: {runtime.cudaGetErrorString(code)} ({int(code)})")

    def upload(
        self, layout: Layout, pieces: Sequence[memoryview]
    ) -> tuple[dict[str, torch.Tensor], torch.cuda.Event]:
        """Views of one tensor of bytes. Waits for the copy of a piece only if its memory is not pinned."""
        stream, mark = self._upload_stream(), torch.cuda.Event()
        with torch.inference_mode(False), _as_they_are():
            with torch.cuda.stream(stream):
                arena = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.name)
                try:
                    _fill(arena, pieces)
                    mark.record(stream)
                except RuntimeError as error:
                    raise DeviceLostError(f"{self.name}: {error}") from error
            current = torch.cuda.current_stream(self._index)
            current.wait_event(mark)
            arena.record_stream(current)
            return dict(_views(arena, layout)), mark

    def _upload_stream(self) -> torch.cuda.Stream:
        with self._making:
            if self._uploads is None:
                self._uploads = _own_stream(self._index)
            return self._uploads

    def _enter_thread(self) -> None:
        """For threads of snapstore's own: on device 0, another one's context would cost half a gigabyte."""
        torch.cuda.set_device(self._index)
        _relax_capture()

    def _current(self) -> AbstractContextManager[Any]:
        if torch.cuda.current_device() == self._index:
            return nullcontext()
        return torch.cuda.device(self._index)


class CudaChannel:
    """See ``snapstore._device``. Made and used by one thread."""

    def __init__(self, index: int) -> None:
        torch.cuda.set_device(index)
        _relax_capture()
        self._stream = _own_stream(index)
        torch.cuda.set_stream(self._stream)
        # What was made in inference mode can be read here, and no graph of gradients is ever built.
        self._mode = torch.inference_mode()
        self._mode.__enter__()
        self._reached = _event_query()

    def start(self, after: torch.cuda.Event | None, moves: Sequence[Move]) -> torch.cuda.Event:
        """Returns at once for pinned targets; for others when the copy is made."""
        if after is not None:
            self._stream.wait_event(after)
        with _as_plain_tensors():
            for move in moves:
                whole = move.data.detach().view(-1).view(torch.uint8)
                source = whole[move.offset : move.offset + len(move.target)]
                torch.frombuffer(move.target, dtype=torch.uint8).copy_(source, non_blocking=True)
        return self.mark()

    def mark(self) -> torch.cuda.Event:
        """An event without timing."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def done(self, mark: torch.cuda.Event) -> bool:
        """One call of the driver, without the GIL."""
        return self._reached(mark)


def _own_stream(index: int) -> torch.cuda.Stream:
    """A stream that is nobody else's, or nearly so.

    torch hands out 32 for each priority, round and round. Those of the usual one are the engine's, which may be
    capturing a graph on one of them, or have it stand behind a long kernel.
    """
    return torch.cuda.Stream(index, priority=-1)


@contextmanager
def _as_they_are() -> Iterator[None]:
    """Without gradients, without a say of subclasses and modes; and without autocast, under which ``cat`` is choosy."""
    with torch.no_grad(), _as_plain_tensors(), torch._C._DisableAutocast():
        yield


# --- packing ---


def runs_of(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors that one ``torch.cat`` can take, in their order: of one dtype, and not too many elements in all.

    The order is that of the file, so tensors of one width are side by side. Where their dtypes alternate, or ``cat``
    may not know them, they are taken as integers of that width. That is a call of torch for each of them, which lets
    the GIL go: 150 ms for 1,000 tensors beside a thread that is hungry for it, where the others take 1 ms.
    """
    for _, same_width in itertools.groupby(tensors, torch.Tensor.element_size):
        plain = [_plain(tensor) for tensor in same_width]
        dtypes = [(dtype, list(run)) for dtype, run in itertools.groupby(plain, _dtype_of)]
        if len(dtypes) > _FEW_DTYPES or any(dtype not in _KNOWN_TO_CAT for dtype, _ in dtypes):
            integer = _AS_INTEGERS[dtypes[0][0].itemsize]
            yield from _within_index([tensor.view(integer) for tensor in plain])
        else:
            for _, run in dtypes:
                yield from _within_index(run)


_dtype_of = operator.attrgetter("dtype")

_FEW_DTYPES = 4
_KNOWN_TO_CAT = frozenset(
    {
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    }
)  # fmt: skip


def _within_index(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    run: list[torch.Tensor] = []
    count = 0
    for tensor in tensors:
        if run and count + tensor.numel() >= _INDEX_MAX:
            yield run
            run, count = [], 0
        run.append(tensor)
        count += tensor.numel()
    if count:
        yield run


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values without a lazy conjugation or negation, which the dispatcher's keys tell."""
    keys = _keys(tensor)
    lazy = _lazy.get(keys)
    if lazy is None:
        lazy = _lazy[keys] = tensor.is_conj() or tensor.is_neg()
    return tensor.resolve_conj().resolve_neg() if lazy else tensor


_lazy: dict[int, bool] = {}


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, if its bytes lie as they are to be in the file; else a copy."""
    plain = _plain(tensor)
    return plain if plain.is_contiguous() else plain.contiguous()


def _packed(run: list[torch.Tensor]) -> torch.Tensor:
    """A fresh flat tensor. (Of one tensor alone, torch's own function for this makes a view.)"""
    if len(run) == 1:
        return run[0].clone(memory_format=torch.contiguous_format).view(-1)
    flat: torch.Tensor = torch._utils._flatten_dense_tensors(run)
    return flat


# --- unpacking ---


def _fill(arena: torch.Tensor, pieces: Sequence[memoryview]) -> None:
    start = 0
    for piece in pieces:
        end = start + len(piece)
        arena[start:end].copy_(torch.frombuffer(piece, dtype=torch.uint8), non_blocking=True)
        start = end


def _views(arena: torch.Tensor, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    for spec, offset, size in zip(layout.specs, layout.offsets, layout.sizes, strict=True):
        dtype = _DTYPES[spec.dtype]
        if size:
            yield spec.name, arena[offset : offset + size].view(dtype).view(spec.shape)
        else:
            yield spec.name, torch.empty(spec.shape, dtype=dtype, device=arena.device)


# --- the driver ---


def driver_function(name: str) -> Any:
    """This function of the driver that torch has loaded, which drops the GIL; ``None``: not to be had here.

    There may be several HIP runtimes on a machine, so torch's own is found through what torch has linked.
    """
    hip = torch.version.hip is not None
    library = f"{torch.__path__[0]}/lib/libtorch_hip.so" if hip else "libcuda.so.1"
    try:
        return getattr(ctypes.CDLL(library), ("hip" if hip else "cu") + name)
    except (OSError, AttributeError):
        return None


def _relax_capture() -> None:
    """Let the calling thread make any call while another captures a graph; by default some would spoil the capture."""
    exchange = driver_function("ThreadExchangeStreamCaptureMode")
    code = exchange(ctypes.byref(ctypes.c_int(_RELAXED))) if exchange is not None else "nothing"
    if code != 0:
        _log.warning(
            "capture_not_relaxed: the driver says %s; a graph that is captured while %s works may be spoiled",
            code,
            threading.current_thread().name,
            extra={"event": "capture_not_relaxed", "reason": "device"},
        )


def _event_query() -> Callable[[torch.cuda.Event], bool]:
    """A question to the driver that drops the GIL; torch's own, which holds it, where there is no other way."""
    query = driver_function("EventQuery")
    if query is None:
        return _asked_of_torch
    query.argtypes = [ctypes.c_void_p]
    query.restype = ctypes.c_int

    def reached(mark: torch.cuda.Event) -> bool:
        code = query(mark.cuda_event)
        if code not in (0, _NOT_READY):
            raise DeviceLostError(f"the driver says {code} of an event")
        return bool(code == 0)

    return reached


def _asked_of_torch(mark: torch.cuda.Event) -> bool:
    try:
        return bool(mark.query())
    except RuntimeError as error:
        raise DeviceLostError(str(error)) from error


def _address(area: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


_devices: dict[int, CudaDevice] = {}
