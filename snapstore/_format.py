"""Snapshot <-> safetensors bytes, checksums, header-only reads. No framework imports, no disk.

The file is standard safetensors: 8 bytes of length (little-endian), a JSON header padded with spaces, the data.
What snapstore says of the snapshot is in ``__metadata__``, behind a seal that always stands at the same place::

    <length>{"__metadata__":{"snapstore.header_checksum":"<16 digits>","snapstore.format":"1",...},"<name>":{...},...}

The seal is the xxh3_64 of the whole header, length and padding included, with its own digits taken as zeros. It is
looked at before the JSON is parsed, and every format version keeps it: any flipped bit is found here. Also a file
without tensor checksums has it, so no damage can turn a file with checksums into one without. A file that does not
begin so, but mentions snapstore, is one of ours whose beginning was damaged. What is left is a foreign safetensors file.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

from xxhash import xxh3_64

from snapstore._errors import SnapshotCorruptError

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000
"""Bound of the JSON part; safetensors' own."""
MAX_METADATA_BYTES = 1024 * 1024
MAX_METADATA_DEPTH = 100
"""Lists and dicts inside each other: far below the stack that any JSON parser has."""

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors' dtype name. (safetensors 0.8 `Dtype`, whole-byte ones.)"""


@dataclass(frozen=True, slots=True)
class TensorSpec:
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

    ``specs``, ``offsets`` and ``sizes`` are in the caller's order; ``file_order`` lists their indices by offset.
    """

    specs: tuple[TensorSpec, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    file_order: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> Layout:
        specs = tuple(specs)
        sizes = tuple(spec.nbytes for spec in specs)
        order = tuple(sorted(range(len(specs)), key=lambda i: -ITEM_BYTES[specs[i].dtype]))
        offsets = [0] * len(specs)
        ends = accumulate((sizes[i] for i in order), initial=0)
        for index, offset in zip(order, ends, strict=False):
            offsets[index] = offset
        return cls(specs, sizes, tuple(offsets), order, sum(sizes))


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of itself. ``metadata_json`` is the user's metadata, encoded once by ``encode_metadata``."""

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


_ALGORITHM = "xxh3_64"
_DIGITS = 16
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

_OPENING = f'{{"__metadata__":{{"{_SEAL}":"'.encode()
_SEAL_AT = _PREFIX.size + len(_OPENING)
_NO_SEAL = "0" * _DIGITS

_MAX_TENSOR_BYTES = 2**63 - 1
"""Of the extents that are not 0: what numpy and torch can index, so that no empty tensor has a shape they refuse."""
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_WHOLE = re.compile(r"0|[1-9][0-9]{0,254}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]*", re.ASCII)


# --- the user's metadata ---

_SCALARS = frozenset({type(None), bool, int, float, str})
_JSON_TYPES = _SCALARS | {list, dict}
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_INSTEAD = {
    tuple: "use a list",
    set: "use a list",
    frozenset: "use a list",
    bytes: "save it as a uint8 tensor",
}


def encode_metadata(value: object) -> str:
    """The JSON text of ``value``, which ``decode_metadata`` turns back into an equal one.

    Nothing is converted: what JSON would change on the way (a tuple, an int as a key, NaN) is ``TypeError`` or
    ``ValueError``, which says where it is and what to use instead. A lone surrogate in a string is escaped.
    """
    if value is None:
        return "null"
    if not _is_plain(value):
        raise _why_not_plain(value)
    try:
        text = _WRITER.encode(value)
    except ValueError as error:  # NaN, an infinity, or an int of too many digits
        raise _why_not_plain(value) from error
    if text.isascii():
        nbytes = len(text)
    else:
        written = text.encode("utf-8", "backslashreplace")  # a lone surrogate: as JSON escapes it, \\udXXX
        nbytes, escaped = len(written), written.decode()
        if len(escaped) != len(text) and _SURROGATE_PAIR.search(text):
            raise ValueError(
                "metadata: a string holds the two halves of a surrogate pair; join them to one character"
            )
        text = escaped
    if nbytes > MAX_METADATA_BYTES:
        raise _too_large()
    return text


