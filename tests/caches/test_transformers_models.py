"""Real transformers models: a restored ``Cache`` continues byte for byte."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import continuing  # noqa: E402
import tiny_transformers  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.cache_utils import EncoderDecoderCache, QuantizedCache  # noqa: E402
from transformers.models.minimax.modeling_minimax import MiniMaxCache  # noqa: E402

from snapstore import SnapshotStore, caches  # noqa: E402
from snapstore.testing import FaultyFileSystem  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits for its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PROMPT = torch.randint(3, 64, (1, continuing.TOKENS), generator=torch.Generator().manual_seed(3))

DYNAMIC = [name for name in tiny_transformers.CONFIGS if name != "minimax"]


def check(
    store: SnapshotStore, files: FaultyFileSystem, model: Any, fresh: Callable[[], Any], **inputs: Any
) -> None:
    takes_cache_params = "cache_params" in inspect.signature(model.forward).parameters
    argument = "cache_params" if takes_cache_params else "past_key_values"
    tokens = "decoder_input_ids" if inputs else "input_ids"

    @torch.no_grad()
    def step(cache: Any, start: int, stop: int) -> bytes:
        given = {argument: cache, tokens: PROMPT[:, start:stop], **inputs}
        output = model(use_cache=True, **given)
        assert getattr(output, argument) is cache
        return continuing.logits(output.logits)

    continuing.check(store, files, fresh, step)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_restored_dynamic_cache_continues_byte_for_byte(
    store: SnapshotStore, files: FaultyFileSystem, name: str
) -> None:
    model = tiny_transformers.model(name)
    check(store, files, model, lambda: DynamicCache(config=model.config))


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "qwen3_next", "falcon_h1", "glm_moe_dsa", "minimax_m3_vl_text"]
)
def test_a_restored_static_cache_continues_byte_for_byte(
    store: SnapshotStore, files: FaultyFileSystem, name: str
) -> None:
    model = tiny_transformers.model(name)
    check(store, files, model, lambda: StaticCache(config=model.config, max_cache_len=32))


def test_a_cache_made_without_a_config_grows_its_layers(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    check(store, files, tiny_transformers.model("llama"), DynamicCache)


def test_minimax_keeps_its_recurrent_states_beside_the_layers(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    check(store, files, tiny_transformers.model("minimax"), MiniMaxCache)


def test_a_cache_quantized_to_fp8(store: SnapshotStore, files: FaultyFileSystem) -> None:
    model = tiny_transformers.model("llama")
    check(store, files, model, lambda: QuantizedCache(backend="fp8", config=model.config))


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "gemma3_text"])
def test_a_bfloat16_cache_too(store: SnapshotStore, files: FaultyFileSystem, name: str) -> None:
    model = tiny_transformers.model(name).to(torch.bfloat16)
    check(store, files, model, lambda: DynamicCache(config=model.config))


def test_an_encoder_decoder_cache(store: SnapshotStore, files: FaultyFileSystem) -> None:
    model = tiny_transformers.encoder_decoder()
    with torch.no_grad():
        encoded = model.get_encoder()(PROMPT[:, :5])
    check(
        store,
        files,
        model,
        lambda: EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config)),
        encoder_outputs=encoded,
    )


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "gemma3_text"])
def test_the_rest_can_be_sliced_from_the_finished_cache(store: SnapshotStore, name: str) -> None:
    """What an engine does with ``layers="non_sliceable"``: keys and values are kept once, for all boundaries."""
    model = tiny_transformers.model(name)
    at, steps = 12, ((12, 17), (17, 18), (18, 19))  # the window of gemma3_text is full by then

    @torch.no_grad()
    def run(cache: Any) -> list[bytes]:
        return [continuing.logits(model(PROMPT[:, a:b], past_key_values=cache).logits) for a, b in steps]

    live = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT[:, :at], past_key_values=live)
    tensors, metadata = caches.capture(live, layers="non_sliceable")
    store.save("request", at, tensors, metadata=metadata)
    expected = run(live)
    cache = DynamicCache(config=model.config)
    for finished, layer in zip(live.layers, cache.layers, strict=True):
        if type(layer).__name__ == "DynamicLayer":
            layer.update(finished.keys[..., :at, :], finished.values[..., :at, :])
    assert run(caches.restore(store.load("request", at), cache)) == expected
    assert 0 < len(tensors) < len(caches.capture(live)[0])
