"""Every cache class of mlx-lm, one at a time: filled, captured, restored, and fed alike with the live one."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", exc_type=ImportError)
pytest.importorskip("mlx_lm")

from mlx_lm.models import cache as mlx_cache  # noqa: E402
from taken import Taken, same, taken  # noqa: E402

from snapstore import caches  # noqa: E402

WINDOW = 8
DEEPSEEK_V41 = "mlx_lm.models.deepseek_v41"


def rows(count: int, *, batch: int = 1, width: int = 64) -> Any:
    return mx.random.normal((batch, 2, count, width))


def feed_attention(layer: Any, count: int, batch: int = 1) -> Any:
    return layer.update_and_fetch(rows(count, batch=batch), rows(count, batch=batch))


def feed_batch(layer: Any, count: int) -> Any:
    return feed_attention(layer, count, batch=2)


def feed_chunked(layer: Any, count: int) -> Any:
    layer.maybe_trim_front()
    return feed_attention(layer, count)


def feed_arrays(layer: Any, count: int) -> Any:
    held = 0 if layer[0] is None else layer[0]
    layer[0] = held + mx.random.normal((1, 4))
    layer[2] = mx.random.normal((1, count))
    layer.advance(count)
    return layer[0], layer[2], layer.make_mask(3)


def feed_pair(layer: Any, count: int) -> Any:
    return feed_arrays(layer[0], count), feed_attention(layer[1], count)


def feed_nested(layer: Any, count: int) -> Any:
    return feed_pair(layer[0], count), feed_attention(layer[1], count)


def feed_layer_cache(layer: Any, count: int) -> Any:
    layer.pending_kv = mx.random.normal((1, count, 4))
    return layer.update_window(mx.random.normal((1, count, 4)))


def padded_arrays() -> Any:
    layer = mlx_cache.ArraysCache(3, left_padding=[2])
    layer.prepare(lengths=[9])
    return layer


def nested() -> Any:
    inner = mlx_cache.CacheList(mlx_cache.ArraysCache(3), mlx_cache.KVCache())
    return mlx_cache.CacheList(inner, mlx_cache.RotatingKVCache(WINDOW, keep=2))


@dataclass(frozen=True)
class Case:
    name: str
    fresh: Callable[[], Any]
    feed: Callable[[Any, int], Any]
    sliceable: tuple[bool, bool] = (True, True)
    """After few tokens, and after more than the window."""


CASES = (
    Case("KVCache", mlx_cache.KVCache, feed_attention),
    Case("ConcatenateKVCache", mlx_cache.ConcatenateKVCache, feed_attention),
    Case("QuantizedKVCache", lambda: mlx_cache.QuantizedKVCache(group_size=32, bits=4), feed_attention),
    Case("RotatingKVCache", lambda: mlx_cache.RotatingKVCache(WINDOW), feed_attention, (True, False)),
    Case("RotatingKVCache+keep", lambda: mlx_cache.RotatingKVCache(WINDOW, 4), feed_attention, (True, False)),
    Case("ChunkedKVCache", lambda: mlx_cache.ChunkedKVCache(WINDOW), feed_chunked, (True, False)),
    Case("ArraysCache", lambda: mlx_cache.ArraysCache(3), feed_arrays, (False, False)),
    Case("ArraysCache+padding", padded_arrays, feed_arrays, (False, False)),
    Case("CacheList", lambda: mlx_cache.CacheList(mlx_cache.ArraysCache(3), mlx_cache.KVCache()), feed_pair),
    Case("CacheList+CacheList", nested, feed_nested),
    Case("BatchKVCache", lambda: mlx_cache.BatchKVCache([2, 0]), feed_batch),
    Case(
        "BatchRotatingKVCache",
        lambda: mlx_cache.BatchRotatingKVCache(WINDOW, [2, 0]),
        feed_batch,
        (True, False),
    ),
    Case(
        "LayerCache",
        lambda: importlib.import_module(DEEPSEEK_V41).LayerCache(WINDOW),
        feed_layer_cache,
        (False, False),
    ),
)
if importlib.util.find_spec(DEEPSEEK_V41) is None:  # mlx-lm 0.31
    CASES = CASES[:-1]
KV = CASES[0]
ARRAYS_AND_KV, NESTED = (case for case in CASES if case.name.startswith("CacheList"))
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
LEAVES = [case for case in CASES if not case.name.startswith("CacheList")]

HISTORIES = {"empty": (), "few": (3,), "chunks": (3, 4, 6), "decoded": (5, 1, 1, 1, 1, 1, 1)}


def state(layer: Any) -> dict[str, Any]:
    """All that an object knows, and its class."""
    attributes = dict(vars(layer))
    if "caches" in attributes:
        attributes["caches"] = [state(part) for part in attributes["caches"]]
    return {"class": type(layer), **attributes}


def filled(case: Case, history: tuple[int, ...], seed: int = 1) -> Any:
    mx.random.seed(seed)
    layer = case.fresh()
    for count in history:
        case.feed(layer, count)
    return layer


def fed(case: Case, layer: Any) -> list[Any]:
    """What a cache answers to the next tokens, one by one and in a chunk."""
    mx.random.seed(2)
    return [copy.deepcopy(case.feed(layer, count)) for count in (1, 1, 3, 1)]


@each_case
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_a_restored_layer_is_the_same_and_answers_the_same(case: Case, history: tuple[int, ...]) -> None:
    live = filled(case, history)
    snapshot = taken([live])
    restored = case.fresh()
    caches.restore(snapshot, [restored])
    assert same(state(restored), state(live))
    expected = fed(case, live)
    assert same(fed(case, restored), expected)


@each_case
def test_what_was_captured_is_not_changed_by_a_later_update(case: Case) -> None:
    live = filled(case, (3, 4, 1))
    before = taken([live])
    tensors, metadata = caches.capture([live])
    fed(case, live)
    assert same(tensors, before.tensors) and metadata == before.metadata


@each_case
def test_one_snapshot_restores_two_caches_that_share_nothing(case: Case) -> None:
    snapshot = taken([filled(case, (3, 4, 1))])
    one, two = case.fresh(), case.fresh()
    caches.restore(snapshot, [one])
    caches.restore(snapshot, [two])
    before, tensors = copy.deepcopy(state(two)), copy.deepcopy(snapshot.tensors)
    fed(case, one)
    assert same(state(two), before)
    assert same(snapshot.tensors, tensors)


@each_case
def test_a_used_cache_can_be_wound_back(case: Case) -> None:
    live = filled(case, (3, 4))
    snapshot, before = taken([live]), copy.deepcopy(state(live))
    fed(case, live)
    caches.restore(snapshot, [live])
    assert same(state(live), before)


def test_the_objects_that_are_passed_are_filled_and_returned() -> None:
    snapshot = taken([filled(ARRAYS_AND_KV, (3,)), None, filled(KV, (3,))])
    cache = [ARRAYS_AND_KV.fresh(), None, KV.fresh()]
    objects = [*cache, *cache[0].caches]
    assert caches.restore(snapshot, cache) is cache
    assert [*cache, *cache[0].caches] == objects  # by identity: these classes define no equality


def test_shared_arrays_stay_shared() -> None:
    live = filled(KV, (3,))
    live.values = live.keys
    snapshot = taken([live])
    assert list(snapshot.tensors) == ["layers.0.keys"]
    restored = caches.restore(snapshot, [mlx_cache.KVCache()])[0]
    assert restored.values is restored.keys


def test_the_pending_padding_of_a_batch_is_not_lost() -> None:
    # Between prepare() and finalize(): mlx-lm's own `state` leaves these two attributes out.
    for fresh in (
        lambda: mlx_cache.BatchKVCache([0, 0]),
        lambda: mlx_cache.BatchRotatingKVCache(WINDOW, [0, 0]),
    ):
        live = fresh()
        live.prepare(lengths=[3, 5], right_padding=[2, 0])
        feed_batch(live, 5)
        snapshot = taken([live])
        restored = caches.restore(snapshot, [fresh()])[0]
        assert taken([live], "non_sliceable").metadata["snapstore.caches"]["cache"] != [None]
        for layer in (live, restored):
            layer.finalize()
        assert same(state(restored), state(live))


def test_a_batch_that_mlx_lm_itself_has_loaded_can_be_captured() -> None:
    live = filled(next(case for case in CASES if case.name == "BatchKVCache"), (3,))
    del vars(live)["_right_padding"]  # from_state() makes the object without its constructor
    for layers in ("all", "non_sliceable"):
        restored = caches.restore(taken([live], layers), [mlx_cache.BatchKVCache([2, 0])])[0]
        assert vars(restored)["_right_padding"] is None


# -- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LEAVES, ids=lambda case: case.name)
def test_only_what_can_not_be_sliced_is_taken(case: Case) -> None:
    for history, sliceable in (((3,), case.sliceable[0]), ((3, 9, 1), case.sliceable[1])):
        snapshot = taken([filled(case, history)], "non_sliceable")
        taken_layers = snapshot.metadata["snapstore.caches"]["cache"]
        assert (taken_layers == [None]) == sliceable, history
        assert (not snapshot.tensors) == sliceable


def test_a_cache_list_is_judged_part_by_part() -> None:
    snapshot = taken([filled(NESTED, (3,))], "non_sliceable")
    assert set(snapshot.tensors) == {"layers.0.0.0.cache.0", "layers.0.0.0.cache.2"}
    restored = filled(NESTED, (5,), seed=4)
    rotating, attention = copy.deepcopy(state(restored[1])), copy.deepcopy(state(restored[0][1]))
    caches.restore(snapshot, [restored])
    assert same(state(restored[0][0]), state(filled(NESTED, (3,))[0][0]))
    assert same(state(restored[1]), rotating), "was not captured, so it stays as it was"
    assert same(state(restored[0][1]), attention)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captured", "passed", "says"),
    [
        (
            [mlx_cache.KVCache()],
            [mlx_cache.RotatingKVCache(8)],
            "holds a .*KVCache, and the cache has a .*Rotating",
        ),
        (
            [mlx_cache.KVCache()],
            [mlx_cache.BatchKVCache([0])],
            "holds a .*KVCache, and the cache has a .*BatchKV",
        ),
        (
            [mlx_cache.RotatingKVCache(8)],
            [mlx_cache.RotatingKVCache(16)],
            "max_size=8, keep=0, and this one has max",
        ),
        ([mlx_cache.RotatingKVCache(8, 4)], [mlx_cache.RotatingKVCache(8)], "keep=4"),
        ([mlx_cache.QuantizedKVCache(32, 4)], [mlx_cache.QuantizedKVCache(64, 4)], "group_size=32"),
        ([mlx_cache.ChunkedKVCache(8)], [mlx_cache.ChunkedKVCache(9)], "chunk_size=8"),
        ([mlx_cache.ArraysCache(2)], [mlx_cache.ArraysCache(3)], "the slots in the snapshot"),
        (
            [mlx_cache.KVCache()],
            [mlx_cache.KVCache(), mlx_cache.KVCache()],
            "has 1 layers, and the cache has 2",
        ),
        (
            [mlx_cache.KVCache(), None],
            [mlx_cache.KVCache()] * 2,
            "holds a builtins.NoneType, and the cache has a .*KVCache",
        ),
        ([mlx_cache.KVCache()] * 2, [mlx_cache.KVCache(), None], "the cache has a builtins.NoneType"),
        ([mlx_cache.CacheList(mlx_cache.KVCache())], [mlx_cache.KVCache()], "holds a .*CacheList"),
        ([mlx_cache.KVCache()], [mlx_cache.CacheList(mlx_cache.KVCache())], "the cache has a .*CacheList"),
    ],
)
def test_a_cache_that_does_not_match_is_left_alone(captured: list[Any], passed: list[Any], says: str) -> None:
    before = [layer and state(layer) for layer in passed]
    with pytest.raises(ValueError, match=says):
        caches.restore(taken(captured), passed)
    assert [layer and state(layer) for layer in passed] == before


def test_an_error_in_the_last_layer_leaves_the_first_alone() -> None:
    snapshot = taken([filled(KV, (3,)), mlx_cache.RotatingKVCache(8)])
    first = mlx_cache.KVCache()
    with pytest.raises(ValueError, match=r"layers\.1"):
        caches.restore(snapshot, [first, mlx_cache.RotatingKVCache(9)])
    assert first.keys is None


def test_a_class_that_is_not_on_the_list_is_refused() -> None:
    class MyCache(mlx_cache.KVCache):
        pass

    with pytest.raises(TypeError, match=r"layers\.1 is a .*MyCache, which is not on the allow-list"):
        caches.capture([mlx_cache.KVCache(), MyCache()])
    snapshot = taken([mlx_cache.KVCache()])
    with pytest.raises(TypeError, match="not on the allow-list"):
        caches.restore(snapshot, [MyCache()])


def test_state_that_the_table_does_not_know_is_refused() -> None:
    live = filled(KV, (3,))
    live.compressed_keys = mx.zeros(3)
    with pytest.raises(TypeError, match=r"layers\.0: .*does not know, and will not lose: compressed_keys"):
        caches.capture([live])


def changed(snapshot: Taken, change: Callable[[dict[str, Any]], Any]) -> Taken:
    metadata = copy.deepcopy(snapshot.metadata)
    change(metadata["snapstore.caches"]["cache"][0])
    return Taken(snapshot.tensors, metadata)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: record.update({"class": "os.system"}), "holds a os.system"),
        (
            lambda record: record.update({"class": ["os.system"]}),
            "not what snapstore.caches.capture returned",
        ),
        (lambda record: record.pop("class"), "not what snapstore.caches.capture returned"),
        (lambda record: record.pop("state"), "not what snapstore.caches.capture returned"),
        (lambda record: record.update(fixed=[]), "not what snapstore.caches.capture returned"),
        (lambda record: record["state"].update(update_and_fetch=1), "another version of the library"),
        (lambda record: record["state"].pop("offset"), "another version of the library"),
        (lambda record: record["state"].update(keys={"call": "os.system"}), "that snapstore.caches wrote"),
        (
            lambda record: record["state"].update(keys={"tensor": "gone"}),
            "'gone' that the snapshot does not hold",
        ),
    ],
)
def test_metadata_that_names_something_else_is_refused(change: Callable[[Any], Any], says: str) -> None:
    snapshot = changed(taken([filled(KV, (3,))]), change)
    fresh = mlx_cache.KVCache()
    with pytest.raises(ValueError, match=says):
        caches.restore(snapshot, [fresh])
    assert fresh.keys is None


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (None, "is not what snapstore.caches.capture returned"),
        ({"layer": 3}, "is not what snapstore.caches.capture returned"),
        ({"snapstore.caches": {"format": 2, "library": "mlx-lm", "cache": []}}, "version 2 of this format"),
        (
            {"snapstore.caches": {"format": 1, "library": "transformers", "cache": {}}},
            "a cache of transformers",
        ),
        ({"snapstore.caches": {"format": 1, "library": "mlx-lm", "cache": {}}}, "not what snapstore"),
    ],
)
def test_a_snapshot_of_something_else_is_refused(metadata: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        caches.restore(Taken({}, metadata), [mlx_cache.KVCache()])


def test_tensors_of_another_framework_say_how_to_load_them() -> None:
    snapshot = taken([filled(KV, (3,))])
    as_lists = {name: tensor.tolist() for name, tensor in snapshot.tensors.items()}
    with pytest.raises(TypeError, match="load the snapshot with framework='mlx'"):
        caches.restore(Taken(as_lists, snapshot.metadata), [mlx_cache.KVCache()])


def test_other_tensors_and_other_metadata_may_travel_along() -> None:
    live = filled(KV, (3,))
    snapshot = taken([live])
    more = Taken(snapshot.tensors | {"logits": mx.zeros(3)}, snapshot.metadata | {"prompt": "hash"})
    restored = caches.restore(more, [mlx_cache.KVCache()])[0]
    assert same(state(restored), state(live))
