"""What a disk may hold after the power went: a record of all that changed on it, cut anywhere, in every legal order.

    disk = RecordingFileSystem()
    with SnapshotStore("/root", StoreOptions(durability="full"), file_system=disk) as store:
        store.save("request-1", 64, tensors).result()
        disk.mark("committed")
    for cut in disk.power_cuts(window=6):
        after = SnapshotStore("/root", StoreOptions(leftovers="adopt"), file_system=cut.disk())
        assert "committed" not in cut.marks or after.has("request-1", 64)

The model, which takes the worst that POSIX allows:

- Nothing is on the medium for sure until it is synced, and anything may be there before: any subset of the changes.
- Bytes written to a file are on the medium after a sync of that file; no sync of a file brings its name there.
- Until then each write of its own is there, or missing (the file ends sooner, or has zeros in its place where a later
  write is there), or only its length, or only its first half, or its length with stale bytes of something else.
- A change of names (make, link, rename, remove) is on the medium after a sync of a directory that it changes. It is
  atomic: a rename between two directories is there whole or not at all, and a sync of either one brings it there.
- Changes of one name in one directory keep their order: no later one without the earlier ones. All others have none,
  also within a directory.

``window``: of the last so many changes that are not synced any may be missing. Of the older ones, most likely written
long ago, each may be missing alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from snapstore.testing._memory import ROOT, Change, MemoryFileSystem, Named, Synced, Written

__all__ = ["PowerCut", "RecordingFileSystem"]

_STALE = b"\xdb"

Names = dict[tuple[int, str], int | None]
Contents = dict[int, bytes]


@dataclass(frozen=True, slots=True)
class _Mark:
    what: object


@dataclass(frozen=True, slots=True)
class PowerCut:
    """One state of the disk that a power cut may leave.

    Attributes:
        position: how many changes and marks had been recorded.
        marks: what had been marked by then.
        lost: the changes that did not reach the medium, or not whole, in words; empty where only the process died.
        tree: every path, with the bytes of a file and ``None`` for a directory.
    """

    position: int
    marks: tuple[object, ...]
    lost: tuple[str, ...]
    tree: Mapping[str, bytes | None]

    def disk(self) -> MemoryFileSystem:
        """A fresh disk in this state."""
        return MemoryFileSystem.holding(self.tree)


@dataclass(slots=True)
class _Medium:
    """What has surely been written: where names lead, and what files hold."""

    names: Names = field(default_factory=dict)
    contents: Contents = field(default_factory=dict)

    def copy(self) -> _Medium:
        return _Medium(dict(self.names), dict(self.contents))

    def take(self, change: Change) -> None:
        if isinstance(change, Named):
            for directory, name, inode in change.entries:
                self.names[directory, name] = inode
        elif isinstance(change, Written):
            self.put(change, change.data)

    def put(self, change: Written, data: bytes) -> None:
        """Bytes of a write, also where the file does not yet reach that far."""
        before = self.contents.get(change.file, b"")
        start, stop = change.offset, change.offset + len(data)
        self.contents[change.file] = before[:start].ljust(start, b"\0") + data + before[stop:]

    def tree(self, directories: set[int]) -> dict[str, bytes | None]:
        """All that can be reached."""
        below: dict[int, list[tuple[str, int]]] = {}
        for (directory, name), inode in self.names.items():
            if inode is not None:
                below.setdefault(directory, []).append((name, inode))
        found: dict[str, bytes | None] = {}
        ways = [("", ROOT)]
        while ways:
            path, inode = ways.pop()
            for name, each in below.get(inode, ()):
                found[f"{path}/{name}"] = None if each in directories else self.contents.get(each, b"")
                if each in directories:
                    ways.append((f"{path}/{name}", each))
        return found


class RecordingFileSystem(MemoryFileSystem):
    """A disk in memory that keeps a record of every change, in order. See the module."""

    def __init__(self, *, write_bytes_max: int | None = None) -> None:
        super().__init__(write_bytes_max=write_bytes_max)
        self._record: list[Change | _Mark] = []

    def mark(self, what: object) -> None:
        """Note that something has happened by now, which the states after it are to be held against."""
        with self._mutex:
            self._record.append(_Mark(what))

    @property
    def changes(self) -> int:
        """How many there have been."""
        with self._mutex:
            return sum(not isinstance(each, _Mark) for each in self._record)

    def power_cuts(self, *, window: int = 6, start: int = 0) -> Iterator[PowerCut]:
        """Every state after every change from ``start`` on; of one position no two are equal."""
        with self._mutex:
            record = list(self._record)
        return _Replay(record).cuts(window, start)

    def _happened(self, change: Change) -> None:
        self._record.append(change)


class _Replay:
    """The record, played once more: what is on the medium for sure, and what is still on its way."""

    def __init__(self, record: list[Change | _Mark]) -> None:
        self._record = record
        self._directories = {ROOT, *_directories_in(record)}
        self._medium = _Medium()
        self._pending: list[Named | Written] = []
        self._marks: list[object] = []

    def cuts(self, window: int, start: int) -> Iterator[PowerCut]:
        for position, change in enumerate([*self._record, None]):
            if position >= start:
                yield from self._cuts_here(position, window)
            if isinstance(change, _Mark):
                self._marks.append(change.what)
            elif isinstance(change, Synced):
                self._settle(change.inode)
            elif change is not None:
                self._pending.append(change)

    def _settle(self, inode: int) -> None:
        """Write what a sync of this file or directory writes, and what that cannot be without."""
        written: list[Named | Written] = []
        needed: set[tuple[int, str]] = set()
        for change in reversed(self._pending):
            if isinstance(change, Written):
                due = change.file == inode
            else:
                names = _names_in(change)
                due = bool(names & needed) or any(directory == inode for directory, _ in names)
                needed |= names if due else set()
            if due:
                written.append(change)
        for change in reversed(written):
            self._medium.take(change)
        settled = set(map(id, written))
        self._pending = [change for change in self._pending if id(change) not in settled]

    def _cuts_here(self, position: int, window: int) -> Iterator[PowerCut]:
        split = max(0, len(self._pending) - window)
        seen = set()
        for medium, lost in self._media(split):
            tree = medium.tree(self._directories)
            key = hash(frozenset(tree.items()))
            if key not in seen:
                seen.add(key)
                yield PowerCut(position, tuple(self._marks), lost, tree)

    def _media(self, split: int) -> Iterator[tuple[_Medium, tuple[str, ...]]]:
        base = self._medium.copy()
        for index, change in enumerate(self._pending[:split]):
            for medium, lost, gone in _fates_of(change, base, frozenset()):
                if lost:
                    yield _rest_kept(medium, self._pending[index + 1 :], gone), lost
            base.take(change)
        yield from _fates(base, self._pending[split:], (), frozenset())


Gone = frozenset[tuple[int, str]]
"""Names of which a change was lost, so that later ones are lost with it."""


def _fates(
    medium: _Medium, changes: list[Named | Written], lost: tuple[str, ...], gone: Gone
) -> Iterator[tuple[_Medium, tuple[str, ...]]]:
    """Every way in which these changes can be there or not; first the one in which all are."""
    if not changes:
        yield medium, lost
        return
    for there, word, missing in _fates_of(changes[0], medium, gone):
        yield from _fates(there, changes[1:], lost + word, missing)


def _fates_of(
    change: Named | Written, medium: _Medium, gone: Gone
) -> Iterator[tuple[_Medium, tuple[str, ...], Gone]]:
    """Every way in which this one can: the medium with it or without, in words, and the names that are lost now."""
    if isinstance(change, Named):
        names = _names_in(change)
        if not names & gone:
            kept = medium.copy()
            kept.take(change)
            yield kept, (), gone
        yield medium, (f"lost {change.entries}",), gone | names
        return
    for how, make in _WRITES.items():
        there = medium.copy()
        make(there, change)
        word = f"{how} {len(change.data)} bytes at {change.offset} of {change.file}"
        yield there, (word,) if how != "kept" else (), gone


def _rest_kept(medium: _Medium, changes: list[Named | Written], gone: Gone) -> _Medium:
    """All of these, but those that can not be without what is gone."""
    medium = medium.copy()
    for change in changes:
        if isinstance(change, Named) and _names_in(change) & gone:
            gone |= _names_in(change)
        else:
            medium.take(change)
    return medium


def _missing(_medium: _Medium, _change: Written) -> None:
    pass


def _zeros(medium: _Medium, change: Written) -> None:
    medium.put(change, bytes(len(change.data)))


def _half(medium: _Medium, change: Written) -> None:
    half = change.data[: len(change.data) // 2]
    medium.put(change, half.ljust(len(change.data), b"\0"))


def _stale(medium: _Medium, change: Written) -> None:
    medium.put(change, _STALE * len(change.data))


_WRITES: dict[str, Callable[[_Medium, Written], None]] = {
    "kept": _Medium.take,
    "missing": _missing,
    "zeros for": _zeros,
    "half of": _half,
    "stale": _stale,
}


def _names_in(change: Named) -> set[tuple[int, str]]:
    return {(directory, name) for directory, name, _ in change.entries}


def _directories_in(record: list[Change | _Mark]) -> Iterator[int]:
    for change in record:
        if isinstance(change, Named) and change.leads_to_directory:
            yield from (inode for _, _, inode in change.entries if inode is not None)
