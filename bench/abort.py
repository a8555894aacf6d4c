"""``abort``: what a cleanup costs its caller, whatever the writer is doing. Limit: one rename."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from bench._measure import LIMIT, SNAPSTORE, Case, Contender, Figure, Sleeper
from bench._work import KiB, MiB, fresh_folder, fresh_store, numpy_tensors
from snapstore import SnapshotStore

ROOM = {"max_pending_jobs": 4000, "max_pending_bytes": 8192 * MiB, "save_timeout_s": 60}


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """Each situation with ``timeout_s=0`` (marks and returns) and with the default (waits for the sweep)."""
    rounds = 20 if quick else 200
    situations: dict[str, tuple[Callable[..., Contender], int, str]] = {
        "idle, one file of 256 KiB": (_idle, rounds, "0: <= 0.03 ms; default: <= 0.15 ms"),
        "writer busy with 128 MiB of others": (_busy, max(10, rounds // 8), "p99 <= 3 ms"),
        "writer in the middle of 128 MiB of its own": (_mid_item, max(10, rounds // 8), "p99 <= 3 ms"),
        "64 committed files of 16 MiB": (_many, 3, ""),
    }
    if quick:
        del situations["64 committed files of 16 MiB"]
    for name, (situation, times, goal) in situations.items():
        with ExitStack() as stack:
            contenders = {
                LIMIT: _one_rename(stack),
                "to another thread and back": _handed_over(stack),
                f"{SNAPSTORE}, timeout_s=0": situation(stack, 0.0),
                f"{SNAPSTORE}, default time-out": situation(stack, None),
            }
            case = Case("abort", name, contenders, times, goal=goal, quick=quick)
            yield case, case.run()
    requests = 50 if quick else 1000
    with ExitStack() as stack:
        contenders = {
            LIMIT: _renames(stack, requests),
            f"{SNAPSTORE}, timeout_s=0": _everything(stack, requests, 0.0),
            f"{SNAPSTORE}, default time-out": _everything(stack, requests, None),
        }
        name = f"cleanup_all, {requests:,} requests of 4 files"
        case = Case("abort", name, contenders, 3, warm_up=1, goal="<= 5 ms", quick=quick)
        yield case, case.run()


def _renames(stack: ExitStack, count: int) -> Contender:
    """So many directories, one after the other."""
    folder = stack.enter_context(fresh_folder())
    for name in ("here", "there"):
        (folder / name).mkdir()
    for number in range(count):
        (folder / "here" / str(number)).mkdir()
    pairs = [(f"{folder}/here/{number}", f"{folder}/there/{number}") for number in range(count)]
    ways = itertools.cycle([pairs, [(there, here) for here, there in pairs]])

    def once() -> float:
        way = next(ways)
        began_s = perf_counter()
        for source, target in way:
            os.rename(source, target)  # noqa: PTH104 - a Path costs more than the rename
        return perf_counter() - began_s

    return once


def _one_rename(stack: ExitStack) -> Contender:
    folder = stack.enter_context(fresh_folder())
    (folder / "a").mkdir()
    places = itertools.cycle([(folder / "a", folder / "b"), (folder / "b", folder / "a")])

    def once() -> float:
        source, target = next(places)
        began_s = perf_counter()
        source.rename(target)
        return perf_counter() - began_s

    return once


def _handed_over(stack: ExitStack) -> Contender:
    """What waiting for the sweeper costs beside its rename."""
    sleeper = stack.enter_context(Sleeper())

    def once() -> float:
        began_s = perf_counter()
        sleeper.wake()
        sleeper.await_answer()
        return perf_counter() - began_s

    return once


def _abort(store: SnapshotStore, request_id: str, timeout_s: float | None) -> float:
    began_s = perf_counter()
    store.cleanup_request(request_id, timeout_s=timeout_s)
    return perf_counter() - began_s


def _idle(stack: ExitStack, timeout_s: float | None) -> Contender:
    store = stack.enter_context(fresh_store())
    tensors = numpy_tensors(8, 256 * KiB)

    def once() -> float:
        store.save("request", 1, tensors).result(60)
        took_s = _abort(store, "request", timeout_s)
        store.cleanup_request("request", timeout_s=60)
        return took_s

    return once


def _busy(stack: ExitStack, timeout_s: float | None) -> Contender:
    store = stack.enter_context(fresh_store(**ROOM))
    large, small = numpy_tensors(8, 128 * MiB), numpy_tensors(8, 256 * KiB)

    def once() -> float:
        store.save("request", 1, small).result(60)
        ticket = store.save("other", 1, large, borrow=True)
        _until_writing(ticket)
        took_s = _abort(store, "request", timeout_s)
        ticket.result(60)
        return took_s

    return once


def _mid_item(stack: ExitStack, timeout_s: float | None) -> Contender:
    store = stack.enter_context(fresh_store(**ROOM))
    large = numpy_tensors(8, 128 * MiB)

    def once() -> float:
        ticket = store.save("request", 1, large, borrow=True)
        _until_writing(ticket)
        took_s = _abort(store, "request", timeout_s)
        ticket.exception(60)
        store.cleanup_request("request", timeout_s=60)
        return took_s

    return once


def _many(stack: ExitStack, timeout_s: float | None) -> Contender:
    store = stack.enter_context(fresh_store(**ROOM))
    tensors = numpy_tensors(8, 16 * MiB)

    def once() -> float:
        for count in range(64):
            store.save("request", count, tensors, borrow=True)
        store.flush(120)
        took_s = _abort(store, "request", timeout_s)
        _until(lambda: store.stats().trash_bytes == 0)
        return took_s

    return once


def _everything(stack: ExitStack, requests: int, timeout_s: float | None) -> Contender:
    store = stack.enter_context(fresh_store(**ROOM))
    tensors = numpy_tensors(2, 4 * KiB)

    def once() -> float:
        for number in range(requests):
            for count in range(4):
                store.save(f"request-{number}", count, tensors)
        store.flush(120)
        began_s = perf_counter()
        store.cleanup_all(timeout_s=timeout_s)
        took_s = perf_counter() - began_s
        _until(lambda: store.stats().trash_bytes == 0)
        return took_s

    return once


def _until_writing(ticket: Any) -> None:
    _until(lambda: ticket.state.value != "queued")


def _until(predicate: Callable[[], bool]) -> None:
    from time import sleep

    while not predicate():
        sleep(0.0005)
