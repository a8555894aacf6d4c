"""``save``: what a snapshot costs the calling thread. Limit: one memcpy of the bytes into warm memory.

Beside it the same bytes array by array, which is what a copy of tensors costs: each has pages of its own; and what it
costs to wake a thread that waits, which a save does where the writer has nothing to do.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench._engines import DiskBackend, disk_backends
from bench._measure import LIMIT, SNAPSTORE, Case, Contender, Figure, Sleeper, hungry_thread
from bench._peers import disk_cache, mlx_save
from bench._work import KiB, MiB, fresh_folder, fresh_store, mlx_tensors, numpy_tensors, torch_tensors
from snapstore import SnapshotStore

SIZES = {
    "16 MiB in 48": (48, 16 * MiB),
    "256 KiB in 48": (48, 256 * KiB),
    "64 MiB in 64": (64, 64 * MiB),
    "0.8 MiB in 200": (200, 800 * KiB),
}
GOALS = {"16 MiB in 48": "<= 1.10 x limit", "256 KiB in 48": "<= 150 us"}


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """Idle; with the writer busy; beside a thread that hungers for the GIL."""
    rounds = 15 if quick else 100
    for size, (count, nbytes) in SIZES.items():
        if quick and count > 48:
            continue
        with ExitStack() as stack:
            yield _measured(
                Case(
                    "save",
                    f"{size}, idle",
                    _contenders(stack, count, nbytes),
                    rounds,
                    goal=GOALS.get(size, ""),
                    quick=quick,
                )
            )
    for size in ("16 MiB in 48", "256 KiB in 48"):
        with ExitStack() as stack:
            contenders = _ours(stack, *SIZES[size])
            with hungry_thread():
                name = f"{size}, beside a GIL-hungry thread"
                case = Case("save", name, contenders, rounds, goal="<= 3 x idle", quick=quick)
                yield _measured(case)
        with ExitStack() as stack:
            contenders = _ours(stack, *SIZES[size], settle=False)
            yield _measured(Case("save", f"{size}, writer busy", contenders, min(rounds, 24), quick=quick))


def _measured(case: Case) -> tuple[Case, list[Figure]]:
    return case, case.run()


def _contenders(stack: ExitStack, count: int, nbytes: int) -> dict[str, Contender]:
    return {
        **_ours(stack, count, nbytes),
        "array by array": _array_by_array(count, nbytes),
        "waking a thread": _woken(stack),
        **_peers(stack, torch_tensors(count, nbytes)),
        **mlx_save(stack, mlx_tensors(count, nbytes)),
        **disk_cache(stack, numpy_tensors(count, nbytes)),
        **{f"{each.name} in the step": _put(each) for each in disk_backends(stack, nbytes)},
    }


def _array_by_array(count: int, nbytes: int) -> Contender:
    """One memcpy a tensor, and nothing else."""
    arrays = list(numpy_tensors(count, nbytes).values())
    size = arrays[0].nbytes
    target = np.zeros(nbytes, np.uint8)
    places = [(target[i * size : (i + 1) * size], each.view(np.uint8)) for i, each in enumerate(arrays)]

    def copy() -> None:
        for place, source in places:
            np.copyto(place, source)

    return lambda: _timed(copy)


def _woken(stack: ExitStack) -> Contender:
    """What a thread that takes the work over costs its caller, where it has nothing else to do."""
    sleeper = stack.enter_context(Sleeper())

    def once() -> float:
        took_s = _timed(sleeper.wake)
        sleeper.await_answer()
        return took_s

    return once


def _ours(stack: ExitStack, count: int, nbytes: int, *, settle: bool = True) -> dict[str, Contender]:
    source = np.frombuffer(np.random.default_rng(0).bytes(nbytes), np.uint8)
    target = np.zeros(nbytes, np.uint8)
    made = {"numpy": numpy_tensors, "torch": torch_tensors, "mlx": mlx_tensors}
    contenders: dict[str, Contender] = {LIMIT: lambda: _timed(lambda: np.copyto(target, source))}
    for framework, tensors in made.items():
        store = stack.enter_context(fresh_store(max_pending_jobs=1000, max_pending_bytes=4096 * MiB))
        contenders[f"{SNAPSTORE} {framework}"] = _saver(store, tensors(count, nbytes), settle=settle)
        if settle and framework != "mlx":
            again = _saver(store, tensors(count, nbytes), settle=True, after_another=True)
            contenders[f"{SNAPSTORE} {framework}, right after another"] = again
    for framework in ("numpy", "torch"):
        store = stack.enter_context(fresh_store())
        lent = made[framework](count, nbytes)
        contenders[f"{SNAPSTORE} {framework}, borrow"] = _saver(store, lent, borrow=True, settle=True)
    return contenders


def _saver(
    store: SnapshotStore,
    tensors: dict[str, Any],
    *,
    borrow: bool = False,
    settle: bool,
    after_another: bool = False,
) -> Contender:
    """One save, timed; ``settle`` has it committed before the next round begins.

    ``after_another`` was committed just before: the same with warm caches, and a processor that is awake.
    """
    numbers = itertools.count()

    def once() -> float:
        if after_another:
            store.save("before", 1, tensors).result(60)
        number = next(numbers)
        began_s = perf_counter()
        ticket = store.save(f"request-{number % 8}", number // 8 % 8, tensors, borrow=borrow)
        took_s = perf_counter() - began_s
        if settle:
            ticket.result(60)
        return took_s

    return once


def _peers(stack: ExitStack, tensors: dict[str, Any]) -> dict[str, Contender]:
    """What a user would otherwise call in the step."""
    import safetensors.torch
    import torch

    folder = stack.enter_context(fresh_folder())
    pool = stack.enter_context(ThreadPoolExecutor(1))

    def in_executor() -> float:
        began_s = perf_counter()
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        future = pool.submit(safetensors.torch.save_file, copies, folder / "executor")
        took_s = perf_counter() - began_s
        future.result()
        return took_s

    return {
        "safetensors save_file in the step": lambda: _timed(
            lambda: safetensors.torch.save_file(tensors, folder / "save_file")
        ),
        "torch.save in the step": lambda: _timed(lambda: torch.save(tensors, folder / "torch.save")),
        "executor with clones": in_executor,
        **_async_save(stack, folder, tensors),
    }


def _put(backend: DiskBackend) -> Contender:
    """One page: the copy where the backend needs one, and the hand-over; written and removed before the next round."""
    numbers = itertools.count()

    def once() -> float:
        began_s = perf_counter()
        page = backend.page()
        backend.put(next(numbers), page)
        took_s = perf_counter() - began_s
        backend.drop(page)
        backend.settle()
        backend.forget()
        return took_s

    return once


def _async_save(stack: ExitStack, folder: Path, tensors: dict[str, Any]) -> dict[str, Contender]:
    """``torch.distributed.checkpoint.async_save`` in one process."""
    from torch.distributed.checkpoint import state_dict_saver

    stack.enter_context(_quiet())

    def once() -> float:
        began_s = perf_counter()
        future = state_dict_saver.async_save(dict(tensors), checkpoint_id=str(folder / "dcp"), no_dist=True)
        took_s = perf_counter() - began_s
        future.result()  # type: ignore[union-attr]
        return took_s

    return {"torch async_save": once}


@contextmanager
def _quiet() -> Iterator[None]:
    import contextlib
    import logging
    import warnings

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _timed(work: Any) -> float:
    began_s = perf_counter()
    work()
    return perf_counter() - began_s
