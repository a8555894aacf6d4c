"""The codec: what goes in comes out, stock tools read it, nothing altered is taken for what was written."""

from __future__ import annotations

import enum
import itertools
import json
import random
import re
import struct
import sys
import threading
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings

from snapstore import _format
from snapstore._errors import SnapshotCorruptError, SnapstoreError
from snapstore._format import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    MAX_METADATA_BYTES,
    Facts,
    Header,
    Layout,
    NewerFormatError,
    TensorSpec,
    check_specs,
    checksums_of,
    compare_checksums,
    decode_header,
    decode_metadata,
    encode_header,
    encode_metadata,
    header_size,
    verify_checksums,
)
from snapstore._json import MAX_METADATA_DEPTH

KiB, MiB = 1024, 1024 * 1024
FACTS = Facts("chatcmpl-42", 4096, 7, "torch", '{"layers":[1,2]}')
SMALL = [TensorSpec("conv", "BF16", (3,)), TensorSpec("ssm", "F32", (2, 2)), TensorSpec("none", "U8", (0, 4))]
NEVER_OURS = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}


# --- what a store does with the codec ---


def data_of(layout: Layout, seed: int = 0) -> list[memoryview]:
    source = random.Random(seed)
    return [memoryview(source.randbytes(size)) for size in layout.sizes]


def file_of(
    layout: Layout, segments: list[memoryview], facts: Facts = FACTS, *, checksum: bool = True
) -> bytes:
    sums = checksums_of(layout, segments) if checksum else None
    return encode_header(layout, facts, sums) + b"".join(segments[index] for index in layout.file_order)


def small_file(*, checksum: bool = True) -> bytes:
    layout = Layout.of(SMALL)
    return file_of(layout, data_of(layout), checksum=checksum)


def read_header(file: bytes) -> Header:
    size = header_size(file[:8], len(file))
    return decode_header(file[:size], len(file))


def read(file: bytes) -> tuple[Header, list[memoryview]]:
    header = read_header(file)
    data = memoryview(file)[header.data_offset :]
    layout = header.layout
    segments = [data[begin : begin + size] for begin, size in zip(layout.offsets, layout.sizes, strict=True)]
    verify_checksums(header, segments)
    return header, segments


def refused(file: bytes) -> bool:
    try:
        read(file)
    except SnapshotCorruptError:
        return True
    return False


def refused_by_stock(file: bytes) -> bool:
    return read_by_stock(file) is None


