"""Two sorts of output: for people (tables, colours and bars on a terminal, plain aligned text elsewhere) and JSON.

Every text that comes from a disk is escaped before it gets here or here; rich's markup is never used on one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import click

from snapstore._maintenance.survey import WRONG, Finding
from snapstore._maintenance.units import format_rate, printable

SCHEMA = 1
"""Of the JSON; a field that goes or changes its meaning raises it, a new field does not."""


class Column(NamedTuple):
    """A column of a table. In a narrow terminal one that ``folds`` takes more lines, one that ``cuts`` ends early."""

    title: str
    right: bool = False
    folds: bool = False
    cuts: bool = False


class Cell(NamedTuple):
    """A text in a style of rich's."""

    text: str
    style: str = ""


_NARROW = 8
"""A column that gives way in a narrow terminal keeps so much."""

OWNER_STYLE = {"alive": "green", "dead": "yellow", "unknown": "magenta"}


def emit_json(command: str, **fields: Any) -> None:
    """The one object that a command with ``--json`` prints."""
    _print(json.dumps({"schema": SCHEMA, "command": command, **fields}, allow_nan=False))


def on_terminal() -> bool:
    """Whether somebody looks at standard output who can see colours and bars."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def line_width() -> int:
    """Columns for running text: the terminal's, up to where lines get hard to read; without one, no end."""
    return min(os.get_terminal_size(sys.stdout.fileno()).columns, 110) if on_terminal() else 10_000


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def say(text: str, style: str = "") -> None:
    """A line of the answer; ``style`` is a colour."""
    coloured = style and on_terminal() and not os.environ.get("NO_COLOR")
    _print(click.style(text, fg=style) if coloured else text)


def note(text: str) -> None:
    """A line beside the answer: to standard error, so that a pipe carries the answer alone."""
    sys.stderr.write(f"{text}\n")


def finding_json(finding: Finding) -> dict[str, Any]:
    """A finding as it stands in JSON."""
    return {
        "kind": finding.kind, "wrong": finding.kind in WRONG, "path": printable(finding.path),
        "why": printable(finding.why), "disk_bytes": finding.nbytes,
    }  # fmt: skip


def note_findings(findings: Sequence[Finding], *, most: int = 20) -> None:
    """A line for each of the first findings."""
    for each in findings[:most]:
        note(f"{each.kind}: {printable(each.path)}: {printable(each.why)}")
    if len(findings) > most:
        note(f"... and {len(findings) - most:,} more; snapstore verify lists them all")


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]]) -> None:
    """Rows below titles."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    if on_terminal():
        _rich_table(columns, cells)
    else:
        _plain_table(columns, cells)


def _plain_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    texts = [[column.title.upper() for column in columns], *([cell.text for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in texts) for index in range(len(columns))]
    for row in texts:
        padded = [
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(row, widths, columns, strict=True)
        ]
        _print("  ".join(padded).rstrip())


def _rich_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column, width in zip(columns, _widths(columns, rows, console.width), strict=True):
        drawn.add_column(
            column.title.upper(),
            justify="right" if column.right else "left",
            no_wrap=not column.folds,
            overflow="fold" if column.folds else "ellipsis",
            width=width,
        )
    for row in rows:
        drawn.add_row(*(Text(cell.text, cell.style) for cell in row))
    console.print(drawn)


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], room: int) -> list[int]:
    """What each column wants; where that is more than there is, the widest of those that can do with less give way."""
    from rich.cells import cell_len

    widths = [
        max([cell_len(row[i].text) for row in rows] + [len(column.title)]) for i, column in enumerate(columns)
    ]
    givers = [i for i, column in enumerate(columns) if column.folds or column.cuts]
    while sum(widths) + 2 * (len(columns) - 1) > room:
        widest = max(givers, key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= _NARROW:
            break
        widths[widest] -= 1
    return widths


def bar(count: int, most: int, beside: int) -> str:
    """A bar for a histogram, at least a sliver for anything; plain ASCII where nothing else can be shown.

    ``beside``: columns of the line that are taken already.
    """
    width = max(10, min(40, line_width() - beside))
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    full, parts = ("█", ["", *"▏▎▍▌▋▊▉"]) if encoding.startswith("utf") else ("#", [""])
    steps = max(round(count / max(most, 1) * width * len(parts)), 1 if count else 0)
    whole, rest = divmod(steps, len(parts))
    return full * whole + parts[rest]


@contextmanager
def progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left, fed with bytes; nothing at all unless a terminal watches."""
    if not (on_terminal() and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich import progress as parts
    from rich.console import Console
    from rich.text import Text

    class Rate(parts.ProgressColumn):
        """Bytes a second, in our own units."""

        def render(self, task: parts.Task) -> Text:
            return Text(format_rate(int(task.speed or 0), 1))

    columns = parts.BarColumn(), parts.DownloadColumn(True), Rate(), parts.TimeRemainingColumn()
    with parts.Progress(title, *columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=total_bytes)
        yield lambda nbytes: shown.advance(task, nbytes)
