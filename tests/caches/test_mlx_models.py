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

from snapstore import SnapshotStore  # noqa: E402
from snapstore.testing import FaultyFileSystem  # noqa: E402

PROMPT = np.random.default_rng(3).integers(0, 64, (1, continuing.TOKENS))


def check(store: SnapshotStore, files: FaultyFileSystem, model: Any) -> None:
    def step(cache: Any, start: int, stop: int) -> bytes:
        logits = model(mx.array(PROMPT[:, start:stop]), cache=cache).astype(mx.float32)
        return np.array(logits).tobytes()

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
