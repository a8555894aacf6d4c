"""A snapshot's bytes on their way into its file: chunk by chunk, each hashed, then written while the caches have it.

The header holds the checksums and stands at the beginning, so the first chunk waits and is written with it, at last.
A file of one chunk is one write, which asks for its room itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from snapstore._checksum import Checksums, in_chunks
from snapstore._files import FileSystem, write_all
from snapstore._format import Facts, HeaderDraft, Layout

CHUNK_BYTES = 2 * 1024 * 1024
"""Less than a millisecond of hashing and writing into the page cache; a cancelled write stops within one."""


def write_snapshot(
    files: FileSystem,
    fd: int,
    layout: Layout,
    segments: Sequence[memoryview],
    facts: Facts,
    *,
    checksum: bool,
    go_on: Callable[[], bool],
) -> bool:
    """Fill an empty file; False if ``go_on()``, asked before each chunk, said no. Blocks for the disk.

    Args:
        segments: flat bytes of each tensor, in the order of ``layout.specs``.
    """
    sums = Checksums() if checksum else None
    header = HeaderDraft(layout, facts, checksums=checksum)
    offset = len(header)
    if layout.nbytes > CHUNK_BYTES:
        files.reserve(fd, offset + layout.nbytes)
    first: list[memoryview] | None = None
    for chunk in in_chunks(map(segments.__getitem__, layout.file_order), CHUNK_BYTES):
        if not go_on():
            return False
        if sums is not None:
            sums.add_all(chunk)
        pieces = [piece for piece, _ in chunk]
        if first is None:
            first = pieces
        else:
            write_all(files, fd, pieces, offset)
        offset += sum(map(len, pieces))
    if not go_on():
        return False
    filled_in = header.filled_in(sums.digits if sums is not None else "")
    write_all(files, fd, [memoryview(filled_in), *(first or ())], 0)
    return True
