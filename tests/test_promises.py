"""Whatever is said to be guarded by a test is guarded by a test that there is."""

from __future__ import annotations

import re

import promises
import pytest

FILES = sorted(path.stem.removeprefix("test_") for path in (promises.CHECKOUT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("promise", promises.PROMISES, ids=lambda promise: promise.test)
def test_a_promise_has_its_test_and_its_row_on_the_page(promise: promises.Promise) -> None:
    assert promise.test in promises.tests_of(promise.file)
    assert promise.row in promises.PAGE.read_text().splitlines(), "run `make trust`"


def test_the_tests_that_the_threat_table_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (promises.CHECKOUT / "SECURITY.md").read_text()))
    assert len(named) > 20
    assert named - set().union(*map(promises.tests_of, FILES)) == set()


def test_the_commands_of_the_long_runs_are_targets() -> None:
    makefile = (promises.CHECKOUT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    commands = {command for row in promises.figures() for command in re.findall(r"`make ([a-z-]+)", row)}
    assert commands and commands <= targets
