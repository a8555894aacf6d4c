"""What of the CUDA side runs without a GPU: which device, how tensors are packed, and that nothing wakes a device."""

from __future__ import annotations

import ast
import ctypes
import pkgutil
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cuda_on_host import CudaOnHost, Event  # noqa: E402
from devices import wait_for  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_tensors import bytes_of, variety  # noqa: E402

from snapstore import SnapshotStore, StoreOptions  # noqa: E402
from snapstore._device import DeviceLostError  # noqa: E402
from snapstore._format import ITEM_BYTES, Layout  # noqa: E402
from snapstore.adapters import _torch_cuda, device_named, devices_of  # noqa: E402
from snapstore.adapters._torch import _DTYPES, ADAPTER  # noqa: E402

CHECKOUT = Path(__file__).resolve().parents[1]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here; tests/gpu looks at it")


class Calls(TorchDispatchMode):
    """What torch was asked to do, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        """Calls that would launch a kernel or a copy on a device."""
        views = {"view", "detach", "_to_copy", "alias", "_unsafe_view", "slice", "reshape"}
        return sum(name not in views for name in self.names)


def packed(tensors: dict[str, torch.Tensor], *, lend: bool = False) -> tuple[bytes, bytes]:
    """What the blocks hold, and what the data part of the file must be."""
    specs, _ = ADAPTER.describe(tensors)
    order = Layout.of(specs).file_order
    in_order = [list(tensors.values())[index] for index in order]
    device = _torch_cuda.CudaDevice(0)
    blocks = device.lend(in_order) if lend else device.pack(in_order)
    assert all(block.data.is_contiguous() and block.data.nbytes == block.nbytes for block in blocks)
    return b"".join(bytes_of(block.data) for block in blocks), b"".join(bytes_of(each) for each in in_order)


@pytest.mark.parametrize("lend", [False, True])
def test_the_bytes_of_all_dtypes_views_and_modes_are_those_of_the_file(lend: bool) -> None:
    got, expected = packed(variety(), lend=lend)
    assert got == expected


def test_every_dtype_of_the_format_is_packed() -> None:
    assert set(_DTYPES) == set(ITEM_BYTES)


def test_packing_in_inference_mode_is_the_same() -> None:
    with torch.inference_mode():
        got, expected = packed(variety())
    assert got == expected


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_packing_under_autocast_is_the_same(half: torch.dtype) -> None:
    """Autocast refuses to join tensors of the other half precision, and widens what it joins."""
    with torch.autocast("cpu", dtype=half):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            got, expected = packed({"one": torch.randn(3).to(dtype), "two": torch.randn(3).to(dtype)})
            assert got == expected


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_what_is_packed_is_no_alias_of_its_source(count: int) -> None:
    tensors = [torch.full((8,), float(number)) for number in range(count)]
    blocks = _torch_cuda.CudaDevice(0).pack(tensors)
    for tensor in tensors:
        tensor.zero_()
    assert torch.cat([block.data.view(-1) for block in blocks]).sum() == 8 * sum(range(count))


def test_a_thousand_tensors_are_one_launch_a_dtype_or_a_width() -> None:
    tensors = {f"wide {number}": torch.randn(8) for number in range(500)}
    tensors |= {f"narrow {number}": torch.randn(8).bfloat16() for number in range(250)}
    tensors |= {f"other {number}": torch.randn(8).half() for number in range(250)}
    with Calls() as calls:
        got, expected = packed_only(tensors)
    assert got == expected
    assert calls.launches == 3, calls.names
    alternating = {
        f"{number}": torch.randn(8).to((torch.half, torch.bfloat16)[number % 2]) for number in range(1000)
    }
    with Calls() as calls:
        got, expected = packed_only(alternating)
    assert got == expected
    assert calls.launches == 1, calls.names


def packed_only(tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    specs, _ = ADAPTER.describe(tensors)
    order = Layout.of(specs).file_order
    blocks = _torch_cuda.CudaDevice(0).pack([list(tensors.values())[index] for index in order])
    return sum(block.nbytes for block in blocks), sum(tensor.nbytes for tensor in tensors.values())


def test_a_run_stays_within_what_cat_can_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_cuda, "_INDEX_MAX", 100)
    runs = list(
        _torch_cuda.runs_of(
            [torch.zeros(40), torch.zeros(40), torch.zeros(40), torch.zeros(300), torch.zeros(5)]
        )
    )
    assert [[each.numel() for each in run] for run in runs] == [[40, 40], [40], [300], [5]]
    got, expected = packed({f"{number}": torch.randn(37) for number in range(20)})
    assert got == expected


@WITHOUT_GPU
def test_host_tensors_are_on_no_device_and_none_is_asked() -> None:
    assert devices_of("torch", {"a": torch.zeros(3), "b": torch.nn.Parameter(torch.zeros(3))}) is None
    assert devices_of("torch", {}) is None
    assert device_named("torch", None) is None and device_named("torch", "cpu") is None
    assert device_named("numpy", "cpu") is None
    with pytest.raises(ValueError, match="no device"):
        device_named("torch", "nonsense")
    assert not torch.cuda.is_initialized()


def test_a_process_that_saves_from_the_host_wakes_no_device(root: Path) -> None:
    script = """
