"""``snapstore prune``: show the plan, ask, carry it out, and say what came of it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

import click

from snapstore._files import FileSystem
from snapstore._maintenance.plan import Plan, Rules, SessionPlan, make_plan
from snapstore._maintenance.prune import PruneReport, carry_out
from snapstore._maintenance.root import Root, opened_root
from snapstore._maintenance.survey import Loose, Session, SnapshotFile, sessions, surroundings
from snapstore._maintenance.units import format_duration, format_size, plural, printable
from snapstore.cli._ls import owner_cell
from snapstore.cli._options import DURATION, SIZE, chosen_root, json_option, root_options
from snapstore.cli._output import (
    Column,
    emit_json,
    finding_json,
    note,
    note_findings,
    on_terminal,
    progress,
    say,
    table,
)
from snapstore.cli._remote import is_url, surveyed

_EXAMPLES = """\b
Examples:
  snapstore prune ROOT                                 what dead owners left
  snapstore prune ROOT --older-than 2h30m --yes
  snapstore prune ROOT --max-bytes 20GiB --keep-latest 2 --dry-run
"""


@click.command(short_help="Remove snapshots and leftovers.", epilog=_EXAMPLES)
@root_options
@click.option("--older-than", "older_than_s", type=DURATION, metavar="2h30m", help="Only what is older.")
@click.option(
    "--by", type=click.Choice(["mtime", "atime"]), default="mtime", help="Age since written, or read."
)
@click.option("--max-bytes", type=SIZE, metavar="20GiB", help="Oldest first, only until so much is left.")
@click.option(
    "--keep-latest", type=click.IntRange(min=1), metavar="N", help="Not the latest N of each request."
)
@click.option("--request", metavar="GLOB", help="Only requests whose id matches.")
@click.option("--session", metavar="ID", help="Only this session.")
@click.option("--leftovers", is_flag=True, help="Only sessions of dead owners; the default without any rule.")
@click.option("--include-live", is_flag=True, help="Also what live or unknown owners have.")
@click.option("--dry-run", is_flag=True, help="Show what would go, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def prune(
    root: str | None,
    default_root: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **rules_given: Any,
) -> int:
    """Remove snapshots and leftovers. Safe while stores are open: what they own is left alone.

    Rules combine: a snapshot goes only if every one lets it go. Without any, all that dead owners left goes.
    Asks before it removes; where nobody can be asked, --yes is needed.
    """
    rules = Rules(**rules_given)
    path = chosen_root(root, default_root)
    _check_usage(rules, asks=not (dry_run or yes), as_json=as_json)
    with _opened(path, rules) as (path, plan, carry_out_plan):
        if dry_run:
            return _show_dry_run(path, plan, as_json)
        if not as_json and on_terminal():
            _show_plan(plan)
        if not (yes or plan.empty or _confirmed(plan)):
            say("Nothing was removed.")
            return 0
        with _stopping_gently() as go_on, progress("pruning", plan.freed_bytes) as freed:
            report = carry_out_plan(freed, go_on)
    return _show_report(path, plan, report, as_json)


_CarryOut = Callable[[Callable[[int], None], Callable[[], bool]], PruneReport]


@contextmanager
def _opened(path: str, rules: Rules) -> Iterator[tuple[str, Plan, _CarryOut]]:
    """The plan for a root or a URL, and how to carry it out."""
    if is_url(path):
        with surveyed(path) as (store, survey):
            from snapstore.remote._upkeep import Pruning

            if rules.by == "atime":
                raise click.UsageError(
                    "--by atime is for a root: a remote store does not tell when it was read"
                )
            plan = make_plan(survey.sessions, survey.surroundings, rules, time.time())
            yield path, plan, lambda freed, go_on: Pruning(store, freed, go_on).carry_out(plan)
    else:
        with opened_root(FileSystem(), path, to_change=True) as opened:
            plan = _plan(opened, rules)
            yield opened.path, plan, lambda freed, go_on: carry_out(opened, plan, progress=freed, go_on=go_on)


def _check_usage(rules: Rules, *, asks: bool, as_json: bool) -> None:
    if rules.include_live and rules.leftovers:
        raise click.UsageError("--leftovers is about dead owners, --include-live about live ones: give one")
    if rules.include_live and not rules.given:
        raise click.UsageError("--include-live alone would remove everything: say what, by a rule beside it")
    if asks and (as_json or not sys.stdin.isatty()):
        raise click.UsageError("nobody is there to be asked: give --yes, or look first with --dry-run")


def _plan(root: Root, rules: Rules) -> Plan:
    known = root.files.names(root.fd)
    if rules.session is not None and rules.session not in known:
        raise click.UsageError(f"there is no session {rules.session!r} in {root.path}: see snapstore ls")
    found: Iterator[Session] = sessions(root, request_ids=rules.request is not None)
    return make_plan(found, surroundings(root), rules, time.time())


def _confirmed(plan: Plan) -> bool:
    what = f"{plural(plan.snapshots, 'snapshot')} of {plural(plan.requests, 'request')}"
    try:
        return click.confirm(f"Remove {what}, {format_size(plan.freed_bytes)}?", err=True)
    except click.Abort:
        note("")  # the answer's line ends here
        raise


@contextmanager
def _stopping_gently() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C ends the work between two files; a second one does not wait for that."""
    asked: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: not asked
    finally:
        signal.signal(signal.SIGINT, previous)


