"""Requests taken apart, and errors as answers: what a client gets wrong is a 4xx, what hangs or is shut down a 503."""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.convertors import Convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from snapstore._arguments import TOKEN_COUNT_MAX
from snapstore._errors import (
    SaveCancelledError,
    SaveFailedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapstoreError,
    StoreClosedError,
)
from snapstore._reasons import reason_of

WAIT_S_MAX = 60.0
"""Longest wait that a client may ask for."""

_RANGE = re.compile(r"\s*(\d*)\s*-\s*(\d*)\s*", re.ASCII)
_TOKENS = re.compile(r"\d{1,19}", re.ASCII)
_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (SnapshotNotFoundError, 404),
    (SaveCancelledError, 404),
    (SaveFailedError, 409),
    (SnapshotCorruptError, 503),
    (StoreClosedError, 503),
    (TimeoutError, 503),
    (OSError, 503),
    (SnapstoreError, 503),
)


class AnyText(Convertor[str]):
    """A part of a path that may hold anything, slashes and line ends too: request ids are never file names here."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


def request_id_of(request: Request) -> str:
    """The request id in the path; 400 if that is no UTF-8, since the server has put other characters in its place."""
    raw = request.scope.get("raw_path")
    if raw is not None:
        try:
            unquote_to_bytes(raw).decode()
        except UnicodeDecodeError:
            raise HTTPException(
                400, "the path is not UTF-8; percent-encode the request id as UTF-8"
            ) from None
    return str(request.path_params["request_id"])


def token_count_of(request: Request) -> int:
    """The boundary in the path; 400 if it is none."""
    text = request.path_params["tokens"]
    if not _TOKENS.fullmatch(text) or int(text) > TOKEN_COUNT_MAX:
        raise HTTPException(400, f"token counts are whole numbers from 0 to {TOKEN_COUNT_MAX}")
    return int(text)


def timeout_of(request: Request) -> float | None:
    """``?timeout_s=``, ``None`` if it is not given; 400 if it is no bounded number of seconds."""
    text = request.query_params.get("timeout_s")
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 <= timeout_s <= WAIT_S_MAX:
        raise HTTPException(400, f"timeout_s is a number of seconds from 0 to {WAIT_S_MAX:g}")
    return timeout_s


def check_token(request: Request, token: bytes | None) -> None:
    """403 where nobody may write, 401 for whoever does not show the token. Compares in constant time."""
    if token is None:
        raise HTTPException(403, "this server only reads: it was given no token for writes")
    given = [value for name, value in request.headers.raw if name.lower() == b"authorization"]
    kind, _, shown = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if kind.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), token):
        raise HTTPException(401, "writes need the bearer token", headers={"WWW-Authenticate": "Bearer"})


def range_of(header: str | None, nbytes: int) -> tuple[int, int] | None:
    """First byte and the one after the last that are asked for; ``None``: all of them.

    400 for what is no range, 416 for one outside the file. Several ranges at once are answered with the whole file, as
    are units that nobody knows: HTTP leaves that to the server.
    """
    unit, equals, ranges = (header or "").partition("=")
    if not equals or unit.strip().lower() != "bytes" or "," in ranges:
        if header is not None and not equals:
            raise HTTPException(400, "a range looks like bytes=0-1023")
        return None
    match = _RANGE.fullmatch(ranges)
    if match is None or not any(match.groups()):
        raise HTTPException(400, "a range looks like bytes=0-1023")
    first, last = (_bounded(text) if text else None for text in match.groups())
    if first is None:
        start, stop = max(0, nbytes - (last or 0)), nbytes
    else:
        start, stop = first, nbytes if last is None else min(last + 1, nbytes)
        if last is not None and last < first:
            raise HTTPException(400, "a range does not end before it begins")
    if start >= stop:
        raise HTTPException(
            416, f"the file has {nbytes} bytes", headers={"Content-Range": f"bytes */{nbytes}"}
        )
    return start, stop


def _bounded(digits: str) -> int:
    """Longer numbers than any file needs are all the same."""
    return int(digits) if len(digits) <= 19 else 10**19


async def error_answer(_: Request, error: Exception) -> Response:
    """For ``exception_handlers``."""
    if isinstance(error, HTTPException):
        return as_json({"error": error.detail}, error.status_code, error.headers)
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    content = {"error": str(error), "type": type(error).__name__, "reason": reason_of(error)}
    return as_json(content, status, {"Retry-After": "1"} if status == 503 else None)


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Not to be cached, nor taken for anything else than JSON."""
    return JSONResponse(content, status, {**_PLAIN, **(headers or {})})


_PLAIN = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
HANDLED: tuple[type[Exception], ...] = (HTTPException, SnapstoreError, OSError)
