"""``drain``: the time until everything is committed. Limit: one write of the same bytes to as many files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import numpy as np

from bench._engines import DiskBackend, disk_backends
from bench._measure import LIMIT, SNAPSTORE, Case, Contender, Figure
from bench._work import KiB, MiB, fresh_folder, fresh_store, numpy_tensors, torch_tensors, write_raw
from snapstore import SnapshotStore
from snapstore._filing import CHUNK_BYTES

LOADS = {
    "64 x 16 MiB": (64, 16 * MiB, 48),
    "512 x 256 KiB": (512, 256 * KiB, 48),
    "8 x 256 MiB": (8, 256 * MiB, 64),
}
QUICK = {"8 x 16 MiB": (8, 16 * MiB, 48), "64 x 256 KiB": (64, 256 * KiB, 48)}
ROOM = {"max_pending_jobs": 1000, "max_pending_bytes": 4096 * MiB, "save_timeout_s": 60}
GOALS = {"64 x 16 MiB": "raw / drain >= 1.0", "512 x 256 KiB": "raw / drain >= 0.8"}


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """Per load the page cache; for the first, each durability."""
    rounds = 3 if quick else 9
    for load, (files, nbytes, count) in (QUICK if quick else LOADS).items():
        with ExitStack() as stack:
            contenders: dict[str, Contender] = {LIMIT: _raw(stack, files, nbytes)}
            for durability in ("none", "data", "full") if load == "64 x 16 MiB" else ("none",):
                contenders[f"{SNAPSTORE}, durability {durability}"] = _drain(
                    stack, files, nbytes, count, durability
                )
            contenders["the calls of one snapshot alone"] = _calls(stack, files, nbytes)
            contenders[f"{SNAPSTORE}, no checksum"] = _drain(
                stack, files, nbytes, count, "none", checksum=False
            )
            contenders["safetensors save_file"] = _save_file(stack, files, torch_tensors(count, nbytes))
            contenders |= {each.name: _put_all(each, files) for each in disk_backends(stack, nbytes)}
            case = Case("drain", load, contenders, rounds, warm_up=1, goal=GOALS.get(load, ""), quick=quick)
            yield case, case.run()


def _raw(stack: ExitStack, files: int, nbytes: int) -> Contender:
    folder = stack.enter_context(fresh_folder())
    buffer = memoryview(np.random.default_rng(0).bytes(nbytes))

    def once() -> float:
        for path in folder.iterdir():
            path.unlink()
        began_s = perf_counter()
        for number in range(files):
            write_raw(folder / str(number), buffer)
        return perf_counter() - began_s

    return once


def _calls(stack: ExitStack, files: int, nbytes: int) -> Contender:
    """What the disk is asked for a snapshot, by a loop that does nothing else: the floor."""
    folder = stack.enter_context(fresh_folder())
    buffer = memoryview(np.random.default_rng(0).bytes(nbytes))
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, place)

    def once() -> float:
        for each in folder.iterdir():
            shutil.rmtree(each)
        (folder / "new").mkdir()
        new = os.open(folder / "new", os.O_RDONLY | os.O_DIRECTORY)
        began_s = perf_counter()
        for number in range(files):
            fd = os.open("file", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=new)
            written = 0
            while written < nbytes:
                written += os.pwrite(fd, buffer[written : written + CHUNK_BYTES], written)
            os.close(fd)
            os.mkdir(str(number), 0o700, dir_fd=place)
            os.rename("file", f"{number}/file", src_dir_fd=new, dst_dir_fd=place)
        took_s = perf_counter() - began_s
        os.close(new)
        return took_s

    return once


def _drain(
    stack: ExitStack, files: int, nbytes: int, count: int, durability: str, *, checksum: bool = True
) -> Contender:
    store = stack.enter_context(fresh_store(durability=durability, checksum=checksum, **ROOM))
    tensors = numpy_tensors(count, nbytes)

    def once() -> float:
        store.cleanup_all(timeout_s=60)
        _await_empty_trash(store)
        began_s = perf_counter()
        for number in range(files):
            store.save(f"request-{number}", 1, tensors, borrow=True)
        store.flush(300)
        return perf_counter() - began_s

    return once


def _await_empty_trash(store: SnapshotStore) -> None:
    from time import sleep

    while store.stats().trash_bytes:
        sleep(0.002)


def _save_file(stack: ExitStack, files: int, tensors: dict[str, Any]) -> Contender:
    import safetensors.torch

    folder = stack.enter_context(fresh_folder())

    def once() -> float:
        for path in folder.iterdir():
            path.unlink()
        began_s = perf_counter()
        for number in range(files):
            safetensors.torch.save_file(tensors, folder / str(number))
        return perf_counter() - began_s

    return once


def _put_all(backend: DiskBackend, files: int) -> Contender:
    """The same page under as many keys, as ours are saves of the same borrowed tensors."""
    page = backend.page()

    def once() -> float:
        backend.forget()
        began_s = perf_counter()
        for number in range(files):
            backend.put(number, page)
        backend.settle()
        return perf_counter() - began_s

    return once
