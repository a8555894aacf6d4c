"""``snapstore ls``: sessions, requests or snapshots as rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import click

from snapstore._files import FileSystem
from snapstore._maintenance.listing import (
    CONDITION,
    Condition,
    RequestRow,
    Row,
    SessionRow,
    SnapshotRow,
    arrange,
    check_fields,
    request_rows,
    session_rows,
    snapshot_rows,
)
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.survey import Owner, Session, sessions, surroundings
from snapstore._maintenance.units import UnitError, format_duration, format_size, plural, printable
from snapstore.cli._options import chosen_root, json_option, root_options
from snapstore.cli._output import OWNER_STYLE, Cell, Column, emit_json, note, say, table
from snapstore.cli._remote import is_url, surveyed


class _Filtering(click.Command):
    """Lets one ``--filter`` be followed by several conditions, as a shell user would write them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give each condition a ``--filter`` of its own."""
        return super().parse_args(ctx, list(_spread(args)))


def _spread(args: list[str]) -> Iterator[str]:
    in_filters = is_value = False
    for each in args:
        if in_filters and not is_value and CONDITION.fullmatch(each):
            yield "--filter"
        elif not is_value:
            in_filters = each == "--filter"
        is_value = each == "--filter"
        yield each


@click.command(cls=_Filtering, short_help="List sessions, requests or snapshots.")
@root_options
@click.option("--requests", "level", flag_value="requests", help="A row for each request.")
@click.option("--snapshots", "level", flag_value="snapshots", help="A row for each snapshot.")
@click.option(
    "--filter", "filters", multiple=True, metavar="CONDITION...",
    help="Only rows with all of these: 'age>2h' 'size>1MiB' owner=dead 'request=batch-*'.",
)  # fmt: skip
@click.option("--sort", metavar="FIELD", help="age, size, owner, session, request, ...; -FIELD: falling.")
@click.option("--limit", type=click.IntRange(min=0), help="At most so many rows.")
@json_option
def ls(
    root: str | None,
    default_root: str | None,
    level: str | None,
    filters: tuple[str, ...],
    sort: str | None,
    limit: int | None,
    as_json: bool,
) -> int:
    """List the sessions below a root, or their requests or snapshots; of a URL, the lives.

    A session is one life of a store. Its owner is alive, or dead (its lock is free), or unknown (on another machine,
    or without a record).
    """
    view = _VIEWS[level or "sessions"]
    conditions = _conditions(view.kind, filters, sort)
    path = chosen_root(root, default_root)
    if is_url(path):
        with surveyed(path) as (_, survey):
            rows = arrange(view.rows_of(survey.sessions, time.time()), conditions, sort)
            odd = len(survey.findings)
    else:
        with opened_root(FileSystem(), path) as opened:
            path = opened.path
            counted = _Counted(sessions(opened, request_ids=level is not None))
            rows = arrange(view.rows_of(counted, time.time()), conditions, sort)
            odd = counted.findings + len(surroundings(opened).findings)
    shown = rows if limit is None else rows[:limit]
    if as_json:
        emit_json(
            "ls", root=path, rows_are=level or "sessions", total=len(rows), findings=odd,
            rows=[_as_json(row) for row in shown],
        )  # fmt: skip
    else:
        _show(view, rows, shown, odd)
    return 0


def _show(view: _View, rows: Sequence[Row], shown: Sequence[Row], odd: int) -> None:
    if shown:
        table(view.columns, [view.cells(row) for row in shown])
    if len(shown) < len(rows):
        say(f"... and {len(rows) - len(shown):,} more")
    say(_summary(rows))
    if odd:
        note(f"{plural(odd, 'thing')} below this root should not be there: see snapstore verify")


class _Counted:
    """Sessions passing by, and how many odd things lie in them."""

    def __init__(self, found: Iterable[Session]) -> None:
        self._found = found
        self.findings = 0

    def __iter__(self) -> Iterator[Session]:
        for session in self._found:
            self.findings += len(session.findings)
            yield session


def _conditions(kind: type[Row], filters: Sequence[str], sort: str | None) -> list[Condition]:
    try:
        conditions = [Condition.parse(text) for text in filters]
        check_fields(kind, conditions, sort)
    except UnitError as error:
        raise click.UsageError(str(error)) from error
    return conditions


def _as_json(row: Row) -> dict[str, Any]:
    fields = {name: getattr(row, name) for name in row.__slots__ if name not in ("owner", "size")}
    owner = {"owner": row.owner.liveness, "pid": row.owner.pid, "host": row.owner.host}
    return {**fields, **owner, "disk_bytes": row.size}


def _summary(rows: Sequence[Row]) -> str:
    nbytes = format_size(sum(row.size for row in rows))
    count = len({row.session for row in rows})
    snapshots = sum(1 if isinstance(row, SnapshotRow) else row.snapshots for row in rows)
    return f"{plural(snapshots, 'snapshot')} in {plural(count, 'session')}, {nbytes} on disk"


# --- rows as cells ---


class _View(NamedTuple):
    kind: type[Row]
    rows_of: Callable[[Iterable[Session], float], Iterator[Row]]
    columns: tuple[Column, ...]
    cells: Callable[[Any], Sequence[Cell | str]]


def owner_cell(owner: Owner) -> Cell:
    """``alive  4711@host``."""
    who = "" if owner.pid is None else f"  {owner.pid}@{printable(owner.host or '?')}"
    return Cell(owner.liveness + who, OWNER_STYLE[owner.liveness])


def _request_cell(row: RequestRow | SnapshotRow) -> Cell:
    if row.request is None:
        return Cell(f"? {row.request_hash}", "dim")
    return Cell(printable(row.request))


def _session_cells(row: SessionRow) -> Sequence[Cell | str]:
    age = "?" if row.age_s is None else format_duration(row.age_s)
    counts = f"{row.requests:,}", f"{row.snapshots:,}"
    return row.session, age, owner_cell(row.owner), *counts, format_size(row.size)


def _request_cells(row: RequestRow) -> Sequence[Cell | str]:
    owner = Cell(row.owner.liveness, OWNER_STYLE[row.owner.liveness])
    figures = f"{row.snapshots:,}", f"{row.tokens:,}", format_duration(row.age_s), format_size(row.size)
    return _request_cell(row), *figures, owner, row.session


def _snapshot_cells(row: SnapshotRow) -> Sequence[Cell | str]:
    owner = Cell(row.owner.liveness, OWNER_STYLE[row.owner.liveness])
    figures = f"{row.tokens:,}", format_duration(row.age_s), format_size(row.size)
    return _request_cell(row), *figures, owner, row.session


_VIEWS = {
    "sessions": _View(
        SessionRow,
        session_rows,
        (
            Column("session"), Column("age", right=True), Column("owner", folds=True),
            Column("requests", right=True), Column("snapshots", right=True), Column("size", right=True),
        ),
        _session_cells,
    ),
    "requests": _View(
        RequestRow,
        request_rows,
        (
            Column("request", folds=True), Column("snapshots", right=True), Column("tokens", right=True),
            Column("age", right=True), Column("size", right=True), Column("owner"), Column("session", cuts=True),
        ),
        _request_cells,
    ),
    "snapshots": _View(
        SnapshotRow,
        snapshot_rows,
        (
            Column("request", folds=True), Column("tokens", right=True), Column("age", right=True),
            Column("size", right=True), Column("owner"), Column("session", cuts=True),
        ),
        _snapshot_cells,
    ),
}  # fmt: skip
