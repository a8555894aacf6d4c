"""Processes are killed at every operation on the disk, and at random: what a fresh open finds is whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from processes import Processes
from scenarios import ACTIONS, Spot, everything_in, sessions_in, spots_of, wait_until

from snapstore import SnapshotStore, StoreOptions

DISCARD = StoreOptions(leftovers="discard")
ADOPT = StoreOptions(leftovers="adopt")


def prepared_root(processes: Processes, action: str, root: Path) -> None:
    if ACTIONS[action].leftovers:
        child = processes.start("dies_with_snapshots", root=str(root))
        assert child.says().startswith("saved")
        assert child.wait() == 0


def spots(processes: Processes, action: str, root: Path) -> list[Spot]:
    prepared_root(processes, action, root)
    child = processes.start("acts", root=str(root), action=action)
    word, _, calls = child.says().partition(" ")
    assert word == "done", (word, calls)
    child.kill()
    return spots_of(json.loads(calls))


def killed_at(processes: Processes, action: str, root: Path, spot: Spot) -> bool:
    """False: this time it never came to that operation, and was killed at its end."""
    prepared_root(processes, action, root)
    child = processes.start(
        "acts", root=str(root), action=action, operation=spot.operation, skip=spot.skip
    )
    said = child.says()
    assert said == "stopped" or said.startswith("done"), said
    assert child.kill() == -9
    return said == "stopped"


def assert_adoptable(root: Path, action: str) -> None:
    """Whole or not there; what must be there is; and afterwards nothing is left beside the session that has it."""
    may_be = ACTIONS[action].may_be
    store = SnapshotStore(root, ADOPT)
    found = everything_in(store, set(may_be))
    assert all(version in may_be[key] for key, version in found.items()), found
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.save("next", 1, {}).result(10)
    assert store.shutdown(cleanup=True).clean
    assert sessions_in(root) == []


def assert_discardable(root: Path, action: str) -> None:
    store = SnapshotStore(root, DISCARD)
    found = everything_in(store, set(ACTIONS[action].may_be))
    assert all(version is None for version in found.values())
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown(cleanup=True).clean
    assert sessions_in(root) == []


@pytest.mark.parametrize("action", ACTIONS)
def test_a_kill_at_any_operation_leaves_nothing_in_doubt(
    processes: Processes, tmp_path: Path, action: str
) -> None:
    reached = 0
    all_spots = spots(processes, action, tmp_path / "undisturbed")
    for number, spot in enumerate(all_spots):
        root = tmp_path / f"killed-{number}"
        reached += killed_at(processes, action, root, spot)
        copy = tmp_path / f"killed-{number}-copy"
        if root.exists():
            shutil.copytree(root, copy)
        try:
            assert_adoptable(root, action)
            assert_discardable(copy, action)
        except BaseException as error:
            error.args = (f"killed at {spot}: {error}",)
            raise
        shutil.rmtree(root), shutil.rmtree(copy)
    assert reached >= 0.8 * len(all_spots), f"{reached} of {len(all_spots)} operations were reached"
