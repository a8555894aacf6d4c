"""JSON without surprises: the user's metadata, which comes back equal, and headers, read strictly."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from snapstore._errors import SnapshotCorruptError

MAX_METADATA_BYTES = 1024 * 1024
"""Bound of the text, in UTF-8."""
MAX_METADATA_DEPTH = 100
"""Lists and dicts inside each other: far below the stack that any JSON parser has."""

_SCALARS = frozenset({type(None), bool, int, float, str})
_JSON_TYPES = _SCALARS | {list, dict}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 64
_BETWEEN = re.compile(r'[ \t\n\r]*(?:,(?=[ \t\n\r]*")|(?=}))')
"""What stands between a value and the next key, or the end of the object."""
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

to_json = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
).encode
"""The short form. ``check_circular`` is off: what is given here has a bounded depth."""


# --- the user's metadata ---


def encode_metadata(value: object) -> str:
    """The JSON text of ``value``, which ``decode_metadata`` turns back into an equal one.

    Nothing is converted: what JSON would change on the way (a tuple, an int as a key, NaN) is ``TypeError``
    or ``ValueError``, which says where it is and what to use instead. Fast for ``None`` and small dicts: it
    runs on the thread that saves.
    """
    if value is None:
        return "null"
    if not _is_plain(value):
        raise _why_not_plain(value)
    try:
        text = to_json(value)
    except ValueError as error:  # NaN, an infinity, or an int of too many digits
        raise _why_not_plain(value) from error
    if not text.isascii():
        text = _without_surrogates(text)
    if len(text) > MAX_METADATA_BYTES or len(text.encode()) > MAX_METADATA_BYTES:
        raise _too_large()
    return text


def decode_metadata(text: str) -> Any:
    """What was given to ``encode_metadata``; a fresh value at each call."""
    if text == "null":
        return None
    try:
        return _METADATA_READER.decode(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotCorruptError(f"the user's metadata is not JSON: {error}") from error


def _without_surrogates(text: str) -> str:
    r"""Lone surrogates as JSON escapes them: ``\udXXX``, which is what ``backslashreplace`` writes."""
    escaped = text.encode("utf-8", "backslashreplace").decode()
    if len(escaped) != len(text) and _SURROGATE_PAIR.search(text):
        raise ValueError(
            "metadata: a string holds both halves of a surrogate pair, which JSON reads as one character; "
            "join them: text.encode('utf-16', 'surrogatepass').decode('utf-16')"
        )
    return escaped


def _is_plain(value: object) -> bool:
    """True if JSON has a word for all of it, within the limits of depth and size. Level by level, at C speed.

    Counting what is seen bounds the time also where one list stands in itself, or many times in another.
    """
    level, seen = [value], 0
    for _ in range(MAX_METADATA_DEPTH + 1):
        kinds = set(map(type, level))
        if kinds <= _SCALARS:
            return True
        if not kinds <= _JSON_TYPES:
            return False
        below: list[object] = []
        for item in level:
            if type(item) is list:
                below += item
            elif type(item) is dict:
                if not set(map(type, item)) <= {str}:
                    return False
                below += item.values()
            if seen + len(below) > MAX_METADATA_BYTES:
                return False
        level, seen = below, seen + len(below)
    return False


def _why_not_plain(value: object) -> TypeError | ValueError:
    """The error for the outermost thing in ``value`` that is not JSON."""
    queue, seen = deque([("metadata", value, 1)]), 0
    while queue:
        where, item, depth = queue.popleft()
        wrong = _wrong_with(where, item)
        if wrong is not None:
            return wrong
        if type(item) is not list and type(item) is not dict:
            continue
        if depth > MAX_METADATA_DEPTH:
            return ValueError(f"{where}: nested deeper than {MAX_METADATA_DEPTH} lists and dicts; flatten it")
        seen += len(item)
        if seen > MAX_METADATA_BYTES:
            break
        steps = item.items() if type(item) is dict else enumerate(item)
        queue += [(where + _step(step), child, depth + 1) for step, child in steps]
    return _too_large()


def _wrong_with(where: str, item: object) -> TypeError | ValueError | None:
    """What is wrong with ``item`` itself, whatever it contains."""
    if type(item) is float and not math.isfinite(item):
        return ValueError(f"{where}: {item} is not a JSON number; use None or a string")
    if type(item) is int:
        try:
            str(item)
        except ValueError as error:
            return ValueError(f"{where}: the int can not be written ({error}); use a string")
    if type(item) is dict:
        for key in item:
            if type(key) is not str:
                return TypeError(f"{where}: the key {shown(key)} is {kind_of(key)}; use strings as keys")
    if type(item) not in _JSON_TYPES:
        return TypeError(f"{where}: {kind_of(item)} is not a JSON value; {_instead_of(item)}")
    return None


def _instead_of(item: object) -> str:
    if isinstance(item, (tuple, set, frozenset)):
        return "use a list"
    for plain in (int, float, str, list, dict):
        if isinstance(item, plain):
            return f"use {plain.__name__}(...) of it"
    if hasattr(item, "tolist"):
        return "use its .tolist(), or save it as a tensor"
    return "use None, bool, int, float, str, list or dict"


def kind_of(item: object) -> str:
    """The type of ``item`` with its article, for messages."""
    cls = type(item)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(item: object) -> str:
    """``repr`` for a message: short, and bounded in depth, since hostile values come here too."""
    try:
        return _REPR.repr(item)
    except ValueError:  # an int of more digits than Python writes
        return kind_of(item)


def _step(step: str | int) -> str:
    if type(step) is str and step.isidentifier() and len(step) <= 64:
        return f".{step}"
    return f"[{shown(step)}]" if type(step) is str else f"[{step}]"


def _too_large() -> ValueError:
    return ValueError(
        f"metadata: more than {MAX_METADATA_BYTES} bytes as JSON; save the large part as a tensor"
    )


# --- headers ---


def header_text(body: memoryview) -> str:
    """The JSON that a safetensors header is."""
    if bytes(body[:1]) != b"{":
        raise SnapshotCorruptError("the header does not begin with '{'")
    with _as_corrupt():
        return str(body, "utf-8")


def parse_header(text: str) -> dict[str, Any]:
    """The object that it is: no key twice, and no int that is not a size."""
    with _as_corrupt():
        table: dict[str, Any] = _HEADER_READER.decode(text)
    return table


def split_header(text: str, start: int) -> tuple[Any, str]:
    """The value that begins at ``start``, which is that of the first key, and the text of an object of the others."""
    with _as_corrupt():
        value, end = _HEADER_READER.raw_decode(text, start)
        between = _BETWEEN.match(text, end)
        if between is None:
            raise ValueError(f"neither a key nor the end follows character {end}")
    return value, "{" + text[between.end() :]


@contextmanager
def _as_corrupt() -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise SnapshotCorruptError("the header is nested too deep") from error
    except ValueError as error:
        raise SnapshotCorruptError(f"the header is not the JSON of a safetensors file: {error}") from error


def is_utf8(text: str) -> bool:
    """False for a lone surrogate, which Python's JSON reader lets in and UTF-8 has no bytes for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands there twice")
            seen.add(key)
    return table


def _size(digits: str) -> int:
    if len(digits) > 19 or digits[0] == "-":  # bounded before they become a number; 19 hold all below 2**63
        raise ValueError(f"{shown(digits)} is not a size")
    return int(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_METADATA_READER = json.JSONDecoder(parse_constant=_refuse)
_HEADER_READER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_size)
