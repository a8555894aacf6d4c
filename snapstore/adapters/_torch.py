"""torch tensors <-> host bytes. Works without numpy.

Bytes go through memoryviews, which hold the GIL: 48 tensors (16 MB) beside a thread hungry for it take 1.2 x alone; one
``_foreach_copy_`` 1.5 x, and 400 x where it waits for torch's threads; ``ctypes.memmove``, which lets it go, 270 x.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch

from snapstore._format import Layout, TensorSpec
from snapstore._types import Framework
from snapstore.adapters import LAYOUTS, SMALL_BYTES, View, place, unsupported

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_REFUSED: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda t: not isinstance(t, torch.Tensor), "it is no tensor; save torch.as_tensor of it"),
    (torch.nn.parameter.is_lazy, "it has no shape yet; run its module once first"),
    (
        lambda t: type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__,
        "it only wraps other tensors; save those (for a DTensor, to_local() or full_tensor())",
    ),
    (
        torch._C._functorch.is_functorch_wrapped_tensor,
        "it stands for many tensors inside a torch.func transform; save what the transform returns",
    ),
    (lambda t: t.is_meta, "it is a meta tensor, which has no data; save the real one"),
    (lambda t: t.is_nested, "it is nested; save the tensors of unbind()"),
    (lambda t: t.layout is not torch.strided, "it is sparse or opaque; save to_dense(), or its parts"),
    (lambda t: t.is_quantized, "it is quantised; save int_repr(), and scale and zero point as metadata"),
    (lambda t: t._is_zerotensor(), "it is a zero that has no memory; save its clone()"),
)
"""What can not be saved whatever its dtype, in an order in which no test meets a tensor that breaks it."""

_ADVICE = {
    torch.complex128: "save torch.view_as_real(tensor), or complex64",
    torch.complex32: "save torch.view_as_real(tensor), or complex64",
}


_dispatch_keys = torch._C._dispatch_keys
_raw_keys: Callable[[Any], int] = torch._C.DispatchKeySet.raw_repr

_as_plain_tensors = torch._C.DisableTorchFunction
"""In this context subclasses and modes, a default device among them, have no say in torch's functions."""


def _keys(tensor: torch.Tensor) -> int:
    """What torch's dispatcher knows of it: backend, conj and neg bits, wrappers. Unlike ``is_neg()``, keeps the GIL."""
    return _raw_keys(_dispatch_keys(tensor))


def _plain_keys() -> frozenset[int]:
    """Those of dense tensors in host memory whose bytes are their values, made in and outside of inference mode."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(_keys(torch.empty(0, device="cpu")))
    return frozenset(found)


_PLAIN_KEYS = _plain_keys()
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_cuda_keys: set[int] = set()
"""Those of CUDA tensors that were looked at and can be saved: the keys say it of all that have them."""

_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_READ = 0x100
_move = ctypes.PyDLL(None).memmove
_move.argtypes, _move.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None


_FEW_ROWS = 16
_LONG_ROW_BYTES = 4096
"""Rows are copied one by one where they are few, or so long that finding each costs less than copying it."""


_Source = tuple[torch.Tensor, int | None]
"""A tensor, and how many of its axes count rows without a gap in host memory (0: it is contiguous).

