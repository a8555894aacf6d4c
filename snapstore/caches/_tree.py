"""A value made of tensors and plain Python data, as named tensors and a JSON skeleton, and back.

What JSON can not say for itself is said by a dict with one key; nothing else becomes a dict, so there is no doubt:

    None, bool, int, str, finite float    themselves
    list                                  a list
    tuple                                 {"tuple": [items]}
    dict, with any scalar as key          {"dict": [[key, value], ...]}
    inf, -inf, nan                        {"float": "inf"}
    tensor                                {"tensor": name}

A tensor that appears in two places is one name, and comes back as one object. Types are compared exactly: a subclass
would come back as its base, so it is refused rather than changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from snapstore._types import JSON

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_SCALARS = (bool, int, str)


@dataclass(frozen=True, slots=True)
class TensorType:
    """What a tree needs to know of a framework.

    Attributes:
        framework: the name that ``SnapshotStore.load(framework=...)`` takes.
        matches: whether a value is a tensor of this framework.
        handle: the object to pass on in a tensor's place; it must not copy the data.
    """

    framework: str
    matches: Callable[[object], bool]
    handle: Callable[[Any], Any]


class TreeEncoder:
    """Turns values into skeletons, and collects their tensors in ``tensors`` under readable names."""

    def __init__(self, tensor_type: TensorType) -> None:
        self.tensors: dict[str, Any] = {}
        self._type = tensor_type
        # By identity. The tensor itself is kept as well: a freed one would give its id to the next.
        self._seen: dict[int, tuple[str, object]] = {}

    def encode(self, value: Any, path: str) -> JSON:
        """The skeleton of ``value``; ``path`` names its tensors and, in an error, the culprit."""
        if value is None or type(value) in _SCALARS:
            return value  # type: ignore[no-any-return]
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if self._type.matches(value):
            return {"tensor": self._name(value, path)}
        if type(value) is list:
            return self._items(value, path)
        if type(value) is tuple:
            return {"tuple": self._items(value, path)}
        if type(value) is dict:
            return {"dict": [self._pair(index, *item, path) for index, item in enumerate(value.items())]}
        raise TypeError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which can not be kept in a snapshot: "
            f"only {self._type.framework} tensors, None, bool, int, float, str, list, tuple and dict can"
        )

    def _items(self, values: list[Any] | tuple[Any, ...], path: str) -> list[JSON]:
        return [self.encode(value, f"{path}.{index}") for index, value in enumerate(values)]

    def _pair(self, index: int, key: Any, value: Any, path: str) -> JSON:
        if not (key is None or type(key) in (*_SCALARS, float)):
            raise TypeError(f"{path} has the key {key!r}; a key must be None, bool, int, float or str")
        # Any text may be a key, but not any text belongs in a tensor's name.
        label = str(key) if type(key) is int or (type(key) is str and key.isidentifier()) else f"#{index}"
        return [self.encode(key, path), self.encode(value, f"{path}.{label}")]

    def _name(self, tensor: Any, path: str) -> str:
        if id(tensor) not in self._seen:
            # No label has a dot in it, and no two under one node are equal.
            assert path not in self.tensors, path
            self.tensors[path] = self._type.handle(tensor)
            self._seen[id(tensor)] = (path, tensor)
        return self._seen[id(tensor)][0]


class TreeDecoder:
    """Turns skeletons back into values. A skeleton comes from a file: it is checked, never trusted."""

    def __init__(self, tensor_type: TensorType, tensors: Mapping[str, Any]) -> None:
        self._type = tensor_type
        self._tensors = tensors
        self._handles: dict[str, Any] = {}

    def decode(self, node: JSON) -> Any:
        """The value that ``node`` is the skeleton of."""
        if node is None or type(node) in (*_SCALARS, float):
            return node
        if type(node) is list:
            return [self.decode(item) for item in node]
        if type(node) is dict and len(node) == 1:
            ((tag, body),) = node.items()
            match tag, body:
                case "tuple", list():
                    return tuple(self.decode(item) for item in body)
                case "dict", list():
                    return dict(self._pair(item) for item in body)
                case "float", str() if body in _NON_FINITE:
                    return _NON_FINITE[body]
                case "tensor", str():
                    return self._tensor(body)
        raise ValueError(f"not a skeleton that snapstore.caches wrote: {_shorten(node)}")

    def _pair(self, item: JSON) -> tuple[Any, Any]:
        match item:
            case [(None | bool() | int() | float() | str() | {"float": str()}) as key, value]:
                return self.decode(key), self.decode(value)
        raise ValueError(f"not a dict entry that snapstore.caches wrote: {_shorten(item)}")

    def _tensor(self, name: str) -> Any:
        if name not in self._handles:
            if name not in self._tensors:
                raise ValueError(f"the metadata names a tensor {name!r} that the snapshot does not hold")
            tensor = self._tensors[name]
            if not self._type.matches(tensor):
                raise TypeError(
                    f"tensor {name!r} is a {type(tensor).__module__}.{type(tensor).__qualname__}: "
                    f"load the snapshot with framework={self._type.framework!r} for this cache"
                )
            self._handles[name] = self._type.handle(tensor)
        return self._handles[name]


def _shorten(node: object) -> str:
    shown = repr(node)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
