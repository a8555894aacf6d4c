"""The disk in memory does what the real one does: the same operations on both, the same results and errors."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same, tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snapstore import SnapshotStore, StoreOptions
from snapstore._files import FileSystem
from snapstore.testing import MemoryFileSystem

NAMES = ("a", "b", "c")
ODD = ("a/.", "./b", "c/..", "a//b", "x" * 256)
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join) | st.sampled_from(ODD)
FDS = st.integers(0, 5)
BELOW = st.none() | FDS
BYTES = st.lists(st.binary(max_size=9), min_size=1, max_size=3)

STEPS = st.one_of(
    st.tuples(
        st.sampled_from(
            ["make_directory", "create", "open_read", "open_directory", "unlink", "remove_directory"]
        ),
        PATHS,
        BELOW,
    ),
    st.tuples(st.sampled_from(["open_lock", "open_or_make_lock", "status_at"]), PATHS, BELOW),
    st.tuples(st.sampled_from(["make_parents", "sync_directory", "names"]), PATHS),
    st.tuples(st.sampled_from(["sync_data", "close", "status", "tighten", "lock", "names_of"]), FDS),
    st.tuples(st.just("write"), FDS, BYTES, st.integers(0, 20)),
    st.tuples(st.just("reserve"), FDS, st.integers(1, 9000)),
    st.tuples(st.sampled_from(["read_into", "first_hole"]), FDS, st.integers(0, 20)),
    st.tuples(st.sampled_from(["rename", "link"]), PATHS, BELOW, PATHS, BELOW),
)


class Side:
    """One of the two disks, below a directory of its own, and what was opened there."""

    def __init__(self, files: FileSystem, top: str) -> None:
        self._files = files
        self._top = top
        self._fds: list[int] = []

    def perform(self, step: tuple[Any, ...]) -> object:
        """What the operation answers, or the name of its error."""
        try:
            return self._perform(*step)
        except OSError as error:
            return errno.errorcode[error.errno]

    def close(self) -> None:
        for fd in self._fds:
            self._files.close(fd)

    def _perform(self, name: str, *given: Any) -> object:
        files = self._files
        match name, given:
            case "open_lock" | "open_or_make_lock", (path, below):
                create = name == "open_or_make_lock"
                return self._note(files.open_lock(self._path(path, below), create=create, **self._at(below)))
            case "create" | "open_read" | "open_directory", (path, below):
                return self._note(getattr(files, name)(self._path(path, below), **self._at(below)))
            case "status_at", (path, below):
                return _shown(files.status_at(self._path(path, below), **self._at(below)))
            case "status", (fd,):
                return _shown(files.status(self._fd(fd)))
            case "rename" | "link", (path, below, other, above):
                fds = {
                    key: self._fd(fd) for key, fd in (("from_fd", below), ("to_fd", above)) if fd is not None
                }
                return getattr(files, name)(self._path(path, below), self._path(other, above), **fds)
            case "write", (fd, buffers, offset):
                return files.write(self._fd(fd), [memoryview(each) for each in buffers], offset)
            case "reserve", (fd, nbytes):
                return files.reserve(self._fd(fd), nbytes)
            case "read_into", (fd, offset):
                buffer = bytearray(7)
                return files.read_into(self._fd(fd), memoryview(buffer), offset), bytes(buffer)
            case "first_hole", (fd, offset):
                # What a directory answers is its file system's affair.
                asked = not stat.S_ISDIR(files.status(self._fd(fd)).st_mode)
                return files.first_hole(self._fd(fd), offset) if asked else None
            case "names_of", (fd,):
                return files.names(self._fd(fd))
            case "close", (fd,):
                closed = files.close(self._fd(fd))
                self._fds.remove(self._fd(fd))
                return closed
            case "make_parents" | "sync_directory" | "names", (path,):
                return getattr(files, name)(f"{self._top}/{path}")
            case _, (fd,):
                return getattr(files, name)(self._fd(fd))
            case _, (path, below):
                return getattr(files, name)(self._path(path, below), **self._at(below))
        raise AssertionError(name)

    def _path(self, path: str, below: int | None) -> str:
        return f"{self._top}/{path}" if below is None else path

    def _at(self, below: int | None) -> dict[str, int]:
        return {} if below is None else {"dir_fd": self._fd(below)}

    def _fd(self, index: int) -> int:
        return self._fds[index] if index < len(self._fds) else 2**30 - 1

    def _note(self, fd: int) -> str:
        self._fds.append(fd)
        return "opened"


def _shown(status: Any) -> tuple[object, ...]:
    """What of a status is the same on any disk."""
    if stat.S_ISDIR(status.st_mode):
        return ("directory", stat.S_IMODE(status.st_mode))
    return (stat.filemode(status.st_mode), status.st_size, status.st_nlink)


def run(steps: list[tuple[Any, ...]]) -> None:
    folder = Path(tempfile.mkdtemp())
    memory = MemoryFileSystem()
    memory.make_directory("/top")
    real = Side(FileSystem(), str(folder))
    fake = Side(memory, "/top")
    try:
        for number, step in enumerate(steps):
            assert fake.perform(step) == real.perform(step), (number, step)
        there = {
            f"/top/{path.relative_to(folder)}": path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")
        }
        assert {path: data for path, data in memory.tree().items() if path != "/top"} == there
    finally:
        real.close()
        fake.close()
        shutil.rmtree(folder)
    assert memory.open_descriptors == 0


@given(st.lists(STEPS, max_size=40))
@settings(max_examples=400)
@example([("make_directory", "a", None), ("open_directory", "a", None), ("remove_directory", "a", None)]
         + [(name, "b", 0) for name in ("make_directory", "create", "open_or_make_lock", "status_at")]
         + [("names_of", 0), ("status", 0)])  # fmt: skip
@example(
    [("make_directory", "a", None), ("make_directory", "a/b", None), ("rename", "a", None, "a/b/c", None)]
)
@example([("create", "a", None), ("link", "a", None, "b", None), ("rename", "a", None, "b", None)])
@example([("make_parents", "a/b/c"), ("create", "c", None), ("rename", "c", None, "a", None),
          ("rename", "a", None, "c", None), ("rename", "a/b", None, "a", None)])  # fmt: skip
@example([("open_or_make_lock", "a", None), ("open_lock", "a", None), ("lock", 0), ("lock", 1), ("lock", 0),
          ("close", 0), ("lock", 0)])  # fmt: skip
@example([("create", "a", None), ("write", 0, [b"12", b"", b"345"], 0), ("unlink", "a", None), ("write", 0, [b"6"], 0),
          ("status", 0), ("read_into", 0, 0)])  # fmt: skip
def test_the_same_operations_have_the_same_results_and_errors(steps: list[tuple[Any, ...]]) -> None:
    run(steps)


@pytest.mark.slow
@pytest.mark.timeout(600)
@given(st.lists(STEPS, max_size=120))
@settings(max_examples=4000)
def test_the_same_operations_at_length(steps: list[tuple[Any, ...]]) -> None:
    run(steps)


def test_another_file_system_takes_neither_renames_nor_links() -> None:
    disk = MemoryFileSystem()
    disk.mount("/other")
    disk.close(disk.create("/a"))
    for act in (disk.rename, disk.link):
        with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
            act("/a", "/other/a")
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        disk.remove_directory("/other")


def test_a_write_can_be_short() -> None:
    disk = MemoryFileSystem(write_bytes_max=4)
    fd = disk.create("/a")
    assert disk.write(fd, [memoryview(b"123"), memoryview(b"456")], 0) == 4
    disk.close(fd)
    assert disk.tree() == {"/a": b"1234"}


def test_a_store_lives_on_it(tmp_path: Path) -> None:
    disk = MemoryFileSystem(write_bytes_max=1000)
    with SnapshotStore("/some/root", StoreOptions(durability="full"), file_system=disk) as store:
        for number in range(3):
            store.save("a", number, tensors(number))
        assert store.cleanup_request("b").clean
    with SnapshotStore("/some/root", StoreOptions(leftovers="adopt"), file_system=disk) as store:
        for number in range(3):
            assert_same(store.load("a", number), tensors(number))
        moved = store.detach("a", 2, "/elsewhere")
        assert store.cleanup_all().clean
    assert store.shutdown() and disk.open_descriptors == 0
    assert [path for path, data in disk.tree().items() if path.endswith("elsewhere") and data] == [str(moved)]
    assert not any(tmp_path.iterdir()) and not Path("/some").exists()