import sys
from snapstore import SnapshotStore
import numpy as np
with SnapshotStore(sys.argv[1]) as store:
    store.save("numpy", 1, {"a": np.zeros(3)}).result(10)
    store.load("numpy", 1), store.health(), store.stats(), store.drain(1)
    assert "torch" not in sys.modules
    import torch
    store.save("torch", 1, {"a": torch.zeros(3)}).result(10)
    store.load("torch", 1, device="cpu"), store.load("numpy", 1, framework="torch")
    assert not torch.cuda.is_initialized()
    import threading
    assert not [each for each in threading.enumerate() if "device" in each.name], threading.enumerate()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


# -- names: what runs without a GPU can not find one that is misspelt -------------------------------------------------

FOR_A_GPU = [
    *(CHECKOUT / "snapstore" / "adapters").glob("_torch*.py"),
    *(CHECKOUT / "tests" / "gpu").glob("*.py"),
    *(CHECKOUT / "bench").glob("*.py"),
]


def names_of_torch(path: Path) -> set[str]:
    """Dotted names that begin with ``torch``, as far as they go without a call; imports too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and (dotted := ast.unparse(node)).startswith("torch."):
            found.add(dotted.partition("(")[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FOR_A_GPU, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_name_of_torch_in_code_for_a_gpu_exists(path: Path) -> None:
    missing = []
    for name in names_of_torch(path):
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError):
            missing.append(name)
    assert not missing


@pytest.mark.parametrize(
    "name", ["EventQuery", "ThreadExchangeStreamCaptureMode", "HostRegister", "HostUnregister"]
)
def test_the_driver_s_functions_are_called_alike_by_both_vendors(name: str) -> None:
    """As torch itself translates them. (``cuda...`` of the runtime is ``cu...`` of the driver.)"""
    tables = runpy.run_module("torch.utils.hipify.cuda_to_hip_mappings")
    translations = {
        key: to for table in tables.values() if isinstance(table, dict) for key, to in table.items()
    }
    found = translations[f"cuda{name}"]
    assert (found if isinstance(found, str) else found[0]) == f"hip{name}"
    assert name in Path(_torch_cuda.__file__).read_text()


def test_the_driver_s_functions_are_there_where_it_is() -> None:
    if _torch_cuda.driver_function("Init") is None:
        pytest.skip("no driver here")
    assert _torch_cuda.driver_function("EventQuery") is not None
    assert _torch_cuda.driver_function("ThreadExchangeStreamCaptureMode") is not None
    assert _torch_cuda.driver_function("NothingOfThisName") is None


@WITHOUT_GPU
def test_a_load_to_a_gpu_that_is_not_there_says_so(root: Path) -> None:
    with SnapshotStore(root) as store:
        store.save("request", 1, {"a": torch.zeros(3)}).result(10)
        with pytest.raises(ValueError, match="no device 'cuda:0' here"):
            store.load("request", 1, device="cuda:0")
        assert not [each for each in threading.enumerate() if "device" in each.name]
        assert store.load("request", 1).tensors["a"].tolist() == [0, 0, 0]


# -- the CUDA device itself, with the host in the place of torch.cuda -------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaOnHost:
    return CudaOnHost(monkeypatch)


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("pinned_bytes", [0, 1024 * 1024])
def test_the_cuda_device_brings_every_kind_of_tensor_there_and_back(
    root: Path, cuda: CudaOnHost, borrow: bool, pinned_bytes: int
) -> None:
    tensors = variety()
    store = SnapshotStore(root, StoreOptions(max_pinned_bytes=pinned_bytes))
    store.save("warm", 0, {"a": torch.zeros(1)}).result(10)
    wait_for(lambda: store.stats().pinned_bytes == pinned_bytes)
    ticket = store.save("request", 64, tensors, borrow=borrow)
    assert ticket.wait_released(10) and ticket.result(10)
    for loaded in (store.load("request", 64).tensors, store.load("request", 64, device="cuda").tensors):
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
            assert bytes_of(loaded[name]) == bytes_of(tensor), name
    assert sum(cuda.pinned.values()) == pinned_bytes
    assert store.stats().pageable_copies == (1 if pinned_bytes else 2)
    report = store.shutdown(cleanup=True)
    assert report.clean and cuda.pinned == {}


def test_a_save_s_copy_waits_on_a_stream_of_its_own_for_the_caller_s(root: Path, cuda: CudaOnHost) -> None:
    with SnapshotStore(root, StoreOptions(max_pinned_bytes=0)) as store:
        store.save("request", 1, {"a": torch.arange(3), "b": torch.arange(3)}).result(10)
    assert cuda.journal == [
        ("record", "the caller's", 1), ("wait", "own 1", 1), ("touch", "own 1", 0), ("record", "own 1", 2)
    ]  # fmt: skip
    assert [stream.priority for stream in cuda.streams] == [-1], "from where an engine takes none"


def test_the_caller_s_stream_waits_for_a_load_and_keeps_its_memory(root: Path, cuda: CudaOnHost) -> None:
    with SnapshotStore(root, StoreOptions(max_pinned_bytes=0)) as store:
        store.save("request", 1, {"a": torch.arange(3)}).result(10)
        cuda.journal.clear()
        store.load("request", 1, device="cuda")
    assert cuda.journal == [
        ("touch", "own 2", 0), ("record", "own 2", 3), ("wait", "the caller's", 3), ("keep", "the caller's", 0)
    ]  # fmt: skip


def asked_of_the_driver(cuda: CudaOnHost, answer: int) -> bool:
    """Whether the channel takes an event for reached, on a thread of its own, as a channel is used."""
    mark = Event(cuda)
    mark.cuda_event = 0x7FFF_1234_5678_9ABC  # a pointer: more than a C int holds

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def query(event: int) -> int:
        assert event == mark.cuda_event
        return answer

    cuda.driver["EventQuery"] = query
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: _torch_cuda.CudaDevice(0).open().done(mark)).result()


def test_an_event_is_reached_when_the_driver_says_so(cuda: CudaOnHost) -> None:
    assert asked_of_the_driver(cuda, 0) is True
    assert asked_of_the_driver(cuda, 600) is False


@pytest.mark.parametrize("code", [700, 710])
def test_any_other_answer_of_the_driver_is_the_loss_of_the_device(cuda: CudaOnHost, code: int) -> None:
    with pytest.raises(DeviceLostError, match=str(code)):
        asked_of_the_driver(cuda, code)


def test_every_thread_of_a_device_lets_graphs_be_captured(root: Path, cuda: CudaOnHost) -> None:
    """Mode 2 is relaxed, in CUDA and in HIP."""
    told: list[tuple[str, int]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))
    def exchange(mode: Any) -> int:
        told.append((threading.current_thread().name, mode[0]))
        mode[0] = 0  # what it was before
        return 0

    cuda.driver["ThreadExchangeStreamCaptureMode"] = exchange
    store = SnapshotStore(root, StoreOptions(max_pinned_bytes=4096))
    store.save("request", 1, {"a": torch.arange(3)}).result(10)
    wait_for(lambda: store.stats().pinned_bytes == 4096)
    assert store.shutdown(cleanup=True).clean
    assert sorted(set(told)) == [
        ("snapstore-device-cpu", 2), ("snapstore-pinner", 2), ("snapstore-unpinner", 2)
    ]  # fmt: skip


def test_a_runtime_that_refuses_to_pin_is_told_of_in_its_own_words(
    root: Path, cuda: CudaOnHost, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuses_to_pin = True
    with SnapshotStore(root, StoreOptions(max_pinned_bytes=4096)) as store:
        store.save("request", 1, {"a": torch.arange(3)}).result(10)
        wait_for(lambda: "not_pinned" in caplog.text)
        assert "cudaHostRegister of 4096 bytes: out of memory (2)" in caplog.text
        assert store.load("request", 1).tensors["a"].tolist() == [0, 1, 2]


def test_a_thread_that_may_spoil_a_capture_says_so(
    root: Path, cuda: CudaOnHost, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.driver["ThreadExchangeStreamCaptureMode"] = lambda mode: 201
    with SnapshotStore(root, StoreOptions(max_pinned_bytes=0)) as store:
        store.save("request", 1, {"a": torch.arange(3)}).result(10)
    assert "the driver says 201" in caplog.text and "snapstore-device-cpu" in caplog.text
