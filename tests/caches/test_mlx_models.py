"""Real mlx-lm models: a restored prompt cache continues byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", exc_type=ImportError)
pytest.importorskip("mlx_lm")

import continuing  # noqa: E402
import tiny_mlx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from snapstore import SnapshotStore, caches  # noqa: E402
from snapstore.testing import FaultyFileSystem  # noqa: E402

PROMPT = np.random.default_rng(3).integers(0, 64, (1, continuing.TOKENS))


def check(store: SnapshotStore, files: FaultyFileSystem, model: Any) -> None:
    def step(cache: Any, start: int, stop: int) -> bytes:
        return continuing.logits(model(mx.array(PROMPT[:, start:stop]), cache=cache))

    continuing.check(store, files, lambda: make_prompt_cache(model), step)


@pytest.mark.parametrize("name", tiny_mlx.CONFIGS)
def test_a_restored_cache_continues_byte_for_byte(
    store: SnapshotStore, files: FaultyFileSystem, name: str
) -> None:
    check(store, files, tiny_mlx.model(name))


@pytest.mark.parametrize("name", ["mamba2", "lfm2", "falcon_h1", "gemma3_text"])
def test_a_bfloat16_cache_too(store: SnapshotStore, files: FaultyFileSystem, name: str) -> None:
    model = tiny_mlx.model(name)
    model.set_dtype(mx.bfloat16)
    check(store, files, model)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "gemma3_text"])
def test_the_rest_can_be_sliced_from_the_finished_cache(store: SnapshotStore, name: str) -> None:
    """What an engine does with ``layers="non_sliceable"``: keys and values are kept once, for all boundaries."""
    model = tiny_mlx.model(name)
    at, steps = 12, ((12, 17), (17, 18), (18, 19))  # the window of gemma3_text is full by then

    def run(cache: Any) -> list[bytes]:
        return [continuing.logits(model(mx.array(PROMPT[:, a:b]), cache=cache)) for a, b in steps]

    live = make_prompt_cache(model)
    model(mx.array(PROMPT[:, :at]), cache=live)
    tensors, metadata = caches.capture(live, layers="non_sliceable")
    store.save("request", at, tensors, metadata=metadata)
    expected = run(live)
    cache = make_prompt_cache(model)
    for finished, layer in zip(_attention(live), _attention(cache), strict=True):
        layer.keys, layer.values = finished.keys[..., :at, :], finished.values[..., :at, :]
        layer.offset = at
    assert run(caches.restore(store.load("request", at), cache)) == expected
    assert 0 < len(tensors) < len(caches.capture(live)[0])


def _attention(cache: Any) -> list[Any]:
    parts = [part for layer in cache for part in getattr(layer, "caches", [layer])]
    return [part for part in parts if type(part).__name__ == "KVCache"]
