"""Lives of stores on a disk that keeps a record, and what they promise of every state that a power cut may leave."""

from __future__ import annotations

import errno
import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from helpers import assert_same

from snapstore import (
    RootError,
    SaveTicket,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotStore,
    SnapstoreError,
    StoreOptions,
)
from snapstore._files import FileSystem, exists
from snapstore._format import decode_header, header_size, verify_checksums
from snapstore._memory import segments_of
from snapstore._owner import read_record
from snapstore._paths import MARKER, OWNER_LOCK, is_session_name
from snapstore.testing import OPERATIONS, PowerCut, RecordingFileSystem

Key = tuple[str, int]
Found = int | None | Literal["corrupt", "torn"]
Durability = Literal["none", "data", "full"]

ROOT = "/data/snapshots/root"
OUTSIDE = "/outside/kept.safetensors"
ELSEWHERE = "/elsewhere/kept.safetensors"
"""On another file system."""
KEYS: tuple[Key, ...] = (("a", 1), ("a", 2), ("b", 1))
PATIENCE_S = 20.0


def content(key: Key, version: int) -> dict[str, Any]:
    """Differs for each key and version, and in every byte from what a disk puts in its place."""
    random = np.random.default_rng(zlib.crc32(f"{key}{version}".encode()))
    return {
        "ssm": random.integers(1, 200, 60, dtype=np.uint8),
        "conv": random.standard_normal((5, 3), dtype=np.float32),
    }


# -- what a store does, noted on the disk as it goes --------------------------------------------------------------


class Life:
    """A store at work; each step is marked when it begins and when it has been reported done."""

    def __init__(self, disk: RecordingFileSystem, options: StoreOptions) -> None:
        self.disk = disk
        self.options = options
        self.store = SnapshotStore(ROOT, options, file_system=disk)
        disk.mark(("opened",))

    def save(self, key: Key, version: int) -> SaveTicket:
        self.disk.mark(("saving", key, version))
        return self.store.save(*key, content(key, version), metadata=version)

    def commit(self, key: Key, version: int) -> None:
        self.save(key, version).result(PATIENCE_S)
        self.disk.mark(("committed", key, version))

    def flush(self, saved: Iterable[tuple[Key, int]]) -> None:
        assert self.store.flush(PATIENCE_S)
        for key, version in saved:
            self.disk.mark(("committed", key, version))

    def cleanup(self, request_id: str) -> None:
        self.disk.mark(("cleaning", request_id))
        assert self.store.cleanup_request(request_id, timeout_s=PATIENCE_S).clean
        self.disk.mark(("cleaned", request_id))

    def detach(self, key: Key, destination: str) -> None:
        self.disk.mark(("detaching", key, destination))
        self.store.detach(*key, destination)
        self.disk.mark(("detached", key, destination))

    def end(self) -> None:
        assert self.store.shutdown(timeout_s=PATIENCE_S).clean


Scenario = Callable[[RecordingFileSystem, StoreOptions], None]


def saves(disk: RecordingFileSystem, options: StoreOptions) -> None:
    life = Life(disk, options)
    life.commit(("a", 1), 0)
    life.commit(("b", 1), 0)
    life.commit(("a", 2), 0)
    life.end()


def flushes(disk: RecordingFileSystem, options: StoreOptions) -> None:
    life = Life(disk, options)
    for key in KEYS:
        life.save(key, 0)
    life.flush((key, 0) for key in KEYS)
    life.end()


def replaces(disk: RecordingFileSystem, options: StoreOptions) -> None:
    life = Life(disk, options)
    for version in range(3):
        life.commit(("a", 1), version)
    life.end()


def cleans_and_begins_again(disk: RecordingFileSystem, options: StoreOptions) -> None:
    life = Life(disk, options)
    life.commit(("a", 1), 0)
    life.commit(("a", 2), 0)
    life.cleanup("a")
    life.commit(("a", 1), 1)
    life.end()


def detaches(disk: RecordingFileSystem, options: StoreOptions) -> None:
    disk.make_directory("/outside")
    disk.sync_directory("/")
    life = Life(disk, options)
    life.commit(("a", 1), 0)
    life.commit(("b", 1), 0)
    life.detach(("a", 1), OUTSIDE)
    life.end()


