"""Roots for the tests of the command: made by real stores, in processes that are alive or were killed.

Run as a script this is such a process: it fills a session, leaves one file half written and one piece of trash, says
where, and lives until its standard input ends, which kills it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import snapstore
from snapstore import SnapshotStore, StoreOptions, _paths
from snapstore.cli import main
from snapstore.testing import FaultyFileSystem

REQUESTS = ("alpha", "beta", "gamma")
TOKENS = (64, 128, 1024)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the command said."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.splitlines()[-1]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """The command in this process."""
    capsys.readouterr()
    status = main([str(each) for each in arguments])
    said = capsys.readouterr()
    return Answer(status, said.out, said.err)


def run_process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "snapstore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def tensors(token_count: int) -> dict[str, np.ndarray]:
    """As different as their token counts, in size too."""
    return {
        "ssm": np.arange(token_count * 8, dtype=np.float32).reshape(token_count, 8),
        "conv": np.full(7, token_count % 100, dtype=np.int8),
    }


def fill(store: SnapshotStore) -> None:
    for request in REQUESTS:
        for token_count in TOKENS:
            store.save(request, token_count, tensors(token_count), metadata={"of": request})
    assert store.flush(30)


def abandoned(root: Path) -> Path:
    """A session whose store is gone and whose files stayed: its owner is dead, as any whose lock is free."""
    with SnapshotStore(root, StoreOptions(leftovers="keep")) as store:
        fill(store)
    return store.session


def killed(root: Path) -> Path:
    """A session, some weeks old by its name, whose process was killed in the middle of a write and a removal."""
    with process(root) as session:
        pass
    _, pid, random = session.name.split("-")
    return session.rename(session.with_name(f"20260101T000000Z-{pid}-{random}"))


@contextmanager
def process(root: Path) -> Iterator[Path]:
    """A session whose owner lives in another process while the block runs, and is killed at its end."""
    script = [sys.executable, __file__, str(root)]
    paths = os.pathsep.join(
        str(Path(module.__file__).parents[1]) for module in (snapstore, sys.modules[__name__])
    )
    owner = subprocess.Popen(
        script,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        yield Path(owner.stdout.readline().strip())
    finally:
        owner.stdin.close()
        assert owner.wait(30) == -signal.SIGKILL
        owner.stdout.close()


def live() -> None:
    """The process."""
    files = FaultyFileSystem()
    store = SnapshotStore(sys.argv[1], StoreOptions(leftovers="keep"), file_system=files)
    fill(store)
    store.save("forgotten", 1, tensors(1)).result(30)
    removing = files.pause("unlink", _paths.TRASH)
    store.cleanup_request("forgotten")
    removing.wait_reached()
    writing = files.pause("close", _paths.TEMPORARY)
    store.save("torn", 1, tensors(1))
    writing.wait_reached()
    sys.stdout.write(f"{store.session}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)


def copy_of(template: Path, root: Path) -> Path:
    """The same root once more, times included."""
    shutil.copytree(template, root, symlinks=True)
    return root


def snapshots_in(root: Path) -> list[str]:
    """Paths of the snapshot files below the root."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob("2*/*.g*/*.safetensors"))


def everything_in(root: Path) -> list[str]:
    return sorted(os.fsencode(path.relative_to(root)).decode("latin-1") for path in root.rglob("*"))


class Watch:
    """The kernel's word on whether anything below a directory was opened, read, changed or removed."""

    OPEN, ACCESS, MODIFY, ATTRIB, CREATE, DELETE, MOVE = 0x20, 0x1, 0x2, 0x4, 0x100, 0x200, 0xC0
    DIRECTORY = 0x40000000
    _EVENT = struct.Struct("iIII")

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = self.OPEN | self.ACCESS | self.MODIFY | self.ATTRIB | self.CREATE | self.DELETE | self.MOVE
        for path in (directory, *(each for each in directory.rglob("*") if each.is_dir())):
            assert libc.inotify_add_watch(self._fd, os.fsencode(path), mask) >= 0

    def events(self) -> list[str]:
        """What happened so far, and was not told before."""
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return []
        found, at = [], 0
        while at < len(data):
            _, mask, _, length = self._EVENT.unpack_from(data, at)
            at += self._EVENT.size + length
            found.append(f"{mask:#x} {data[at - length : at].rstrip(bytes(1)).decode()}")
        return found

    def close(self) -> None:
        os.close(self._fd)


if __name__ == "__main__":
    live()
