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
import waits

TIMEOUT_S = 1.0
EARLY_S = 0.05

EXPECTED = {
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
    command = [sys.executable, waits.__file__, str(root), str(TIMEOUT_S), str(jump_s)]
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
    assert max(took_s.values()) <= TIMEOUT_S + late_s, took_s


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