``None``: its bytes are not there to be copied as they are, or in too many rows; torch has to do it.
"""


class TorchAdapter:
    """Tensors in host memory. On MPS they are copied while the caller waits; ``_torch_cuda`` sees to those on CUDA."""

    framework: Framework = "torch"
    frozen_views = False

    def describe(self, tensors: Mapping[str, Any]) -> tuple[Sequence[TensorSpec], list[_Source]]:
        """Check every tensor; look at its dtype, shape and strides only. Does not block."""
        every = tuple(tensors.values())
        with _as_plain_tensors():
            leads = [0] * len(every) if _all_plain(every) else list(map(_lead, tensors, every))
            specs = _specs(tuple(tensors), tuple(map(_dtype_of, every)), tuple(map(_shape_of, every)))
        return specs, list(zip(every, leads, strict=True))

    def copy_into(self, sources: Sequence[_Source], layout: Layout, buffer: memoryview) -> None:
        """Blocks for one copy of the bytes; holds the GIL but between slices of them, and while torch copies."""
        left = []
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if layout.nbytes else 0
        with _as_plain_tensors():
            for (tensor, lead), offset, size in zip(sources, layout.offsets, layout.sizes, strict=True):
                if not size:
                    continue
                if lead is None:
                    left.append((offset, tensor))
                elif lead:
                    _copy_rows(tensor, lead, buffer[offset : offset + size])
                elif size <= SMALL_BYTES:
                    _move(address + offset, tensor.data_ptr(), size)
                else:
                    place(_memory_at(tensor.data_ptr(), size, _READ), buffer, offset)
            if left:
                _copy_by_torch(left, buffer)

    def view(self, sources: Sequence[_Source]) -> View:
        """The tensors' own memory; one that is not contiguous in host memory is copied first, which blocks for that."""
        with _as_plain_tensors(), torch.no_grad():
            tensors = [tensor if lead == 0 else _host_copy(tensor) for tensor, lead in sources]
            # A tensor can be given another storage (``t.data = ...``), and its first would be freed.
            storages = list(map(_storage_of, tensors))
            places = list(zip(map(_address_of, tensors), map(_nbytes_of, tensors), strict=True))

        def views(_keeps: object = storages) -> list[memoryview]:
            return [_memory_at(start, n, _READ) if n else memoryview(b"") for start, n in places]

        return views

    def from_host(self, layout: Layout, buffer: memoryview, device: Any) -> dict[str, torch.Tensor]:
        """Writable tensors over ``buffer``, which the last of them frees; blocks for a copy if a device is named."""
        target = _device(device)
        # Usable anywhere, also where the caller is in inference mode or has set a default device.
        with _as_plain_tensors(), torch.inference_mode(False):
            tensors = {
                spec.name: _tensor_over(buffer, spec, offset)
                for spec, offset in zip(layout.specs, layout.offsets, strict=True)
            }
            if target is not None:
                tensors = {name: tensor.to(target) for name, tensor in tensors.items()}
        return tensors


_dtype_of, _shape_of, _nbytes_of = attrgetter("dtype"), attrgetter("shape"), attrgetter("nbytes")
_storage_of, _address_of, _is_contiguous = (
    torch.Tensor.untyped_storage,
    torch.Tensor.data_ptr,
    torch.Tensor.is_contiguous,
)


@lru_cache(maxsize=LAYOUTS)
def _specs(
    names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], shapes: tuple[torch.Size, ...]
) -> tuple[TensorSpec, ...]:
    for name, dtype in zip(names, dtypes, strict=True):
        if dtype not in _NAMES:
            advice = _ADVICE.get(dtype, "save tensor.view(torch.uint8), or another dtype")
            raise unsupported(name, f"safetensors has no dtype {dtype}; {advice}")
    return tuple(
        TensorSpec(name, _NAMES[dtype], tuple(shape))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    )


def _all_plain(tensors: Sequence[Any]) -> bool:
    """All are the everyday kind, for which ``_lead`` says 0: asked of all at once, at a third of the cost."""
    return (
        _PLAIN_TYPES.issuperset(map(type, tensors))
        and _PLAIN_KEYS.issuperset(map(_raw_keys, map(_dispatch_keys, tensors)))
        and all(map(_is_contiguous, tensors))
        and all(map(_address_of, tensors))
    )


