"""Somebody else writes into the root while stores work there: nothing outside is read, written or removed.

Somebody who may do that (a root that was given with open modes, or a process of the same user) swaps directories for
links to a twin of the root that lies outside; the kernel says (inotify) whether anything of the twin is touched. Once
at every single step of what a store does, and thousands of times beside it, by a thread that exchanges directory and
link in one system call.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import roots
from actions import wait_until
from helpers import assert_same
from trust_results import record

from snapstore import SnapshotStore, SnapstoreError, StoreOptions, _paths
from snapstore._files import FileSystem
from snapstore._maintenance.plan import Rules, make_plan
from snapstore._maintenance.prune import carry_out
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.survey import sessions, surroundings
from snapstore._maintenance.verify import verify_root
from snapstore._session import check_root
from snapstore.testing import OPERATIONS, FaultyFileSystem

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="inotify tells what was touched, on Linux alone"
)

QUICK = StoreOptions(
    leftovers="keep", cleanup_request_timeout_s=0.5, cleanup_all_timeout_s=0.5, shutdown_timeout_s=2.0
)
TOKENS = (3, 5)


class Twin:
    """A copy of a root outside of it, which must stay as it is and which nobody may look into."""

    def __init__(self, root: Path, outside: Path) -> None:
        self.root = root
        self.outside = roots.copy_of(root, outside)
        for session in outside.glob("2*"):
            (session / _paths.TRASH / "precious").write_bytes(b"precious")
            (session / _paths.TEMPORARY / "precious").write_bytes(b"precious")
        self._before = roots.everything_in(outside)
        self._watch = roots.Watch(outside)

    def of(self, path: Path) -> Path:
        return self.outside / path.relative_to(self.root)

    def assert_untouched(self) -> None:
        assert self._watch.events() == []
        assert roots.everything_in(self.outside) == self._before

    def close(self) -> None:
        self._watch.close()


@contextmanager
def watched(root: Path) -> Iterator[Twin]:
    """The root's twin while the block runs; whatever happens there, it fails the test."""
    twin = Twin(root, root.parent / "outside")
    try:
        yield twin
        twin.assert_untouched()
    finally:
        twin.close()
        shutil.rmtree(twin.outside)


@pytest.fixture(scope="module")
def figures() -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    yield counted
    record("hostile", "make hostile", **counted)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "root"
    roots.killed(root)
    return root


TARGETS: dict[str, Callable[[Path], Path]] = {
    "the session": lambda session: session,
    "the temporary directory": lambda session: session / _paths.TEMPORARY,
    "the trash": lambda session: session / _paths.TRASH,
    "a generation": lambda session: min(session.glob("*.g1")),
}


def test_the_watch_sees_what_is_done_through_a_link(template: Path, root: Path) -> None:
    roots.copy_of(template, root)
    session = next(root.glob("2*"))
    with watched(root) as twin:
        shutil.rmtree(session)
        session.symlink_to(twin.of(session))
        twin.assert_untouched()
        (session / _paths.OWNER_RECORD).read_bytes()
        with pytest.raises(AssertionError):
            twin.assert_untouched()


# --- each operation ---


@pytest.mark.parametrize(
    "act",
    [
        lambda files, at: files.create(at("new")),
        lambda files, at: files.open_read(at("file")),
        lambda files, at: files.open_lock(at("file"), create=False),
        lambda files, at: files.open_lock(at("new"), create=True),
        lambda files, at: files.open_directory(at("folder")),
        lambda files, at: files.names(at("folder")),
        lambda files, at: files.sync_directory(at("folder")),
        lambda files, at: files.make_directory(at("new")),
        lambda files, at: files.remove_directory(at("folder")),
        lambda files, at: files.unlink(at("file")),
        lambda files, at: files.status_at(at("file")),
        lambda files, at: files.rename(at("file"), at("new")),
        lambda files, at: files.rename(at("file"), str(Path(at("file")).parents[1] / "taken")),
        lambda files, at: files.rename(str(Path(at("file")).parents[1] / "mine"), at("new")),
        lambda files, at: files.link(at("file"), str(Path(at("file")).parents[1] / "taken")),
        lambda files, at: files.link(str(Path(at("file")).parents[1] / "mine"), at("new")),
    ],
)
def test_below_a_root_no_operation_goes_through_a_link_and_its_error_names_the_path(
    root: Path, tmp_path: Path, act: Callable[[FileSystem, Callable[[str], str]], object]
) -> None:
    SnapshotStore(root).shutdown(cleanup=True)
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("precious")
    (root / "real").mkdir()
    (root / "real" / "mine").touch()
    (root / "real" / "link").symlink_to(outside)
    files = FileSystem()
    check_root(files, str(root))
    with pytest.raises(NotADirectoryError) as caught:
        act(files, lambda name: str(root / "real" / "link" / name))
    assert str(root / "real") in str(caught.value)
    assert {path.name for path in outside.iterdir()} == {"folder", "file"}
    assert {path.name for path in (root / "real").iterdir()} == {"mine", "link"}


