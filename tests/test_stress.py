"""Everything at once for a while; then, at rest, disk, index and counters must agree."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import assert_at_rest, files_below, tensors

from snapstore import (
    SaveCancelledError,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreFullError,
    StoreOptions,
)

REQUESTS = 12
BOUNDARIES = 6


@pytest.mark.parametrize("seconds", [10, pytest.param(120, marks=pytest.mark.soak)])
@pytest.mark.timeout(240)
def test_at_rest_every_file_belongs_to_a_live_entry_and_every_live_entry_has_its_file(
    root: Path, seconds: int
) -> None:
    store = SnapshotStore(root, StoreOptions(max_pending_jobs=16, save_timeout_s=0.05))
    stop = threading.Event()
    saved = loaded = 0

    def repeat(seed: int, step: Callable[[random.Random], int]) -> int:
        dice, done = random.Random(seed), 0
        while not stop.is_set():
            done += step(dice)
        return done

    def save(dice: random.Random) -> int:
        seed = dice.randrange(1 << 30)
        try:
            store.save(
                f"request-{dice.randrange(REQUESTS)}",
                dice.randrange(BOUNDARIES),
                tensors(seed, dice.choice((64, 4096, 1 << 18))),
                metadata={"seed": seed},
            )
        except (StoreFullError, SaveCancelledError):
            return 0
        return 1

    def load(dice: random.Random) -> int:
        try:
            snapshot = store.load(f"request-{dice.randrange(REQUESTS)}", dice.randrange(BOUNDARIES))
        except SnapshotNotFoundError:
            return 0
        expected = tensors(snapshot.metadata["seed"], snapshot.tensors["conv"].nbytes * 2)
        assert snapshot.tensors["conv"].tobytes() == expected["conv"].tobytes()
        return 1

    def clean_one(dice: random.Random) -> int:
        report = store.cleanup_request(
            f"request-{dice.randrange(REQUESTS)}", timeout_s=dice.choice((0, 0.001, 1))
        )
        stop.wait(dice.random() * 0.02)
        return report.removed

    def clean_all(dice: random.Random) -> int:
        stop.wait(dice.random() * 0.4)
        return store.cleanup_all(timeout_s=dice.choice((0, 0.01, 1))).removed

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            steps = [save, save, clean_one, clean_one, clean_all, load]
            running = [pool.submit(repeat, seed, step) for seed, step in enumerate(steps)]
            stop.wait(seconds)
            stop.set()
            done = [each.result(30) for each in running]
    finally:
        sys.setswitchinterval(interval_s)
    saved, loaded = done[0] + done[1], done[5]
    assert saved > 100 and loaded > 10

    assert store.flush(30)
    assert store.cleanup_request("request-0", timeout_s=30).clean
    wait_for_empty_trash(store)
    assert_at_rest(store)
    assert store.stats().cancelled_in_hand == 0
    for number in range(REQUESTS):
        for boundary in store.boundaries(f"request-{number}"):
            assert store.load(f"request-{number}", boundary).source == "disk"
    assert all(
        name.endswith(".safetensors") and not name.startswith(".") for name in files_below(store.session)
    )
    assert store.shutdown(cleanup=True).clean


def wait_for_empty_trash(store: SnapshotStore) -> None:
    deadline_s = time.monotonic() + 30
    while any(name.startswith(".trash") for name in files_below(store.session)):
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)
    assert store.stats().trash_bytes == 0
