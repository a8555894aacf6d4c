"""``soak``: minutes of mixed load; latency, memory, descriptors and trash must stay flat."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, perf_counter

from bench._measure import Case, Figure, percentile
from bench._report import SOAK
from bench._work import KiB, MiB, fresh_store, numpy_tensors
from snapstore import SnapshotNotFoundError, SnapshotStore

SLICES = 10
MINUTES = "SNAPSTORE_SOAK_MINUTES"


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """A case a thing that must stay flat; a contender a tenth of the time, so that a slope is seen."""
    duration_s = 3.0 if quick else 60 * float(os.environ.get(MINUTES, "1"))
    with fresh_store() as store:
        figures = [each for number in range(SLICES) for each in _slice(store, number, duration_s / SLICES)]
    for name in dict.fromkeys(each.case for each in figures):
        yield Case(SOAK, name, {}, 0), [each for each in figures if each.case == name]


def _slice(store: SnapshotStore, number: int, duration_s: float) -> list[Figure]:
    took_s = _load_of(store, number, duration_s)
    label = f"{number + 1}"
    half, high = percentile(took_s, 0.5), percentile(took_s, 0.99)
    latency = Figure(SOAK, "save: median and p99", label, len(took_s), half, high, max(took_s), None)
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return [
        latency,
        Figure.one(SOAK, "resident memory", label, _resident_bytes(), "B"),
        Figure.one(SOAK, "trash", label, store.stats().trash_bytes, "B"),
        Figure.one(SOAK, "descriptors", label, descriptors, "count"),
        Figure.one(SOAK, "threads", label, threading.active_count(), "count"),
    ]


def _load_of(store: SnapshotStore, seed: int, duration_s: float) -> list[float]:
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


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
