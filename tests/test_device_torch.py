"""What of the CUDA side runs without a GPU: which device, how tensors are packed, and that nothing wakes a device."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from devices import wait_for  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_tensors import bytes_of, variety  # noqa: E402

from snapstore import SnapshotStore, StoreOptions  # noqa: E402
from snapstore._format import ITEM_BYTES, Layout  # noqa: E402
from snapstore.adapters import _torch_cuda, device_named, devices_of  # noqa: E402
from snapstore.adapters._torch import _DTYPES, ADAPTER  # noqa: E402

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


def test_the_driver_is_asked_by_names_that_exist_where_it_does() -> None:
    driver = _torch_cuda.driver_library()
    if driver is None:
        pytest.skip("no driver here")
    library, prefix = driver
    for name in ("EventQuery", "ThreadExchangeStreamCaptureMode"):
        assert getattr(library, prefix + name)


@WITHOUT_GPU
def test_a_load_to_a_gpu_that_is_not_there_says_so(root: Path) -> None:
    with SnapshotStore(root) as store:
        store.save("request", 1, {"a": torch.zeros(3)}).result(10)
        with pytest.raises(ValueError, match="no device 'cuda:0' here"):
            store.load("request", 1, device="cuda:0")
        assert not [each for each in threading.enumerate() if "device" in each.name]
        assert store.load("request", 1).tensors["a"].tolist() == [0, 0, 0]


# -- the CUDA device itself, with the host in the place of torch.cuda -------------------------------------------------


class StandInEvent:
    """Reached at once."""

    def __init__(self) -> None:
        self.recorded = False

    def record(self, stream: object) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.recorded


class StandInStream:
    def __init__(self, index: int = 0) -> None:
        self.waited: list[StandInEvent] = []

    def wait_event(self, event: StandInEvent) -> None:
        assert event.recorded
        self.waited.append(event)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class StandInRuntime:
    """``cudart``, with a note of what is pinned."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert address not in self.pinned and flags == 1
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> StandInRuntime:
    """Every tensor is on "CUDA", which is the host: the calls are real but for torch.cuda's own."""
    runtime, stream = StandInRuntime(), StandInStream()
    device = _torch_cuda.CudaDevice(0)
    device.name = "cpu"
    for name, stand_in in {
        "Event": StandInEvent,
        "Stream": StandInStream,
        "current_stream": lambda index: stream,
        "stream": lambda stream: stream,
        "set_stream": lambda stream: None,
        "set_device": lambda index: None,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "cudart": lambda: runtime,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(_torch_cuda, "driver_library", lambda: None)
    monkeypatch.setattr(_torch_cuda, "devices_of", lambda tensors: [device] * len(tensors) or None)
    monkeypatch.setattr(_torch_cuda, "device_named", lambda name: device)
    return runtime


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("pinned_bytes", [0, 1024 * 1024])
def test_the_cuda_device_brings_every_kind_of_tensor_there_and_back(
    root: Path, runtime: StandInRuntime, borrow: bool, pinned_bytes: int
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
    assert sum(runtime.pinned.values()) == pinned_bytes
    assert store.stats().pageable_copies == (1 if pinned_bytes else 2)
    report = store.shutdown(cleanup=True)
    assert report.clean and runtime.pinned == {}
