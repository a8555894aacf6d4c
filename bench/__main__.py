"""``python -m bench``: the entry point of the benchmarks. It has no workloads yet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """List the workloads; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of snapstore.")
    parser.add_argument("--list", action="store_true", help="list the workloads and end")
    parser.add_argument("--quick", action="store_true", help="each as short as it still means something")
    parser.parse_args(arguments)
    print("No workloads yet.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
