"""Break the code on purpose, one small change at a time, and see a test go red: ``python tests/mutate.py [target]``.

Works in a copy of the tracked files, one process at a time. A mutant that no test noticed is a survivor: it is listed
in ``trust/mutants.toml`` with the reason why it changes nothing that is promised, or this fails. A survivor is known by
its module, its function and the change itself, so that the list outlives unrelated edits.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trust_results import record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKOUT = Path(__file__).resolve().parents[1]
REASONS = CHECKOUT / "trust" / "mutants.toml"
SURVIVED = frozenset({0, 5, 33})
"""What mutmut notes of a mutant under which every test passed, or that no test came near."""


@dataclass(frozen=True, slots=True)
class Target:
    """Modules that are mutated together, and the fast tests that guard them."""

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


TARGETS = (
    Target(
        "state",
        ("_state", "_room", "_ledger"),
        ("state", "backpressure", "cleanup_races", "shutdown", "endings", "space", "metrics", "remote"),
    ),
    Target("format", ("_format",), ("format", "store")),
    Target(
        "writer",
        ("_writer", "_filing"),
        (
            *("store", "filing", "faults", "cleanup_races", "space", "logging", "shutdown", "powerloss"),
            "comings_and_goings",
        ),
    ),
    Target(
        "cleanup",
        ("_cleanup",),
        (
            *("cleanup_races", "sessions", "shutdown", "space", "endings", "faults", "logging"),
            *("aio", "comings_and_goings"),
        ),
    ),
    Target(
        "session",
        ("_session",),
        (
            *("sessions", "owner", "crash", "store", "powerloss", "space", "endings"),
            *("comings_and_goings", "time", "hostile"),
        ),
    ),
)

_NOT_OF_MUTANTS = (
    "tests/test_logging.py::test_every_record_above_debug_names_its_event",
    "tests/test_format.py::test_what_mlx_writes_is_read",
)
"""The first reads the calls in the modules' text, which mutmut has written anew; MLX hangs in a forked process."""

_PYTEST = ("-p", "no:cacheprovider", "-x", "--timeout=12")

_CONFIGURATION = """
[tool.mutmut]
source_paths = ["snapstore"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = {arguments}
also_copy = {copied}
do_not_mutate_patterns = ["_log.debug"]
use_git_change_detection = false
track_dependencies = false
timeout_multiplier = 4.0
timeout_constant = 5.0
"""
_IN_CHILDREN = """import os
if os.environ.get("MUTANT_UNDER_TEST") == "stats":  # a child of a test has no part in mutmut's own counting
    os.environ["MUTANT_UNDER_TEST"] = ""
"""
_WITHOUT_SHRINKING = """

from hypothesis import Phase  # a mutant is found; which example is the smallest is of no interest

settings.register_profile(
    "mutants", deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("mutants")
"""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A change that no test noticed."""

    module: str
    function: str
    change: str

    def matches(self, entry: dict[str, str]) -> bool:
        """The list's entry may leave ``change`` out: then it speaks for all changes of a line."""
        return (
            entry["module"] == self.module
            and fnmatch.fnmatchcase(self.function, entry["function"])
            and entry["change"] in self.change
        )


def mutate(
    target: Target, folder: Path, sample: int | None, seed: int, limit_s: float | None
) -> tuple[int, int, list[Survivor]]:
    """How many mutants there are, how many of them were tried, and those that survived.

    ``limit_s`` ends the trying: mutmut tries those with the quickest tests first, so the rest is the slower ones.
    In a ``folder`` of an earlier run, what was killed there and was not changed since is not tried again.
    """
    _copy(target, folder)
    _mutmut(folder, "run", "--max-children", "1", "no such mutant")  # makes them, and tries none
    known = _exit_codes(folder)
    names = sorted(known)
    chosen = names if sample is None else random.Random(seed).sample(names, min(sample, len(names)))
    open_ones = [name for name in chosen if known[name] is None or known[name] in SURVIVED]
    if open_ones:
        _mutmut(folder, "run", "--max-children", "1", *open_ones, limit_s=limit_s)
    codes = _exit_codes(folder)
    tried = {name: codes[name] for name in chosen if codes[name] is not None}
    if not tried:
        said = (folder / "mutmut.log").read_text()[-2000:]
        raise RuntimeError(f"{target.name}: no mutant was tried; mutmut's last words:\n{said}")
    return (
        len(codes),
        len(tried),
        [_survivor(folder, name) for name, code in tried.items() if code in SURVIVED],
    )


