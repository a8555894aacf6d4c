"""What lies below a prefix, in the words of a root's maintenance, so that its listing and its plans hold here too.

A life that a manifest names is a session whose owner can not be known from here. Objects that no manifest names are
the loose bytes of one session of their own: dead, once they are older than any upload that may still want them.
Objects are listed before manifests are read, so that what is published meanwhile is never taken for garbage.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from snapstore._errors import SnapshotCorruptError
from snapstore._maintenance.survey import (
    Finding,
    Generation,
    Loose,
    Owner,
    Session,
    SnapshotFile,
    Surroundings,
)
from snapstore.remote import _names
from snapstore.remote._manifest import Entry, Manifest, RemoteLife
from snapstore.remote._objects import Listed, ObjectStore, RemoteFailure

UNREFERENCED = "unreferenced"
"""The session of what no manifest names."""

GRACE_S = 3600
"""So long an object may wait for its manifest: four times what an upload takes at most (``_exchange.UNSEEN_S``)."""

TOMBSTONE_S = 24 * 3600
"""So long a manifest without a life keeps late uploads out."""

_THREADS = 16


@dataclass(frozen=True, slots=True)
class RemoteSnapshot(SnapshotFile):
    """A visible snapshot; ``entry`` names its object."""

    entry: Entry

    @property
    def path(self) -> str:
        """Below the prefix."""
        return self.entry.name


@dataclass(frozen=True, slots=True)
class Tombstone(Loose):
    """A manifest without a life."""

    request_hash: str


@dataclass(slots=True)
class Survey:
    """A prefix at some moment."""

    sessions: list[Session] = field(default_factory=list)
    unfinished: list[Loose] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def surroundings(self) -> Surroundings:
        """What is beside the lives."""
        return Surroundings(tuple(self.unfinished), (), tuple(self.findings))


@contextmanager
def opened_prefix(url: str, timeout_s: float = 30.0) -> Iterator[ObjectStore]:
    """A prefix that carries our marker; ``RootError`` otherwise. Credentials and endpoint are in the environment."""
    store = ObjectStore(url, {}, timeout_s)
    try:
        try:
            store.check_marker(may_be_missing=False)
        except RemoteFailure as error:
            raise OSError(f"{url} can not be read: {error}") from error
        yield store
    finally:
        store.close()


def survey(store: ObjectStore, *, grace_s: float = GRACE_S, tombstone_s: float = TOMBSTONE_S) -> Survey:
    """Everything below. One listing, and one request for each manifest."""
    found = Survey()
    objects = {each.name: each for each in store.list(_names.SNAPSHOTS)}
    manifests = list(store.list(_names.MANIFESTS))
    named: set[str] = set()
    unreadable: set[str] = set()
    with ThreadPoolExecutor(_THREADS, "snapstore-survey") as threads:
        for listed, manifest in zip(
            manifests, threads.map(lambda each: _read(store, each), manifests), strict=True
        ):
            request_hash = _names.parse_manifest_name(listed.name)
            if request_hash is None or isinstance(manifest, str):
                why = manifest if isinstance(manifest, str) else "no name that snapstore gives"
                found.findings.append(Finding("corrupt", listed.name, why, listed.nbytes))
                unreadable.add(request_hash or "")
            elif manifest is not None and manifest.current is not None:
                named |= manifest.objects
                found.sessions.append(_life(store, found, manifest.request_id, manifest.current, objects))
            elif time.time() - listed.modified_s >= tombstone_s:
                found.unfinished.append(_tombstone(listed, request_hash))
    left = [each for name, each in objects.items() if name not in named]
    found.sessions += _unreferenced(found, left, unreadable, grace_s)
    return found


def _read(store: ObjectStore, listed: Listed) -> Manifest | str | None:
    """The manifest, or why it is none."""
    try:
        return store.read_manifest_named(listed.name).manifest
    except SnapshotCorruptError as error:
        return str(error)


def _life(
    store: ObjectStore, found: Survey, request_id: str, life: RemoteLife, objects: dict[str, Listed]
) -> Session:
    snapshots = []
    for count, entry in sorted(life.boundaries.items()):
        listed = objects.get(entry.name) or store.look_at(entry.name)
        if listed is None or listed.nbytes != entry.nbytes:
            why = (
                "its manifest names it, and it is not there" if listed is None else "it is not of its length"
            )
            found.findings.append(Finding("corrupt", entry.name, why, entry.nbytes))
        name = _names.parse_object_name(entry.name)
        request_hash = name.request_hash if name is not None else "?"
        of = Generation(life.name, life.name, request_hash, entry.generation, request_id)
        modified_ns = int((listed.modified_s if listed else life.began_s) * 1e9)
        nbytes = entry.nbytes
        snapshots.append(
            RemoteSnapshot(of, count, nbytes, nbytes, nbytes, modified_ns, modified_ns, 0, entry)
        )
    return Session(life.name, 0, int(life.began_s), Owner("unknown"), tuple(snapshots))


def _unreferenced(
    found: Survey, left: Iterable[Listed], unreadable: set[str], grace_s: float
) -> Iterator[Session]:
    """What no manifest names, but for what belongs to a manifest that can not be read."""
    old: list[Loose] = []
    young: list[Loose] = []
    for each in left:
        name = _names.parse_object_name(each.name)
        if name is None:
            found.findings.append(Finding("foreign", each.name, "no name that snapstore gives", each.nbytes))
        elif name.request_hash not in unreadable:
            loose = Loose("temporary", each.name, each.name, each.nbytes, int(each.modified_s * 1e9), 0)
            (old if time.time() - each.modified_s >= grace_s else young).append(loose)
    if old:
        yield Session(UNREFERENCED, 0, None, Owner("dead"), temporaries=tuple(old))
    if young:
        yield Session(f"{UNREFERENCED}, recent", 0, None, Owner("unknown"), temporaries=tuple(young))


def _tombstone(listed: Listed, request_hash: str) -> Tombstone:
    return Tombstone(
        "unfinished", listed.name, listed.name, listed.nbytes, int(listed.modified_s * 1e9), 0, request_hash
    )
