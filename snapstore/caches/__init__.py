"""Save and restore the cache objects of mlx-lm and Hugging Face transformers.

    tensors, metadata = caches.capture(cache)                         # at a boundary, between two forward passes
    store.save(request_id, token_count, tensors, metadata=metadata)   # before the next one

    cache = caches.restore(store.load(request_id, token_count), make_prompt_cache(model))
    # or, with transformers:                                    DynamicCache(config=model.config)

The restored cache continues bit for bit as the captured one did.

Supported are mlx-lm cache lists (0.31 and later) and transformers ``Cache`` objects (5 and later; recurrent models use
them since 5.5), found by the module of their class; importing this module imports neither library. Which classes
exactly is an allow-list in ``_mlx_lm`` and ``_transformers``. A file never brings a class back: the cache that is
passed in does, and the names in a file are only compared with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeVar, cast

from snapstore._types import JSON
from snapstore.caches._tree import TensorType, TreeDecoder, TreeEncoder

__all__ = ["capture", "restore"]

CacheT = TypeVar("CacheT")


class Library(Protocol):
    """What ``_mlx_lm`` and ``_transformers`` have in common. Each imports its framework, so it is imported on use."""

    TENSORS: TensorType

    def capture(self, cache: Any, encoder: TreeEncoder, *, everything: bool) -> JSON:
        """The record of ``cache``, its tensors left in ``encoder``; without ``everything``, of non-sliceable layers."""

    def restore(self, cache: Any, record: JSON, decoder: TreeDecoder) -> None:
        """Fill ``cache`` from a record, or change nothing."""


class SnapshotLike(Protocol):
    """What :func:`restore` reads: a ``snapstore.Snapshot``, or anything with these two."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Tensors by the names that :func:`capture` gave them."""

    @property
    def metadata(self) -> Any:
        """The metadata that :func:`capture` gave; other keys may have been added beside it."""


def capture(
    cache: Any, *, layers: Literal["all", "non_sliceable"] = "all"
) -> tuple[dict[str, Any], dict[str, JSON]]:
    """Take a cache apart into named tensors and a JSON value, for ``SnapshotStore.save``.

    Nothing is copied. The dict and the JSON value are new, but torch tensors are the cache's own, and the next forward
    pass may write into them: save them before it (``save`` has taken them when it returns). MLX arrays are handles of
    their own, which later updates of the cache leave alone. Other tensors and other metadata keys may be added.

    ``layers="non_sliceable"`` takes only what could not be had by slicing a longer cache: recurrent and convolution
    states always, a sliding window only once it is full (until then it is a plain prefix; note that a window which is
    sliceable at this boundary may be full by the end of the prompt). Within a ``CacheList`` each cache is judged for
    itself. A transformers layer that is both attention and recurrent is one object, and is taken whole.

    Raises:
        TypeError: an object that is not on the allow-list, or state that no snapshot can hold.
        ValueError: ``layers`` is neither of the two words, or the cache can not be captured as it is.
    """
    if layers not in ("all", "non_sliceable"):
        raise ValueError(f"layers must be 'all' or 'non_sliceable', not {layers!r}")
    library, name = _library(cache)
    encoder = TreeEncoder(library.TENSORS)
    record = library.capture(cache, encoder, everything=layers == "all")
    return encoder.tensors, {
        "snapstore.caches": {"format": 1, "library": name, "layers": layers, "cache": record}
    }


def restore(snapshot: SnapshotLike, cache: CacheT) -> CacheT:
    """Fill a fresh cache from a snapshot of :func:`capture`, and return that same cache.

    ``cache`` is made as the engine always makes it (``make_prompt_cache(model)``, ``DynamicCache(config=...)``), for
    the same model and with the same settings. Its layer objects are filled in place, never replaced, so whoever holds
    them holds the restored ones. Layers that were not captured stay as they are. All checks come first: after an error
    the cache is untouched.

    The cache gets memory of its own wherever the library writes in place, so one snapshot can be restored any number
    of times. torch tensors go to the device that the snapshot was loaded to. A static cache that is initialised
    already keeps its addresses (a compiled step stays valid) and is written into.

    Raises:
        ValueError: the metadata is not from :func:`capture`, or was captured from a different kind of cache.
        TypeError: the tensors were loaded for another framework, or ``cache`` is not on the allow-list.
    """
    library, name = _library(cache)
    record = _record(snapshot.metadata, name)
    library.restore(cache, record, TreeDecoder(library.TENSORS, snapshot.tensors))
    return cache


def _library(cache: object) -> tuple[Library, str]:
    """The module that knows this kind of cache, imported now, and the library's name."""
    if "transformers" in _roots(cache):
        module, name = "_transformers", "transformers"
    elif isinstance(cache, (list, tuple)) and any("mlx_lm" in _roots(layer) for layer in cache):
        module, name = "_mlx_lm", "mlx-lm"
    else:
        raise TypeError(
            f"a {type(cache).__module__}.{type(cache).__qualname__} is neither a list of mlx-lm caches, one a layer, "
            "nor a transformers Cache: pass what the model's forward takes"
        )
    return cast(Library, importlib.import_module(f"snapstore.caches.{module}")), name


def _roots(obj: object) -> set[str]:
    """The top-level packages that an object's class and its bases come from."""
    return {base.__module__.partition(".")[0] for base in type(obj).__mro__}


def _record(metadata: object, library: str) -> JSON:
    """The record inside the metadata, if it is one for this library and this version."""
    match metadata:
        case {"snapstore.caches": {"format": 1, "library": str() as captured, "cache": record}}:
            if captured == library:
                return record  # type: ignore[no-any-return]
            why = f"it holds a cache of {captured}, and this is one of {library}"
        case {"snapstore.caches": {"format": int() as version}} if version != 1:
            why = f"it has version {version} of this format, and this snapstore reads 1"
        case _:
            why = "its metadata is not what snapstore.caches.capture returned"
    raise ValueError(f"this snapshot can not be restored here: {why}")
