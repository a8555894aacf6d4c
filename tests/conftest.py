"""For every test: none may leave behind a thread, a descriptor, or a file outside its own folder.

The three checks are autouse, and begin before any other fixture of the test, so they end after all of them: threads
first, since one that ends gives its descriptors back, then descriptors, then files.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest
from hypothesis import settings
from processes import Processes

from snapstore import SnapshotStore
from snapstore.testing import FaultyFileSystem

CHECKOUT = Path(__file__).resolve().parents[1]
ENDING_S = 2.0
"""How long a thread that has been told to end may take."""

FRAMEWORK_CACHES = ("mlx", "torchinductor_")
"""Compiled kernels that mlx and torch keep in the temporary folder, once a process."""

settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.environ.get("COVERAGE_RUN") and item.get_closest_marker("speed"):
        pytest.skip("coverage takes most of the time that is measured here")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Let go of a failed test's frames: what they hold would be found leaked, or be collected in the next test."""
    for name in ("last_exc", "last_traceback", "last_type", "last_value"):
        if hasattr(sys, name):
            delattr(sys, name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the test's stores live; not there yet."""
    return tmp_path / "root"


@pytest.fixture
def files() -> FaultyFileSystem:
    """A disk that does what the test says."""
    return FaultyFileSystem()


@pytest.fixture
def store(root: Path, files: FaultyFileSystem) -> Iterator[SnapshotStore]:
    """An open store on that disk; in the end it must be able to leave nothing behind."""
    store = SnapshotStore(root, file_system=files)
    yield store
    files.heal()
    assert store.shutdown(cleanup=True).clean
    assert not store.session.exists()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Processes]:
    """Started once, for the tests that need processes."""
    server = Processes()
    yield server
    server.close()


@pytest.fixture
def processes(fork_server: Processes) -> Iterator[Processes]:
    """``processes.start("function of tests/scenarios.py", ...)``; whatever still runs at the end is killed."""
    yield fork_server
    fork_server.end_children()


@pytest.fixture
def deadline() -> Callable[[float], AbstractContextManager[None]]:
    """``with deadline(0.2): ...`` fails the test if the block took longer."""

    @contextmanager
    def within(limit_s: float) -> Iterator[None]:
        started_s = time.monotonic()
        yield
        took_s = time.monotonic() - started_s
        if took_s > limit_s:
            pytest.fail(f"took {took_s:.3f} s, and {limit_s} s were allowed")

    return within


@pytest.fixture
def eventually() -> Callable[..., None]:
    """``eventually(lambda: ..., timeout_s=5.0)`` polls until it is true: only for what no event announces."""

    def wait(predicate: Callable[[], object], timeout_s: float = 5.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not predicate():
            if time.monotonic() >= deadline_s:
                pytest.fail(f"not true after {timeout_s} s")
            time.sleep(0.002)

    return wait


class Elsewhere(NamedTuple):
    """Where a file lands that is made outside the test's own folder: relative to nothing, or as a temporary one."""

    cwd: Path
    tmp: Path

    def strays(self) -> list[Path]:
        """What is there, but for what frameworks keep."""
        temporary = [path for path in self.tmp.iterdir() if not path.name.startswith(FRAMEWORK_CACHES)]
        return sorted([*self.cwd.iterdir(), *temporary])


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    """An empty working folder and an empty temporary folder, so that whatever appears there is this run's."""
    base = tmp_path_factory.mktemp("elsewhere")
    places = Elsewhere(base / "cwd", base / "tmp")
    for place in places:
        place.mkdir()
    return places


class Deaths(logging.Handler):
    """Keeps what is told of threads that ended by a bug."""

    def __init__(self) -> None:
        super().__init__(logging.CRITICAL)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", None) == "thread_died":
            self.told.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_thread_dies(request: pytest.FixtureRequest) -> Iterator[None]:
    """A thread that dies of a bug is started again, and a test that looks at the result alone would not notice."""
    deaths, log = Deaths(), logging.getLogger("snapstore")
    log.addHandler(deaths)
    yield
    log.removeHandler(deaths)
    if deaths.told and request.node.get_closest_marker("thread_dies") is None:
        pytest.fail("\n".join(deaths.told))


@pytest.fixture(autouse=True)
def no_stray_file(elsewhere: Elsewhere) -> Iterator[None]:
    """Run the test, and its child processes, with those two folders; fail it if it leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere.cwd)
        patch.setenv("TMPDIR", str(elsewhere.tmp))
        patch.setattr(tempfile, "tempdir", str(elsewhere.tmp))
        # Children are started elsewhere; they import what this process imports.
        patch.setenv("PYTHONPATH", str(CHECKOUT), prepend=os.pathsep)
        yield
    strays = elsewhere.strays()
    for path in strays:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if strays:
        pytest.fail("left outside its folder: " + ", ".join(map(str, strays)), pytrace=False)


@pytest.fixture(autouse=True)
def no_leaked_descriptor(no_stray_file: None) -> Iterator[None]:
    """Fail a test that leaves a descriptor open, also after a garbage collection and a moment.

    The moment is for connections of a client that is gone: its runtime closes them on a thread of its own.
    """
    before = _descriptors()
    yield
    if _descriptors() - before:
        gc.collect()
    end_s = time.monotonic() + ENDING_S
    while (leaked := _descriptors() - before) and time.monotonic() < end_s:
        time.sleep(0.01)
    if leaked:
        shown = "\n".join(f"  {each.fd} -> {each.target()}" for each in sorted(leaked))
        pytest.fail(f"leaked {len(leaked)} descriptors:\n{shown}", pytrace=False)


@pytest.fixture(autouse=True)
def no_leaked_thread(no_leaked_descriptor: None) -> Iterator[None]:
    """Fail a test whose threads still run a moment after it; one that is ending, a daemon or not, gets that moment."""
    before = set(threading.enumerate())
    yield
    leaked = _still_running(before)
    if leaked:
        frames = sys._current_frames()
        shown = "\n".join(_described(thread, frames) for thread in leaked)
        pytest.fail(f"leaked {len(leaked)} threads:\n{shown}", pytrace=False)


class Descriptor(NamedTuple):
    """An open descriptor and the file behind it, which keeps its identity when it is renamed."""

    fd: int
    device: int
    inode: int

    def target(self) -> str:
        try:
            return str(Path(f"/proc/self/fd/{self.fd}").readlink())
        except OSError:
            return "closed meanwhile, or not to be known here"


def _descriptors() -> set[Descriptor]:
    found = set()
    for fd in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        with suppress(OSError):  # the one that listed the others is closed by now
            status = os.fstat(fd)
            found.add(Descriptor(fd, status.st_dev, status.st_ino))
    return found


def _still_running(before: set[threading.Thread]) -> list[threading.Thread]:
    def new() -> list[threading.Thread]:
        running = sys._current_frames()
        return [each for each in threading.enumerate() if each not in before and each.ident in running]

    deadline_s = time.monotonic() + ENDING_S
    if new():
        gc.collect()  # a store that nobody holds any more ends its threads
    while new() and time.monotonic() < deadline_s:
        time.sleep(0.002)
    return new()


def _described(thread: threading.Thread, frames: dict[int, FrameType]) -> str:
    frame = frames.get(thread.ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame else "  (just ended)\n"
    return f"{thread.name} ({'daemon' if thread.daemon else 'not a daemon'}):\n{stack}"
