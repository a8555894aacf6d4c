"""Saves of CUDA tensors on a real device: right bytes in every order, and a host that never waits for it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from gpu_tools import PATIENCE_S, MiB, assert_same, open_store, pinned, sleep, wait_for
from torch_tensors import variety

from snapstore import SaveFailedError, SaveState, SnapshotStore, UnsupportedTensorError
from snapstore._device import Move, StreamCaptureError
from snapstore.adapters._torch_cuda import CudaChannel, CudaDevice, device_at, driver_function

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("borrow", [False, True])
def test_all_dtypes_views_and_modes_come_back_bit_for_bit(store: SnapshotStore, borrow: bool) -> None:
    tensors = variety("cuda")
    store.save("request", 64, tensors, borrow=borrow).result(PATIENCE_S)
    assert_same(store.load("request", 64).tensors, tensors)
    assert_same(store.load("request", 64, device="cuda").tensors, tensors)


def test_saves_in_inference_mode_and_of_its_tensors(store: SnapshotStore) -> None:
    with torch.inference_mode():
        tensors = {"a": torch.randn(1000, device="cuda"), "b": torch.randn(10, 10, device="cuda").T}
        ticket = store.save("inside", 1, tensors)
        ticket.result(PATIENCE_S)
        loaded = store.load("inside", 1, device="cuda").tensors
    store.save("outside", 1, tensors).result(PATIENCE_S)
    loaded["a"].zero_()
    assert_same(store.load("inside", 1).tensors, tensors)
    assert_same(store.load("outside", 1).tensors, tensors)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_saves_under_autocast(store: SnapshotStore, half: torch.dtype) -> None:
    tensors = {
        f"{dtype} {number}": torch.randn(100, device="cuda").to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        for number in range(3)
    }
    with torch.autocast("cuda", dtype=half):
        store.save("request", 1, tensors).result(PATIENCE_S)
        loaded = store.load("request", 1, device="cuda").tensors
    assert_same(loaded, tensors)


def test_host_and_device_tensors_in_one_snapshot(store: SnapshotStore) -> None:
    tensors = {"host": torch.randn(1000), "device": torch.randn(1000, device="cuda"), "end": torch.arange(5)}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    ticket = store.save("request", 1, tensors)
    tensors["host"].zero_(), tensors["device"].zero_()
    ticket.result(PATIENCE_S)
    assert_same(store.load("request", 1).tensors, expected)


def test_a_tensor_whose_memory_is_gone_is_refused_and_the_device_unharmed(store: SnapshotStore) -> None:
    tensor = torch.randn(100, device="cuda")
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedTensorError, match="memory is gone"):
        store.save("request", 1, {"gone": tensor})
    assert store.stats().accepted == 0
    torch.cuda.synchronize()


# -- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8])
def test_two_hundred_saves_each_overwritten_right_after_return_behind_a_long_kernel(
    store: SnapshotStore, count: int
) -> None:
    pinned(store)
    tensors = {f"layer.{number}": torch.empty(32 * 1024, device="cuda") for number in range(count)}
    tickets = []
    for step in range(200):
        sleep(0.002)
        for tensor in tensors.values():
            tensor.fill_(step)
        tickets.append(store.save("request", step, tensors))
        for tensor in tensors.values():
            tensor.fill_(-1)
        if step % 40 == 39:
            torch.cuda.synchronize()
    for ticket in tickets:
        ticket.result(PATIENCE_S)
    wrong = [
        step
        for step in range(200)
        if any((tensor != step).any() for tensor in store.load("request", step).tensors.values())
    ]
    assert not wrong


def test_the_control_an_overwrite_out_of_order_corrupts(store: SnapshotStore) -> None:
    pinned(store)
    other = torch.cuda.Stream()
    tensor = torch.ones(32 * 1024, device="cuda")
    torch.cuda.synchronize()
    sleep(0.3)
    ticket = store.save("request", 1, {"a": tensor})
    with torch.cuda.stream(other):
        tensor.fill_(-1)
    other.synchronize()
    assert not ticket.done()
    ticket.result(PATIENCE_S)
    assert (store.load("request", 1).tensors["a"] == -1).any()


def test_a_producer_behind_a_sleeping_kernel_on_a_stream_of_its_own(store: SnapshotStore) -> None:
    pinned(store)
    stream = torch.cuda.Stream()
    tensor = torch.zeros(4 * MiB, device="cuda")
    torch.cuda.synchronize()
    for borrow in (False, True):
        with torch.cuda.stream(stream):
            sleep(0.3)
            tensor.fill_(7 + borrow)
            ticket = store.save("request", int(borrow), {"a": tensor}, borrow=borrow)
        assert not ticket.done()
        ticket.result(PATIENCE_S)
        assert (store.load("request", int(borrow)).tensors["a"] == 7 + borrow).all()


def test_the_control_a_copy_that_does_not_wait_for_the_producer_is_wrong() -> None:
    tensor = torch.ones(MiB, device="cuda")
    target = memoryview(bytearray(tensor.nbytes))
    torch.cuda.synchronize()
    sleep(0.5)
    blocks = device_at(0).pack([tensor, tensor])

    def copy() -> None:
        channel = device_at(0).open()
        mark = channel.start(None, [Move(blocks[0].data, 0, target)])
        wait_for(lambda: channel.done(mark))

    with ThreadPoolExecutor(1) as copier:
        copier.submit(copy).result()
    torch.cuda.synchronize()
    assert bytes(target) != bytes(tensor.cpu().numpy().tobytes())


def test_saves_of_several_streams_and_threads(store: SnapshotStore) -> None:
    pinned(store)

    def save(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.empty(256 * 1024, device="cuda")
            for step in range(20):
                sleep(0.001)
                tensor.fill_(100 * number + step)
                store.save(f"request-{number}", step, {"a": tensor})
                tensor.fill_(-1)
            torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(4) as savers:
        for each in [savers.submit(save, number) for number in range(4)]:
            each.result()
    assert store.flush(PATIENCE_S)
    for number in range(4):
        for step in range(20):
            assert (store.load(f"request-{number}", step).tensors["a"] == 100 * number + step).all()


def test_lent_tensors_are_released_with_their_event_and_kept_until_then(store: SnapshotStore) -> None:
    pinned(store)
    before = torch.cuda.memory_allocated()
    tensor = torch.full((4 * MiB,), 3.0, device="cuda")
    torch.cuda.synchronize()
    sleep(0.5)
    ticket = store.save("request", 1, {"a": tensor}, borrow=True)
    gone = weakref.ref(tensor)
    del tensor
    assert not ticket.released and not store.drain_request("request", timeout_s=0.05)
    assert torch.cuda.memory_allocated() > before
    assert ticket.wait_released(PATIENCE_S) and store.drain_request("request", timeout_s=PATIENCE_S)
    assert gone() is None and torch.cuda.memory_allocated() == before
    ticket.result(PATIENCE_S)
    assert (store.load("request", 1).tensors["a"] == 3).all()


# -- the host does not wait -----------------------------------------------------------------------------------------


def warm_up(store: SnapshotStore, tensors: dict[str, torch.Tensor], count: int) -> None:
    """Loading a kernel, and more memory for the allocator, may wait for the device; so that is behind us."""
    sleep(0.3)
    tickets = [store.save("warm", step, tensors) for step in range(count)]
    for ticket in tickets:
        ticket.result(PATIENCE_S)
    torch.cuda.synchronize()


@pytest.mark.parametrize("count", [1, 64, 1000])
def test_a_save_behind_a_long_kernel_returns_at_once_and_asks_for_no_synchronisation(
    store: SnapshotStore, count: int
) -> None:
    pinned(store)
    tensors = {f"layer.{number}": torch.randn(4096, device="cuda") for number in range(count)}
    warm_up(store, tensors, 5)
    sleep(2.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        started_s = time.perf_counter()
        tickets = [store.save("request", step, tensors) for step in range(5)]
        took_s = time.perf_counter() - started_s
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert took_s < 0.5, took_s
    assert not any(ticket.done() for ticket in tickets)
    for ticket in tickets:
        ticket.result(PATIENCE_S)


def test_a_load_to_the_device_does_not_wait_for_its_streams(store: SnapshotStore) -> None:
    pinned(store)
    expected = torch.randn(4 * MiB, device="cuda")
    store.save("request", 1, {"a": expected}).result(PATIENCE_S)
    for _ in range(2):
        assert bool((store.load("request", 1, device="cuda").tensors["a"] == expected).all())
    torch.cuda.synchronize()
    sleep(1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        started_s = time.perf_counter()
        loaded = store.load("request", 1, device="cuda:0").tensors["a"]
        total = (loaded == expected).all()
        took_s = time.perf_counter() - started_s
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert took_s < 0.7, took_s
    assert bool(total)


def test_a_thousand_tensors_take_few_launches(store: SnapshotStore) -> None:
    from torch.profiler import ProfilerActivity, profile

    pinned(store)
    tensors = {f"layer.{number}": torch.randn(4096, device="cuda") for number in range(1000)}
    store.save("warm", 1, tensors).result(PATIENCE_S)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        ticket = store.save("request", 1, tensors)
        ticket.result(PATIENCE_S)
        torch.cuda.synchronize()
    names = [event.name for event in recorded.events()]
    launches = sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names)
    copies = sum(name.startswith("cudaMemcpy") for name in names)
    if not launches:
        pytest.skip("the profiler sees no calls of the runtime here")
    assert launches <= 16 and copies <= 4, (launches, copies)


def test_nothing_is_pinned_after_the_first_use(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned(store)
    pins: list[int] = []
    monkeypatch.setattr(CudaDevice, "pin", lambda self, area: pins.append(len(area)))
    before = store.stats()
    for step in range(50):
        tensor = torch.full((1000 * (step + 1),), float(step), device="cuda")
        store.save("request", step, {"a": tensor}).result(PATIENCE_S)
    after = store.stats()
    assert pins == []
    assert (after.pinned_bytes, after.pageable_copies) == (before.pinned_bytes, before.pageable_copies)


@pytest.mark.parametrize("refuse", [False, True])
def test_without_pinned_memory_the_bytes_are_right_too(
    root: Path, monkeypatch: pytest.MonkeyPatch, refuse: bool
) -> None:
    if refuse:

        def pin(self: object, area: memoryview) -> None:
            raise OSError("refused")

        monkeypatch.setattr(CudaDevice, "pin", pin)
    with open_store(root, max_pinned_bytes=256 * MiB if refuse else 0) as store:
        for step in range(10):
            tensor = torch.full((MiB,), float(step), device="cuda")
            store.save("request", step, {"a": tensor})
            tensor.fill_(-1)
        assert store.flush(PATIENCE_S)
        for step in range(10):
            assert (store.load("request", step).tensors["a"] == step).all()
            assert (store.load("request", step, device="cuda").tensors["a"] == step).all()
        assert store.stats().pageable_copies == 10 and store.stats().pinned_bytes == 0


def test_snapshots_larger_than_a_chunk_of_the_slab(store: SnapshotStore) -> None:
    pinned(store)
    before = store.stats().pageable_copies
    tensor = torch.arange(40 * MiB, dtype=torch.int32, device="cuda")
    store.save("request", 1, {"a": tensor, "b": tensor[: 1024 * 7]}).result(PATIENCE_S)
    assert store.stats().pageable_copies == before
    assert_same(store.load("request", 1).tensors, {"a": tensor, "b": tensor[: 1024 * 7]})
    loaded = store.load("request", 1, device="cuda").tensors
    assert bool((loaded["a"] == tensor).all())


def test_the_poll_answers_without_the_interpreter_lock() -> None:
    """While one thread polls as fast as it can, another one that needs the lock goes on."""
    assert driver_function("EventQuery") is not None
    sleep(0.3)
    mark = device_at(0).mark()
    answers: list[bool] = []

    def poll() -> None:
        channel = device_at(0).open()
        while not channel.done(mark):
            answers.append(False)
        answers.append(True)

    thread = threading.Thread(target=poll)
    thread.start()
    steps = 0
    while thread.is_alive():
        steps += 1
    thread.join()
    assert answers[-1] is True and len(answers) > 10 and steps > 10


# -- graphs ---------------------------------------------------------------------------------------------------------


def test_a_save_under_capture_is_refused_and_the_capture_goes_on(store: SnapshotStore) -> None:
    pinned(store)
    tensor = torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.add_(1)
        with pytest.raises(StreamCaptureError, match="capturing"):
            store.save("request", 1, {"a": tensor})
        with pytest.raises(StreamCaptureError, match="capturing"):
            store.load("warm", 0, device="cuda")
    graph.replay()
    store.save("request", 1, {"a": tensor}).result(PATIENCE_S)
    assert (store.load("request", 1).tensors["a"] == 1).all()
    assert store.stats().rejected == 0


def test_graphs_are_captured_while_the_threads_of_the_store_work(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are asked for and polled, and memory is pinned, by threads of the store, during captures of this one.

    In the strictest mode, in which by default a query of an event on any thread spoils the capture.
    """
    begun = threading.Event()
    start, pin = CudaChannel.start, CudaDevice.pin

    def started_then(
        self: CudaChannel, after: torch.cuda.Event | None, moves: Sequence[Move]
    ) -> torch.cuda.Event:
        assert begun.wait(PATIENCE_S)
        return start(self, after, moves)

    def pinned_then(self: CudaDevice, area: memoryview) -> None:
        assert begun.wait(PATIENCE_S)
        pin(self, area)

    monkeypatch.setattr(CudaChannel, "start", started_then)
    monkeypatch.setattr(CudaDevice, "pin", pinned_then)
    counter = torch.zeros(1000, device="cuda")
    source = torch.full((4 * MiB,), 5.0, device="cuda")
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with open_store(root, max_pinned_bytes=1024 * MiB) as store:
        sleep(0.3)
        tickets = [store.save("request", step, {"a": source}) for step in range(20)]
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="global")
            counter.add_(1)
            begun.set()
            wait_for(lambda: all(ticket.state is not SaveState.STAGING for ticket in tickets))
            counter.add_(1)
            graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
        assert (counter == 2).all()
        for step, ticket in enumerate(tickets):
            ticket.result(PATIENCE_S)
            assert (store.load("request", step).tensors["a"] == 5).all()
    del graph


