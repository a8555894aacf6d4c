"""Measuring: contenders in turn, so that the machine's drift hits all alike, and ratios within one run."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Literal

Contender = Callable[[], float]
"""One measured round: does the work, with what must surround it, and gives the seconds that count."""

Unit = Literal["s", "B", "count"]

_BUDGET_S = {False: float(os.environ.get("SNAPSTORE_BENCH_CASE_S", "6")), True: 0.5}
_FEWEST_ROUNDS = 3
"""A case stops after so long, quick or not, but not before so many rounds: the whole takes minutes on any machine."""

LIMIT = "limit"
SNAPSTORE = "snapstore"


@dataclass(frozen=True, slots=True)
class Figure:
    """One contender's rounds in one case of a workload."""

    workload: str
    case: str
    contender: str
    rounds: int
    median: float
    p99: float
    highest: float
    to_limit: float | None
    """Median of the ratios to the limit, round by round."""
    unit: Unit = "s"

    @staticmethod
    def one(workload: str, case: str, contender: str, value: float, unit: Unit) -> Figure:
        """What is measured once."""
        return Figure(workload, case, contender, 1, value, value, value, None, unit)


@dataclass(slots=True)
class Case:
    """One question: contenders that do the same work, one of which may be the machine's own limit."""

    workload: str
    name: str
    contenders: Mapping[str, Contender]
    rounds: int
    warm_up: int = 2
    goal: str = ""
    quick: bool = False
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self) -> list[Figure]:
        """Every contender once a round, in turn; the first rounds are not counted, and the last may fall to time."""
        self.seconds = {name: [] for name in self.contenders}
        end_s = perf_counter() + _BUDGET_S[self.quick]
        for number in range(-self.warm_up, self.rounds):
            if number >= _FEWEST_ROUNDS and perf_counter() > end_s:
                break
            for name, contender in self.contenders.items():
                took_s = contender()
                if number >= 0:
                    self.seconds[name].append(took_s)
        return [self._figure(name, values) for name, values in self.seconds.items()]

    def _figure(self, name: str, values: list[float]) -> Figure:
        limit = self.seconds.get(LIMIT)
        ratio = statistics.median(a / b for a, b in zip(values, limit, strict=True)) if limit else None
        return Figure(
            self.workload,
            self.name,
            name,
            len(values),
            statistics.median(values),
            percentile(values, 0.99),
            max(values),
            ratio,
        )


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of the values do not pass; the largest one where there are few."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextmanager
def hungry_thread() -> Iterator[None]:
    """A thread that never gives the GIL up by itself."""
    stop = False

    def devour() -> None:
        total = 0
        while not stop:
            total += 1

    thread = threading.Thread(target=devour, name="bench-hungry", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


class Sleeper:
    """A thread that waits to be woken, and answers: what any hand-over between threads costs on this machine."""

    def __init__(self) -> None:
        self._asked, self._answered = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._thread = threading.Thread(target=self._answer, name="bench-sleeper", daemon=True)

    def wake(self) -> None:
        self._asked.release()

    def await_answer(self) -> None:
        self._answered.acquire()

    def _answer(self) -> None:
        while self._asked.acquire() and not self._over:
            self._answered.release()

    def __enter__(self) -> Sleeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self.wake()
        self._thread.join()


@contextmanager
def ticker(gaps_s: list[float], period_s: float = 0.0005) -> Iterator[None]:
    """A thread that notes how much later than asked it woke each time: what others' calls cost it."""
    end = threading.Event()

    def tick() -> None:
        before_s = perf_counter()
        while not end.wait(period_s):
            now_s = perf_counter()
            gaps_s.append(now_s - before_s - period_s)
            before_s = perf_counter()

    thread = threading.Thread(target=tick, name="bench-ticker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def environment() -> dict[str, str]:
    """What the figures hold for: machine, Python, packages, disk."""
    packages = (
        "snapstore",
        "numpy",
        "torch",
        "mlx",
        "safetensors",
        "xxhash",
        "diskcache",
        "sglang",
        "lmcache",
    )
    found = {name: _version(name) for name in packages}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load": f"{os.getloadavg()[0]:.1f} processes in the minute before",
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {_model()}",
        "kernel": platform.release(),
        "disk": _disk(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "python": sys.version.split()[0],
        **{name: version for name, version in found.items() if version},
    }


def _disk() -> str:
    """File system and device of the folder that is measured in."""
    folder = os.path.realpath(os.environ.get("SNAPSTORE_BENCH_DIR") or tempfile.gettempdir())
    try:
        mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [each for each in mounts if os.path.commonpath([folder, each[1]]) == each[1]]
    device, _, kind = max(above, key=lambda each: len(each[1]))
    return f"{kind} on {device}"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
