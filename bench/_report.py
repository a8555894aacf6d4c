"""Figures -> a table for people, JSON for programs, a picture for those who would rather look."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from bench._measure import LIMIT, SNAPSTORE, Figure

STANDARD_OUTPUT = Path("-")


def table(figures: Iterable[Figure], goals: dict[tuple[str, str], str]) -> str:
    """One block a case: each contender's median, p99 and highest, and its ratio to the limit."""
    lines: list[str] = []
    for (workload, case), group in groupby(figures, key=lambda figure: (figure.workload, figure.case)):
        goal = goals.get((workload, case), "")
        lines.append(f"\n{workload}: {case}" + (f"    (goal {goal})" if goal else ""))
        lines.append(f"  {'':34}{'median':>11}{'p99':>11}{'highest':>11}{'x limit':>9}{'rounds':>8}")
        for each in group:
            ratio = "" if each.to_limit is None or each.contender == LIMIT else f"{each.to_limit:.2f}"
            times = "".join(f"{_time(value):>11}" for value in (each.median, each.p99, each.highest))
            lines.append(f"  {each.contender:34}{times}{ratio:>9}{each.rounds:>8}")
    return "\n".join(lines)


def write_json(path: Path, environment: dict[str, str], figures: Sequence[Figure]) -> None:
    """One object: schema, environment, figures in seconds. ``-``: to standard output."""
    content: dict[str, Any] = {
        "schema": 1,
        "environment": environment,
        "figures": [asdict(each) for each in figures],
    }
    text = json.dumps(content, indent=1) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def plot(folder: Path, environment: dict[str, str], figures: Sequence[Figure]) -> list[Path]:
    """One picture a workload: medians as bars with p99 as whiskers, on a logarithmic scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for workload, group in groupby(figures, key=lambda figure: figure.workload):
        rows = list(group)
        height = 0.8 + 0.26 * len(rows)
        chart, axes = plt.subplots(figsize=(10, height))
        labels = [f"{each.case}: {each.contender}" for each in rows]
        spread = [[0.0] * len(rows), [max(0.0, each.p99 - each.median) * 1e3 for each in rows]]
        axes.barh(
            labels, [each.median * 1e3 for each in rows], xerr=spread, color=[_colour(each) for each in rows]
        )
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds: median, whisker to p99")
        axes.set_title(f"{workload} ({environment['machine']})", fontsize=8)
        axes.tick_params(axis="y", labelsize=7)
        chart.tight_layout()
        made.append(folder / f"{workload}.png")
        chart.savefig(made[-1], dpi=110)
        plt.close(chart)
    return made


def _colour(figure: Figure) -> str:
    if figure.contender == LIMIT:
        return "#888888"
    return "#1f77b4" if figure.contender.startswith(SNAPSTORE) else "#d9a441"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
