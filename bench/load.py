"""``load``: from memory while pending, from a warm and from a cold disk.

Limits: one memcpy into warm memory; one ``preadv`` into a kept buffer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench._engines import DiskBackend, disk_backends
from bench._measure import LIMIT, SNAPSTORE, Case, Contender, Figure
from bench._work import KiB, MiB, fresh_store, mlx_tensors, numpy_tensors, torch_tensors
from snapstore import SnapshotStore
from snapstore._memory import allocate
from snapstore.testing import FaultyFileSystem

SIZES = {"64 MiB in 64": (64, 64 * MiB), "16 MiB in 48": (48, 16 * MiB), "256 KiB in 48": (48, 256 * KiB)}
FRAMEWORKS = {"numpy": numpy_tensors, "torch": torch_tensors, "mlx": mlx_tensors}


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """Per size: pending, warm, and cold where the page cache can be told to forget a file."""
    rounds = 9 if quick else 40
    for size, (count, nbytes) in SIZES.items():
        if quick and nbytes > 16 * MiB:
            continue
        with ExitStack() as stack:
            case = Case(
                "load",
                f"{size}, warm disk",
                _from_disk(stack, count, nbytes),
                rounds,
                goal="<= 1.3 x limit",
                quick=quick,
            )
            yield case, case.run()
        with ExitStack() as stack:
            contenders = _from_disk(stack, count, nbytes, cold=True)
            case = Case("load", f"{size}, cold disk", contenders, max(3, rounds // 4), warm_up=1, quick=quick)
            yield case, case.run()
        with ExitStack() as stack:
            case = Case(
                "load",
                f"{size}, pending",
                _from_memory(stack, count, nbytes),
                rounds,
                goal="<= 1.1 x limit",
                quick=quick,
            )
            yield case, case.run()


def _from_disk(stack: ExitStack, count: int, nbytes: int, *, cold: bool = False) -> dict[str, Contender]:
    import safetensors.torch

    contenders: dict[str, Contender] = {}
    kept = allocate(nbytes + 64 * KiB)
    path = Path()
    for framework, tensors in FRAMEWORKS.items():
        store = stack.enter_context(fresh_store())
        path = store.save("request", 1, tensors(count, nbytes)).result(60).path
        contenders[f"{SNAPSTORE} {framework}"] = _timed(
            lambda store=store: store.load("request", 1), path, cold=cold
        )
    store = stack.enter_context(fresh_store(verify_on_load=False))
    unverified = store.save("request", 1, numpy_tensors(count, nbytes)).result(60).path
    contenders[f"{SNAPSTORE} numpy, not verified"] = _timed(
        lambda: store.load("request", 1), unverified, cold=cold
    )
    limit = _timed(lambda: _read_raw(path, kept), path, cold=cold)
    peer = _timed(lambda: safetensors.torch.load_file(path), path, cold=cold)
    engines = {each.name: _get(each, cold=cold) for each in disk_backends(stack, nbytes)}
    return {LIMIT: limit, **contenders, "safetensors load_file (an mmap)": peer, **engines}


def _get(backend: DiskBackend, *, cold: bool) -> Contender:
    page = backend.page()
    backend.put(0, page)
    backend.settle()
    backend.drop(page)
    (path,) = backend.folder.iterdir()

    def work() -> None:
        backend.drop(backend.get(0))

    return _timed(work, path, cold=cold)


def _from_memory(stack: ExitStack, count: int, nbytes: int) -> dict[str, Contender]:
    source = np.frombuffer(np.random.default_rng(0).bytes(nbytes), np.uint8)
    target = np.zeros(nbytes, np.uint8)
    contenders: dict[str, Contender] = {LIMIT: _timed(lambda: np.copyto(target, source))}
    for framework, tensors in FRAMEWORKS.items():
        files = FaultyFileSystem()
        gate = files.pause("create", ".tmp")
        folder = stack.enter_context(_folder())
        store = SnapshotStore(folder / "root", file_system=files)
        stack.callback(store.shutdown, cleanup=True)
        stack.callback(gate.open)
        store.save("request", 1, tensors(count, nbytes))
        contenders[f"{SNAPSTORE} {framework}"] = _timed(lambda store=store: store.load("request", 1))
    return contenders


def _folder() -> Any:
    from bench._work import fresh_folder

    return fresh_folder()


def _timed(work: Any, path: Path | None = None, *, cold: bool = False) -> Contender:
    def once() -> float:
        if cold and path is not None:
            _forget(path)
        began_s = perf_counter()
        kept = work()
        took_s = perf_counter() - began_s
        del kept
        return took_s

    return once


def _read_raw(path: Path, buffer: memoryview) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        while os.preadv(fd, [buffer], 0) < 0:
            pass
    finally:
        os.close(fd)


def _forget(path: Path) -> None:
    """Have the kernel write the file out and drop it from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