# -- wedge ----------------------------------------------------------------------------------------------------------


def test_a_wedge_fails_its_saves_in_time_hurts_nothing_else_and_ends(root: Path) -> None:
    with open_store(root, device_timeout_s=1.0) as store:
        pinned(store)
        tensor = torch.full((MiB,), 3.0, device="cuda")
        torch.cuda.synchronize()
        sleep(6.0)
        started_s = time.monotonic()
        packed = store.save("packed", 1, {"a": tensor})
        lent = store.save("lent", 1, {"a": tensor}, borrow=True)
        for ticket in (packed, lent):
            error = ticket.exception(PATIENCE_S)
            assert isinstance(error, SaveFailedError) and isinstance(error.__cause__, TimeoutError)
        assert 1.0 <= time.monotonic() - started_s < 2.0
        looked_s = time.perf_counter()
        health, stats = store.health(), store.stats()
        assert time.perf_counter() - looked_s < 0.05
        assert health.status == "stuck" and stats.leaked_bytes >= 4 * tensor.nbytes
        with pytest.raises(SaveFailedError, match="stuck"):
            store.save("more", 1, {"a": tensor})
        assert not lent.released and not store.drain(0.2)
        host = store.save("host", 1, {"a": torch.arange(10)})
        host.result(2.0)
        assert time.monotonic() - started_s < 5.0, "all of this while the device slept"
        assert store.drain(PATIENCE_S) and lent.released
        wait_for(lambda: store.health().status == "ok" and store.stats().leaked_bytes == 0)
        store.save("more", 1, {"a": tensor}).result(PATIENCE_S)
        assert_same(store.load("more", 1).tensors, {"a": tensor})


