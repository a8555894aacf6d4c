"""Ask spin whether the protocol holds, and whether each shortcut is refuted: ``python tests/model/run.py [--quick]``.

A model that must hold is searched whole, within its bounds. A shortcut is searched breadth first, so that what is
printed of it is a shortest way to disaster. Needs spin and a C compiler: ``apt-get install spin gcc``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOW_TO_INSTALL = "the model needs spin and a C compiler: apt-get install spin gcc"
CASE_TIMEOUT_S = 900.0

sys.path.insert(0, str(HERE.parent))
from trust_results import record  # noqa: E402 - it is beside the tests, and this is a script


@dataclass(frozen=True, slots=True)
class Case:
    """One question to spin. ``bounds`` and ``variant`` are what the model is compiled with."""

    name: str
    model: str
    bounds: str
    variant: str = ""
    progress: bool = False

    @property
    def must_hold(self) -> bool:
        return not self.variant

    @property
    def defines(self) -> list[str]:
        words = [*self.bounds.split(), *([f"VARIANT_{self.variant}"] if self.variant else [])]
        return [f"-D{word}" for word in words]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What spin found. ``story``: the steps to the first broken promise, as the model's threads tell them."""

    holds: bool
    states: int
    depth: int
    took_s: float
    broken: str = ""
    story: list[str] = field(default_factory=list)


_STORE = "NO_SHUTDOWN FAULTS=0 CLEANUPS=1"
_SESSION = "RECLAIMERS=1 VANDALS=0 TRIES=1"

QUICK = (
    Case("saves, a cleanup, a fault", "store", "NO_SHUTDOWN SAVES_A=1 CLEANUPS=1"),
    Case("a store beside one that reclaims", "session", "RECLAIMERS=1 DEATHS=1 TRIES=1"),
    Case("no look after the rename", "store", f"{_STORE} SAVES_A=1", "NO_CHECK_AFTER_RENAME"),
    Case("a pid as proof of life", "session", f"{_SESSION} DEATHS=0", "PID_IS_PROOF"),
)

FULL = (
    *QUICK[:2],
    Case("id reuse: two cleanups", "store", "NO_SHUTDOWN FAULTS=0"),
    Case("id reuse: a cleanup, a fault", "store", "NO_SHUTDOWN CLEANUPS=1"),
    Case("a shutdown beside a cleanup", "store", "FAULTS=0 SAVES_A=1 CLEANUPS=1"),
    Case("a shutdown and a fault", "store", "SAVES_A=1 CLEANUPS=0"),
    Case("a disk that hangs", "store", "HANG FAULTS=0 SAVES_A=1 CLEANUPS=1"),
    Case("every save ends", "store", "PROVE_SAVES NO_SHUTDOWN SAVES_A=1 CLEANUPS=1", progress=True),
    Case("shutdown ends", "store", "PROVE_SHUTDOWN HANG SAVES_A=1 CLEANUPS=0 FAULTS=0", progress=True),
    Case("two reclaimers, two deaths", "session", ""),
    Case("two owners, a death", "session", "OWNERS=2 RECLAIMERS=1 DEATHS=1 VANDALS=0"),
    Case("one directory per id", "store", _STORE, "ONE_DIRECTORY"),
    Case("a counter by id", "store", "NO_SHUTDOWN FAULTS=0", "COUNTER_BY_ID"),
    Case("drained jobs are counted", "store", _STORE, "COUNT_DRAINED"),
    Case("no look after the rename", "store", _STORE, "NO_CHECK_AFTER_RENAME"),
    Case("popped before busy", "store", _STORE, "POP_BEFORE_BUSY"),
    Case("entries popped by key", "store", _STORE, "POP_BY_KEY"),
    Case("swept while it is written", "store", _STORE, "SWEEP_WHILE_BUSY"),
    Case("marked after the wait", "store", _STORE, "MARK_AFTER_WAIT"),
    Case("admitted in any order", "store", _STORE, "ADMIT_IN_ANY_ORDER"),
    Case("a forgotten notify", "store", _STORE, "NO_NOTIFY"),
    Case("the writer leaves at the flag", "store", "FAULTS=0 SAVES_A=1 CLEANUPS=0", "LEAVE_AT_THE_FLAG"),
    Case("no second look at the inode", "session", "RECLAIMERS=1 DEATHS=0 TRIES=1", "NO_SECOND_LOOK"),
    Case("visible before its lock", "session", f"{_SESSION} DEATHS=1", "VISIBLE_BEFORE_LOCK"),
    Case("the lock file goes first", "session", f"{_SESSION} DEATHS=0", "LOCK_FILE_FIRST"),
    Case("removed where it stands", "session", f"{_SESSION} DEATHS=1", "DELETE_IN_PLACE"),
    Case("a pid as proof of life", "session", f"{_SESSION} DEATHS=0", "PID_IS_PROOF"),
    Case("reclaimed by age", "session", f"{_SESSION} DEATHS=0", "BY_AGE"),
)


