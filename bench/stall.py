"""``stall``: what the store's calls and threads cost everybody else. Limit: the same without a store."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from bench._measure import LIMIT, SNAPSTORE, Case, Contender, Figure, ticker
from bench._work import MiB, fresh_folder, fresh_store, numpy_tensors, torch_tensors, write_raw


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """The worst gap of a ticking thread while a call works on 256 MiB; the steps of a loop beside a busy store."""
    with ExitStack() as stack:
        case = Case(
            "stall",
            "worst gap of a ticker, 256 MiB",
            _gaps(stack, ("torch",) if quick else ("numpy", "torch")),
            3 if quick else 12,
            warm_up=1,
            goal="<= 10 ms",
            quick=quick,
        )
        yield case, case.run()
    with ExitStack() as stack:
        case = Case(
            "stall",
            "a step of torch (about 5 ms)",
            _steps(stack),
            60 if quick else 400,
            goal="p99 <= 1.05 x limit",
            quick=quick,
        )
        yield case, case.run()


def _gaps(stack: ExitStack, frameworks: Sequence[str]) -> dict[str, Contender]:
    nbytes = 256 * MiB
    contenders: dict[str, Contender] = {LIMIT: _worst_gap(lambda: _sleep(0.1))}
    made = {"numpy": numpy_tensors, "torch": torch_tensors}
    for framework in frameworks:
        tensors = made[framework](64, nbytes)
        store = stack.enter_context(fresh_store(max_pending_bytes=1024 * MiB, save_timeout_s=60))
        store.save("kept", 1, tensors).result(60)

        def save(store: Any = store, tensors: Any = tensors) -> None:
            store.save("request", 1, tensors).result(60)

        def load(store: Any = store) -> None:
            store.load("kept", 1)

        contenders[f"{SNAPSTORE} save and write, {framework}"] = _worst_gap(save)
        contenders[f"{SNAPSTORE} load, {framework}"] = _worst_gap(load)
    return contenders


def _worst_gap(work: Any) -> Contender:
    def once() -> float:
        gaps_s: list[float] = []
        with ticker(gaps_s):
            work()
        return max(gaps_s, default=0.0)

    return once


def _steps(stack: ExitStack) -> dict[str, Contender]:
    import torch

    torch.set_num_threads(1)
    matrix = torch.randn(384, 384)

    def step() -> float:
        began_s = perf_counter()
        for _ in range(3):
            torch.mm(matrix, matrix)
        return perf_counter() - began_s

    store = stack.enter_context(fresh_store(max_pending_bytes=1024 * MiB))
    tensors, numbers = torch_tensors(48, 16 * MiB), itertools.count()

    def busy_step() -> float:
        number = next(numbers)
        store.save(f"request-{number % 4}", 1, tensors)
        took_s = step()
        if number % 4 == 3:
            store.cleanup_request("request-0", timeout_s=0)
        return took_s

    pool = stack.enter_context(ThreadPoolExecutor(1))
    folder = stack.enter_context(fresh_folder())
    buffer, target = bytearray(16 * MiB), bytearray(16 * MiB)

    def beside_a_write() -> float:
        """What the step loses to any thread that brings as many bytes to files, after one memcpy of them."""
        target[:] = buffer
        writing = pool.submit(write_raw, folder / str(next(numbers) % 4), memoryview(target))
        took_s = step()
        writing.result()
        return took_s

    return {
        LIMIT: step,
        f"{SNAPSTORE}, a save of 16 MiB before each": busy_step,
        "a copy of 16 MiB before each, and a raw write of it beside": beside_a_write,
    }


def _sleep(duration_s: float) -> None:
    from time import sleep

    sleep(duration_s)
