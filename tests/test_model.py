"""The protocol in Promela holds, and a shortcut is refuted: a small bound of `make model`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_path = Path(__file__).with_name("model") / "run.py"
_spec = importlib.util.spec_from_file_location("model_run", _path)
assert _spec is not None and _spec.loader is not None
model = sys.modules["model_run"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(model)


@pytest.mark.skipif(not model.is_installed(), reason=model.HOW_TO_INSTALL)
@pytest.mark.parametrize("case", model.QUICK, ids=lambda case: case.name)
def test_spin_says_of_the_protocol_what_is_claimed(case: model.Case, tmp_path: Path) -> None:
    verdict = model.check(case, tmp_path, "-O0")
    assert verdict.holds == case.must_hold, [*verdict.story, verdict.broken]
    assert verdict.states > 1000
    assert bool(verdict.story) == (not verdict.holds)


def test_every_shortcut_of_the_models_is_tried() -> None:
    in_models = set()
    for path in _path.parent.glob("*.pml"):
        words = path.read_text().replace("(", " ").replace(")", " ").split()
        in_models |= {word.removeprefix("VARIANT_") for word in words if word.startswith("VARIANT_")}
    assert {case.variant for case in model.FULL if case.variant} == in_models - {"..."}
