"""Figures -> a table for people, JSON for programs, pictures for those who would rather look."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from bench._measure import LIMIT, SNAPSTORE, Figure, Unit

STANDARD_OUTPUT = Path("-")
SOAK = "soak"


def cases(figures: Iterable[Figure]) -> Iterable[tuple[str, str, list[Figure]]]:
    """Workload, case and its contenders."""
    for (workload, case), group in groupby(figures, key=lambda figure: (figure.workload, figure.case)):
        yield workload, case, list(group)


def to_ours(rows: Sequence[Figure]) -> list[str]:
    """Each contender's median over that of the case's first snapstore; what it is a peer of."""
    ours = next((each for each in rows if each.contender.startswith(SNAPSTORE)), None)
    if ours is None or not ours.median or ours.unit != "s":
        return [""] * len(rows)
    return ["" if each is ours else f"{each.median / ours.median:.2f}" for each in rows]


def table(figures: Iterable[Figure], goals: dict[tuple[str, str], str]) -> str:
    """One block a case: each contender's median, p99 and highest, its ratio to the limit and to the first snapstore."""
    lines: list[str] = []
    for workload, case, rows in cases(figures):
        goal = goals.get((workload, case), "")
        lines.append(f"\n{workload}: {case}" + (f"    (goal {goal})" if goal else ""))
        titles = ("median", "p99", "highest", "x limit", "x ours", "rounds")
        lines.append(f"  {'':42}" + "".join(f"{title:>11}" for title in titles))
        for each, ratio in zip(rows, to_ours(rows), strict=True):
            values = [shown(value, each.unit) for value in (each.median, each.p99, each.highest)]
            cells = [*values, to_limit(each), ratio, str(each.rounds)]
            lines.append(f"  {each.contender:42}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def to_limit(figure: Figure) -> str:
    return "" if figure.to_limit is None or figure.contender == LIMIT else f"{figure.to_limit:.2f}"


def shown(value: float, unit: Unit = "s") -> str:
    """A value with its unit, in three digits or so."""
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "B":
        return f"{value / 2**20:.1f} MiB" if abs(value) >= 2**20 else f"{value:,.0f} B"
    if value < 1e-3:
        return f"{value * 1e6:.1f} us"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def write_json(path: Path, environment: dict[str, str], figures: Sequence[Figure]) -> None:
    """One object: schema, environment, figures. ``-``: to standard output."""
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


def read_json(path: Path) -> tuple[dict[str, str], list[Figure]]:
    """What ``write_json`` wrote."""
    content = json.loads(path.read_text())
    return content["environment"], [Figure(**each) for each in content["figures"]]


def plot(folder: Path, environment: dict[str, str], figures: Sequence[Figure]) -> list[Path]:
    """One picture a workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for workload, group in groupby(figures, key=lambda figure: figure.workload):
        chart = (_slopes if workload == SOAK else _bars)(plt, workload, environment, list(group))
        chart.tight_layout()
        made.append(folder / f"{workload}.png")
        chart.savefig(made[-1], dpi=110)
        plt.close(chart)
    return made


def _bars(plt: Any, workload: str, environment: dict[str, str], figures: Sequence[Figure]) -> Any:
    """Medians as bars with p99 as whiskers, on a logarithmic scale."""
    rows = [each for each in figures if each.unit == "s"]
    chart, axes = plt.subplots(figsize=(10, 0.8 + 0.26 * len(rows)))
    labels = [f"{each.case}: {each.contender}" for each in rows]
    spread = [[0.0] * len(rows), [max(0.0, each.p99 - each.median) * 1e3 for each in rows]]
    medians_ms = [each.median * 1e3 for each in rows]
    axes.barh(labels, medians_ms, xerr=spread, color=[_colour(each) for each in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds: median, whisker to p99")
    axes.set_title(f"{workload} ({environment['machine']})", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    return chart


def _slopes(plt: Any, workload: str, environment: dict[str, str], figures: Sequence[Figure]) -> Any:
    """A line a case over its contenders, which are slices of time: flat is what is wanted."""
    found = list(cases(figures))
    chart, every = plt.subplots(len(found), 1, figsize=(9, 1.9 * len(found)), sharex=True, squeeze=False)
    for (_, case, rows), axes in zip(found, every[:, 0], strict=True):
        scale = {"s": 1e-3, "B": 2**20, "count": 1}[rows[0].unit]
        names = [each.contender for each in rows]
        axes.plot(names, [each.median / scale for each in rows], marker="o", color="#1f77b4")
        if rows[0].rounds > 1:
            axes.plot(names, [each.p99 / scale for each in rows], marker=".", color="#d9a441")
        axes.set_ylim(0, 1.15 * max(each.p99 for each in rows) / scale or 1)
        axes.set_title(f"{case} ({ {'s': 'ms', 'B': 'MiB', 'count': 'number'}[rows[0].unit] })", fontsize=8)
    chart.suptitle(f"{workload} ({environment['machine']})", fontsize=8)
    return chart


def _colour(figure: Figure) -> str:
    if figure.contender == LIMIT:
        return "#888888"
    return "#1f77b4" if figure.contender.startswith(SNAPSTORE) else "#d9a441"
