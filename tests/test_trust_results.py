"""The figures of a long run are written where they are asked for, and nowhere else."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from trust_results import FOLDER, record


def test_a_result_says_what_was_counted_when_and_how_to_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "results"))
    record("crash", "make crash", kills=999)
    record("crash", "make crash", kills=1000, lost=0)
    (written,) = (tmp_path / "results").iterdir()
    result = json.loads(written.read_text())
    age = datetime.datetime.now(datetime.timezone.utc).date() - datetime.date.fromisoformat(
        result.pop("date")
    )
    assert age.days in (0, 1)
    assert written.name == "crash.json"
    assert result == {"name": "crash", "command": "make crash", "figures": {"kills": 1000, "lost": 0}}


def test_without_a_folder_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    record("crash", "make crash", kills=1000)
    assert list(Path().iterdir()) == []
