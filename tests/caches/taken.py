"""A snapshot without a store: what ``capture`` returned, frozen, and its metadata through strict JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from snapstore import caches


@dataclass(frozen=True)
class Taken:
    tensors: dict[str, Any]
    metadata: Any


def taken(cache: Any, layers: Any = "all") -> Taken:
    tensors, metadata = caches.capture(cache, layers=layers)
    frozen = {name: _frozen(tensor) for name, tensor in tensors.items()}
    return Taken(frozen, json.loads(json.dumps(metadata, allow_nan=False)))


def _frozen(tensor: Any) -> Any:
    if type(tensor).__module__ == "torch":
        return tensor.detach().clone().contiguous()
    import mlx.core as mx

    copied = mx.contiguous(tensor) + mx.zeros(tensor.shape, tensor.dtype)
    mx.eval(copied)
    return copied


def same(left: Any, right: Any) -> bool:
    """Equal in type, form and every byte, and shared tensors shared alike."""
    return _flat(left, {}) == _flat(right, {})


def _flat(value: Any, seen: dict[int, int]) -> Any:
    if isinstance(value, dict):
        return {key: _flat(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_flat(item, seen) for item in value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return seen.setdefault(id(value), len(seen)), str(value.dtype), tuple(value.shape), value.tolist()
    return value