def _lead(name: str, tensor: Any) -> int | None:
    """How to get at its bytes, as ``_Source`` says; ``UnsupportedTensorError`` if there is no way."""
    keys = _keys(tensor) if type(tensor) in _PLAIN_TYPES else None
    plain = keys in _PLAIN_KEYS
    if not plain and keys not in _cuda_keys:
        _refuse(name, tensor)
        if keys is not None and tensor.is_cuda:
            _cuda_keys.add(keys)
    if not plain and (not tensor.is_cpu or tensor.is_conj() or tensor.is_neg()):
        return None
    if not tensor.data_ptr() and tensor.numel():
        raise unsupported(name, "its memory is gone: its storage has been resized to nothing")
    return _row_axes(tensor)


def _refuse(name: str, tensor: Any) -> None:
    for is_so, why in _REFUSED:
        if is_so(tensor):
            raise unsupported(name, why)


def _row_axes(tensor: torch.Tensor) -> int | None:
    if tensor.is_contiguous():
        return 0
    shape, strides = tensor.shape, tensor.stride()
    lead, width = len(shape), 1
    while lead and (shape[lead - 1] == 1 or strides[lead - 1] == width):
        lead -= 1
        width *= shape[lead]
    few = _FEW_ROWS + tensor.nbytes // _LONG_ROW_BYTES
    return lead if math.prod(shape[:lead]) <= few else None


def _copy_rows(tensor: torch.Tensor, lead: int, target: memoryview) -> None:
    shape, itemsize, address = tensor.shape[:lead], tensor.itemsize, tensor.data_ptr()
    nbytes = len(target) // math.prod(shape)
    steps = [
        [i * stride * itemsize for i in range(n)] for n, stride in zip(shape, tensor.stride(), strict=False)
    ]
    for number, step in enumerate(itertools.product(*steps)):
        row = _memory_at(address + sum(step), nbytes, _READ)
        place(row, target, number * nbytes)


def _copy_by_torch(left: Sequence[tuple[int, torch.Tensor]], buffer: memoryview) -> None:
    """In as few calls as can be, since each lets the GIL go: one for all that is in host memory."""
    with torch.no_grad():
        # As bytes: torch makes every byte of a bool that is not 0 a 1.
        raw = [
            (offset, each.view(torch.uint8) if each.dtype is torch.bool else each) for offset, each in left
        ]
        pairs = [
            pair
            for offset, run in _runs(raw)
            for pair in zip(_targets(buffer, offset, run), run, strict=True)
        ]
        near = [pair for pair in pairs if pair[1].is_cpu]
        if near:
            torch._foreach_copy_([target for target, _ in near], [source for _, source in near])
        for target, source in pairs:
            if not source.is_cpu:
                _copy_from_device(target, source)


def _copy_from_device(target: torch.Tensor, source: torch.Tensor) -> None:
    """Blocks until the device has made the values and they have arrived."""
    target.copy_(source)


def _runs(placed: Sequence[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Tensors of one dtype that come to lie side by side, with the offset of the first: their targets take one call."""
    run: list[torch.Tensor] = []
    start = end = 0
    for offset, tensor in sorted(placed, key=lambda each: each[0]):
        if run and (offset != end or tensor.dtype != run[0].dtype):
            yield start, run
            run = []
        if not run:
            start = offset
        run.append(tensor)
        end = offset + tensor.nbytes
    yield start, run


def _targets(buffer: memoryview, offset: int, run: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Tensors over ``buffer`` from ``offset`` on, shaped as those of the run."""
    count = sum(tensor.numel() for tensor in run)
    flat = torch.frombuffer(buffer, dtype=run[0].dtype, count=count, offset=offset)
    targets: Sequence[torch.Tensor] = torch._utils._unflatten_dense_tensors(flat, run)
    return targets


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _device(device: Any) -> torch.device | None:
    """``None``: the host. ``ValueError`` for what torch knows no device by."""
    if device is None:
        return None
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"torch has no device {device!r}") from error


def _tensor_over(buffer: memoryview, spec: TensorSpec, offset: int) -> torch.Tensor:
    dtype, count = _DTYPES[spec.dtype], math.prod(spec.shape)
    if not count:  # frombuffer refuses to make nothing
        return torch.empty(spec.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(spec.shape)


ADAPTER = TorchAdapter()
