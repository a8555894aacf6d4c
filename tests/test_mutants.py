"""The list of mutants that may survive is about code that there is, and says why of each."""

from __future__ import annotations

import ast
from fnmatch import fnmatchcase

import mutate
import pytest


def _functions(module: str) -> set[str]:
    tree = ast.parse((mutate.CHECKOUT / "snapstore" / f"{module}.py").read_text())
    methods = [
        f"{outer.name}.{inner.name}"
        for outer in tree.body
        if isinstance(outer, ast.ClassDef)
        for inner in outer.body
        if isinstance(inner, ast.FunctionDef)
    ]
    return {*methods, *(node.name for node in tree.body if isinstance(node, ast.FunctionDef))}


@pytest.mark.parametrize(
    "entry", mutate.reasons(), ids=lambda entry: f"{entry['function']}: {entry['change']}"
)
def test_a_survivor_is_of_code_that_there_is_and_has_its_reason(entry: dict[str, str]) -> None:
    assert any(entry["module"] in target.modules for target in mutate.TARGETS)
    assert any(fnmatchcase(name, entry["function"]) for name in _functions(entry["module"]))
    assert len(entry["reason"].split()) >= 5 and entry["change"]


@pytest.mark.parametrize("target", mutate.TARGETS, ids=lambda target: target.name)
def test_what_is_mutated_and_what_guards_it_are_there(target: mutate.Target) -> None:
    for name in target.modules:
        assert (mutate.CHECKOUT / "snapstore" / f"{name}.py").is_file()
    for name in target.tests:
        assert (mutate.CHECKOUT / "tests" / f"test_{name}.py").is_file()
