"""Processes are killed at every operation on the disk, and at random: what a fresh open finds is whole or not there."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import tracing
from actions import (
    ACTIONS,
    CHANGING,
    Key,
    Spot,
    assert_adoptable,
    copied,
    everything_in,
    sessions_in,
    spots_of,
    template_for,
    wait_until,
)
from processes import Processes
from trust_results import record

from snapstore import SnapshotStore, StoreOptions

DISCARD = StoreOptions(leftovers="discard")
ADOPT = StoreOptions(leftovers="adopt")


@pytest.fixture(scope="module")
def figures() -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    yield counted
    record("crash", "make crash", **counted)


def spots(processes: Processes, action: str, root: Path) -> list[Spot]:
    child = processes.start("acts", root=str(root), action=action)
    word, _, calls = child.says().partition(" ")
    assert word == "done", (word, calls)
    child.kill()
    return spots_of(json.loads(calls))


def killed_at(processes: Processes, action: str, root: Path, spot: Spot) -> bool:
    """False: this time it never came to that operation, and was killed at its end."""
    child = processes.start("acts", root=str(root), action=action, operation=spot.operation, skip=spot.skip)
    said = child.says()
    assert said == "stopped" or said.startswith("done"), said
    assert child.kill() == -9
    child.close()
    return said == "stopped"


def assert_discardable(root: Path, action: str) -> None:
    store = SnapshotStore(root, DISCARD)
    found = everything_in(store, set(ACTIONS[action].may_be))
    assert all(version is None for version in found.values())
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown(cleanup=True).clean
    assert sessions_in(root) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.crash)])
def test_a_kill_at_any_operation_leaves_nothing_in_doubt(
    processes: Processes, tmp_path: Path, figures: Counter[str], action: str, every: bool
) -> None:
    """At some of those that change something; or at every one, though many leave what the next one leaves."""
    template = template_for(action, processes, tmp_path / "template")
    found = spots(processes, action, copied(template, tmp_path / "undisturbed"))
    changing = [spot for spot in found if spot.operation in CHANGING]
    chosen = found if every else changing[:: max(1, len(changing) // 20)]
    reached = 0
    for number, spot in enumerate(chosen):
        root, copy = tmp_path / f"{number}", tmp_path / f"{number}-copy"
        reached += killed_at(processes, action, copied(template, root), spot)
        copied(root, copy)
        try:
            assert_adoptable(root, ACTIONS[action].may_be)
            assert_discardable(copy, action)
        except BaseException as error:
            error.args = (f"killed at {spot}: {error}",)
            raise
        shutil.rmtree(root), shutil.rmtree(copy)
    assert reached >= 0.8 * len(chosen), f"{reached} of {len(chosen)} operations were reached"
    figures.update(kills_at_operations=len(chosen))


def after(lines: list[str], before: dict[Key, set[int | None]]) -> dict[Key, set[int | None]]:
    """What may be there after the end of a process that said this."""
    may_be = dict(before)
    for word, request_id, *rest in map(str.split, lines):
        numbers = [int(each) for each in rest]
        own = [key for key in may_be if key[0] == request_id]
        if word == "saving":
            may_be[request_id, numbers[0]] = may_be[request_id, numbers[0]] | {numbers[1]}
        elif word == "committed":
            may_be[request_id, numbers[0]] = {numbers[1]}
        else:
            may_be.update({key: may_be[key] | {None} if word == "cleaning" else {None} for key in own})
    return may_be


Place = tracing.Call | Spot


def places_in(processes: Processes, action: str, template: Path, *, traced: bool) -> list[Place]:
    """Where a process that makes this action can be killed: at each system call, or at each operation of the seam."""
    if not traced:
        return [
            *spots(processes, action, copied(template, template.with_name(f"{template.name}-undisturbed")))
        ]
    found: list[Place] = []
    for thread in tracing.DISK_THREADS[action]:
        root = copied(template, template.with_name(f"{template.name}-{thread}"))
        found += tracing.calls_of(processes, action, thread, root, root.with_suffix(".trace"))
    return found


def kill(processes: Processes, action: str, root: Path, place: Place) -> tuple[bool, list[str]]:
    """Whether it came to that place, and what its user had been told by then."""
    if isinstance(place, Spot):
        return killed_at(processes, action, root, place), []
    said = tracing.killed_at(processes, place, root)
    return "done" not in said, [line for line in said if line != "done"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [100, pytest.param(math.inf, marks=pytest.mark.crash)])
def test_kills_at_system_calls_leave_nothing_in_doubt(
    processes: Processes, tmp_path: Path, figures: Counter[str], kills: float
) -> None:
    """What its user was told is there when another store adopts it; nothing is left when another discards it.

    At some of them, of each action as many; or at every one. Where nobody may trace: at operations of the seam.
    """
    traced = tracing.works()
    made = Counter(kills=0, told=0, late=0)
    there_are = 0
    for action in ACTIONS:
        template = template_for(action, processes, tmp_path / action)
        places = places_in(processes, action, template, traced=traced)
        there_are += len(places)
        for place in places[:: max(1, round(len(places) * len(ACTIONS) / kills))]:
            root, copy = tmp_path / "root", tmp_path / "copy"
            reached, told = kill(processes, action, copied(template, root), place)
            made.update(kills=1, told=len(told), late=not reached)
            copied(root, copy)
            try:
                assert_adoptable(root, after(told, ACTIONS[action].may_be))
                assert_discardable(copy, action)
            except BaseException as error:
                error.args = (f"killed at {place}: {error}",)
                raise
            shutil.rmtree(root), shutil.rmtree(copy)
    assert made["kills"] >= 0.8 * min(kills, 1000), made
    assert made["late"] <= made["kills"] / 20 and made["told"] >= 10 * traced, made
    at = "system_calls" if traced else "operations"
    figures.update({at: there_are, f"kills_at_{at}": made["kills"], "told_before_the_kill": made["told"]})


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.crash)])
def test_kills_at_random_times_under_load_lose_nothing_that_was_committed(
    processes: Processes, tmp_path: Path, figures: Counter[str], kills: int
) -> None:
    """The root goes from hand to hand: each process adopts what was left, and a store here after each kill."""
    random = Random(kills)
    keys = {
        (f"{number}-{request}", count) for number in range(4) for request in range(3) for count in range(3)
    }
    may_be: dict[Key, set[int | None]] = {key: {None} for key in keys}
    root, copy = tmp_path / "root", tmp_path / "copy"
    said: Counter[str] = Counter()
    for number in range(kills):
        child = processes.start("hammers", root=str(root), seed=number)
        assert child.says() == "hammering"
        threading.Event().wait(random.random() * 0.1)
        child.kill()
        lines = child.all_it_said()
        assert not any(line.startswith("error") for line in lines), lines[-1]
        said.update(line.split()[0] for line in lines)
        may_be = after(lines, may_be)
        shutil.copytree(root, copy)
        assert set(opened_and_left(copy, DISCARD, keys).values()) == {None}
        shutil.rmtree(copy)
        found = opened_and_left(root, ADOPT, keys)
        wrong = {key: (found[key], may_be[key]) for key in keys if found[key] not in may_be[key]}
        assert not wrong, wrong
        may_be = {key: {version} for key, version in found.items()}
    assert said["committed"] > kills and said["cleaned"] > kills / 10, f"the load was no load: {said}"
    figures.update(kills_under_load=kills, told_before_the_kill=said["committed"] + said["cleaned"])


def opened_and_left(root: Path, options: StoreOptions, keys: set[Key]) -> dict[Key, int | None]:
    """What a fresh store finds, with nobody else's session beside it in the end."""
    store = SnapshotStore(root, options)
    found = everything_in(store, keys)
    wait_until(lambda: sessions_in(root) == [store.session])
    assert store.shutdown().clean
    return found
