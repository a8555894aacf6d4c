"""One adapter per framework, with the same few functions each; chosen by the tensor's own module, imported on use.

The rest of snapstore sees tensors only through here. An adapter never sees a file, a queue or a lock.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from snapstore._errors import UnsupportedTensorError
from snapstore._format import Layout, TensorSpec
from snapstore._types import Framework

_HOME = {"numpy": "numpy", "ml_dtypes": "numpy", "torch": "torch", "mlx": "mlx"}


class Adapter(Protocol):
    """What a framework must be able to do. ``Source`` is whatever ``describe`` made of a tensor."""

    framework: Framework
    frozen_views: bool
    """True where ``view`` gives memory that nobody can change any more, so that a save needs no copy."""

    def describe(self, tensors: Mapping[str, Any]) -> tuple[list[TensorSpec], list[Any]]:
        """Check every tensor and say what it is, without copying; ``UnsupportedTensorError`` names the first bad one."""

    def copy_into(self, sources: Sequence[Any], layout: Layout, buffer: memoryview) -> None:
        """Copy each source to its place in ``buffer``, which has ``layout.nbytes`` bytes. Done when it returns."""

    def view(self, sources: Sequence[Any]) -> tuple[list[memoryview], Any]:
        """The bytes of each source in place (a contiguous copy where there is no other way), and what keeps them alive."""

    def from_host(self, layout: Layout, buffer: memoryview, device: Any) -> dict[str, Any]:
        """Tensors over ``buffer``, which is the caller's own from here on; copied to ``device`` where one is named."""


def adapter_for(tensors: Mapping[str, Any]) -> Adapter:
    """The adapter of the framework that all these tensors are of. No tensors at all: numpy's."""
    framework = "numpy"
    for position, (name, tensor) in enumerate(tensors.items()):
        found = _framework_of(name, tensor)
        if position and found != framework:
            raise _unsupported(
                name, f"it is a {found} tensor among {framework} tensors; save one framework at a time"
            )
        framework = found
    return adapter_named(framework)


def adapter_named(framework: str) -> Adapter:
    """The adapter called ``framework``, imported now. ``ValueError`` for a name that is none, ``ImportError`` if absent."""
    if framework not in _HOME.values():
        raise ValueError(
            f"framework must be one of {tuple(dict.fromkeys(_HOME.values()))}, not {framework!r}"
        )
    module = importlib.import_module(f"snapstore.adapters._{framework}")
    return cast(Adapter, module.ADAPTER)


def _framework_of(name: str, tensor: Any) -> str:
    for cls in type(tensor).__mro__:
        home = _HOME.get(cls.__module__.partition(".")[0])
        if home is not None:
            return home
    raise _unsupported(
        name, f"{type(tensor).__module__}.{type(tensor).__qualname__} is no numpy, torch or mlx tensor"
    )


def _unsupported(name: str, why: str) -> UnsupportedTensorError:
    error = UnsupportedTensorError(f"tensor {name!r} can not be saved: {why}")
    error.tensor_name = name
    return error


unsupported = _unsupported
