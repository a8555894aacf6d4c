"""The layers of DESIGN.md, enforced on the syntax trees of ``snapstore/``: a module that is not in the table fails too.

What is checked: imports go down, and sideways only as the table says; frameworks and other packages are imported only
in the rooms made for them; only ``_files`` touches the disk; only ``_paths`` knows a name on disk. And, in a process of
its own, that ``import snapstore`` brings in no framework, starts no thread and installs no signal handler.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapstore import _paths

PACKAGE = Path(__file__).resolve().parents[1] / "snapstore"

LAYERS: tuple[dict[str, set[str]], ...] = (
    # Each module of a layer, with the modules of the same layer that it may import; lower layers are open to all of it.
    {
        "_types": set(),
        "_options": {"_threads"},
        "_threads": set(),
        "_errors": {"_types"},
        "_ticket": {"_threads", "_types"},
        "_arguments": {"_options", "_types"},
    },
    {
        "_paths": set(),
        "_files": {"_ways"},
        "_ways": set(),
        "_format": {"_checksum", "_json"},
        "_json": set(),
        "_checksum": set(),
        "_memory": {"_format"},
        "_device": {"_format"},
        "_pinned": {"_device", "_memory"},
        "_filing": {"_checksum", "_files", "_format"},
        "_owner": {"_files", "_paths"},
        "_reader": {"_checksum", "_files", "_format", "_memory"},
        "_latency": set(),
        "_reasons": {"_device"},
        "_events": {"_reasons"},
        "adapters": {"_device", "_format", "_memory"},
    },
    {
        "_records": set(),
        "_room": {"_records"},
        "_ledger": {"_records", "_room"},
        "_observer": {"_records"},
        "_state": {"_ledger", "_observer", "_records", "_room"},
        "_device_records": {"_records"},
        "_flights": {"_device_records"},
        "_placing": {"_device_records"},
        "_session": set(),
        "_adopt": {"_session"},
    },
    {
        "_writer": set(),
        "_cleanup": set(),
        "_staging": set(),
        "_door": set(),
        "_loading": {"_door", "_staging"},
        "_committed": set(),
        "_detach": set(),
        "_engine": {"_cleanup", "_door", "_staging", "_writer"},
        "_look": {"_engine"},
        "_saving": {"_engine", "_staging"},
    },
    {"_store": set(), "__init__": {"_store"}},
    {
        "_maintenance": set(),
        "aio": set(),
        "asgi": {"_maintenance", "aio", "metrics"},
        "blocks": set(),
        "caches": set(),
        "cli": {"_maintenance", "asgi", "demo", "remote"},
        "__main__": {"cli"},
        "compat": {"caches"},
        "demo": {"caches"},
        "integrations": {"blocks"},
        "metrics": set(),
        "remote": {"_maintenance"},
        "signals": set(),
        "testing": set(),
    },
)
EDGES = len(LAYERS) - 1

DOORS = {("_door", "remote")}
"""The one way up: what an option asks for, imported when it does."""

FRAMEWORKS = {"ml_dtypes", "mlx", "mlx_lm", "numpy", "torch", "transformers"}
FRAMEWORK_ROOMS = {"_staging", "adapters", "blocks", "caches", "compat", "demo", "integrations", "testing"}
DEPENDENCIES = {"safetensors", "xxhash"}
"""What every layer may import, beside the standard library."""


def words(text: str) -> set[str]:
    return set(text.split())


DISK_ROOMS = {
    "_files",
    "_ways",
    "demo",
}  # the demo is a caller: it makes its own folder, and looks at what is left there
DISK_MODULES = words("fcntl fileinput glob shutil tempfile")
DISK_CALLS = {
    "os": words(
        """access chdir chmod chown close copy_file_range fchmod fdatasync fstat fstatvfs fsync ftruncate fwalk link
        listdir lseek lstat makedirs mkdir mkfifo mknod open posix_fadvise posix_fallocate pread preadv pwrite pwritev
        read readlink readv remove removedirs rename renames replace rmdir scandir sendfile stat statvfs symlink sync
        truncate unlink utime walk write writev"""
    ),
    "os.path": words(
        "exists getatime getctime getmtime getsize isdir isfile islink ismount lexists realpath samefile"
    ),
    "io": {"FileIO", "open"},
}
CLOCK_CALLS = words("time.monotonic time.monotonic_ns time.perf_counter time.perf_counter_ns time.sleep")
DISK_METHODS = words(
    "hardlink_to is_dir is_file is_symlink iterdir read_bytes read_text rglob symlink_to touch write_bytes write_text"
)
"""Methods of ``pathlib.Path`` that reach a disk, as far as their names tell."""

THREAD_ROOMS = {"_threads", "_owner", "_ways", "adapters"}
"""Beside the room for it: a fork meets all stores of the process at once, a file system may be of several, and a
driver's locks are its own."""

