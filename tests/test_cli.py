"""What the command says and does, on roots made by real stores: status and outputs, for people and programs."""

from __future__ import annotations

import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roots
from helpers import assert_same

import snapstore
from snapstore import SnapshotStore, StoreOptions, _paths
from snapstore._files import FileSystem
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.verify import verify_root
from snapstore._owner import OwnerLock
from snapstore.testing import FaultyFileSystem

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "root"
    roots.killed(root)
    return root


@pytest.fixture
def dead(template: Path, root: Path) -> Path:
    """A root with the session of a killed process."""
    return roots.copy_of(template, root)


@pytest.fixture
def both(dead: Path) -> Iterator[SnapshotStore]:
    """That, and a live store beside it."""
    with SnapshotStore(dead, StoreOptions(leftovers="keep")) as store:
        for number in range(2):
            store.save(f"live-{number}", 10, roots.tensors(10))
        assert store.flush(30)
        yield store
        store.shutdown(cleanup=True)


def as_json(capsys: Capture, *arguments: object, status: int = 0) -> dict[str, Any]:
    """The one object that a command prints; integers for bytes and seconds."""
    answer = roots.run(capsys, *arguments, "--json")
    assert answer.status == status, answer
    assert answer.out.count("\n") == 1
    found: dict[str, Any] = json.loads(answer.out)
    assert found["schema"] == 1 and found["command"] == arguments[0]
    _assert_whole_numbers(found)
    return found


def _assert_whole_numbers(value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _assert_whole_numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            _assert_whole_numbers(inner, name)
    elif re.search(r"bytes|_s$|_us$|seconds|count", name) and value is not None:
        assert type(value) is int, name


# --- ls ---


def test_ls_shows_sessions_and_their_owners(both: SnapshotStore, capsys: Capture) -> None:
    answer = roots.run(capsys, "ls", both.root)
    assert answer.status == 0 and answer.err == ""
    title, killed, live, summary = answer.out.splitlines()
    assert title.split() == ["SESSION", "AGE", "OWNER", "REQUESTS", "SNAPSHOTS", "SIZE"]
    host = os.uname().nodename
    assert re.search(rf"  dead  \d+@{host} +3 +9 ", killed)
    assert live.startswith(both.session.name) and f"  alive  {os.getpid()}@{host}" in live
    assert re.fullmatch(r"11 snapshots in 2 sessions, \S+ KiB on disk", summary)


def test_ls_as_json(both: SnapshotStore, capsys: Capture) -> None:
    found = as_json(capsys, "ls", both.root)
    killed, live = found["rows"]
    assert found["rows_are"] == "sessions" and found["total"] == 2 and found["findings"] == 0
    assert live == {
        "session": both.session.name, "age_s": live["age_s"], "owner": "alive", "pid": os.getpid(),
        "host": os.uname().nodename, "requests": 2, "snapshots": 2, "findings": 0,
        "disk_bytes": sum(path.stat().st_blocks * 512 for path in both.session.rglob("*.safetensors")),
    }  # fmt: skip
    assert killed["owner"] == "dead" and killed["snapshots"] == 9


def test_ls_takes_request_ids_from_the_files(both: SnapshotStore, capsys: Capture) -> None:
    found = as_json(capsys, "ls", both.root, "--requests")
    assert [row["request"] for row in found["rows"]] == [*roots.REQUESTS, "live-0", "live-1"]
    alpha = found["rows"][0]
    assert (alpha["snapshots"], alpha["tokens"], alpha["generation"]) == (3, max(roots.TOKENS), 1)
    found = as_json(capsys, "ls", both.root, "--snapshots")
    assert [(row["request"], row["tokens"]) for row in found["rows"][:3]] == [
        ("alpha", n) for n in roots.TOKENS
    ]
    assert all((both.root / row["path"]).stat().st_blocks * 512 == row["disk_bytes"] for row in found["rows"])


def test_a_request_whose_files_do_not_tell_is_listed_by_its_hash(dead: Path, capsys: Capture) -> None:
    for path in dead.glob("2*/*.g1/*.safetensors"):
        path.write_bytes(b"torn")
    hashed = next(dead.glob("2*/*.g1")).name.partition(".")[0]
    assert f"? {hashed}" in roots.run(capsys, "ls", dead, "--requests").out
    assert as_json(capsys, "ls", dead, "--requests")["rows"][0]["request"] is None


def test_a_damaged_file_does_not_hide_the_request_of_its_neighbours(dead: Path, capsys: Capture) -> None:
    next(dead.glob(f"2*/*.g1/{min(roots.TOKENS)}.safetensors")).write_bytes(b"torn")
    (next(dead.glob("2*/*.g1")) / "0.safetensors").write_bytes(b"torn")
    assert as_json(capsys, "ls", dead, "--requests")["rows"][0]["request"] == "alpha"


@pytest.mark.parametrize(
    "request_id",
    [
        "\x1b[2J\x1b]0;owned\x07",
        "[red]markup[/red]",
        "line\nbreak",
        "\u202egnp.exe",
        "日本",
        "a" * 3000,
        "",
        " ",
        "\0",
    ],
)
def test_any_request_id_is_shown_escaped_and_told_to_programs_as_it_is(
    root: Path, capsys: Capture, request_id: str
) -> None:
    with SnapshotStore(root) as store:
        store.save(request_id, 1, roots.tensors(1)).result(30)
        for command in (("ls", "--requests"), ("ls", "--snapshots"), ("inspect",)):
            extra = (request_id,) if command == ("inspect",) else ()
            answer = roots.run(capsys, *command, root, *extra)
            assert answer.status == 0
            assert all(each.isprintable() for each in answer.out.split("\n"))
            if request_id.isprintable():
                assert request_id.rstrip() in answer.out
        assert as_json(capsys, "ls", root, "--requests")["rows"][0]["request"] == request_id
        assert as_json(capsys, "inspect", root, request_id)["request"] == request_id


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ((), 11),
        (("owner=dead",), 9),
        (("owner!=dead",), 2),
        (("owner=dead", "tokens>=128"), 6),
        (("size>16KiB",), 3),
        (("size<=16KiB", "owner=dead", "tokens<65"), 3),
        (("request=live-*",), 2),
        (("request!=live-*", "tokens=64"), 3),
        (("age<1h",), 11),
        (("age>100d",), 0),
        (("session=*",), 11),
        (("generation=1",), 4),
    ],
)
def test_filters_combine(
    both: SnapshotStore, capsys: Capture, filters: tuple[str, ...], expected: int
) -> None:
    arguments = ("--filter", *filters) if filters else ()
    assert as_json(capsys, "ls", "--snapshots", *arguments, "--root", both.root)["total"] == expected
    assert as_json(capsys, "ls", both.root, "--snapshots", *arguments)["total"] == expected
    repeated = [each for one in filters for each in ("--filter", one)]
    assert as_json(capsys, "ls", *repeated, both.root, "--snapshots")["total"] == expected