def read_by_stock(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Name -> dtype, shape, data; ``None`` if it will not."""
    try:
        entries: list[tuple[str, Any]] = safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return None
    return {name: (each["dtype"], tuple(each["shape"]), bytes(each["data"])) for name, each in entries}


def assert_no_laxer_than_stock(file: bytes) -> bool:
    """What stock refuses we refuse; what both take, both read the same. True if stock took it."""
    theirs = read_by_stock(file)
    if refused(file):
        return theirs is not None
    assert theirs is not None, file
    header, segments = read(file)
    ours = zip(header.layout.specs, segments, strict=True)
    assert {spec.name: (spec.dtype, spec.shape, bytes(segment)) for spec, segment in ours} == theirs
    return True


def framed(header: str | bytes, data: bytes = b"") -> bytes:
    """A file with any header."""
    body = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(body)) + body + data


OPENING = '{"__metadata__":{"snapstore.header_checksum":"'


def sealed(header: str, data: bytes = b"") -> bytes:
    """A file with any header that begins as ours, with its checksum made right: by the words of the format, anew."""
    assert header.startswith(OPENING + "0" * 16)
    file = framed(header, data)
    zeroed = file[: len(file) - len(data)]
    return file.replace(b"0" * 16, xxhash.xxh3_64_hexdigest(zeroed).encode(), 1)


def resealed(file: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """One of our files, with its header changed and sealed again, as only a hostile writer can."""
    size = header_size(file[:8], len(file))
    table = json.loads(file[8:size])
    table["__metadata__"]["snapstore.header_checksum"] = "0" * 16
    change(table)
    return sealed(json.dumps(table, separators=(",", ":")), file[size:])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (',"a":{', ',"__metadata__":null,"a":{'),
        (',"a":{', ',,"a":{'),
        (',"a":{', '"a":{'),
        (',"a":{', ':{"a":{'),
        ("}}", "},}"),
        ("}}", "}"),
        ("}}", "}}}"),
    ],
)
def test_a_sealed_header_is_one_object_to_its_end(old: str, new: str) -> None:
    file = encode_header(Layout.of([TensorSpec("a", "U8", (2,))]), FACTS, None) + b"xy"
    size = header_size(file[:8], len(file))
    text = file[8:size].decode().rstrip(" ")
    digits = text[len(OPENING) : len(OPENING) + 16]
    begin, found, end = text.replace(digits, "0" * 16, 1).rpartition(old)
    assert found
    whole = sealed(begin + found + end, b"xy")
    assert decode_header(whole[: len(whole) - 2], len(whole)).facts == FACTS
    broken = sealed(begin + new + end, b"xy")
    with pytest.raises(SnapshotCorruptError, match="JSON"):
        decode_header(broken[: len(broken) - 2], len(broken))


# --- round trips ---

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
specs = st.builds(TensorSpec, names, st.sampled_from(sorted(ITEM_BYTES)), shapes)
spec_lists = st.lists(specs, max_size=8, unique_by=lambda spec: spec.name)
facts = st.builds(
    Facts,
    request_id=texts | st.sampled_from(["", "\0", "../..", "é" * 10_000, '"}}', "\u2028"]),
    token_count=st.integers(0, 2**80),
    generation=st.integers(0, 2**63),
    framework=st.sampled_from(["numpy", "torch", "mlx"]),
    metadata_json=texts,
)


@given(spec_lists, facts, st.booleans(), st.integers())
def test_what_was_written_is_read(found: list[TensorSpec], said: Facts, checksum: bool, seed: int) -> None:
    layout = Layout.of(found)
    segments = data_of(layout, seed)
    file = file_of(layout, segments, said, checksum=checksum)
    header, again = read(file)
    assert header.layout == layout
    assert header.facts == said
    assert (header.checksums is not None) == checksum
    assert again == segments
    assert header.data_offset % 64 == 0
    assert all(
        offset % ITEM_BYTES[spec.dtype] == 0
        for spec, offset in zip(layout.specs, layout.offsets, strict=True)
    )


@given(spec_lists, facts, st.booleans(), st.integers())
def test_stock_reads_what_we_write(found: list[TensorSpec], said: Facts, checksum: bool, seed: int) -> None:
    layout = Layout.of(found)
    segments = data_of(layout, seed)
    assert read_by_stock(file_of(layout, segments, said, checksum=checksum)) == {
        spec.name: (spec.dtype, spec.shape, bytes(segment))
        for spec, segment in zip(found, segments, strict=True)
    }


def test_stock_tools_open_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = {name: torch.arange(6).to(dtype).reshape(2, 3) for name, dtype in _torch_dtypes()}
    layout = Layout.of(TensorSpec(name, name, (2, 3)) for name in made)
    segments = [memoryview(tensor.view(torch.uint8).numpy().tobytes()) for tensor in made.values()]
    path.write_bytes(file_of(layout, segments))
    loaded = safetensors.torch.load_file(path)
    for name, tensor in made.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].view(torch.uint8).equal(tensor.view(torch.uint8))
    with safetensors.safe_open(path, "np") as opened:
        said = opened.metadata()
    assert said["snapstore.format"] == "1"
    assert said["snapstore.request_id"] == "chatcmpl-42"
    assert said["snapstore.token_count"] == "4096"
    assert said["snapstore.generation"] == "7"
    assert said["snapstore.framework"] == "torch"
    assert said["snapstore.checksum"] == "xxh3_64"
    assert json.loads(said["snapstore.metadata"]) == {"layers": [1, 2]}
    by_name = {layout.specs[index].name: position for position, index in enumerate(layout.file_order)}
    for name, segment in zip(made, segments, strict=True):
        at = 16 * by_name[name]
        assert said["snapstore.tensor_checksums"][at : at + 16] == xxhash.xxh3_64_hexdigest(segment)


def _torch_dtypes() -> list[tuple[str, torch.dtype]]:
    return [
        ("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32), ("F64", torch.float64),
        ("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2), ("C64", torch.complex64),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz), ("F8_E5M2FNUZ", torch.float8_e5m2fnuz), ("BOOL", torch.bool),
        ("I8", torch.int8), ("I16", torch.int16), ("I32", torch.int32), ("I64", torch.int64),
        ("U8", torch.uint8), ("U16", torch.uint16), ("U32", torch.uint32), ("U64", torch.uint64),
    ]  # fmt: skip


def test_stock_numpy_opens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    layout = Layout.of([TensorSpec("scalar", "F64", ()), TensorSpec("none", "I32", (2, 0))])
    path.write_bytes(file_of(layout, [memoryview(struct.pack("<d", 1.5)), memoryview(b"")]))
    loaded = safetensors.numpy.load_file(path)
    assert loaded["scalar"].shape == () and loaded["scalar"] == 1.5
    assert loaded["none"].shape == (2, 0)


def test_two_thousand_tensors_keep_their_order() -> None:
    layout = Layout.of(TensorSpec(f"layer.{i}", ["U8", "F32"][i % 2], (i % 5,)) for i in range(2000))
    header, _ = read(file_of(layout, data_of(layout)))
    assert header.layout == layout


@pytest.mark.parametrize(("name_characters", "remembered"), [(10, True), (3000, False)])
def test_what_a_small_header_says_is_remembered_and_a_large_one_takes_no_memory(
    name_characters: int, remembered: bool
) -> None:
    layout = Layout.of(TensorSpec(f"{i:0{name_characters}}", "U8", (1,)) for i in range(100))
    file = file_of(layout, data_of(layout))
    first, second = read_header(file).layout, read_header(file).layout
    assert first == second == layout and (first is second) is remembered


def test_every_dtype_of_stock_is_known_or_refused_by_name() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(framed('{"a":{"dtype":"?","shape":[],"data_offsets":[0,0]}}'))
    theirs = set(re.findall("`([A-Z0-9_]+)`", str(caught.value).split("expected one of")[1]))
    assert theirs - NEVER_OURS == ITEM_BYTES.keys()
    for dtype, nbytes in ITEM_BYTES.items():
        file = framed(f'{{"a":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,{nbytes}]}}}}', bytes(nbytes))
        assert not refused_by_stock(file)
        assert not refused(file)
    for dtype in NEVER_OURS:
        file = framed(f'{{"a":{{"dtype":"{dtype}","shape":[4],"data_offsets":[0,4]}}}}', bytes(4))
        with pytest.raises(SnapshotCorruptError, match=f"'a': dtype '{dtype}'"):
            read(file)


# --- identity and versions ---


def test_files_of_two_snapshots_tell_themselves_apart() -> None:
    layout = Layout.of(SMALL)
    segments = data_of(layout)
    said = [
        Facts("a", 1, 1, "torch", "null"),
        Facts("b", 1, 1, "torch", "null"),
        Facts("a", 2, 1, "torch", "null"),
        Facts("a", 1, 2, "torch", "null"),
    ]
    assert [read(file_of(layout, segments, each))[0].facts for each in said] == said


def test_a_newer_format_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(_format, "FORMAT_VERSION", 2)
        file = small_file()
    with pytest.raises(
        NewerFormatError, match=r"newer snapstore \(format 2\), this one reads up to 1: upgrade"
    ):
        read(file)


def test_a_newer_format_says_so_whatever_else_it_changed() -> None:
    file = sealed(
        OPENING + '0000000000000000","snapstore.format":"17","x":"y"},"a":{"dtype":"F2","extra":{}}}'
    )
    with pytest.raises(NewerFormatError, match=r"format 17"):
        read(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "0"), ("format", "01"), ("format", "-1"), ("format", "1 "), ("format", "\u0661"), ("format", ""),
        ("token_count", "-1"), ("token_count", "+1"), ("token_count", "1.0"), ("token_count", "9" * 5000),
        ("generation", ""), ("generation", "0x1"), ("generation", "1_0"),
        ("checksum", "crc32"), ("checksum", ""),
        ("tensor_checksums", ""), ("tensor_checksums", "0" * 47), ("tensor_checksums", "G" * 48),
        ("tensor_checksums", "A" * 48), ("later", "x"),
    ],
)  # fmt: skip
def test_facts_are_exactly_as_the_format_says(key: str, value: str) -> None:
    def change(table: dict[str, Any]) -> None:
        table["__metadata__"][f"snapstore.{key}"] = value

    file = resealed(small_file(), change)
    assert not refused_by_stock(file)
    with pytest.raises(SnapshotCorruptError):
        read_header(file)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", "0", "snapstore.format is 0; the first format is 1"),
        ("generation", "1_0", "snapstore.generation is '1_0', not a whole number"),
        ("framework", "jax", "snapstore.framework is 'jax', none of ('numpy', 'torch', 'mlx')"),
        ("checksum", "crc32", "checksums by 'crc32'; this one knows xxh3_64"),
        ("tensor_checksums", "00", "snapstore.tensor_checksums must have 16 hex digits for each tensor"),
    ],
)
def test_a_wrong_fact_is_told(key: str, value: str, words: str) -> None:
    file = resealed(small_file(), lambda table: table["__metadata__"].update({f"snapstore.{key}": value}))
    with pytest.raises(SnapshotCorruptError) as caught:
        read_header(file)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"dtype":"U8","shape":[4]}', "it must have dtype, shape and data_offsets, and nothing else"),
        ('{"dtype":"U9","shape":[4],"data_offsets":[0,4]}', "dtype 'U9' is not one that snapstore reads"),
        ('{"dtype":"U8","shape":4,"data_offsets":[0,4]}', "shape 4 is not a list of sizes"),
        ('{"dtype":"U8","shape":[4],"data_offsets":[4]}', "data_offsets [4] are not a begin and an end"),
        (
            f'{{"dtype":"U8","shape":[{2**63}],"data_offsets":[0,4]}}',
            f"shape [{2**63}] is larger than can be indexed",
        ),
        (
            f'{{"dtype":"U8","shape":[{2**63 - 1}],"data_offsets":[0,4]}}',
            f"it has {2**63 - 1} bytes by its shape, and 4 by data_offsets",
        ),
        (
            '{"dtype":"U8","shape":[4],"data_offsets":[1,4]}',
            "it has 4 bytes by its shape, and 3 by data_offsets",
        ),
    ],
)
def test_what_is_wrong_with_a_tensor_is_told(entry: str, words: str) -> None:
    with pytest.raises(SnapshotCorruptError) as caught:
        read_header(framed(f'{{"a":{entry}}}', bytes(4)))
    assert str(caught.value) == f"tensor 'a': {words}"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            "tensor 'a' begins at byte 2 of the data, not at 0",
        ),
        (
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            "the header lists 2 bytes of data, and the file has 4",
        ),
        (
            '{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
            "the header holds a lone surrogate, which is no text",
        ),
        ('{"__metadata__":{"a":1}}', "__metadata__ must map strings to strings"),
    ],
)
def test_what_is_wrong_with_a_header_is_told(header: str, words: str) -> None:
    with pytest.raises(SnapshotCorruptError) as caught:
        read_header(framed(header, bytes(4)))
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"1234567", "the file ends within its first 8 bytes"),
        (struct.pack("<Q", 100_000_001), "the header claims 100000001 bytes; at most 100000000 are allowed"),
        (struct.pack("<Q", 3) + b"{}", "the header claims 3 bytes, and the whole file has 10"),
    ],
)
def test_what_is_wrong_with_the_size_of_a_header_is_told(file: bytes, words: str) -> None:
    with pytest.raises(SnapshotCorruptError) as caught:
        read_header(file)
    assert str(caught.value) == words


def test_a_header_of_no_bytes_is_one() -> None:
    assert header_size(bytes(8), 8) == 8


def test_what_happened_to_a_header_is_told() -> None:
    file = bytearray(small_file())
    size = header_size(file[:8], len(file))
    with pytest.raises(SnapshotCorruptError) as short:
        decode_header(file[: size - 1], len(file))
    assert str(short.value) == f"the header claims {size} bytes, and {size - 1} could be read"
    file[size - 1] ^= 1
    with pytest.raises(SnapshotCorruptError) as altered:
        decode_header(file[:size], len(file))
    assert str(altered.value) == "the header was altered: it does not match its checksum"


def test_an_empty_tensor_may_have_the_largest_extent_that_can_be_indexed() -> None:
    assert not refused(framed(f'{{"a":{{"dtype":"U8","shape":[0,{2**63 - 1}],"data_offsets":[0,0]}}}}'))


def test_the_bytes_of_a_header_are_these() -> None:
    """What another writer of format 1 has to write."""
    layout = Layout.of([TensorSpec("x", "U8", (3,))])
    header = encode_header(layout, Facts("r", 7, 2, "numpy", "null"), "0123456789abcdef")
    at = 8 + len(OPENING)
    text = (
        OPENING + header[at : at + 16].decode() + '","snapstore.format":"1","snapstore.request_id":"r",'
        '"snapstore.token_count":"7","snapstore.generation":"2","snapstore.framework":"numpy",'
        '"snapstore.metadata":"null","snapstore.checksum":"xxh3_64",'
        '"snapstore.tensor_checksums":"0123456789abcdef"},'
        '"x":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    )
    padded = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    assert header == len(padded).to_bytes(8, "little") + padded.encode()


@pytest.mark.parametrize(
    "key", ["format", "request_id", "token_count", "generation", "framework", "metadata", "checksum"]
)
def test_a_file_that_lacks_a_fact_is_refused(key: str) -> None:
    file = resealed(small_file(), lambda table: table["__metadata__"].pop(f"snapstore.{key}"))
    told = "snapstore.format is '', not a whole number" if key == "format" else f"snapstore.{key}"
    with pytest.raises(SnapshotCorruptError, match=re.escape(told)):
        read(file)


def test_resealing_itself_is_not_what_is_refused() -> None:
    assert not refused(resealed(small_file(), lambda table: None))


def test_our_file_written_again_by_another_tool_is_refused() -> None:
    file = small_file()
    said = json.loads(file[8 : header_size(file[:8], len(file))])["__metadata__"]
    del said["snapstore.header_checksum"]
    again = safetensors.numpy.save({"a": np.zeros(3)}, metadata=said)
    with pytest.raises(
        SnapshotCorruptError, match=r"^the header was altered: it does not begin as snapstore writes it$"
    ):
        read(again)


# --- damage ---


def test_every_flipped_bit_is_found() -> None:
    file = small_file()
    _assert_every_flip_found(file, range(len(file)))


def test_every_flipped_bit_of_the_header_is_found_without_tensor_checksums() -> None:
    file = small_file(checksum=False)
    header, _ = read(file)
    assert header.checksums is None
    _assert_every_flip_found(file, range(header.data_offset))


def test_every_flipped_bit_is_found_in_a_file_of_no_tensors() -> None:
    file = file_of(Layout.of([]), [])
    assert read(file)[0].checksums == ""
    _assert_every_flip_found(file, range(len(file)))


def _assert_every_flip_found(file: bytes, where: range) -> None:
    assert not refused(file)
    damaged = bytearray(file)
    for at, bit in itertools.product(where, range(8)):
        damaged[at] ^= 1 << bit
        assert refused(bytes(damaged)), f"bit {bit} of byte {at}"
        damaged[at] ^= 1 << bit


@pytest.mark.parametrize("checksum", [True, False])
def test_every_truncation_is_found(checksum: bool) -> None:
    file = small_file(checksum=checksum)
    for size in range(len(file)):
        assert refused(file[:size]), size
    assert refused(file + b"\0")


def test_a_header_read_short_is_found() -> None:
    file = small_file()
    size = header_size(file[:8], len(file))
    for count in range(size):
        with pytest.raises(SnapshotCorruptError):
            decode_header(file[:count], len(file))


def test_a_header_must_be_given_whole_and_alone() -> None:
    file = framed("{}   ")
    assert decode_header(file, len(file)).facts is None
    with pytest.raises(SnapshotCorruptError, match="13 bytes, and 12 could be read"):
        decode_header(file[:-1], len(file))
    with pytest.raises(SnapshotCorruptError):
        decode_header(file + b" ", len(file) + 1)


def test_every_byte_changed_at_random_is_found() -> None:
    file = small_file()
    source = random.Random(1)
    for _ in range(3000):
        damaged = bytearray(file)
        for _ in range(source.randint(1, 6)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        assert refused(bytes(damaged)) or damaged == file


def test_other_spellings_of_the_checksum_are_not_taken() -> None:
    file = small_file()
    at = 8 + len(OPENING)
    digits = file[at : at + 16]
    assert any(digit in b"abcdef" for digit in digits)
    assert refused(file.replace(digits, digits.upper()))


def test_swapped_tensors_are_found_and_named() -> None:
    layout = Layout.of(
        [TensorSpec("a", "U8", (32,)), TensorSpec("b", "U8", (32,)), TensorSpec("c", "U8", (0,))]
    )
    segments = data_of(layout)
    header = read_header(file_of(layout, segments))
    verify_checksums(header, segments)
    with pytest.raises(SnapshotCorruptError, match="tensor 'a' were altered"):
        verify_checksums(header, [segments[1], segments[0], segments[2]])
    digits = header.checksums
    assert digits is not None
    with pytest.raises(SnapshotCorruptError) as caught:
        verify_checksums(header, [segments[0], segments[0], segments[2]])
    assert str(caught.value) == (
        f"the bytes of tensor 'b' were altered: their xxh3_64 is {digits[:16]}, the file says {digits[16:32]}"
    )


def test_the_widest_tensors_come_first_and_damage_names_the_right_one() -> None:
    layout = Layout.of(
        [TensorSpec("narrow", "U8", (4,)), TensorSpec("wide", "F64", (4,)), TensorSpec("mid", "F32", (4,))]
    )
    assert layout.file_order == (1, 2, 0)
    segments = data_of(layout)
    header = read_header(file_of(layout, segments))
    for spec, index in zip(layout.specs, range(3), strict=True):
        altered = list(segments)
        altered[index] = memoryview(bytes(segments[index])[:-1] + bytes([segments[index][-1] ^ 1]))
        with pytest.raises(SnapshotCorruptError, match=f"tensor '{spec.name}' were altered"):
            verify_checksums(header, altered)


def test_without_checksums_the_data_is_taken_as_it_is() -> None:
    layout = Layout.of(SMALL)
    header = read_header(file_of(layout, data_of(layout, 1), checksum=False))
    verify_checksums(header, data_of(layout, 2))
    compare_checksums(header, checksums_of(layout, data_of(layout, 2)))


@pytest.mark.parametrize("nbytes", [0, 1, 240, 241, 64 * KiB, 64 * KiB + 1, MiB - 1, MiB, MiB + 1, 5 * MiB])
def test_a_checksum_is_the_hash_of_the_bytes(nbytes: int) -> None:
    segment = memoryview(random.Random(nbytes).randbytes(nbytes))
    layout = Layout.of([TensorSpec("a", "U8", (nbytes,))])
    assert checksums_of(layout, [segment]) == xxhash.xxh3_64_hexdigest(segment)


def test_checksums_do_not_depend_on_what_is_hashed_before() -> None:
    segment = memoryview(random.Random(0).randbytes(MiB))
    layout = Layout.of(TensorSpec(f"{i}", "U8", (MiB,)) for i in range(20))
    assert checksums_of(layout, [segment] * 20) == xxhash.xxh3_64_hexdigest(segment) * 20


def test_large_tensors_are_hashed_with_the_gil_released() -> None:
    """No turn is ever taken away here, so the other thread can only run where the hash lets go."""
    segment = memoryview(bytes(4 * MiB))
    layout = Layout.of(TensorSpec(f"{i}", "U8", (4 * MiB,)) for i in range(100))
    start, ran = threading.Lock(), threading.Event()
    start.acquire()

    def other() -> None:
        start.acquire()
        ran.set()

    thread = threading.Thread(target=other, name="test-other")
    thread.start()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        start.release()
        before = ran.is_set()
        checksums_of(layout, [segment] * 100)
        during = ran.is_set()
    finally:
        sys.setswitchinterval(interval_s)
        thread.join(10)
    assert (before, during) == (False, True)


# --- what stock writes, and what it refuses ---


STOCK_WORDS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I16": "int16",
    "U8": "uint8", "BOOL": "bool", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(sorted(STOCK_WORDS)), shapes), max_size=6),
    st.none()
    | st.dictionaries(texts, texts, min_size=1, max_size=3),  # {}, {}: stock can not read its own file
    st.integers(),
)
def test_what_stock_writes_is_read_equal(
    wanted: dict[str, tuple[str, tuple[int, ...]]], said: dict[str, str] | None, seed: int
) -> None:
    layout = Layout.of(TensorSpec(name, dtype, shape) for name, (dtype, shape) in wanted.items())
    kept = [np.frombuffer(bytearray(segment), np.uint8) for segment in data_of(layout, seed)]
    file = safetensors.serialize(
        {
            spec.name: safetensors.TensorSpec(
                dtype=STOCK_WORDS[spec.dtype],
                shape=spec.shape,
                data_ptr=array.ctypes.data,
                data_len=array.nbytes,
            )
            for spec, array in zip(layout.specs, kept, strict=True)
        },
        metadata=said,
    )
    header, segments = read(bytes(file))
    assert header.facts is None and header.checksums is None
    assert {spec.name: (spec.dtype, spec.shape) for spec in header.layout.specs} == wanted
    by_name = dict(zip(wanted, kept, strict=True))
    for spec, segment in zip(header.layout.specs, segments, strict=True):
        assert segment == by_name[spec.name].data


def test_what_mlx_writes_is_read(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2, 3), mx.bfloat16), "b": mx.arange(5)}, {"format": "mlx"})
    header, segments = read(path.read_bytes())
    assert {(spec.name, spec.dtype, spec.shape) for spec in header.layout.specs} == {
        ("a", "BF16", (2, 3)),
        ("b", "I32", (5,)),
    }
    assert bytes(segments[[spec.name for spec in header.layout.specs].index("a")]) == b"\x80\x3f" * 6


def test_the_empty_file_of_stock_is_read() -> None:
    assert read(framed("{}"))[0] == Header(Layout.of([]), None, None, 10)


def _foreign() -> bytes:
    return safetensors.numpy.save(
        {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3),
            "b": np.ones((), np.int16),
            "c": np.zeros((0, 2)),
        },
        metadata={"format": "np", "who": "stock"},
    )


def test_under_random_damage_we_are_no_laxer_than_stock() -> None:
    file = _foreign()
    source = random.Random(2)
    taken = [0, 0]
    for _ in range(6000):
        damaged = bytearray(file)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(damaged))
            damaged[at] = source.choice([source.randrange(256), damaged[at] ^ 1 << source.randrange(8)])
        taken[assert_no_laxer_than_stock(bytes(damaged))] += 1
    assert min(taken) > 100


def test_with_random_headers_we_are_no_laxer_than_stock() -> None:
    """Text of the header cut, doubled, moved and replaced by what a JSON reader may read otherwise."""
    file = _foreign()
    size = header_size(file[:8], len(file))
    header, data = file[8:size].decode(), file[size:]
    tokens = re.findall(r'"[^"]*"|[0-9]+|[][{}:,]| +', header)
    odd = ["-0", "-1", "00", "1.0", "1e0", "1E400", "18446744073709551616", "NaN", "Infinity", "null", "true"]
    odd += [
        '"\\ud800"',
        '"\\u0061"',
        '"\\x"',
        '"\t"',
        "[]",
        "{}",
        "[1]",
        "\u00a0",
        "\ufeff",
        "\n",
        "//",
        "'a'",
        "",
    ]
    source = random.Random(3)
    taken = [0, 0]
    for _ in range(6000):
        changed = list(tokens)
        for _ in range(source.randint(1, 2)):
            at = source.randrange(len(changed))
            changed[at] = source.choice([source.choice(odd), source.choice(tokens), changed[at] * 2])
        taken[assert_no_laxer_than_stock(framed("".join(changed), data))] += 1
    assert min(taken) > 100


A = '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
WRONG = {
    "empty": "",
    "no object": "[]",
    "begins with a space": " {}",
    "a byte order mark": "\ufeff{}",
    "two objects": "{}{}",
    "zeros for padding": "{}\0",
    "a key twice": A + ',"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "a key twice in an entry": '{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "metadata twice": '{"__metadata__":{},"__metadata__":{}}',
    "a metadata key twice": '{"__metadata__":{"a":"1","a":"1"}}',
    "metadata a list": '{"__metadata__":[]}',
    "a metadata value that is no string": '{"__metadata__":{"a":1}}',
    "an unknown field": '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":1}}',
    "a missing field": '{"a":{"dtype":"U8","shape":[2]}}',
    "an entry as a list": '{"a":["U8",[2],[0,2]]}',
    "dtype null": '{"a":{"dtype":null,"shape":[2],"data_offsets":[0,2]}}',
    "dtype a list": '{"a":{"dtype":["U8"],"shape":[2],"data_offsets":[0,2]}}',
    "dtype in small letters": '{"a":{"dtype":"u8","shape":[2],"data_offsets":[0,2]}}',
    "shape a number": '{"a":{"dtype":"U8","shape":2,"data_offsets":[0,2]}}',
    "shape with true": '{"a":{"dtype":"U8","shape":[2,true],"data_offsets":[0,2]}}',
    "shape with a float": '{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}',
    "shape with an exponent": '{"a":{"dtype":"U8","shape":[2e0],"data_offsets":[0,2]}}',
    "shape with a string": '{"a":{"dtype":"U8","shape":["2"],"data_offsets":[0,2]}}',
    "shape negative": '{"a":{"dtype":"U8","shape":[-1,-2],"data_offsets":[0,2]}}',
    "shape minus zero": '{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}',
    "shape NaN": '{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}',
    "shape of another size": '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,2]}}',
    "shape that overflows": '{"a":{"dtype":"U8","shape":[9223372036854775809,2],"data_offsets":[0,2]}}',
    "empty shape that no framework has": '{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}',
    "one offset": '{"a":{"dtype":"U8","shape":[2],"data_offsets":[2]}}',
    "three offsets": '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2,2]}}',
    "offsets true": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}',
    "offsets reversed": '{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,0]}}',
    "a hole at the beginning": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
    "a hole at the end": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "an overlap": A + ',"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
    "the same place twice": A + ',"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "an empty tensor inside another": A + ',"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}',
    "an empty tensor beyond the end": A + ',"b":{"dtype":"U8","shape":[0],"data_offsets":[3,3]}}',
    "half a surrogate as a name": A.replace('"a"', '"\\ud800"') + "}",
    "half a surrogate in metadata": A + ',"__metadata__":{"a":"\\udfff"}}',
}  # fmt: skip


@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG.keys())
def test_a_header_that_is_not_strictly_right_is_refused(header: str) -> None:
    assert refused(framed(header, b"\1\2"))
    assert refused(framed(header))


def test_the_pattern_of_the_wrong_headers_is_right() -> None:
    assert not refused(framed(A + "}", b"\1\2"))
    assert not refused(framed(A + ',"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}   ', b"\1\2"))


def test_a_header_that_is_not_utf8_is_refused() -> None:
    assert refused(framed(A.encode().replace(b'"a"', b'"\xff"') + b"}", b"\1\2"))
    assert refused(framed(A.encode().replace(b'"a"', b'"\xed\xa0\x80"') + b"}", b"\1\2"))


# --- hostile headers ---


@contextmanager
def bounded(deadline: Callable[[float], AbstractContextManager[None]], peak_bytes: int) -> Iterator[None]:
    with deadline(10.0):
        tracemalloc.start()
        try:
            yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak <= peak_bytes


@pytest.mark.parametrize("length", [1, 10_000, MAX_HEADER_BYTES + 1, 2**31, 2**63, 2**64 - 8, 2**64 - 1])
def test_a_length_is_checked_before_anything_is_allocated(deadline: Any, length: int) -> None:
    prefix = struct.pack("<Q", length)
    with bounded(deadline, 16 * KiB), pytest.raises(SnapshotCorruptError):
        header_size(prefix, 8)


def test_a_header_is_at_most_what_safetensors_allows() -> None:
    assert header_size(struct.pack("<Q", MAX_HEADER_BYTES), 2**40) == MAX_HEADER_BYTES + 8
    with pytest.raises(SnapshotCorruptError, match="at most"):
        header_size(struct.pack("<Q", MAX_HEADER_BYTES + 1), 2**40)


HOSTILE = {
    "nested lists": lambda n: '{"a":' + "[" * n,
    "nested lists, closed": lambda n: '{"a":' + "[" * (n // 2) + "]" * (n // 2) + "}",
    "nested objects": lambda n: '{"a":' * (n // 5),
    "nested shape": lambda n: '{"a":{"dtype":"U8","shape":' + "[" * 600 + "]" * 600 + ',"data_offsets":[0,0]}}',
    "empty lists": lambda n: '{"a":[' + "[]," * (n // 3) + "0]}",
    "empty objects": lambda n: '{"a":[' + "{}," * (n // 3) + "0]}",
    "one number": lambda n: '{"a":' + "9" * n + "}",
    "one negative number": lambda n: '{"a":-' + "9" * n + "}",
    "one exponent": lambda n: '{"a":1e' + "9" * n + "}",
    "one shape of large extents": lambda n: (
        '{"a":{"dtype":"U8","shape":[' + "999999999999999999," * (n // 19) + '1],"data_offsets":[0,2]}}'
    ),
    "one shape of large extents and a zero": lambda n: (
        '{"a":{"dtype":"U8","shape":[0,' + "999999999999999999," * (n // 19) + '1],"data_offsets":[0,0]}}'
    ),
    "one shape of ones": lambda n: (
        '{"a":{"dtype":"U8","shape":[' + "1," * (n // 2) + '3],"data_offsets":[0,2]}}'
    ),
    "one key often": lambda n: "{" + '"a":0,' * (n // 6) + '"a":0}',
    "many entries at one place": lambda n: (
        "{"
        + ",".join(
            f'"{i}":{{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}' for i in range(n // 55)
        )
        + "}"
    ),
    "one name": lambda n: '{"' + "a" * n + '":0}',
    "one string without an end": lambda n: '{"' + "a" * n,
    "escapes": lambda n: '{"' + "\\u0061" * (n // 6) + '":0}',
    "spaces": lambda n: "{" + " " * n,
}  # fmt: skip


@pytest.mark.parametrize("made", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_bounded_in_time_and_memory(deadline: Any, made: Callable[[int], str]) -> None:
    nbytes = 500_000
    file = framed(made(nbytes), b"\1\2")
    with bounded(deadline, 32 * nbytes):
        assert refused(file)


@pytest.mark.parametrize("depth", range(880, 1000, 7))
def test_depth_near_the_limit_of_the_stack_is_corrupt_and_nothing_else(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    assert refused(framed(f'{{"a":{{"dtype":"U8","shape":{nested},"data_offsets":[0,0]}}}}'))
    assert refused(framed(f'{{"a":{{"dtype":{nested},"shape":[],"data_offsets":[0,0]}}}}'))


@pytest.mark.parametrize("digits", ["9" * 20, "9" * 400_000, "-1"])
def test_digits_are_counted_before_they_become_a_number(digits: str) -> None:
    with pytest.raises(SnapshotCorruptError, match="is not a size"):
        read(framed(f'{{"a":{{"dtype":"U8","shape":[{digits}],"data_offsets":[0,2]}}}}', b"\1\2"))


def test_errors_are_those_of_the_package_and_short() -> None:
    name = "n" * 100_000
    with pytest.raises(SnapstoreError) as caught:
        read(framed(f'{{"{name}":{{}}}}'))
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 300


# --- what can not be written ---


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        (
            TensorSpec("__metadata__", "U8", ()),
            ValueError,
            "^a tensor can not be called '__metadata__': .* to itself$",
        ),
        (TensorSpec("a\ud800", "U8", ()), ValueError, "tensor 'a.ud800': a lone surrogate"),
        (TensorSpec(3, "U8", ()), TypeError, "an int: 3"),  # type: ignore[arg-type]
        (TensorSpec("a", "F32", (0, 2**62)), ValueError, r"tensor 'a': shape \(0, \d+\) is larger"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_name(
    spec: TensorSpec, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_specs([TensorSpec("fine", "U8", (2,)), spec])
    with pytest.raises(error, match=words):
        encode_header(Layout.of([spec]), FACTS, None)


def test_large_empty_shapes_that_frameworks_have_are_fine() -> None:
    layout = Layout.of([TensorSpec("a", "F32", (0, 2**60)), TensorSpec("é", "U8", (2**62, 0))])
    assert read(file_of(layout, data_of(layout)))[0].layout == layout
    assert torch.empty((0, 2**60), dtype=torch.float32).shape == (0, 2**60)


def test_a_request_id_that_utf8_can_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        encode_header(Layout.of([]), Facts("\ud800", 1, 1, "torch", "null"), None)


def test_a_header_too_large_for_safetensors_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = len(encode_header(Layout.of(SMALL), FACTS, None)) - 8
    monkeypatch.setattr(_format, "MAX_HEADER_BYTES", fits)
    assert len(encode_header(Layout.of(SMALL), FACTS, None)) == fits + 8
    monkeypatch.setattr(_format, "MAX_HEADER_BYTES", fits - 1)
    with pytest.raises(ValueError, match=r": use fewer tensors or shorter names$"):
        encode_header(Layout.of(SMALL), FACTS, None)


# --- the user's metadata ---

any_text = st.text(st.characters(), max_size=10)
has_pair = re.compile("[\ud800-\udbff][\udc00-\udfff]").search
keys_and_strings = any_text.filter(lambda text: not has_pair(text))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | keys_and_strings,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(keys_and_strings, below, max_size=4),
    max_leaves=20,
)


@given(json_values)
@settings(max_examples=300)
def test_metadata_comes_back_equal(value: Any) -> None:
    text = encode_metadata(value)
    assert repr(decode_metadata(text)) == repr(value)  # types, order and the sign of zero included
    layout = Layout.of(SMALL)
    file = file_of(layout, data_of(layout), Facts("a", 1, 1, "torch", text))
    header, _ = read(file)
    assert header.facts is not None
    assert repr(decode_metadata(header.facts.metadata_json)) == repr(value)
    assert not refused_by_stock(file)


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 1, -0.0, 1.0, 5e-324, 1.7976931348623157e308, 2**64, -(10**4000), "", "\0", "\u2028",
        "\ud800", "\udc00\ud800", "a\udfffb", {"\ud83d": "\ude00"}, ["\ud83d", "\ude00"], "\\ud800", "\\\ud800", "😀",
        [], {}, [[]], {"": {}}, [True, 1, 1.0], {"a": None}, [0.1 + 0.2],
    ],
    ids=ascii,
)  # fmt: skip
def test_this_metadata_comes_back_equal(value: Any) -> None:
    assert repr(decode_metadata(encode_metadata(value))) == repr(value)


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ((1, 2), TypeError, "metadata: a tuple is not a JSON value; use a list"),
        ({"layers": [0, 1, 2, {"shape": (1,)}]}, TypeError, "metadata.layers[3].shape: a tuple is not a JSON value"),
        ({"a b": {"c": {1}}}, TypeError, "metadata['a b'].c: a set is not a JSON value; use a list"),
        ({1: 2}, TypeError, "metadata: the key 1 is an int; use strings as keys"),
        ([{None: 2}], TypeError, "metadata[0]: the key None is a NoneType"),
        ({True: 2}, TypeError, "the key True is a bool"),
        ({Text("a"): 2}, TypeError, "the key 'a' is a "),
        ({10**5000: 2}, TypeError, "is an int; use strings"),
        ([1.0, float("nan")], ValueError, "metadata[1]: nan is not a JSON number; use None or a string"),
        ({"x": float("-inf")}, ValueError, "metadata.x: -inf"),
        ([10**4300], ValueError, "metadata[0]: the int can not be written"),
        (np.float64(1), TypeError, "metadata: a numpy.float64 is not a JSON value; use float(...) of it"),
        ([np.int32(1)], TypeError, "metadata[0]: a numpy.int32 is not a JSON value; use its .tolist()"),
        (np.zeros(2), TypeError, "numpy.ndarray is not a JSON value; use its .tolist(), or save it as a tensor"),
        (torch.zeros(2), TypeError, "torch.Tensor is not a JSON value; use its .tolist(), or save it as a tensor"),
        (torch.Size([1]), TypeError, "torch.Size is not a JSON value; use a list"),
        (Color.RED, TypeError, "use int(...) of it"),
        (Text("a"), TypeError, "use str(...) of it"),
        (OrderedDict(a=1), TypeError, "a collections.OrderedDict is not a JSON value; use dict(...) of it"),
        (b"a", TypeError, "metadata: a bytes is not a JSON value; use None, bool"),
        (1j, TypeError, "a complex is not"),
        (object(), TypeError, "an object is not a JSON value"),
        (iter([]), TypeError, "list_iterator is not"),
        ("\ud83d\ude00", ValueError, "both halves of a surrogate pair"),
        ({"\ud83d\ude00": 1}, ValueError, "both halves of a surrogate pair"),
    ],
    ids=lambda each: ascii(each)[:40] if isinstance(each, str) else None,
)  # fmt: skip
def test_what_json_would_change_is_refused_with_its_place(
    value: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        encode_metadata(value)
    assert words in str(caught.value)


@pytest.mark.parametrize("letter", ["a", "é", "漢", "😀"])
def test_metadata_of_one_mebibyte_is_fine_and_a_byte_more_is_not(letter: str) -> None:
    room = MAX_METADATA_BYTES - 2
    width = len(letter.encode())
    value = letter * (room // width) + "a" * (room % width)
    text = encode_metadata(value)
    assert len(text.encode()) == MAX_METADATA_BYTES
    layout = Layout.of(SMALL)
    file = file_of(layout, data_of(layout), Facts("a", 1, 1, "torch", text))
    header, _ = read(file)
    assert header.facts is not None and decode_metadata(header.facts.metadata_json) == value
    assert not refused_by_stock(file)
    with pytest.raises(ValueError, match="more than 1048576 bytes as JSON"):
        encode_metadata(value + "a")


def test_a_lone_surrogate_costs_only_its_own_escape() -> None:
    value = "é" * ((MAX_METADATA_BYTES - 8) // 2) + "\ud800"
    assert decode_metadata(encode_metadata(value)) == value


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_metadata_may_be_nested_so_deep_and_no_deeper() -> None:
    assert decode_metadata(encode_metadata(nested(MAX_METADATA_DEPTH))) == nested(MAX_METADATA_DEPTH)
    with pytest.raises(ValueError, match="nested deeper than 100"):
        encode_metadata(nested(MAX_METADATA_DEPTH + 1))
    with pytest.raises(ValueError, match="nested deeper than 100"):
        encode_metadata({"a": nested(100_000)})


def test_metadata_that_contains_itself_is_refused() -> None:
    value: dict[str, Any] = {}
    value["a"] = [value]
    with pytest.raises(ValueError, match="nested deeper"):
        encode_metadata(value)


@pytest.mark.speed
@pytest.mark.parametrize("bad", [[], [(1,)]], ids=["fine leaf", "bad leaf"])
def test_metadata_that_would_be_exponential_is_refused_in_time(deadline: Any, bad: Any) -> None:
    value: Any = bad
    for _ in range(60):
        value = [value, value]
    with deadline(10.0), pytest.raises(ValueError, match="more than 1048576 bytes"):
        encode_metadata(value)


def test_a_fault_beside_exponential_metadata_is_found_in_time(deadline: Any) -> None:
    value: Any = []
    for _ in range(60):
        value = [value, value]
    with deadline(10.0), pytest.raises(TypeError, match=r"metadata\[1\]: a tuple"):
        encode_metadata([value, ()])


def test_each_decode_gives_a_value_of_its_own() -> None:
    text = encode_metadata({"a": [1]})
    first = decode_metadata(text)
    first["a"].append(2)
    assert decode_metadata(text) == {"a": [1]}


@pytest.mark.parametrize("text", ["", "{", "nul", "NaN", "[Infinity]", "[1]]", "[" * 100_000])
def test_metadata_that_is_not_json_is_corrupt(text: str) -> None:
    with pytest.raises(SnapshotCorruptError, match="metadata is not JSON"):
        decode_metadata(text)


def test_none_and_small_metadata_cost_microseconds() -> None:
    small = {"model": "qwen3_next", "layers": 48, "offsets": [1, 2, 3], "scale": 0.5}
    started_s = time.perf_counter()
    for _ in range(1000):
        encode_metadata(None)
        encode_metadata(small)
    assert (time.perf_counter() - started_s) / 1000 < 0.001


def test_metadata_that_is_null_is_none_at_all():
    """As ``mx.save_safetensors`` writes it where there is none."""
    raw = framed('{"__metadata__":null}')
    assert decode_header(raw, len(raw)).facts is None
