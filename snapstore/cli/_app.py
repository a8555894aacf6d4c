"""The group of commands, and what ends every one of them: exit status, interruptions, errors in words."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

import snapstore
from snapstore._errors import RootError, SnapstoreError
from snapstore.cli._options import json_option
from snapstore.cli._output import emit_json, note

PROBLEMS, USAGE, NO_ROOT, INTERRUPTED = 1, 2, 10, 130

_PASS_ON = {"ignore_unknown_options": True, "help_option_names": []}


_MODULES = {
    "ls": "_ls", "inspect": "_inspect", "verify": "_check", "prune": "_prune", "stats": "_stats", "doctor": "_check",
    "serve": "_serve",
}  # fmt: skip


class _Commands(click.Group):
    """Imports a command when it is asked for: the others need not cost time at every start."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The order of the help: looking, then removing, then the rest."""
        return [*_MODULES, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command."""
        if cmd_name not in _MODULES:
            return super().get_command(ctx, cmd_name)
        module = import_module(f"snapstore.cli.{_MODULES[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """As ever, but that nobody reads the help is no error of ours."""
        with _while_somebody_reads():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """As ever, but that nobody reads on is no error of ours."""
        with _while_somebody_reads():
            status = super().invoke(ctx)
            sys.stdout.flush()
            return status


@contextmanager
def _while_somebody_reads() -> Iterator[None]:
    """Where the reader of a pipe is gone, drop what is buffered and end; click would end with status 1."""
    try:
        yield
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            sys.stdout.close()
        raise click.exceptions.Exit(INTERRUPTED) from None


@click.group(
    cls=_Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(snapstore.__version__, prog_name="snapstore")
def group() -> None:
    """Look after the snapshots below a root: safe beside live stores.

    ROOT is the directory that stores were given; SNAPSTORE_ROOT names one for all commands. Exit status: 0 fine,
    1 problems found, 2 wrong usage, 10 no such root, 130 interrupted.
    """


@group.command(short_help="Run the demonstration.", context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@json_option
def demo(arguments: tuple[str, ...], as_json: bool) -> int:
    """A small scheduler over a tiny model, from save to resume (needs torch or MLX; see demo --help)."""
    from snapstore.demo import main

    if not as_json:
        return main(list(arguments))
    with redirect_stdout(io.StringIO()) as said:
        status = main(list(arguments))
    emit_json("demo", as_promised=status == 0, lines=said.getvalue().splitlines())
    return status


@group.command(short_help="Run the benchmarks.", context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@json_option
def bench(arguments: tuple[str, ...], as_json: bool) -> int:
    """The benchmarks, where the repository is at hand (see bench --help). With --json their tables go to stderr."""
    main = _bench_main()
    if not as_json:
        return main(list(arguments))
    with redirect_stdout(io.StringIO()) as said:
        status = main([*arguments, "--json", "-"])
    text = said.getvalue()
    emit_json("bench", **(json.loads(text) if text.startswith("{") else {"lines": text.splitlines()}))
    return status


def _bench_main() -> Callable[[list[str]], int]:
    spec = find_spec("bench")
    if spec is None or spec.origin is None or _project_of(spec.origin) != _project_of(snapstore.__file__):
        raise click.UsageError(
            "the benchmarks are not installed with snapstore: they live in its repository; "
            "get a checkout and run `make bench` there, or this command with its packages"
        )
    main: Callable[[list[str]], int] = import_module("bench.__main__").main
    return main


def _project_of(package_file: str) -> Path:
    """The directory that a top-level package lies in."""
    return Path(package_file).absolute().parents[1]


def run(arguments: Sequence[str] | None) -> int:
    """Run the command; the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = group.main(arguments, prog_name="snapstore", standalone_mode=False)
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ModuleNotFoundError as error:
        note(f"Error: this needs {error.name}, which is not installed here")
        return USAGE
    except RootError as error:
        note(f"Error: {error}")
        return NO_ROOT if error.errno == errno.ENOENT else USAGE
    except (SnapstoreError, OSError) as error:
        note(f"Error: {error}")
        return PROBLEMS
    return int(status or 0)
