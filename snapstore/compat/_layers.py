"""Layer states <-> named tensors and JSON; and the files that oMLX itself wrote.

A saved state is any value of tensors and plain data: flat or nested tuples and lists, ``None`` where there is a gap,
numbers, text, dicts. It comes back equal, type for type.

oMLX's own files are safetensors, told from each other by the names of their tensors:

    layer_{i}_state_{k}            element k of layer i
    layer_{i}_sub_{j}_state_{k}    element k of cache j in layer i, a CacheList
    layer_{i}_0, layer_{i}_1       the older form: two elements a layer

Such a file has no other place for what is no tensor than its metadata. Read from there are ``num_layers``, and every
``layer_{i}_<field>`` as ``<field>`` of layer i (JSON where it is JSON, else text). An element that no tensor is
there for is ``None``, up to ``state_count``; a layer without any has the empty state ``()``.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from snapstore._errors import SnapshotCorruptError
from snapstore._files import FileSystem, opened, read_exactly
from snapstore._format import Header, decode_metadata
from snapstore._json import header_text, parse_header
from snapstore._reader import read_data, read_header
from snapstore._types import JSON
from snapstore.adapters import adapter_named
from snapstore.caches._tree import TensorType, TreeDecoder, TreeEncoder

LAYERS = "snapstore.compat.omlx"
"""The key of our metadata."""

LAYERS_MAX = 10_000
"""More layers or elements than any model has: a number in a foreign file is not an amount of memory to take."""

_FRAMEWORKS = {"mlx", "numpy", "torch"}
_FLAT = re.compile(r"layer_(\d{1,9})_state_(\d{1,9})")
_NESTED = re.compile(r"layer_(\d{1,9})_sub_(\d{1,9})_state_(\d{1,9})")
_OLDER = re.compile(r"layer_(\d{1,9})_([01])")
_FIELD = re.compile(r"layer_(\d{1,9})_([a-z_]+)")

Layers = list[dict[str, Any]]


def _is_tensor(value: object) -> bool:
    roots = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return bool(roots & _FRAMEWORKS) and hasattr(value, "dtype") and hasattr(value, "shape")


TENSORS = TensorType(framework="mlx", matches=_is_tensor, handle=lambda tensor: tensor)
"""The store takes the bytes before ``save`` returns; what a cache does to its arrays later does not reach them."""


def take_apart(layers: Sequence[Any], block_size: int | None) -> tuple[dict[str, Any], dict[str, JSON]]:
    """Tensors and metadata for ``SnapshotStore.save``. ``TypeError`` names what no snapshot can hold."""
    encoder = TreeEncoder(TENSORS)
    skeleton = encoder.encode(list(layers), "layers")
    return encoder.tensors, {LAYERS: {"format": 1, "block_size": block_size, "layers": skeleton}}


def put_together(tensors: Mapping[str, Any], metadata: Any) -> Layers:
    """What ``take_apart`` was given. ``ValueError`` if the metadata is not its."""
    match metadata:
        case {"snapstore.compat.omlx": {"format": 1, "layers": list() as skeleton}}:
            layers: Layers = TreeDecoder(TENSORS, tensors).decode(skeleton)
            return layers
    raise ValueError("it was not saved by BoundarySnapshotSSDStore")


def read_file(files: FileSystem, path: str) -> Layers:
    """The layers in any file of ours or of oMLX, in memory of the caller's own. Blocks for the disk.

    ``SnapshotCorruptError`` if it is no sound safetensors file, ``ValueError`` if its tensors are not laid out as
    layers, ``OSError`` from the disk and for a link.
    """
    with opened(files, files.open_read(path)) as fd:
        header = read_header(files, fd)
        buffer = read_data(files, fd, header, verify=True)
        texts = _foreign_metadata(files, fd, header) if header.facts is None else {}
    adapter = adapter_named(header.facts.framework if header.facts else "mlx")
    tensors = adapter.from_host(header.layout, buffer, None)
    if header.facts is not None:
        return put_together(tensors, decode_metadata(header.facts.metadata_json))
    return from_names(tensors, texts)


def from_names(tensors: Mapping[str, Any], texts: Mapping[str, str]) -> Layers:
    """The layers of a file of oMLX, from the names of its tensors and its metadata; see the header of this module."""
    flat: dict[int, dict[int, Any]] = defaultdict(dict)
    nested: dict[int, dict[int, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    forms: dict[int, set[str]] = defaultdict(set)
    for name, tensor in tensors.items():
        if found := _NESTED.fullmatch(name):
            layer, part, element = (_number(text, name) for text in found.groups())
            nested[layer][part][element] = tensor
            forms[layer].add("nested")
        elif found := _FLAT.fullmatch(name) or _OLDER.fullmatch(name):
            layer, element = (_number(text, name) for text in found.groups())
            flat[layer][element] = tensor
            forms[layer].add("flat" if found.re is _FLAT else "older")
        else:
            raise ValueError(f"tensor {name[:80]!r} has no name of a layer's state")
    for layer, mixed in forms.items():
        if len(mixed) > 1:
            raise ValueError(f"layer {layer} is there in more than one form: {', '.join(sorted(mixed))}")
    fields, count = _fields(texts)
    total = max([count, *(layer + 1 for layer in (*forms, *fields))])
    return [_layer(fields.get(i, {}), flat.get(i, {}), nested.get(i, {})) for i in range(total)]


def _layer(
    fields: Mapping[str, Any], flat: Mapping[int, Any], nested: Mapping[int, Mapping[int, Any]]
) -> dict[str, Any]:
    count = fields.get("state_count", 0)
    count = count if type(count) is int and 0 <= count <= LAYERS_MAX else 0
    parts = {part: _elements(elements, 0) for part, elements in nested.items()}
    state = _elements(parts, count) if nested else _elements(flat, count)
    return {**fields, "state": state}


def _elements(found: Mapping[int, Any], count: int) -> tuple[Any, ...]:
    return tuple(found.get(index) for index in range(max([count, *(index + 1 for index in found)])))


def _fields(texts: Mapping[str, str]) -> tuple[dict[int, dict[str, Any]], int]:
    """What the metadata says of each layer, and how many there are at least."""
    fields: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, text in texts.items():
        if found := _FIELD.fullmatch(name):
            fields[_number(found[1], name)][found[2]] = _plain(text)
    count = texts.get("num_layers", "0")
    return fields, _number(count, "num_layers") if count.isdecimal() else 0


def _number(text: str, name: str) -> int:
    number = int(text) if len(text) < 10 else LAYERS_MAX
    if number >= LAYERS_MAX:
        raise ValueError(f"{name[:80]!r} speaks of more layers or elements than any model has")
    return number


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _foreign_metadata(files: FileSystem, fd: int, header: Header) -> dict[str, str]:
    """The texts in the header of an open file that ``read_header`` has found sound."""
    raw = bytearray(header.data_offset)
    count = read_exactly(files, fd, memoryview(raw), 0)
    if count < len(raw):
        raise SnapshotCorruptError(f"the file was cut to {count} bytes while it was read")
    texts: dict[str, str] = parse_header(header_text(memoryview(raw)[8:])).get("__metadata__") or {}
    return texts
