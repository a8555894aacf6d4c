"""What the tests on a GPU share: kernels that take as long as a test wants, stores, and a look at the bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from snapstore import SnapshotStore, StoreOptions

MiB = 1024 * 1024
PATIENCE_S = 30.0

_cycles_per_s: list[float] = []


def wake() -> None:
    """Clocks up, first kernels loaded, and the sleeping kernel measured."""
    if _cycles_per_s:
        return
    torch.ones(1, device="cuda").add_(1)
    for _ in range(3):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        torch.cuda._sleep(200_000_000)  # noqa: SLF001
        after.record()
        after.synchronize()
    _cycles_per_s.append(200_000_000 / (before.elapsed_time(after) / 1000))


def sleep(seconds: float) -> None:
    """Keep the current stream busy for about so long. The host goes on at once."""
    torch.cuda._sleep(int(seconds * _cycles_per_s[0]))  # noqa: SLF001


@contextmanager
def open_store(root: Path, **options: Any) -> Iterator[SnapshotStore]:
    """A store that must end clean."""
    own = {"max_pinned_bytes": 256 * MiB, "max_pending_bytes": 2048 * MiB, "device_timeout_s": 30.0}
    store = SnapshotStore(root, StoreOptions(**own | options))
    yield store
    report = store.shutdown(cleanup=True, timeout_s=30)
    assert report.clean, report


def pinned(store: SnapshotStore, nbytes: int = 256 * MiB) -> None:
    """One save, and then wait until the slab is locked."""
    store.save("warm", 0, {"a": torch.zeros(1, device="cuda")}).result(PATIENCE_S)
    wait_for(lambda: store.stats().pinned_bytes == nbytes)


def wait_for(predicate: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.001)


def assert_same(got: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    wrong = [name for name in expected if not same(got[name], expected[name])]
    assert not wrong, wrong


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and torch.equal(raw_bytes(got), raw_bytes(expected))
    )


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