def _copy(target: Target, folder: Path) -> None:
    archive = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, check=True).stdout
    names = [name for name in archive.decode().split("\0") if name and (CHECKOUT / name).is_file()]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((CHECKOUT / name).read_bytes())
    with (folder / "tests" / "conftest.py").open("a") as file:
        file.write(_WITHOUT_SHRINKING)
    (folder / "sitecustomize.py").write_text(_IN_CHILDREN)
    copied = {name.split("/")[0] for name in names} - {"snapstore", "tests", "pyproject.toml", ".ci"}
    with (folder / "pyproject.toml").open("a") as file:
        file.write(
            _CONFIGURATION.format(
                modules=json.dumps([f"snapstore/{name}.py" for name in target.modules]),
                tests=json.dumps([f"tests/test_{name}.py" for name in target.tests]),
                copied=json.dumps(["sitecustomize.py", *sorted(copied)]),
                arguments=json.dumps([*_PYTEST, *(f"--deselect={test}" for test in _NOT_OF_MUTANTS)]),
            )
        )


def _mutmut(folder: Path, *arguments: str, limit_s: float | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = folder / "mutmut.out"
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mutmut", *arguments],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its children end with it
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what was tried is noted already, mutant by mutant
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    with (folder / "mutmut.log").open("a") as log:
        log.write(said.read_text())
    return said.read_text()


def _exit_codes(folder: Path) -> dict[str, int | None]:
    codes: dict[str, int | None] = {}
    for path in sorted(folder.glob("mutants/snapstore/**/*.meta")):
        codes |= json.loads(path.read_text())["exit_code_by_key"]
    return codes


def _survivor(folder: Path, name: str) -> Survivor:
    lines = _mutmut(folder, "show", name).splitlines()
    changed = [line for line in lines if line[:1] in ("-", "+") and line[:3] not in ("---", "+++")]
    change = "  ->  ".join(
        " ".join(line[1:].strip() for line in changed if line[0] == sign) for sign in ("-", "+")
    )
    module, _, mangled = name.removeprefix("snapstore.").partition(".")
    mangled = mangled.rpartition("__mutmut_")[0]
    function = mangled.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in mangled else mangled.removeprefix("x_")
    return Survivor(module, function, change)


def reasons() -> list[dict[str, str]]:
    """The list of survivors that are known, each with its reason."""
    return [dict(entry) for entry in tomllib.loads(REASONS.read_text())["survivor"]]


def _command(target: Target, options: argparse.Namespace) -> str:
    words = [target.name]
    if options.sample is not None:
        words += ["--sample", str(options.sample), "--seed", str(options.seed)]
    if options.minutes is not None:
        words += ["--minutes", f"{options.minutes:g}"]
    return f"make mutate ARGS={shlex.quote(' '.join(words))}"


@contextmanager
def _folder(target: Target, kept_in: Path | None) -> Iterator[Path]:
    if kept_in is not None:
        yield kept_in.resolve() / target.name
        return
    with tempfile.TemporaryDirectory(prefix="snapstore-mutants-") as name:
        yield Path(name)


def main() -> int:
    parser = argparse.ArgumentParser(description="break the code on purpose, and see a test go red")
    parser.add_argument(
        "targets", nargs="*", help=f"of {', '.join(each.name for each in TARGETS)}; all by default"
    )
    parser.add_argument("--sample", type=int, help="so many mutants of each, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--minutes", type=float, help="for the mutants of each target, after its tests ran once without one"
    )
    parser.add_argument(
        "--keep", type=Path, help="a folder to work in: the next run there tries what survived, or is new"
    )
    options = parser.parse_args()
    known, unexplained = reasons(), 0
    for target in TARGETS:
        if options.targets and target.name not in options.targets:
            continue
        with _folder(target, options.keep) as folder:
            made, tried, survivors = mutate(
                target,
                folder,
                options.sample,
                options.seed,
                options.minutes and 60 * options.minutes,
            )
        explained = [each for each in survivors if any(each.matches(entry) for entry in known)]
        killed = tried - len(survivors)
        print(
            f"{target.name}: {killed} of {tried} killed ({killed / tried:.1%}), {len(explained)} explained; {made} made"
        )
        for survivor in survivors:
            if survivor not in explained:
                unexplained += 1
                print(f"  {survivor.module}.{survivor.function}\n    {survivor.change}")
        record(
            f"mutants-{target.name}",
            _command(target, options),
            tests=" ".join(target.tests),
            mutants=made,
            tried=tried,
            killed=killed,
            killed_percent=round(100 * killed / tried, 1),
            explained=len(explained),
            unexplained=len(survivors) - len(explained),
        )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
