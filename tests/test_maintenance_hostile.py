"""Roots made by somebody who means harm: nothing outside is read or removed, and every odd thing is reported.

What lies outside is watched by the kernel (inotify): an open or a read of it is an event, whoever does it and however.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import roots

from snapstore import RootError, _paths
from snapstore._maintenance.plan import Rules, make_plan
from snapstore._maintenance.prune import carry_out
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.survey import sessions, surroundings
from snapstore._maintenance.verify import verify_root
from snapstore.testing import FaultyFileSystem

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="inotify tells what was touched, on Linux alone"
)

COMMANDS = (
    ("ls",),
    ("ls", "--requests"),
    ("ls", "--snapshots"),
    ("stats",),
    ("verify",),
    ("verify", "--quarantine", "--include-live"),
    ("prune", "--dry-run"),
    ("prune", "--yes", "--older-than", "0s", "--request", "*", "--include-live"),
    ("prune", "--yes", "--max-bytes", "0", "--include-live"),
    ("prune", "--yes", "--leftovers"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """A root under attack, and what lies outside it, which must stay as it is."""

    root: Path
    session: Path
    outside: Path
    watch: roots.Watch

    generation: Path

    def twin(self, path: Path) -> Path:
        """What lies outside under the same name."""
        return self.outside / path.relative_to(self.root)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "root"
    roots.killed(root)
    return root


@pytest.fixture
def place(template: Path, root: Path, tmp_path: Path) -> Iterator[Place]:
    """The root of a killed store; outside, another such root and some files."""
    roots.copy_of(template, root)
    outside = roots.copy_of(template, tmp_path / "outside")
    (outside / "1.safetensors").write_bytes(next(outside.rglob("64.safetensors")).read_bytes())
    before = roots.everything_in(outside)
    watch = roots.Watch(outside)
    try:
        session = next(root.glob("2*"))
        yield Place(root, session, outside, watch, min(session.glob("*.g*")))
        assert watch.events() == []
        assert roots.everything_in(outside) == before
    finally:
        watch.close()


def all_commands(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        answer = roots.run(capsys, *command, place.root)
        assert answer.status in (0, 1), answer


def reported(place: Place, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What ``verify`` says is wrong: the kind by the path."""
    answer = roots.run(capsys, "verify", place.root, "--json")
    found = json.loads(answer.out)["findings"]
    wrong = {each["path"]: each["kind"] for each in found if each["wrong"]}
    assert answer.status == (1 if wrong else 0)
    return wrong


def test_the_watch_sees_a_read(place: Place) -> None:
    (place.outside / "1.safetensors").read_bytes()
    assert place.watch.events() != []


# --- links ---


def _swap_for_link(path: Path, target: Path) -> str:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    path.symlink_to(target)
    return path.name


LINKS: dict[str, Callable[[Place], tuple[Path, Path]]] = {
    "a link in the root": lambda place: (place.root / "elsewhere", place.outside),
    "a session": lambda place: (place.root / "20200101T000000Z-1-00000000", place.twin(place.session)),
    "a half-removed session": lambda place: (place.root / _paths.dead_session_name(), place.outside),
    "the quarantine": lambda place: (place.root / _paths.QUARANTINE, place.outside),
    "a generation": lambda place: (place.session / f"{'0' * 32}.g1", place.twin(place.generation)),
    "a snapshot": lambda place: (place.generation / "77.safetensors", place.outside / "1.safetensors"),
    "a dangling snapshot": lambda place: (place.generation / "77.safetensors", Path("/nowhere")),
    "the temporary directory": lambda place: (place.session / _paths.TEMPORARY, place.outside),
    "the trash": lambda place: (place.session / _paths.TRASH, place.outside),
    "a piece of trash": lambda place: (place.session / _paths.TRASH / "0", place.outside),
    "a file being written": lambda place: (
        place.session / _paths.TEMPORARY / "t",
        place.outside / "1.safetensors",
    ),
    "the owner's record": lambda place: (
        place.session / _paths.OWNER_RECORD,
        place.twin(place.session / _paths.OWNER_RECORD),
    ),
    "the owner's lock": lambda place: (
        place.session / _paths.OWNER_LOCK,
        place.twin(place.session / _paths.OWNER_LOCK),
    ),
}


