"""Snapshot files -> memory that nobody else has: own descriptor, no ``mmap``, at most the file's size of memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xxhash import xxh3_64

from snapstore._checksum import Checksums, in_chunks
from snapstore._errors import SnapshotCorruptError
from snapstore._files import FileSystem, opened, read_exactly
from snapstore._format import (
    Facts,
    Header,
    compare_checksums,
    decode_header,
    header_size,
)
from snapstore._memory import allocate, segments_of
from snapstore._types import SnapshotKey

CHUNK_BYTES = 8 * 1024 * 1024
"""Read, then hashed while the last cache has it; in few calls, since each lets the GIL go."""

_PREFIX_BYTES = 8


Fill = Callable[[memoryview, int], int]
"""Fills memory with a file's next bytes, from an offset on; how many there were, fewer only where the file ends."""


def read_header(files: FileSystem, fd: int) -> Header:
    """The header of an open file. ``SnapshotCorruptError`` if it is none, before anything large is allocated."""
    return header_from(partial(read_exactly, files, fd), files.status(fd).st_size)


def header_from(fill: Fill, file_bytes: int) -> Header:
    """``read_header``, of a file that comes from wherever ``fill`` has it from."""
    prefix = memoryview(bytearray(_PREFIX_BYTES))
    count = fill(prefix, 0)
    raw = memoryview(bytearray(header_size(bytes(prefix[:count]), file_bytes)))
    raw[:count] = prefix
    count += fill(raw[count:], count)
    return decode_header(raw[:count], file_bytes)


def fresh_memory(header: Header) -> memoryview:
    """Memory for the data part of this file that nobody else has."""
    return allocate(header.layout.nbytes)


def read_data(
    files: FileSystem,
    fd: int,
    header: Header,
    *,
    verify: bool,
    memory: Callable[[Header], memoryview] = fresh_memory,
) -> memoryview:
    """The data part, in ``memory``. ``SnapshotCorruptError`` if it is cut short or, with ``verify``, altered."""
    return data_from(partial(read_exactly, files, fd), header, CHUNK_BYTES, verify=verify, memory=memory)


def data_from(
    fill: Fill, header: Header, chunk_bytes: int, *, verify: bool, memory: Callable[[Header], memoryview]
) -> memoryview:
    """``read_data``, of a file that comes from wherever ``fill`` has it from, in such chunks."""
    layout, buffer = header.layout, memory(header)
    segments = segments_of(layout, buffer)
    sums = Checksums() if verify and header.checksums is not None else None
    done = 0
    for chunk in in_chunks(map(segments.__getitem__, layout.file_order), chunk_bytes):
        nbytes = sum(len(piece) for piece, _ in chunk)
        count = fill(buffer[done : done + nbytes], header.data_offset + done)
        done += count
        if count < nbytes:
            raise SnapshotCorruptError(f"the file ends after {done} of {layout.nbytes} bytes of tensors")
        if sums is not None:
            sums.add_all(chunk)
    if sums is not None:
        compare_checksums(header, sums.digits)
    return buffer


def check_data(
    files: FileSystem, fd: int, header: Header, buffer: memoryview, on_read: Callable[[int], None]
) -> None:
    """Read the data part through ``buffer`` and compare it with its checksums, where the file has any.

    ``SnapshotCorruptError`` as from ``read_data``, in memory that does not grow with the file. ``on_read`` hears of
    the bytes of each read.
    """
    layout, found = header.layout, []
    for index in layout.file_order:
        digest = xxh3_64()
        offset, left = header.data_offset + layout.offsets[index], layout.sizes[index]
        while left:
            count = read_exactly(files, fd, buffer[: min(left, len(buffer))], offset)
            if count == 0:
                raise SnapshotCorruptError(f"the file ends {left} bytes before the end of its tensors")
            digest.update(buffer[:count])
            offset, left = offset + count, left - count
            on_read(count)
        found.append(digest.hexdigest())
    compare_checksums(header, "".join(found))


def read_snapshot(
    files: FileSystem,
    path: str,
    key: SnapshotKey,
    generation: int,
    *,
    verify: bool,
    memory: Callable[[Header], memoryview] = fresh_memory,
) -> tuple[Header, Facts, memoryview]:
    """Header, facts and data of a file that must be exactly this snapshot. Blocks for the disk.

    ``SnapshotCorruptError`` with key and path for whatever is not as it was written; ``OSError`` from the disk.
    """
    try:
        with opened(files, files.open_read(path)) as fd:
            header = read_header(files, fd)
            facts = check_identity(header, key, generation)
            return header, facts, read_data(files, fd, header, verify=verify, memory=memory)
    except SnapshotCorruptError as error:
        raise SnapshotCorruptError(
            f"{path} is not the snapshot of {key} that was written: {error}; save it again",
            key=key,
            path=path,
        ) from error


def check_identity(header: Header, key: SnapshotKey, generation: int) -> Facts:
    """What the file says of itself. ``SnapshotCorruptError`` if it is of another snapshot."""
    facts = header.facts
    if facts is None:
        raise SnapshotCorruptError("it does not say what it is of")
    said = (facts.request_id, facts.token_count, facts.generation)
    if said != (key.request_id, key.token_count, generation):
        raise SnapshotCorruptError(
            f"it says that it is of {said[0]!r} at {said[1]} tokens, generation {said[2]}"
        )
    return facts
