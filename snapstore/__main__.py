"""``python -m snapstore`` is the ``snapstore`` command."""

import sys

from snapstore.cli import main

if __name__ == "__main__":
    sys.exit(main())
