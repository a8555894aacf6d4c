"""The store's own code in thousands of orders of its steps; and each planted bug, which these orders must bring out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trust_results
from explored import EVERYTHING, SMALL, name_of, named
from planted import BUGS, CHECKOUT, MORE_BUGS, Bug
from remotes import warm_up

from snapstore.testing import explore, replay

SCHEDULES = 3000
"""By default. `make explore` makes 100,000."""

SEEDS, AT_A_TIME = 4200, 700
"""Of `make explore`, a scenario; so many in one process."""

TO_FIND_A_BUG = 4000

PLANTED = [*BUGS, *MORE_BUGS]


@pytest.mark.parametrize("scenario", EVERYTHING, ids=name_of)
def test_what_was_promised_holds_in_any_order(scenario: Any) -> None:
    assert explore(scenario, range(-(-SCHEDULES // len(EVERYTHING)))) > 0


@pytest.mark.parametrize(
    ("scenario", "schedule"),
    [
        # A stuck device that recovers between the look and the words for it: "the store is shut down", and it was not.
        ("saves from a device", "seed 623"),
    ],
)
def test_a_schedule_that_once_failed(scenario: str, schedule: str) -> None:
    replay(named(scenario), schedule)


@pytest.fixture(scope="module", autouse=True)
def _client() -> None:
    """What its first use opens for good is no test's."""
    warm_up()


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_a_bug_can_still_be_planted(bug: Bug, tmp_path: Path) -> None:
    """The code around it may have been written anew since; it is not to be found out by who looks for the bug."""
    bug.plant(tmp_path)


@pytest.mark.parametrize(
    "bug", [*BUGS, *(pytest.param(bug, marks=pytest.mark.explore) for bug in MORE_BUGS)], ids=str
)
def test_a_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    """And without the bug nothing is wrong with the schedule that brings it out."""
    found = find(bug, tmp_path)
    replay(named(found["scenario"]), found["schedule"])
    sys.stdout.write(
        f"{bug}: found by schedule {found['tried']}: {found['failure'].partition(os.linesep)[0]}"
    )


@pytest.mark.explore
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_schedules(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        exhausted = [
            processes.submit(exploring, name_of(each), "--deviations", "2" if each in SMALL else "1")
            for each in EVERYTHING
        ]
        drawn = [
            processes.submit(exploring, name_of(each), "--seeds", str(first), str(first + AT_A_TIME))
            for each in EVERYTHING
            for first in range(0, SEEDS, AT_A_TIME)
        ]
        planted = [processes.submit(find, bug, tmp_path / str(number)) for number, bug in enumerate(PLANTED)]
    for done in (*exhausted, *drawn):
        assert done.result()["failure"] is None, done.result()["failure"]
    seeded, systematic = (sum(done.result()["tried"] for done in jobs) for jobs in (drawn, exhausted))
    assert seeded + systematic >= 100_000
    trust_results.record(
        "explore",
        "make explore",
        schedules=seeded + systematic,
        by_seed=seeded,
        systematic=systematic,
        scenarios=len(EVERYTHING),
        failures=0,
        planted_bugs=len(PLANTED),
        planted_bugs_found=len(planted),
        schedules_to_find=", ".join(
            f"{bug}: {done.result()['tried']:,}" for bug, done in zip(PLANTED, planted, strict=True)
        ),
        seconds=round(time.monotonic() - started_s),
    )


def find(bug: Bug, folder: Path) -> dict[str, Any]:
    """The schedule that brings it out, and how many it took."""
    bug.plant(folder)
    where = ["--seeds", "0", str(TO_FIND_A_BUG), bug.only] if bug.only else ["--find", str(TO_FIND_A_BUG)]
    found = exploring(*where, package=folder)
    assert found["failure"] is not None, f"{bug} was not found in {found['tried']} schedules"
    return found


def exploring(*arguments: str, package: Path = CHECKOUT) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "tests" / "exploring.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