@pytest.mark.parametrize(
    "wrong",
    [
        ("--filter", "age>5"), ("--filter", "age>-5m"), ("--filter", "size>1x"), ("--filter", "colour=red"),
        ("--filter", "owner>dead"), ("--filter", "tokens=1"), ("--filter", "age"), ("--filter", ""),
        ("--sort", "colour"), ("--sort", "tokens"), ("--limit", "-1"), ("--filter",), ("--filter", "requests=1.5"),
    ],
)  # fmt: skip
def test_filters_and_fields_that_are_none_are_usage_errors(
    dead: Path, capsys: Capture, wrong: tuple[str, ...]
) -> None:
    answer = roots.run(capsys, "ls", dead, *wrong)
    assert answer.status == 2 and answer.out == "" and "Error" in answer.err


def test_sort_and_limit(dead: Path, capsys: Capture) -> None:
    rows = as_json(capsys, "ls", dead, "--snapshots", "--sort", "-size")["rows"]
    sizes = [row["disk_bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1
    found = as_json(capsys, "ls", dead, "--snapshots", "--sort", "tokens", "--limit", "4")
    assert [row["tokens"] for row in found["rows"]] == [64, 64, 64, 128] and found["total"] == 9
    assert "... and 5 more" in roots.run(capsys, "ls", dead, "--snapshots", "--limit", "4").out


# --- inspect ---


def test_inspect_shows_a_file(both: SnapshotStore, capsys: Capture) -> None:
    ticket = both.save("r", 5, roots.tensors(5), metadata={"model": "m", "layers": [1, 2]})
    path = ticket.result(30).path
    found = as_json(capsys, "inspect", path)
    assert (found["request"], found["tokens"], found["framework"]) == ("r", 5, "numpy")
    assert found["metadata"] == {"model": "m", "layers": [1, 2]} and found["checksums"] is True
    shapes = {each["name"]: (each["dtype"], each["shape"], each["bytes"]) for each in found["tensors"]}
    assert shapes == {"ssm": ("F32", [5, 8], 160), "conv": ("I8", [7], 7)}
    assert found["tensor_bytes"] == 167 and found["file_bytes"] == path.stat().st_size
    text = roots.run(capsys, "inspect", path).out
    assert "2 tensors, 167 B (167 bytes)" in text and '{"model": "m", "layers": [1, 2]}' in text


def test_inspect_finds_the_latest_boundary_or_the_one_asked_for(dead: Path, capsys: Capture) -> None:
    found = as_json(capsys, "inspect", dead, "beta")
    assert found["tokens"] == max(roots.TOKENS) and found["boundaries"] == list(roots.TOKENS)
    found = as_json(capsys, "inspect", dead, "beta", "128")
    assert found["tokens"] == 128 and found["metadata"] == {"of": "beta"}
    assert as_json(capsys, "inspect", "--root", dead, "beta", "64")["tokens"] == 64
    for missing in (("nobody",), ("beta", "65"), ("forgotten",)):
        answer = roots.run(capsys, "inspect", dead, *missing)
        assert answer.status == 1 and "no such snapshot" in answer.err


def test_inspect_reads_the_header_alone(dead: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    from snapstore._files import FileSystem

    really = FileSystem.read_into

    def counted(self: FileSystem, fd: int, buffer: memoryview, offset: int) -> int:
        read.append(really(self, fd, buffer, offset))
        return read[-1]

    monkeypatch.setattr(FileSystem, "read_into", counted)
    path = next(dead.glob(f"2*/*/{max(roots.TOKENS)}.safetensors"))
    found = as_json(capsys, "inspect", path)
    assert sum(read) < 2 * found["header_bytes"] + 4096 < found["file_bytes"]


def test_inspect_with_stats_looks_at_the_values(root: Path, capsys: Capture) -> None:
    import ml_dtypes

    tensors = {
        "f32": np.array([1.5, np.nan, -2.25, np.nan], np.float32),
        "f16": np.array([np.inf, -np.inf], np.float16),
        "bf16": np.array([0.5, -3, np.nan], ml_dtypes.bfloat16),
        "fp8": np.array([0.5, -1.5], ml_dtypes.float8_e4m3fn),
        "i64": np.array([[2**62, -5]], np.int64),
        "bool": np.array([True, False]),
        "c64": np.array([1 + 2j, complex(np.nan, 0)], np.complex64),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(7, np.uint8),
        "all nan": np.full(3, np.nan, np.float64),
        "large": np.arange(3_000_000, dtype=np.float32) - 7,
    }
    with SnapshotStore(root) as store:
        path = store.save("r", 1, tensors).result(30).path
        found = as_json(capsys, "inspect", path, "--stats")
        values = {each["name"]: each["values"] for each in found["tensors"]}
        assert values == {
            "f32": {"least": -2.25, "greatest": 1.5, "nans": 2},
            "f16": {"least": "-inf", "greatest": "inf", "nans": 0},
            "bf16": {"least": -3.0, "greatest": 0.5, "nans": 1},
            "fp8": {"least": -1.5, "greatest": 0.5, "nans": 0},
            "i64": {"least": -5, "greatest": 2**62, "nans": 0},
            "bool": {"least": False, "greatest": True, "nans": 0},
            "c64": {"least": None, "greatest": None, "nans": 1},
            "empty": {"least": None, "greatest": None, "nans": 0},
            "scalar": {"least": 7, "greatest": 7, "nans": 0},
            "all nan": {"least": None, "greatest": None, "nans": 3},
            "large": {"least": -7.0, "greatest": 2_999_992.0, "nans": 0},
        }
        assert all(each["values"] is None for each in as_json(capsys, "inspect", path)["tensors"])
        text = roots.run(capsys, "inspect", path, "--stats").out
        assert re.search(r"f32 +F32 +4 +16 B +-2\.25 +1\.5 +2", text)


def test_inspect_of_a_file_that_snapstore_did_not_write(tmp_path: Path, capsys: Capture) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((2, 2), np.float32)}, path)
    found = as_json(capsys, "inspect", path)
    assert found["request"] is None and found["tensor_bytes"] == 16
    assert "not snapstore" in roots.run(capsys, "inspect", path).out


def test_inspect_with_a_link_or_the_wrong_words_is_refused(
    dead: Path, tmp_path: Path, capsys: Capture
) -> None:
    link = tmp_path / "link"
    link.symlink_to(next(dead.glob("2*/*/64.safetensors")))
    assert roots.run(capsys, "inspect", link).status == 1
    for wrong in ((), (dead,), (dead, "a", "b"), (dead, "a", "-1"), (dead, "a", "1", "2")):
        assert roots.run(capsys, "inspect", *wrong).status == 2
    two = roots.run(capsys, "inspect", *dead.glob("2*/*.g[12]/64.safetensors"))
    assert two.status == 2 and "one file alone" in two.err
    assert roots.run(capsys, "inspect", tmp_path / "nothing", "a").status == 10


# --- verify ---


def test_verify_of_a_sound_root(both: SnapshotStore, capsys: Capture) -> None:
    answer = roots.run(capsys, "verify", both.root)
    assert answer.status == 0
    assert re.search(r"Checked 11 snapshots, \d+ KiB at .*/s: all sound", answer.last_line)
    assert re.search(r"^temporary .* being written", answer.out, re.MULTILINE)
    assert re.search(r"^trash .* forgotten", answer.out, re.MULTILINE)
    found = as_json(capsys, "verify", both.root)
    assert (found["checked"], found["wrong"], found["without_checksums"]) == (11, 0, 0)
    assert sorted(each["kind"] for each in found["findings"]) == ["temporary", "trash"]


@pytest.mark.parametrize("damage", ["the first byte", "the last byte", "cut", "grow", "the header"])
def test_verify_finds_any_damage(dead: Path, capsys: Capture, damage: str) -> None:
    path = next(dead.glob("2*/*.g2/128.safetensors"))
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little") + 8
    if damage == "cut":
        del content[-1:]
    elif damage == "grow":
        content += b"x"
    else:
        content[{"the last byte": -1, "the header": 300}.get(damage, size)] ^= 1
    path.write_bytes(content)
    found = as_json(capsys, "verify", dead, status=1)
    (wrong,) = (each for each in found["findings"] if each["wrong"])
    assert (wrong["kind"], dead / wrong["path"]) == ("corrupt", path)
    assert found["checked"] == 9 and found["wrong"] == 1
    assert as_json(capsys, "verify", path, status=1)["wrong"] == 1
    answer = roots.run(capsys, "verify", dead)
    assert answer.status == 1 and answer.last_line.endswith(": 1 corrupt")


def test_verify_of_one_file(dead: Path, capsys: Capture) -> None:
    path = next(dead.glob("2*/*.g2/128.safetensors"))
    assert as_json(capsys, "verify", path)["checked"] == 1
    assert roots.run(capsys, "verify", path, "--quarantine").status == 2
    assert roots.run(capsys, "verify", dead.parent / "nothing").status == 10


def test_quarantine_moves_aside_what_is_corrupt_and_nothing_else(dead: Path, capsys: Capture) -> None:
    path = next(dead.glob("2*/*.g2/128.safetensors"))
    path.write_bytes(b"torn")
    foreign = path.with_name("mine.txt")
    foreign.write_text("mine")
    before = roots.snapshots_in(dead)
    found = as_json(capsys, "verify", dead, "--quarantine", status=1)
    assert (found["quarantined"], found["kept"]) == (1, 0)
    assert set(before) - set(roots.snapshots_in(dead)) == {path.relative_to(dead).as_posix()}
    (aside,) = (dead / _paths.QUARANTINE).iterdir()
    assert aside.read_bytes() == b"torn" and foreign.read_text() == "mine"
    assert (dead / _paths.QUARANTINE).stat().st_mode & 0o777 == 0o700
    again = as_json(capsys, "verify", dead, "--quarantine", status=1)
    assert again["quarantined"] == 0
    assert {each["kind"] for each in again["findings"] if not each["wrong"]} == {
        "quarantined",
        "temporary",
        "trash",
    }
    roots.run(capsys, "prune", dead, "--yes")
    assert aside.read_bytes() == b"torn"


def test_quarantine_leaves_live_sessions_alone_unless_told_otherwise(
    both: SnapshotStore, capsys: Capture
) -> None:
    path = both.save("r", 5, roots.tensors(5)).result(30).path
    path.write_bytes(b"torn")
    assert as_json(capsys, "verify", both.root, "--quarantine", status=1)["kept"] == 1
    assert path.exists()
    assert (
        as_json(capsys, "verify", both.root, "--quarantine", "--include-live", status=1)["quarantined"] == 1
    )
    assert not path.exists()
    assert roots.run(capsys, "verify", both.root, "--include-live").status == 2


@pytest.mark.parametrize("operation", ["make_directory", "rename"])
def test_quarantine_leaves_a_snapshot_that_was_saved_again_meanwhile(
    both: SnapshotStore, operation: str
) -> None:
    both.save("r", 5, roots.tensors(5)).result(30).path.write_bytes(b"torn")
    files = FaultyFileSystem()
    files.call(operation, lambda: both.save("r", 5, roots.tensors(6)).result(30) and None)
    with opened_root(files, str(both.root)) as root:
        report = verify_root(root, on_read=lambda _: None, quarantine=True, include_live=True)
    assert report.quarantined == 0 and len(report.wrong) == 1
    assert_same(both.load("r", 5), roots.tensors(6))


def test_a_snapshot_of_a_newer_format_is_not_corrupt_and_stays(dead: Path, capsys: Capture) -> None:
    path = next(dead.glob("2*/*.g2/128.safetensors"))
    _claim_newer_format(path)
    found = as_json(capsys, "verify", dead, "--quarantine", status=1)
    (wrong,) = (each for each in found["findings"] if each["wrong"])
    assert wrong["kind"] == "newer" and "upgrade" in wrong["why"]
    assert path.exists() and found["quarantined"] == 0


def _claim_newer_format(path: Path) -> None:
    from snapstore._checksum import checksum_around

    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little") + 8
    header = content[:size].replace(b'"snapstore.format":"1"', b'"snapstore.format":"9"')
    assert header != content[:size]
    at = header.index(b'"snapstore.header_checksum":"') + len(b'"snapstore.header_checksum":"')
    seal = checksum_around(memoryview(header), at)
    path.write_bytes(header[:at] + seal + header[at + len(seal) :] + content[size:])


def test_files_without_checksums_are_counted(root: Path, capsys: Capture) -> None:
    with SnapshotStore(root, StoreOptions(checksum=False)) as store:
        store.save("r", 1, roots.tensors(1)).result(30)
        assert as_json(capsys, "verify", root)["without_checksums"] == 1
        assert "without checksums" in roots.run(capsys, "verify", root).out


# --- prune ---


def test_prune_says_what_it_did_in_its_last_line(both: SnapshotStore, capsys: Capture) -> None:
    answer = roots.run(capsys, "prune", both.root, "--older-than", "0s", "--yes")
    assert answer.status == 0
    expected = r"Reclaimed \d+ KiB from 9 snapshots in 3 requests \(2 skipped: in use\)"
    assert re.fullmatch(expected, answer.last_line)
    assert answer.out.count("\n") == 1, "quiet when piped"
    assert as_json(capsys, "ls", both.root)["total"] == 1
    again = roots.run(capsys, "prune", both.root, "--yes")
    assert again.last_line == "Reclaimed 0 B from 0 snapshots in 0 requests"


def test_the_dry_run_is_the_very_plan(dead: Path, capsys: Capture) -> None:
    rules = ("--keep-latest", "1", "--request", "[ab]*", "--by", "mtime")
    before = roots.everything_in(dead)
    dry = as_json(capsys, "prune", dead, *rules, "--dry-run")
    assert roots.everything_in(dead) == before
    text = roots.run(capsys, "prune", dead, *rules, "--dry-run")
    assert all(each["path"] in text.out for each in dry["removals"])
    assert re.fullmatch(r"Would reclaim \S+ KiB from 4 snapshots in 2 requests", text.last_line)
    done = as_json(capsys, "prune", dead, *rules, "--yes")
    gone = set(before) - set(roots.everything_in(dead))
    assert gone == {each["path"] for each in dry["removals"]} and len(gone) == 4
    assert (done["freed_bytes"], done["snapshots"], done["requests"]) == (
        dry["freed_bytes"], dry["snapshots"], dry["requests"],
    )  # fmt: skip
    assert (dry["dry_run"], done["dry_run"]) == (True, False)


def test_rules_from_the_command_line_reach_the_plan(dead: Path, capsys: Capture) -> None:
    session = next(dead.glob("2*")).name

    def going(*rules: str) -> int:
        return int(as_json(capsys, "prune", dead, "--dry-run", *rules, status=0)["snapshots"])

    assert going() == going("--leftovers") == going("--session", session) == 9
    assert going("--older-than", "1d") == 0
    assert going("--max-bytes", "1GiB") == 0
    assert going("--request", "alpha") == 3
    assert going("--keep-latest", "2") == 3
    os.utime(next(dead.glob("2*/*.g1/64.safetensors")), (1, 1))
    os.utime(next(dead.glob("2*/*.g2/64.safetensors")), (1, 2_000_000_000))
    assert going("--older-than", "1d") == 1
    assert going("--older-than", "1d", "--by", "atime") == 2


def test_max_bytes_that_can_not_be_met_is_a_problem(both: SnapshotStore, capsys: Capture) -> None:
    answer = roots.run(capsys, "prune", both.root, "--max-bytes", "0", "--yes")
    assert answer.status == 1
    assert "over --max-bytes" in answer.err and "(2 skipped: in use)" in answer.last_line
    assert roots.run(capsys, "prune", both.root, "--max-bytes", "1MiB", "--yes").status == 0


@pytest.mark.parametrize(
    "wrong",
    [
        (), ("--older-than", "1h"), ("--json",), ("--older-than", "-5m", "--yes"), ("--older-than", "", "--yes"),
        ("--max-bytes", "1x", "--yes"), ("--keep-latest", "0", "--yes"), ("--by", "ctime", "--yes"),
        ("--include-live", "--yes"), ("--include-live", "--leftovers", "--yes"), ("--session", "nobody", "--yes"),
        ("--session", "../outside", "--yes"), ("--nonsense",), ("one", "two"),
    ],
)  # fmt: skip
def test_wrong_usage_removes_nothing(dead: Path, capsys: Capture, wrong: tuple[str, ...]) -> None:
    before = roots.everything_in(dead)
    answer = roots.run(capsys, "prune", dead, *wrong)
    assert answer.status == 2 and "Error" in answer.err and answer.out == ""
    assert roots.everything_in(dead) == before


def test_an_owner_on_another_machine_is_unknown_and_left(dead: Path, capsys: Capture) -> None:
    record = next(dead.glob(f"2*/{_paths.OWNER_RECORD}"))
    there = {**json.loads(record.read_text()), "host": "elsewhere", "boot_id": "another"}
    record.write_text(json.dumps(there))
    assert as_json(capsys, "ls", dead)["rows"][0]["owner"] == "unknown"
    answer = roots.run(capsys, "prune", dead, "--yes", "--older-than", "0s")
    assert answer.last_line == "Reclaimed 0 B from 0 snapshots in 0 requests (9 skipped: in use)"
    assert as_json(capsys, "prune", dead, "--yes", "--older-than", "0s", "--include-live")["snapshots"] == 9
    assert record.exists(), "directories of owners who may live stay"


def test_prune_refuses_what_nobody_should_tidy(
    dead: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = _paths.MARKER
    repository, bare, plain = tmp_path / "repository", tmp_path / "bare", tmp_path / "plain"
    for folder, names in ((repository, [".git"]), (bare, ["HEAD", "objects", "refs"]), (plain, [])):
        for name in names:
            (folder / name).mkdir(parents=True)
        folder.mkdir(exist_ok=True)
        if folder is not plain:
            (folder / marker).write_bytes((dead / marker).read_bytes())
    monkeypatch.setenv("HOME", str(dead))
    expected = {
        "/": "root of the file system",
        repository: "git",
        bare: "git",
        plain: "marker",
        dead: "home directory",
    }
    for path, word in expected.items():
        for command in (("prune", "--yes"), ("prune", "--dry-run"), ("verify", "--quarantine"), ("doctor",)):
            answer = roots.run(capsys, *command, path)
            assert answer.status == 2 and word in answer.err, (path, command)
    monkeypatch.delenv("HOME")
    assert roots.run(capsys, "prune", "--yes", Path.home()).status in (2, 10)  # some users have none
    assert len(roots.snapshots_in(dead)) == 9
    assert roots.run(capsys, "prune", "--yes", tmp_path / "nothing").status == 10


def test_a_marker_of_another_format_is_refused(dead: Path, capsys: Capture) -> None:
    for content in ('{"format": 2}', "", "[" * 200, '"x"'):
        (dead / _paths.MARKER).write_text(content)
        assert roots.run(capsys, "prune", dead, "--yes").status == 2
        assert roots.run(capsys, "ls", dead).status == 2
    assert len(roots.snapshots_in(dead)) == 9


def test_a_half_made_session_without_a_lock_stays_and_is_reported(dead: Path, capsys: Capture) -> None:
    odd = dead / _paths.unborn_session_name()
    odd.mkdir()
    (odd / "mine.txt").write_text("mine")
    answer = roots.run(capsys, "prune", dead, "--yes")
    assert answer.status == 1 and "has no lock" in answer.err
    assert (odd / "mine.txt").read_text() == "mine"


def test_a_session_that_is_being_made_is_none_of_our_business(dead: Path, capsys: Capture) -> None:
    session = next(dead.glob("2*"))
    made = session.rename(dead / _paths.unborn_session_name())
    lock = OwnerLock.take(FileSystem(), str(made), create=False)
    assert lock is not None
    assert roots.run(capsys, "prune", dead, "--yes").status == 0
    assert len(list(made.glob("*.g*"))) == 3
    lock.release()
    assert roots.run(capsys, "prune", dead, "--yes").status == 0
    assert not made.exists()


def test_half_made_and_half_removed_sessions_go_too(dead: Path, capsys: Capture) -> None:
    session = next(dead.glob("2*"))
    session.rename(dead / _paths.dead_session_name())
    (dead / _paths.unborn_session_name()).mkdir()
    assert roots.run(capsys, "prune", dead, "--yes").status == 0
    assert [path.name for path in dead.iterdir()] == [_paths.MARKER]


# --- stats ---


def test_stats_count(both: SnapshotStore, capsys: Capture) -> None:
    found = as_json(capsys, "stats", both.root)
    assert (found["alive"], found["dead"], found["unknown"]) == (1, 1, 0)
    assert found["requests"] == 5 and found["snapshots"]["count"] == 11
    assert found["temporaries"]["count"] == found["trash"]["count"] == 1
    assert sum(bar["count"] for bar in found["sizes"]) == sum(bar["count"] for bar in found["ages"]) == 11
    lengths = [path.stat().st_size for path in both.root.glob("2*/*.g*/*.safetensors")]
    for bar in found["sizes"]:
        assert bar["count"] == sum(bar["low"] <= length < bar["high"] for length in lengths)
    assert 0 <= found["newest_s"] <= found["oldest_s"] < 3600
    text = roots.run(capsys, "stats", both.root).out
    assert "1 alive, 1 dead, 0 unknown" in text and "█" in text


def test_stats_of_an_empty_root(root: Path, capsys: Capture) -> None:
    SnapshotStore(root).shutdown(cleanup=True)
    found = as_json(capsys, "stats", root)
    assert found["oldest_s"] is None and found["sizes"] == found["ages"] == []
    assert roots.run(capsys, "stats", root).status == 0


def test_watch_needs_a_terminal(dead: Path, capsys: Capture) -> None:
    assert roots.run(capsys, "stats", dead, "--watch").status == 2
    assert roots.run(capsys, "stats", dead, "--watch", "--json").status == 2


# --- doctor ---


def test_doctor_without_a_root_looks_at_python(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNAPSTORE_ROOT", raising=False)
    found = as_json(capsys, "doctor")
    topics = {each["topic"]: each for each in found["findings"]}
    assert sys.version.split()[0] in topics["Python"]["finding"]
    assert f"numpy {np.__version__}" in topics["frameworks"]["finding"]
    assert found["speed"] is None


def test_doctor_tries_the_disk_and_leaves_nothing(both: SnapshotStore, capsys: Capture) -> None:
    before = roots.everything_in(both.root)
    found = as_json(capsys, "doctor", both.root)
    assert roots.everything_in(both.root) == before
    topics = {each["topic"]: each for each in found["findings"]}
    assert {
        "root",
        "file system",
        "locks",
        "renames",
        "free space",
        "writing",
        "reading",
        "leftovers",
    } <= set(topics)
    assert all(
        each["finding"] and each["advice"].endswith((".", str(both.root), "ROOT")) for each in topics.values()
    )
    assert topics["locks"]["level"] == topics["renames"]["level"] == "ok"
    assert topics["leftovers"]["level"] == "note" and "1 session" in topics["leftovers"]["finding"]
    speed = found["speed"]
    assert speed["nbytes"] == 64 * 2**20
    assert all(speed[name] > 0 for name in speed)
    text = roots.run(capsys, "doctor", both.root).out
    assert re.search(r"writing .* 64 MiB in \d+ ms .* to the device", text)


def test_doctor_names_what_is_wrong(dead: Path, capsys: Capture) -> None:
    dead.chmod(0o755)
    (dead / "mine.txt").write_text("mine")
    found = as_json(capsys, "doctor", dead, status=1)
    problems = {each["topic"]: each["advice"] for each in found["findings"] if each["level"] == "problem"}
    assert set(problems) == {"root", "leftovers"} and "chmod 700" in problems["root"]


# --- everywhere ---


def test_the_root_may_come_from_an_option_or_the_environment(
    dead: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_json(capsys, "ls", "--root", dead)["root"] == str(dead)
    assert roots.run(capsys, "ls", dead, "--root", dead.parent).status == 2
    monkeypatch.setenv("SNAPSTORE_ROOT", str(dead))
    for command in ("ls", "stats", "verify"):
        assert as_json(capsys, command)["schema"] == 1
    assert as_json(capsys, "inspect", "gamma", "64")["request"] == "gamma"
    assert as_json(capsys, "prune", "--dry-run")["snapshots"] == 9
    monkeypatch.setenv("SNAPSTORE_ROOT", str(dead.parent))
    assert as_json(capsys, "ls", dead)["root"] == str(dead)
    monkeypatch.delenv("SNAPSTORE_ROOT")
    for command in ("ls", "stats", "verify", "prune"):
        answer = roots.run(capsys, command)
        assert answer.status == 2 and "SNAPSTORE_ROOT" in answer.err


def test_demo_and_bench_are_passed_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def demo(arguments: list[str]) -> int:
        called.append(arguments)
        sys.stdout.write("model    tiny\n")
        return 1

    monkeypatch.setitem(sys.modules, "snapstore.demo", types.SimpleNamespace(main=demo))  # type: ignore[arg-type]
    assert roots.run(capsys, "demo", "--backend", "mlx").status == 1
    assert as_json(capsys, "demo", status=1)["lines"] == ["model    tiny"]
    assert called == [["--backend", "mlx"], []]
    answer = roots.run(capsys, "bench", "--list")
    assert answer.status == 0 and "abort" in answer.out


def test_a_demo_without_its_framework_says_what_it_needs(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    answer = roots.run(capsys, "demo")
    assert answer.status == 2 and "this needs torch" in answer.err


def test_bench_as_json_has_the_figures_and_nothing_else(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are of a workload of no time: what is looked at is the way they take."""
    import bench

    calm = types.SimpleNamespace(run=lambda *, quick: sys.stdout.write("a table\n") and [])
    monkeypatch.setitem(sys.modules, "bench.abort", calm)  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "abort", calm, raising=False)
    found = as_json(capsys, "bench", "abort", "--quick")
    assert found["figures"] == [] and "machine" in found["environment"]
    assert any("abort" in line for line in as_json(capsys, "bench", "--list")["lines"])


def test_bench_says_where_the_benchmarks_are(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(snapstore, "__file__", str(tmp_path / "snapstore" / "__init__.py"))
    answer = roots.run(capsys, "bench")
    assert answer.status == 2 and "repository" in answer.err


def test_no_command_and_an_unknown_one_are_usage_errors(capsys: Capture) -> None:
    assert roots.run(capsys, "tidy").status == 2
    assert roots.run(capsys).status == 2
    assert snapstore.__version__ in roots.run(capsys, "--version").out


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "prune", "stats", "doctor"])
def test_every_command_has_help_and_json(capsys: Capture, command: str) -> None:
    answer = roots.run(capsys, command, "--help")
    assert answer.status == 0 and "--json" in answer.out and "--root" in answer.out
