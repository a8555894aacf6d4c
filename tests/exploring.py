"""Explores in a process of its own, with whatever snapstore stands first on the path; the answer is one line of JSON.

python tests/exploring.py --seeds 1000 2000 "no room"     these seeds of one scenario
python tests/exploring.py --deviations 1 "no room"        all schedules with so many deviations
python tests/exploring.py --find 2000                     of every scenario in turn, until one fails
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from explored import EVERYTHING, named

from snapstore.testing import ScheduleError, explore, explore_all


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", nargs="?")
    parser.add_argument("--seeds", nargs=2, type=int)
    parser.add_argument("--deviations", type=int)
    parser.add_argument("--at-most", type=int)
    parser.add_argument("--find", type=int)
    given = parser.parse_args()
    tried = 0
    try:
        for step in steps(given):
            tried += step
    except ScheduleError as error:
        answer: dict[str, Any] = {
            "tried": tried + error.tried,
            "found_by": error.found_by,
            "failure": str(error),
        }
    else:
        answer = {"tried": tried, "failure": None}
    json.dump(answer, sys.stdout)


def steps(given: argparse.Namespace) -> Iterator[int]:
    """How many schedules each step took."""
    if given.find is not None:
        for number in range(given.find):
            yield explore(EVERYTHING[number % len(EVERYTHING)], [number // len(EVERYTHING)])
    elif given.seeds is not None:
        yield explore(named(given.scenario), range(*given.seeds))
    else:
        yield explore_all(named(given.scenario), deviations=given.deviations, at_most=given.at_most)


if __name__ == "__main__":
    main()
