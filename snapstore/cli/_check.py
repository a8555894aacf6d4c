"""``verify`` and ``doctor``: whether files, root and machine are as they should be."""

from __future__ import annotations

import stat
import time
from collections import Counter
from dataclasses import asdict
from textwrap import fill
from typing import TYPE_CHECKING

import click

from snapstore._files import FileSystem
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.survey import WRONG, Finding, sessions
from snapstore._maintenance.units import format_rate, format_size, plural, printable
from snapstore._maintenance.verify import VerifyReport, verify_file, verify_root
from snapstore.cli._options import chosen_root, json_option, root_options
from snapstore.cli._output import Cell, Column, emit_json, finding_json, line_width, progress, say, table
from snapstore.cli._remote import is_url, surveyed

if TYPE_CHECKING:
    from snapstore._maintenance.doctor import Checkup


@click.command(short_help="Read every snapshot, compare it with its checksums.")
@root_options
@click.option(
    "--quarantine", is_flag=True, help="Move corrupt snapshots of dead owners aside; deletes nothing."
)
@click.option("--include-live", is_flag=True, help="With --quarantine: also those of live or unknown owners.")
@json_option
def verify(
    root: str | None, default_root: str | None, quarantine: bool, include_live: bool, as_json: bool
) -> int:
    """Read every snapshot of a ROOT or a URL, or one FILE, and compare it with its checksums.

    Lists what is corrupt or should not be there, and what is half written or in trash. Exit status 1 if anything is
    wrong.
    """
    if include_live and not quarantine:
        raise click.UsageError("--include-live goes with --quarantine")
    path, files, started_s = chosen_root(root, default_root), FileSystem(), time.monotonic()
    if is_url(path):
        report = _verify_url(path, quarantine)
    elif _is_root(files, path):
        report = _verify_root(files, path, quarantine, include_live)
    elif quarantine:
        raise click.UsageError("--quarantine needs a root: a single file has no place to be moved to")
    else:
        with progress("verifying", files.status_at(path).st_size) as on_read:
            report = verify_file(files, path, on_read)
    took_s = time.monotonic() - started_s
    _show_json(path, report, took_s) if as_json else _show_verified(report, took_s)
    return 1 if report.wrong else 0


def _is_root(files: FileSystem, path: str) -> bool:
    try:
        mode = files.status_at(path).st_mode
    except FileNotFoundError:
        return True  # to be refused as one
    if stat.S_ISLNK(mode):
        raise click.UsageError(f"{path} is a symbolic link; name the file or the directory itself")
    return stat.S_ISDIR(mode)


def _verify_root(files: FileSystem, path: str, quarantine: bool, include_live: bool) -> VerifyReport:
    with opened_root(files, path, to_change=quarantine) as root:
        nbytes = sum(each.nbytes for session in sessions(root) for each in session.snapshots)
        with progress("verifying", nbytes) as on_read:
            return verify_root(root, on_read=on_read, quarantine=quarantine, include_live=include_live)


def _verify_url(url: str, quarantine: bool) -> VerifyReport:
    if quarantine:
        raise click.UsageError("--quarantine needs a root: what is corrupt in a remote store is for prune")
    with surveyed(url) as (store, survey):
        from snapstore.remote._upkeep import verify as verify_prefix

        nbytes = sum(each.nbytes for session in survey.sessions for each in session.snapshots)
        with progress("verifying", nbytes) as on_read:
            return verify_prefix(store, survey, on_read)


def _show_json(path: str, report: VerifyReport, took_s: float) -> None:
    emit_json(
        "verify", path=path, checked=report.checked, checked_bytes=report.checked_bytes,
        without_checksums=report.without_checksums, quarantined=report.quarantined, kept=report.kept,
        seconds=int(took_s), wrong=len(report.wrong), findings=[finding_json(each) for each in report.findings],
    )  # fmt: skip


def _show_verified(report: VerifyReport, took_s: float) -> None:
    if report.findings:
        columns = (
            Column("what"),
            Column("size", right=True),
            Column("path", folds=True),
            Column("why", folds=True),
        )
        table(columns, map(_finding_cells, report.findings))
        say("")
    if report.without_checksums:
        say(f"{plural(report.without_checksums, 'snapshot')} without checksums: only sizes could be compared")
    if report.quarantined:
        say(f"Moved {plural(report.quarantined, 'corrupt snapshot')} to quarantine")
    if report.kept:
        say(f"Left {plural(report.kept, 'corrupt snapshot')} in place: the owner is alive or unknown")
    rate = format_rate(report.checked_bytes, took_s)
    checked = f"Checked {plural(report.checked, 'snapshot')}, {format_size(report.checked_bytes)} at {rate}"
    if not report.wrong:
        say(f"{checked}: all sound", "green")
        return
    kinds = Counter(each.kind for each in report.wrong)
    say(f"{checked}: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()), "red")


def _finding_cells(finding: Finding) -> tuple[Cell | str, ...]:
    style = "red" if finding.kind in WRONG else "dim"
    size = format_size(finding.nbytes) if finding.nbytes else ""
    return Cell(finding.kind, style), size, printable(finding.path), printable(finding.why)


@click.command(short_help="Look at this machine, and at a root's disk.")
@root_options
@json_option
def doctor(root: str | None, default_root: str | None, as_json: bool) -> int:
    """Look at this machine, and with a ROOT at its disk: speed, locks, renames, space, leftovers.

    Writes and removes some files of 64 MB there.
    """
    from snapstore._maintenance.doctor import examine

    path = root or default_root
    if path is None:
        checkup = examine(None)
    else:
        with opened_root(FileSystem(), chosen_root(root, default_root), to_change=True) as opened:
            checkup = examine(opened)
    if as_json:
        speed = None if checkup.speed is None else asdict(checkup.speed)
        emit_json("doctor", root=path, findings=[asdict(each) for each in checkup.diagnoses], speed=speed)
    else:
        _show_checkup(checkup)
    return 1 if any(each.level == "problem" for each in checkup.diagnoses) else 0


_LEVEL_COLOUR = {"ok": "green", "note": "yellow", "problem": "red"}


def _show_checkup(checkup: Checkup) -> None:
    """Finding and advice one below the other, so that both stay readable in a narrow terminal."""
    for each in checkup.diagnoses:
        lead = f"{each.level:<8} {each.topic:<12}"
        say(_wrapped(each.finding, lead), _LEVEL_COLOUR[each.level])
        say(_wrapped(each.advice, ""))


def _wrapped(text: str, lead: str) -> str:
    """Beside its lead, within the terminal; on one line where no terminal is."""
    return fill(text, line_width(), initial_indent=f"{lead:<22}", subsequent_indent=" " * 22)
