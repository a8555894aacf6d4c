"""``soak``: minutes of mixed load; latency, memory, descriptors and trash must stay flat."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, perf_counter

from bench._measure import SNAPSTORE, Case, Figure, percentile
from bench._work import KiB, MiB, fresh_store, numpy_tensors
from snapstore import SnapshotNotFoundError, SnapshotStore

SLICES = 10


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """One case; a contender a tenth of the time, so that a slope is seen."""
    duration_s = 20.0 if quick else 600.0
    with fresh_store() as store:
        case = Case("soak", f"save, {duration_s:.0f} s of save, load and cleanup", {}, 0)
        figures = [
            _figure(case, number, _slice(store, number, duration_s / SLICES), store)
            for number in range(SLICES)
        ]
        yield case, figures


def _slice(store: SnapshotStore, seed: int, duration_s: float) -> list[float]:
    dice, took_s, end_s = random.Random(seed), list[float](), monotonic() + duration_s  # noqa: S311 - load, not secrets
    sizes = [numpy_tensors(8, size) for size in (4 * KiB, 256 * KiB, 4 * MiB)]
    while monotonic() < end_s:
        request = f"request-{dice.randrange(32)}"
        began_s = perf_counter()
        store.save(request, dice.randrange(8), dice.choice(sizes))
        took_s.append(perf_counter() - began_s)
        if dice.random() < 0.3:
            _load(store, f"request-{dice.randrange(32)}", dice.randrange(8))
        if dice.random() < 0.1:
            store.cleanup_request(f"request-{dice.randrange(32)}", timeout_s=0)
    return took_s


def _load(store: SnapshotStore, request: str, boundary: int) -> None:
    try:
        store.load(request, boundary)
    except SnapshotNotFoundError:
        return


def _figure(case: Case, number: int, took_s: list[float], store: SnapshotStore) -> Figure:
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    trash_mib = store.stats().trash_bytes // MiB
    seen = (
        f"{_resident_mib()} MiB, {descriptors} fds, {threading.active_count()} threads, {trash_mib} MiB trash"
    )
    half, high = percentile(took_s, 0.5), percentile(took_s, 0.99)
    return Figure(
        case.workload, case.name, f"{SNAPSTORE} {number}: {seen}", len(took_s), half, high, max(took_s), None
    )


def _resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") // MiB