def decode_metadata(text: str) -> Any:
    """What was given to ``encode_metadata``; a fresh value at each call."""
    if text == "null":
        return None
    try:
        return _METADATA_READER.decode(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotCorruptError(f"the user's metadata is not JSON: {error}") from error


def _is_plain(value: object) -> bool:
    """True if JSON has a word for all of it, within the limits of depth and size. Level by level, at C speed.

    Counting what is seen bounds the time also where the same list stands in itself or many times in another.
    """
    level, seen = [value], 0
    for _ in range(MAX_METADATA_DEPTH + 1):
        kinds = set(map(type, level))
        if kinds <= _SCALARS:
            return True
        if not kinds <= _JSON_TYPES:
            return False
        below: list[object] = []
        for item in level:
            if type(item) is list:
                below += item
            elif type(item) is dict:
                if not set(map(type, item)) <= {str}:
                    return False
                below += item.values()
            if seen + len(below) > MAX_METADATA_BYTES:
                return False
        level, seen = below, seen + len(below)
    return False


def _why_not_plain(value: object) -> TypeError | ValueError:
    """The error for the outermost thing in ``value`` that is not JSON."""
    queue, seen = deque([("metadata", value, 1)]), 0
    while queue:
        where, item, depth = queue.popleft()
        wrong = _wrong_with(where, item)
        if wrong is not None:
            return wrong
        if type(item) is list:
            below = [(f"{where}[{index}]", child, depth + 1) for index, child in enumerate(item)]
        elif type(item) is dict:
            below = [(where + _step(key), child, depth + 1) for key, child in item.items()]
        else:
            continue
        if depth > MAX_METADATA_DEPTH:
            return ValueError(f"{where}: nested deeper than {MAX_METADATA_DEPTH} lists and dicts; flatten it")
        seen += len(below)
        if seen > MAX_METADATA_BYTES:
            break
        queue += below
    return _too_large()


def _wrong_with(where: str, item: object) -> TypeError | ValueError | None:
    if type(item) is float and not math.isfinite(item):
        return ValueError(f"{where}: {item} is not a JSON number; use None or a string")
    if type(item) is int:
        try:
            str(item)
        except ValueError as error:
            return ValueError(f"{where}: the int can not be written ({error}); use a string")
    if type(item) is dict:
        for key in item:
            if type(key) is not str:
                return TypeError(f"{where}: the key {_shown(key)} is {_kind(key)}; JSON keys are strings")
    if type(item) not in _JSON_TYPES:
        return TypeError(f"{where}: {_kind(item)} is not a JSON value; {_instead_of(item)}")
    return None


def _instead_of(item: object) -> str:
    for plain in (int, float, str, list, dict):
        if isinstance(item, plain):
            return f"use {plain.__name__}(...) of it"
    if hasattr(item, "tolist"):
        return "use its .tolist(), or save it as a tensor"
    return _INSTEAD.get(type(item), "use None, bool, int, float, str, list or dict")


def _kind(item: object) -> str:
    cls = type(item)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _step(key: str) -> str:
    return f".{key}" if key.isidentifier() and len(key) <= 64 else f"[{_shown(key)}]"


def _shown(item: object) -> str:
    text = repr(item)
    return text if len(text) <= 64 else text[:61] + "..."


def _too_large() -> ValueError:
    return ValueError(
        f"metadata: more than {MAX_METADATA_BYTES} bytes as JSON; keep it small, or save the large part as a tensor"
    )


# --- checksums of the tensors ---

_SLICE_BYTES = 64 * 1024
"""xxhash releases the GIL for more than this; one slice takes 1 to 10 us."""
_SMALL_BYTES = 1024 * 1024
_HELD_BYTES = 4 * 1024 * 1024


def checksums_of(layout: Layout, segments: Sequence[memoryview]) -> str:
    """xxh3_64 of each tensor's bytes as 16 hex digits, in file order. ``segments`` (flat bytes) are as ``layout.specs``.

    Large tensors are hashed with the GIL released. Each release can cost a 5 ms turn beside a hungry thread, so small
    ones are hashed in slices that keep it, but never more than 4 MiB (a millisecond) in a row. Measured, 48 tensors of
    341 KB beside a hungry thread: 144 ms with a release for each, 1 ms with none.
    """
    digits, held = [], 0
    for index in layout.file_order:
        segment = segments[index]
        nbytes = len(segment)
        held += nbytes
        if _SLICE_BYTES < nbytes <= _SMALL_BYTES and held <= _HELD_BYTES:
            digest = xxh3_64()
            for start in range(0, nbytes, _SLICE_BYTES):
                digest.update(segment[start : start + _SLICE_BYTES])
        else:
            digest = xxh3_64(segment)
            held = held if nbytes <= _SLICE_BYTES else 0
        digits.append(digest.hexdigest())
    return "".join(digits)


def verify_checksums(header: Header, segments: Sequence[memoryview]) -> None:
    """``SnapshotCorruptError`` naming the first tensor whose bytes are not what was written. No checksums: fine."""
    if header.checksums is None:
        return
    found = checksums_of(header.layout, segments)
    if found == header.checksums:
        return
    for position, index in enumerate(header.layout.file_order):
        digits = slice(position * _DIGITS, (position + 1) * _DIGITS)
        if found[digits] != header.checksums[digits]:
            name = header.layout.specs[index].name
            raise SnapshotCorruptError(
                f"the bytes of tensor {_shown(name)} were altered: {_ALGORITHM} is {found[digits]}, "
                f"the file says {header.checksums[digits]}"
            )


# --- writing a header ---

_WRITER = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"))


def check_specs(specs: Iterable[TensorSpec]) -> None:
    """``TypeError`` or ``ValueError`` for a name or a shape that no safetensors file can hold."""
    for spec in specs:
        name = spec.name
        if type(name) is not str:
            raise TypeError(f"a tensor's name must be a str, not {_kind(name)}: {_shown(name)}")
        if name == "__metadata__":
            raise ValueError(
                "a tensor can not be called '__metadata__': safetensors keeps that name for itself"
            )
        if not name.isascii() and not _is_utf8(name):
            raise ValueError(f"tensor {_shown(name)}: a name with a lone surrogate can not be written")
        if 0 in spec.shape and _extent_bytes(spec.dtype, spec.shape) is None:
            raise ValueError(
                f"tensor {_shown(name)}: shape {_shown(spec.shape)} is beyond what can be indexed"
            )


def encode_header(layout: Layout, facts: Facts, checksums: str | None) -> bytes:
    """Length, JSON and padding: all that stands before the data; a multiple of 8 bytes. ``None``: no checksums.

    ``ValueError`` for what ``check_specs`` refuses, and for more than safetensors' 100 MB.
    """
    check_specs(layout.specs)
    said = {
        _FORMAT: str(FORMAT_VERSION),
        _REQUEST: facts.request_id,
        _TOKENS: str(facts.token_count),
        _GENERATION: str(facts.generation),
        _FRAMEWORK: facts.framework,
        _METADATA: facts.metadata_json,
        _CHECKSUM: _ALGORITHM,
    }
    if checksums is not None:
        said[_TENSORS] = checksums
    quoted = _WRITER.encode
    tensors = [
        f',{quoted(spec.name)}:{{"dtype":"{spec.dtype}","shape":[{",".join(map(str, spec.shape))}],'
        f'"data_offsets":[{offset},{offset + size}]}}'
        for spec, offset, size in zip(layout.specs, layout.offsets, layout.sizes, strict=True)
    ]
    return _sealed(f'{_NO_SEAL}",{quoted(said)[1:]}{"".join(tensors)}}}')


def _sealed(after_opening: str) -> bytes:
    """The whole header, from what follows its fixed beginning."""
    body = _OPENING + after_opening.encode()
    padding = -len(body) % 8
    length = len(body) + padding
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header takes {length} bytes and safetensors allows {MAX_HEADER_BYTES}: use fewer tensors or shorter names"
        )
    header = _PREFIX.pack(length) + body + b" " * padding
    return header[:_SEAL_AT] + _seal_of(memoryview(header)) + header[_SEAL_AT + _DIGITS :]


