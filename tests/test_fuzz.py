"""Readers, parsers and routes take any bytes: the corpus, what chance makes of it, what atheris finds from there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path

import fuzzing
import pytest
from fuzzing import CORPUS, DIFFERENCES, TARGETS, mutations, seeds_of, tidy
from test_format import framed, read, read_by_stock
from trust_results import record

from snapstore import SnapshotCorruptError, SnapshotStore, StoreOptions, UnsupportedTensorError, _format
from snapstore._files import FileSystem, opened
from snapstore._maintenance.verify import verify_file
from snapstore._reader import read_header
from snapstore.cli import main

BY_CHANCE = 10_000
SECONDS = 45


@pytest.fixture(autouse=True)
def stores_end() -> Iterator[None]:
    with tidy():
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_taken(name: str) -> None:
    for seed in seeds_of(name):
        TARGETS[name](seed)


@pytest.mark.parametrize("name", TARGETS)
def test_what_chance_makes_of_the_corpus_is_taken(name: str) -> None:
    for data in islice(mutations(name, seed=BY_CHANCE), BY_CHANCE):
        try:
            TARGETS[name](data)
        except Exception as error:
            error.args = (f"{data!r}: {error}",)
            raise


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_what_atheris_finds_is_taken(tmp_path: Path) -> None:
    """Every target at once, each in a process of its own: it stops at the first input that fails."""
    running = {name: _started(name, tmp_path) for name in TARGETS}
    runs, inputs = 0, 0
    for name, process in running.items():
        said, _ = process.communicate()
        assert process.returncode == 0, f"{name}: {said[-3000:]}"
        match = re.search(r"number_of_executed_units: (\d+)", said)
        assert match is not None, said[-3000:]
        runs += int(match[1])
        inputs += len(list((tmp_path / name).iterdir()))
    assert runs > 1000 * len(TARGETS)
    record("fuzz", "make fuzz", targets=len(TARGETS), runs=runs, inputs_that_cover_more=inputs, failures=0)


def _started(name: str, folder: Path) -> subprocess.Popen[str]:
    (folder / name).mkdir()
    command = [sys.executable, fuzzing.__file__, name, str(SECONDS), str(folder / name)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# -- teeth ------------------------------------------------------------------------------------------------------------


def test_a_laxer_reader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_format, "parse_header", json.loads)
    with pytest.raises(AssertionError, match="laxer"):
        _all_of_header(islice(mutations("header", seed=1), BY_CHANCE))


def _all_of_header(inputs: Iterator[bytes]) -> None:
    for data in inputs:
        with suppress(AttributeError, TypeError, ValueError):
            fuzzing.header(data)


def test_a_refusal_that_is_not_in_the_list_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DIFFERENCES, "a key twice")
    with pytest.raises(AssertionError, match="stands there twice"):
        fuzzing.header((CORPUS / "header" / "differs-key-twice").read_bytes())


def test_an_error_that_is_none_of_ours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_format, "FRAMEWORKS", ("numpy", "torch", "mlx", "evil"))
    with pytest.raises(ValueError, match="framework must be one of"):
        fuzzing.snapshot((CORPUS / "snapshot" / "another-framework").read_bytes())


# -- beside safetensors' own reader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in (CORPUS / "header").glob("differs-*")))
def test_what_stock_takes_and_we_refuse_is_what_we_say(name: str) -> None:
    file = (CORPUS / "header" / name).read_bytes()
    assert read_by_stock(file) is not None
    with pytest.raises(SnapshotCorruptError) as caught:
        read(file)
    assert sum(words in str(caught.value) for words in DIFFERENCES.values()) == 1


def test_each_difference_has_its_file() -> None:
    said = []
    for path in (CORPUS / "header").glob("differs-*"):
        with pytest.raises(SnapshotCorruptError) as caught:
            read(path.read_bytes())
        said.append(str(caught.value))
    assert all(any(words in each for each in said) for words in DIFFERENCES.values())
    assert len(said) == len(DIFFERENCES)


@pytest.mark.parametrize(
    "name", ["numpy", "torch", "mlx", "mlx-without-metadata", "serialize_file", "snapstore"]
)
def test_files_of_every_writer_are_read_equal_inspected_and_verified(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CORPUS / "header" / f"{name}.safetensors"
    theirs = read_by_stock(path.read_bytes())
    header, segments = read(path.read_bytes())
    named = zip(header.layout.specs, segments, strict=True)
    assert theirs == {spec.name: (spec.dtype, spec.shape, bytes(segment)) for spec, segment in named} != {}
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert all(spec.name in said for spec in header.layout.specs)
    found = [each.kind for each in verify_file(FileSystem(), str(path), lambda nbytes: None).findings]
    assert found == ([] if name == "snapstore" else ["foreign"])


# -- what the fuzzing found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("another-framework", SnapshotCorruptError, "snapstore.framework is 'evil'"),
        ("too-many-axes", UnsupportedTensorError, "'x' can not be loaded: .* load with framework='torch'"),
        ("extent-too-large-for-mlx", UnsupportedTensorError, "'x' can not be loaded: .* framework='torch'"),
        ("metadata-not-json", SnapshotCorruptError, "metadata"),
        ("checksum-wrong", SnapshotCorruptError, "were altered"),
    ],
)
def test_a_load_of_a_hostile_file_says_what_is_wrong(name: str, error: type[Exception], words: str) -> None:
    store = fuzzing.planted_with((CORPUS / "snapshot" / name).read_bytes())
    with pytest.raises(error, match=words):
        store.load("a", 1)
    if error is UnsupportedTensorError:
        assert store.load("a", 1, framework="torch").tensors["x"].ndim > 0


def test_a_scraper_with_an_odd_version_gets_the_plain_format() -> None:
    fuzzing.asgi(b"GET /metrics\nAccept: application/openmetrics-text; version=//1.0.0")


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_file_that_claims_a_header_of_100_mb_takes_hardly_more_than_that(
    tmp_path: Path, deadline: Callable[[float], AbstractContextManager[None]]
) -> None:
    """A sparse file of a few bytes on disk is enough for that."""
    claimed = 100_000_000
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", claimed))
    os.truncate(path, claimed + 8)
    files = FileSystem()
    with deadline(10), opened(files, files.open_read(str(path))) as fd:
        tracemalloc.start()
        try:
            with pytest.raises(SnapshotCorruptError, match="does not begin"):
                read_header(files, fd)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 1.1 * claimed


def test_a_store_starts_beside_hostile_leftovers_in_bounded_time(
    root: Path, deadline: Callable[[float], AbstractContextManager[None]]
) -> None:
    """A dead session full of headers that claim much and hold nothing: none is adopted, and all are reclaimed."""
    with SnapshotStore(root, StoreOptions(leftovers="keep")) as store:
        path = store.save("a", 1, {}).result(10).path
    for number in range(2, 12):
        bomb = path.with_name(f"{number}.safetensors")
        bomb.write_bytes(framed('{"a":' + "[" * 200_000))
        bomb.with_name(f"{number}0.safetensors").write_bytes(struct.pack("<Q", 2**40))
    with deadline(5), SnapshotStore(root, StoreOptions(leftovers="adopt")) as heir:
        assert heir.boundaries("a") == (1,)
        assert heir.shutdown(cleanup=True).clean
