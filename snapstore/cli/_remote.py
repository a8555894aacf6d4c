"""``ls``, ``verify``, ``prune`` and ``stats`` of a URL: the same rows, plans and answers, of an object store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from snapstore.remote._objects import ObjectStore
    from snapstore.remote._survey import Survey


def is_url(root: str) -> bool:
    """An object store, not a directory."""
    return "://" in root


@contextmanager
def surveyed(url: str) -> Iterator[tuple[ObjectStore, Survey]]:
    """The prefix, and what lies below it."""
    if find_spec("obstore") is None:
        raise click.UsageError("a URL needs obstore: pip install 'snapstore[remote]'")
    from snapstore.remote._survey import opened_prefix, survey

    try:
        with opened_prefix(url) as store:
            yield store, survey(store)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
