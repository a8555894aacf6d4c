"""xxh3_64 in hex digits: of tensors, and of a header that holds its own."""

from __future__ import annotations

from collections.abc import Iterable

from xxhash import xxh3_64

ALGORITHM = "xxh3_64"
DIGITS = 16

_SLICE_BYTES = 64 * 1024
"""xxhash releases the GIL for more than this. A slice takes 1 to 10 us."""
_SMALL_BYTES = 1024 * 1024
_HELD_BYTES = 4 * 1024 * 1024


def checksums(segments: Iterable[memoryview]) -> str:
    """The digits of each segment (flat bytes), one after the other.

    Large ones are hashed with the GIL released. But each release can cost a turn of 5 ms beside a thread that
    is hungry for the GIL, so small ones are hashed in slices that keep it, never more than 4 MiB (under a
    millisecond) in a row. Measured, 48 segments of 341 KB beside a hungry thread: HUNGRY.
    """
    digits, held = [], 0
    for segment in segments:
        nbytes = len(segment)
        if nbytes <= _SLICE_BYTES:
            digest, held = xxh3_64(segment), held + nbytes
        elif nbytes <= _SMALL_BYTES and held + nbytes <= _HELD_BYTES:
            digest, held = xxh3_64(), held + nbytes
            for start in range(0, nbytes, _SLICE_BYTES):
                digest.update(segment[start : start + _SLICE_BYTES])
        else:
            digest, held = xxh3_64(segment), 0
        digits.append(digest.hexdigest())
    return "".join(digits)


def checksum_around(text: memoryview, hole: int) -> bytes:
    """The digits of ``text`` with zeros for the ``DIGITS`` bytes from ``hole`` on, where they are to stand."""
    digest = xxh3_64(text[:hole])
    digest.update(b"0" * DIGITS)
    digest.update(text[hole + DIGITS :])
    return digest.hexdigest().encode()