def detaches_across(disk: RecordingFileSystem, options: StoreOptions) -> None:
    disk.mount("/elsewhere")
    disk.sync_directory("/")
    life = Life(disk, options)
    life.commit(("a", 1), 0)
    life.detach(("a", 1), ELSEWHERE)
    life.end()


def hands_over(disk: RecordingFileSystem, options: StoreOptions) -> None:
    """What one store committed, the next adopts, replaces in part, and its leftovers are reclaimed."""
    life = Life(disk, options)
    life.commit(("a", 1), 0)
    life.commit(("b", 1), 0)
    life.end()
    heir = Life(disk, adopting(options))
    wait_until(lambda: sessions_on(disk) == [heir.store.session.name])
    heir.commit(("a", 1), 1)
    heir.cleanup("b")
    heir.end()


def rescues(disk: RecordingFileSystem, options: StoreOptions) -> None:
    """What a store without any sync has left is as safe as the next one's own, once that has adopted it."""
    disk.mark(("unsynced", True))
    life = Life(disk, StoreOptions(durability="none", checksum=options.checksum))
    for key in KEYS:
        life.save(key, 0)
    assert life.store.flush(PATIENCE_S)
    life.end()
    heir = Life(disk, adopting(options))
    disk.mark(("unsynced", False))
    for key in KEYS:
        assert heir.store.has(*key)
        disk.mark(("committed", key, 0))
    wait_until(lambda: sessions_on(disk) == [heir.store.session.name])
    heir.end()


def discards(disk: RecordingFileSystem, options: StoreOptions) -> None:
    life = Life(disk, options)
    life.commit(("a", 1), 0)
    life.end()
    disk.mark(("discarding",))
    heir = Life(disk, options)
    wait_until(lambda: sessions_on(disk) == [heir.store.session.name])
    heir.commit(("b", 1), 0)
    heir.end()


def loses_its_session(disk: RecordingFileSystem, options: StoreOptions) -> None:
    """Somebody removes the session of a live store; what is saved from then on is as safe as ever."""
    life = Life(disk, options)
    life.commit(("a", 1), 0)
    disk.mark(("discarding",))
    disk.rename(str(life.store.session), "/data/taken")
    assert life.save(("b", 1), 0).exception(PATIENCE_S) is not None
    life.commit(("b", 1), 1)
    life.end()


class Mortal(FileSystem):
    """What a process sees of a disk that other processes see too, until it dies after so many changes there."""

    def __init__(self, disk: RecordingFileSystem, changes: int) -> None:
        super().__init__()
        self.disk = disk
        self.changes = changes


def _performing(operation: str) -> Callable[..., Any]:
    def perform(self: Mortal, *args: Any, **options: Any) -> Any:
        if (
            operation != "close" and self.disk.changes >= self.changes
        ):  # what it has open is closed by the kernel
            raise OSError(errno.EIO, "this process is dead")
        return getattr(self.disk, operation)(*args, **options)

    return perform


for _operation in OPERATIONS:
    setattr(Mortal, _operation, _performing(_operation))


def dies_and_is_rescued(disk: RecordingFileSystem, options: StoreOptions, changes: int) -> bool:
    """A process without any sync is killed, and what the next store finds is adopted. False: it had ended before."""
    disk.mark(("unsynced", True))
    with suppress(SnapstoreError, OSError):
        store = SnapshotStore(ROOT, StoreOptions(durability="none"), file_system=Mortal(disk, changes))
        for key in KEYS:
            disk.mark(("saving", key, 0))
            store.save(*key, content(key, 0), metadata=0).exception(PATIENCE_S)
        store.shutdown(timeout_s=PATIENCE_S)
    died = disk.changes >= changes
    heir = Life(disk, adopting(options))
    disk.mark(("unsynced", False))
    for key in KEYS:
        if heir.store.has(*key):
            disk.mark(("committed", key, 0))
    heir.commit(("b", 1), 1)
    heir.end()
    return died


SCENARIOS: tuple[Scenario, ...] = (
    saves,
    flushes,
    replaces,
    cleans_and_begins_again,
    detaches,
    detaches_across,
    hands_over,
    rescues,
    discards,
    loses_its_session,
)


def adopting(options: StoreOptions) -> StoreOptions:
    return StoreOptions(durability=options.durability, checksum=options.checksum, leftovers="adopt")


def recorded(
    scenario: Scenario, options: StoreOptions, disk: RecordingFileSystem | None = None
) -> RecordingFileSystem:
    disk = disk or RecordingFileSystem(write_bytes_max=480)
    scenario(disk, options)
    return disk


