"""Figures of the long runs, one small file a run: `docs/trust.md` is made of them, not typed.

Only where the environment variable ``SNAPSTORE_TRUST_RESULTS`` names a folder: the ``make`` targets set it.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

FOLDER = "SNAPSTORE_TRUST_RESULTS"


def record(name: str, command: str, **figures: object) -> None:
    """Write ``<folder>/<name>.json``: what was counted, when, and the command that repeats it."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    result = {"name": name, "figures": figures, "date": date, "command": command}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