def test_shutdown_during_a_wedge_ends_in_time_and_keeps_what_is_in_use(root: Path) -> None:
    store = SnapshotStore(root)
    store.save("warm", 0, {"a": torch.zeros(1, device="cuda")}).result(PATIENCE_S)
    before = torch.cuda.memory_allocated()
    tensor = torch.full((MiB,), 3.0, device="cuda")
    torch.cuda.synchronize()
    sleep(4.0)
    store.save("request", 1, {"a": tensor}, borrow=True)
    del tensor
    host = store.save("host", 1, {"a": torch.arange(10)})
    started_s = time.monotonic()
    report = store.shutdown(timeout_s=1.0)
    assert time.monotonic() - started_s < 1.5
    assert not report.clean and report.leaked_bytes > 0 and host.result(0)
    assert torch.cuda.memory_allocated() > before
    torch.cuda.synchronize()
    wait_for(lambda: store.stats().leaked_bytes == 0)
    wait_for(lambda: torch.cuda.memory_allocated() == before)


SCRIPT = """
import os, signal, sys, threading, time
import torch
from snapstore import SaveFailedError, SnapshotStore, StoreOptions
store = SnapshotStore(sys.argv[1], StoreOptions(device_timeout_s=20.0))
tensor = torch.full((1024 * 1024,), 3.0, device="cuda")
store.save("warm", 0, {"a": tensor}).result(30)
"""


