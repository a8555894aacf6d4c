"""``python -m bench``: named workloads, each beside its own limit and its peers, measured in one run.

python -m bench                       every workload
python -m bench save abort --quick    some, each as short as it still means something
python -m bench --json results.json --plot pictures/
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from bench._measure import Figure, environment
from bench._report import STANDARD_OUTPUT, plot, table, write_json

WORKLOADS = ("save", "drain", "load", "abort", "stall", "scale", "soak", "device", "remote")
BY_DEFAULT = ("save", "drain", "load", "abort", "stall", "scale")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run workloads and print their tables; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of snapstore.")
    parser.add_argument("workloads", nargs="*", help=f"any of {', '.join(WORKLOADS)}")
    parser.add_argument("--list", action="store_true", help="list the workloads and end")
    parser.add_argument("--quick", action="store_true", help="each as short as it still means something")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there too; -: on stdout alone"
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw a picture a workload there")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    if chosen.list:
        print(*(f"{name:10}{_purpose(name)}" for name in WORKLOADS), sep="\n")
        return 0
    machine = environment()
    with redirect_stdout(sys.stderr if chosen.json == STANDARD_OUTPUT else sys.stdout):
        print(*(f"{name:12}{value}" for name, value in machine.items()), sep="\n")
        figures = [each for name in chosen.workloads or BY_DEFAULT for each in _run(name, quick=chosen.quick)]
        if chosen.plot:
            print(*(f"drawn: {path}" for path in plot(chosen.plot, machine, figures)), sep="\n")
    if chosen.json:
        write_json(chosen.json, machine, figures)
    return 0


def _run(workload: str, *, quick: bool) -> list[Figure]:
    figures: list[Figure] = []
    for case, found in importlib.import_module(f"bench.{workload}").run(quick=quick):
        print(table(found, {(case.workload, case.name): case.goal}), flush=True)
        figures += found
    return figures


def _purpose(workload: str) -> str:
    try:
        module = importlib.import_module(f"bench.{workload}")
    except ImportError as error:
        return f"not to be had here: {error}"
    return (module.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
