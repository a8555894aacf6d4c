"""Every kind of tensor, through each framework's adapter: bits in, the same bits out, or a refusal that helps.

A "view" is a way to look at a tensor's memory: whole, transposed, cut, stepped, reversed, repeated. What the bytes of a
tensor should be is asked of its own framework, by calls that the adapters do not use.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
import mmap
import select
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import _efficientzerotensor, _neg_view
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from snapstore import UnsupportedTensorError
from snapstore._format import ITEM_BYTES, Layout, TensorSpec
from snapstore.adapters import _mlx, _numpy, _torch, adapter_for, adapter_named, place

CALLED = """
BOOL        bool_           bool            bool_
U8          uint8           uint8           uint8
U16         uint16          uint16          uint16
U32         uint32          uint32          uint32
U64         uint64          uint64          uint64
I8          int8            int8            int8
I16         int16           int16           int16
I32         int32           int32           int32
I64         int64           int64           int64
F16         float16         float16         float16
F32         float32         float32         float32
F64         float64         float64         float64
C64         complex64       complex64       complex64
BF16        bfloat16        bfloat16        bfloat16
F8_E4M3     float8_e4m3fn   float8_e4m3fn   -
F8_E5M2     float8_e5m2     float8_e5m2     -
F8_E4M3FNUZ float8_e4m3fnuz float8_e4m3fnuz -
F8_E5M2FNUZ float8_e5m2fnuz float8_e5m2fnuz -
"""
"""What each dtype of a file is called by numpy (or ml_dtypes), torch and mlx."""

DTYPES: dict[str, dict[str, Any]] = {"numpy": {}, "torch": {}, "mlx": {}}
for dtype, in_numpy, in_torch, in_mlx in map(str.split, CALLED.split("\n")[1:-1]):
    DTYPES["numpy"][dtype] = np.dtype(getattr(np if hasattr(np, in_numpy) else ml_dtypes, in_numpy))
    DTYPES["torch"][dtype] = getattr(torch, in_torch)
    if in_mlx != "-":
        DTYPES["mlx"][dtype] = getattr(mx, in_mlx)

FRAMEWORKS = list(DTYPES)
KINDS = [(framework, dtype) for framework, dtypes in DTYPES.items() for dtype in dtypes]

GUARD = 0xA5


def host_memory(nbytes: int) -> memoryview:
    """Fresh page-aligned memory, every byte of which is one that a copy has to write over."""
    area = mmap.mmap(-1, nbytes + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(area)
    view[:] = bytes([GUARD]) * len(view)
    return view[:nbytes]


def host_copy(tensors: Mapping[str, Any]) -> tuple[Layout, memoryview]:
    """What a save does on the calling thread; nothing outside of the layout's bytes may be touched."""
    adapter = adapter_for(tensors)
    specs, sources = adapter.describe(tensors)
    layout = Layout.of(specs)
    buffer = host_memory(layout.nbytes)
    adapter.copy_into(sources, layout, buffer)
    around = memoryview(buffer.obj)
    assert set(around[layout.nbytes :]) == {GUARD}
    return layout, buffer


def segments(layout: Layout, buffer: memoryview) -> dict[str, bytes]:
    places = zip(layout.specs, layout.offsets, layout.sizes, strict=True)
    return {spec.name: bytes(buffer[offset : offset + size]) for spec, offset, size in places}


