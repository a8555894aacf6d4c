"""Engines' disk backends as the benchmarks use them: measured where they import, named where they do not.

``make bench-peers`` runs these where SGLang and LMCache are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench._engines import DiskBackend, LMCache, SGLang, disk_backends
from bench._work import KiB, MiB

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines' own imports

ENGINES = (SGLang.name, LMCache.name)
PAGE = 192 * KiB


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _backend(stack: ExitStack, name: str, nbytes: int = PAGE) -> DiskBackend:
    for each in disk_backends(stack, nbytes):
        if each.name == name:
            return each
    pytest.skip(f"{name} does not import here")


def _bytes_of(page: object) -> bytes:
    return getattr(page, "tensor", page).numpy().tobytes()  # type: ignore[attr-defined]


def test_what_does_not_import_is_left_out_and_named_once(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in ("sglang", "lmcache"):
        for module in [each for each in sys.modules if each.partition(".")[0] == engine]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, engine, None)  # type: ignore[arg-type]
    monkeypatch.setattr("bench._peers._told", set())
    assert list(disk_backends(stack, PAGE)) == [] == list(disk_backends(stack, PAGE))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    for line, engine in zip(said, ENGINES, strict=True):
        assert line.startswith(f"not measured: {engine} (ModuleNotFoundError: ")


def test_a_page_comes_back_as_it_was_put(stack: ExitStack, name: str) -> None:
    backend = _backend(stack, name)
    page = backend.page()
    backend.put(7, page)
    backend.settle()
    got = backend.get(7)
    assert len(set(_bytes_of(page))) > 200 and _bytes_of(got) == _bytes_of(page)
    backend.drop(got)
    backend.drop(page)


def test_what_has_settled_is_a_whole_file_for_each_page(stack: ExitStack, name: str) -> None:
    backend = _backend(stack, name)
    page = backend.page()
    for number in range(5):
        backend.put(number, page)
    backend.settle()
    assert [path.stat().st_size for path in backend.folder.iterdir()] == [PAGE] * 5
    backend.drop(page)


def test_what_is_forgotten_is_gone_and_can_be_put_again(stack: ExitStack, name: str) -> None:
    backend = _backend(stack, name)
    page = backend.page()
    for _ in range(2):
        backend.put(0, page)
        backend.settle()
        backend.forget()
        assert list(backend.folder.iterdir()) == []
        with pytest.raises(LookupError, match=r"has no (page|chunk) 0"):
            backend.get(0)
    backend.drop(page)


def test_dropped_pages_give_their_memory_back(stack: ExitStack, name: str) -> None:
    """LMCache's pool holds five pages of this size."""
    backend = _backend(stack, name, 32 * MiB)
    seen = []
    for number in range(8):
        seen.append(backend.page())
        backend.put(number, seen[-1])
        backend.settle()
        backend.drop(seen[-1])
        seen.append(backend.get(number))
        backend.drop(seen[-1])
        backend.forget()


def test_a_page_that_is_not_written_is_not_measured(
    stack: ExitStack, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang says so; LMCache only never says that it has been written."""
    monkeypatch.setattr("bench._engines.PATIENCE_S", 0.5)
    backend = _backend(stack, name)
    page = backend.page()
    backend.folder.rmdir()
    stack.callback(backend.folder.mkdir)

    def put() -> None:
        backend.put(1, page)
        backend.settle()

    with pytest.raises((OSError, TimeoutError), match="did not"):
        put()
    backend.drop(page)


def test_sglang_is_not_measured_in_another_folder(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _backend(stack, SGLang.name)
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"):
        _backend(stack, SGLang.name)
