"""What lies below a root, session by session, from names and ``lstat`` alone; no snapshot is opened for it.

What has no business there (links, FIFOs, devices, directories in the place of files, names that nobody gave, other
mounts) becomes a ``Finding`` and is not entered, opened or followed. What vanishes meanwhile is gone: live stores work
on.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import stat_result
from typing import Literal, TypeVar

from snapstore import _paths
from snapstore._errors import SnapshotCorruptError
from snapstore._files import TREE_DEPTH_MAX, disk_bytes, freed_by_unlinking, open_within, opened
from snapstore._maintenance.root import Root
from snapstore._maintenance.units import plural
from snapstore._owner import Liveness, OwnerRecord, liveness, read_record
from snapstore._paths import join
from snapstore._reader import read_header

Kind = Literal[
    "corrupt", "newer", "foreign", "unreadable", "linked", "temporary", "trash", "unfinished", "quarantined"
]
_Seen = TypeVar("_Seen")

WRONG: tuple[Kind, ...] = ("corrupt", "newer", "foreign", "unreadable", "linked")
"""Findings that make ``verify`` fail. The others are what an honest crash leaves, or a store at work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth a line: what it is, where (below the root), and why."""

    kind: Kind
    path: str
    why: str
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a session is. ``pid`` and ``host`` are what the record says, ``None`` without one."""

    liveness: Liveness
    pid: int | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One directory of snapshots. ``request_id`` is ``None`` where it was not asked for, or no file tells."""

    session: str
    name: str
    request_hash: str
    number: int
    request_id: str | None = None

    @property
    def path(self) -> str:
        """Below the root."""
        return join(self.session, self.name)


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """One snapshot by its name and its ``lstat``; ``inode`` and ``mtime_ns`` tell whether it still is this file."""

    of: Generation
    token_count: int
    nbytes: int
    disk_bytes: int
    freed_bytes: int
    mtime_ns: int
    atime_ns: int
    inode: int

    @property
    def name(self) -> str:
        """Within its generation's directory."""
        return _paths.snapshot_name(self.token_count)

    @property
    def path(self) -> str:
        """Below the root."""
        return join(self.of.path, self.name)