def bytes_of(tensor: Any) -> bytes:
    """The bytes of its values in C order, by its framework's own account."""
    if isinstance(tensor, torch.Tensor):
        plain = tensor.detach().resolve_conj().resolve_neg()
        if plain.dtype == torch.bool and not plain.is_contiguous():
            plain = plain.view(torch.uint8)
        return (
            plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    if isinstance(tensor, mx.array):
        words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[tensor.dtype.size]
        flat = mx.flatten(tensor, stream=mx.cpu)
        return np.array(flat.view(words, stream=mx.cpu)).tobytes() if tensor.size else b""
    return np.asarray(tensor).tobytes()


def assert_same(got: Any, expected: Any) -> None:
    assert (type(got).__module__, got.dtype, tuple(got.shape)) == (
        type(expected).__module__,
        expected.dtype,
        tuple(expected.shape),
    )
    assert bytes_of(got) == bytes_of(expected)


def assert_survives(tensors: Mapping[str, Any]) -> None:
    """Copied, looked at and built again: the same bytes and words each time."""
    layout, buffer = host_copy(tensors)
    assert segments(layout, buffer) == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    adapter = adapter_for(tensors)
    look = adapter.view(adapter.describe(tensors)[1])
    views = look()
    assert [bytes(view) for view in views] == [bytes_of(tensor) for tensor in tensors.values()]
    assert {(view.format, view.ndim, view.readonly) for view in views} <= {("B", 1, True)}
    del look, views
    loaded = adapter.from_host(layout, buffer, None)
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        plain = np.asarray(tensor) if adapter.framework == "numpy" else tensor
        if isinstance(plain, torch.Tensor):
            plain = plain.detach().as_subclass(torch.Tensor)
        assert_same(loaded[name], plain)


def bits(dtype: str, count: int, seed: int = 0) -> bytearray:
    """Random bits, so NaNs of every payload, infinities and subnormals among the floats; a bool is 0 or 1."""
    words = np.random.default_rng(seed).integers(0, 256, count * ITEM_BYTES[dtype], dtype=np.uint8)
    return bytearray((words & 1 if dtype == "BOOL" else words).tobytes())


def made(framework: str, dtype: str, shape: tuple[int, ...], seed: int = 0) -> Any:
    """A contiguous tensor of random bits, made without the adapters."""
    raw = bits(dtype, math.prod(shape), seed)
    if framework == "numpy":
        return np.frombuffer(raw, DTYPES["numpy"][dtype]).reshape(shape)
    if framework == "torch":
        flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return flat.view(DTYPES["torch"][dtype]).reshape(shape)
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[ITEM_BYTES[dtype]]
    array = mx.array(np.frombuffer(raw, width)).view(DTYPES["mlx"][dtype], stream=mx.cpu)
    return mx.reshape(array, shape, stream=mx.cpu)


def transposed(tensor: Any, *axes: int) -> Any:
    if isinstance(tensor, torch.Tensor):
        return tensor.permute(*axes)
    return (
        mx.transpose(tensor, axes, stream=mx.cpu) if isinstance(tensor, mx.array) else tensor.transpose(*axes)
    )


def repeated(tensor: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(tensor, torch.Tensor):
        return tensor.expand(*shape)
    if isinstance(tensor, mx.array):
        return mx.broadcast_to(tensor, shape, stream=mx.cpu)
    return np.broadcast_to(tensor, shape)


VIEWS: dict[str, Callable[[str, str], Any]] = {
    "whole": lambda f, d: made(f, d, (3, 5, 7)),
    "one": lambda f, d: made(f, d, ()),
    "one_of_many": lambda f, d: made(f, d, (4, 3))[2, 1],
    "none": lambda f, d: made(f, d, (0, 3)),
    "none_inside": lambda f, d: made(f, d, (4, 5))[:, 5:],
    "a_part": lambda f, d: made(f, d, (9, 11))[3:7],
    "transposed": lambda f, d: transposed(made(f, d, (40, 60)), 1, 0),
    "turned": lambda f, d: transposed(made(f, d, (2, 30, 4, 16)), 0, 2, 1, 3),
    "stepped": lambda f, d: made(f, d, (3000,))[1::3],
    "long_rows": lambda f, d: made(f, d, (2, 4, 1500))[:, 1:, :1400],
    "short_rows": lambda f, d: made(f, d, (2, 700, 16))[:, :, :10],
    "a_window": lambda f, d: made(f, d, (1, 8, 300, 16))[:, :, -200:],
    "a_column": lambda f, d: made(f, d, (700, 3))[:, 1],
    "repeated": lambda f, d: repeated(made(f, d, (1, 7, 1)), (600, 7, 3)),
    "one_repeated": lambda f, d: repeated(made(f, d, ()), (33, 2)),
    "large": lambda f, d: made(f, d, (3 * 1024 * 1024 + 5,)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("framework", "dtype"), KINDS)
def test_every_dtype_survives_in_every_view(framework: str, dtype: str, view: str) -> None:
    assert_survives({"x": VIEWS[view](framework, dtype)})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_dtype_survives_beside_every_other(framework: str) -> None:
    assert_survives(
        {f"{dtype}.{view}": VIEWS[view](framework, dtype) for dtype in DTYPES[framework] for view in VIEWS}
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_dtype_of_a_file_is_built_or_refused_by_name(framework: str) -> None:
    assert set(DTYPES["torch"]) == set(ITEM_BYTES)
    for dtype in set(ITEM_BYTES) - set(DTYPES[framework]):
        layout = Layout.of([TensorSpec("plain", "U8", (3,)), TensorSpec("layer", dtype, (4,))])
        with pytest.raises(
            UnsupportedTensorError, match=rf"'layer' can not be loaded: .*{dtype}; .*torch"
        ) as caught:
            adapter_named(framework).from_host(layout, host_memory(layout.nbytes), None)
        assert caught.value.tensor_name == "layer"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_tensors_are_a_snapshot_too(framework: str) -> None:
    adapter = adapter_named(framework)
    layout = Layout.of(adapter.describe({})[0])
    adapter.copy_into([], layout, host_memory(0))
    assert list(adapter.view([])()) == []
    assert adapter.from_host(layout, host_memory(0), None) == {}
    assert adapter_for({}) is adapter_named("numpy")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_memory_under_two_names_is_saved_under_both(framework: str) -> None:
    shared = made(framework, "F32", (6, 4))
    assert_survives(
        {"weight": shared, "tied": shared, "part": shared[2:4], "turned": transposed(shared, 1, 0)}
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_rows_longer_than_one_slice_survive(framework: str) -> None:
    assert_survives({"x": made(framework, "U8", (3, 1_500_000))[:, 7:1_400_000]})


SPECIAL = (
    0x0000,
    0x8000,
    0x0001,
    0x8001,
    0x03FF,
    0x7C00,
    0xFC00,
    0x7C01,
    0x7E00,
    0xFE55,
    0xFFFF,
    0x7F80,
    0x7F81,
    0xFFC1,
)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_signalling_nans_negative_zeros_and_subnormals_keep_every_bit(framework: str, dtype: str) -> None:
    words = np.array(SPECIAL * 60, np.uint16)
    tensor = {
        "numpy": lambda: words.view(DTYPES["numpy"][dtype]),
        "torch": lambda: torch.from_numpy(words.view(np.int16)).view(DTYPES["torch"][dtype]),
        "mlx": lambda: mx.array(words).view(DTYPES["mlx"][dtype]),
    }[framework]()
    tensors = {"all": tensor, "every_other": tensor[::2], "turned": transposed(tensor.reshape(60, -1), 1, 0)}
    layout, buffer = host_copy(tensors)
    found = segments(layout, buffer)
    assert found["all"] == words.tobytes()
    assert found["every_other"] == words[::2].tobytes()
    assert found["turned"] == words.reshape(60, -1).T.tobytes()


@pytest.mark.parametrize("source", FRAMEWORKS)
@pytest.mark.parametrize("target", FRAMEWORKS)
def test_what_one_framework_describes_another_builds(source: str, target: str) -> None:
    common = [dtype for dtype in DTYPES[source] if dtype in DTYPES[target]]
    shapes = {"m": (3, 4), "s": (), "e": (0, 2), "v": (1025,)}
    tensors = {f"{d}.{s}": made(source, d, shape) for d in common for s, shape in shapes.items()}
    layout, buffer = host_copy(tensors)
    loaded = adapter_named(target).from_host(layout, buffer, None)
    for dtype in common:
        for short, shape in shapes.items():
            assert_same(loaded[f"{dtype}.{short}"], made(target, dtype, shape))


# --- any shape, any view, any company ---


@st.composite
def looks(draw: st.DrawFn) -> Callable[[Any], Any]:
    """A view of a tensor of up to four axes, by what numpy, torch and mlx all can do."""
    steps = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3)), max_size=3))
    seed = draw(st.integers(0, 23))

    def look(tensor: Any) -> Any:
        for axis, start, step in steps:
            if axis < tensor.ndim:
                tensor = tensor[(slice(None),) * axis + (slice(start, None, step),)]
        axes = sorted(range(tensor.ndim), key=lambda axis: hash((seed, axis)))
        return transposed(tensor, *axes) if tensor.ndim > 1 else tensor

    return look


SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.tuples(st.integers(1, 3), st.integers(90, 400), st.integers(1, 40)),
)
COMPANIES = st.lists(st.tuples(st.sampled_from(list(ITEM_BYTES)), SHAPES, looks()), min_size=1, max_size=6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=60)
@given(company=COMPANIES, names=st.lists(st.text(min_size=1), min_size=6, max_size=6, unique=True))
def test_any_company_of_views_survives(framework: str, company: list[Any], names: list[str]) -> None:
    tensors = {
        name: look(made(framework, dtype, shape, seed))
        for seed, (name, (dtype, shape, look)) in enumerate(zip(names, company, strict=False))
        if dtype in DTYPES[framework] and name != "__metadata__"
    }
    assert_survives(tensors)


