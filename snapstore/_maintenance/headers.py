"""What one snapshot file says of itself, read from its header alone; and, when asked, what its tensors hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from snapstore import _paths
from snapstore._errors import SnapshotCorruptError, UnsupportedTensorError
from snapstore._files import FileSystem, disk_bytes, opened, read_exactly
from snapstore._format import Facts, Header, Layout, TensorSpec, decode_metadata
from snapstore._maintenance.root import Root
from snapstore._maintenance.survey import SnapshotFile, sessions
from snapstore._maintenance.units import format_size
from snapstore._memory import allocate
from snapstore._reader import read_header
from snapstore.adapters import adapter_named

_AT_ONCE = 1024 * 1024
"""Elements of a tensor that are looked at in one go."""
_ITEM_BYTES_MAX = 16
_SPARSE_BYTES = 2**30
"""From so many bytes that were never written on, a file is not read: zeros without end are no snapshot."""


@dataclass(frozen=True, slots=True)
class Values:
    """What a tensor holds; ``least`` and ``greatest`` are ``None`` for complex numbers, and without any number."""

    least: float | int | bool | None
    greatest: float | int | bool | None
    nans: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file; ``values`` is ``None`` if not asked for, or not readable by numpy."""

    spec: TensorSpec
    offset: int
    values: Values | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """A header. ``facts`` is ``None`` for a safetensors file that snapstore did not write."""

    path: str
    file_bytes: int
    disk_bytes: int
    header_bytes: int
    data_bytes: int
    has_checksums: bool
    facts: Facts | None
    metadata: Any
    tensors: tuple[Tensor, ...]


def inspect_file(
    files: FileSystem, path: str, *, dir_fd: int | None = None, values: bool = False
) -> Inspection:
    """Read a header, whatever the size of the file. ``SnapshotCorruptError`` or ``OSError`` if it can not be."""
    with opened(files, files.open_read(path, dir_fd=dir_fd)) as fd:
        status = files.status(fd)
        header = read_header(files, fd)
        tensors = [
            Tensor(spec, header.data_offset + offset)
            for spec, offset in zip(header.layout.specs, header.layout.offsets, strict=True)
        ]
        if values:
            check_written(files, fd)
            buffer = allocate(_AT_ONCE * _ITEM_BYTES_MAX)
            tensors = [replace(each, values=_values(files, fd, each, buffer)) for each in tensors]
    return Inspection(
        path=path,
        file_bytes=status.st_size,
        disk_bytes=disk_bytes(status),
        header_bytes=header.data_offset,
        data_bytes=header.layout.nbytes,
        has_checksums=header.checksums is not None,
        facts=header.facts,
        metadata=_metadata(header),
        tensors=tuple(tensors),
    )


def inspect_snapshot(root: Root, snapshot: SnapshotFile, *, values: bool = False) -> Inspection:
    """The same for a snapshot of a root, reached by descriptor."""
    with root.directory(snapshot.of.session) as session, root.directory(snapshot.of.name, session) as fd:
        found = inspect_file(root.files, snapshot.name, dir_fd=fd, values=values)
    return replace(found, path=snapshot.path)


def snapshots_of(root: Root, request_id: str) -> list[SnapshotFile]:
    """Every snapshot of a request, in all sessions: the latest life last, and within it the most tokens last."""
    request_hash = _paths.request_hash(request_id)
    found = [each for session in sessions(root, request_hash=request_hash) for each in session.snapshots]
    return sorted(found, key=lambda each: (each.of.session, each.of.number, each.token_count))


def _metadata(header: Header) -> Any:
    return None if header.facts is None else decode_metadata(header.facts.metadata_json)


def check_written(files: FileSystem, fd: int) -> None:
    """``SnapshotCorruptError`` for a file of which a great part was never written: nobody would see its end."""
    status = files.status(fd)
    length, there = status.st_size, disk_bytes(status)
    if length - there > _SPARSE_BYTES and files.first_hole(fd, 0) < length:
        raise SnapshotCorruptError(
            f"only {format_size(there)} of its {format_size(length)} were ever written"
        )


def _values(files: FileSystem, fd: int, tensor: Tensor, buffer: memoryview) -> Values | None:
    """Look at one tensor with numpy, which is imported here and nowhere sooner; piece by piece, through ``buffer``."""
    try:
        return _merged(map(_values_of_part, _pieces(files, fd, tensor, buffer)))
    except UnsupportedTensorError:
        return None


def _pieces(files: FileSystem, fd: int, tensor: Tensor, buffer: memoryview) -> Iterator[Any]:
    """The tensor as flat arrays, each good until the next one is asked for; one empty array for an empty tensor."""
    spec, numpy = tensor.spec, adapter_named("numpy")
    widened = spec.dtype == "BF16"
    count = math.prod(spec.shape)
    item_bytes = spec.nbytes // max(count, 1)
    for start in range(0, max(count, 1), _AT_ONCE):
        piece = TensorSpec(spec.name, "U16" if widened else spec.dtype, (min(_AT_ONCE, count - start),))
        view = buffer[: piece.nbytes]
        if read_exactly(files, fd, view, tensor.offset + start * item_bytes) < len(view):
            raise SnapshotCorruptError("the file was cut short while it was read")
        array = numpy.from_host(Layout.of([piece]), view, None)[spec.name]
        yield _float32(array) if widened else array


def _float32(bfloat16: Any) -> Any:
    """The upper half of a float32 is a bfloat16: no library is needed to read one."""
    return (bfloat16.astype("uint32") << 16).view("float32")


def _values_of_part(part: Any) -> Values:
    is_nan = part != part  # a NaN is what differs from itself
    nans = int(is_nan.sum())
    known = part[~is_nan] if nans else part
    if not len(known) or part.dtype.kind == "c":
        return Values(None, None, nans)
    return Values(known.min().item(), known.max().item(), nans)


def _merged(parts: Iterable[Values]) -> Values:
    least: list[float] = []
    greatest: list[float] = []
    nans = 0
    for part in parts:
        nans += part.nans
        if part.least is not None and part.greatest is not None:
            least.append(part.least)
            greatest.append(part.greatest)
    return Values(min(least, default=None), max(greatest, default=None), nans)


def finite(value: float | int | bool | None) -> float | int | bool | str | None:
    """A value as JSON can hold it: infinities as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
