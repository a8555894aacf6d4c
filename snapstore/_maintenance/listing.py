"""Rows of ``snapstore ls``: sessions, requests or snapshots, filtered and sorted. Pure: it reads what a survey saw."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from snapstore._maintenance.survey import Generation, Owner, Session, SnapshotFile
from snapstore._maintenance.units import UnitError, parse_duration, parse_size


@dataclass(frozen=True, slots=True)
class SessionRow:
    """One session. Sizes are bytes on disk; ``age_s`` is ``None`` where the name tells no time."""

    session: str
    age_s: int | None
    owner: Owner
    requests: int
    snapshots: int
    size: int
    findings: int


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One life of one request in one session; its age is that of its newest snapshot."""

    request: str | None
    request_hash: str
    session: str
    generation: int
    owner: Owner
    age_s: int
    snapshots: int
    tokens: int
    size: int


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """One snapshot."""

    request: str | None
    request_hash: str
    session: str
    generation: int
    owner: Owner
    tokens: int
    age_s: int
    size: int
    path: str


Row = SessionRow | RequestRow | SnapshotRow


def session_rows(sessions: Iterable[Session], now_s: float) -> Iterator[SessionRow]:
    """A row a session."""
    for each in sessions:
        yield SessionRow(
            session=each.name,
            age_s=None if each.opened_at_s is None else _age(each.opened_at_s, now_s),
            owner=each.owner,
            requests=len({snapshot.of.request_hash for snapshot in each.snapshots}),
            snapshots=len(each.snapshots),
            size=each.disk_bytes,
            findings=len(each.findings),
        )


def request_rows(sessions: Iterable[Session], now_s: float) -> Iterator[RequestRow]:
    """A row for each generation of each request, the oldest first."""
    for session in sessions:
        by_generation: dict[Generation, list[SnapshotFile]] = {}
        for snapshot in session.snapshots:
            by_generation.setdefault(snapshot.of, []).append(snapshot)
        for generation, snapshots in sorted(by_generation.items(), key=lambda item: item[0].number):
            yield RequestRow(
                request=generation.request_id,
                request_hash=generation.request_hash,
                session=session.name,
                generation=generation.number,
                owner=session.owner,
                age_s=min(_age(each.mtime_ns / 1e9, now_s) for each in snapshots),
                snapshots=len(snapshots),
                tokens=max(each.token_count for each in snapshots),
                size=sum(each.disk_bytes for each in snapshots),
            )


def snapshot_rows(sessions: Iterable[Session], now_s: float) -> Iterator[SnapshotRow]:
    """A row a snapshot, by age of its request, and within it by tokens."""
    for session in sessions:
        for each in sorted(session.snapshots, key=lambda each: (each.of.number, each.token_count)):
            yield SnapshotRow(
                request=each.of.request_id,
                request_hash=each.of.request_hash,
                session=session.name,
                generation=each.of.number,
                owner=session.owner,
                tokens=each.token_count,
                age_s=_age(each.mtime_ns / 1e9, now_s),
                size=each.disk_bytes,
                path=each.path,
            )


def _age(since_s: float, now_s: float) -> int:
    return max(0, int(now_s - since_s))


# --- filters and order ---

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise UnitError(f"{text!r} is not a whole number")
    return int(text)


_NUMBERS: dict[str, Callable[[str], int]] = {
    "age": parse_duration,
    "size": parse_size,
    "requests": _whole,
    "snapshots": _whole,
    "tokens": _whole,
    "generation": _whole,
}
_TEXTS = ("owner", "session", "request")
FIELDS = (*_NUMBERS, *_TEXTS)
"""What a row can be filtered and sorted by; not every kind of row has every one."""

CONDITION = re.compile(rf"({'|'.join(FIELDS)})({'|'.join(_OPERATORS)})(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Condition:
    """One filter: ``age>2h``, ``size>1MiB``, ``owner=dead``, ``request=batch-*``."""

    field: str
    operator: str
    value: int | str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """``UnitError`` for what is no filter."""
        match = CONDITION.fullmatch(text)
        if match is None:
            raise UnitError(
                f"{text!r} is no filter; write one like age>2h, size>1MiB or owner=dead ({_FIELD_LIST})"
            )
        field, symbol, value = match.groups()
        if field in _NUMBERS:
            return cls(field, symbol, _NUMBERS[field](value))
        if symbol not in ("=", "!="):
            raise UnitError(f"{text!r}: {field} is a text; compare it with = or !=")
        return cls(field, symbol, value)

    def holds(self, row: Row) -> bool:
        """Whether the row passes; one that does not know (no age, no readable request id) passes only ``!=``."""
        known = value_of(row, self.field)
        if known is None:
            return self.operator == "!="
        if isinstance(self.value, str):
            return fnmatchcase(str(known), self.value) is (self.operator == "=")
        return _OPERATORS[self.operator](known, self.value)


_FIELD_LIST = "by " + ", ".join(FIELDS)


def arrange(rows: Iterable[Row], conditions: Sequence[Condition], sort: str | None) -> list[Row]:
    """The rows that pass every condition, by ``sort``: a field, falling with a ``-`` before it.

    ``UnitError`` for a field that these rows do not have.
    """
    kept = [row for row in rows if all(condition.holds(row) for condition in conditions)]
    if sort is not None:
        falling = sort.startswith("-")
        field = sort.removeprefix("-")
        kept.sort(key=lambda row: _sort_key(row, field), reverse=falling)
    return kept


def check_fields(kind: type[Row], conditions: Sequence[Condition], sort: str | None) -> None:
    """``UnitError`` for a field that rows of this kind do not have."""
    asked = [condition.field for condition in conditions] + (
        [sort.removeprefix("-")] if sort is not None else []
    )
    there = [field for field in FIELDS if _ATTRIBUTE.get(field, field) in kind.__slots__]
    for field in asked:
        if field not in there:
            raise UnitError(f"{field!r} is no field of this list; it has {', '.join(there)}")


def value_of(row: Row, field: str) -> int | str | None:
    """What a row says in a field."""
    value = getattr(row, _ATTRIBUTE.get(field, field))
    return value.liveness if isinstance(value, Owner) else value


_ATTRIBUTE = {"age": "age_s"}


def _sort_key(row: Row, field: str) -> tuple[bool, Any]:
    value = value_of(row, field)
    return value is not None, value