def script(root: Path, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + text, str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )


def test_a_poisoned_device_is_lost_and_host_data_is_still_written(root: Path) -> None:
    done = script(
        root,
        """
values, far = torch.zeros(10, device="cuda"), torch.tensor([1 << 20], device="cuda")
values[far - far]                          # its kernel is loaded, and its memory there: that may wait for the device
store.save("warm", 1, {"a": tensor}).result(30)
torch.cuda._sleep(400_000_000)
flying = store.save("flying", 1, {"a": tensor})
values[far]                                # an assertion of that kernel fails: an error that stays
behind = store.save("behind", 1, {"a": tensor})
for ticket in (flying, behind):
    try:
        ticket.result(30)
    except SaveFailedError as error:
        print("failed", type(error.__cause__).__name__)
    else:
        print("written")
host = store.save("host", 1, {"a": torch.arange(4)}).result(30)
health = store.health()
print(health.status, [each.status for each in health.devices])
try:
    store.save("more", 1, {"a": tensor})
except SaveFailedError as error:
    print("refused")
report = store.shutdown(timeout_s=5)
print("ended", report.writer_stopped, os.path.exists(host.path), flush=True)
os._exit(0)
""",
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[-1] == "ended True True", (done.stdout, done.stderr)
    assert lines[-2] == "refused" and lines[-3] == "degraded ['lost']", (done.stdout, done.stderr)
    assert lines[1].startswith("failed"), (done.stdout, done.stderr)


def test_a_process_with_a_wedged_device_ends_its_stores_in_time_at_sigterm(root: Path) -> None:
    done = script(
        root,
        """
import logging
class Said(logging.Handler):
    def emit(self, record):
        print(round(time.monotonic() - signalled_s, 1), record.getMessage(), flush=True)
logging.getLogger("snapstore").addHandler(Said())
logging.getLogger("snapstore").setLevel(logging.INFO)
from snapstore.signals import install_sigterm_handler
cycles = 2_000_000_000
before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
before.record(); torch.cuda._sleep(cycles); after.record(); after.synchronize()
install_sigterm_handler(store, grace_s=3.0, cleanup=False)
torch.cuda._sleep(int(cycles / before.elapsed_time(after) * 8000))
store.save("request", 1, {"a": tensor}, borrow=True)
signalled_s = time.monotonic()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(40)
""",
    )
    ended = [
        line for line in done.stdout.splitlines() if "bytes that a device may still touch are kept" in line
    ]
    assert ended and float(ended[0].partition(" ")[0]) < 3.5, (done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
