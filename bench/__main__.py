"""``python -m bench``: named workloads, each beside its own limit and its peers, measured in one run.

python -m bench                       every workload
python -m bench save abort --quick    some, each as short as it still means something
python -m bench --results             every workload; figures, pictures and the page into bench/results/
python -m bench report                a page for each file of figures there, and the README's table, once more
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from bench._goals import fill_in, page
from bench._measure import Figure, environment
from bench._report import STANDARD_OUTPUT, plot, read_json, table, write_json

WORKLOADS = ("save", "drain", "load", "abort", "stall", "scale", "soak", "device", "remote", "fleet")
BY_DEFAULT = WORKLOADS[:-2]
REPORT = "report"
CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "bench" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run workloads and print their tables; the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.workloads) - {*WORKLOADS, REPORT}
    if unknown:
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    if chosen.list:
        print(*(f"{name:10}{_purpose(name)}" for name in WORKLOADS), sep="\n")
        return 0
    if chosen.workloads == [REPORT]:
        _report(RESULTS)
        return 0
    machine = environment()
    with redirect_stdout(sys.stderr if chosen.json == STANDARD_OUTPUT else sys.stdout):
        print(*(f"{name:12}{value}" for name, value in machine.items()), sep="\n")
        figures = [each for name in chosen.workloads or BY_DEFAULT for each in _run(name, quick=chosen.quick)]
        if chosen.plot:
            print(*(f"drawn: {path}" for path in plot(chosen.plot, machine, figures)), sep="\n")
    if chosen.json:
        write_json(chosen.json, machine, figures)
    if chosen.results:
        write_json(RESULTS / "results.json", machine, figures)
        plot(RESULTS, machine, figures)
        _report(RESULTS)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of snapstore.")
    names = f"any of {', '.join(WORKLOADS)}; or {REPORT}"
    parser.add_argument("workloads", nargs="*", help=names)
    parser.add_argument("--list", action="store_true", help="list the workloads and end")
    parser.add_argument("--quick", action="store_true", help="each as short as it still means something")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there too; -: on stdout alone"
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw a picture a workload there")
    parser.add_argument(
        "--results",
        action="store_true",
        help="figures, pictures and page into bench/results/, README's table",
    )
    return parser


def _run(workload: str, *, quick: bool) -> list[Figure]:
    figures: list[Figure] = []
    for case, found in importlib.import_module(f"bench.{workload}").run(quick=quick):
        print(table(found, {(case.workload, case.name): case.goal}), flush=True)
        figures += found
    return figures


def _report(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        written = path.with_suffix(".md")
        written.write_text(page(*read_json(path)) + "\n")
        print(f"written: {written}")
    if fill_in(CHECKOUT / "README.md", *read_json(folder / "results.json")):
        print("written: the figures in README.md")


def _purpose(workload: str) -> str:
    try:
        module = importlib.import_module(f"bench.{workload}")
    except ImportError as error:
        return f"not to be had here: {error}"
    return (module.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
