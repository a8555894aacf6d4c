"""Options that several commands share, and the kinds of value that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from snapstore._maintenance.units import UnitError, parse_duration, parse_size

_F = TypeVar("_F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")


if TYPE_CHECKING:
    _Type = click.ParamType[int]
else:
    _Type = click.ParamType  # takes no type argument before click 8.2


class _Unit(_Type):
    """A text that one of the strict parsers reads."""

    def __init__(self, name: str, parse: Callable[[str], int]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes or seconds; a usage error that says what would be right."""
        if isinstance(value, int):
            return value
        try:
            return self._parse(value)
        except UnitError as error:
            self.fail(str(error), param, ctx)


SIZE = _Unit("size", parse_size)
DURATION = _Unit("duration", parse_duration)


def root_options(command: _F) -> _F:
    """``[ROOT]`` and ``--root``, which ``SNAPSTORE_ROOT`` sets too; see ``chosen_root``."""
    argument = click.argument("root", required=False, type=click.Path())
    return argument(root_option(command))


root_option = click.option(
    "--root",
    "default_root",
    envvar="SNAPSTORE_ROOT",
    type=click.Path(),
    metavar="ROOT",
    help="The store's root, if not named as an argument.  [env: SNAPSTORE_ROOT]",
)


def chosen_root(root: str | None, default_root: str | None) -> str:
    """The root that the command line names, or the environment. A usage error if none, or two, are named."""
    given_twice = root is not None and default_root is not None and root_was_typed() and root != default_root
    if given_twice:
        raise click.UsageError(f"two roots are named, {root} and {default_root}: which one is meant?")
    chosen = root if root is not None else default_root
    if not chosen:
        raise click.UsageError("no root is named: give it as an argument, by --root, or in SNAPSTORE_ROOT")
    return chosen


def root_was_typed() -> bool:
    """True if ``--root`` stands on the command line, not only in the environment."""
    source = click.get_current_context().get_parameter_source("default_root")
    return source is ParameterSource.COMMANDLINE
