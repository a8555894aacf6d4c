"""Explores in a process of its own, with whatever snapstore stands first on the path; the answer is one line of JSON.

python tests/exploring.py --seeds 1000 2000 "no room"     these seeds of one scenario
python tests/exploring.py --deviations 1 "no room"        all schedules with so many deviations
python tests/exploring.py --find 2000                     of every scenario in turn, until one fails
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from explored import EVERYTHING, name_of, named

from snapstore.testing import ScheduleError, explore, explore_all


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", nargs="?")
    parser.add_argument("--seeds", nargs=2, type=int)
    parser.add_argument("--deviations", type=int)
    parser.add_argument("--find", type=int)
    given = parser.parse_args()
    answer: dict[str, Any] = {"tried": 0, "scenario": given.scenario, "schedule": None, "failure": None}
    try:
        for answer["scenario"], step in steps(given):
            answer["tried"] += step()
    except ScheduleError as error:
        answer |= {"tried": answer["tried"] + error.tried, "schedule": error.found_by, "failure": str(error)}
    json.dump(answer, sys.stdout)


def steps(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], int]]]:
    """Scenarios, each with what explores it and says how many schedules that took."""
    if given.find is not None:
        for number in range(given.find):
            scenario = EVERYTHING[number % len(EVERYTHING)]
            yield name_of(scenario), partial(explore, scenario, [number // len(EVERYTHING)])
    elif given.seeds is not None:
        yield given.scenario, partial(explore, named(given.scenario), range(*given.seeds))
    else:
        yield given.scenario, partial(explore_all, named(given.scenario), deviations=given.deviations)


if __name__ == "__main__":
    main()