# --- once, at every step ---


def swapped_at(files: FaultyFileSystem, step: int, swap: Callable[[], None]) -> list[int]:
    """Swap right before the operation of that number, whichever thread makes it. Counts the operations."""
    count, lock = [0], threading.Lock()

    def act() -> None:
        with lock:
            count[0] += 1
            now = count[0] == step + 1
        if now:
            swap()

    for operation in OPERATIONS:
        files.call(operation, act, times=float("inf"))
    return count


def swap_for_link(path: Path, target: Path, aside: Path) -> None:
    with suppress(FileNotFoundError):
        path.rename(aside)
    with suppress(FileNotFoundError, NotADirectoryError):  # all above it is gone by then
        path.symlink_to(target)


def work(store: SnapshotStore, round_: int) -> None:
    """Every verb that touches the disk. What fails, fails with an error that is the store's or the disk's."""
    for token_count in TOKENS:
        store.save("held", token_count, roots.tensors(token_count + round_))
    store.save("gone", 1, roots.tensors(1))
    store.flush(5)
    for request, token_count in (("held", 3), ("held", 5), ("gone", 1)):
        with suppress(SnapstoreError, OSError):
            store.load(request, token_count)
    with suppress(SnapstoreError, OSError):
        store.detach("gone", 1, store.root.parent / "detached", timeout_s=5)
    store.cleanup_request("gone")


def saves_and_cleans(root: Path, what: str, step: int) -> int:
    """One life of a store, with the swap at that step of it. How many steps there were."""
    files = FaultyFileSystem()
    store = SnapshotStore(root, QUICK, file_system=files)
    work(store, 0)
    wait_until(lambda: not any((store.session / _paths.TRASH).iterdir()))  # else it could not be copied
    with watched(root) as twin:
        target = TARGETS[what](store.session)
        count = swapped_at(files, step, lambda: swap_for_link(target, twin.of(target), root.parent / "aside"))
        work(store, 1)
        store.shutdown(cleanup=True)
        files.heal()
    return count[0]


def starts_beside_leftovers(root: Path, what: str, step: int, leftovers: str) -> int:
    files = FaultyFileSystem()
    target = TARGETS[what](next(root.glob("2*")))
    with watched(root) as twin:
        count = swapped_at(files, step, lambda: swap_for_link(target, twin.of(target), root.parent / "aside"))
        with suppress(SnapstoreError):
            use_leftovers(SnapshotStore(root, StoreOptions(leftovers=leftovers), file_system=files))  # type: ignore[arg-type]
        files.heal()
    return count[0]


def use_leftovers(store: SnapshotStore) -> None:
    """Load what was adopted, if that is what it does, and end."""
    for request in roots.REQUESTS:
        for token_count in store.boundaries(request):
            with suppress(SnapstoreError, OSError):
                store.load(request, token_count)
    store.shutdown(cleanup=True)


STEPS: dict[str, Callable[[Path, str, int], int]] = {
    "save, load, detach, cleanup, shutdown": saves_and_cleans,
    "reclaim": lambda root, what, step: starts_beside_leftovers(root, what, step, "discard"),
    "adopt": lambda root, what, step: starts_beside_leftovers(root, what, step, "adopt"),
}


@pytest.mark.parametrize("what", TARGETS)
@pytest.mark.parametrize("verb", STEPS)
@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_link_that_is_swapped_in_at_any_step_leads_nowhere(
    template: Path, tmp_path: Path, figures: Counter[str], verb: str, what: str, stride: int
) -> None:
    step, steps = 0, 1
    while step < steps:
        folder = tmp_path / str(step)
        folder.mkdir()
        roots.copy_of(template, folder / "root")
        steps = STEPS[verb](folder / "root", what, step)
        shutil.rmtree(folder)
        step += stride
    assert steps > 40
    figures["swaps at a step"] += len(range(0, steps, stride))


# --- thousands of times, beside it ---

_EXCHANGE = 2
_AT_CWD = -100


