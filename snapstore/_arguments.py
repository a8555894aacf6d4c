"""Checks of what callers pass: ``TypeError`` and ``ValueError`` before anything is reserved."""

from __future__ import annotations

from snapstore._options import seconds
from snapstore._types import SnapshotKey

TOKEN_COUNT_MAX = 2**63 - 1


def checked_key(request_id: str, token_count: int) -> SnapshotKey:
    """The key of these two, as a plain ``str`` and a plain ``int``."""
    check_token_count(token_count, "token_count")
    return SnapshotKey(checked_request_id(request_id), int.__index__(token_count))


def checked_request_id(request_id: str) -> str:
    """Any text that UTF-8 can encode, as a plain ``str``: other classes may format, compare and hash as they like."""
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be a str, not {type(request_id).__name__}")
    request_id = str.__str__(request_id)
    try:
        request_id.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"request_id can not be encoded as UTF-8: {error}") from error
    return request_id


def check_token_count(value: int, name: str) -> None:
    """A boundary: 0 or more, and it fits into 63 bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value <= TOKEN_COUNT_MAX:
        raise ValueError(f"{name} must be between 0 and 2^63 - 1, not {value}")


def timeout_or(given_s: float | None, default_s: float) -> float:
    """The caller's time-out, or the option's."""
    return default_s if given_s is None else seconds(given_s, "timeout_s")
