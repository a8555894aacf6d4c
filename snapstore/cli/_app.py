"""The group of commands, and what ends every one of them: exit status, interruptions, errors in words."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

import click

import snapstore
from snapstore._errors import RootError, SnapstoreError
from snapstore.cli._check import doctor, verify
from snapstore.cli._inspect import inspect
from snapstore.cli._ls import ls
from snapstore.cli._output import note
from snapstore.cli._prune import prune
from snapstore.cli._stats import stats

PROBLEMS, USAGE, NO_ROOT, INTERRUPTED = 1, 2, 10, 130

_PASS_ON = {"ignore_unknown_options": True, "help_option_names": []}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(snapstore.__version__, prog_name="snapstore")
def group() -> None:
    """Look after the snapshots below a root: safe beside live stores.

    ROOT is the directory that stores were given; SNAPSTORE_ROOT names one for all commands. Exit status: 0 fine,
    1 problems found, 2 wrong usage, 10 no such root, 130 interrupted.
    """


for command in (ls, inspect, verify, prune, stats, doctor):
    group.add_command(command)


@group.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> int:
    """A small scheduler over a tiny model, from save to resume (needs torch or MLX; see demo --help)."""
    from snapstore.demo import main

    return main(list(arguments))


@group.command(context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> int:
    """The benchmarks, where the repository is at hand (see bench --help)."""
    if find_spec("bench") is None or find_spec("bench.__main__") is None:
        raise click.UsageError(
            "the benchmarks live in snapstore's repository: run this from a checkout of it"
        )
    from bench.__main__ import main

    return main(list(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Run the command; the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = group.main(arguments, prog_name="snapstore", standalone_mode=False)
        sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt):
        note("Interrupted.")
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # click's way to end on one
            return _nobody_reads()
        raise
    except RootError as error:
        note(f"Error: {error}")
        return NO_ROOT if error.errno == errno.ENOENT else USAGE
    except (SnapstoreError, OSError) as error:
        note(f"Error: {error}")
        return PROBLEMS
    return int(status or 0)


def _nobody_reads() -> int:
    """Drop what is buffered, so that the interpreter does not complain about it at its end."""
    with suppress(BrokenPipeError):
        sys.stdout.close()
    return INTERRUPTED