class Swapper:
    """A thread that exchanges a directory and a link to its twin, until the block ends; the directory stays there."""

    def __init__(self, target: Path, link: Path) -> None:
        self._names = os.fsencode(target), os.fsencode(link)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._thread = threading.Thread(target=self._run, name="swapper")
        self._over = False
        self.swaps = 0

    def __enter__(self) -> Swapper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()

    def _run(self) -> None:
        while not self._over or self.swaps % 2:
            if self._libc.renameat2(_AT_CWD, self._names[0], _AT_CWD, self._names[1], _EXCHANGE) == 0:
                self.swaps += 1
            elif self._over:  # somebody removed the one or the other, as it may be
                return


SWAPS = [400, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]


@contextmanager
def swapping(twin: Twin, target: Path) -> Iterator[Swapper]:
    link = twin.root.parent / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(twin.of(target))
    with Swapper(target, link) as swapper:
        yield swapper


@pytest.mark.parametrize("what", TARGETS)
@pytest.mark.parametrize("swaps", SWAPS)
def test_a_store_at_work_beside_somebody_who_swaps_its_directories(
    root: Path, figures: Counter[str], what: str, swaps: int
) -> None:
    store = SnapshotStore(root, QUICK)
    work(store, 0)
    wait_until(lambda: not any((store.session / _paths.TRASH).iterdir()))  # else it could not be copied
    with watched(root) as twin, swapping(twin, TARGETS[what](store.session)) as swapper:
        rounds = 0
        while swapper.swaps < swaps or rounds < 5:
            rounds += 1
            work(store, rounds)
    figures["swaps beside a store"] += swapper.swaps
    store.save("after", 1, roots.tensors(1)).result(10)
    assert_same(store.load("after", 1), roots.tensors(1))
    store.shutdown(cleanup=True)


def again_and_again(
    template: Path, tmp_path: Path, what: str, swaps: int, act: Callable[[Path], None]
) -> int:
    """``act`` on one root after another, each while somebody swaps in it, until so many swaps were made. How many."""
    made = rounds = 0
    while made < swaps or rounds < 5:
        folder = tmp_path / str(rounds)
        root = roots.copy_of(template, folder / "root")
        with watched(root) as twin, swapping(twin, TARGETS[what](next(root.glob("2*")))) as swapper:
            act(root)
        made, rounds = made + swapper.swaps, rounds + 1
        shutil.rmtree(folder)
    return made


@pytest.mark.parametrize("what", TARGETS)
@pytest.mark.parametrize("leftovers", ["discard", "adopt"])
@pytest.mark.parametrize("swaps", SWAPS)
def test_leftovers_that_somebody_swaps_while_they_are_reclaimed_or_adopted(
    template: Path, tmp_path: Path, figures: Counter[str], what: str, leftovers: str, swaps: int
) -> None:
    def start(root: Path) -> None:
        with suppress(SnapstoreError):
            use_leftovers(SnapshotStore(root, StoreOptions(leftovers=leftovers)))  # type: ignore[arg-type]

    figures["swaps beside a store"] += again_and_again(template, tmp_path, what, swaps, start)


@pytest.mark.parametrize("what", TARGETS)
@pytest.mark.parametrize("swaps", SWAPS)
def test_a_prune_and_a_verification_beside_somebody_who_swaps(
    template: Path, tmp_path: Path, figures: Counter[str], what: str, swaps: int
) -> None:
    def tidy(root: Path) -> None:
        with opened_root(FileSystem(), str(root), to_change=True) as opened:
            verify_root(opened, on_read=lambda _: None, quarantine=True)
            carry_out(opened, make_plan(sessions(opened), surroundings(opened), Rules(), 4e9))

    figures["swaps beside a prune"] += again_and_again(template, tmp_path, what, swaps, tidy)


# --- other users ---

NOBODY = 65534


