"""The ``snapstore`` command: what ``_maintenance`` finds out, as tables for people and as JSON for programs.

Exit status: 0 fine, 1 problems found, 2 wrong usage (a root that is refused included), 10 no such root, 130 interrupted
or nobody read on.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from importlib.util import find_spec

_NEEDED = ("click", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. Without click and rich it says how to get them."""
    _stand_in_for_closed_streams()
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        advice = "Install them: pip install 'snapstore[cli]'"
        sys.stderr.write(f"The snapstore command needs {' and '.join(missing)}. {advice}\n")
        return 2
    try:
        from snapstore.cli._app import run

        return run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130


def _stand_in_for_closed_streams() -> None:
    """Whoever closes a standard stream (``>&-``) does not want to hear from it; that is no error."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
