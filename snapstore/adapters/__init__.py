"""One adapter per framework, with the same few functions each; chosen by the tensor's own module, imported on use.

The rest of snapstore sees tensors only through here. An adapter never sees a file, a queue or a lock.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol, cast

from snapstore._device import LABEL, Device
from snapstore._errors import UnsupportedTensorError
from snapstore._format import Layout, TensorSpec
from snapstore._memory import copy_bytes
from snapstore._types import Framework

_HOME = {"numpy": "numpy", "ml_dtypes": "numpy", "torch": "torch", "mlx": "mlx"}

SMALL_BYTES = 1024 * 1024
"""What is copied in one call that holds the GIL."""
LAYOUTS = 256
"""Sets of names, dtypes and shapes that are remembered: an engine saves the same ones again and again."""


View = Callable[[], Sequence[memoryview]]
"""Gives the bytes of each tensor, on any thread: those who read them make the views, not the thread that saves."""


class Adapter(Protocol):
    """What a framework must be able to do. ``Source`` is whatever ``describe`` made of a tensor."""

    framework: Framework
    frozen_views: bool
    """True where ``view`` gives memory that nobody can change any more, so that a save needs no copy."""

    def describe(self, tensors: Mapping[str, Any]) -> tuple[Sequence[TensorSpec], Sequence[Any]]:
        """Check every tensor and say what it is, without copying; ``UnsupportedTensorError`` names a bad one.

        The names are those that ``adapter_for`` has checked. The specs are the same object for the same tensors.
        """

    def copy_into(self, sources: Sequence[Any], layout: Layout, buffer: memoryview) -> None:
        """Copy each source to its place in ``buffer``: the first ``layout.nbytes`` bytes of an ``mmap``.

        Done when it returns.
        """

    def view(self, sources: Sequence[Any]) -> View:
        """What gives the bytes of each source in place; a copy where there is no other way. It keeps them alive."""

    def from_host(self, layout: Layout, buffer: memoryview, device: Any) -> dict[str, Any]:
        """Tensors over ``buffer``, which is the caller's own from here on; copied to ``device`` where one is named."""


def adapter_for(tensors: Mapping[str, Any]) -> Adapter:
    """The adapter of the framework that all these tensors are of. No tensors at all: numpy's.

    ``TypeError`` and ``ValueError`` for a name that no safetensors file can hold.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must be a mapping from name to tensor, not {type(tensors).__qualname__}")
    names = tuple(tensors)
    _check_names(names, tuple(map(type, names)))
    frameworks = set(map(_framework_of, set(map(type, tensors.values()))))
    if None in frameworks or len(frameworks) > 1:
        raise _not_of_one(tensors)
    return adapter_named(next(iter(frameworks), None) or "numpy")


@cache
def adapter_named(framework: str) -> Adapter:
    """The adapter called ``framework``, imported now. ``ValueError``: no such one; ``ImportError``: not installed."""
    if framework not in _HOME.values():
        raise ValueError(
            f"framework must be one of {tuple(dict.fromkeys(_HOME.values()))}, not {framework!r}"
        )
    return cast(Adapter, _module(framework).ADAPTER)


def devices_of(framework: Framework, tensors: Mapping[str, Any]) -> Sequence[Device | None] | None:
    """The device of each tensor whose bytes are not the host's to read; ``None``: there is none. Calls no device."""
    if any(hasattr(kind, LABEL) for kind in set(map(type, tensors.values()))):
        devices: list[Device | None] = [getattr(tensor, LABEL, None) for tensor in tensors.values()]
        return devices if any(device is not None for device in devices) else None
    if framework != "torch":
        return None
    return cast("Sequence[Device | None] | None", _module("torch_cuda").devices_of(tensors))


def device_named(framework: Framework, device: Any) -> Device | None:
    """What ``load`` is to put tensors on, if that has a thread for copies; the adapter knows the others."""
    if hasattr(type(device), LABEL):
        return cast(Device, device)
    if framework != "torch" or device is None:
        return None
    return cast("Device | None", _module("torch_cuda").device_named(device))


def place(source: memoryview, buffer: memoryview, offset: int) -> None:
    """Copy all of ``source`` to ``buffer[offset:]``, holding the GIL; no single call takes longer than 1 MB does."""
    end = offset + len(source)
    if len(source) <= SMALL_BYTES:  # at once: 48 small tensors in 60 us, and not in 90
        buffer[offset:end] = source
    else:
        copy_bytes(source, buffer[offset:end])


def unsupported(name: str, why: str, *, verb: str = "saved") -> UnsupportedTensorError:
    """The error that says that this tensor can not be saved (or ``verb``), why, and what to do."""
    error = UnsupportedTensorError(f"tensor {name!r} can not be {verb}: {why}")
    error.tensor_name = name
    return error


@lru_cache(maxsize=LAYOUTS)
def _check_names(names: tuple[object, ...], _kinds: tuple[type, ...]) -> None:
    """Once for each set of names and their types: a ``str`` of another class may be equal to one that was checked."""
    for name in names:
        _check_name(name)


def _check_name(name: object) -> None:
    if type(name) is not str:
        raise TypeError(f"a tensor's name must be a str, not {type(name).__qualname__}: {name!r}")
    if name == "__metadata__":
        raise ValueError("a tensor can not be called '__metadata__': safetensors keeps that name to itself")
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"tensor {name!r}: a lone surrogate in a name can not be written") from error


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"snapstore.adapters._{name}")


@lru_cache(maxsize=LAYOUTS)
def _framework_of(kind: type) -> str | None:
    """``None``: no tensor that is known here."""
    homes = (_HOME.get(cls.__module__.partition(".")[0]) for cls in kind.__mro__)
    return next((home for home in homes if home is not None), None)


def _not_of_one(tensors: Mapping[str, Any]) -> UnsupportedTensorError:
    """The error for the first tensor that is of no framework, or of another than the first."""
    first: str | None = None
    for name, tensor in tensors.items():
        kind: type = type(tensor)
        framework = _framework_of(kind)
        if framework is None:
            return unsupported(
                name, f"a {kind.__module__}.{kind.__qualname__} is no numpy, torch or mlx tensor"
            )
        first = first or framework
        if framework != first:
            break
    return unsupported(
        name, f"it is a {framework} tensor among {first} tensors; save one framework at a time"
    )
