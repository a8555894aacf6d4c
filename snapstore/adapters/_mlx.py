"""mlx arrays <-> host bytes.

An array's memory is the host's. What mlx evaluated and somebody holds is never written again: ``a[0] = 7`` then makes
``a`` another array. So another array of the same memory, held, is a frozen view of it: a save needs no copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, cast

import mlx.core as mx

from snapstore._format import ITEM_BYTES, Layout, TensorSpec
from snapstore._types import Framework
from snapstore.adapters import LAYOUTS, View, place, unsupported

_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64,
    "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "F64": mx.float64, "C64": mx.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_WORDS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Formats of unsigned integers, by their bytes: what an array is made of before it gets its dtype."""
_PIECE_BYTES = 4 * 1024 * 1024
"""``mx.array`` of foreign memory holds the GIL for its copy: about 3 ms a piece, 170 ms for 256 MB at once."""


class MlxAdapter:
    """Arrays that mlx evaluates on the calling thread; a source is the array itself."""

    framework: Framework = "mlx"
    frozen_views = True

    def describe(self, tensors: Mapping[str, Any]) -> tuple[Sequence[TensorSpec], Sequence[mx.array]]:
        """Check every array; a lazy one stays lazy. Does not block."""
        sources = tuple(tensors.values())
        for name, array in tensors.items():
            if type(array) is not mx.array and not isinstance(array, mx.array):
                raise unsupported(
                    name,
                    f"{type(array).__module__}.{type(array).__qualname__} is no array; save mx.array of it",
                )
        return _specs(tuple(tensors), tuple(map(_dtype_of, sources)), tuple(map(_shape_of, sources))), sources

    def copy_into(self, sources: Sequence[mx.array], layout: Layout, buffer: memoryview) -> None:
        """Blocks until all is evaluated, and then for one copy of the bytes; holds the GIL but between slices."""
        for view, offset in zip(self.view(sources)(), layout.offsets, strict=True):
            place(view, buffer, offset)

    def view(self, sources: Sequence[mx.array]) -> View:
        """Blocks for one ``mx.eval`` of all; what is not contiguous is copied by the thread that reads it."""
        arrays = list(map(_another_of, sources))
        mx.eval(arrays)
        return lambda: [_bytes_of(array) for array in arrays]

    def from_host(self, layout: Layout, buffer: memoryview, device: Any) -> dict[str, mx.array]:
        """Evaluated arrays, copied from ``buffer``; blocks for that. Any thread may read them."""
        on_gpu = _is_gpu(device)
        arrays = {
            spec.name: _array_of(spec, buffer[offset : offset + size], on_gpu=on_gpu)
            for spec, offset, size in zip(layout.specs, layout.offsets, layout.sizes, strict=True)
        }
        mx.eval(arrays)
        return arrays


_dtype_of, _shape_of = attrgetter("dtype"), attrgetter("shape")
_another_of = mx.array.__copy__
"""Another array of the same memory (or, of a lazy one, of what it will be). ``mx.array(array)`` copies."""


@lru_cache(maxsize=LAYOUTS)
def _specs(
    names: tuple[str, ...], dtypes: tuple[mx.Dtype, ...], shapes: tuple[tuple[int, ...], ...]
) -> tuple[TensorSpec, ...]:
    for name, dtype in zip(names, dtypes, strict=True):
        if dtype not in _NAMES:
            raise unsupported(name, f"safetensors has no dtype {dtype}; save array.view(mx.uint8)")
    return tuple(map(TensorSpec, names, (_NAMES[dtype] for dtype in dtypes), shapes))


def _bytes_of(array: mx.array) -> memoryview:
    """The memory of an evaluated array. (A memoryview of no bytes refuses to be cast.) Lets the GIL go."""
    if not array.size:
        return memoryview(b"")
    view = memoryview(cast(Any, array))
    if not view.c_contiguous:
        copied = mx.contiguous(array, stream=mx.cpu)
        mx.eval(copied)
        view = memoryview(cast(Any, copied))
    return view.cast("B").toreadonly()


def _is_gpu(device: Any) -> bool:
    """Whether ``device`` is the GPU; ``None`` and the CPU are not. ``ValueError`` for what is no device here."""
    kinds = {"cpu": mx.cpu, "gpu": mx.gpu}
    kind = device.type if isinstance(device, mx.Device) else kinds.get(device, device)
    if device is None or kind == mx.cpu:
        return False
    if kind == mx.gpu and mx.is_available(mx.gpu):
        return True
    raise ValueError(f"mlx has no device {device!r} here; pass None, 'cpu' or 'gpu', or an mx.Device")


def _array_of(spec: TensorSpec, source: memoryview, *, on_gpu: bool) -> mx.array:
    dtype = _DTYPES.get(spec.dtype)
    if dtype is None or (on_gpu and dtype == mx.float64):
        where = " on the GPU" if dtype is not None else ""
        why = f"mlx has no {spec.dtype}{where}; load with framework='torch', or with device='cpu'"
        raise unsupported(spec.name, why, verb="loaded")
    try:
        return _filled(dtype, spec, source)
    except OverflowError as error:  # an extent of 2**31 or more
        why = f"{error} Load with framework='torch'"
        raise unsupported(spec.name, why, verb="loaded") from error


def _filled(dtype: mx.Dtype, spec: TensorSpec, source: memoryview) -> mx.array:
    if not len(source):
        return mx.zeros(spec.shape, dtype)
    # Bits, not numbers, all the way; on the CPU, where every dtype is known. The memory is the same.
    words = source.cast(_WORDS[ITEM_BYTES[spec.dtype]])
    count = _PIECE_BYTES // words.itemsize
    pieces = [mx.array(cast(Any, words[start : start + count])) for start in range(0, len(words), count)]
    flat = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, stream=mx.cpu)
    return flat.view(dtype, stream=mx.cpu).reshape(spec.shape, stream=mx.cpu)


ADAPTER = MlxAdapter()