@pytest.fixture
def open_to_nobody(tmp_path: Path) -> Path:
    """A folder that any user can reach and write in, as ``/tmp`` is."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    for path in tmp_path.parents:  # to pass through, not to list; other tests beside this one need it too
        if path.stat().st_mode & 0o001 == 0:
            path.chmod(path.stat().st_mode & 0o7777 | 0o011)
    tmp_path.chmod(0o1777)
    return tmp_path


def test_another_user_can_neither_look_into_a_root_nor_change_it(open_to_nobody: Path) -> None:
    root = open_to_nobody / "root"
    with SnapshotStore(root) as store:
        store.save("r", 1, roots.tensors(1)).result(10)
        before = roots.everything_in(root)
        (open_to_nobody / "mine").touch()
        attempts = {
            "ls": ("ls", root), "read": ("cat", root / _paths.MARKER), "make": ("touch", root / "x"),
            "rename": ("mv", store.session, root / "y"), "remove": ("rm", "-rf", root),
            "swap": ("mv", root, open_to_nobody / "z"),
        }  # fmt: skip
        for what, words in attempts.items():
            done = subprocess.run(list(map(str, words)), user=NOBODY, group=NOBODY, extra_groups=[], check=False,
                                  capture_output=True)  # fmt: skip
            assert done.returncode != 0 and b"not permitted" in done.stderr.replace(
                b"denied", b"not permitted"
            ), what
        assert (
            subprocess.run(["ls", open_to_nobody], user=NOBODY, check=False, capture_output=True).returncode
            == 0
        )
        assert roots.everything_in(root) == before
        assert_same(store.load("r", 1), roots.tensors(1))
        store.shutdown(cleanup=True)


AS_NOBODY = """if True:
    import os, stat, sys
    import numpy as np
    from pathlib import Path
    from snapstore import SnapshotStore, StoreOptions
    os.setegid(65534)
    os.seteuid(65534)
    os.umask(0o777)
    root = Path(sys.argv[1])
    for leftovers in ("discard", "adopt"):
        store = SnapshotStore(root, StoreOptions(leftovers=leftovers))
        assert store.boundaries("r") == ((1,) if leftovers == "adopt" else ())
        store.save("r", 1, {"x": np.arange(8)}).result(10)
        assert store.load("r", 1).tensors["x"].tolist() == list(range(8))
        for path in (root, store.session, *store.session.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))
        store.shutdown(cleanup=leftovers == "adopt")
"""


def test_a_user_whose_umask_takes_everything_away_can_use_a_root_and_nobody_else(
    open_to_nobody: Path,
) -> None:
    """The permissions of a user count, as root's do not: with this umask even its own directories begin closed."""
    command = [sys.executable, "-c", AS_NOBODY, str(open_to_nobody / "root")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- odd disks and roots ---


def test_names_that_differ_only_in_case_never_meet_in_a_directory(root: Path) -> None:
    """So a disk that does not tell them apart is as good as any."""
    with SnapshotStore(root) as store:
        for request in ("request", "Request", "REQUEST", "straße", "STRASSE"):
            store.save(request, 1, {"x": np.frombuffer(request.encode(), np.uint8)})
        assert store.flush(30)
        for folder, folders, names in os.walk(root):
            inside = [*folders, *names]
            assert len({name.casefold() for name in inside}) == len(inside), folder
        assert store.load("Request", 1).tensors["x"].tobytes() == b"Request"
        store.shutdown(cleanup=True)


def test_a_root_on_another_file_system(tmp_path: Path) -> None:
    """In memory, where there is one: everything works, and detached files are copied across."""
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    root = Path("/dev/shm") / f"snapstore-test-{os.getpid()}"
    try:
        for durability in ("none", "data", "full"):
            store = SnapshotStore(root, StoreOptions(durability=durability, leftovers="adopt"))  # type: ignore[arg-type]
            assert store.boundaries("kept") == (() if durability == "none" else (5,))
            store.save("kept", 5, roots.tensors(5))
            store.save("out", 3, roots.tensors(3))
            moved = store.detach("out", 3, tmp_path / durability, timeout_s=10)
            assert moved.stat().st_size > 3 * 8 * 4 and not store.has("out", 3)
            assert_same(store.load("kept", 5), roots.tensors(5))
            store.shutdown()
        SnapshotStore(root).shutdown(cleanup=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("leftovers", ["discard", "adopt"])
def test_a_root_that_is_removed_and_made_again_by_another_store(root: Path, leftovers: str) -> None:
    store = SnapshotStore(root)
    store.save("before", 1, roots.tensors(1)).result(10)
    shutil.rmtree(root)
    assert store.save("between", 1, roots.tensors(1)).exception(10) is not None
    assert not root.exists(), "nobody makes a root but a store that is opened"
    other = SnapshotStore(root, StoreOptions(leftovers=leftovers))  # type: ignore[arg-type]
    wait_until(lambda: store.save("again", 1, roots.tensors(2)).exception(10) is None)
    assert_same(store.load("again", 1), roots.tensors(2))
    with pytest.raises(SnapstoreError):
        store.load("before", 1)
    third = SnapshotStore(root, StoreOptions(leftovers=leftovers))  # type: ignore[arg-type]
    assert_same(store.load("again", 1), roots.tensors(2))
    assert [each.shutdown(cleanup=True).clean for each in (store, other, third)] == [True] * 3
    assert [path.name for path in root.iterdir()] == [_paths.MARKER]
