"""numpy arrays (with ml_dtypes: bfloat16 and float8 too) <-> host bytes.

Bytes are copied with the GIL held, in calls of well under a millisecond: 48 arrays (16 MB) beside a thread hungry for
it take 1.1 x alone (strided ones 2 x), and ``np.copyto``, which lets it go once an array, 200 x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from snapstore._format import Layout, TensorSpec
from snapstore._types import Framework
from snapstore.adapters import LAYOUTS, SMALL_BYTES, View, place, unsupported

try:
    import ml_dtypes
except ImportError:
    _ML_DTYPES: dict[str, Any] = {}
else:
    _ML_DTYPES = {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }

_Array = npt.NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "BOOL": np.bool_,
        "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
        "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
        "F16": np.float16, "F32": np.float32, "F64": np.float64, "C64": np.complex64,
        **_ML_DTYPES,
    }.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_HELD_ITEMS = 500
"""``np.copyto`` lets the GIL go above this number of items. (numpy 1.x and 2.x, NPY_BEGIN_THREADS_THRESHOLDED)"""
_HELD_BYTES = 1024 * 1024
_BIG_ITEMS = 4_000_000
"""From here on a copy item by item takes longer than the one turn of the GIL that letting it go can cost."""


class NumpyAdapter:
    """Arrays in host memory; a source is the array itself, as a plain ``ndarray``."""

    framework: Framework = "numpy"
    frozen_views = False

    def describe(self, tensors: Mapping[str, Any]) -> tuple[Sequence[TensorSpec], list[_Array]]:
        """Check every array; look at its dtype and shape only. Does not block."""
        sources = [
            tensor if type(tensor) is np.ndarray else _plain(name, tensor) for name, tensor in tensors.items()
        ]
        return _specs(tuple(tensors), tuple(map(_dtype_of, sources)), tuple(map(_shape_of, sources))), sources

    def copy_into(self, sources: Sequence[_Array], layout: Layout, buffer: memoryview) -> None:
        """Blocks for one copy of the bytes, and holds the GIL but between slices of them."""
        area: Any = buffer.obj  # an mmap takes an array's bytes at a quarter of a memoryview's cost
        for array, offset, size in zip(sources, layout.offsets, layout.sizes, strict=True):
            if not array.flags.c_contiguous:
                _copy(np.ndarray(array.shape, array.dtype, buffer, offset), array)
            elif size <= SMALL_BYTES:
                area[offset : offset + size] = array
            else:
                place(_bytes_of(array), buffer, offset)

    def view(self, sources: Sequence[_Array]) -> View:
        """The arrays' own memory; one that is not C-contiguous is copied first, which blocks for that copy."""
        arrays = [array if array.flags.c_contiguous else _contiguous(array) for array in sources]
        return lambda: [_bytes_of(array).toreadonly() for array in arrays]

    def from_host(self, layout: Layout, buffer: memoryview, device: Any) -> dict[str, _Array]:
        """Writable arrays over ``buffer``, which the last of them frees. Does not block."""
        if device not in (None, "cpu"):
            raise ValueError(
                f"numpy arrays live on the cpu, not on {device!r}: load with framework='torch' for a device"
            )
        return {
            spec.name: _array_of(spec, buffer, offset)
            for spec, offset in zip(layout.specs, layout.offsets, strict=True)
        }


_dtype_of, _shape_of = attrgetter("dtype"), attrgetter("shape")


def _plain(name: str, tensor: Any) -> _Array:
    """A scalar or a subclass as an array."""
    if not isinstance(tensor, np.ndarray | np.generic):
        raise unsupported(name, f"{type(tensor).__qualname__} is no array; save np.asarray of it")
    if isinstance(tensor, np.ma.MaskedArray):
        raise unsupported(name, "it is a masked array; save .data and .mask as two arrays")
    return np.asarray(tensor)


