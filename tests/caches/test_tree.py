"""The codec alone: whatever goes in comes out, as strict JSON and named tensors; what can not, is refused."""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapstore.caches._tree import TensorType, TreeDecoder, TreeEncoder

NUMPY = TensorType(
    framework="numpy",
    matches=lambda value: isinstance(value, np.ndarray),
    handle=lambda array: array,
)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
tensors = st.integers(0, 5).map(lambda size: np.arange(size, dtype=np.float32))
trees = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(scalars.filter(lambda key: key == key), inner, max_size=3)
    ),
    max_leaves=12,
)


def encoded(value: Any) -> tuple[dict[str, Any], Any]:
    encoder = TreeEncoder(NUMPY)
    skeleton = encoder.encode(value, "root")
    return encoder.tensors, json.loads(json.dumps(skeleton, allow_nan=False))


def round_trip(value: Any) -> Any:
    tensors, skeleton = encoded(value)
    return TreeDecoder(NUMPY, tensors).decode(skeleton)


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, dict):
        assert_same(list(left), list(right))
        assert_same(list(left.values()), list(right.values()))
    elif isinstance(left, float):
        assert left == right or (math.isnan(left) and math.isnan(right))
        assert math.copysign(1, left) == math.copysign(1, right) or math.isnan(left)
    else:
        assert left == right


@given(trees)
def test_any_tree_survives_strict_json(tree: Any) -> None:
    assert_same(round_trip(tree), tree)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_shared_tensor_is_saved_once_and_comes_back_as_one_object(places: list[int]) -> None:
    pool = [np.arange(4), np.arange(4), np.arange(4), np.arange(4)]  # equal, and yet four tensors
    value = [pool[place] for place in places]
    tensors, _ = encoded(value)
    assert len(tensors) == len(set(places))
    back = round_trip(value)
    for one, place in zip(back, places, strict=True):
        for other, other_place in zip(back, places, strict=True):
            assert (one is other) == (place == other_place)


def test_names_tell_where_a_tensor_was() -> None:
    a, b, c = np.zeros(1), np.zeros(2), np.zeros(3)
    tensors, _ = encoded({"conv": {0: a, 1: b}, "kv": [c, (c, a)]})
    assert list(tensors) == ["root.conv.0", "root.conv.1", "root.kv.0"]


@given(st.dictionaries(st.text() | st.integers() | st.floats(allow_nan=False), tensors, max_size=6))
@example({"A\u00b7": np.zeros(1)})  # a middle dot: in an identifier, and in no word
def test_no_two_tensors_get_one_name_and_no_name_is_odd(value: Any) -> None:
    tensors, _ = encoded(
        [value, {1: np.zeros(1), "1": np.zeros(1), 1.5: np.zeros(1), "a.b": {"c": np.zeros(1)}}]
    )
    assert len(tensors) == len(value) + 4
    labels = {label for name in tensors for label in name.split(".")}
    assert all(label.isidentifier() or re.fullmatch(r"#?-?\d+", label) for label in labels)
    assert_same(round_trip(value), value)


class Text(str):
    __slots__ = ()


class Number(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        b"bytes",
        1j,
        Text("text"),
        Number.ONE,
        OrderedDict(a=1),
        np.float64(1.0),
        np.int64(1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_come_back_as_something_else_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"root\.0\.x is a .*can not be kept in a snapshot"):
        encoded([{"x": value}])


def test_a_key_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(TypeError, match="a key must be"):
        encoded({(1, 2): 3})


def test_the_lists_that_are_handed_out_are_not_the_live_ones() -> None:
    live = [1, [2, 3]]
    encoder = TreeEncoder(NUMPY)
    skeleton = encoder.encode(live, "root")
    live[1].append(4)
    live.append(5)
    assert skeleton == [1, [2, 3]]


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"tuple": 1},
        {"tuple": [], "dict": []},
        {"dict": {"a": 1}},
        {"dict": [["only a key"]]},
        {"dict": [[[1], 2]]},
        {"dict": [[{"tensor": "t"}, 2]]},
        {"float": "1e400"},
        {"float": 1.0},
        {"tensor": 3},
        {"class": "os.system"},
        [{"unknown": []}],
    ],
    ids=repr,
)
def test_a_skeleton_that_was_not_written_here_is_refused(node: Any) -> None:
    with pytest.raises(ValueError, match=r"that snapstore\.caches wrote"):
        TreeDecoder(NUMPY, {"t": np.zeros(1)}).decode(node)


def test_a_tensor_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"'root\.keys' that the snapshot does not hold"):
        TreeDecoder(NUMPY, {}).decode({"tensor": "root.keys"})


def test_a_tensor_of_another_framework_says_how_to_load_it() -> None:
    with pytest.raises(TypeError, match="framework='numpy'"):
        TreeDecoder(NUMPY, {"t": [1, 2]}).decode({"tensor": "t"})
