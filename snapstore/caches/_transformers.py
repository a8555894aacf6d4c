"""Hugging Face transformers caches: a ``Cache`` with one layer object per model layer.

Most layers grow by ``torch.cat`` and drop the old tensor, static and recurrent ones write with ``copy_`` into memory
that stays, and ``reset`` zeroes either kind in some versions. So a restored cache always gets tensors of its own.

``dtype`` and ``device`` of a layer are not saved: they follow from its tensors, which may have been loaded to another
device than they came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

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

TENSORS = TensorType(
    framework="torch",
    # By exact type: a subclass (a quantised or a distributed tensor) is more than its bytes.
    matches=lambda value: type(value) in (torch.Tensor, torch.nn.Parameter),
    handle=lambda tensor: tensor,
)

# -- the allow-list: building blocks first, as the library's classes inherit ------------------------------------------

_DYNAMIC = Kind(
    kept=("keys", "values", "is_initialized"),
    apart=("dtype", "device"),
    sliceable=always,
)
_WINDOW = Kind(
    fixed=("sliding_window",),
    kept=("cumulative_length", "record_past"),
    apart=("_sliding_window_tensor",),
    # A full window drops tokens. is_croppable is true even then.
    sliceable=lambda layer: layer.get_seq_length() < layer.sliding_window,
)
_INDEXER = Kind(
    kept=("indexer_keys", "indexer_position_ids", "is_indexer_initialized"),
    apart=("indexer_dtype", "indexer_device"),
    sliceable=always,
)
_STATIC = replace(
    _DYNAMIC,
    fixed=("max_cache_len",),
    kept=(*_DYNAMIC.kept, "cumulative_length"),
    lazy=("batch_size", "max_batch_size", "num_heads", "k_head_dim", "v_head_dim"),
    in_place=("keys", "values", "cumulative_length"),
)
_STATIC_WINDOW = Kind(
    kept=("cumulative_length_int",),
    sliceable=lambda layer: layer.get_seq_length() <= layer.max_cache_len,
)
_LINEAR = Kind(
    fixed=("number_of_states",),
    kept=(
        "conv_states",
        "recurrent_states",
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "has_previous_state",
        "record_past",
    ),
    lazy=("conv_kernel_size", "max_batch_size"),
    apart=("dtype", "device"),
    in_place=("conv_states", "recurrent_states"),
    sliceable=never,
)
_HCA = Kind(
    fixed=("compress_rate",),
    kept=("buffer_kv", "buffer_gate", "compressed_kv", "entry_count"),
    sliceable=never,
)
_MODULE = "transformers.cache_utils"
_DEEPSEEK_V4 = "transformers.models.deepseek_v4.modeling_deepseek_v4"
_MINIMAX_M3 = "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl"

_LAYERS = {
    f"{_MODULE}.DynamicLayer": _DYNAMIC,
    f"{_MODULE}.DynamicSlidingWindowLayer": _DYNAMIC | _WINDOW,
    f"{_MODULE}.DynamicIndexedLayer": _DYNAMIC | _INDEXER,
    f"{_MODULE}.StaticLayer": _STATIC,
    f"{_MODULE}.StaticSlidingWindowLayer": _STATIC | _STATIC_WINDOW,
    f"{_MODULE}.StaticIndexedLayer": _STATIC
    | replace(
        _INDEXER,
        kept=(*_INDEXER.kept, "indexer_cumulative_length"),
        in_place=("indexer_keys", "indexer_cumulative_length"),
    ),
    # Its scale is that of the first chunk, and a shorter cache might have had a shorter one.
    f"{_MODULE}.Fp8QuantizedLayer": _DYNAMIC
    | Kind(kept=("cumulative_length", "_quantized_keys", "_quantized_values"), sliceable=never),
    f"{_MODULE}.LinearAttentionLayer": _LINEAR,
    f"{_MODULE}.LinearAttentionAndFullAttentionLayer": _DYNAMIC | _LINEAR,
    f"{_MODULE}.LinearAttentionAndSlidingWindowAttentionLayer": _DYNAMIC | _WINDOW | _LINEAR,
    f"{_MODULE}.LinearAttentionAndStaticFullAttentionLayer": _STATIC | _LINEAR,
    f"{_MODULE}.LinearAttentionAndStaticSlidingWindowAttentionLayer": _STATIC | _STATIC_WINDOW | _LINEAR,
    f"{_MODULE}.DummyLayer": Kind(kept=("keys", "values", "is_initialized"), sliceable=always),
    f"{_DEEPSEEK_V4}.DeepseekV4HCACache": _DYNAMIC | _WINDOW | _HCA,
    f"{_DEEPSEEK_V4}.DeepseekV4CSACache": _DYNAMIC
    | _WINDOW
    | _HCA
    | Kind(kept=("overlap_kv", "overlap_gate")),
    f"{_MINIMAX_M3}.MiniMaxM3VLSparseCacheLayer": _DYNAMIC | Kind(kept=("idx_keys",), sliceable=always),
    f"{_MINIMAX_M3}.MiniMaxM3VLSparseStaticCacheLayer": _STATIC
    | Kind(
        kept=("idx_keys", "idx_cumulative_length"),
        in_place=("idx_keys", "idx_cumulative_length"),
        sliceable=always,
    ),
}

# `_is_user_defined` is a mark that generate() leaves.
_CACHE = Kind(apart=("layers", "layer_class_to_replicate", "offloading", "_is_user_defined"))
_PARTS = ("self_attention_cache", "cross_attention_cache")

_CACHES = {
    f"{_MODULE}.Cache": _CACHE,
    f"{_MODULE}.DynamicCache": _CACHE,
    f"{_MODULE}.StaticCache": _CACHE,
    f"{_MODULE}.QuantizedCache": _CACHE,
    f"{_MODULE}.MtpCache": _CACHE,
    f"{_MODULE}.DFlashCache": _CACHE | Kind(kept=("_previous_number_of_accepted_tokens",)),
    f"{_MODULE}.EncoderDecoderCache": Kind(kept=("is_updated",), apart=(*_PARTS, "_is_user_defined")),
    "transformers.models.minimax.modeling_minimax.MiniMaxCache": _CACHE | Kind(kept=("linear_cache",)),
}

# -- capture ----------------------------------------------------------------------------------------------------------


def capture(cache: Any, encoder: TreeEncoder, *, everything: bool, path: str = "") -> JSON:
    """The record of a cache: its own state, and one entry a layer, None for one that was not taken."""
    kind = _cache_kind(cache, path)
    record = read(cache, kind, encoder, path or "cache")
    if _is_pair(cache):
        # No prefix of the decoder's tokens is a prefix of the encoder's: cross attention can not be sliced.
        for part, whole in zip(_PARTS, (everything, True), strict=True):
            record[part] = capture(getattr(cache, part), encoder, everything=whole, path=f"{path}{part}.")
        return record
    record["layers"] = [
        _capture_layer(layer, encoder, everything, f"{path}layers.{index}")
        for index, layer in enumerate(cache.layers)
    ]
    return record


def _capture_layer(layer: Any, encoder: TreeEncoder, everything: bool, path: str) -> JSON:
    kind = kind_of(layer, _LAYERS, path)
    return read(layer, kind, encoder, path) if everything or not kind.sliceable(layer) else None


def _cache_kind(cache: Any, path: str) -> Kind:
    kind = kind_of(cache, _CACHES, f"{path}cache")
    if getattr(cache, "offloading", False):
        raise ValueError(
            f"{class_name(cache)} is offloading: its tensors move between devices by themselves, so a snapshot can not "
            "say where they belong. Make the cache with offloading=False"
        )
    return kind


def _is_pair(cache: Any) -> bool:
    return class_name(cache) == f"{_MODULE}.EncoderDecoderCache"


# -- restore ----------------------------------------------------------------------------------------------------------


def restore(cache: Any, record: JSON, decoder: TreeDecoder) -> None:
    """Fill a cache, all of it or, on an error, nothing."""
    fills = list(_plan_cache(cache, record, decoder, ""))
    memory = _OwnMemory()
    for fill in fills:
        _apply(fill, memory)


def _plan_cache(cache: Any, record: JSON, decoder: TreeDecoder, path: str) -> Iterator[Fill]:
    kind = _cache_kind(cache, path)
    fields = match_class(cache, record, f"{path}cache")
    yield plan(cache, kind, record, decoder, f"{path}cache")
    if _is_pair(cache):
        for part in _PARTS:
            yield from _plan_cache(getattr(cache, part), fields.get(part), decoder, f"{path}{part}.")
    else:
        yield from _plan_layers(cache, kind, fields.get("layers"), decoder, path)


def _plan_layers(cache: Any, kind: Kind, records: JSON, decoder: TreeDecoder, path: str) -> Iterator[Fill]:
    if not isinstance(records, list):
        raise malformed(f"{path}layers")
    layers = _layers_up_to(
        cache, 1 + max((i for i, record in enumerate(records) if record is not None), default=-1)
    )
    if len(layers) > len(records) or (len(layers) < len(records) and cache.layer_class_to_replicate is None):
        raise ValueError(
            f"{path}layers: the snapshot has {len(records)} layers, and the cache has {len(layers)}. "
            "Make a fresh cache for the same model"
        )
    for index, (layer, record) in enumerate(zip(layers, records, strict=False)):
        if record is not None:
            layer_path = f"{path}layers.{index}"
            yield plan(layer, kind_of(layer, _LAYERS, layer_path), record, decoder, layer_path)
    if len(layers) > len(cache.layers):
        yield Fill(cache, kind, {"layers": layers})


def _layers_up_to(cache: Any, count: int) -> list[Any]:
    """The cache's layers. One made without a config adds them as they are first used; then as many as are needed."""
    missing = count - len(cache.layers) if cache.layer_class_to_replicate is not None else 0
    return [*cache.layers, *(cache.layer_class_to_replicate() for _ in range(missing))]


