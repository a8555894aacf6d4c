"""Snapshot <-> safetensors bytes, checksums, header-only reads. No framework imports, no disk.

The file is standard safetensors: 8 bytes of length (little-endian), JSON padded with spaces, data. What
snapstore says of the snapshot is in ``__metadata__``, behind a seal that always stands at the same place:

    <length>{"__metadata__":{"snapstore.header_checksum":"<16 digits>","snapstore.format":"1",...},"name":...

The seal is the xxh3_64 of the whole header, length and padding included, with its own digits taken as zeros.
It is looked at before the JSON is parsed, and every version of the format keeps it, so any flipped bit of the
header is found there. A file without tensor checksums has it too: no damage turns a file with checksums into
one without. A file that speaks of snapstore and does not begin so is one of ours with a damaged beginning;
what is left is a foreign safetensors file.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, get_args

from snapstore._checksum import ALGORITHM, DIGITS, checksum_around, checksums
from snapstore._errors import SnapshotCorruptError
from snapstore._json import (
    MAX_METADATA_BYTES,
    decode_metadata,
    encode_metadata,
    header_text,
    is_utf8,
    kind_of,
    parse_header,
    shown,
    split_header,
    to_json,
)
from snapstore._types import Framework

__all__ = [
    "FORMAT_VERSION",
    "ITEM_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_METADATA_BYTES",
    "Facts",
    "Header",
    "HeaderDraft",
    "Layout",
    "NewerFormatError",
    "TensorSpec",
    "check_specs",
    "checksums_of",
    "compare_checksums",
    "decode_header",
    "decode_metadata",
    "encode_header",
    "encode_metadata",
    "header_size",
    "verify_checksums",
]

FORMAT_VERSION = 1
FRAMEWORKS = get_args(Framework)
DATA_ALIGNMENT = 64
"""Where the data begins. A cache line: the kernel reads and writes files in half the time that 8 bytes take it."""
MAX_HEADER_BYTES = 100_000_000
"""Bound of the JSON part; safetensors' own."""

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors' dtype name. (safetensors 0.8 `Dtype`, whole-byte ones.)"""


class NewerFormatError(SnapshotCorruptError):
    """Nothing is wrong with the file; this version can not read it."""


