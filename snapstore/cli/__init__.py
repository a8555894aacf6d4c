"""The ``snapstore`` command: what ``_maintenance`` finds out, as tables for people and as JSON for programs.

Exit status: 0 fine, 1 problems found, 2 wrong usage (a root that is refused included), 10 no such root, 130 interrupted
or nobody read on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

_NEEDED = ("click", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. Without click and rich it says how to get them."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        advice = "Install them: pip install 'snapstore[cli]'"
        sys.stderr.write(f"The snapstore command needs {' and '.join(missing)}. {advice}\n")
        return 2
    from snapstore.cli._app import run

    return run(arguments)