@pytest.mark.parametrize("where", LINKS)
def test_a_link_to_outside_is_reported_and_never_followed(
    place: Place, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    path, target = LINKS[where](place)
    _swap_for_link(path, target)
    assert reported(place, capsys)[path.relative_to(place.root).as_posix()] == "foreign"
    all_commands(place, capsys)
    assert path.is_symlink()


def test_a_root_that_is_a_link_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(place.outside)
    for command in COMMANDS:
        answer = roots.run(capsys, *command, link)
        assert answer.status == 2 and "symbolic link" in answer.err


def test_a_root_that_is_swapped_while_it_is_opened_is_refused(place: Place) -> None:
    files = FaultyFileSystem()

    def swap() -> None:
        place.root.rename(place.root.parent / "swapped-out")
        roots.copy_of(place.root.parent / "swapped-out", place.root)

    files.call("names", swap)
    with pytest.raises(RootError, match="swapped"), opened_root(files, str(place.root)):
        pytest.fail("it was opened")


# --- things that are no files ---


@pytest.mark.parametrize(
    ("kind", "words"),
    [(stat.S_IFIFO, "named pipe"), (stat.S_IFSOCK, "socket"), (stat.S_IFCHR, "character device")],
)
@pytest.mark.parametrize("name", ["0.safetensors", _paths.OWNER_RECORD, _paths.OWNER_LOCK])
def test_pipes_sockets_and_devices_are_reported_and_never_opened(
    place: Place, capsys: pytest.CaptureFixture[str], kind: int, words: str, name: str
) -> None:
    path = place.generation / name if name.endswith(_paths.SUFFIX) else place.session / name
    path.unlink(missing_ok=True)
    try:
        os.mknod(path, kind | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this user may not make device nodes")
    answer = roots.run(capsys, "verify", place.root)
    assert answer.status == 1 and words in answer.out and name in answer.out
    if path.parent == place.session:
        roots.run(capsys, "prune", place.root, "--yes")
        assert len(roots.snapshots_in(place.root)) == 9, "without record and lock nobody knows the owner"
    assert opened_below(place, path.name) == set()
    all_commands(place, capsys)
    assert path.lstat().st_mode == kind | 0o600
    assert path.exists()


def opened_below(place: Place, name: str) -> set[str]:
    """Operations that were made on something of that name, but for asking its status."""
    files = FaultyFileSystem()
    with opened_root(files, str(place.root)) as root:
        list(sessions(root, request_ids=True))
        verify_root(root, on_read=lambda _: None)
    touching = [call for call in files.calls if any(Path(path).name == name for path in call.paths)]
    return {call.operation for call in touching} - {"status_at"}


def test_a_directory_in_the_place_of_a_snapshot_is_left(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = place.generation / "1024.safetensors"
    inside.unlink(missing_ok=True)
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "file").write_text("mine")
    assert reported(place, capsys) == {inside.relative_to(place.root).as_posix(): "foreign"}
    all_commands(place, capsys)
    assert (inside / "deep" / "file").read_text() == "mine"


def test_what_snapstore_did_not_make_stays_at_every_level(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = [folder / "mine.txt" for folder in (place.root, place.session, place.generation)]
    mine += [place.root / "folder" / "mine.txt", place.session / "folder" / "mine.txt"]
    mine += [place.generation / "064.safetensors", place.generation / "-1.safetensors"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert len(reported(place, capsys)) == len(mine)
    all_commands(place, capsys)
    assert all(path.read_text() == "mine" for path in mine)
    assert roots.snapshots_in(place.root) == sorted(
        path.relative_to(place.root).as_posix() for path in mine if path.suffix == _paths.SUFFIX
    )


def test_names_that_are_not_utf_8_are_shown_escaped_and_stay(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (place.root, place.session, place.generation):
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe\x1b[31m")).write_text("mine")
    wrong = reported(place, capsys)
    assert len(wrong) == 3 and all(path.endswith(r"\xff\xfe\x1b[31m") for path in wrong)
    for command in COMMANDS:
        answer = roots.run(capsys, *command, place.root)
        assert answer.status in (0, 1) and "\x1b" not in answer.out + answer.err
    assert sum(os.fsencode(path).endswith(b"\xff\xfe\x1b[31m") for path in place.root.rglob("*")) == 3


# --- files that lie ---

LIES: dict[str, bytes] = {
    "0 bytes": b"",
    "7 bytes": bytes(7),
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "a header of 100 MB": (100_000_000).to_bytes(8, "little") + b"{}",
    "100,000 brackets": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "100,000 objects": (500_000).to_bytes(8, "little") + b'{"a":' * 100_000,
    "a number of 90,000 digits": (90_004).to_bytes(8, "little") + b'{"a":' + b"9" * 89_998 + b"}",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_corrupt_and_goes_aside(
    place: Place, capsys: pytest.CaptureFixture[str], lie: str
) -> None:
    path = place.generation / "77.safetensors"
    path.write_bytes(LIES[lie])
    name = path.relative_to(place.root).as_posix()
    assert reported(place, capsys) == {name: "corrupt"}
    for command in (
        ("ls", "--snapshots"),
        ("ls", "--requests"),
        ("stats",),
        ("prune", "--dry-run", "--request", "*"),
    ):
        assert roots.run(capsys, *command, place.root).status == 0
    answer = roots.run(capsys, "inspect", path)
    assert answer.status == 1 and "corrupt" in answer.err
    assert roots.run(capsys, "verify", place.root, "--quarantine").status == 1
    (aside,) = (place.root / _paths.QUARANTINE).iterdir()
    assert aside.read_bytes() == LIES[lie] and not path.exists()
    assert place.session.name in aside.name and aside.name.endswith("77.safetensors")
    assert reported(place, capsys) == {}


def test_a_file_of_a_tebibyte_that_was_never_written_is_not_read(
    place: Place, capsys: pytest.CaptureFixture[str], deadline: Callable[[float], object]
) -> None:
    real = place.generation / "64.safetensors"
    honest = place.generation / "77.safetensors"
    honest.write_bytes(_header_of_one_tensor(2**40 - 4096))
    for path in (honest, place.generation / "78.safetensors"):
        with path.open("ab") as file:
            file.truncate(2**40)
    with deadline(5):  # type: ignore[attr-defined]
        wrong = reported(place, capsys)
        answer = roots.run(capsys, "inspect", "--stats", honest)
        assert answer.status == 1 and "were ever written" in answer.err
        all_commands(place, capsys)
    assert len(wrong) == 2 and set(wrong.values()) == {"corrupt"}
    assert not real.exists()


def _header_of_one_tensor(nbytes: int) -> bytes:
    """What a writer would have put before so many bytes of one tensor."""
    from snapstore._format import Facts, Layout, TensorSpec, encode_header

    layout = Layout.of([TensorSpec("x", "U8", (nbytes,))])
    header = encode_header(layout, Facts("alpha", 77, 1, "numpy", "null"), "0" * 16)
    filler = nbytes + 4096 - len(header)
    layout = Layout.of([TensorSpec("x", "U8", (filler,))])
    return encode_header(layout, Facts("alpha", 77, 1, "numpy", "null"), "0" * 16)


def test_a_snapshot_under_another_ones_name_is_corrupt(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    other = sorted(place.session.glob("*.g*"))[1]
    shutil.copy(place.generation / "64.safetensors", place.generation / "65.safetensors")
    shutil.copy(place.generation / "64.safetensors", other / "64.safetensors")
    wrong = reported(place, capsys)
    assert set(wrong.values()) == {"corrupt"}
    assert set(wrong) == {
        (path / name).relative_to(place.root).as_posix()
        for path, name in ((place.generation, "65.safetensors"), (other, "64.safetensors"))
    }


def test_a_file_that_names_another_request_does_not_lend_its_name(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    other = sorted(place.session.glob("*.g*"))[1]
    for path in place.generation.iterdir():
        path.write_bytes((other / path.name).read_bytes())
    rows = json.loads(roots.run(capsys, "ls", "--requests", "--json", place.root).out)["rows"]
    assert [row["request"] for row in rows].count(None) == 1
    assert len({row["request"] for row in rows}) == len(rows) == 3


def test_a_hard_link_is_reported_and_frees_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    precious = place.root.parent / "precious"
    precious.write_bytes((place.generation / "64.safetensors").read_bytes())
    linked = place.generation / "64.safetensors"
    linked.unlink()
    os.link(precious, linked)
    size = precious.stat().st_blocks * 512
    assert reported(place, capsys) == {linked.relative_to(place.root).as_posix(): "linked"}
    dry = json.loads(roots.run(capsys, "prune", place.root, "--dry-run", "--json").out)
    done = json.loads(roots.run(capsys, "prune", place.root, "--yes", "--json").out)
    assert done["freed_bytes"] == dry["freed_bytes"]
    freed = {each["path"]: each["freed_bytes"] for each in dry["removals"]}
    assert freed[linked.relative_to(place.root).as_posix()] == 0
    assert precious.stat().st_nlink == 1 and precious.stat().st_blocks * 512 == size


@pytest.mark.parametrize("record", [b"", b"[]", b"nul", b"\xff", b"[" * 4000, b'{"pid": NaN}', b"9" * 4096])
def test_a_record_that_is_none_makes_the_owner_unknown_and_nothing_goes(
    place: Place, capsys: pytest.CaptureFixture[str], record: bytes
) -> None:
    (place.session / _paths.OWNER_RECORD).write_bytes(record)
    before = roots.everything_in(place.root)
    listed = json.loads(roots.run(capsys, "ls", place.root, "--json").out)
    assert [row["owner"] for row in listed["rows"]] == ["unknown"]
    assert roots.run(capsys, "prune", place.root, "--yes").status == 0
    assert roots.run(capsys, "prune", place.root, "--yes", "--older-than", "0s").status == 0
    assert roots.everything_in(place.root) == before


def test_a_record_with_odd_values_is_shown_as_text(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.session / _paths.OWNER_RECORD
    record = json.loads(path.read_text())
    path.write_text(
        json.dumps({**record, "host": "\x1b]0;owned\x07", "pid": 10**30, "opened_at_s": float("nan")})
    )
    answer = roots.run(capsys, "ls", place.root)
    assert answer.status == 0 and "\x1b" not in answer.out and "owned" in answer.out
    path.write_text(json.dumps({**record, "host": ["a"]}))
    assert roots.run(capsys, "ls", place.root).status == 0


def test_directories_nested_without_end_are_left_and_reported(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = place.session / _paths.TRASH / "d"
    (deep / "/".join("d" * 200)).mkdir(parents=True)
    answer = roots.run(capsys, "prune", place.root, "--yes")
    assert answer.status == 1 and "nested too deep" in answer.err
    assert roots.snapshots_in(place.root) == [] and deep.exists()
    all_commands(place, capsys)


# --- swapped while it works ---

SWAPS = {
    "the root": lambda place: place.root,
    "the session": lambda place: place.session,
    "a generation": lambda place: place.generation,
    "the trash": lambda place: place.session / _paths.TRASH,
    "the temporary directory": lambda place: place.session / _paths.TEMPORARY,
}


@pytest.mark.parametrize(
    "operation", ["open_directory", "names", "status_at", "unlink", "remove_directory", "rename"]
)
@pytest.mark.parametrize("what", SWAPS)
@pytest.mark.parametrize("skip", [0, 2, 5])
def test_whatever_is_swapped_for_a_link_during_the_prune_nothing_outside_is_touched(
    place: Place, what: str, operation: str, skip: int
) -> None:
    files = FaultyFileSystem()
    swapped: list[str] = []
    path = SWAPS[what](place)
    target = place.twin(path)

    def swap() -> None:
        assert not path.is_symlink()
        swapped.append(what)
        if path.exists():
            path.rename(place.root.parent / "swapped-out")
        path.symlink_to(target)

    with opened_root(files, str(place.root), to_change=True) as root:
        plan = make_plan(sessions(root), surroundings(root), Rules(), 4e9)
        files.call(operation, swap, skip=skip)
        carry_out(root, plan)
    assert swapped or skip > 0


@pytest.mark.parametrize("operation", ["open_directory", "names", "status_at", "open_read"])
@pytest.mark.parametrize("skip", [0, 1, 3, 8])
def test_swapped_during_a_verification_nothing_outside_is_read(
    place: Place, operation: str, skip: int
) -> None:
    files = FaultyFileSystem()

    def swap() -> None:
        place.generation.rename(place.root.parent / "swapped-out")
        place.generation.symlink_to(place.twin(place.generation))

    with opened_root(files, str(place.root), to_change=True) as root:
        files.call(operation, swap, skip=skip)
        verify_root(root, on_read=lambda _: None, quarantine=True)


# --- mounts ---

IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def _may_mount() -> bool:
    try:
        return subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "where",
    ["2*", "2*/*.g*", f"2*/{_paths.TRASH}", f"2*/{_paths.TRASH}/*", f"2*/{_paths.TEMPORARY}"],
)
def test_a_bind_mount_of_the_same_device_is_not_crossed(place: Place, where: str) -> None:
    """In a mount namespace of its own, which needs no rights."""
    if not _may_mount():
        pytest.skip("no user namespaces here")
    path = min(each for each in place.root.glob(where) if each.is_dir())
    target = place.twin(path)
    assert target.stat().st_dev == path.stat().st_dev, "the point is that st_dev does not tell"
    for command in ("prune --yes", "prune --yes --older-than 0s --include-live", "verify --quarantine"):
        script = f"mount --bind '{target}' '{path}' && exec '{sys.executable}' -m snapstore {command} '{place.root}'"
        done = subprocess.run(
            [*IN_A_NAMESPACE, "sh", "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done
        assert "another file system is mounted" in done.stdout + done.stderr
    opened = f"{roots.Watch.OPEN | roots.Watch.DIRECTORY:#x}"
    touched = [event for event in place.watch.events() if not event.startswith(opened)]
    assert touched == [], "a directory is opened, to see its mount, and then neither listed nor read"


@pytest.mark.parametrize("leftovers", ["discard", "adopt"])
@pytest.mark.parametrize("where", ["2*", "2*/*.g*", f"2*/{_paths.TRASH}"])
def test_a_store_that_starts_beside_a_bind_mount_does_not_empty_it(
    place: Place, leftovers: str, where: str
) -> None:
    """What is mounted there is only read, and that by a store which adopts what it takes for its own."""
    if not _may_mount():
        pytest.skip("no user namespaces here")
    path = min(each for each in place.root.glob(where) if each.is_dir())
    source = f"""if True:
        from snapstore import SnapshotStore, StoreOptions
        store = SnapshotStore({str(place.root)!r}, StoreOptions(leftovers={leftovers!r}))
        store.save("new", 1, {{}}).result(10)
        assert store.shutdown(cleanup=True).writer_stopped
    """
    done = subprocess.run(
        [*IN_A_NAMESPACE, "sh", "-c", 'mount --bind "$1" "$2" && exec "$3" -c "$4"', "sh",
         str(place.twin(path)), str(path), sys.executable, source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    removing = roots.Watch.DELETE | roots.Watch.MOVE | roots.Watch.MODIFY | roots.Watch.CREATE
    touched = [event for event in place.watch.events() if int(event.split()[0], 16) & removing]
    assert touched == []


def test_a_root_that_can_only_be_read_is_looked_at_and_nothing_is_half_removed(place: Place) -> None:
    if not _may_mount():
        pytest.skip("no user namespaces here")
    before = roots.everything_in(place.root)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
        arguments = [str(place.root), sys.executable, "-m", "snapstore", *words, str(place.root)]
        return subprocess.run(
            [*IN_A_NAMESPACE, "sh", "-c", script, "sh", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    for words in (("ls",), ("ls", "--requests"), ("verify",), ("prune", "--dry-run")):
        done = command(*words)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert words != ("ls",) or "dead" in done.stdout
    for words in (("prune", "--yes"), ("doctor",)):
        done = command(*words)
        assert done.returncode == 1 and "Read-only file system" in done.stdout + done.stderr
    assert roots.everything_in(place.root) == before