MAY_TOUCH = {
    "_owner": {"os.close", ".read_text"},
    "_pinned": {".read_text"},
    "asgi": {".read_text"},
    "signals": {"os.close", "os.read", "os.write"},
}
"""Exceptions, call by call: a package's own page; a forked child drops its copy of the lock; ``/proc`` and ``/sys`` are
no disks, nor is a pipe."""

NAMES_ON_DISK = {
    value
    for name, value in vars(_paths).items()
    if name.isupper() and isinstance(value, str) and "." in value
}


def modules_of(package: Path) -> dict[str, list[Path]]:
    """The files of each module of the table: a folder is one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found.setdefault(parts[0], []).append(path)
    return found


def layer_of(module: str) -> int | None:
    return next((number for number, layer in enumerate(LAYERS) if module in layer), None)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every import, also a late one or one for type checkers only, as (line, dotted name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names = [f"{start}.{alias.name}" for alias in node.names] if start == "snapstore" else [start]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            constants = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in constants)


def import_violations(module: str, tree: ast.AST) -> Iterator[str]:
    for line, name in imports(tree):
        top, _, rest = name.partition(".")
        if top == "snapstore":
            yield from inner_import_violations(module, line, rest.split(".")[0])
        elif not top:
            yield f"{module}:{line}: {name} is a relative import"
        elif top in FRAMEWORKS:
            if module not in FRAMEWORK_ROOMS:
                yield f"{module}:{line}: {top} is imported outside the rooms made for frameworks"
        elif top not in sys.stdlib_module_names and top not in DEPENDENCIES and layer_of(module) != EDGES:
            yield f"{module}:{line}: {top} is not a dependency of the core"


def inner_import_violations(module: str, line: int, name: str) -> Iterator[str]:
    # `from snapstore import SnapshotStore` names no module: it imports the package's face.
    target = name if layer_of(name) is not None or name.startswith("_") else "__init__"
    here, there = layer_of(module), layer_of(target)
    if here is None or target == module or (module, target) in DOORS:
        return
    if there is None:
        yield f"{module}:{line}: {target} is not in the table of layers"
    elif there > here:
        yield f"{module}:{line}: imports {target}, which is in a higher layer"
    elif there == here and target not in LAYERS[here][module]:
        yield f"{module}:{line}: imports {target} beside it, and the table does not say so"


def disk_violations(module: str, tree: ast.AST) -> Iterator[str]:
    if module in DISK_ROOMS:
        return
    for line, name in imports(tree):
        if name.split(".")[0] in DISK_MODULES:
            yield f"{module}:{line}: {name} touches the disk: go through _files"
    for node in ast.walk(tree):
        for call in disk_calls(node):
            if call not in MAY_TOUCH.get(module, set()):
                yield f"{module}:{getattr(node, 'lineno', 0)}: {call} touches the disk: go through _files"


def disk_calls(node: ast.AST) -> Iterator[str]:
    """What of this one node reaches a disk; a mention is enough, since a function can be called by another name."""
    if isinstance(node, ast.Attribute):
        owner = ast.unparse(node.value)
        if node.attr in DISK_CALLS.get(owner, set()):
            yield f"{owner}.{node.attr}"
        elif node.attr in DISK_METHODS:
            yield f".{node.attr}"
    elif isinstance(node, ast.Name) and node.id == "open":
        yield "open"
    elif isinstance(node, ast.ImportFrom):
        reaching = DISK_CALLS.get(node.module or "", set())
        yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name in reaching)


def thread_violations(module: str, tree: ast.AST) -> Iterator[str]:
    """The core takes its locks, its threads and its clock from one place."""
    if module in THREAD_ROOMS or layer_of(module) == EDGES:
        return
    for line, name in imports(tree):
        if name.split(".")[0] in ("_thread", "queue", "threading"):
            yield f"{module}:{line}: {name} is for threads: go through _threads"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in CLOCK_CALLS:
            yield f"{module}:{node.lineno}: {ast.unparse(node)} is a clock: go through _threads"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Future":
            yield f"{module}:{node.lineno}: a Future is waited for: go through _threads"


def name_violations(module: str, tree: ast.AST) -> Iterator[str]:
    if module == "_paths":
        return
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and id(node) not in prose:
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            for name in NAMES_ON_DISK:
                if name in text:
                    yield f"{module}:{node.lineno}: {name!r} is a name on disk: it belongs in _paths"


def violations(module: str, source: str) -> list[str]:
    """All that is wrong with one file of a module."""
    tree = ast.parse(source)
    if layer_of(module) is None:
        return [f"{module}:1: is not in the table of layers: give it its place in {Path(__file__).name}"]
    return [
        *import_violations(module, tree),
        *disk_violations(module, tree),
        *thread_violations(module, tree),
        *name_violations(module, tree),
    ]


MODULES = modules_of(PACKAGE)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_keeps_to_its_layer(module):
    found = [
        f"{path.name}: {each}" for path in MODULES[module] for each in violations(module, path.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_table_holds_no_module_of_the_core_that_is_gone():
    core = {module for layer in LAYERS[:EDGES] for module in layer}
    assert core - set(MODULES) == set()


def test_the_names_on_disk_are_those_of_the_contract():
    expected = {".snapstore", "owner.json", "owner.lock", ".safetensors", ".tmp", ".trash"}
    assert expected - NAMES_ON_DISK == set()


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("_new", "", "not in the table"),
        ("_state", "from snapstore._new import x", "_new is not in the table"),
        # Up, sideways, and the ways to hide it.
        ("_types", "from snapstore._state import State", "higher layer"),
        ("_types", "import snapstore._state", "higher layer"),
        ("_types", "from snapstore import _state", "higher layer"),
        ("_types", "from snapstore import SnapshotStore", "higher layer"),
        ("_types", "import snapstore", "higher layer"),
        ("_types", "def f():\n    from snapstore._state import State", "higher layer"),
        ("_types", "if TYPE_CHECKING:\n    from snapstore._state import State", "higher layer"),
        ("_types", "importlib.import_module('snapstore._state')", "higher layer"),
        ("_types", "from ._state import State", "relative import"),
        ("_types", "from . import _errors", "relative import"),
        ("_types", "from snapstore import _errors", "beside it"),
        ("_session", "from snapstore._state import State", "beside it"),
        ("_state", "from snapstore._session import Session", "beside it"),
        ("_writer", "from snapstore._cleanup import clean", "beside it"),
        ("_store", "from snapstore import demo", "higher layer"),
        ("signals", "from snapstore.aio import AsyncSnapshotStore", "beside it"),
        # Frameworks and other packages.
        ("_state", "import torch", "rooms made for frameworks"),
        ("_format", "from numpy import ndarray", "rooms made for frameworks"),
        ("_store", "def f():\n    import mlx.core as mx", "rooms made for frameworks"),
        ("_files", "__import__('transformers')", "rooms made for frameworks"),
        ("_store", "import click", "not a dependency"),
        ("adapters", "import psutil", "not a dependency"),
        # The disk.
        ("_session", "os.rename(a, b)", "os.rename touches the disk"),
        ("_session", "import os\nact = os.unlink", "os.unlink touches the disk"),
        ("_cleanup", "from os import mkdir", "os.mkdir touches the disk"),
        ("_cleanup", "import shutil", "shutil touches the disk"),
        ("_cleanup", "from shutil import rmtree", "shutil touches the disk"),
        ("_writer", "open(path, 'wb')", "open touches the disk"),
        ("_writer", "Path(path).write_bytes(b'')", ".write_bytes touches the disk"),
        ("_store", "os.path.exists(root)", "os.path.exists touches the disk"),
        ("_owner", "import fcntl", "fcntl touches the disk"),
        ("_owner", "os.open(path, 0)", "os.open touches the disk"),
        ("_engine", "io.open(path)", "io.open touches the disk"),
        ("caches", "import tempfile", "tempfile touches the disk"),
        # Threads and the clock.
        ("_state", "import threading", "threading is for threads"),
        ("_writer", "from queue import Queue", "queue is for threads"),
        ("_cleanup", "now_s = time.monotonic", "time.monotonic is a clock"),
        ("_session", "time.sleep(0.1)", "time.sleep is a clock"),
        ("_engine", "report = Future()", "a Future is waited for"),
        # Names on disk.
        ("_session", "trash = '.trash'", "'.trash' is a name on disk"),
        ("_writer", "f'{path}/.tmp/{name}'", "'.tmp' is a name on disk"),
        ("_store", "name.endswith('.safetensors')", "'.safetensors' is a name on disk"),
        ("_owner", "LOCK = b'owner.lock'", "'owner.lock' is a name on disk"),
    ],
)
def test_the_checker_sees(module, source, complaint):
    found = violations(module, source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "_store",
            "from snapstore._state import State\nfrom snapstore import _paths\nimport xxhash, os, time",
        ),
        ("_state", "from snapstore._records import Job"),
        ("_owner", "from snapstore._files import FileSystem\nos.close(fd)"),
        ("_threads", "import threading, time\nnow_s = time.monotonic()"),
        ("signals", "import threading, time\nnow_s = time.monotonic()"),
        ("_owner", "import time\nopened_at_s = time.time()"),
        ("__init__", "from snapstore._store import SnapshotStore\nfrom snapstore._types import SaveState"),
        ("adapters", "import torch\nfrom snapstore.adapters._numpy import describe\nimport numpy as np"),
        (
            "demo",
            "import tempfile, transformers\nfrom snapstore import SnapshotStore\nfrom snapstore.caches import capture",
        ),
        ("cli", "import click, rich\nfrom snapstore import _maintenance"),
        ("_files", "import fcntl, os\nos.rename(a, b)\nopen(path)"),
        ("_paths", "TRASH = '.trash'"),
        (
            "_session",
            '"""Empties ``.trash``."""\nfiles.rename(a, b)\nfiles.unlink(a)\nstate.write(x)\nos.getpid()',
        ),
        ("_format", "import safetensors\nname = 'safetensors'\nos.path.join(a, b)"),
    ],
)
def test_the_checker_lets_pass(module, source):
    assert violations(module, source) == []


def test_importing_snapstore_brings_in_no_framework_no_thread_and_no_signal_handler():
    script = f"""
import signal, sys, threading
handlers = {{each: signal.getsignal(each) for each in signal.valid_signals()}}
import snapstore
assert not {FRAMEWORKS!r} & set(sys.modules), sys.modules.keys() & {FRAMEWORKS!r}
assert not {{"obstore", "snapstore.remote"}} & set(sys.modules)
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert handlers == {{each: signal.getsignal(each) for each in signal.valid_signals()}}
assert signal.set_wakeup_fd(-1) == -1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