# --- what is shown ---


def _show_plan(plan: Plan) -> None:
    if plan.empty:
        return
    columns = (
        Column("session"), Column("owner", folds=True), Column("requests", right=True),
        Column("snapshots", right=True),        Column("size", right=True), Column("goes"),
    )  # fmt: skip
    table(columns, map(_plan_cells, plan.sessions))
    if plan.unfinished:
        say(f"and {plural(len(plan.unfinished), 'session')} half made or half removed")


def _plan_cells(part: SessionPlan) -> tuple[Any, ...]:
    requests = len({each.of.request_hash for each in part.snapshots})
    counts = f"{requests:,}", f"{len(part.snapshots):,}"
    return (
        part.name,
        owner_cell(part.owner),
        *counts,
        format_size(part.freed_bytes),
        "whole" if part.whole else "partly",
    )


def _show_dry_run(path: str, plan: Plan, as_json: bool) -> int:
    if as_json:
        emit_json("prune", root=path, dry_run=True, **_plan_json(plan))
        return _status(plan)
    items = [*_removals(plan), *plan.unfinished]
    rows = [(printable(each.path), format_size(each.freed_bytes), _age(each.mtime_ns)) for each in items]
    rows += [(part.name, "", "") for part in plan.sessions if part.whole]
    if rows:
        table(
            (Column("would remove", folds=True), Column("size", right=True), Column("age", right=True)), rows
        )
    _show_notes(plan)
    say(f"Would reclaim {_what(plan.freed_bytes, plan.snapshots, plan.requests)}{_aside(plan.in_use)}")
    return _status(plan)


def _removals(plan: Plan) -> Iterator[SnapshotFile | Loose]:
    for part in plan.sessions:
        yield from part.snapshots
        yield from part.loose


def _age(mtime_ns: int) -> str:
    return format_duration(int(time.time() - mtime_ns / 1e9))


def _show_report(path: str, plan: Plan, report: PruneReport, as_json: bool) -> int:
    status = 130 if report.interrupted else 1 if report.errors else _status(plan)
    if as_json:
        findings = [finding_json(each) for each in plan.findings]
        emit_json("prune", root=path, dry_run=False, **asdict(report), findings=findings)
        return status
    _show_notes(plan)
    for error in report.errors:
        note(f"not removed: {printable(error)}")
    if report.interrupted:
        note("Interrupted: what is not removed yet stays as it was.")
    what = _what(report.freed_bytes, report.snapshots, report.requests)
    say(f"Reclaimed {what}{_aside(report.in_use, report.changed)}")
    return status


def _show_notes(plan: Plan) -> None:
    note_findings(plan.findings)
    if plan.unnamed:
        note(f"{plural(plan.unnamed, 'snapshot')} passed over: no file tells the request")
    if plan.over_bytes:
        note(f"still {format_size(plan.over_bytes)} over --max-bytes: nothing else may go by these rules")


def _status(plan: Plan) -> int:
    return 1 if plan.findings or plan.over_bytes else 0


def _what(freed_bytes: int, snapshots: int, requests: int) -> str:
    return f"{format_size(freed_bytes)} from {plural(snapshots, 'snapshot')} in {plural(requests, 'request')}"


def _aside(in_use: int, changed: int = 0) -> str:
    parts = [f"{in_use:,} skipped: in use"] if in_use else []
    parts += [f"{changed:,} skipped: changed meanwhile"] if changed else []
    return f" ({'; '.join(parts)})" if parts else ""


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "snapshots": plan.snapshots,
        "requests": plan.requests,
        "freed_bytes": plan.freed_bytes,
        "in_use": plan.in_use,
        "over_bytes": plan.over_bytes,
        "removals": [
            {"path": printable(each.path), "freed_bytes": each.freed_bytes, "mtime_s": each.mtime_ns // 10**9}
            for each in _removals(plan)
        ],
        "sessions": [part.name for part in plan.sessions if part.whole],
        "unfinished": [each.name for each in plan.unfinished],
        "findings": [finding_json(each) for each in plan.findings],
    }