@lru_cache(maxsize=LAYOUTS)
def _specs(
    names: tuple[str, ...], dtypes: tuple[np.dtype[Any], ...], shapes: tuple[tuple[int, ...], ...]
) -> tuple[TensorSpec, ...]:
    for name, dtype in zip(names, dtypes, strict=True):
        if dtype not in _NAMES:
            raise unsupported(name, _why_not(dtype))
    return tuple(map(TensorSpec, names, (_NAMES[dtype] for dtype in dtypes), shapes))


def _why_not(dtype: np.dtype[Any]) -> str:
    if not dtype.isnative and dtype.newbyteorder("=") in _NAMES:
        return f"its byte order ({dtype.str}) is not this machine's; save array.astype(array.dtype.newbyteorder('='))"
    advice = {
        "c": "save array.view(np.float64), or complex64",
        "f": "save another float dtype, or array.view(np.uint8)",
        "O": "save arrays of numbers, and the rest as metadata",
        "V": "save its fields one by one, or array.view(np.uint8)",
        "S": "save it as metadata",
        "U": "save it as metadata",
        "M": "save array.view(np.int64)",
        "m": "save array.view(np.int64)",
    }.get(dtype.kind, "save another dtype")
    return f"safetensors has no dtype {dtype}; {advice}"


def _dtype_for(spec: TensorSpec) -> np.dtype[Any]:
    dtype = _DTYPES.get(spec.dtype)
    if dtype is None:
        why = (
            f"numpy knows {spec.dtype} only with ml_dtypes; install ml_dtypes, or load with framework='torch'"
        )
        raise unsupported(spec.name, why, verb="loaded")
    return dtype


def _array_of(spec: TensorSpec, buffer: memoryview, offset: int) -> _Array:
    dtype = _dtype_for(spec)
    try:
        array: _Array = np.ndarray(spec.shape, dtype, buffer, offset)
    except ValueError as error:  # more axes than it has
        why = f"{error}; load with framework='torch'"
        raise unsupported(spec.name, why, verb="loaded") from error
    return array


def _bytes_of(array: _Array) -> memoryview:
    """The bytes of a C-contiguous array. Through uint8: ml_dtypes have no buffer format."""
    return array.reshape(-1).view(np.uint8).data


def _contiguous(array: _Array) -> _Array:
    copied = np.empty(array.shape, array.dtype)
    _copy(copied, array)
    return copied


def _copy(target: _Array, source: _Array) -> None:
    """Copy a strided array into a C-contiguous one."""
    if source.size >= _BIG_ITEMS:
        np.copyto(target, source)
    else:
        axis = _rows_axis(source)
        _copy_held(_as_rows(target, axis), _as_rows(source, axis))


def _copy_held(target: _Array, source: _Array) -> None:
    """In blocks for which numpy does not let the GIL go."""
    held = max(1, min(_HELD_ITEMS, _HELD_BYTES // source.itemsize))
    if source.flags.c_contiguous:
        place(_bytes_of(source), _bytes_of(target), 0)
    elif source.size <= held:
        np.copyto(target, source)
    elif source.size > held * len(source):
        for index in range(len(source)):
            _copy_held(target[index], source[index])
    else:
        step = held * len(source) // source.size
        for start in range(0, len(source), step):
            _copy_held(target[start : start + step], source[start : start + step])


def _rows_axis(array: _Array) -> int:
    """The first axis of those at the end that lie in memory without a gap: rows, to be copied whole."""
    axis, width = array.ndim, array.itemsize
    while axis and (array.shape[axis - 1] == 1 or array.strides[axis - 1] == width):
        axis -= 1
        width *= array.shape[axis]
    return axis


def _as_rows(array: _Array, axis: int) -> _Array:
    """The same memory, with each row as one raw item."""
    if axis == array.ndim:
        return array
    rows = array.reshape(*array.shape[:axis], -1)
    return rows.view(f"V{rows.shape[-1] * rows.itemsize}")[..., 0]


ADAPTER = NumpyAdapter()
