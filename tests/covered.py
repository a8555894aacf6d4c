"""What the tests cover, from coverage's own data: all branches of the core, and nearly all of the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from trust_results import record

CORE = ("_state", "_room", "_ledger", "_writer", "_cleanup", "_session", "_format")
CORE_PERCENT = 100.0
OVERALL_PERCENT = 95.0


def main() -> int:
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "report", "--skip-covered"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        subprocess.run([*coverage, "json", "--quiet", "-o", str(path)], check=True)
        found = json.loads(path.read_text())
    files = {
        Path(name).stem: each["summary"] for name, each in found["files"].items() if name.count("/") == 1
    }
    core = {name: files[name]["percent_covered"] for name in CORE}
    overall = found["totals"]["percent_covered"]
    for name, percent in core.items():
        print(f"snapstore/{name}.py: {percent:.1f} %")
    print(f"all of snapstore: {overall:.1f} %")
    record(
        "coverage",
        "make coverage",
        core_percent=round(min(core.values()), 1),
        overall_percent=round(overall, 1),
        branches=found["totals"]["num_branches"],
    )
    return 0 if min(core.values()) >= CORE_PERCENT and overall >= OVERALL_PERCENT else 1


if __name__ == "__main__":
    sys.exit(main())
