"""What the doctor says of machines that are not as they should be, played by file systems with faults."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import roots

from snapstore import SnapshotStore
from snapstore._files import FileSystem
from snapstore._maintenance import doctor
from snapstore._maintenance.doctor import Checkup, Diagnosis, examine
from snapstore._maintenance.root import opened_root
from snapstore.testing import FaultyFileSystem


@pytest.fixture
def empty(root: Path) -> Path:
    """A root without sessions."""
    SnapshotStore(root).shutdown(cleanup=True)
    return root


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed where space is short."""
    monkeypatch.setattr(doctor, "_LITTLE_SPACE_BYTES", 2**63)


def checkup(path: Path, files: FileSystem | None = None) -> Checkup:
    before = roots.everything_in(path)
    with opened_root(files or FileSystem(), str(path), to_change=True) as root:
        found = examine(root)
    assert roots.everything_in(path) == before
    return found


def topic(found: Checkup, name: str) -> Diagnosis:
    (one,) = (each for each in found.diagnoses if each.topic == name)
    assert one.advice.count(".") or one.advice.count("snapstore")
    return one


def test_a_sound_machine_has_no_problem(empty: Path) -> None:
    found = checkup(empty)
    assert [each for each in found.diagnoses if each.level == "problem"] == []
    assert found.speed is not None


def test_locks_that_are_refused(empty: Path, untimed: None) -> None:
    files = FaultyFileSystem()
    files.fail("lock", errno.ENOLCK, times=float("inf"))
    found = topic(checkup(empty, files), "locks")
    assert found.level == "problem" and "refused" in found.finding


def test_locks_that_keep_nobody_out(empty: Path, untimed: None) -> None:
    class Lax(FileSystem):
        def lock(self, fd: int) -> bool:
            return True

    found = topic(checkup(empty, Lax()), "locks")
    assert found.level == "problem" and "do not exclude" in found.finding


class Torn(FileSystem):
    """Makes its first rename in two steps, and waits in between until a reader has missed the name."""

    def __init__(self) -> None:
        super().__init__()
        self.met = threading.Event()
        self.first = True

    def open_read(self, path: str, *, dir_fd: int | None = None) -> int:
        try:
            return super().open_read(path, dir_fd=dir_fd)
        except FileNotFoundError:
            self.met.set()
            raise

    def rename(
        self, source: str, destination: str, *, from_fd: int | None = None, to_fd: int | None = None
    ) -> None:
        if self.first:
            self.first = False
            self.half_way(destination, to_fd)
        super().rename(source, destination, from_fd=from_fd, to_fd=to_fd)

    def half_way(self, destination: str, to_fd: int | None) -> None:
        os.unlink(destination, dir_fd=to_fd)
        assert self.met.wait(10)


class Mixing(Torn):
    """Overwrites one half first, and waits until a reader who opened the file after that has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: set[int] = set()
        self.half = False

    def open_read(self, path: str, *, dir_fd: int | None = None) -> int:
        fd = super().open_read(path, dir_fd=dir_fd)
        if self.half:
            self.opened.add(fd)
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        if fd in self.opened:
            self.met.set()

    def half_way(self, destination: str, to_fd: int | None) -> None:
        self.half = True
        fd = os.open(destination, os.O_WRONLY, dir_fd=to_fd)
        os.write(fd, b"x" * 2048)
        os.close(fd)
        self.met.wait(2)  # in vain if a reader saw it who had opened the file before, and looks no more


@pytest.mark.parametrize(("kind", "words"), [(Torn, "was gone"), (Mixing, "parts of two files")])
def test_renames_that_are_not_atomic(empty: Path, untimed: None, kind: type[Torn], words: str) -> None:
    found = topic(checkup(empty, kind()), "renames")
    assert found.level == "problem" and words in found.finding


def test_a_disk_that_takes_no_files(empty: Path) -> None:
    for operation, number in (
        ("make_directory", errno.EROFS),
        ("create", errno.ENOSPC),
        ("write", errno.EDQUOT),
    ):
        files = FaultyFileSystem()
        files.fail(operation, number, times=float("inf"))
        found = checkup(empty, files)
        assert topic(found, "writing").finding == os.strerror(number)
        assert topic(found, "writing").level == "problem" and found.speed is None


def test_little_space(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSystem, "free_bytes", lambda self, path: 2**30)
    found = checkup(empty)
    assert topic(found, "free space").level == "problem" and "prune" in topic(found, "free space").advice
    assert found.speed is None, "and nothing is made worse by trying"


@pytest.mark.parametrize(("kind", "word"), [("nfs4", "network"), ("tmpfs", "memory"), ("overlay", "volume")])
def test_file_systems_that_are_no_local_disk(
    empty: Path, untimed: None, monkeypatch: pytest.MonkeyPatch, kind: str, word: str
) -> None:
    monkeypatch.setattr(FileSystem, "file_system_type", lambda self, fd: kind)
    found = topic(checkup(empty), "file system")
    assert (found.level, found.finding) == ("note", kind) and word in found.advice


def test_a_slow_device_and_a_busy_processor(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ROUNDS", 1)
    files = FaultyFileSystem()
    files.delay("sync_data", 0.7)
    found = topic(checkup(empty, files), "writing")
    assert found.level == "note" and "slow disk" in found.advice
    monkeypatch.setattr(doctor, "_RENAMES", 1)
    monkeypatch.setattr(doctor, "_SLOW_DEVICE_BYTES_S", 0)  # it may be one, while others use it
    for delay_s in (
        0.5,
        2.0,
        8.0,
    ):  # it is to be long beside a raw write, and that may take its time here too
        files = FaultyFileSystem()
        files.delay("rename", delay_s)
        found = topic(checkup(empty, files), "writing")
        if found.level == "note":
            break
    assert found.level == "note" and "busy" in found.advice


def test_leftovers_and_odd_things(empty: Path, untimed: None) -> None:
    assert topic(checkup(empty), "leftovers").level == "ok"
    roots.abandoned(empty)
    found = topic(checkup(empty), "leftovers")
    assert found.level == "note" and "snapstore prune" in found.advice
    (empty / "mine.txt").write_text("mine")
    found = topic(checkup(empty), "leftovers")
    assert found.level == "problem" and "snapstore verify" in found.advice


def test_the_file_system_is_named_as_the_kernel_names_it(tmp_path: Path) -> None:
    files = FileSystem()
    fd = files.open_directory("/proc")
    try:
        assert files.file_system_type(fd) == "proc"
    finally:
        files.close(fd)
