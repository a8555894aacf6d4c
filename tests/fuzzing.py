"""What reads bytes and texts of others, as functions that take any bytes and fail on whatever they should not do.

``python tests/fuzzing.py header 60 FOLDER`` lets atheris look for such bytes for a minute, from the corpus on; what it
learns and finds goes to FOLDER. Where atheris is not installed, ``mutations`` makes them by chance.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote

CORPUS = Path(__file__).parent / "corpus"

DIFFERENCES = {
    "a key twice": "stands there twice",
    "a field of a tensor that nobody knows": "must have dtype, shape and data_offsets, and nothing else",
    "a number that is no size in such a field": "is not a size",
    "space before the first brace": "does not begin with '{'",
    "a dtype of other than whole bytes, or one that no framework has": "is not one that snapstore reads",
    "an empty tensor whose other extents nobody can index": "larger than can be indexed",
}
"""What safetensors' own reader takes and ours does not, with the words in which ours says so. There is no other."""

TOKEN = "token"
ANSWERS = {200, 206, 400, 401, 403, 404, 405, 416}


def header(data: bytes) -> None:
    """A file of anybody's: refused, or read just as safetensors' own reader reads it."""
    from test_format import read, read_by_stock

    from snapstore import SnapshotCorruptError

    theirs = read_by_stock(data)
    why = ""
    try:
        ours, segments = read(data)
    except SnapshotCorruptError as error:
        why = str(error)
    if why:
        known = any(words in why for words in DIFFERENCES.values())
        assert theirs is None or known or b'"snapstore.' in data, why
        return
    assert theirs is not None, "it is laxer than safetensors"
    named = zip(ours.layout.specs, segments, strict=True)
    assert {spec.name: (spec.dtype, spec.shape, bytes(segment)) for spec, segment in named} == theirs


def snapshot(data: bytes) -> None:
    """A file of ours by its beginning and its seal, as only a hostile writer can make it, and loaded by a store."""
    from snapstore import SnapshotCorruptError, UnsupportedTensorError

    try:
        loaded = planted_with(data).load("a", 1)
    except (SnapshotCorruptError, UnsupportedTensorError):
        return
    tensors = data.partition(b"\0")[2]
    assert sum(each.nbytes for each in loaded.tensors.values()) == len(tensors), "some bytes are in no tensor"


def planted_with(data: bytes) -> Any:
    """A store whose only file, ``"a"`` at 1, is this: what follows the seal, a zero, and the tensors."""
    from test_format import OPENING, sealed

    text, _, tensors = data.partition(b"\0")
    store, put = _planted()
    put(sealed(OPENING + "0" * 16 + text.decode("utf-8", "replace"), tensors))
    return store


def metadata(data: bytes) -> None:
    """The metadata of a file: refused, or read as a value that comes back equal if it is saved again."""
    from snapstore import SnapshotCorruptError
    from snapstore._format import decode_metadata, encode_metadata

    text = data.decode("utf-8", "surrogatepass") if _is_text(data) else data.decode("latin-1")
    try:
        value = decode_metadata(text)
    except SnapshotCorruptError:
        return
    try:
        again = encode_metadata(value)
    except ValueError:
        return
    assert decode_metadata(again) == value


def units(data: bytes) -> None:
    """What people write for sizes, durations and filters: refused with a sentence, or within bounds."""
    from snapstore._maintenance.listing import Condition
    from snapstore._maintenance.units import (
        BYTES_MAX,
        SECONDS_MAX,
        UnitError,
        format_duration,
        format_size,
        parse_duration,
        parse_size,
        printable,
    )

    text = data.decode("utf-8", "surrogateescape")
    assert printable(text).isprintable()
    for parse, most, shown in (
        (parse_size, BYTES_MAX, format_size),
        (parse_duration, SECONDS_MAX, format_duration),
    ):
        with suppress(UnitError):
            value = parse(text)
            assert 0 <= value <= most and shown(value)
    try:
        condition = Condition.parse(text)
    except UnitError:
        return
    assert text.startswith(condition.field + condition.operator)


def asgi(data: bytes) -> None:
    """An HTTP request: a line with method and target, then headers. Answered, and never with a 500."""
    first, *lines = data.split(b"\n")
    method, _, target = first.partition(b" ")
    raw, _, query = bytes(byte & 0x7F for byte in target).partition(b"?")
    headers = [tuple(line.partition(b":")[::2]) for line in lines if b":" in line]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method.decode("latin-1"),
        "scheme": "http",
        "path": unquote(raw.decode("ascii")),
        "raw_path": raw,
        "query_string": query,
        "headers": [(name.strip().lower(), value.strip()) for name, value in headers],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
    }
    status, body = _asked(scope)
    assert status in ANSWERS, (status, body)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "snapshot": snapshot,
    "metadata": metadata,
    "units": units,
    "asgi": asgi,
}


