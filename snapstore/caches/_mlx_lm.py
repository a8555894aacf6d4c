"""mlx-lm prompt caches: a list with one cache object per layer, or a ``CacheList`` of several.

MLX arrays are never copied here. What is passed on, both ways, is a new handle to the same array (``copy.copy``): MLX
updates "in place" by giving the *handle* new contents, and reuses the memory only when no other
handle needs the old ones. So the live cache, the snapshot, and every cache restored from it go their own ways, and
memory is spent only when one of them is written to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from snapstore._types import JSON
from snapstore.caches._kinds import (
    Fill,
    Kind,
    always,
    class_name,
    kind_of,
    malformed,
    match_class,
    never,
    plan,
    read,
)
from snapstore.caches._tree import TensorType, TreeDecoder, TreeEncoder

TENSORS = TensorType(framework="mlx", matches=lambda value: type(value) is mx.array, handle=copy.copy)

_CACHE_LIST = "mlx_lm.models.cache.CacheList"
_KV = ("keys", "values", "offset")
_BATCH = (*_KV, "left_padding", "_idx")

_LAYERS = {
    "mlx_lm.models.cache.KVCache": Kind(kept=_KV, sliceable=always),
    "mlx_lm.models.cache.ConcatenateKVCache": Kind(kept=_KV, sliceable=always),
    "mlx_lm.models.cache.QuantizedKVCache": Kind(fixed=("group_size", "bits"), kept=_KV, sliceable=always),
    # Until the window is full, which is also what its own is_trimmable() says.
    "mlx_lm.models.cache.RotatingKVCache": Kind(
        fixed=("max_size", "keep"),
        kept=(*_KV, "_idx"),
        sliceable=lambda layer: layer.offset < layer.max_size,
    ),
    # is_trimmable() is always true of this one, but what it dropped at the front does not come back.
    "mlx_lm.models.cache.ChunkedKVCache": Kind(
        fixed=("chunk_size",),
        kept=(*_KV, "start_position"),
        sliceable=lambda layer: layer.start_position == 0,
    ),
    "mlx_lm.models.cache.ArraysCache": Kind(kept=("cache", "left_padding", "lengths"), sliceable=never),
    # Between prepare() and finalize() the rows are not aligned yet: no column is one token for all. What is pending
    # then is no part of mlx-lm's `state`, so an object that mlx-lm itself has loaded lacks the attribute.
    "mlx_lm.models.cache.BatchKVCache": Kind(
        kept=_BATCH,
        lazy=("_right_padding",),
        sliceable=lambda layer: getattr(layer, "_right_padding", None) is None,
    ),
    "mlx_lm.models.cache.BatchRotatingKVCache": Kind(
        fixed=("max_size",),
        kept=(*_BATCH, "_offset", "rotated"),
        lazy=("_lengths",),
        sliceable=lambda layer: layer._offset < layer.max_size and getattr(layer, "_lengths", None) is None,
    ),
    "mlx_lm.models.deepseek_v41.LayerCache": Kind(
        fixed=("window_size",),
        kept=("offset", "window", "compress_kv", "index_k", "pending_kv", "pending_gate"),
        sliceable=never,
    ),
}


def capture(cache: Sequence[Any], encoder: TreeEncoder, *, everything: bool) -> JSON:
    """The record of a cache list: one entry a layer, None for one that was not taken."""
    return _capture_layers(cache, encoder, everything, "layers")


def restore(cache: Sequence[Any], record: JSON, decoder: TreeDecoder) -> None:
    """Fill the layers of a cache list, all of them or, on an error, none."""
    fills = list(_plan_layers(cache, record, decoder, "layers"))
    for fill in fills:
        for name, value in fill.values.items():
            setattr(fill.target, name, value)


def _capture_layers(layers: Sequence[Any], encoder: TreeEncoder, everything: bool, path: str) -> list[JSON]:
    return [_capture(layer, encoder, everything, f"{path}.{index}") for index, layer in enumerate(layers)]


def _capture(layer: Any, encoder: TreeEncoder, everything: bool, path: str) -> JSON:
    if layer is None:
        return {"class": class_name(layer)}  # a gap in the list, which must be one in the other list, too
    if class_name(layer) == _CACHE_LIST:
        parts = _capture_layers(layer.caches, encoder, everything, path)
        return {"class": _CACHE_LIST, "caches": parts}
    kind = kind_of(layer, _LAYERS, path)
    return read(layer, kind, encoder, path) if everything or not kind.sliceable(layer) else None


def _plan_layers(layers: Sequence[Any], records: JSON, decoder: TreeDecoder, path: str) -> Iterator[Fill]:
    if not isinstance(records, list):
        raise malformed(path)
    if len(records) != len(layers):
        raise ValueError(
            f"{path}: the snapshot has {len(records)} layers, and the cache has {len(layers)}. "
            "Make the cache for the same model"
        )
    for index, (layer, record) in enumerate(zip(layers, records, strict=True)):
        if record is not None:
            yield from _plan(layer, record, decoder, f"{path}.{index}")


def _plan(layer: Any, record: JSON, decoder: TreeDecoder, path: str) -> Iterator[Fill]:
    if layer is None:
        match_class(layer, record, path)
    elif class_name(layer) == _CACHE_LIST:
        parts = match_class(layer, record, path).get("caches")
        yield from _plan_layers(layer.caches, parts, decoder, path)
    else:
        yield plan(layer, kind_of(layer, _LAYERS, path), record, decoder, path)
