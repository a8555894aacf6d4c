"""The lock names the versions of constraints.txt, each with hashes, and nothing that the extras do not need."""

from __future__ import annotations

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^\s;\\]+)")


def _pins(name: str) -> set[tuple[str, str]]:
    lines = (CHECKOUT / name).read_text().splitlines()
    return {(found[1], found[2]) for found in map(PIN.match, lines) if found}


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    locked = _pins("requirements.lock")
    assert locked - _pins("constraints.txt") == set(), "run `make lock`"
    assert {"safetensors", "xxhash", "pytest", "ruff"} <= {name for name, _ in locked}


def test_every_line_of_the_lock_has_its_hashes() -> None:
    entries = re.split(r"\n(?=\S)", (CHECKOUT / "requirements.lock").read_text().strip())
    assert len(entries) > 50
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
