"""The goals, each with the figures that tell whether it is met; and the page that is written from both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench._measure import LIMIT, SNAPSTORE, Figure
from bench._report import cases, shown, to_limit, to_ours

Found = Mapping[tuple[str, str, str], Figure]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

MIB16, KIB256 = "16 MiB in 48", "256 KiB in 48"


@dataclass(frozen=True, slots=True)
class Goal:
    """``measured`` gives the figure, of which ``most`` is wanted at the most; ``KeyError``: it was not measured.

    ``kind``: what it has in common with others, of which the README shows the one that is furthest off.
    """

    figure: str
    most: float
    measured: Callable[[Found], float]
    unit: str = "x"
    kind: str = ""

    def row(self, found: Found) -> tuple[str, str, str, str]:
        value = self.measured(found)
        return self.figure, f"<= {self._shown(self.most)}", self._shown(value), _verdict(value, self.most)

    def is_measured(self, found: Found) -> bool:
        try:
            self.measured(found)
        except KeyError:
            return False
        return True

    def _shown(self, value: float) -> str:
        return f"{value:.2f} x" if self.unit == "x" else shown(value, "B" if self.unit == "B" else "s")


def _verdict(value: float, most: float) -> str:
    return "met" if value <= most else f"missed by {value / most:.2f} x"


def _ratio(workload: str, case: str, contender: str) -> Callable[[Found], float]:
    def measured(found: Found) -> float:
        ratio = found[workload, case, contender].to_limit
        assert ratio is not None
        return ratio

    return measured


def _median(workload: str, case: str, contender: str) -> Callable[[Found], float]:
    return lambda found: found[workload, case, contender].median


def _p99(workload: str, case: str, contender: str) -> Callable[[Found], float]:
    return lambda found: found[workload, case, contender].p99


def _beside(size: str, contender: str) -> Callable[[Found], float]:
    return lambda found: (
        found["save", f"{size}, beside a GIL-hungry thread", contender].median
        / found["save", f"{size}, idle", contender].median
    )


def _step(found: Found) -> float:
    workload, case = "stall", "a step of torch (about 5 ms)"
    busy = found[workload, case, "snapstore, a save of 16 MiB before each"]
    return busy.p99 / found[workload, case, LIMIT].p99


def _growth(verb: str) -> Callable[[Found], float]:
    def measured(found: Found) -> float:
        rows = [each for (_, case, _), each in found.items() if case == f"{verb} against live snapshots"]
        ratios = [each.to_limit for each in rows if each.to_limit is not None and each.contender != LIMIT]
        if not ratios:
            raise KeyError(verb)
        return max(ratios)

    return measured


def _goals() -> Iterator[Goal]:
    yield from _of_saves()
    yield from _of_files()
    yield from _of_cleanups()
    yield from _of_others()
    yield from _of_remote()


def _of_saves() -> Iterator[Goal]:
    for framework in FRAMEWORKS:
        case = ("save", f"{MIB16}, idle", f"snapstore {framework}")
        yield Goal(f"save / memcpy, {MIB16}, {framework}", 1.10, _ratio(*case), kind="save of 16 MiB")
    for framework in FRAMEWORKS:
        case = ("save", f"{KIB256}, idle", f"snapstore {framework}")
        yield Goal(f"save, {KIB256}, {framework}, p50", 150e-6, _median(*case), "s", "save of 256 KiB")
    for size, framework in product((MIB16, KIB256), FRAMEWORKS):
        name = f"save beside a GIL-hungry thread / alone, {size}, {framework}"
        yield Goal(name, 3.0, _beside(size, f"snapstore {framework}"), kind="save beside a hungry thread")
    for (size, tensors), how in product(UNCOPIED.items(), ("mlx", "numpy, borrow", "torch, borrow")):
        case = ("save", f"{size}, idle", f"snapstore {how}")
        name = f"save without a copy, {size}, {how}, p50"
        yield Goal(name, (60 + tensors) * 1e-6, _median(*case), "s", "save without a copy")


def _of_files() -> Iterator[Goal]:
    for load, most in (("64 x 16 MiB", 1.0), ("512 x 256 KiB", 1 / 0.8)):
        case = ("drain", load, "snapstore, durability none")
        yield Goal(f"drain / raw write, {load} (time)", most, _ratio(*case))
    for size in ("64 MiB in 64", MIB16):
        case = ("load", f"{size}, warm disk", "snapstore numpy")
        yield Goal(f"load warm / preadv into a kept buffer, {size}", 1.3, _ratio(*case), kind="load warm")
        case = ("load", f"{size}, pending", "snapstore numpy")
        yield Goal(f"load pending / memcpy, {size}", 1.1, _ratio(*case), kind="load pending")


def _of_cleanups() -> Iterator[Goal]:
    at_once, waits = "snapstore, timeout_s=0", "snapstore, default time-out"
    for name in ABORTS:
        figure = f"abort, timeout_s=0, {name}"
        yield Goal(f"{figure}, p50", 30e-6, _median("abort", name, at_once), "s", "abort at once, p50")
        yield Goal(f"{figure}, p99", 200e-6, _p99("abort", name, at_once), "s", "abort at once, p99")
    idle, busy, own = ABORTS
    yield Goal(f"abort, default time-out, {idle}, p50", 150e-6, _median("abort", idle, waits), "s")
    yield Goal(f"abort, default time-out, {busy}, p99", 3e-3, _p99("abort", busy, waits), "s")
    yield Goal(f"abort, default time-out, {own}, p99", 3e-3, _p99("abort", own, waits), "s")
    every = ("abort", "cleanup_all, 1,000 requests of 4 files")
    yield Goal("cleanup_all, 1,000 requests, 4,000 files", 5e-3, _median(*every, waits), "s")
    yield Goal("cleanup_all, the same, timeout_s=0", 5e-3, _median(*every, at_once), "s")


def _of_others() -> Iterator[Goal]:
    for framework, call in product(FRAMEWORKS, ("save and write", "load")):
        case = ("stall", "worst gap of a ticker, 256 MiB", f"snapstore {call}, {framework}")
        name = f"worst stall of other threads, 256 MiB, {call}, {framework}"
        yield Goal(name, 10e-3, _median(*case), "s", "worst stall")
    yield Goal("step p99, busy / idle", 1.05, _step)
    for verb in ("save", "cleanup_request", "load"):
        yield Goal(f"growth of {verb} from 10 to 100,000 live", 1.3, _growth(verb), kind="growth")
    case = ("scale", "memory", "resident above pending, at its peak")
    yield Goal("peak resident memory above pending bytes", 32 * 2**20, _median(*case), "B")


def _of_remote() -> Iterator[Goal]:
    for verb, size in product(("publish", "fetch"), (MIB16, "256 MiB in 64")):
        case = ("remote", f"{verb} {size}", SNAPSTORE)
        yield Goal(f"{verb} / obstore alone, {size} (time)", 1 / 0.9, _ratio(*case))
    case = ("remote", f"save {MIB16}", f"{SNAPSTORE} on_commit")
    yield Goal(f"save beside uploads / without a remote store, {MIB16}", 1.1, _ratio(*case))


FRAMEWORKS = ("numpy", "torch")
UNCOPIED = {KIB256: 48, "0.8 MiB in 200": 200, MIB16: 48, "64 MiB in 64": 64}
"""Tensors, of which each may cost a microsecond."""

ABORTS = (
    "idle, one file of 256 KiB",
    "writer busy with 128 MiB of others",
    "writer in the middle of 128 MiB of its own",
)
"""Cases of the abort workload."""


def page(environment: Mapping[str, str], figures: Sequence[Figure]) -> str:
    """Markdown: the machine, each goal beside what was measured, then every case."""
    found = {(each.workload, each.case, each.contender): each for each in figures}
    lines = ["# Results", "", *(f"- {name}: {value}" for name, value in environment.items()), ""]
    if goals := _measured(found):
        lines += ["## Goals", "", *_table(goals, found), ""]
    for workload, case, rows in cases(figures):
        lines += [
            f"## {workload}: {case}",
            "",
            "| | median | p99 | highest | / limit | / snapstore | rounds |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for each, ratio in zip(rows, to_ours(rows), strict=True):
            values = " | ".join(shown(value, each.unit) for value in (each.median, each.p99, each.highest))
            lines.append(f"| {each.contender} | {values} | {to_limit(each)} | {ratio} | {each.rounds} |")
        lines.append("")
    return "\n".join(lines)


def _measured(found: Found) -> list[Goal]:
    return [goal for goal in _goals() if goal.is_measured(found)]


def _furthest_off(goals: Iterable[Goal], found: Found) -> list[Goal]:
    """Of each kind the one that is missed by most, or met by least."""
    worst: dict[str, Goal] = {}
    for goal in goals:
        kind = goal.kind or goal.figure
        if (
            kind not in worst
            or goal.measured(found) / goal.most > worst[kind].measured(found) / worst[kind].most
        ):
            worst[kind] = goal
    return list(worst.values())


def _table(goals: Iterable[Goal], found: Found) -> list[str]:
    return [
        "| figure | goal | measured | |",
        "|---|---|---|---|",
        *(f"| {' | '.join(goal.row(found))} |" for goal in goals),
    ]


def fill_in(readme: Path, environment: Mapping[str, str], figures: Sequence[Figure]) -> bool:
    """Write the goals' table between the marks in the README; False if it has none."""
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return False
    found = {(each.workload, each.case, each.contender): each for each in figures}
    how = ", ".join(environment[name] for name in ("machine", "disk", "memory") if name in environment)
    when = f"Measured on {environment['date']} at commit {environment['commit']}"
    said = (
        f"{when}: {how}; Python {environment['python']}. Of each kind of figure the one that is furthest off:"
    )
    rows = _table(_furthest_off(_measured(found), found), found)
    readme.write_text("\n".join([before + BEGIN, said, "", *rows, END + after]))
    return True
