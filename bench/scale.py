"""``scale``: save, cleanup and load against what is alive already. Limit: the same with the fewest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

from bench._measure import LIMIT, SNAPSTORE, Case, Contender, Figure
from bench._work import KiB, MiB, fresh_store, numpy_tensors
from snapstore import SnapshotStore

ROOM = {"max_pending_jobs": 100_000, "max_pending_bytes": 8192 * MiB, "save_timeout_s": 120}


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """Live snapshots, tensors a snapshot, saving threads."""
    rounds = 30 if quick else 300
    live = (10, 1_000) if quick else (10, 1_000, 10_000, 100_000)
    for verb in ("save", "cleanup_request", "load"):
        with ExitStack() as stack:
            stores = {count: _grown(stack, count) for count in live}
            contenders = {_name(count, live[0]): _one(verb, store) for count, store in stores.items()}
            case = Case("scale", f"{verb} against live snapshots", contenders, rounds, goal="<= 1.3 x limit")
            yield case, case.run()
            if verb == "load":
                break
    tensors = (1, 48, 2_000)
    with ExitStack() as stack:
        contenders = {f"{SNAPSTORE} {count} tensors": _save_of(stack, count) for count in tensors}
        case = Case("scale", "save of 256 KiB in so many tensors", contenders, rounds)
        yield case, case.run()
    with ExitStack() as stack:
        contenders = {f"{SNAPSTORE} {count} threads": _threads(stack, count) for count in (1, 4, 16)}
        case = Case(
            "scale", "a save of 256 KiB, from so many threads at once", contenders, max(3, rounds // 30)
        )
        yield case, case.run()


def _name(count: int, fewest: int) -> str:
    return LIMIT if count == fewest else f"{SNAPSTORE} {count:,} alive"


def _grown(stack: ExitStack, live: int) -> SnapshotStore:
    """A store with so many committed snapshots of as many tenths of requests."""
    store = stack.enter_context(fresh_store(**ROOM))
    tensors = numpy_tensors(1, 64)
    for number in range(live):
        store.save(f"live-{number // 10}", number % 10, tensors)
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
        with _settled(store):
            start = threading.Barrier(count)
            return max(pool.map(lambda number: work(number, start), range(count)))

    return once


@contextmanager
def _settled(store: SnapshotStore) -> Iterator[None]:
    yield
    store.flush(120)
