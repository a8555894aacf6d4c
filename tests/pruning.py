"""A prune as the command makes it, without the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snapstore._files import FileSystem
from snapstore._maintenance.plan import Plan, Rules, make_plan
from snapstore._maintenance.prune import PruneReport, carry_out
from snapstore._maintenance.root import Root, opened_root
from snapstore._maintenance.survey import sessions, surroundings

FAR = 4_000_000_000.0
"""The time of day at which everything is old."""


def planned(root: Root, **rules: Any) -> Plan:
    found = sessions(root, request_ids="request" in rules)
    return make_plan(found, surroundings(root), Rules(**rules), FAR)


def prune(path: Path, files: FileSystem | None = None, **rules: Any) -> PruneReport:
    with opened_root(files or FileSystem(), str(path), to_change=True) as root:
        return carry_out(root, planned(root, **rules))
