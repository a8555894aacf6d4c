"""What can be counted instead of timed: system calls, allocations, releases of the GIL, steps of Python.

A figure here changes only on purpose: each is what makes a goal of the benchmarks hold on any machine.
"""

from __future__ import annotations

import gc
import re
import select
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapstore import SnapshotStore, StoreOptions
from snapstore.testing import FaultyFileSystem, MemoryFileSystem

MiB = 1024 * 1024
STRACE = shutil.which("strace")


@pytest.fixture
def store(root: Path, files: FaultyFileSystem) -> Iterator[SnapshotStore]:
    """With a sweeper that has nothing to do of its own."""
    store = SnapshotStore(root, StoreOptions(leftovers="keep"), file_system=files)
    yield store
    assert store.shutdown(cleanup=True).clean


def arrays(count: int = 48, nbytes: int = 256 * 1024) -> dict[str, Any]:
    return {f"layer.{i}": np.full(nbytes // count // 2, i, np.uint16) for i in range(count)}


def as_torch(tensors: dict[str, Any]) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(array.view(np.int16)) for name, array in tensors.items()}


def as_mlx(tensors: dict[str, Any]) -> dict[str, Any]:
    mx = pytest.importorskip("mlx.core")
    made = {name: mx.array(array) for name, array in tensors.items()}
    mx.eval(made)
    return made


def operations(files: FaultyFileSystem, act: Callable[[], object]) -> list[str]:
    """What was asked of the disk meanwhile, on whatever thread."""
    before = len(files.calls)
    act()
    return [call.operation for call in files.calls[before:]]


# --- system calls ---


def test_a_save_of_one_chunk_is_eight_operations_of_the_writer(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    store.save("request", 1, arrays()).result(30)
    assert operations(files, lambda: store.save("request", 2, arrays()).result(30)) == [
        *("create", "write", "status", "close", "look_for"),
        *("make_directory", "free_bytes", "rename"),
    ]


def test_a_save_of_many_mebibytes_is_a_write_for_every_two(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    store.save("request", 1, arrays(48, 16 * MiB)).result(30)
    asked = Counter(operations(files, lambda: store.save("request", 2, arrays(48, 16 * MiB)).result(30)))
    assert asked["write"] == 8 and asked["reserve"] == 1 and asked.total() == 8 + 8


def test_a_load_is_six_operations(store: SnapshotStore, files: FaultyFileSystem) -> None:
    store.save("request", 1, arrays(48, 4 * MiB)).result(30)
    assert operations(files, lambda: store.load("request", 1)) == [
        *("open_read", "status", "read_into", "read_into", "read_into", "close"),
    ]


def test_an_abort_is_one_rename_whatever_it_has_committed(
    store: SnapshotStore, files: FaultyFileSystem
) -> None:
    for boundary in range(20):
        store.save("request", boundary, arrays(2, 4096))
    assert store.flush(30)
    with files.pause("open_directory") as gate:  # the bytes are freed when nobody waits
        asked = operations(files, lambda: store.cleanup_request("request"))
        gate.wait_reached()
        assert Counter(asked)["rename"] == 1
        assert Counter(asked)["status_at"] == 1, "whether the session is where its name says"
        assert set(asked) <= {"rename", "status_at", "free_bytes", "open_directory"}


@pytest.mark.parametrize("borrow", [False, True])
def test_no_thread_that_saves_looks_or_aborts_touches_the_disk(
    store: SnapshotStore, files: FaultyFileSystem, borrow: bool
) -> None:
    seen: set[str] = set()
    for operation in ("create", "reserve", "write", "rename", "make_directory", "free_bytes", "unlink"):
        files.call(operation, lambda: seen.add(threading.current_thread().name), times=float("inf"))
    store.save("request", 1, arrays(), borrow=borrow)
    store.has("request", 1)
    store.stats()
    store.health()
    assert store.flush(30)
    store.cleanup_request("request")
    assert seen == {"snapstore-writer", "snapstore-sweeper"}


TRACED = """
import os, sys
import numpy as np
from snapstore import SnapshotStore

store = SnapshotStore(sys.argv[1])
tensors = {str(i): np.full(2048, i, np.uint16) for i in range(48)}
for number in range(20):
    store.save("request", number, tensors)
    store.flush()
for act in (
    lambda: store.save("request", 20, tensors),
    lambda: store.save("request", 21, tensors).result(),
    lambda: store.cleanup_request("request", timeout_s=0),
):
    store.flush()
    os.path.lexists("/begin")
    act()
    os.path.lexists("/end")
store.shutdown(cleanup=True)
"""

Calls = list[tuple[bool, str]]
"""Who made it, the main thread or another, and its name."""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> list[Calls]:
    """The system calls of a save, of one until its commit, and of an abort."""
    if STRACE is None:
        pytest.skip("there is no strace here")
    folder = tmp_path_factory.mktemp("traced")
    log = folder / "log"
    command = [STRACE, "-f", "-o", str(log), sys.executable, "-c", TRACED, str(folder / "root")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not log.exists() or "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    found = list(calls_between_marks(log.read_text()))
    assert len(found) == 3
    return found


def test_the_thread_that_saves_or_aborts_makes_no_system_call_that_can_wait_for_a_disk(
    traced: list[Calls],
) -> None:
    save, _, abort = traced
    for calls in (save, abort):
        own = Counter(name for is_main, name in calls if is_main)
        assert set(own) <= {"getpid", "futex"}, own
        assert own.total() <= 8, own


def test_a_save_is_thirteen_calls_on_the_disk_and_no_walk_from_the_root_an_operation(
    traced: list[Calls],
) -> None:
    """Each lets the GIL go, and is a microsecond or two of a thread that shares it."""
    _, save, _ = traced
    made = Counter(name for is_main, name in save if not is_main)
    assert made["openat"] == 3, made  # the file; the root, to look for the session; where it is renamed into
    assert sum(made[name] for name in set(made) - {"futex", "getrandom"}) == 13, made


def calls_between_marks(log: str) -> Iterator[Calls]:
    """What was called between a look of the main thread for ``/begin`` and one for ``/end``."""
    main = log.split(" ", 1)[0]
    calls: Calls | None = None
    for line in log.splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match is None:
            continue
        if '"/begin"' in line:
            calls = []
        elif '"/end"' in line and calls is not None:
            yield calls
            calls = None
        elif calls is not None:
            calls.append((match[1] == main, match[2]))


# --- allocations ---


@pytest.mark.parametrize("borrow", [False, True])
def test_a_warm_save_allocates_no_memory_for_bytes(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, borrow: bool
) -> None:
    tensors = arrays(48, 16 * MiB)
    for boundary in range(3):
        store.save("request", boundary, tensors, borrow=borrow).result(30)
    fresh: list[int] = []
    monkeypatch.setattr("snapstore._memory.allocate", fresh.append)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        ticket = store.save("request", 3, tensors, borrow=borrow)
        _, peak = tracemalloc.get_traced_memory()
        ticket.result(30)
    finally:
        tracemalloc.stop()
    assert fresh == [] and peak - before < 64 * 1024


# --- the GIL ---


@contextmanager
def turns() -> Iterator[Callable[[], int]]:
    """How often another thread got the GIL. Nobody is asked to let it go: the count stands still while it is held."""
    interval_s = sys.getswitchinterval()
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
        sys.setswitchinterval(interval_s)
        thread.join()


KINDS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], bool]] = {
    "numpy": (lambda tensors: tensors, False),
    "numpy, borrow": (lambda tensors: tensors, True),
    "torch": (as_torch, False),
    "torch, borrow": (as_torch, True),
    "mlx": (as_mlx, False),
}


@pytest.mark.parametrize("nbytes", [256 * 1024, 16 * MiB])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_never_lets_the_gil_go(
    store: SnapshotStore, files: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch, kind: str, nbytes: int
) -> None:
    """But for the one ``mx.eval`` of a save of MLX arrays, which is left out here."""
    make, borrow = KINDS[kind]
    tensors = make(arrays(48, nbytes))
    store.save("request", 1, tensors, borrow=borrow).result(30)
    evaluations: list[int] = []
    if kind == "mlx":
        monkeypatch.setattr("mlx.core.eval", lambda each: evaluations.append(len(each)))
    with files.pause("create", ".tmp"):
        store.save("request", 2, tensors, borrow=borrow)  # the writer is in hand and away
        with turns() as taken:
            before = taken()
            store.save("request", 3, tensors, borrow=borrow)
            assert taken() == before
        monkeypatch.undo()
    assert evaluations == ([48, 48] if kind == "mlx" else [])


# --- steps ---


def steps(act: Callable[[], object]) -> int:
    """Functions that the calling thread called meanwhile, of Python and of C."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what it finds is not of this call
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@contextmanager
def grown(requests: int, boundaries: int) -> Iterator[SnapshotStore]:
    """A store in memory with so much alive, and ``victim`` with as many boundaries."""
    options = StoreOptions(max_pending_jobs=100_000)
    with SnapshotStore("/root", options, file_system=MemoryFileSystem()) as store:  # type: ignore[arg-type]
        for name in [*(f"live-{number}" for number in range(requests)), "victim"]:
            for boundary in range(boundaries):
                store.save(name, boundary, arrays(2, 64))
        assert store.flush(60)
        yield store


CALLS: dict[str, Callable[[SnapshotStore], object]] = {
    "save": lambda store: store.save("new", 1, arrays(2, 64)),
    "load": lambda store: store.load("live-0", 0),
    "has": lambda store: store.has("victim", 0),
    "stats": lambda store: store.stats(),
    "cleanup": lambda store: store.cleanup_request("victim", timeout_s=0),
}


def test_no_call_takes_more_steps_the_more_is_alive() -> None:
    counted = {}
    for size in ((2, 1), (300, 1), (2, 300)):
        with grown(*size) as store:
            for act in CALLS.values():  # once, so that nothing is remembered for the first time
                act(store)
            store.save("victim", 0, arrays(2, 64))
            for boundary in range(size[1]):
                store.save("victim", boundary, arrays(2, 64))
            assert store.flush(60)
            counted[size] = {name: steps(lambda act=act: act(store)) for name, act in CALLS.items()}  # type: ignore[misc]
    few = counted[2, 1]
    for many in counted.values():  # whether another thread waits at that moment makes a step or two
        assert all(abs(many[name] - few[name]) <= 8 for name in CALLS), (few, many)
    assert few["save"] < 200 and few["cleanup"] < 150
