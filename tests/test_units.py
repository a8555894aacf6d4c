"""Sizes and durations: what is accepted means what it says, and everything else is refused."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapstore._maintenance.units import (
    BYTES_MAX,
    SECONDS_MAX,
    UnitError,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    plural,
    printable,
)

UNITS = {
    "": 1, "B": 1, "K": 2**10, "KiB": 2**10, "KB": 1000, "kB": 1000, "M": 2**20, "MiB": 2**20, "MB": 10**6,
    "G": 2**30, "GiB": 2**30, "GB": 10**9, "T": 2**40, "TiB": 2**40, "TB": 10**12,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("20GiB", 20 * 2**30),
        ("1.5G", 3 * 2**29),
        ("500MB", 500_000_000),
        ("4096", 4096),
        ("0", 0),
        ("0.5KiB", 512),
        ("1B", 1),
        ("0.3KiB", 307),
    ],
)
def test_a_size_is_what_it_says(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h30m", 9000), ("7d", 604_800), ("90s", 90), ("1d2h3m4s", 93_784), ("0s", 0), ("1h90m", 9000)],
)
def test_a_duration_is_what_it_says(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "-1", "-5G", "+5G", "1x", "1 GiB", " 1G", "1G ", "1g", "1gib", "1Gi", "G", "1e9", "0x10", "1_000",
        "1,000", ".5G", "5.G", "1.5", "1.5B", "1.2.3G", "inf", "nan", "١G", "１G", "1G\n", "1GiB1MiB", "9e99",
        "9999999999999999999", "16EiB",
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_advice(text: str) -> None:
    with pytest.raises(UnitError, match=r"20GiB|disk can have"):
        parse_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "5", "-5m", "+5m", "1x", "1.5h", "m", "h2", "30m2h", "1h1h", "2h 30m", " 2h", "2h ", "1D", "1w", "1ms",
        "inf", "١m", "1m\n", "99999999999s", "36501d",
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused_with_advice(text: str) -> None:
    with pytest.raises(UnitError, match=r"2h30m|100 years"):
        parse_duration(text)


@given(st.integers(0, 10**15), st.integers(0, 10**6), st.sampled_from(sorted(UNITS)))
def test_any_number_with_any_unit(whole: int, fraction: int, unit: str) -> None:
    exact = Fraction(f"{whole}.{fraction}") * UNITS[unit]
    if UNITS[unit] == 1:
        assert parse_size(f"{whole}{unit}") == whole
    elif exact <= BYTES_MAX:
        assert parse_size(f"{whole}.{fraction}{unit}") == int(exact)
    else:
        with pytest.raises(UnitError):
            parse_size(f"{whole}.{fraction}{unit}")


@given(st.tuples(*[st.none() | st.integers(0, 9999)] * 4))
def test_any_parts_in_order(counts: tuple[int | None, ...]) -> None:
    text = "".join(f"{count}{unit}" for count, unit in zip(counts, "dhms", strict=True) if count is not None)
    expected = sum((count or 0) * unit for count, unit in zip(counts, (86400, 3600, 60, 1), strict=True))
    if text and expected <= SECONDS_MAX:
        assert parse_duration(text) == expected
    else:
        with pytest.raises(UnitError):
            parse_duration(text)


@given(st.text() | st.text("0123456789.dhmsKMGTiB +-e", max_size=8))
def test_any_text_is_read_by_the_grammar_or_refused(text: str) -> None:
    size = re.fullmatch(r"[0-9]{1,19}(\.[0-9]{1,18})?([KMGTPE](i?B)?|kB)|[0-9]{1,19}B?", text)
    duration = re.fullmatch(r"([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?", text) if text else None
    for parse, well_formed in ((parse_size, size), (parse_duration, duration)):
        try:
            value = parse(text)
        except UnitError:
            continue
        assert well_formed
        assert value >= 0


@given(st.integers(0, BYTES_MAX))
def test_a_size_is_shown_shortly_and_within_five_percent(nbytes: int) -> None:
    shown = format_size(nbytes)
    number, unit = shown.split(" ")
    assert len(number) <= 4
    assert float(number) < 1024
    near = Fraction(number) * UNITS.get(unit, 2**50 if unit == "PiB" else 2**60)
    assert abs(near - nbytes) <= Fraction(nbytes, 20)


@given(st.integers(0, SECONDS_MAX))
def test_a_duration_is_shown_in_at_most_two_units_and_reads_back_a_little_less(duration_s: int) -> None:
    shown = format_duration(duration_s)
    assert len(shown.split()) <= 2
    read = parse_duration(shown.replace(" ", ""))
    assert read <= duration_s < read + max(60, duration_s // 20 + 1)


def test_examples_of_what_is_shown() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 3_435_973_837, 2**20 * 128, 1024**2 - 1)] == [
        "0 B", "1023 B", "1 KiB", "3.2 GiB", "128 MiB", "1 MiB",
    ]  # fmt: skip
    assert [format_duration(n) for n in (0, 59, 250, 9000, 604_800, 90_000)] == [
        "0s", "59s", "4m 10s", "2h 30m", "7d", "1d 1h",
    ]  # fmt: skip
    assert [plural(n, "entry") for n in (0, 1, 20_000)] == ["0 entries", "1 entry", "20,000 entries"]


@given(st.text())
def test_nothing_that_could_steer_a_terminal_gets_through(text: str) -> None:
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


def test_what_is_escaped_can_be_told_apart() -> None:
    odd = "a\x1b[31m\n\u202e\ud800" + b"\xff".decode(errors="surrogateescape")
    assert printable(odd) == r"a\x1b[31m\n\u202e\ud800\xff"
