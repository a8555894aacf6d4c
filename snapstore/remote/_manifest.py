"""The manifest of a request, and every decision about it: pure functions, tried without any store.

``decide(manifest, event)`` is the manifest after the event; equal to the one before where nothing is to be written,
so it may be asked again after an answer was lost. It raises ``Refused`` where the event comes too late.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from xxhash import xxh3_64

from snapstore._errors import SnapshotCorruptError

FORMAT = 1
ENDED_KEPT = 32
"""Names of ended lives that a manifest remembers. Only a life that was never seen to begin needs them (invariant 3)."""


class Refused(Exception):
    """The event comes too late: its life has ended, or another node's has taken over."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One visible snapshot: its object, the bytes of it, and the generation that its file says."""

    name: str
    nbytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class RemoteLife:
    """What is visible of a request. ``began_s``: seconds since 1970, by the clock of the node that began it."""

    name: str
    began_s: float
    boundaries: Mapping[int, Entry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """``current=None``: a tombstone, which keeps late events out."""

    request_id: str
    current: RemoteLife | None = None
    ended: tuple[str, ...] = ()

    @property
    def objects(self) -> frozenset[str]:
        """Names of all objects that are visible."""
        return (
            frozenset(entry.name for entry in self.current.boundaries.values())
            if self.current
            else frozenset()
        )


@dataclass(frozen=True, slots=True)
class Publish:
    """A snapshot of a life is to be visible. ``may_begin``: the life was never seen to be current."""

    request_id: str
    life: str
    token_count: int
    entry: Entry
    may_begin: bool
    now_s: float


@dataclass(frozen=True, slots=True)
class EndLives:
    """A cleanup: ends the lives that it names, and whatever had begun by then (seconds since 1970)."""

    request_id: str
    lives: frozenset[str]
    before_s: float


@dataclass(frozen=True, slots=True)
class Remove:
    """Boundaries are to be visible no more, if they are still these objects."""

    request_id: str
    objects: frozenset[str]


Event = Publish | EndLives | Remove


def decide(manifest: Manifest | None, event: Event) -> Manifest:
    """The manifest after the event. Raises ``Refused``."""
    before = manifest or Manifest(event.request_id)
    if isinstance(event, Publish):
        return _published(before, event)
    if isinstance(event, Remove):
        return _removed(before, event)
    return _ended(before, event)


def _published(manifest: Manifest, event: Publish) -> Manifest:
    current = manifest.current
    if event.life in manifest.ended:
        raise Refused("its life was ended, by a cleanup or by a life that another node began")
    if current is None or current.name != event.life:
        if not event.may_begin:
            raise Refused("its life is not the current one any more")
        if current is not None:
            manifest = _without_current(manifest, [])
        current = RemoteLife(event.life, event.now_s)
    elif current.boundaries.get(event.token_count) == event.entry:
        return manifest
    boundaries = {**current.boundaries, event.token_count: event.entry}
    return replace(manifest, current=replace(current, boundaries=boundaries))


def _ended(manifest: Manifest, event: EndLives) -> Manifest:
    current = manifest.current
    if current is not None and (current.name in event.lives or current.began_s <= event.before_s):
        return _without_current(manifest, sorted(event.lives))
    return _remembering(manifest, sorted(event.lives))


def _removed(manifest: Manifest, event: Remove) -> Manifest:
    current = manifest.current
    if current is None or not manifest.objects & event.objects:
        return manifest
    left = {count: entry for count, entry in current.boundaries.items() if entry.name not in event.objects}
    if not left:
        return _without_current(manifest, [])
    return replace(manifest, current=replace(current, boundaries=left))


def _without_current(manifest: Manifest, others: list[str]) -> Manifest:
    assert manifest.current is not None
    return replace(_remembering(manifest, [*others, manifest.current.name]), current=None)


def _remembering(manifest: Manifest, lives: Iterable[str]) -> Manifest:
    new = [life for life in dict.fromkeys(lives) if life not in manifest.ended]
    return replace(manifest, ended=(*manifest.ended, *new)[-ENDED_KEPT:]) if new else manifest


def visible(manifest: Manifest | None, bound: str | None, ends: Iterable[EndLives]) -> RemoteLife | None:
    """What a node may load: the current life, but for cleanups still to be carried out, and for a life of its own."""
    if manifest is None:
        return None
    for end in ends:
        manifest = decide(manifest, end)
    life = manifest.current
    return life if life is not None and bound in (None, life.name) else None


# --- as bytes ---


def encode(manifest: Manifest) -> bytes:
    """JSON with a checksum, and a random text: an ETag is a hash of the content, and no content comes twice."""
    current = manifest.current
    body = {
        "format": FORMAT,
        "request_id": manifest.request_id,
        "ended": manifest.ended,
        "current": current and {
            "life": current.name,
            "began_s": current.began_s,
            "boundaries": {
                str(count): [entry.name, entry.nbytes, entry.generation]
                for count, entry in sorted(current.boundaries.items())
            },
        },
        "nonce": secrets.token_hex(8),
    }  # fmt: skip
    text = json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode()
    return text + b"\n" + xxh3_64(text).hexdigest().encode() + b"\n"


def decode(raw: bytes) -> Manifest:
    """``SnapshotCorruptError`` for what nobody wrote so."""
    text, _, digits = raw.rstrip(b"\n").rpartition(b"\n")
    if xxh3_64(text).hexdigest().encode() != digits:
        raise SnapshotCorruptError("a manifest does not match its checksum")
    try:
        return _decoded(json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotCorruptError(f"a manifest can not be read: {error!r}") from error


def _decoded(body: dict[str, Any]) -> Manifest:
    if body["format"] != FORMAT:
        raise SnapshotCorruptError(f"a manifest has format {body['format']!r}; upgrade snapstore")
    current = body["current"]
    life = None
    if current is not None:
        boundaries = {int(count): Entry(*entry) for count, entry in current["boundaries"].items()}
        life = RemoteLife(current["life"], current["began_s"], boundaries)
    return Manifest(body["request_id"], life, tuple(body["ended"]))
