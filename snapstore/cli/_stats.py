"""``snapstore stats``: a root in figures, once or again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import click

from snapstore._files import FileSystem
from snapstore._maintenance.root import Root, opened_root
from snapstore._maintenance.totals import Amount, Bar, Totals, count, totals
from snapstore._maintenance.units import format_duration, format_size, plural, printable
from snapstore.cli._options import DURATION, chosen_root, json_option, root_options
from snapstore.cli._output import bar, emit_json, on_terminal, say
from snapstore.cli._remote import is_url, surveyed


@click.command(short_help="Count what is below a root.")
@root_options
@click.option("--watch", is_flag=True, help="Draw it anew until interrupted (on a terminal).")
@click.option("--interval", type=DURATION, default="2s", show_default=True, help="Between two drawings.")
@json_option
def stats(root: str | None, default_root: str | None, watch: bool, interval: int, as_json: bool) -> int:
    """Count what is below a root: owners, requests, snapshots, bytes, ages, sizes."""
    if watch and (as_json or not on_terminal()):
        raise click.UsageError("--watch draws on a terminal; for programs, call stats --json again and again")
    path = chosen_root(root, default_root)
    if is_url(path):
        if watch:
            raise click.UsageError("--watch is for a root; a URL would be listed again and again")
        with surveyed(path) as (_, survey):
            counted = count(survey.sessions, survey.surroundings, None)
    else:
        with opened_root(FileSystem(), path) as opened:
            if watch:
                _watch(opened, max(interval, 1))
            path, counted = opened.path, totals(opened)
    if as_json:
        emit_json("stats", root=path, disk_bytes=counted.disk_bytes, **asdict(counted))
    else:
        say("\n".join(_lines(path, counted)))
    return 0


def _watch(root: Root, interval_s: int) -> None:
    """Until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(
        console=Console(file=sys.stdout), screen=True, auto_refresh=False, redirect_stdout=False
    ) as live:
        while True:
            live.update(Text("\n".join(_lines(root.path, totals(root)))), refresh=True)
            time.sleep(interval_s)


def _lines(path: str, counted: Totals) -> Iterator[str]:
    yield printable(path)
    yield f"  sessions      {counted.alive} alive, {counted.dead} dead, {counted.unknown} unknown"
    yield f"  requests      {counted.requests:,}"
    yield f"  snapshots     {_amount(counted.snapshots)}"
    for name, amount in (
        ("being written", counted.temporaries),
        ("in trash", counted.trash),
        ("half removed", counted.unfinished),
        ("quarantined", counted.quarantined),
    ):
        if amount.count:
            yield f"  {name:<14}{_amount(amount)}"
    free = "" if counted.free_bytes is None else f", {format_size(counted.free_bytes)} free"
    yield f"  on disk       {format_size(counted.disk_bytes)}{free}"
    if counted.oldest_s is not None and counted.newest_s is not None:
        yield f"  ages          {format_duration(counted.newest_s)} to {format_duration(counted.oldest_s)}"
    if counted.findings:
        yield f"  odd           {plural(counted.findings, 'thing')}: see snapstore verify"
    yield from _histogram("age", counted.ages, format_duration)
    yield from _histogram("size", counted.sizes, format_size)


def _amount(amount: Amount) -> str:
    return f"{amount.count:,}, {format_size(amount.disk_bytes)}"


def _histogram(title: str, bars: tuple[Bar, ...], show: Callable[[int], str]) -> Iterator[str]:
    if not bars:
        return
    yield ""
    yield f"  {title}"
    most = max(each.count for each in bars)
    for each in bars:
        bounds = (
            f"{show(each.low)} and more" if each.high is None else f"{show(each.low)} to {show(each.high)}"
        )
        lead = f"  {bounds:>20}  {each.count:>7,}  "
        yield lead + bar(each.count, most, len(lead))
