"""``scale``: save, cleanup and load against what is alive; memory; a start over leftovers. Limit: the fewest."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from bench._measure import LIMIT, SNAPSTORE, Case, Contender, Figure
from bench._work import KiB, MiB, fresh_store, numpy_tensors
from snapstore import SnapshotStore, StoreOptions
from snapstore.testing import MemoryFileSystem

ROOM = {"max_pending_jobs": 200_000, "max_pending_bytes": 8192 * MiB, "save_timeout_s": 120}
LIVE = ((10, 1), (1_000, 100), (10_000, 1), (10_000, 10_000), (100_000, 10_000))
"""Snapshots alive, and requests that they are of."""


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """Live snapshots and requests, tensors a snapshot, saving threads, memory, leftovers."""
    rounds = 30 if quick else 300
    with ExitStack() as stack:
        stores = {_name(*alive): _grown(stack, *alive) for alive in LIVE[: 2 if quick else len(LIVE)]}
        for verb in ("save", "cleanup_request", "load"):
            contenders = {name: _one(verb, store) for name, store in stores.items()}
            name = f"{verb} against live snapshots"
            case = Case("scale", name, contenders, rounds, goal="<= 1.3 x limit", quick=quick)
            yield case, case.run()
    with ExitStack() as stack:
        contenders = {
            f"{SNAPSTORE} {count:,} tensors": _save_of(stack, count) for count in (1, 48, 200, 2_000)
        }
        case = Case("scale", "save of 256 KiB in so many tensors", contenders, rounds, quick=quick)
        yield case, case.run()
    with ExitStack() as stack:
        contenders = {f"{SNAPSTORE} {count} threads": _threads(stack, count) for count in (1, 2, 4, 8, 16)}
        name = "a save of 256 KiB, from so many threads at once"
        case = Case("scale", name, contenders, max(3, rounds // 30), quick=quick)
        yield case, case.run()
    yield _leftovers(2_000 if quick else 100_000, quick=quick)
    yield _memory(200 if quick else 5_000)


# --- live snapshots ---


def _name(live: int, requests: int) -> str:
    return LIMIT if (live, requests) == LIVE[0] else f"{SNAPSTORE} {live:,} alive of {requests:,}"


def _grown(stack: ExitStack, live: int, requests: int) -> SnapshotStore:
    """A store with so many committed snapshots, on a disk in memory: it is the store that is measured."""
    store = SnapshotStore("/bench/root", StoreOptions(**ROOM), file_system=MemoryFileSystem())  # type: ignore[arg-type]
    stack.callback(store.shutdown, cleanup=True, timeout_s=120)
    tensors = numpy_tensors(1, 64)
    for number in range(live):
        store.save(f"live-{number % requests}", number // requests, tensors)
    store.flush(600)
    return store


def _one(verb: str, store: SnapshotStore) -> Contender:
    tensors = numpy_tensors(8, 16 * KiB)
    store.save("kept", 1, tensors).result(60)
    store.save("request", 1, tensors).result(60)

    def once() -> float:
        if verb == "cleanup_request":
            store.save("request", 1, tensors).result(60)
        began_s = perf_counter()
        ticket: Any = None
        if verb == "save":
            ticket = store.save("request", 1, tensors)
        elif verb == "load":
            store.load("kept", 1)
        else:
            store.cleanup_request("request", timeout_s=0)
        took_s = perf_counter() - began_s
        if ticket is not None:
            ticket.result(60)
        return took_s

    return once


# --- tensors and threads ---


def _save_of(stack: ExitStack, count: int) -> Contender:
    store = stack.enter_context(fresh_store(**ROOM))
    tensors = numpy_tensors(count, 256 * KiB)

    def once() -> float:
        began_s = perf_counter()
        ticket = store.save("request", 1, tensors)
        took_s = perf_counter() - began_s
        ticket.result(60)
        return took_s

    return once


def _threads(stack: ExitStack, count: int) -> Contender:
    """Seconds a save, seen by one thread, while so many save at once."""
    store = stack.enter_context(fresh_store(**ROOM))
    pool = stack.enter_context(ThreadPoolExecutor(count))
    tensors = numpy_tensors(48, 256 * KiB)
    saves = 20

    def work(number: int, start: threading.Barrier) -> float:
        start.wait()
        began_s = perf_counter()
        for boundary in range(saves):
            store.save(f"request-{number}", boundary, tensors)
        return (perf_counter() - began_s) / saves

    def once() -> float:
        start = threading.Barrier(count)
        took_s = max(pool.map(lambda number: work(number, start), range(count)))
        store.flush(120)
        return took_s

    return once


# --- leftovers ---


def _leftovers(count: int, *, quick: bool) -> tuple[Case, list[Figure]]:
    """Opening a root with a dead session of so many snapshots in it. In memory, where they are soon made and gone."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own below it
    with TemporaryDirectory(prefix="snapstore-bench-", dir=memory if memory.is_dir() else None) as folder:
        root = Path(folder) / "root"
        session = Path(_python(_DIES, str(root)))
        for request in range(count // 100):
            digest = hashlib.sha256(str(request).encode()).hexdigest()[:32]
            generation = session / f"{digest}.g{request + 1}"
            generation.mkdir()
            for tokens in range(100):
                os.close(os.open(generation / f"{tokens}.safetensors", os.O_WRONLY | os.O_CREAT, 0o600))
        contenders = {
            LIMIT: lambda: _opening(Path(folder) / "empty"),
            f"{SNAPSTORE} {count:,} leftovers": lambda: _opening(root),
        }
        case = Case("scale", "open a root with leftovers", contenders, 1, warm_up=0, quick=quick)
        return case, case.run()


def _opening(root: Path) -> float:
    began_s = perf_counter()
    store = SnapshotStore(root)
    took_s = perf_counter() - began_s
    store.shutdown(cleanup=True, timeout_s=60)
    return took_s


# --- memory ---


def _memory(live: int) -> tuple[Case, list[Figure]]:
    case = Case("scale", "memory", {}, 1)
    with fresh_store(**ROOM) as store:
        tensors = numpy_tensors(1, 64)
        store.save("first", 1, tensors).result(60)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for number in range(live):
            store.save(f"live-{number // 10}", number % 10, tensors)
        store.flush(600)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    above, pending = map(int, _python(_RESIDENT).split())
    rows = {
        f"{SNAPSTORE}: a live snapshot": (after - before) / live,
        "pending": float(pending),
        "resident above pending, at its peak": float(above),
    }
    return case, [Figure.one("scale", case.name, name, value, "B") for name, value in rows.items()]


def _python(script: str, *arguments: str) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


_DIES = """
import os, sys
from snapstore import SnapshotStore
print(SnapshotStore(sys.argv[1]).session, flush=True)
os._exit(0)
"""
"""Leaves a session behind."""

_RESIDENT = """
import os, re, tempfile
from pathlib import Path
import numpy as np
from snapstore import SnapshotStore, StoreOptions
from snapstore.testing import FaultyFileSystem

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

tensors = {str(i): np.ones(16 * 2**20 // 48, np.uint8) for i in range(48)}
files = FaultyFileSystem()
with tempfile.TemporaryDirectory(prefix="snapstore-bench-", dir=os.environ.get("SNAPSTORE_BENCH_DIR")) as folder:
    store = SnapshotStore(folder + "/root", StoreOptions(), file_system=files)
    store.save("warm", 1, {"small": np.ones(10)}).result(60)
    gate = files.pause("create", ".tmp")
    before = resident()
    for number in range(24):
        store.save("request", number, tensors)
    pending = store.stats().pending_bytes
    gate.open()
    store.flush(60)
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(peak - before - pending, pending)
    store.shutdown(cleanup=True)
"""
"""In a process of its own: 384 MiB pending, then written; its peak above what it was, less what was pending."""