def is_installed() -> bool:
    return shutil.which("spin") is not None and shutil.which("gcc") is not None


def check(case: Case, folder: Path, optimise: str = "-O2") -> Verdict:
    """Search one model. ``folder`` is empty, and takes what spin and the compiler make."""
    source = folder / f"{case.model}.pml"
    shutil.copy(HERE / source.name, source)
    _run(["spin", "-a", *case.defines, source.name], folder)
    kind = ["-DNFAIR=3"] if case.progress else ["-DSAFETY"]
    breadth_first = [] if case.must_hold else ["-DBFS"]
    compiled = [optimise, "-w", "-DCOLLAPSE", "-DMEMLIM=6000", *kind, *breadth_first, "-o", "pan", "pan.c"]
    _run(["gcc", *compiled], folder)
    started_s = time.monotonic()
    # -m: the longest way that is followed. -b: a longer one is an error, not passed over. -f: weak fairness.
    output = _run(["./pan", "-m1000000", "-b", *(["-a", "-f"] if case.progress else [])], folder)
    took_s = time.monotonic() - started_s
    found = re.search(r"depth reached (\d+), errors: (\d+)\s+([0-9.e+]+) states, stored", output)
    if found is None:
        raise RuntimeError(f"{case.name}: not understood:\n{output[-2000:]}")
    depth, errors, states = int(found[1]), int(found[2]), int(float(found[3]))
    if errors == 0:
        if "Search not completed" in output:
            raise RuntimeError(f"{case.name}: the search did not end:\n{output[-2000:]}")
        return Verdict(True, states, depth, took_s)
    told = _run(["spin", "-t", *case.defines, source.name], folder)
    broken = re.search(r"^pan:1: (.*) \(at depth", output, re.MULTILINE)
    story = [line.strip() for line in told.splitlines() if re.match(r"\s+[a-z]+( \d+)?: ", line)]
    return Verdict(False, states, depth, took_s, broken[1] if broken else "no progress", story)


def _run(command: list[str], folder: Path) -> str:
    """Its output. spin and pan say in it, not by how they end, what they found."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=CASE_TIMEOUT_S, check=False
    )
    if command[0] != "./pan" and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description="prove the protocol with spin")
    parser.add_argument("--quick", action="store_true", help="small bounds, seconds")
    parser.add_argument("--only", metavar="WORD", default="", help="the cases whose names contain this")
    options = parser.parse_args()
    if not is_installed():
        print(HOW_TO_INSTALL, file=sys.stderr)
        return 2
    cases = [case for case in (QUICK if options.quick else FULL) if options.only in case.name]
    print(f"{'case':34}{'must be':>10}{'states':>14}{'depth':>8}{'seconds':>9}{'trail':>7}  verdict")
    wrong = 0
    verdicts: list[Verdict] = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="snapstore-model-") as folder:
            verdict = check(case, Path(folder), "-O0" if options.quick else "-O2")
        verdicts.append(verdict)
        wrong += verdict.holds != case.must_hold
        print(
            f"{case.name:34}{'true' if case.must_hold else 'refuted':>10}{verdict.states:14,}{verdict.depth:8}"
            f"{verdict.took_s:9.1f}{len(verdict.story) or '':>7}  {'holds' if verdict.holds else 'refuted'}"
            f"{'' if verdict.holds == case.must_hold else '   <-- WRONG'}",
            flush=True,
        )
        for line in [] if verdict.holds else [*verdict.story, f"broken: {verdict.broken}"]:
            print(f"    {line}")
    if not options.quick and not options.only:
        record(
            "model",
            "make model",
            models_that_hold=sum(verdict.holds for verdict in verdicts),
            shortcuts_refuted=sum(not verdict.holds for verdict in verdicts),
            states=sum(verdict.states for verdict in verdicts if verdict.holds),
            wrong_verdicts=wrong,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