def _apply(fill: Fill, memory: _OwnMemory) -> None:
    attributes = vars(fill.target)
    for name in fill.kind.lazy:
        attributes.pop(name, None)
    for name, value in fill.values.items():
        attributes[name] = memory.place(value, attributes.get(name) if name in fill.kind.in_place else None)
    _follow(attributes, fill.kind)


def _follow(attributes: dict[str, Any], kind: Kind) -> None:
    """Set what a layer derives from the first tensor that it sees."""
    for source, dtype, device in (
        ("conv_states", "dtype", "device"),
        ("keys", "dtype", "device"),  # attention overrules convolution, as in the library
        ("indexer_keys", "indexer_dtype", "indexer_device"),
    ):
        states = attributes.get(source)
        tensors = states.values() if isinstance(states, dict) else [states]
        first = next((tensor for tensor in tensors if tensor is not None), None)
        if first is not None and dtype in kind.apart:
            attributes[dtype], attributes[device] = first.dtype, first.device
    if "_sliding_window_tensor" in attributes and attributes.get("device") is not None:
        attributes["_sliding_window_tensor"] = attributes["_sliding_window_tensor"].to(attributes["device"])


class _OwnMemory:
    """Gives restored values memory that nobody else writes into: one copy a tensor, so that identity survives."""

    def __init__(self) -> None:
        self._placed: dict[int, Any] = {}

    def place(self, value: Any, old: Any) -> Any:
        """``value`` with every tensor copied: into ``old``, where that is given and fits."""
        if TENSORS.matches(value):
            if id(value) not in self._placed:
                self._placed[id(value)] = _copy_into(old, value) if _fits(old, value) else _clone(value)
            return self._placed[id(value)]
        if type(value) is dict:
            olds = old if type(old) is dict else {}
            return {key: self.place(item, olds.get(key)) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.place(item, None) for item in value)
        return value


def _fits(old: Any, new: Any) -> bool:
    return TENSORS.matches(old) and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)


def _copy_into(old: Any, new: Any) -> Any:
    # Only inference mode may write into a tensor that was made in it. It may write into any other, too.
    with torch.inference_mode():
        return old.copy_(new)


def _clone(tensor: Any) -> Any:
    # Nor could a clone that is made in inference mode be updated outside of it.
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()
