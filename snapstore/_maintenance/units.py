"""Sizes and durations as people write them: read strictly, written shortly. Pure text, no clock, no disk.

Strict means: what is not clearly a size or a duration is refused with a sentence that says what would be one. A guess
here would be somebody's files.
"""

from __future__ import annotations

import re
from fractions import Fraction

BYTES_MAX = 2**63 - 1
SECONDS_MAX = 100 * 365 * 86400

_BINARY = {letter: 1024**power for power, letter in enumerate("KMGTPE", 1)}
_DECIMAL = {letter: 1000**power for power, letter in enumerate("KMGTPE", 1)}
_BYTES_OF = {
    "": 1,
    "B": 1,
    **_BINARY,
    **{f"{letter}iB": nbytes for letter, nbytes in _BINARY.items()},
    **{f"{letter}B": nbytes for letter, nbytes in _DECIMAL.items()},
    "kB": 1000,
}
_SECONDS_OF = {"d": 86400, "h": 3600, "m": 60, "s": 1}

_SIZE = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,18}))?([A-Za-z]*)", re.ASCII)
_DURATION = re.compile(
    r"(?=[0-9])(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,10})s)?", re.ASCII
)


class UnitError(ValueError):
    """A text that is not what was asked for; the message says what would be."""


def parse_size(text: str) -> int:
    """Bytes of ``20GiB``, ``1.5G``, ``500MB``, ``4096``.

    ``KiB`` and ``K`` are 1024, ``KB`` is 1000, and so on up to ``E``, as coreutils have it. Rounded down.
    """
    match = _SIZE.fullmatch(text)
    unit = _BYTES_OF.get(match[3]) if match else None
    if match is None or unit is None or (match[2] and unit == 1):
        raise UnitError(f"{text!r} is not a size; write it like 20GiB, 1.5G, 500MB or 4096 (bytes)")
    nbytes = int(Fraction(f"{match[1]}.{match[2] or 0}") * unit)
    if nbytes > BYTES_MAX:
        raise UnitError(f"{text!r} is more bytes than a disk can have")
    return nbytes


def parse_duration(text: str) -> int:
    """Seconds of ``2h30m``, ``7d``, ``90s``: whole numbers, each unit once, the large ones first."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UnitError(f"{text!r} is not a duration; write it like 2h30m, 7d or 90s")
    counts = (int(count or 0) for count in match.groups())
    duration_s = sum(count * unit_s for count, unit_s in zip(counts, _SECONDS_OF.values(), strict=True))
    if duration_s > SECONDS_MAX:
        raise UnitError(f"{text!r} is longer than 100 years")
    return duration_s


def format_size(nbytes: int) -> str:
    """At most four digits and a unit: ``0 B``, ``1023 B``, ``3.2 GiB``, ``64 MiB``."""
    if nbytes < 1024:
        return f"{nbytes} B"
    for letter, unit in _BINARY.items():
        shown = f"{nbytes / unit:.1f}" if nbytes < 99.95 * unit else f"{nbytes / unit:.0f}"
        if float(shown) < 1024 or letter == "E":
            return f"{shown.removesuffix('.0')} {letter}iB"
    raise AssertionError("E is the last letter")


def format_duration(duration_s: int) -> str:
    """The two largest units that matter: ``0s``, ``4m 10s``, ``2h 30m``, ``7d``. Rounded down."""
    left_s = max(0, duration_s)
    parts: list[tuple[int, str]] = []
    for unit, unit_s in _SECONDS_OF.items():
        count, left_s = divmod(left_s, unit_s)
        if count or parts:
            parts.append((count, unit))
    return " ".join(f"{count}{unit}" for count, unit in parts[:2] if count) or "0s"


def format_rate(nbytes: int, duration_s: float) -> str:
    """Bytes a second."""
    return f"{format_size(int(nbytes / max(duration_s, 1e-9)))}/s"


def plural(count: int, noun: str) -> str:
    """``1 snapshot``, ``2 snapshots``, ``20,000 entries``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def printable(text: str) -> str:
    """What a terminal may be sent of ``text``: all is escaped that could move a cursor, change a colour or hide.

    Names that are not UTF-8 reach Python with lone surrogates for their odd bytes; those are shown in hex.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode's stand-in for a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
