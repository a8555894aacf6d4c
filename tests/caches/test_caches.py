"""``import snapstore.caches`` costs nothing: the libraries come in with the first cache of theirs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from snapstore import caches

SCRIPT = """
import sys
import snapstore.caches
print(sorted({"torch", "mlx", "mlx_lm", "transformers", "numpy"} & {name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_it_imports_no_framework() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "cache", [None, [], [None], {}, ((1, 2), (3, 4)), object()], ids=lambda cache: type(cache).__name__
)
def test_what_is_no_cache_is_refused(cache: object) -> None:
    with pytest.raises(TypeError, match="neither a list of mlx-lm caches"):
        caches.capture(cache)


def test_layers_is_one_of_two_words() -> None:
    with pytest.raises(ValueError, match="'all' or 'non_sliceable', not 'some'"):
        caches.capture([], layers="some")
