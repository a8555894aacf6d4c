"""Every layer class of transformers, one at a time: filled, captured, restored, and fed alike with the live one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from taken import Taken, same, taken  # noqa: E402
from transformers import cache_utils  # noqa: E402
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (  # noqa: E402
    DeepseekV4CSACache,
    DeepseekV4HCACache,
)
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (  # noqa: E402
    MiniMaxM3VLSparseCacheLayer,
    MiniMaxM3VLSparseStaticCacheLayer,
)

from snapstore import caches  # noqa: E402

WINDOW = 8
LENGTH = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def attention(layer: Any, count: int) -> Any:
    return layer.update(torch.randn(1, 2, count, 4), torch.randn(1, 2, count, 4))


def linear(layer: Any, count: int) -> Any:
    answers = []
    for index in range(layer.number_of_states):
        answers.append(layer.update_conv_state(torch.randn(1, 3, count), index, conv_kernel_size=4))
        before = layer.recurrent_states[index]
        # A recurrence, in float32 beside a state of another type, as mamba has it.
        state = torch.randn(1, 2, dtype=torch.float32) + (0 if before is None else before)
        answers.append(layer.update_recurrent_state(state, index))
    return answers


def convolution(layer: Any, count: int) -> Any:
    return layer.update_conv_state(torch.randn(1, 3, count, dtype=torch.float64))


def hybrid(layer: Any, count: int) -> Any:
    return linear(layer, count), attention(layer, count)


def indexed(layer: Any, count: int) -> Any:
    return attention(layer, count), layer.update_indexer(torch.randn(1, count, 4))


def indexed_by_blocks(layer: Any, count: int) -> Any:
    return attention(layer, count), layer.update_index(torch.randn(1, 1, count, 4))


def compressed(layer: Any, count: int) -> Any:
    answers = [attention(layer, count)]
    for name in layer.entry_count:
        kv, gate, first = layer.store_compression_weights(
            name, torch.randn(1, count, 4), torch.randn(1, count, 4)
        )
        answers.append((kv, gate, first, layer.update_compressor_states(name, kv[:, ::4])))
        if hasattr(layer, "overlap_kv"):
            chunk = torch.randn(1, 2, 4, 8)
            answers.append(layer.update_overlap_state(name, chunk, chunk, 4))
    return answers


def nothing(layer: Any, count: int) -> Any:
    return None


def recording(layer: Any) -> Any:
    layer.activate_past_recording()
    return layer


COMPRESSION = SimpleNamespace(
    sliding_window=WINDOW,
    compress_rates={"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
)


@dataclass(frozen=True)
class Case:
    fresh: Callable[[], Any]
    feed: Callable[[Any, int], Any]
    sliceable: tuple[bool, bool] = (True, True)
    """After few tokens, and after more than the window."""


DYNAMIC, WINDOWED, NEVER = (True, True), (True, False), (False, False)
CASES = {
    "DynamicLayer": Case(cache_utils.DynamicLayer, attention),
    "DynamicSlidingWindowLayer": Case(
        lambda: cache_utils.DynamicSlidingWindowLayer(WINDOW), attention, WINDOWED
    ),
    "DynamicSlidingWindowLayer+recording": Case(
        lambda: recording(cache_utils.DynamicSlidingWindowLayer(WINDOW)), attention, WINDOWED
    ),
    "DynamicIndexedLayer": Case(cache_utils.DynamicIndexedLayer, indexed),
    "StaticLayer": Case(lambda: cache_utils.StaticLayer(LENGTH), attention),
    "StaticSlidingWindowLayer": Case(
        lambda: cache_utils.StaticSlidingWindowLayer(LENGTH, WINDOW), attention, WINDOWED
    ),
    "StaticIndexedLayer": Case(lambda: cache_utils.StaticIndexedLayer(LENGTH), indexed),
    "Fp8QuantizedLayer": Case(cache_utils.Fp8QuantizedLayer, attention, NEVER),
    "LinearAttentionLayer": Case(cache_utils.LinearAttentionLayer, linear, NEVER),
    "LinearAttentionLayer+states": Case(lambda: cache_utils.LinearAttentionLayer(3), linear, NEVER),
    "LinearAttentionLayer+convolution": Case(cache_utils.LinearAttentionLayer, convolution, NEVER),
    "LinearAttentionLayer+recording": Case(
        lambda: recording(cache_utils.LinearAttentionLayer()), linear, NEVER
    ),
    "LinearAttentionAndFullAttentionLayer": Case(
        cache_utils.LinearAttentionAndFullAttentionLayer, hybrid, NEVER
    ),
    "LinearAttentionAndSlidingWindowAttentionLayer": Case(
        lambda: cache_utils.LinearAttentionAndSlidingWindowAttentionLayer(WINDOW), hybrid, NEVER
    ),
    "LinearAttentionAndStaticFullAttentionLayer": Case(
        lambda: cache_utils.LinearAttentionAndStaticFullAttentionLayer(LENGTH), hybrid, NEVER
    ),
    "LinearAttentionAndStaticSlidingWindowAttentionLayer": Case(
        lambda: cache_utils.LinearAttentionAndStaticSlidingWindowAttentionLayer(LENGTH, WINDOW), hybrid, NEVER
    ),
    "DummyLayer": Case(cache_utils.DummyLayer, nothing),
    "DeepseekV4HCACache": Case(lambda: DeepseekV4HCACache(COMPRESSION), compressed, NEVER),
    "DeepseekV4CSACache": Case(lambda: DeepseekV4CSACache(COMPRESSION), compressed, NEVER),
    "MiniMaxM3VLSparseCacheLayer": Case(MiniMaxM3VLSparseCacheLayer, indexed_by_blocks),
    "MiniMaxM3VLSparseStaticCacheLayer": Case(
        lambda: MiniMaxM3VLSparseStaticCacheLayer(LENGTH), indexed_by_blocks
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
HISTORIES = {"empty": (), "few": (3,), "chunks": (3, 4, 6), "decoded": (5, 1, 1, 1, 1, 1)}


def filled(case: Case, history: tuple[int, ...] = (3, 4, 1), seed: int = 1) -> Any:
    torch.manual_seed(seed)
    layer = case.fresh()
    for count in history:
        case.feed(layer, count)
    return layer


def fed(case: Case, layer: Any) -> list[Any]:
    """What a layer answers to the next tokens, one by one and in a chunk."""
    torch.manual_seed(2)
    return [copy.deepcopy(case.feed(layer, count)) for count in (1, 1, 3, 1)]


def cache_of(*layers: Any) -> Any:
    return cache_utils.Cache(layers=list(layers))


def restored(snapshot: Taken, *layers: Any) -> Any:
    return caches.restore(snapshot, cache_of(*layers)).layers[0]


@each_case
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_a_restored_layer_is_the_same_and_answers_the_same(case: Case, history: tuple[int, ...]) -> None:
    live = filled(case, history)
    layer = restored(taken(cache_of(live)), case.fresh())
    assert type(layer) is type(live)
    assert same(vars(layer), vars(live))
    expected = fed(case, live)
    assert same(fed(case, layer), expected)


@each_case
def test_one_snapshot_restores_two_caches_that_share_nothing(case: Case) -> None:
    snapshot = taken(cache_of(filled(case)))
    one, two = restored(snapshot, case.fresh()), restored(snapshot, case.fresh())
    before, tensors = copy.deepcopy(vars(two)), copy.deepcopy(snapshot.tensors)
    fed(case, one)
    for value in vars(
        one
    ).values():  # as reset() of some versions does, also where update() makes new tensors
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert same(vars(two), before)
    assert same(snapshot.tensors, tensors)


@each_case
def test_a_used_cache_can_be_wound_back(case: Case) -> None:
    for history in ((3, 4), ()):
        live = filled(case, history)
        snapshot, kept = taken(cache_of(live)), copy.deepcopy(vars(live))
        fed(case, live)
        layer = restored(snapshot, live)
        assert layer is live
        if (
            not history
        ):  # an empty layer has no tensor that these could follow from; the old values do no harm
            for name in ("dtype", "device", "indexer_dtype", "indexer_device"):
                vars(live)[name] = kept[name] = None
        assert same(vars(live), kept)
        assert same(fed(case, live), fed(case, filled(case, history)))


@each_case
def test_a_cache_restored_in_inference_mode_can_be_used_outside(case: Case) -> None:
    fresh = case.fresh()
    with torch.inference_mode():
        live = filled(case)
        layer = restored(taken(cache_of(live)), fresh)
    expected = fed(case, layer)  # a tensor made in inference mode could not be updated here
    with torch.inference_mode():
        assert same(fed(case, live), expected)


def test_the_objects_that_are_passed_are_filled_and_returned() -> None:
    snapshot = taken(cache_of(filled(CASES["DynamicLayer"]), filled(CASES["LinearAttentionLayer"])))
    layers = [CASES["DynamicLayer"].fresh(), CASES["LinearAttentionLayer"].fresh()]
    cache = cache_of(*layers)
    assert caches.restore(snapshot, cache) is cache
    assert all(one is other for one, other in zip(cache.layers, layers, strict=True))


def test_values_that_are_keys_stay_so() -> None:
    live = filled(CASES["DeepseekV4HCACache"])
    assert live.values is live.keys
    snapshot = taken(cache_of(live))
    assert "layers.0.keys" in snapshot.tensors and "layers.0.values" not in snapshot.tensors
    layer = restored(snapshot, CASES["DeepseekV4HCACache"].fresh())
    assert layer.values is layer.keys


def test_capture_copies_nothing_and_hands_out_no_live_dict() -> None:
    live = filled(CASES["LinearAttentionLayer"])
    tensors, metadata = caches.capture(cache_of(live))
    assert tensors["layers.0.conv_states.0"] is live.conv_states[0]
    before = copy.deepcopy(metadata)
    live.conv_states[0], live.has_previous_state[0] = None, False
    assert metadata == before and tensors["layers.0.conv_states.0"] is not None


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "inference mode"])
def test_an_initialised_static_cache_keeps_its_addresses(inference: bool) -> None:
    case = CASES["LinearAttentionAndStaticFullAttentionLayer"]
    snapshot = taken(cache_of(filled(case)))
    with torch.inference_mode(inference):
        used = filled(case, (2,), seed=5)
    held = [used.keys, used.values, used.cumulative_length, used.conv_states[0], used.recurrent_states[0]]
    layer = restored(snapshot, used)
    now = [
        layer.keys,
        layer.values,
        layer.cumulative_length,
        layer.conv_states[0],
        layer.recurrent_states[0],
    ]
    assert all(one is other for one, other in zip(now, held, strict=True))
    assert same(vars(layer), vars(filled(case)))


def test_the_recording_of_the_past_goes_on() -> None:
    for name in ("DynamicSlidingWindowLayer", "LinearAttentionLayer"):
        live = filled(CASES[f"{name}+recording"])
        layer = restored(taken(cache_of(live)), CASES[name].fresh())
        for each in (live, layer):
            fed(CASES[name], each)
            each.crop(-3)
        assert same(vars(layer), vars(live))


def test_tensors_go_where_the_snapshot_was_loaded() -> None:
    # "meta" stands for another device: what matters is that dtype and device follow the tensors.
    snapshot = taken(cache_of(filled(CASES["LinearAttentionAndSlidingWindowAttentionLayer"])))
    moved = Taken({name: tensor.to("meta") for name, tensor in snapshot.tensors.items()}, snapshot.metadata)
    layer = restored(moved, CASES["LinearAttentionAndSlidingWindowAttentionLayer"].fresh())
    assert layer.device == layer.keys.device == layer.conv_states[0].device == torch.device("meta")
    assert vars(layer)["_sliding_window_tensor"].device == torch.device("meta")


# -- which layers -----------------------------------------------------------------------------------------------------


@each_case
def test_only_what_can_not_be_sliced_is_taken(case: Case) -> None:
    for history, sliceable in (((3,), case.sliceable[0]), ((3, 9, 1), case.sliceable[1])):
        snapshot = taken(cache_of(filled(case, history)), "non_sliceable")
        entries = snapshot.metadata["snapstore.caches"]["cache"]["layers"]
        assert (entries == [None]) == sliceable, history
        assert (not snapshot.tensors) == sliceable


def test_a_window_is_sliceable_until_the_library_itself_refuses_to_crop_it() -> None:
    for case in (CASES["DynamicSlidingWindowLayer"], CASES["StaticSlidingWindowLayer"]):
        taken_at = []
        for count in range(1, WINDOW + 3):
            live = filled(case, (1,) * count)
            taken_at.append(bool(taken(cache_of(live), "non_sliceable").tensors))
            if case is CASES["DynamicSlidingWindowLayer"]:
                assert live.is_croppable  # it does not tell
                assert taken_at[-1] == _refuses_to_crop(live)
        assert taken_at == sorted(taken_at) and set(taken_at) == {False, True}


def _refuses_to_crop(layer: Any) -> bool:
    try:
        layer.crop(-1)
    except RuntimeError:
        return True
    return False


def test_layers_that_were_not_captured_stay_as_they_are() -> None:
    attention_case, linear_case = CASES["DynamicLayer"], CASES["LinearAttentionLayer"]
    snapshot = taken(cache_of(filled(attention_case), filled(linear_case)), "non_sliceable")
    sliced = filled(attention_case, seed=3)  # what an engine had put there
    before = copy.deepcopy(vars(sliced))
    cache = caches.restore(snapshot, cache_of(sliced, linear_case.fresh()))
    assert same(vars(cache.layers[0]), before)
    assert same(vars(cache.layers[1]), vars(filled(linear_case)))


def test_a_lazy_cache_with_nothing_captured_stays_empty() -> None:
    live = cache_utils.DynamicCache()
    live.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    snapshot = taken(live, "non_sliceable")
    assert caches.restore(snapshot, cache_utils.DynamicCache()).layers == []


def test_cross_attention_is_not_sliceable() -> None:
    def pair() -> Any:
        return cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())

    live = pair()
    for part in (live.self_attention_cache, live.cross_attention_cache):
        part.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    live.is_updated[0] = True
    snapshot = taken(live, "non_sliceable")
    assert set(snapshot.tensors) == {f"cross_attention_cache.layers.0.{name}" for name in ("keys", "values")}
    cache = caches.restore(snapshot, pair())
    assert cache.is_updated == {0: True}  # an int key
    assert len(cache.self_attention_cache.layers) == 0 and len(cache.cross_attention_cache.layers) == 1


# -- caches -----------------------------------------------------------------------------------------------------------


def test_what_a_cache_keeps_beside_its_layers_comes_back() -> None:
    live = cache_utils.DFlashCache()
    live.set_previous_accepted_tokens(3)
    live.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    vars(live)["_is_user_defined"] = True  # as generate() leaves it
    cache = caches.restore(taken(live), cache_utils.DFlashCache())
    assert cache.get_query_offset(0) == live.get_query_offset(0) == 6
    assert not hasattr(cache, "_is_user_defined")


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captured", "passed", "says"),
    [
        (
            "DynamicLayer",
            ["LinearAttentionLayer"],
            r"layers\.0: .*DynamicLayer, and the cache has a .*LinearAtt",
        ),
        ("DynamicLayer", ["DynamicLayer"] * 2, "has 1 layers, and the cache has 2"),
        ("DynamicLayer", [], "has 1 layers, and the cache has 0"),
        (
            "LinearAttentionLayer",
            ["LinearAttentionLayer+states"],
            "number_of_states=1, and this one has number",
        ),
    ],
)
def test_a_cache_that_does_not_match_is_refused(captured: str, passed: list[str], says: str) -> None:
    layers = [CASES[name].fresh() for name in passed]
    before = [copy.deepcopy(vars(layer)) for layer in layers]
    with pytest.raises(ValueError, match=says):
        caches.restore(taken(cache_of(filled(CASES[captured]))), cache_of(*layers))
    assert same([vars(layer) for layer in layers], before)


def test_an_error_in_the_last_layer_leaves_the_first_alone() -> None:
    snapshot = taken(cache_of(filled(CASES["DynamicLayer"]), cache_utils.DynamicSlidingWindowLayer(8)))
    first = cache_utils.DynamicLayer()
    with pytest.raises(ValueError, match=r"layers\.1: .*sliding_window=8, .*sliding_window=9"):
        caches.restore(snapshot, cache_of(first, cache_utils.DynamicSlidingWindowLayer(9)))
    assert first.keys is None


def test_another_class_of_cache_is_refused() -> None:
    snapshot = taken(cache_utils.DynamicCache())
    with pytest.raises(ValueError, match=r"holds a .*DynamicCache, and the cache has a .*MtpCache"):
        caches.restore(snapshot, cache_utils.MtpCache())


def test_classes_that_are_not_on_the_list_are_refused() -> None:
    class MyLayer(cache_utils.DynamicLayer):
        pass

    class MyCache(cache_utils.DynamicCache):
        pass

    with pytest.raises(TypeError, match=r"layers\.0 is a .*MyLayer, which is not on the allow-list"):
        caches.capture(cache_of(MyLayer()))
    with pytest.raises(TypeError, match=r"cache is a .*MyCache, which is not on the allow-list"):
        caches.capture(MyCache())


def test_state_that_the_table_does_not_know_is_refused() -> None:
    live = filled(CASES["DynamicLayer"])
    live.sink_keys = torch.zeros(1)
    with pytest.raises(TypeError, match=r"layers\.0: .*will not lose: sink_keys"):
        caches.capture(cache_of(live))
    cache = cache_utils.DynamicCache()
    cache.prefix = 3
    with pytest.raises(TypeError, match=r"cache: .*will not lose: prefix"):
        caches.capture(cache)


def test_a_tensor_that_is_more_than_its_bytes_is_refused() -> None:
    class Quantized(torch.Tensor):
        pass

    live = filled(CASES["DynamicLayer"])
    live.keys = live.keys.as_subclass(Quantized)
    with pytest.raises(TypeError, match=r"layers\.0\.keys is a .*Quantized, which can not be kept"):
        caches.capture(cache_of(live))


def test_an_offloading_cache_is_refused() -> None:
    cache = cache_utils.DynamicCache()
    cache.offloading = True
    with pytest.raises(ValueError, match="Make the cache with offloading=False"):
        caches.capture(cache)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("layers"),
        lambda record: record.update(layers={}),
        lambda record: record.update(layers=["DynamicLayer", None]),
        lambda record: record.update({"class": "os.system"}),
        lambda record: record["layers"][0].update({"class": "os.system"}),
        lambda record: record["layers"][0]["state"].update(update=1),
        lambda record: record["layers"][0]["state"].update(keys={"tensor": "gone"}),
        lambda record: record["layers"][1]["state"].update(conv_states=[None]),
    ],
)
def test_metadata_that_names_something_else_is_refused(change: Callable[[Any], Any]) -> None:
    snapshot = taken(cache_of(filled(CASES["DynamicLayer"]), filled(CASES["LinearAttentionLayer"])))
    change(snapshot.metadata["snapstore.caches"]["cache"])
    fresh = cache_utils.DynamicLayer()
    with pytest.raises(ValueError, match=r"capture|holds a|another version|does not hold|the slots"):
        caches.restore(snapshot, cache_of(fresh, cache_utils.LinearAttentionLayer()))
    assert fresh.keys is None