def _seal_of(header: memoryview) -> bytes:
    digest = xxh3_64(header[:_SEAL_AT])
    digest.update(_NO_SEAL)
    digest.update(header[_SEAL_AT + _DIGITS :])
    return digest.hexdigest().encode()


# --- reading a header ---


def header_size(prefix: bytes | memoryview, file_size: int) -> int:
    """Bytes of the whole header, from the file's first 8 bytes; within the file and within safetensors' bound.

    Look here before allocating anything.
    """
    if len(prefix) < _PREFIX.size or file_size < _PREFIX.size:
        raise SnapshotCorruptError(f"the file ends within its first 8 bytes ({file_size} in all)")
    (length,) = _PREFIX.unpack(prefix[: _PREFIX.size])
    size: int = _PREFIX.size + length
    if length > MAX_HEADER_BYTES:
        raise SnapshotCorruptError(
            f"the header says it has {length} bytes; at most {MAX_HEADER_BYTES} are allowed"
        )
    if size > file_size:
        raise SnapshotCorruptError(
            f"the header says it has {length} bytes, and the file only {file_size} in all"
        )
    return size


def decode_header(raw: bytes | memoryview, file_size: int) -> Header:
    """Read a whole header (``header_size`` bytes) of a file of ``file_size``. ``SnapshotCorruptError`` if anything is off."""
    view = memoryview(raw)
    size = header_size(view[: _PREFIX.size], file_size)
    if len(view) != size:
        raise SnapshotCorruptError(f"the header has {size} bytes, and {len(view)} could be read")
    sealed = view[_PREFIX.size : _SEAL_AT] == _OPENING
    if sealed and view[_SEAL_AT : _SEAL_AT + _DIGITS] != _seal_of(view):
        raise SnapshotCorruptError("the header was altered: it does not match its checksum")
    table = _parse(view[_PREFIX.size :])
    metadata = _strings(table.pop("__metadata__", {}))
    _refuse_surrogates(table, metadata)
    ours = sealed or any(key.startswith(_OURS) for key in metadata)
    if ours:
        _check_format(metadata)
    if ours and not sealed:
        raise SnapshotCorruptError("the header was altered: it does not begin as snapstore writes it")
    layout = _layout_of(table, file_size - size)
    if not ours:
        return Header(layout, None, None, size)
    return Header(layout, _facts_of(metadata), _checksums_of(metadata, layout), size)


