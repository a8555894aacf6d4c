"""Waits end when they should, whatever happens to the process or to the wall clock meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import roots
from helpers import assert_same, tensors

from snapstore import SnapshotStore, StoreOptions, _paths
from snapstore._threads import Threads
from snapstore.testing import FaultyFileSystem

WAITS = Path(__file__).with_name("waits.py")
"""Not imported: it takes the clock of its process."""

TIMEOUT_S = 1.0
EARLY_S = 0.05

BUSY_S = 0.75
"""What a busy machine may add to what a bare wait took there."""

EXPECTED = {
    "nothing": False,
    "save": "StoreFullError",
    "result": "TimeoutError",
    "exception": "TimeoutError",
    "wait_released": False,
    "drain_request": False,
    "flush": False,
    "detach": "TimeoutError",
    "cleanup_request": False,
    "cleanup_all": False,
    "shutdown": False,
    "a device": "SaveFailedError",
    "await flush": False,
}


@contextmanager
def waiting(root: Path, jump_s: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """A process in which every wait has begun."""
    command = [sys.executable, str(WAITS), str(root), str(TIMEOUT_S), str(jump_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "waiting\n"
            yield process
        finally:
            process.kill()


def outcome_of(process: subprocess.Popen[str], late_s: float) -> None:
    """Each wait came to nothing, in its time."""
    assert process.stdout is not None
    seen = json.loads(process.stdout.readline())
    assert process.wait(60) == 0
    assert {name: outcome for name, (outcome, _) in seen.items()} == EXPECTED
    took_s = {name: took_s for name, (_, took_s) in seen.items()}
    assert min(took_s.values()) >= TIMEOUT_S - EARLY_S, took_s
    assert max(took_s.values()) <= max(TIMEOUT_S + late_s, took_s["nothing"] + BUSY_S), took_s


@pytest.mark.parametrize("pause_s", [0.5, 1.5, pytest.param(5.0, marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_is_late_by_no_more_than_the_pause(root: Path, pause_s: float) -> None:
    with waiting(root) as process:
        time.sleep(TIMEOUT_S / 3)  # into the middle of the waits
        os.kill(process.pid, signal.SIGSTOP)
        try:
            time.sleep(pause_s)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        outcome_of(process, pause_s)


@pytest.mark.parametrize("jump_s", [86_400, -86_400], ids=["forward", "back"])
def test_a_wall_clock_that_jumps_by_a_day_changes_no_wait(root: Path, jump_s: float) -> None:
    with waiting(root, jump_s) as process:
        outcome_of(process, 0.5)


# --- a wall clock that jumps between two looks at it ---

KEEP = StoreOptions(leftovers="keep")
JUMPS = pytest.mark.parametrize("jump_s", [86_400, -86_400], ids=["forward", "back"])


def jump(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)


@JUMPS
def test_a_jump_between_two_stores_makes_no_live_session_a_leftover_and_no_age_negative(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jump_s: float
) -> None:
    with SnapshotStore(root, KEEP) as dead:
        dead.save("dead", 1, roots.tensors(1)).result(10)
    with SnapshotStore(root, KEEP) as live:
        live.save("live", 1, roots.tensors(1)).result(10)
        jump(monkeypatch, jump_s)
        with SnapshotStore(root, StoreOptions(leftovers="adopt")) as store:
            assert_same(store.load("dead", 1), roots.tensors(1))
            assert store.boundaries("live") == ()
            rows = json.loads(roots.run(capsys, "ls", "--json", root).out)["rows"]
            assert [row["owner"] for row in rows if row["snapshots"]] == ["alive", "alive"]
            assert all(row["age_s"] >= 0 for row in rows)
            assert roots.run(capsys, "prune", "--yes", "--older-than", "0s", root).status == 0
            assert store.health().oldest_pending_s >= 0
            store.shutdown(cleanup=True)
        assert_same(live.load("live", 1), roots.tensors(1))
        live.save("live", 2, roots.tensors(2)).result(10)
        assert live.shutdown(cleanup=True).clean


@JUMPS
def test_of_two_sessions_the_one_that_was_opened_later_is_the_newer_whatever_the_clock_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    for content in (1, 2, 3):
        with SnapshotStore(root, KEEP) as store:
            store.save("r", 1, roots.tensors(content)).result(10)
        if content == 1:
            jump(monkeypatch, jump_s)
    with SnapshotStore(root, StoreOptions(leftovers="adopt")) as store:
        assert_same(store.load("r", 1), roots.tensors(3))
        store.shutdown(cleanup=True)


def test_a_name_from_the_far_future_does_not_set_the_clock(root: Path) -> None:
    SnapshotStore(root, KEEP).shutdown(cleanup=True)
    (root / "99991231T235959Z-1-00000000").mkdir()
    with SnapshotStore(root, KEEP) as store:
        opened_at_s = _paths.session_opened_at(store.session.name)
        assert opened_at_s is not None and abs(opened_at_s - time.time()) < 60
        store.shutdown(cleanup=True)


def test_a_wait_of_no_time_is_over_also_where_the_clock_has_not_moved(
    root: Path, files: FaultyFileSystem
) -> None:
    """It ticks now and then only, on some machines."""
    store = SnapshotStore(root, file_system=files, threads=Threads(monotonic_s=lambda: 0.0))
    store.save("request", 1, tensors(1)).result(10)
    with files.pause("create", ".tmp") as gate:
        store.save("request", 2, tensors(2))
        gate.wait_reached()
        with pytest.raises(TimeoutError, match="was not detached"):
            store.detach("request", 1, root.parent / "detached", timeout_s=0)
    assert store.shutdown(cleanup=True).clean
