"""What the device workload is made of: a kernel that sleeps, a store that is warm, calls that are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from bench._measure import Case, Figure
from bench._work import MiB, fresh_store
from snapstore import SaveState, SaveTicket, SnapshotStore

GiB = 1024 * MiB
PATIENCE_S = 120.0
_WARM_S = 60.0
_CYCLES = 200_000_000

Measured = Iterator[tuple[Case, list[Figure]]]
T = TypeVar("T")


class Sleeper:
    """A kernel that keeps a stream busy for so many seconds."""

    def __init__(self) -> None:
        import torch

        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(3):
            before.record()
            torch.cuda._sleep(_CYCLES)  # noqa: SLF001
            after.record()
            after.synchronize()
        self._cycles_per_ms = _CYCLES / before.elapsed_time(after)

    def __call__(self, seconds: float) -> None:
        """Ask the current stream for it; the host goes on at once."""
        import torch

        torch.cuda._sleep(int(1000 * seconds * self._cycles_per_ms))  # noqa: SLF001


def as_case(name: str, seconds: Mapping[str, Sequence[float]], goal: str = "") -> tuple[Case, list[Figure]]:
    """What was measured already, as a case."""
    rounds = min(map(len, seconds.values()))
    contenders = {key: iter(values).__next__ for key, values in seconds.items()}
    case = Case("device", name, contenders, rounds, warm_up=0, goal=goal)
    return case, case.run()


def cuda_tensors(count: int, nbytes: int) -> dict[str, Any]:
    """``count`` bfloat16 tensors on the device, ``nbytes`` in all."""
    import torch

    size = nbytes // count // 2
    return {f"layer.{i}": torch.randn(size, device="cuda", dtype=torch.bfloat16) for i in range(count)}


@contextmanager
def warm_store(pinned_bytes: int, **options: Any) -> Iterator[SnapshotStore]:
    """A store whose slab is locked. Without checksums, which are the writer's time and not the device's."""
    own = {
        "max_pinned_bytes": pinned_bytes,
        "max_pending_bytes": pinned_bytes + GiB,
        "checksum": False,
        "device_timeout_s": 60.0,
    }
    with fresh_store(**own | options) as store:
        started_s = time.monotonic()
        store.save("warm", 0, cuda_tensors(1, MiB)).result(PATIENCE_S)
        while store.stats().pinned_bytes < pinned_bytes and time.monotonic() < started_s + _WARM_S:
            time.sleep(0.01)
        pinned, took_s = store.stats().pinned_bytes, time.monotonic() - started_s
        print(f"  {pinned / GiB:.1f} of {pinned_bytes / GiB:.1f} GiB pinned in {took_s:.2f} s", flush=True)
        yield store


def timed(act: Callable[[], T]) -> tuple[float, T]:
    """Seconds of host time, and what came of it."""
    started_s = time.perf_counter()
    made = act()
    return time.perf_counter() - started_s, made


def settled(act: Callable[[], object]) -> float:
    """Seconds until the device has done what ``act`` asked for; what it made is freed outside of them."""
    import torch

    torch.cuda.synchronize()
    started_s = time.perf_counter()
    made = act()
    torch.cuda.synchronize()
    took_s = time.perf_counter() - started_s
    del made
    return took_s


def await_staged(ticket: SaveTicket) -> None:
    """Until the copy has arrived on the host; not for the disk."""
    while ticket.state is SaveState.STAGING:
        time.sleep(20e-6)