def _parse(body: memoryview) -> dict[str, Any]:
    if body[:1] != b"{":
        raise SnapshotCorruptError("the header does not begin with '{'")
    try:
        table: dict[str, Any] = _HEADER_READER.decode(str(body, "utf-8"))
    except RecursionError as error:
        raise SnapshotCorruptError("the header is nested too deep") from error
    except ValueError as error:
        raise SnapshotCorruptError(f"the header is not the JSON of a safetensors file: {error}") from error
    return table


def _strings(metadata: object) -> dict[str, str]:
    if type(metadata) is not dict or not set(map(type, metadata.values())) <= {str}:
        raise SnapshotCorruptError("__metadata__ must map strings to strings")
    return metadata


def _refuse_surrogates(table: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    for texts in (table, metadata, metadata.values()):
        if not _is_utf8("".join(texts)):
            raise SnapshotCorruptError("the header holds a lone surrogate, which is no text")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_format(metadata: Mapping[str, str]) -> None:
    version = _whole(metadata, _FORMAT)
    if version > FORMAT_VERSION:
        raise SnapshotCorruptError(
            f"written by a newer snapstore (format {version}), this one reads up to {FORMAT_VERSION}: upgrade snapstore"
        )
    if version < 1:
        raise SnapshotCorruptError(f"{_FORMAT} is {version}; the first format is 1")


def _layout_of(table: Mapping[str, Any], data_bytes: int) -> Layout:
    """Every tensor's place, checked: together they cover the data part without a hole or an overlap."""
    entries = [_entry(name, entry) for name, entry in table.items()]
    specs = tuple(spec for spec, _, _ in entries)
    offsets = tuple(begin for _, begin, _ in entries)
    sizes = tuple(size for _, _, size in entries)
    wide = [
        -ITEM_BYTES[spec.dtype] for spec in specs
    ]  # among empty tensors at one place: as Layout.of orders them
    order = tuple(sorted(range(len(specs)), key=lambda i: (offsets[i], sizes[i], wide[i])))
    end = 0
    for index in order:
        if offsets[index] != end:
            name = _shown(specs[index].name)
            raise SnapshotCorruptError(
                f"tensor {name} begins at byte {offsets[index]} of the data, not at {end}"
            )
        end += sizes[index]
    if end != data_bytes:
        raise SnapshotCorruptError(f"the file has {data_bytes} bytes of data, and its header lists {end}")
    return Layout(specs, sizes, offsets, order, end)


def _entry(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """Spec, offset and size of one tensor. Ints are not negative here: ``_extent`` has read them."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise SnapshotCorruptError(
            f"tensor {_shown(name)} must have dtype, shape and data_offsets, and nothing else"
        )
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in ITEM_BYTES:
        raise SnapshotCorruptError(
            f"tensor {_shown(name)}: dtype {_shown(dtype)} is not one that snapstore reads"
        )
    if type(shape) is not list or not set(map(type, shape)) <= {int}:
        raise SnapshotCorruptError(f"tensor {_shown(name)}: shape {_shown(shape)} is not a list of sizes")
    if type(span) is not list or [*map(type, span)] != [int, int]:
        raise SnapshotCorruptError(
            f"tensor {_shown(name)}: data_offsets {_shown(span)} are not a begin and an end"
        )
    nbytes = _extent_bytes(dtype, shape)
    if nbytes is None:
        raise SnapshotCorruptError(
            f"tensor {_shown(name)}: shape {_shown(shape)} is beyond what can be indexed"
        )
    begin, end = span
    if end - begin != nbytes:
        raise SnapshotCorruptError(
            f"tensor {_shown(name)}: {nbytes} bytes by its shape, {end - begin} by its place"
        )
    return TensorSpec(name, dtype, tuple(shape)), begin, nbytes


def _extent_bytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; ``None`` where they, or those of its extents that are not 0, can not be indexed.

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
        raise SnapshotCorruptError(f"__metadata__ lacks, or has and should not, {_shown(sorted(wrong))}")
    return Facts(
        request_id=metadata[_REQUEST],
        token_count=_whole(metadata, _TOKENS),
        generation=_whole(metadata, _GENERATION),
        framework=metadata[_FRAMEWORK],
        metadata_json=metadata[_METADATA],
    )


def _checksums_of(metadata: Mapping[str, str], layout: Layout) -> str | None:
    if metadata[_CHECKSUM] != _ALGORITHM:
        raise SnapshotCorruptError(
            f"checksums by {_shown(metadata[_CHECKSUM])}; this snapstore knows {_ALGORITHM}"
        )
    checksums = metadata.get(_TENSORS)
    if checksums is None:
        return None
    if len(checksums) != _DIGITS * len(layout.specs) or not _HEX.fullmatch(checksums):
        raise SnapshotCorruptError(f"{_TENSORS} must have {_DIGITS} hex digits for each of the tensors")
    return checksums


def _whole(metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(key, "")
    if not _WHOLE.fullmatch(text):
        raise SnapshotCorruptError(f"{key} is {_shown(text)}, not a whole number")
    return int(text)


# --- strict JSON: hooks of the two readers ---


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_shown(twice)} stands there twice")
    return table


def _extent(text: str) -> int:
    if len(text) > 19 or text[0] == "-":  # bounded before the digits are turned into a number
        raise ValueError(f"{_shown(text)} is not a size")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{_shown(text)} has no place there")


_METADATA_READER = json.JSONDecoder(parse_constant=_refuse)
_HEADER_READER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_extent, parse_float=_refuse, parse_constant=_refuse
)