# -- what may be there afterwards -----------------------------------------------------------------------------------


@dataclass
class Promise:
    """What the marks of a record allow. ``kept``: nothing was lost but the process, or nothing may be lost."""

    kept: bool
    may_be: dict[Key, set[int | None]] = field(default_factory=lambda: {key: {None} for key in KEYS})
    ever: dict[Key, set[int | None]] = field(default_factory=lambda: {key: {None} for key in KEYS})
    forgotten: set[Key] = field(default_factory=set)
    moving: dict[Key, str] = field(default_factory=dict)
    moved: set[Key] = field(default_factory=set)
    synced: bool = True
    ever_unsynced: bool = False

    @classmethod
    def of(cls, cut: PowerCut, durability: Durability) -> Promise:
        promise = cls(kept=not cut.lost or durability == "full")
        for word, *said in cut.marks:
            getattr(promise, word)(*said)
        return promise

    def unsynced(self, value: bool) -> None:
        """Whether the store that is open now is one without durability."""
        self.synced = not value
        self.ever_unsynced = True

    def opened(self) -> None:
        """Of no consequence."""

    def saving(self, key: Key, version: int) -> None:
        self.forgotten.discard(key)
        self.may_be[key] = self.may_be[key] | {version}
        self.ever[key] = self.ever[key] | {version}

    def committed(self, key: Key, version: int) -> None:
        self.may_be[key] = {each for each in self.may_be[key] if each is not None and each >= version}
        for other in self.forgotten:  # a later life of the request is there, and no two lives ever are
            if other[0] == key[0]:
                self.may_be[other] = {None}

    def cleaning(self, request_id: str) -> None:
        for key in KEYS:
            if key[0] == request_id:
                self.may_be[key] = self.may_be[key] | {None}

    def cleaned(self, request_id: str) -> None:
        """Its directory is in the trash. Without ``full`` that rename is not synced: a power cut may bring it back."""
        for key in KEYS:
            if key[0] == request_id:
                self.forgotten.add(key)
                self.may_be[key] = {None} if self.kept else self.may_be[key]

    def detaching(self, key: Key, destination: str) -> None:
        self.may_be[key] = self.may_be[key] | {None}
        self.moving[key] = destination

    def detached(self, key: Key, destination: str) -> None:
        self.moved.add(key)

    def discarding(self) -> None:
        self.may_be = {key: versions | {None} for key, versions in self.may_be.items()}

    def broken_by(self, found: dict[Key, Found], outside: set[Key], durability: Durability) -> str | None:
        """What is not as it was promised, in words."""
        durability = durability if self.synced else "none"
        strict = (self.kept and self.synced) or durability == "full"
        for key, version in found.items():
            if version == "torn" or (version == "corrupt" and (strict or durability == "data")):
                return f"{key} is {version}"
            if version != "corrupt" and version not in (self.may_be if strict else self.ever)[key]:
                return f"{key} is {version}, and may be {self.may_be[key]}"
        for key in self.moving if strict else ():
            if key not in outside and (key in self.moved or found[key] is None):
                return f"{key} is neither where it was nor where it was moved to"
        return None


