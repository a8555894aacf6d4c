"""A file is written chunk by chunk, header last: whole whatever the sizes, and left within one chunk when told so."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import tracing
from safetensors.numpy import load

from snapstore._filing import CHUNK_BYTES, write_snapshot
from snapstore._format import Facts, Layout, TensorSpec, decode_header, verify_checksums
from snapstore._memory import segments_of
from snapstore.testing import MemoryFileSystem

FACTS = Facts("request", 7, 1, "numpy", "null")
SIZES: dict[str, list[int]] = {
    "none": [],
    "empty": [0],
    "one": [1],
    "a chunk less one": [CHUNK_BYTES - 1],
    "a chunk": [CHUNK_BYTES],
    "a chunk and one": [CHUNK_BYTES + 1],
    "three chunks": [3 * CHUNK_BYTES],
    "across": [5, CHUNK_BYTES - 2, 0, 3, CHUNK_BYTES, 1, 2 * CHUNK_BYTES + 9, 0],
    "more than one call takes": [3] * 2500,
}


def data_of(sizes: Sequence[int]) -> tuple[Layout, list[memoryview]]:
    layout = Layout.of(TensorSpec(f"t{number}", "U8", (size,)) for number, size in enumerate(sizes))
    return layout, segments_of(layout, memoryview(random.Random(0).randbytes(layout.nbytes)))


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("write_bytes_max", [1 << 40, 700_001])
@pytest.mark.parametrize("kind", SIZES)
def test_whatever_the_sizes_the_file_is_whole(kind: str, write_bytes_max: int, checksum: bool) -> None:
    layout, segments = data_of(SIZES[kind])
    disk = MemoryFileSystem(write_bytes_max=write_bytes_max)
    fd = disk.create("/file")
    assert write_snapshot(disk, fd, layout, segments, FACTS, checksum=checksum, go_on=lambda: True)
    content = disk.tree()["/file"]
    assert content is not None
    header = decode_header(content[: len(content) - layout.nbytes], len(content))
    assert header.facts == FACTS and (header.checksums is not None) is checksum
    verify_checksums(header, segments)
    assert {name: array.tobytes() for name, array in load(content).items()} == {
        spec.name: bytes(segment) for spec, segment in zip(layout.specs, segments, strict=True)
    }


RESERVE = """
import sys
from snapstore._files import FileSystem
files = FileSystem()
fd = files.create(sys.argv[1])
try:
    files.reserve(fd, 4096)
except OSError as error:
    print(type(error).__name__, error.errno)
else:
    print("goes on")
"""


@pytest.mark.skipif(not tracing.works(), reason="wants strace")
@pytest.mark.parametrize(
    ("error", "answer"),
    [
        ("EINTR", "goes on"),
        ("EPERM", "goes on"),
        ("EOPNOTSUPP", "goes on"),
        ("ENOSPC", f"OSError {errno.ENOSPC}"),
        ("EDQUOT", f"OSError {errno.EDQUOT}"),
        ("EIO", f"OSError {errno.EIO}"),
    ],
)
def test_room_that_can_not_be_reserved_fails_a_save_only_where_the_disk_says_why(
    tmp_path: Path, error: str, answer: str
) -> None:
    """A signal may interrupt ``fallocate``, a sandbox forbid it, a file system not know it."""
    command = [sys.executable, "-c", RESERVE, str(tmp_path / "file")]
    tracer = [str(tracing.STRACE), "-f", "-o", "/dev/null", "-e", f"inject=fallocate:error={error}"]
    done = subprocess.run([*tracer, *command], check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (answer, "")


class Counting(MemoryFileSystem):
    """Notes where each write went, and for how much room was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, int]] = []
        self.reserved: list[int] = []

    def reserve(self, fd: int, nbytes: int) -> None:
        super().reserve(fd, nbytes)
        self.reserved.append(nbytes)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = super().write(fd, buffers, offset)
        self.written.append((offset, count))
        return count


def test_one_chunk_is_one_write_and_the_header_comes_last() -> None:
    disk = Counting()
    write_snapshot(disk, disk.create("/small"), *data_of([5, 6]), FACTS, checksum=True, go_on=lambda: True)
    assert len(disk.written) == 1
    disk = Counting()
    write_snapshot(
        disk, disk.create("/large"), *data_of([4 * CHUNK_BYTES]), FACTS, checksum=True, go_on=lambda: True
    )
    assert [offset > CHUNK_BYTES for offset, _ in disk.written] == [True, True, True, False]
    assert disk.written[-1][0] == 0
    content = disk.tree()["/large"]
    assert content is not None and disk.reserved == [len(content)], "a disk that is full says so at once"


@pytest.mark.parametrize("asked", range(1, 7))
def test_a_write_that_is_told_to_stop_goes_no_further_than_its_chunk(asked: int) -> None:
    answers = iter([*[True] * (asked - 1), False])
    disk = Counting()
    layout, segments = data_of([5 * CHUNK_BYTES])
    fd = disk.create("/file")
    assert not write_snapshot(disk, fd, layout, segments, FACTS, checksum=True, go_on=lambda: next(answers))
    assert list(accumulate(count for _, count in disk.written))[-1:] == [
        (asked - 2) * CHUNK_BYTES for _ in range(asked > 2)
    ]
    assert all(offset > 0 for offset, _ in disk.written), "a header would make a file of it"
