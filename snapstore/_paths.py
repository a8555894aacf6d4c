"""Every name on disk is built and parsed here, and nowhere else.

    ROOT/.snapstore                                     marker
    ROOT/<session>/owner.json, owner.lock               <session> = <utc time>-<pid>-<random>
    ROOT/<session>/<hash>.g<generation>/<tokens>.safetensors
    ROOT/<session>/.tmp/<random>                        being written
    ROOT/<session>/.trash/<random>                      forgotten, bytes not yet freed
    ROOT/.new-<random>, ROOT/.dead-<random>             a session being made, a session being deleted
    ROOT/.endings/<random>.json                         an end of a life in a remote store, still to be carried out
    ROOT/.quarantine/<session>.<hash>.g<generation>.<random>.<tokens>.safetensors    corrupt, moved aside by ``verify``

A request id is any text; only its hash is ever part of a name. Paths are plain ``str``: they are built for each
save, and a ``Path`` costs more than the rename.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache

MARKER = ".snapstore"
OWNER_RECORD = "owner.json"
OWNER_LOCK = "owner.lock"
TEMPORARY = ".tmp"
TRASH = ".trash"
QUARANTINE = ".quarantine"
ENDINGS = ".endings"
SUFFIX = ".safetensors"

JSON_SUFFIX = ".json"
_NEW, _DEAD = ".new-", ".dead-"
_SESSION = re.compile(r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z-\d+-[0-9a-f]{8}", re.ASCII)
_GENERATION = re.compile(r"([0-9a-f]{32})\.g([1-9]\d{0,18}|0)", re.ASCII)
_SNAPSHOT = re.compile(r"(0|[1-9]\d{0,18})" + re.escape(SUFFIX), re.ASCII)


@dataclass(frozen=True, slots=True)
class GenerationName:
    """What the name of a generation's directory says."""

    request_hash: str
    generation: int


@lru_cache(maxsize=1024)
def request_hash(request_id: str) -> str:
    """32 hex digits that stand for the request id in file names."""
    return hashlib.sha256(request_id.encode()).hexdigest()[:32]


def generation_name(request_id: str, generation: int) -> str:
    return f"{request_hash(request_id)}.g{generation}"


def parse_generation_name(name: str) -> GenerationName | None:
    match = _GENERATION.fullmatch(name)
    return GenerationName(match[1], int(match[2])) if match else None


def snapshot_name(token_count: int) -> str:
    return f"{token_count}{SUFFIX}"


def parse_snapshot_name(name: str) -> int | None:
    match = _SNAPSHOT.fullmatch(name)
    return int(match[1]) if match else None


def new_session_name(now_s: float, pid: int) -> str:
    """A name that sorts by time of birth (UTC) and is not taken."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now_s))}-{pid}-{secrets.token_hex(4)}"


def staged_marker_name() -> str:
    """The marker before it gets its name."""
    return f"{MARKER}.{secrets.token_hex(12)}"


def is_staged_marker_name(name: str) -> bool:
    return name.startswith(MARKER + ".")


def is_session_name(name: str) -> bool:
    return _SESSION.fullmatch(name) is not None


def session_opened_at(name: str) -> int | None:
    """When a session was opened, by its name: seconds since 1970; ``None`` for a time that never was."""
    match = _SESSION.fullmatch(name)
    if match is None:
        return None
    try:
        year, month, day, hour, minute, second = map(int, match.groups())
        return int(datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc).timestamp())
    except ValueError:
        return None


def unborn_session_name() -> str:
    """A session directory before its lock is held and it gets its name."""
    return _NEW + secrets.token_hex(8)


def dead_session_name() -> str:
    """A session directory that a reclaimer has renamed aside."""
    return _DEAD + secrets.token_hex(8)


def is_unfinished_session_name(name: str) -> bool:
    """True for a session directory being made or being deleted (or left so by a crash)."""
    return name.startswith((_NEW, _DEAD))


def quarantine_name(session: str, generation: str, snapshot: str) -> str:
    """Where a corrupt snapshot goes in ``.quarantine``: it tells where it came from, and is not taken."""
    return f"{session}.{generation}.{secrets.token_hex(4)}.{snapshot}"


def ending_name() -> str:
    """A name in ``.endings`` that is not taken."""
    return secrets.token_hex(12) + JSON_SUFFIX


def is_ending_name(name: str) -> bool:
    return name.endswith(JSON_SUFFIX)


def random_name() -> str:
    """A name in ``.tmp`` or ``.trash``: unique for each write, never a snapshot's."""
    return secrets.token_hex(12)


def join(*parts: str) -> str:
    return os.sep.join(parts)