@dataclass(frozen=True, slots=True)
class Loose:
    """Bytes that belong to no snapshot: a file being written, a piece of trash, a session half made or half removed."""

    kind: Kind
    path: str
    name: str
    freed_bytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Session:
    """One session directory and everything in it."""

    name: str
    inode: int
    opened_at_s: int | None
    owner: Owner
    snapshots: tuple[SnapshotFile, ...] = ()
    temporaries: tuple[Loose, ...] = ()
    trash: tuple[Loose, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def loose(self) -> tuple[Loose, ...]:
        """Bytes of no snapshot."""
        return self.temporaries + self.trash

    @property
    def disk_bytes(self) -> int:
        """All that it takes on disk, but for what is foreign."""
        return sum(each.disk_bytes for each in self.snapshots) + sum(each.freed_bytes for each in self.loose)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What lies in the root beside the sessions."""

    unfinished: tuple[Loose, ...]
    quarantined: tuple[Loose, ...]
    findings: tuple[Finding, ...]


def sessions(root: Root, *, request_ids: bool = False, request_hash: str | None = None) -> Iterator[Session]:
    """Every session, oldest first, one at a time.

    ``request_ids`` reads one header a generation; with ``request_hash`` only the snapshots of that request are seen.
    """
    for name in root.files.names(root.fd):
        if _paths.is_session_name(name):
            session = _Look(root, request_ids, request_hash).session(name)
            if session is not None:
                yield session


def surroundings(root: Root) -> Surroundings:
    """Half-made and half-removed sessions, what is in quarantine, and what is not snapstore's."""
    look = _Look(root)
    unfinished: list[Loose] = []
    quarantined: list[Loose] = []
    for name in root.files.names(root.fd):
        if _paths.is_session_name(name):
            continue
        if name == _paths.MARKER or _paths.is_staged_marker_name(name):
            look.expect_file(name, root.fd, "")
        elif name == _paths.QUARANTINE:
            quarantined += look.loose_below(name, root.fd, "", "quarantined")
        elif name == _paths.ENDINGS:
            continue  # of the stores that have a remote tier
        elif _paths.is_unfinished_session_name(name):
            unfinished += look.loose("unfinished", name, root.fd, "")
        else:
            look.foreign(name, root.fd, "")
    return Surroundings(tuple(unfinished), tuple(quarantined), tuple(look.findings))


@dataclass(slots=True)
class _Look:
    """One walk, and what it found odd on the way. ``within`` is always an open directory, ``above`` its path."""

    root: Root
    request_ids: bool = False
    request_hash: str | None = None
    findings: list[Finding] = field(default_factory=list)

    def session(self, name: str) -> Session | None:
        """``None`` if it went away; a session that can not be entered is there with a finding and nothing else."""
        status = self.status(name, self.root.fd, "")
        if status is None:
            return None
        if not stat.S_ISDIR(status.st_mode):
            return self._closed_session(name, status, _description(status))
        try:
            fd = self.root.open(name)
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._closed_session(name, status, error.strerror or str(error), "unreadable")
        with opened(self.root.files, fd):
            return self._session_contents(name, fd)

    def _closed_session(self, name: str, status: stat_result, why: str, kind: Kind = "foreign") -> Session:
        finding = Finding(kind, name, why)
        opened_at_s = _paths.session_opened_at(name)
        return Session(name, status.st_ino, opened_at_s, Owner("unknown"), findings=(finding,))

    def _session_contents(self, name: str, fd: int) -> Session:
        names = self.names(fd, name)
        owner = self._owner(name, fd, names)
        snapshots: list[SnapshotFile] = []
        temporaries: list[Loose] = []
        trash: list[Loose] = []
        for each in names:
            if each == _paths.TEMPORARY:
                temporaries += self.loose_below(each, fd, name, "temporary")
            elif each == _paths.TRASH:
                trash += self.loose_below(each, fd, name, "trash")
            elif _paths.parse_generation_name(each) is not None:
                snapshots += self._generation(name, each, fd)
            elif each not in (_paths.OWNER_LOCK, _paths.OWNER_RECORD):
                self.foreign(each, fd, name)
        return Session(
            name=name,
            inode=self.root.files.status(fd).st_ino,
            opened_at_s=_paths.session_opened_at(name),
            owner=owner,
            snapshots=tuple(snapshots),
            temporaries=tuple(temporaries),
            trash=tuple(trash),
            findings=tuple(self.findings),
        )

    def _owner(self, name: str, fd: int, names: list[str]) -> Owner:
        """Neither record nor lock is opened unless it is a plain file."""
        sound = [
            self.expect_file(each, fd, name)
            for each in (_paths.OWNER_LOCK, _paths.OWNER_RECORD)
            if each in names
        ]
        if len(sound) < 2 or not all(sound):
            return Owner("unknown")
        record = read_record(self.root.files, ".", dir_fd=fd)
        alive = liveness(self.root.files, ".", record, dir_fd=fd)
        return Owner(alive, *_who(record))

    def _generation(self, session: str, name: str, within: int) -> list[SnapshotFile]:
        parsed = _paths.parse_generation_name(name)
        assert parsed is not None
        if self.request_hash not in (None, parsed.request_hash):
            return []
        generation = Generation(session, name, parsed.request_hash, parsed.generation)
        fd = self.enter(name, within, session)
        if fd is None:
            return []
        with opened(self.root.files, fd):
            names = self.names(fd, generation.path)
            if self.request_ids:
                request_id = _request_id(self.root, fd, generation, names)
                generation = Generation(session, name, parsed.request_hash, parsed.generation, request_id)
            return [found for each in names for found in self._snapshot(generation, each, fd)]

    def _snapshot(self, generation: Generation, name: str, within: int) -> Iterator[SnapshotFile]:
        token_count = _paths.parse_snapshot_name(name)
        if token_count is None:
            self.foreign(name, within, generation.path)
            return
        status = self.expect_file(name, within, generation.path)
        if status is not None:
            yield SnapshotFile(
                of=generation,
                token_count=token_count,
                nbytes=status.st_size,
                disk_bytes=disk_bytes(status),
                freed_bytes=freed_by_unlinking(status),
                mtime_ns=status.st_mtime_ns,
                atime_ns=status.st_atime_ns,
                inode=status.st_ino,
            )

    def loose_below(self, name: str, within: int, above: str, kind: Kind) -> list[Loose]:
        """Everything in one of our own working directories."""
        fd = self.enter(name, within, above)
        if fd is None:
            return []
        path = _below(above, name)
        with opened(self.root.files, fd):
            return [found for each in self.names(fd, path) for found in self.loose(kind, each, fd, path)]

    def loose(self, kind: Kind, name: str, within: int, above: str) -> Iterator[Loose]:
        """A file or a whole tree that is ours to forget; anything else is foreign."""
        status = self.status(name, within, above)
        if status is None:
            return
        path = _below(above, name)
        if stat.S_ISDIR(status.st_mode):
            nbytes = self._tree_bytes(name, within, path)
        elif stat.S_ISREG(status.st_mode) and kind != "unfinished":
            nbytes = freed_by_unlinking(status)
            self._note_links(status, path)
        else:
            self.findings.append(Finding("foreign", path, _description(status)))
            return
        yield Loose(kind, path, name, nbytes, status.st_mtime_ns, status.st_ino)

    def _tree_bytes(self, name: str, within: int, path: str, depth: int = TREE_DEPTH_MAX) -> int:
        """Bytes that removing a tree would free; what can not be entered is a finding, as it would not go."""
        files = self.root.files
        fd = self._tolerating(path, lambda: open_within(files, name, within, depth, mount=self.root.mount))
        if fd is None:
            return 0
        nbytes = 0
        with opened(files, fd):
            for each in self.names(fd, path):
                status = self.status(each, fd, path)
                if status is None:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    nbytes += self._tree_bytes(each, fd, join(path, each), depth - 1)
                else:
                    nbytes += freed_by_unlinking(status)
        return nbytes

    def enter(self, name: str, within: int, above: str) -> int | None:
        """Open a directory that should be ours; what is none, or can not be entered, is a finding."""
        status = self.status(name, within, above)
        if status is None:
            return None
        path = _below(above, name)
        if not stat.S_ISDIR(status.st_mode):
            self.findings.append(Finding("foreign", path, _description(status)))
            return None
        return self._tolerating(path, lambda: self.root.open(name, within))

    def expect_file(self, name: str, within: int, above: str) -> stat_result | None:
        """The status of a plain file; anything else in its place is a finding."""
        status = self.status(name, within, above)
        if status is None:
            return None
        path = _below(above, name)
        if not stat.S_ISREG(status.st_mode):
            self.findings.append(Finding("foreign", path, _description(status)))
            return None
        self._note_links(status, path)
        return status

    def foreign(self, name: str, within: int, above: str) -> None:
        """Note something that has no business here."""
        status = self.status(name, within, above)
        if status is not None:
            path = _below(above, name)
            why = f"{_description(status)} that snapstore did not make"
            self.findings.append(Finding("foreign", path, why, disk_bytes(status)))

    def _note_links(self, status: stat_result, path: str) -> None:
        if status.st_nlink > 1:
            why = f"has {plural(status.st_nlink, 'hard link')}: removing this one frees nothing"
            self.findings.append(Finding("linked", path, why))

    def names(self, fd: int, path: str) -> list[str]:
        return self._tolerating(path, lambda: self.root.files.names(fd)) or []

    def status(self, name: str, within: int, above: str) -> stat_result | None:
        path = _below(above, name)
        return self._tolerating(path, lambda: self.root.files.status_at(name, dir_fd=within))

    def _tolerating(self, path: str, look: Callable[[], _Seen]) -> _Seen | None:
        try:
            return look()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.findings.append(Finding("unreadable", path, error.strerror or str(error)))
            return None


def _below(above: str, name: str) -> str:
    return join(above, name) if above else name


def _description(status: stat_result) -> str:
    """What kind of thing a name stands for."""
    for is_kind, words in _KINDS_OF_FILE:
        if is_kind(status.st_mode):
            return words
    return "something unknown"


_KINDS_OF_FILE = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def _who(record: OwnerRecord | None) -> tuple[int | None, str | None]:
    """What the record says, if it is of the types that it should be: the file may say anything."""
    if record is None:
        return None, None
    return record.pid, record.host if isinstance(record.host, str) else None


def _request_id(root: Root, fd: int, generation: Generation, names: list[str]) -> str | None:
    """The request's text, from the first header that tells it and agrees with the directory's name."""
    for name in names:
        if _paths.parse_snapshot_name(name) is None:
            continue
        try:
            if not stat.S_ISREG(root.files.status_at(name, dir_fd=fd).st_mode):
                continue
            with opened(root.files, root.files.open_read(name, dir_fd=fd)) as file:
                facts = read_header(root.files, file).facts
        except (OSError, SnapshotCorruptError):
            continue  # `verify` says what is wrong with it; a sound file beside it still tells
        if facts is not None and _paths.request_hash(facts.request_id) == generation.request_hash:
            return facts.request_id
    return None
