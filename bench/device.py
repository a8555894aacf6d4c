"""Device tensors on a real GPU: what the caller pays, how much of the bus is used, what a wedge costs the others.

Needs CUDA, about 20 GiB of host memory and as much on the device; writes to ``SNAPSTORE_BENCH_DIR`` (a memory file
system keeps the disk out of it). Ends within five minutes; a part that fails says so, and the others go on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from bench._checkpoint import checkpointer, finished
from bench._decode import jitter
from bench._gpu import (
    PATIENCE_S,
    GiB,
    Measured,
    Sleeper,
    as_case,
    await_staged,
    cuda_tensors,
    settled,
    timed,
    warm_store,
)
from bench._measure import LIMIT, SNAPSTORE, Case
from bench._work import MiB, fresh_folder
from snapstore import SaveFailedError, SnapshotStore

Contenders = dict[str, Callable[[], float]]


def run(*, quick: bool) -> Measured:
    """Each part in turn. Nothing without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        print("device: no CUDA device here, nothing measured")
        return
    print(f"device      {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    sleep = Sleeper()
    parts: dict[str, Callable[[bool], Measured]] = {
        "hot path": partial(_hot_path, sleep),
        "bandwidth": _bandwidth,
        "packing": _packing,
        "to the device": _to_device,
        "side by side": _side_by_side,
        "jitter": jitter,
        "wedge": partial(_wedge, sleep),
    }
    for name, part in parts.items():
        started_s = time.monotonic()
        try:
            yield from part(quick)
        except Exception:  # noqa: BLE001 - said, and the other parts are measured all the same
            print(f"device: {name} failed\n{traceback.format_exc()}", flush=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"  ({name}: {time.monotonic() - started_s:.0f} s)", flush=True)


# -- the hot path ---------------------------------------------------------------------------------------------------


def _hot_path(sleep: Sleeper, quick: bool) -> Measured:
    """One call of ``save`` with 16 MB: GPU idle (the limit), busy, and behind a kernel of five seconds."""
    import torch

    rounds = 10 if quick else 30
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        for _ in range(40):
            torch.mm(matrix, matrix)

    with warm_store(2 * GiB) as store:
        for count in (1, 64, 1000):
            snapshot = cuda_tensors(count, 16_000_000)
            _burst(
                store, snapshot, rounds, partial(sleep, 0.3)
            )  # the allocator learns to have as many at once
            seconds = {
                LIMIT: [_one_save(store, snapshot, lambda: None) for _ in range(rounds)],
                f"{SNAPSTORE}, GPU busy": [_one_save(store, snapshot, work) for _ in range(rounds)],
                f"{SNAPSTORE}, behind a 5 s kernel": _burst(store, snapshot, rounds, partial(sleep, 5.0)),
            }
            yield as_case(f"save(), {count} tensors (limit: GPU idle)", seconds, "does not grow")


def _one_save(store: SnapshotStore, snapshot: dict[str, Any], before: Callable[[], None]) -> float:
    import torch

    torch.cuda.synchronize()
    before()
    took_s, ticket = timed(lambda: store.save("hot", 1, snapshot))
    ticket.result(PATIENCE_S)
    return took_s


def _burst(
    store: SnapshotStore, snapshot: dict[str, Any], rounds: int, before: Callable[[], None]
) -> list[float]:
    """Saves one after another while the stream stands."""
    import torch

    torch.cuda.synchronize()
    before()
    calls = [timed(partial(store.save, "burst", step, snapshot)) for step in range(rounds)]
    for _, ticket in calls:
        ticket.result(PATIENCE_S)
    store.cleanup_request("burst")
    return [took_s for took_s, _ in calls]


# -- bandwidth ------------------------------------------------------------------------------------------------------


def _bandwidth(quick: bool) -> Measured:
    """Until the bytes are on the host, beside a raw copy into pinned memory; several in a row, per snapshot."""
    import torch

    sizes = [1, 16, 64, 256] if quick else [1, 4, 16, 64, 256, 1024, 4096]
    slab = 3 * GiB if quick else 9 * GiB
    with warm_store(slab) as store:
        for mib in sizes:
            count = max(2, min(16, (slab - GiB) // (mib * MiB)))
            source = torch.randn(mib * MiB // 4, device="cuda")
            target = torch.empty(mib * MiB // 4, pin_memory=True)
            pageable = store.stats().pageable_copies
            seconds = _bandwidth_rounds(store, source, target, count, 3 if mib >= 1024 else 7)
            row, raw = (sum(seconds[name]) for name in (f"{SNAPSTORE}, in a row", LIMIT))
            print(
                f"  {mib} MiB: {raw / row:.3f} of the raw copy's {source.nbytes / min(seconds[LIMIT]) / 1e9:.1f} GB/s; "
                f"{store.stats().pageable_copies - pageable} copies were not pinned",
                flush=True,
            )
            goal = "x limit <= 1.05 in a row" if mib >= 64 else ""
            yield as_case(f"device to host, {mib} MiB (limit: raw pinned copy)", seconds, goal)
            del source, target
            torch.cuda.empty_cache()


def _bandwidth_rounds(
    store: SnapshotStore, source: Any, target: Any, count: int, rounds: int
) -> dict[str, list[float]]:
    contenders: Contenders = {
        LIMIT: partial(_raw_copies, source, target, count),
        f"{SNAPSTORE}, in a row": partial(_saves, store, source, count),
        f"{SNAPSTORE}, alone": partial(_saves, store, source, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-1, rounds):
        for name, contender in contenders.items():
            took_s = contender()
            if number >= 0:
                seconds[name].append(took_s)
    return seconds


def _raw_copies(source: Any, target: Any, count: int) -> float:
    def copy() -> None:
        for _ in range(count):
            target.copy_(source, non_blocking=True)

    return settled(copy) / count


def _saves(store: SnapshotStore, source: Any, count: int) -> float:
    """Until the last of them is on the host. Nothing of it is written: they are cancelled then."""
    import torch

    torch.cuda.synchronize()
    started_s = time.perf_counter()
    tickets = [store.save("row", step, {"a": source}) for step in range(count)]
    await_staged(tickets[-1])
    took_s = time.perf_counter() - started_s
    store.cleanup_request("row", timeout_s=0)
    for ticket in tickets:
        ticket.exception(PATIENCE_S)
    return took_s / count


# -- packing --------------------------------------------------------------------------------------------------------


def _packing(quick: bool) -> Measured:
    """Many tensors into one piece of device memory: ``torch.cat`` as ``save`` does, a loop, ``_foreach_copy_``."""
    kib = [(48, 341), (1000, 16)] if quick else [(48, 341), (1000, 16), (64, 4096), (64, 16384)]
    for count, each in kib:
        packers = _packers(count, each * 1024)
        for until, clock in (("done", settled), ("asked for", _asked)):
            contenders = {name: partial(clock, packer) for name, packer in packers.items()}
            case = Case(
                "device", f"pack {count} x {each} KiB, until {until} (limit: one copy)", contenders, 30
            )
            yield case, case.run()


def _asked(act: Callable[[], object]) -> float:
    import torch

    torch.cuda.synchronize()
    took_s, made = timed(act)
    torch.cuda.synchronize()
    del made
    return took_s


def _packers(count: int, each: int) -> dict[str, Callable[[], object]]:
    import torch

    from snapstore.adapters import _torch_cuda

    sources = list(torch.randn(count * each // 2, device="cuda").to(torch.bfloat16).chunk(count))
    whole, device = torch.cat(sources), _torch_cuda.device_at(0)

    def loop() -> object:
        scratch = torch.empty_like(whole)
        for target, source in zip(scratch.chunk(count), sources, strict=True):
            target.copy_(source)
        return scratch

    def foreach(dtype: torch.dtype) -> object:
        scratch = torch.empty_like(whole)
        targets = [part.view(dtype) for part in scratch.chunk(count)]
        torch._foreach_copy_(targets, [source.view(dtype) for source in sources])
        return scratch

    return {
        LIMIT: whole.clone,
        f"{SNAPSTORE}: cat": partial(device.pack, sources),
        "a loop of copy_": loop,
        "_foreach_copy_ as it is": partial(foreach, torch.bfloat16),
        "_foreach_copy_ as int64": partial(foreach, torch.int64),
        "_foreach_copy_ as bytes": partial(foreach, torch.uint8),
    }


# -- the other way --------------------------------------------------------------------------------------------------


def _to_device(quick: bool) -> Measured:
    """``load`` of a file in the page cache until it is on the device; beside a raw copy from pinned memory."""
    import torch

    mib = 64 if quick else 256
    target = torch.empty(mib * MiB // 4, device="cuda")
    source = torch.empty(mib * MiB // 4, pin_memory=True)
    with warm_store(2 * GiB) as store:
        store.save("load", 1, {"a": target}).result(PATIENCE_S)
        contenders: Contenders = {
            LIMIT: partial(settled, lambda: target.copy_(source, non_blocking=True)),
            f"{SNAPSTORE}, load(device='cuda')": partial(
                settled, lambda: store.load("load", 1, device="cuda")
            ),
            f"{SNAPSTORE}, load() and to()": partial(
                settled, lambda: store.load("load", 1).tensors["a"].to("cuda")
            ),
        }
        case = Case("device", f"load, {mib} MiB (limit: raw pinned copy, no disk)", contenders, 10)
        yield case, case.run()


# -- side by side ---------------------------------------------------------------------------------------------------


def _side_by_side(quick: bool) -> Measured:
    """64 tensors: how long the caller is held, and until they are on disk; beside torch's own way and the plain one."""
    from safetensors.torch import save_file

    mib, rounds = (64, 3) if quick else (256, 7)
    snapshot = cuda_tensors(64, mib * MiB)
    held: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    with warm_store(2 * GiB) as store, fresh_folder() as folder, checkpointer() as checkpoint:

        def plain(_: int) -> None:
            save_file({name: each.cpu() for name, each in snapshot.items()}, folder / "plain")

        ways: dict[str, tuple[Callable[[int], Any], Callable[[Any], object]]] = {
            SNAPSTORE: (
                lambda _: store.save("side", 1, snapshot),
                lambda ticket: ticket.result(PATIENCE_S),
            ),
            ".cpu() and save_file": (plain, lambda _: None),
        }
        if checkpoint is not None:
            ways["torch async_save"] = (lambda _: checkpoint(snapshot, folder / "checkpoint"), finished)
        for step in range(rounds + 1):
            for name, (begin, end) in ways.items():
                took = _held_and_whole(partial(begin, step), end)
                if step:
                    held.setdefault(name, []).append(took[0])
                    whole.setdefault(name, []).append(took[1])
    yield as_case(f"the caller is held, {mib} MiB in 64 tensors", held)
    yield as_case(f"until on disk, {mib} MiB in 64 tensors", whole)


def _held_and_whole(begin: Callable[[], Any], end: Callable[[Any], object]) -> tuple[float, float]:
    import torch

    torch.cuda.synchronize()
    started_s = time.perf_counter()
    begun = begin()
    held_s = time.perf_counter() - started_s
    end(begun)
    return held_s, time.perf_counter() - started_s


# -- a wedge --------------------------------------------------------------------------------------------------------


def _wedge(sleep: Sleeper, quick: bool) -> Measured:
    """A kernel of 30 s where the device has 3 s to reach something: what it costs everybody else."""
    import torch

    kernel_s, timeout_s = (6.0, 1.0) if quick else (30.0, 3.0)
    snapshot, host = {"a": torch.randn(4 * MiB, device="cuda")}, {"a": torch.randn(4 * MiB)}
    with warm_store(GiB, device_timeout_s=timeout_s) as store:
        torch.cuda.synchronize()
        ends_s = time.perf_counter() + kernel_s
        sleep(kernel_s)
        called_s, ticket = timed(lambda: store.save("wedged", 1, snapshot, borrow=True))
        failed_s, error = timed(lambda: ticket.exception(PATIENCE_S))
        assert isinstance(error, SaveFailedError), error
        leaked_bytes = store.stats().leaked_bytes
        looks = [timed(store.health)[0] for _ in range(200)]
        refusals = [timed(partial(_refused, store, snapshot))[0] for _ in range(50)]
        drained_s, drained = timed(lambda: store.drain(0.5))
        saves = [timed(lambda: store.save("host", 1, host).result(30))[0] for _ in range(20)]
        assert time.perf_counter() < ends_s, "not all of that happened while the device slept"
        torch.cuda.synchronize()
        recovered_s, _ = timed(partial(_await_ok, store))
        print(
            f"  leaked while stuck {leaked_bytes} bytes, after it {store.stats().leaked_bytes}; drain said {drained}",
            flush=True,
        )
        store.save("again", 1, snapshot).result(PATIENCE_S)
    name = f"a kernel of {kernel_s:.0f} s, and {timeout_s:.0f} s to reach something"
    moments = {
        "save() that will fail": [called_s],
        "until it had failed": [failed_s],
        "drain(0.5) that says no": [drained_s],
        "well again after the kernel": [recovered_s],
    }
    yield as_case(name, moments)
    yield as_case("meanwhile: health()", {SNAPSTORE: looks}, "under 50 ms")
    yield as_case("meanwhile: save() of the stuck device, refused", {SNAPSTORE: refusals})
    yield as_case("meanwhile: 16 MiB from the host until on disk", {SNAPSTORE: saves})


def _refused(store: SnapshotStore, snapshot: dict[str, Any]) -> None:
    try:
        store.save("refused", 1, snapshot)
    except SaveFailedError:
        return
    raise AssertionError("a stuck device took a save")


def _await_ok(store: SnapshotStore) -> None:
    while store.health().status != "ok":
        time.sleep(0.001)
