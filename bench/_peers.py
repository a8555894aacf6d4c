"""Peers that a user would call in the step instead, as they are meant to be called. One that is not here is named."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from bench._measure import Contender
from bench._work import fresh_folder

_told: set[str] = set()


def mlx_save(stack: ExitStack, arrays: Mapping[str, Any]) -> dict[str, Contender]:
    """``mx.save_safetensors``."""
    import mlx.core as mx

    path = str(stack.enter_context(fresh_folder()) / "mlx.safetensors")
    return {"mx.save_safetensors in the step": _timed(lambda: mx.save_safetensors(path, dict(arrays)))}


def disk_cache(stack: ExitStack, arrays: Mapping[str, Any]) -> dict[str, Contender]:
    """``diskcache``: a dictionary on disk, which pickles."""
    module = imported("diskcache", "diskcache in the step")
    if module is None:
        return {}
    cache = module.Cache(str(stack.enter_context(fresh_folder())))
    stack.callback(cache.close)
    numbers = itertools.count()
    return {"diskcache in the step": _timed(lambda: cache.set(next(numbers) % 64, dict(arrays)))}


def imported(name: str, what: str) -> Any:
    """``None``, and why, where it does not import here."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - an engine's import fails in its own ways
        if what not in _told:
            _told.add(what)
            print(f"not measured: {what} ({type(error).__name__}: {error})", flush=True)
        return None


def _timed(work: Any) -> Contender:
    def once() -> float:
        began_s = perf_counter()
        work()
        return perf_counter() - began_s

    return once
