"""Every name of an object is built and parsed here."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

from snapstore import _paths

MARKER = _paths.MARKER
PROBE = ".probe-"
MANIFESTS = "requests/"
SNAPSHOTS = "snapshots/"

_MANIFEST = re.compile(re.escape(MANIFESTS) + r"([0-9a-f]{32})" + re.escape(_paths.JSON_SUFFIX), re.ASCII)
_OBJECT = re.compile(
    re.escape(SNAPSHOTS)
    + r"([0-9a-f]{32})/([^/]+)/(0|[1-9]\d{0,18})\.[0-9a-f]{16}"
    + re.escape(_paths.SUFFIX),
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What the name of a snapshot's object says."""

    request_hash: str
    life: str
    token_count: int


def manifest_name(request_id: str) -> str:
    return f"{MANIFESTS}{_paths.request_hash(request_id)}{_paths.JSON_SUFFIX}"


def manifest_name_of(request_hash: str) -> str:
    return f"{MANIFESTS}{request_hash}{_paths.JSON_SUFFIX}"


def parse_manifest_name(name: str) -> str | None:
    """The request's hash."""
    match = _MANIFEST.fullmatch(name)
    return match[1] if match else None


def object_name(request_id: str, life: str, token_count: int) -> str:
    """A name that is not taken, whoever else publishes the same boundary."""
    directory = f"{SNAPSHOTS}{_paths.request_hash(request_id)}/{life}"
    return f"{directory}/{token_count}.{secrets.token_hex(8)}{_paths.SUFFIX}"


def parse_object_name(name: str) -> ObjectName | None:
    match = _OBJECT.fullmatch(name)
    return ObjectName(match[1], match[2], int(match[3])) if match else None


def life_name(node: str, session: str, generation: int) -> str:
    """Unique across nodes: a session, by its name, is one open store, and its generations are never reused."""
    return f"{hashlib.sha256(node.encode()).hexdigest()[:8]}.{session}.g{generation}"


def probe_name() -> str:
    return PROBE + secrets.token_hex(8)
