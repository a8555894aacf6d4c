"""``snapstore inspect``: one snapshot, from its header."""

from __future__ import annotations

import json
import stat
from dataclasses import asdict
from typing import Any

import click

from snapstore._errors import SnapshotCorruptError
from snapstore._files import FileSystem
from snapstore._maintenance.headers import (
    Inspection,
    Tensor,
    finite,
    inspect_file,
    inspect_snapshot,
    snapshots_of,
)
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.survey import SnapshotFile
from snapstore._maintenance.units import format_size, plural, printable
from snapstore.cli._options import chosen_root, json_option, root_option, root_was_typed
from snapstore.cli._output import Column, emit_json, note, say, table

_METADATA_LINES = 24


@click.command(short_help="Show what a snapshot holds.")
@click.argument("what", nargs=-1, metavar="FILE | [ROOT] REQUEST [TOKENS]")
@root_option
@click.option(
    "--stats", "values", is_flag=True, help="Read the tensors too: least, greatest, NaNs (needs numpy)."
)
@json_option
def inspect(what: tuple[str, ...], default_root: str | None, values: bool, as_json: bool) -> int:
    """Show a snapshot's metadata and tensors.

    Reads the header alone, so it takes no longer for a large file. Without TOKENS: the latest boundary of the request.
    """
    files = FileSystem()
    try:
        if (
            len(what) == 1
            and not root_was_typed()
            and not _is_directory(files, what[0])
            and _exists(files, what[0])
        ):
            found: Inspection | None = inspect_file(files, what[0], values=values)
            boundaries = None
        else:
            found, boundaries = _find(files, *_root_and_key(files, what, default_root), values)
    except SnapshotCorruptError as error:
        note(f"corrupt: {printable(str(error))}")
        return 1
    except ModuleNotFoundError as error:
        raise click.UsageError(f"--stats needs {error.name}: pip install {error.name}") from error
    if found is None:
        note("no such snapshot: snapstore ls --snapshots lists what there is")
        return 1
    if as_json:
        emit_json("inspect", **_as_json(found), boundaries=boundaries)
    else:
        _show(found, boundaries, values)
    return 0


def _root_and_key(
    files: FileSystem, what: tuple[str, ...], default_root: str | None
) -> tuple[str, str, int | None]:
    """Root, request and tokens; the root stands first, unless one is given otherwise and the first is none."""
    named = bool(what) and not root_was_typed() and (default_root is None or _is_directory(files, what[0]))
    if named and len(what) > 1 and _is_file(files, what[0]):
        raise click.UsageError(f"{what[0]} is a file; name one file alone, or a ROOT and a REQUEST")
    root = chosen_root(what[0] if named else None, default_root)
    rest = what[1:] if named else what
    if not 1 <= len(rest) <= 2:
        raise click.UsageError("name a FILE, or a ROOT and a REQUEST, with or without TOKENS")
    if len(rest) == 1:
        return root, rest[0], None
    if not (rest[1].isascii() and rest[1].isdigit()):
        raise click.UsageError(f"TOKENS is a whole number, not {rest[1]!r}")
    return root, rest[0], int(rest[1])


def _find(
    files: FileSystem, path: str, request: str, tokens: int | None, values: bool
) -> tuple[Inspection | None, list[int] | None]:
    """The latest snapshot of a request (at so many tokens), and the boundaries of that life of it."""
    with opened_root(files, path) as root:
        candidates = [each for each in snapshots_of(root, request) if tokens in (None, each.token_count)]
        if not candidates:
            return None, None
        latest: SnapshotFile = candidates[-1]
        boundaries = [each.token_count for each in snapshots_of(root, request) if each.of == latest.of]
        return inspect_snapshot(root, latest, values=values), boundaries


def _is_file(files: FileSystem, path: str) -> bool:
    return _exists(files, path) and not _is_directory(files, path)


def _exists(files: FileSystem, path: str) -> bool:
    try:
        files.status_at(path)
    except OSError:
        return False
    return True


def _is_directory(files: FileSystem, path: str) -> bool:
    try:
        return stat.S_ISDIR(files.status_at(path).st_mode)
    except OSError:
        return False


def _as_json(found: Inspection) -> dict[str, Any]:
    facts = found.facts
    return {
        "path": printable(found.path),
        "file_bytes": found.file_bytes,
        "disk_bytes": found.disk_bytes,
        "header_bytes": found.header_bytes,
        "tensor_bytes": found.data_bytes,
        "checksums": found.has_checksums,
        "request": facts and facts.request_id,
        "tokens": facts and facts.token_count,
        "generation": facts and facts.generation,
        "framework": facts and facts.framework,
        "metadata": found.metadata,
        "tensors": [_tensor_json(each) for each in found.tensors],
    }


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    spec, values = tensor.spec, tensor.values
    shown = None if values is None else {name: finite(value) for name, value in asdict(values).items()}
    return {
        "name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.nbytes,
        "offset": tensor.offset, "values": shown,
    }  # fmt: skip


def _show(found: Inspection, boundaries: list[int] | None, values: bool) -> None:
    say(printable(found.path))
    for name, value in _facts(found, boundaries):
        say(f"  {name:<12}{value}")
    say("")
    _show_tensors(found, values)
    say(
        f"{plural(len(found.tensors), 'tensor')}, {format_size(found.data_bytes)} ({found.data_bytes:,} bytes)"
    )


def _facts(found: Inspection, boundaries: list[int] | None) -> list[tuple[str, str]]:
    rows = [("file", f"{format_size(found.file_bytes)}, header {format_size(found.header_bytes)}")]
    facts = found.facts
    if facts is None:
        return [("written by", "not snapstore"), *rows]
    rows = [
        ("request", printable(facts.request_id)),
        ("tokens", f"{facts.token_count:,}"),
        ("generation", str(facts.generation)),
        ("framework", printable(facts.framework)),
        *rows,
        ("checksums", "xxh3_64 of each tensor" if found.has_checksums else "none"),
    ]
    if boundaries is not None:
        rows.append(("boundaries", ", ".join(f"{each:,}" for each in boundaries)))
    if found.metadata is not None:
        rows.append(("metadata", _metadata(found.metadata)))
    return rows


def _metadata(metadata: Any) -> str:
    """As JSON, which has every control character escaped; on one line if it is short."""
    short = json.dumps(metadata)
    if len(short) <= 80:
        return short
    lines = json.dumps(metadata, indent=2).splitlines()
    cut = [*lines[:_METADATA_LINES], f"... {len(lines) - _METADATA_LINES:,} more lines: --json shows all"]
    return "\n              ".join(lines if len(lines) <= _METADATA_LINES else cut)


def _show_tensors(found: Inspection, values: bool) -> None:
    columns = [Column("tensor", folds=True), Column("dtype"), Column("shape"), Column("size", right=True)]
    if values:
        columns += [Column("least", right=True), Column("greatest", right=True), Column("nans", right=True)]
    rows = [_tensor_cells(each, values) for each in found.tensors]
    if rows:
        table(columns, rows)


def _tensor_cells(tensor: Tensor, values: bool) -> list[str]:
    spec = tensor.spec
    shape = " x ".join(map(str, spec.shape)) or "scalar"
    cells = [printable(spec.name), spec.dtype, shape, format_size(spec.nbytes)]
    if not values:
        return cells
    if tensor.values is None:
        return [*cells, "-", "-", "-"]
    return [*cells, _number(tensor.values.least), _number(tensor.values.greatest), f"{tensor.values.nans:,}"]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