# -- what is there --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a fresh store found on a disk.

    Attributes:
        stranded: sessions of which nobody can prove that their owner is dead.
        refused: why no store could be opened there.
    """

    found: dict[Key, Found]
    stranded: int
    refused: str | None = None


_FRESH = {word: StoreOptions(leftovers=word) for word in ("adopt", "discard")}


def look(files: FileSystem, root: str, leftovers: Literal["adopt", "discard"]) -> Look:
    """Open it, read everything, use it, and leave."""
    stranded = len(stranded_in(files, root))
    try:
        store = SnapshotStore(root, _FRESH[leftovers], file_system=files)
    except RootError as error:
        return Look({}, stranded, str(error))
    found = {key: version_of(store, key) for key in KEYS}
    assert store.stats().live_snapshots == sum(version is not None for version in found.values())
    wait_until(lambda: len(files.names(root)) - 2 <= stranded)  # beside the marker and its own session
    assert store.save("next", 1, content(("next", 1), 0)).result(PATIENCE_S)
    report = store.shutdown(cleanup=True, timeout_s=PATIENCE_S)
    assert report.clean and report.session_removed, report
    return Look(found, stranded)


def version_of(store: SnapshotStore, key: Key) -> Found:
    """Which version of a key is there, after a look at every bit of it."""
    try:
        snapshot = store.load(*key)
    except SnapshotNotFoundError:
        return None
    except SnapshotCorruptError:
        return "corrupt"
    try:
        assert_same(snapshot, content(key, snapshot.metadata))
    except AssertionError:
        return "torn"
    return int(snapshot.metadata)


def stranded_in(files: FileSystem, root: str) -> list[str]:
    """Sessions whose record or lock was not written when the power went."""
    if not exists(files, root):
        return []
    return [
        name
        for name in filter(is_session_name, files.names(root))
        if read_record(files, f"{root}/{name}") is None or not exists(files, f"{root}/{name}/{OWNER_LOCK}")
    ]


def moved_out(tree: Mapping[str, bytes | None]) -> set[Key]:
    """The keys whose files are where they were moved to, whole."""
    found = set()
    for path in (OUTSIDE, ELSEWHERE):
        raw = tree.get(path)
        if raw and (key := _key_of_file(raw)) is not None:
            found.add(key)
    return found


def _key_of_file(raw: bytes) -> Key | None:
    try:
        header = decode_header(raw[: header_size(raw[:8], len(raw))], len(raw))
        data = memoryview(raw)[header.data_offset :]
        verify_checksums(header, segments_of(header.layout, data))
    except SnapshotCorruptError:
        return None
    assert header.facts is not None
    key = header.facts.request_id, header.facts.token_count
    expected = content(key, json.loads(header.facts.metadata_json))
    assert bytes(data) == b"".join(
        expected[header.layout.specs[each].name].tobytes() for each in header.layout.file_order
    )
    return key


def sessions_on(files: FileSystem) -> list[str]:
    return [name for name in files.names(ROOT) if name != MARKER]


def wait_until(predicate: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not predicate():
        assert time.monotonic() < deadline_s, "it never came to be"
        time.sleep(0.0002)


# -- all of it ------------------------------------------------------------------------------------------------------


@dataclass
class Survey:
    """Every state of a record, opened and held against its promise.

    Args:
        opening: also the moments before the store was open, and those in which one without any sync is.
        until_broken: stop at the first state that is not as promised.
        discard_every: how many of the images are opened to discard them as well.

    Attributes:
        states: pairs of a moment and what may be on the disk after a power cut then.
        images: different ones among them, each opened to adopt what is there.
        broken: what was not as promised.
        corrupt: states in which a snapshot is found corrupt, and said to be.
        torn: states in which a snapshot that is not as it was written is taken for one.
        missing: states in which something that was committed is not there.
        stranded: states in which a session is left of which nobody can prove that its owner is dead.
    """

    durability: Durability
    window: int
    discard_every: int = 1
    opening: bool = True
    until_broken: bool = False
    states: int = 0
    broken: list[str] = field(default_factory=list)
    corrupt: int = 0
    torn: int = 0
    missing: int = 0
    stranded: int = 0
    _looks: dict[int, Look] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self._looks)

    def add(self, disk: RecordingFileSystem) -> None:
        for cut in disk.power_cuts(window=self.window):
            promise = Promise.of(cut, self.durability)
            if not self.opening and not (cut.marks and promise.synced):
                continue
            self.states += 1
            seen = self._look(cut)
            outside = moved_out(cut.tree)
            wrong = seen.refused or promise.broken_by(seen.found, outside, self.durability)
            if wrong:
                self.broken.append(f"{wrong}; at {cut.position} after {cut.marks[-1:]}, lost: {cut.lost}")
            self.corrupt += "corrupt" in seen.found.values() and promise.synced
            self.torn += "torn" in seen.found.values()
            self.missing += promise.broken_by(seen.found, outside, "full") is not None
            self.stranded += seen.stranded > 0 and not promise.ever_unsynced
            if self.until_broken and (self.broken or self.stranded):
                return

    def _look(self, cut: PowerCut) -> Look:
        image = hash(frozenset(cut.tree.items()))
        seen = self._looks.get(image)
        if seen is None:
            seen = self._looks[image] = look(cut.disk(), ROOT, "adopt")
            if self.images % self.discard_every == 0:
                assert set(look(cut.disk(), ROOT, "discard").found.values()) <= {None}
        return seen