# -- what they need ---------------------------------------------------------------------------------------------------


@cache
def _planted() -> tuple[Any, Callable[[bytes], None]]:
    """A store, and a way to put other bytes where its only file is."""
    import numpy as np

    from snapstore import SnapshotStore
    from snapstore.testing import MemoryFileSystem

    disk = MemoryFileSystem()
    store = SnapshotStore("/root", file_system=disk)
    path = str(store.save("a", 1, {"x": np.arange(3)}).result(10).path)

    def put(file: bytes) -> None:
        disk.unlink(path)
        fd = disk.create(path)
        disk.write(fd, [memoryview(file)], 0)
        disk.close(fd)

    return store, put


@cache
def _served() -> tuple[asyncio.AbstractEventLoop, Any, Any]:
    import numpy as np

    from snapstore import SnapshotStore
    from snapstore.aio import AsyncSnapshotStore
    from snapstore.asgi import create_app
    from snapstore.testing import MemoryFileSystem

    loop = asyncio.new_event_loop()
    shared = AsyncSnapshotStore(SnapshotStore("/root", file_system=MemoryFileSystem()))
    shared.store.save("a", 1, {"x": np.arange(3)}).result(10)
    return loop, shared, create_app(shared, token=TOKEN)


def _asked(scope: dict[str, Any]) -> tuple[int, bytes]:
    loop, shared, app = _served()
    said: list[dict[str, Any]] = []

    asked = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        """The request once; then nothing, since the client stays."""
        return asked.pop() if asked else await loop.create_future()

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    answering: Awaitable[None] = app(scope, receive, send)
    loop.run_until_complete(asyncio.wait_for(answering, 20))
    assert shared.store.stats().pending == 0
    body = b"".join(each.get("body", b"") for each in said[1:])
    return said[0]["status"], body


@contextmanager
def tidy() -> Iterator[None]:
    """At the end the stores that the targets have opened are shut down."""
    try:
        yield
    finally:
        if _planted.cache_info().currsize:
            _planted()[0].shutdown(cleanup=True)
        if _served.cache_info().currsize:
            loop, shared, _ = _served()
            loop.run_until_complete(shared.shutdown(cleanup=True))
            loop.close()
        _planted.cache_clear()
        _served.cache_clear()


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


# -- by chance --------------------------------------------------------------------------------------------------------

WORDS = re.compile(rb'"[^"]*"|[0-9]+|[A-Za-z_.]+|[^A-Za-z0-9"]')
ODD = (
    b"-0", b"00", b"1.0", b"1e9", b"18446744073709551615", b"9223372036854775808", b"NaN", b"null", b"true", b"[]",
    b'"\\ud800"', b'"\\u0061"', b"{}", b" ", b"\n", b'"x":1,', b'"F4"', b"\xff", b"\xed\xa0\x80", b"%2F", b"%00",
    b"%ff", b"..", b"bytes=-1", b"bytes=9-", b"Authorization: Bearer token", b"-1", b"1d", b"GiB", b"",
)  # fmt: skip


def seeds_of(name: str) -> list[bytes]:
    """The corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutations(name: str, seed: int) -> Iterator[bytes]:
    """Without end: seeds with bits flipped and words replaced, doubled, swapped and cut."""
    random, seeds = Random(seed), seeds_of(name)
    while True:
        data = random.choice(seeds)
        for _ in range(random.randint(1, 3)):
            data = _mutated(random, data, random.choice(seeds))
        yield data


def _mutated(random: Random, data: bytes, other: bytes) -> bytes:
    if random.random() < 0.3 and data:
        at = random.randrange(len(data))
        byte = random.choice([random.randrange(256), data[at] ^ 1 << random.randrange(8)])
        return data[:at] + bytes([byte]) + data[at + 1 :]
    words = WORDS.findall(data) or [b""]
    at = random.randrange(len(words))
    choice = random.randrange(5)
    if choice == 0:
        words[at] = random.choice(ODD)
    elif choice == 1:
        words[at] *= 2
    elif choice == 2:
        words.insert(at, random.choice(WORDS.findall(other) or [b""]))
    elif choice == 3:
        del words[at : at + random.randint(1, 4)]
    else:
        words[at:] = WORDS.findall(other)[at:]
    return b"".join(words)


# -- by coverage ------------------------------------------------------------------------------------------------------


def main(name: str, seconds: str, folder: str) -> None:
    """Ends with a status other than 0, and the bytes in the folder, where a target fails."""
    import atheris

    with atheris.instrument_imports(include=["snapstore"]):
        import snapstore.asgi
        import snapstore.caches  # noqa: F401
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=20", "-rss_limit_mb=4096"]
    atheris.Setup(
        ["fuzzing", *options, f"-artifact_prefix={folder}/", folder, str(CORPUS / name)], TARGETS[name]
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