class TensorSpec(NamedTuple):
    """Name, safetensors dtype name and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor lies in the data part of the file: widest elements first, so that all are aligned.

    ``specs``, ``offsets``, ``sizes`` are in the caller's order; ``file_order`` lists their indices by offset.
    """

    specs: tuple[TensorSpec, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    file_order: tuple[int, ...]
    nbytes: int

    @staticmethod
    def of(specs: Iterable[TensorSpec]) -> Layout:
        """The layout of these tensors. An engine saves the same ones again and again, so the last ones are kept."""
        return _layout_for(tuple(specs))


@lru_cache(maxsize=256)
def _layout_for(specs: tuple[TensorSpec, ...]) -> Layout:
    sizes = tuple(spec.nbytes for spec in specs)
    order = tuple(sorted(range(len(specs)), key=lambda i: -ITEM_BYTES[specs[i].dtype]))
    offsets = [0] * len(specs)
    ends = accumulate((sizes[i] for i in order), initial=0)
    for index, offset in zip(order, ends, strict=False):
        offsets[index] = offset
    return Layout(specs, sizes, tuple(offsets), order, sum(sizes))


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of itself. ``metadata_json`` is the user's metadata, by ``encode_metadata``."""

    request_id: str
    token_count: int
    generation: int
    framework: str
    metadata_json: str


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was read and checked. The specs are in the order in which the file lists them.

    Attributes:
        facts: ``None``: a good safetensors file, but not one of snapstore's.
        checksums: as ``checksums_of`` gives them; ``None``: the file was written without.
        data_offset: where the data part begins: bytes of the header, its length included.
    """

    layout: Layout
    facts: Facts | None
    checksums: str | None
    data_offset: int


_PREFIX = struct.Struct("<Q")

_OURS = "snapstore."
_SEAL = "snapstore.header_checksum"
_FORMAT = "snapstore.format"
_REQUEST = "snapstore.request_id"
_TOKENS = "snapstore.token_count"
_GENERATION = "snapstore.generation"
_FRAMEWORK = "snapstore.framework"
_METADATA = "snapstore.metadata"
_CHECKSUM = "snapstore.checksum"
_TENSORS = "snapstore.tensor_checksums"
_KEYS = frozenset({_SEAL, _FORMAT, _REQUEST, _TOKENS, _GENERATION, _FRAMEWORK, _METADATA, _CHECKSUM})

_OPENING = f'{{"__metadata__":{{"{_SEAL}":"'
_SEAL_AT = _PREFIX.size + len(_OPENING)
_FIRST = '{"__metadata__":'
_REMEMBERED_CHARACTERS = 256 * 1024

_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_MAX_TENSOR_BYTES = 2**63 - 1
_WHOLE = re.compile(r"0|[1-9][0-9]{0,254}")
_HEX = re.compile(r"[0-9a-f]*")


# --- checksums of the tensors ---


def checksums_of(layout: Layout, segments: Sequence[memoryview]) -> str:
    """xxh3_64 of each tensor, 16 hex digits each, in file order. ``segments``: flat bytes, as the specs."""
    return checksums(segments[index] for index in layout.file_order)


def verify_checksums(header: Header, segments: Sequence[memoryview]) -> None:
    """``SnapshotCorruptError`` naming the first tensor that is not as it was written. No checksums: fine."""
    if header.checksums is not None:
        compare_checksums(header, checksums_of(header.layout, segments))


def compare_checksums(header: Header, found: str) -> None:
    """``SnapshotCorruptError`` naming the first tensor whose checksum is another. No checksums: fine."""
    if header.checksums is None or found == header.checksums:
        return
    for position, index in enumerate(header.layout.file_order):  # pragma: no branch - one of them differs
        own = slice(position * DIGITS, (position + 1) * DIGITS)
        if found[own] != header.checksums[own]:
            raise SnapshotCorruptError(
                f"the bytes of tensor {shown(header.layout.specs[index].name)} were altered: "
                f"their {ALGORITHM} is {found[own]}, the file says {header.checksums[own]}"
            )


# --- writing a header ---


def check_specs(specs: Iterable[TensorSpec]) -> None:
    """``TypeError`` or ``ValueError`` for a name or a shape that no safetensors file can hold."""
    for spec in specs:
        name = spec.name
        if type(name) is not str:
            raise TypeError(f"a tensor's name must be a str, not {kind_of(name)}: {shown(name)}")
        if name == "__metadata__":
            raise ValueError(
                "a tensor can not be called '__metadata__': safetensors keeps that name to itself"
            )
        if not name.isascii() and not is_utf8(name):
            raise ValueError(f"tensor {shown(name)}: a lone surrogate in a name can not be written")
        if 0 in spec.shape and _nbytes(spec.dtype, spec.shape) is None:
            raise ValueError(f"tensor {shown(name)}: shape {shown(spec.shape)} is larger than can be indexed")


def encode_header(layout: Layout, facts: Facts, checksums: str | None) -> bytes:
    """All that stands before the data: length, JSON, padding to ``DATA_ALIGNMENT``. ``None``: no checksums.

    ``TypeError`` or ``ValueError`` for what ``check_specs`` refuses, and for more than safetensors' 100 MB.
    """
    return HeaderDraft(layout, facts, checksums=checksums is not None).filled_in(checksums or "")


class HeaderDraft:
    """A header whose ``checksums`` are still to be known: as long as it will be. Raises what ``encode_header`` does."""

    def __init__(self, layout: Layout, facts: Facts, *, checksums: bool) -> None:
        said = {
            _FORMAT: str(FORMAT_VERSION),
            _REQUEST: facts.request_id,
            _TOKENS: str(facts.token_count),
            _GENERATION: str(facts.generation),
            _FRAMEWORK: facts.framework,
            _METADATA: facts.metadata_json,
            _CHECKSUM: ALGORITHM,
        }
        if checksums:
            said[_TENSORS] = "0" * DIGITS * len(layout.specs)
        pairs = ",".join(f'"{name}":{to_json(text)}' for name, text in said.items())
        metadata = f'{_OPENING}{"0" * DIGITS}",{pairs}}}'.encode()
        self._header = _aligned(metadata + _entries(layout) + b"}")
        self._digits = len(said.get(_TENSORS, ""))
        self._end = _PREFIX.size + len(metadata) - len('"}')

    def __len__(self) -> int:
        return len(self._header)

    def filled_in(self, checksums: str) -> bytes:
        """The header with these digits, as many as there are to be, and with its own checksum."""
        header = self._header
        assert len(checksums) == self._digits
        header[self._end - len(checksums) : self._end] = checksums.encode()
        header[_SEAL_AT : _SEAL_AT + DIGITS] = checksum_around(memoryview(header), _SEAL_AT)
        return bytes(header)


@lru_cache(maxsize=64)
def _entries(layout: Layout) -> bytes:
    """What the header says of the tensors: the same at each save of the same ones."""
    check_specs(layout.specs)
    return "".join(
        f',{to_json(spec.name)}:{{"dtype":"{spec.dtype}","shape":[{",".join(map(str, spec.shape))}],'
        f'"data_offsets":[{offset},{offset + size}]}}'
        for spec, offset, size in zip(layout.specs, layout.offsets, layout.sizes, strict=True)
    ).encode()


def _aligned(body: bytes) -> bytearray:
    length = len(body) + -(_PREFIX.size + len(body)) % DATA_ALIGNMENT
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header takes {length} bytes, and safetensors allows {MAX_HEADER_BYTES}: "
            "use fewer tensors or shorter names"
        )
    return bytearray(_PREFIX.pack(length) + body.ljust(length))


# --- reading a header ---


def header_size(prefix: bytes | memoryview, file_size: int) -> int:
    """Bytes of the whole header, by the file's first 8 bytes: within the file, and within safetensors' bound.

    Ask before anything is allocated for it.
    """
    if len(prefix) < _PREFIX.size or file_size < _PREFIX.size:
        raise SnapshotCorruptError(f"the file ends within its first {_PREFIX.size} bytes")
    length: int = _PREFIX.unpack(prefix[: _PREFIX.size])[0]
    if length > MAX_HEADER_BYTES:
        raise SnapshotCorruptError(
            f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed"
        )
    if _PREFIX.size + length > file_size:
        raise SnapshotCorruptError(f"the header claims {length} bytes, and the whole file has {file_size}")
    return _PREFIX.size + length


def decode_header(raw: bytes | memoryview, file_size: int) -> Header:
    """Read a whole header (``header_size`` bytes) of a file of ``file_size`` bytes.

    ``SnapshotCorruptError`` for anything that no writer should have written.
    """
    view = memoryview(raw)
    size = header_size(view[: _PREFIX.size], file_size)
    if len(view) != size:
        raise SnapshotCorruptError(f"the header claims {size} bytes, and {len(view)} could be read")
    sealed = view[_PREFIX.size : _SEAL_AT] == _OPENING.encode()
    if sealed and view[_SEAL_AT : _SEAL_AT + DIGITS] != checksum_around(view, _SEAL_AT):
        raise SnapshotCorruptError("the header was altered: it does not match its checksum")
    text = header_text(view[_PREFIX.size :])
    if not sealed:
        return Header(_foreign_layout(text, file_size - size), None, None, size)
    said, tensors = split_header(text, len(_FIRST))
    metadata = _strings(said)
    _refuse_surrogates({}, metadata)
    _check_format(metadata)
    layout_in = _layout_in if len(tensors) <= _REMEMBERED_CHARACTERS else _layout_in.__wrapped__
    layout = layout_in(tensors, file_size - size)
    return Header(layout, _facts_of(metadata), _checksums_in(metadata, layout), size)


@lru_cache(maxsize=64)
def _layout_in(tensors: str, data_bytes: int) -> Layout:
    """What a header of ours says of the tensors: the same at each save of the same ones, so the last are kept."""
    table = parse_header(tensors)
    if "__metadata__" in table:
        raise SnapshotCorruptError(
            "the header is not the JSON of a safetensors file: two times '__metadata__'"
        )
    _refuse_surrogates(table, {})
    return _layout_of(table, data_bytes)


def _foreign_layout(text: str, data_bytes: int) -> Layout:
    """Of a header without a seal, which must not be one of ours."""
    table = parse_header(text)
    metadata = _strings(table.pop("__metadata__", None))
    _refuse_surrogates(table, metadata)
    if any(key.startswith(_OURS) for key in metadata):
        _check_format(metadata)
        raise SnapshotCorruptError("the header was altered: it does not begin as snapstore writes it")
    return _layout_of(table, data_bytes)


def _strings(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}  # not there, or null, as MLX writes it where there is none
    if type(metadata) is not dict or not set(map(type, metadata.values())) <= {str}:
        raise SnapshotCorruptError("__metadata__ must map strings to strings")
    return metadata


def _refuse_surrogates(table: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    for texts in (table, metadata, metadata.values()):
        if not is_utf8("".join(texts)):
            raise SnapshotCorruptError("the header holds a lone surrogate, which is no text")


def _check_format(metadata: Mapping[str, str]) -> None:
    version = _whole(metadata, _FORMAT)
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"written by a newer snapstore (format {version}), this one reads up to {FORMAT_VERSION}: "
            "upgrade snapstore"
        )
    if version < 1:
        raise SnapshotCorruptError(f"{_FORMAT} is {version}; the first format is 1")


def _layout_of(table: Mapping[str, Any], data_bytes: int) -> Layout:
    """Every tensor's place, checked: together they cover the data without a hole or an overlap."""
    entries = [_entry(name, entry) for name, entry in table.items()]
    specs = tuple(spec for spec, _, _ in entries)
    offsets = tuple(begin for _, begin, _ in entries)
    sizes = tuple(size for _, _, size in entries)
    wide = [-ITEM_BYTES[spec.dtype] for spec in specs]  # orders empty tensors at one place as Layout.of does
    order = tuple(sorted(range(len(specs)), key=lambda i: (offsets[i], sizes[i], wide[i])))
    end = 0
    for index in order:
        if offsets[index] != end:
            name = shown(specs[index].name)
            raise SnapshotCorruptError(
                f"tensor {name} begins at byte {offsets[index]} of the data, not at {end}"
            )
        end += sizes[index]
    if end != data_bytes:
        raise SnapshotCorruptError(f"the header lists {end} bytes of data, and the file has {data_bytes}")
    return Layout(specs, sizes, offsets, order, end)


def _entry(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """Spec, offset and size of one tensor. No int is negative here: ``parse_header`` has read them."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise _bad(name, "it must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in ITEM_BYTES:
        raise _bad(name, f"dtype {shown(dtype)} is not one that snapstore reads")
    if type(shape) is not list or not set(map(type, shape)) <= {int}:
        raise _bad(name, f"shape {shown(shape)} is not a list of sizes")
    if type(span) is not list or [*map(type, span)] != [int, int]:
        raise _bad(name, f"data_offsets {shown(span)} are not a begin and an end")
    nbytes = _nbytes(dtype, shape)
    if nbytes is None:
        raise _bad(name, f"shape {shown(shape)} is larger than can be indexed")
    if span[1] - span[0] != nbytes:
        raise _bad(name, f"it has {nbytes} bytes by its shape, and {span[1] - span[0]} by data_offsets")
    return TensorSpec(name, dtype, tuple(shape)), span[0], nbytes


def _bad(name: str, why: str) -> SnapshotCorruptError:
    return SnapshotCorruptError(f"tensor {shown(name)}: {why}")


def _nbytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; ``None`` if its extents, those of 0 aside, are more than numpy and torch can index.

    Stops at the first product that is too large: a million large extents must not become one huge number.
    """
    nbytes = ITEM_BYTES[dtype]
    for extent in shape:
        nbytes *= extent or 1
        if nbytes > _MAX_TENSOR_BYTES:
            return None
    return 0 if 0 in shape else nbytes


def _facts_of(metadata: Mapping[str, str]) -> Facts:
    wrong = (metadata.keys() - {_TENSORS}) ^ _KEYS
    if wrong:
        raise SnapshotCorruptError(f"__metadata__ lacks, or has and should not have: {shown(sorted(wrong))}")
    if metadata[_FRAMEWORK] not in FRAMEWORKS:
        raise SnapshotCorruptError(f"{_FRAMEWORK} is {shown(metadata[_FRAMEWORK])}, none of {FRAMEWORKS}")
    return Facts(
        request_id=metadata[_REQUEST],
        token_count=_whole(metadata, _TOKENS),
        generation=_whole(metadata, _GENERATION),
        framework=metadata[_FRAMEWORK],
        metadata_json=metadata[_METADATA],
    )


def _checksums_in(metadata: Mapping[str, str], layout: Layout) -> str | None:
    if metadata[_CHECKSUM] != ALGORITHM:
        raise SnapshotCorruptError(f"checksums by {shown(metadata[_CHECKSUM])}; this one knows {ALGORITHM}")
    digits = metadata.get(_TENSORS)
    if digits is not None and (len(digits) != DIGITS * len(layout.specs) or not _HEX.fullmatch(digits)):
        raise SnapshotCorruptError(f"{_TENSORS} must have {DIGITS} hex digits for each tensor")
    return digits


def _whole(metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(key, "")
    if not _WHOLE.fullmatch(text):
        raise SnapshotCorruptError(f"{key} is {shown(text)}, not a whole number")
    return int(text)