@settings(max_examples=100)
@given(
    dtype=st.sampled_from(list(DTYPES["numpy"])),
    shape=SHAPES,
    look=looks(),
    flips=st.integers(0, 15),
    big=st.integers(1, 3000),
)
def test_numpy_arrays_may_run_backwards(
    dtype: str, shape: tuple[int, ...], look: Any, flips: int, big: int
) -> None:
    array = look(made("numpy", dtype, shape))
    array = array[tuple(slice(None, None, -1 if flips >> axis & 1 else 1) for axis in range(array.ndim))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_numpy, "_BIG_ITEMS", big)  # both ways to copy, whatever the size
        assert_survives({"x": array})


# --- names ---


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (1, TypeError, "must be a str"),
        (b"x", TypeError, "must be a str"),
        (None, TypeError, "must be a str"),
        (type("Name", (str,), {})("x"), TypeError, "must be a str"),
        ("__metadata__", ValueError, "__metadata__"),
        ("a\ud800b", ValueError, "surrogate"),
    ],
)
def test_a_name_that_no_file_can_hold_is_refused(name: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        adapter_for({"fine": np.zeros(1), name: np.zeros(1)})
    assert type(caught.value) is error


@pytest.mark.parametrize("name", ["", " ", "__metadata", "a.b/c", "ключ 🗝", "\x00", "'\"\\"])
def test_any_other_name_will_do(name: str) -> None:
    assert_survives({name: np.arange(3)})


@pytest.mark.parametrize("tensors", [[np.zeros(1)], np.zeros(1), None, "x"])
def test_what_is_no_mapping_is_a_type_error(tensors: Any) -> None:
    with pytest.raises(TypeError, match="mapping"):
        adapter_for(tensors)


# --- which adapter ---


@pytest.mark.parametrize(
    ("tensor", "framework"),
    [
        (np.zeros(2), "numpy"),
        (np.float32(2), "numpy"),
        (ml_dtypes.bfloat16(2), "numpy"),
        (np.zeros(2).view(type("Own", (np.ndarray,), {})), "numpy"),
        (torch.zeros(2), "torch"),
        (torch.nn.Parameter(torch.zeros(2)), "torch"),
        (torch.zeros(2).as_subclass(type("Own", (torch.Tensor,), {})), "torch"),
        (mx.zeros(2), "mlx"),
    ],
)
def test_a_tensor_finds_its_adapter(tensor: Any, framework: str) -> None:
    assert adapter_for({"x": tensor}) is adapter_named(framework)
    assert adapter_named(framework).framework == framework


@pytest.mark.parametrize("tensor", [1.5, None, [1.0], b"bytes", object()])
def test_what_is_of_no_framework_is_refused_by_name(tensor: Any) -> None:
    with pytest.raises(UnsupportedTensorError, match="'layer' can not be saved") as caught:
        adapter_for({"layer": tensor})
    assert caught.value.tensor_name == "layer"


def test_tensors_of_two_frameworks_do_not_mix() -> None:
    with pytest.raises(UnsupportedTensorError, match="one framework at a time") as caught:
        adapter_for({"a": np.zeros(1), "b": torch.zeros(1)})
    assert caught.value.tensor_name == "b"


@pytest.mark.parametrize("framework", ["jax", "", "Torch", None, "adapters"])
def test_an_unknown_framework_is_a_value_error(framework: Any) -> None:
    with pytest.raises(ValueError, match="framework must be one of"):
        adapter_named(framework)


def test_a_framework_that_is_not_installed_is_an_import_error_each_time() -> None:
    script = """
import sys
sys.modules["torch"] = None
from snapstore.adapters import adapter_named
for _ in range(2):
    try:
        adapter_named("torch")
    except ImportError:
        print("not here")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("not here\nnot here\n", "")


# --- refusals ---


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)


def inside_vmap() -> torch.Tensor:
    seen: list[torch.Tensor] = []
    torch.func.vmap(lambda row: seen.append(row) or row)(torch.zeros(2, 3))
    return seen[0]


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(3)


def freed() -> torch.Tensor:
    tensor = torch.zeros(5)
    tensor.untyped_storage().resize_(0)
    return tensor


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch is giving them up
        return torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.quint8)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "torch sparse": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "torch nested": (nested, "wraps other tensors|unbind"),
    "torch meta": (lambda: torch.zeros(3, device="meta"), "meta tensor"),
    "torch quantised": (quantised, "int_repr"),
    "torch wrapper": (lambda: TwoTensor(torch.zeros(3), torch.zeros(3)), "to_local"),
    "torch fake": (fake, "wraps other tensors"),
    "torch batched": (inside_vmap, "torch.func"),
    "torch zero": (lambda: _efficientzerotensor(3), "clone"),
    "torch freed": (freed, "memory is gone"),
    "torch lazy": (torch.nn.UninitializedParameter, "run its module"),
    "torch mkldnn": (lambda: torch.zeros(3).to_mkldnn(), "to_dense"),
    "torch complex128": (lambda: torch.zeros(3, dtype=torch.complex128), "view_as_real"),
    "torch complex32": (lambda: torch.zeros(3).view(torch.complex32), "view_as_real"),
    "torch float4": (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "uint8"),
    "torch e8m0": (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.float8_e8m0fnu), "uint8"),
    "torch size": (lambda: torch.Size([1]), "as_tensor"),
    "torch module": (lambda: torch.nn.Linear(1, 1), "as_tensor"),
    "numpy complex128": (lambda: np.zeros(3, np.complex128), "complex64"),
    "numpy longdouble": (lambda: np.zeros(3, np.longdouble), "float dtype"),
    "numpy object": (lambda: np.array([{}, None]), "metadata"),
    "numpy structured": (lambda: np.zeros(3, [("a", "f4"), ("b", "i4")]), "fields"),
    "numpy record": (lambda: np.zeros(3, [("a", "f4")]).view(np.recarray), "fields"),
    "numpy strings": (lambda: np.array(["a", "bc"]), "metadata"),
    "numpy bytes": (lambda: np.array([b"a", b"bc"]), "metadata"),
    "numpy text": (lambda: np.array(["a", "bc"], np.dtypes.StringDType()), "no dtype"),
    "numpy dates": (lambda: np.zeros(3, "M8[s]"), "int64"),
    "numpy times": (lambda: np.zeros(3, "m8[s]"), "int64"),
    "numpy big endian": (lambda: np.zeros(3, ">f4"), r"astype\(array.dtype.newbyteorder"),
    "numpy masked": (lambda: np.ma.masked_array([1.0, 2.0], [True, False]), ".mask"),
    "numpy float4": (lambda: np.zeros(3, ml_dtypes.float4_e2m1fn), "uint8"),
    "numpy e4m3": (lambda: np.zeros(3, ml_dtypes.float8_e4m3), "uint8"),
    "numpy int4": (lambda: np.zeros(3, ml_dtypes.int4), "uint8"),
    "numpy dtype": (lambda: np.dtype("f4"), "asarray"),
    "numpy random": (np.random.default_rng, "asarray"),
    "mlx dtype": (lambda: mx.float32, "mx.array"),
    "mlx stream": (lambda: mx.default_stream(mx.cpu), "mx.array"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_file_can_hold_is_refused_by_name_with_advice(kind: str) -> None:
    make, advice = REFUSED[kind]
    tensor = make()
    plain = {"numpy": np.zeros(1), "torch": torch.zeros(1), "mlx": mx.zeros(1)}[kind.partition(" ")[0]]
    tensors = {"fine": plain, "layers.3": tensor}
    adapter = adapter_for(tensors)
    with pytest.raises(UnsupportedTensorError, match=advice) as caught:
        adapter.describe(tensors)
    assert caught.value.tensor_name == "layers.3"
    assert "'layers.3' can not be saved" in str(caught.value)


# --- torch: kinds of its own ---


@pytest.mark.parametrize("shape", [(), (5,), (40, 60), (0, 2)])
def test_torch_conjugates_and_negatives_are_saved_as_the_values_they_show(shape: tuple[int, ...]) -> None:
    numbers = made("torch", "C64", shape)
    twice = numbers.conj().imag
    assert numbers.conj().is_conj() and twice.is_neg()
    tensors = {
        "conj": numbers.conj(),
        "neg": twice,
        "plain": numbers,
    }
    tensors |= {f"{name}.turned": tensor.mT for name, tensor in tensors.items() if tensor.ndim > 1}
    tensors |= {"neg_bf16": _neg_view(made("torch", "BF16", shape))}
    assert_survives(tensors)


def test_torch_parameters_gradients_and_subclasses_are_saved_by_value() -> None:
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError("its own idea of torch functions is not asked")

    leaf = made("torch", "F32", (40, 60)).nan_to_num().requires_grad_()
    inner = made("torch", "F32", (40, 60))
    assert_survives(
        {
            "parameter": torch.nn.Parameter(inner),
            "buffer": torch.nn.Buffer(inner),
            "leaf": leaf,
            "leaf.turned": leaf.mT,
            "computed": leaf * 2,
            "computed.turned": (leaf * 2).mT,
        }
    )
    layout, buffer = host_copy({"own": inner.as_subclass(Own), "own.turned": inner.mT.as_subclass(Own)})
    assert segments(layout, buffer) == {"own": bytes_of(inner), "own.turned": bytes_of(inner.mT)}


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("making", [False, True])
def test_torch_tensors_cross_inference_mode(making: bool, saving: bool) -> None:
    with torch.inference_mode(making):
        base = made("torch", "F32", (40, 60)).clone()
        complexes = made("torch", "C64", (40, 60)).clone()
        tensors = {
            "x": base,
            "t": base.mT,
            "r": base[:, 1:],
            "c": complexes.conj(),
            "n": complexes.conj().imag,
        }
    with torch.inference_mode(saving):
        layout, buffer = host_copy(tensors)
        loaded = adapter_named("torch").from_host(layout, buffer, None)
    for name, tensor in tensors.items():
        assert bytes_of(loaded[name]) == bytes_of(tensor)
        assert not loaded[name].is_inference()
        loaded[name].add_(1)  # which torch refuses for what is made in inference mode


def test_torch_bools_keep_bytes_that_are_no_bools() -> None:
    odd = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(torch.bool)
    tensors = {"whole": odd, "turned": odd.mT, "stepped": odd[:, ::2], "rows": odd[:, 1:]}
    layout, buffer = host_copy(tensors)
    assert segments(layout, buffer) == {
        name: each.view(torch.uint8).contiguous().numpy().tobytes() for name, each in tensors.items()
    }


def test_torch_tensors_load_on_the_host_whatever_the_default_device() -> None:
    tensors = {"x": torch.ones(3), "e": torch.zeros(0, 2), "t": torch.arange(6000.0).reshape(60, 100).mT}
    expected = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    with torch.device("meta"):
        layout, buffer = host_copy(tensors)
        loaded = adapter_named("torch").from_host(layout, buffer, None)
    assert {name: (each.device.type, bytes_of(each)) for name, each in loaded.items()} == {
        name: ("cpu", raw) for name, raw in expected.items()
    }


def test_torch_copies_all_scattered_tensors_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {str(number): made("torch", "BF16", (100, 60), number).mT for number in range(48)}
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]

    for name in ("frombuffer", "_foreach_copy_"):
        monkeypatch.setattr(torch, name, counted(name, getattr(torch, name)))
    layout, buffer = host_copy(tensors)
    assert calls == ["frombuffer", "_foreach_copy_"]
    assert segments(layout, buffer) == {name: bytes_of(tensor) for name, tensor in tensors.items()}


class Elsewhere(torch.Tensor):
    """Stands for a tensor on a device: torch can copy it, and its memory is not to be read."""

    is_cpu = property(lambda self: False)

    def data_ptr(self) -> int:
        raise AssertionError("the memory of a device was read")


def test_torch_tensors_on_a_device_are_copied_by_torch() -> None:
    whole = made("torch", "BF16", (40, 60))
    near = made("torch", "BF16", (40, 60), seed=1)
    tensors = {
        "far": whole.as_subclass(Elsewhere),
        "near.turned": near.mT,
        "far.turned": whole.mT.as_subclass(Elsewhere),
        "far.none": whole[:0].as_subclass(Elsewhere),
        "near": near,
    }
    layout, buffer = host_copy(tensors)
    assert segments(layout, buffer) == {
        "far": bytes_of(whole),
        "near.turned": bytes_of(near.mT),
        "far.turned": bytes_of(whole.mT),
        "far.none": b"",
        "near": bytes_of(near),
    }
    adapter = adapter_named("torch")
    look = adapter.view(adapter.describe(tensors)[1])
    views = look()
    assert [bytes(view) for view in views] == list(segments(layout, buffer).values())


@pytest.mark.gpu
def test_cuda_tensors_survive() -> None:
    base = made("torch", "F32", (40, 60)).cuda()
    complexes = made("torch", "C64", (40, 60)).cuda()
    tensors = {
        "x": base,
        "t": base.mT,
        "c": complexes.conj(),
        "n": complexes.conj().imag,
        "f8": base.view(torch.float8_e4m3fn),
    }
    layout, buffer = host_copy(tensors)
    assert segments(layout, buffer) == {name: bytes_of(tensor.cpu()) for name, tensor in tensors.items()}
    loaded = adapter_named("torch").from_host(layout, buffer, "cuda")
    for name, tensor in tensors.items():
        assert loaded[name].device == base.device
        assert_same(loaded[name].cpu(), tensor.cpu())


def test_torch_works_without_numpy() -> None:
    script = """
import mmap, sys
sys.modules["numpy"] = sys.modules["ml_dtypes"] = None
import torch
from snapstore._format import Layout
from snapstore.adapters import adapter_for
whole = torch.arange(6000, dtype=torch.bfloat16).reshape(60, 100)
tensors = {"whole": whole, "turned": whole.mT, "rows": whole[:, 1:], "none": whole[:0]}
tensors["f8"] = whole.to(torch.float8_e5m2)
adapter = adapter_for(tensors)
specs, sources = adapter.describe(tensors)
layout = Layout.of(specs)
buffer = memoryview(mmap.mmap(-1, layout.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
adapter.copy_into(sources, layout, buffer)
look = adapter.view(sources)
views = look()
assert [bytes(view) for view in views] == [bytes(buffer[o : o + s]) for o, s in zip(layout.offsets, layout.sizes)]
for name, tensor in adapter.from_host(layout, buffer, None).items():
    assert tensor.dtype == tensors[name].dtype and torch.equal(tensor.float(), tensors[name].float()), name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- numpy: kinds of its own ---


def test_numpy_scalars_subclasses_and_read_only_arrays_are_saved_by_value(tmp_path: Any) -> None:
    read_only = np.arange(6.0)
    read_only.flags.writeable = False
    mapped = np.memmap(tmp_path / "mapped", np.float32, "w+", shape=(30, 40))
    assert_survives(
        {
            "float": np.float64(2.5),
            "bool": np.bool_(1),
            "bf16": ml_dtypes.bfloat16(1.5),
            "read_only": read_only,
            "mapped": mapped,
            "mapped.turned": mapped.T,
            "long": np.arange(3, dtype=np.longlong),
            "fortran": np.asfortranarray(np.arange(1200.0).reshape(30, 40)),
        }
    )


def test_numpy_without_ml_dtypes_says_what_it_can_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    spec = importlib.util.spec_from_file_location("numpy_adapter_alone", _numpy.__file__)
    assert spec is not None and spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    layout, buffer = host_copy({"plain": np.arange(3), "layer": made("numpy", "BF16", (4,))})
    with pytest.raises(
        UnsupportedTensorError, match=r"'layer' can not be loaded: .*install ml_dtypes.*torch"
    ) as caught:
        alone.ADAPTER.from_host(layout, buffer, None)
    assert caught.value.tensor_name == "layer"
    layout, buffer = host_copy({"plain": np.arange(3)})
    assert_same(alone.ADAPTER.from_host(layout, buffer, None)["plain"], np.arange(3))


# --- mlx: kinds of its own ---


def test_mlx_lazy_arrays_are_described_lazily_and_evaluated_for_their_bytes() -> None:
    base = mx.arange(1 << 20, dtype=mx.float32)
    mx.eval(base)
    tensors = {"sum": base + 1, "cast": base.astype(mx.bfloat16)}
    before = mx.get_active_memory()
    adapter = adapter_for(tensors)
    specs, sources = adapter.describe(tensors)
    assert mx.get_active_memory() == before
    assert list(specs) == [TensorSpec("sum", "F32", (1 << 20,)), TensorSpec("cast", "BF16", (1 << 20,))]
    look = adapter.view(sources)
    views = look()
    assert [bytes(view) for view in views] == [bytes_of(tensor) for tensor in tensors.values()]


def test_mlx_evaluates_all_arrays_of_a_save_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda arrays: (calls.append(len(arrays)), evaluate(arrays)))
    _mlx.ADAPTER.view([mx.arange(each) + 1 for each in range(48)])
    assert calls == [48]


def test_mlx_views_of_evaluated_arrays_are_their_own_memory() -> None:
    base = mx.arange(1 << 20, dtype=mx.float32)
    mx.eval(base)
    before = mx.get_active_memory()
    look = _mlx.ADAPTER.view([base, base[5:]])
    views = look()
    assert mx.get_active_memory() == before
    assert len(views[0]) == 4 << 20


def update_item(array: mx.array) -> None:
    array[0] = 7


def update_part(array: mx.array) -> None:
    array[:, 2:4] = mx.zeros((array.shape[0], 2))


def add_in_place(array: mx.array) -> None:
    array += 1
    mx.eval(array)


def multiply_after_adding(array: mx.array) -> None:
    array += 1
    array *= 3
    mx.eval(array)
    array[0, 0] = -5


@pytest.mark.parametrize("change", [update_item, update_part, add_in_place, multiply_after_adding])
@pytest.mark.parametrize("lazy", [False, True])
def test_mlx_views_are_frozen(change: Callable[[mx.array], None], lazy: bool) -> None:
    array = mx.random.normal((64, 64))
    if not lazy:
        mx.eval(array)
    sources = [array, array[8:], array.T]
    look = _mlx.ADAPTER.view(sources)
    before = [bytes_of(source) for source in sources]
    del sources
    change(array)
    mx.eval(array)
    with ThreadPoolExecutor(1) as another:  # the writer's thread makes the views, whenever it comes to it
        assert [bytes(view) for view in another.submit(look).result()] == before
    assert bytes_of(array) != before[0]
    del array, change
    others = [mx.full((64, 64), float(each)) for each in range(8)]  # where freed memory would be used again
    mx.eval(others)
    assert [bytes(view) for view in look()] == before


def test_mlx_arrays_loaded_on_one_thread_serve_another() -> None:
    arrays = {dtype: made("mlx", dtype, (5, 7)) for dtype in DTYPES["mlx"]} | {"none": mx.zeros((0, 3))}
    layout, buffer = host_copy(arrays)
    loaded: dict[str, mx.array] = {}
    thread = threading.Thread(target=lambda: loaded.update(_mlx.ADAPTER.from_host(layout, buffer, None)))
    thread.start()
    thread.join()
    buffer[:] = bytes(len(buffer))
    for name, array in arrays.items():
        assert_same(loaded[name], array)


def test_mlx_dtypes_of_the_future_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mlx, "_NAMES", {})
    with pytest.raises(UnsupportedTensorError, match=r"'layer' can not be saved: .*float16; .*uint8"):
        _mlx.ADAPTER.describe({"layer": mx.zeros(3, mx.float16)})


def test_mlx_loads_no_float64_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    layout, buffer = host_copy({"layer": np.arange(3.0)})
    with pytest.raises(UnsupportedTensorError, match=r"no F64 on the GPU; .*cpu"):
        _mlx.ADAPTER.from_host(layout, buffer, "gpu")
    assert_same(
        _mlx.ADAPTER.from_host(layout, buffer, None)["layer"], mx.array(np.arange(3.0), dtype=mx.float64)
    )


# --- devices ---


@pytest.mark.parametrize(
    ("framework", "device"),
    [
        *(("numpy", device) for device in (None, "cpu")),
        *(("torch", device) for device in (None, "cpu", torch.device("cpu"))),
        *(("mlx", device) for device in (None, "cpu", mx.cpu, mx.Device(mx.cpu, 0))),
    ],
)
def test_the_host_has_several_names(framework: str, device: Any) -> None:
    tensor = made(framework, "F32", (3, 4))
    layout, buffer = host_copy({"x": tensor})
    assert_same(adapter_named(framework).from_host(layout, buffer, device)["x"], tensor)


@pytest.mark.parametrize(
    ("framework", "device"),
    [
        ("numpy", "cuda"),
        ("numpy", 0),
        ("torch", "gpu"),
        ("torch", ""),
        ("mlx", "cuda"),
        ("mlx", 0),
        ("mlx", "gpu"),
    ],
)
def test_a_device_that_is_not_there_is_a_value_error(framework: str, device: Any) -> None:
    layout, buffer = host_copy({"x": made(framework, "F32", (3, 4))})
    with pytest.raises(ValueError, match=repr(device)):
        adapter_named(framework).from_host(layout, buffer, device)


def test_torch_tensors_move_to_the_device_that_is_named() -> None:
    layout, buffer = host_copy({"x": torch.ones(3, 4), "none": torch.ones(0)})
    loaded = adapter_named("torch").from_host(layout, buffer, "meta")
    assert {name: each.device.type for name, each in loaded.items()} == {"x": "meta", "none": "meta"}


# --- memory ---


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def address_of(tensor: Any) -> int:
    return int(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_loaded_tensors_are_the_buffer_and_can_be_written(framework: str) -> None:
    shapes = {"F64": (3, 4), "BF16": (5,), "U8": (), "F8_E5M2": (2, 1)}
    layout, buffer = host_copy({dtype: made(framework, dtype, shape) for dtype, shape in shapes.items()})
    loaded = adapter_named(framework).from_host(layout, buffer, None)
    for spec, offset, size in zip(layout.specs, layout.offsets, layout.sizes, strict=True):
        assert address_of(loaded[spec.name]) == address(buffer) + offset
        loaded[spec.name][...] = 0
        assert bytes(buffer[offset : offset + size]) == bytes(size)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_loaded_tensors_keep_their_memory_alive(framework: str) -> None:
    tensors = {"x": made(framework, "F32", (300, 40)), "s": made(framework, "I64", ())}
    layout, buffer = host_copy(tensors)
    loaded = adapter_named(framework).from_host(layout, buffer, None)
    del buffer
    gc.collect()
    host_memory(layout.nbytes)  # would land where the buffer was
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_describing_and_viewing_copies_nothing(framework: str) -> None:
    tensors = {"x": made(framework, "BF16", (30, 40)), "part": made(framework, "F32", (30, 40))[3:]}
    adapter = adapter_for(tensors)
    look = adapter.view(adapter.describe(tensors)[1])
    views = look()
    assert [address(view) for view in views] == [address_of(tensor) for tensor in tensors.values()]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_views_outlive_the_tensors(framework: str) -> None:
    tensors = {
        "x": made(framework, "I32", (300, 40)) * 1,
        "t": transposed(made(framework, "F32", (300, 40)), 1, 0),
        "none": made(framework, "F32", (0,)),
    }
    expected = [bytes_of(tensor) for tensor in tensors.values()]
    adapter = adapter_for(tensors)
    look = adapter.view(adapter.describe(tensors)[1])
    views = look()
    tensors.clear()
    gc.collect()
    others = [made(framework, "I32", (300, 40), seed) * 1 for seed in range(1, 9)]
    assert [bytes(view) for view in views] == expected
    del others


def test_torch_views_outlive_a_change_of_storage() -> None:
    tensor = made("torch", "F32", (300, 40)).clone()
    expected = bytes_of(tensor)
    look = _torch.ADAPTER.view(_torch.ADAPTER.describe({"x": tensor})[1])
    views = look()
    tensor.data = torch.zeros(2)
    others = [torch.full((300, 40), float(each)) for each in range(8)]
    assert bytes(views[0]) == expected
    del others


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_after_a_copy_nothing_holds_the_buffer(framework: str) -> None:
    base = made(framework, "F32", (60, 70))
    tensors = {"x": base, "t": transposed(base, 1, 0), "w": base[:, 3:]}
    adapter = adapter_for(tensors)
    specs, sources = adapter.describe(tensors)
    layout = Layout.of(specs)
    area = mmap.mmap(-1, layout.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with memoryview(area) as buffer:
        adapter.copy_into(sources, layout, buffer)
    area.close()  # BufferError while anybody looks at it
    assert area.closed


def test_only_mlx_views_stay_as_they_are() -> None:
    assert {name: adapter_named(name).frozen_views for name in FRAMEWORKS} == {
        "numpy": False,
        "torch": False,
        "mlx": True,
    }


# --- the GIL ---


class Recorder:
    """Takes what a memoryview takes, and notes how much at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __getitem__(self, where: slice) -> Recorder:
        return self

    def __setitem__(self, where: slice, source: memoryview) -> None:
        self.sizes.append(len(source))


@pytest.mark.parametrize("nbytes", [0, 5, 1 << 20, (1 << 20) + 1, (5 << 20) + 3])
def test_no_call_copies_more_than_a_megabyte(nbytes: int) -> None:
    recorder: Any = Recorder()
    place(host_memory(nbytes), recorder, 16)
    assert sum(recorder.sizes) == nbytes
    assert max(recorder.sizes) <= 1 << 20


@contextmanager
def hungry_thread() -> Iterator[Callable[[], int]]:
    """A thread that takes the GIL whenever somebody lets it go, and how often it got it.

    With so long a switch interval nobody is asked to let it go: the count stands still for as long as it is held.
    """
    before = sys.getswitchinterval()
    count, started, stop = [0], threading.Event(), threading.Event()

    def take() -> None:
        while not stop.is_set():
            count[0] += 1
            started.set()
            select.select((), (), (), 0)

    thread = threading.Thread(target=take)
    sys.setswitchinterval(1000)
    thread.start()
    try:
        started.wait()
        yield lambda: count[0]
    finally:
        stop.set()
        sys.setswitchinterval(before)
        thread.join()


HELD: dict[str, Callable[[], Any]] = {
    "torch": lambda: made("torch", "BF16", (170, 1000)),
    "torch large": lambda: made("torch", "F32", (1300, 1000)),
    "torch windows": lambda: transposed(made("torch", "BF16", (8, 1, 120, 4, 32)), 0, 2, 1, 3, 4)[:, 3:],
    "torch parameters": lambda: torch.nn.Parameter(made("torch", "F32", (170, 1000))),
    "numpy": lambda: made("numpy", "BF16", (170, 1000)),
    "torch long rows": lambda: made("torch", "U8", (2, 1_200_000))[:, 1:],
    "numpy long rows": lambda: made("numpy", "U8", (2, 1_200_000))[:, 1:],
    "numpy large": lambda: made("numpy", "F32", (1300, 1000)),
    "numpy windows": lambda: transposed(made("numpy", "BF16", (8, 1, 120, 4, 32)), 0, 2, 1, 3, 4)[:, 3:],
    "numpy short rows": lambda: made("numpy", "BF16", (1300, 128))[:, :100],
    "numpy turned": lambda: made("numpy", "F32", (170, 1000)).T,
    "numpy backwards": lambda: made("numpy", "F32", (170, 1000))[::-1, ::-1],
}


@pytest.mark.parametrize("kind", HELD)
def test_describing_and_copying_host_tensors_never_lets_the_gil_go(kind: str) -> None:
    make = HELD[kind]
    tensors = {f"layers.{number}": make() for number in range(48)}
    adapter = adapter_for(tensors)
    layout = Layout.of(adapter.describe(tensors)[0])
    buffer = host_memory(layout.nbytes)
    with hungry_thread() as turns:
        before = turns()
        adapter = adapter_for(tensors)
        adapter.copy_into(adapter.describe(tensors)[1], layout, buffer)
        assert turns() == before
    assert segments(layout, buffer)["layers.47"] == bytes_of(tensors["layers.47"])


def test_the_hungry_thread_sees_a_gil_that_is_let_go() -> None:
    with hungry_thread() as turns:
        before = turns()
        for _ in range(1000):
            np.copyto(np.empty(100_000), np.zeros(100_000))
        assert turns() > before
