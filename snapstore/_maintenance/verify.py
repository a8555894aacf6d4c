"""Check every snapshot of a root, or one file: header, sizes, checksums, and that it is where it says it belongs.

Files are read through one kept buffer, so memory does not grow with them. What is corrupt can be moved aside, never
deleted, and only where the owner is dead unless told otherwise.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from os import stat_result

from snapstore import _paths
from snapstore._errors import SnapshotCorruptError
from snapstore._files import FileSystem, opened
from snapstore._format import Header, NewerFormatError
from snapstore._maintenance.aside import move_aside
from snapstore._maintenance.headers import check_written
from snapstore._maintenance.root import Root
from snapstore._maintenance.survey import (
    WRONG,
    Finding,
    Loose,
    Session,
    SnapshotFile,
    sessions,
    surroundings,
)
from snapstore._memory import allocate
from snapstore._owner import OwnerLock
from snapstore._reader import check_data, read_header

_BUFFER_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification saw.

    Attributes:
        checked, checked_bytes: snapshots that were read to the end, sound or not, and their length.
        without_checksums: of those, how many have none: only their header and sizes could be compared.
        findings: everything worth a line, wrong or not; see ``WRONG``.
        quarantined: corrupt snapshots that were moved aside now.
        kept: corrupt snapshots that were not, because their owner is alive or not to be known.
    """

    checked: int
    checked_bytes: int
    without_checksums: int
    findings: tuple[Finding, ...]
    quarantined: int = 0
    kept: int = 0

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What should not be there, or not be so."""
        return tuple(each for each in self.findings if each.kind in WRONG)


def verify_file(files: FileSystem, path: str, on_read: Callable[[int], None]) -> VerifyReport:
    """One snapshot file, wherever it lies. ``OSError`` if it can not be opened."""
    with opened(files, files.open_read(path)) as fd:
        nbytes = files.status(fd).st_size
        checker = _Checker(files, on_read)
        finding = checker.check(fd, path)
    return VerifyReport(1, nbytes, checker.without_checksums, (finding,) if finding else ())


def verify_root(
    root: Root, *, on_read: Callable[[int], None], quarantine: bool = False, include_live: bool = False
) -> VerifyReport:
    """Every snapshot of a root; with ``quarantine`` the corrupt ones of dead owners are moved aside."""
    work = _RootWork(root, _Checker(root.files, on_read), quarantine, include_live)
    for session in sessions(root):
        work.session(session)
    around = surroundings(root)
    work.findings += around.findings
    work.findings += _listed((*around.unfinished, *around.quarantined))
    return VerifyReport(
        checked=work.checked,
        checked_bytes=work.checked_bytes,
        without_checksums=work.checker.without_checksums,
        findings=tuple(work.findings),
        quarantined=work.quarantined,
        kept=work.kept,
    )


class _Checker:
    """Reads open files through one buffer."""

    def __init__(self, files: FileSystem, on_read: Callable[[int], None]) -> None:
        self._files = files
        self._on_read = on_read
        self._buffer = allocate(_BUFFER_BYTES)
        self.without_checksums = 0

    def check(self, fd: int, path: str, place: SnapshotFile | None = None) -> Finding | None:
        """What is wrong with an open file, or with the place where it stands."""
        nbytes = self._files.status(fd).st_size
        try:
            check_written(self._files, fd)
            header = read_header(self._files, fd)
            if header.facts is None:
                return Finding("foreign", path, "a safetensors file that snapstore did not write", nbytes)
            if place is not None:
                _check_place(header, place)
            check_data(self._files, fd, header, self._buffer, self._on_read)
        except NewerFormatError as error:
            return Finding("newer", path, str(error), nbytes)
        except SnapshotCorruptError as error:
            return Finding("corrupt", path, str(error), nbytes)
        except OSError as error:
            return Finding("unreadable", path, error.strerror or str(error), nbytes)
        self.without_checksums += header.checksums is None
        return None


@dataclass(slots=True)
class _RootWork:
    root: Root
    checker: _Checker
    quarantine: bool
    include_live: bool
    findings: list[Finding] = field(default_factory=list)
    checked: int = 0
    checked_bytes: int = 0
    quarantined: int = 0
    kept: int = 0

    def session(self, session: Session) -> None:
        self.findings += session.findings
        self.findings += _listed(session.loose)
        corrupt = list(self._corrupt_in(session))
        if self.quarantine and corrupt:
            self._set_aside(session, corrupt)

    def _corrupt_in(self, session: Session) -> Iterator[SnapshotFile]:
        """Check each snapshot; the corrupt ones again, for the quarantine."""
        for snapshot in session.snapshots:
            finding = self._check(snapshot)
            if finding is not None:
                self.findings.append(finding)
                if finding.kind == "corrupt":
                    yield snapshot

    def _check(self, snapshot: SnapshotFile) -> Finding | None:
        files = self.root.files
        try:
            with (
                self.root.directory(snapshot.of.session) as session,
                self.root.directory(snapshot.of.name, session) as generation,
                opened(files, files.open_read(snapshot.name, dir_fd=generation)) as fd,
            ):
                finding = self.checker.check(fd, snapshot.path, snapshot)
        except FileNotFoundError:
            return None  # its owner removed or replaced it meanwhile
        except OSError as error:
            return Finding("unreadable", snapshot.path, error.strerror or str(error))
        self.checked += 1
        self.checked_bytes += snapshot.nbytes
        return finding

    def _set_aside(self, session: Session, corrupt: list[SnapshotFile]) -> None:
        """Rename the corrupt files of one session into the quarantine, under the session's lock where it is dead."""
        files = self.root.files
        with self.root.directory(session.name) as fd:
            lock = None
            try:
                if session.owner.liveness == "dead":
                    lock = OwnerLock.take(files, ".", create=False, dir_fd=fd)
                if lock is None and not self.include_live:
                    self.kept += len(corrupt)
                    return
                for snapshot in corrupt:
                    self._rename_aside(snapshot, fd)
            finally:
                if lock is not None:
                    lock.release()

    def _rename_aside(self, snapshot: SnapshotFile, session: int) -> None:
        files, name = self.root.files, _paths.QUARANTINE
        try:
            _make_if_missing(files, name, self.root.fd)
            with self.root.directory(name) as aside, self.root.directory(snapshot.of.name, session) as fd:
                target = _paths.quarantine_name(snapshot.of.session, snapshot.of.name, snapshot.name)
                moved = move_aside(
                    files, snapshot.name, fd, target, aside, lambda found: _is_same(found, snapshot)
                )
        except FileNotFoundError:
            return
        except OSError as error:
            why = f"could not be moved aside: {error.strerror or error}"
            self.findings.append(Finding("unreadable", snapshot.path, why))
        else:
            self.quarantined += moved


def _check_place(header: Header, snapshot: SnapshotFile) -> None:
    """``SnapshotCorruptError`` if the file says that it belongs under another name."""
    facts = header.facts
    assert facts is not None
    said = _paths.generation_name(facts.request_id, facts.generation), facts.token_count
    if said != (snapshot.of.name, snapshot.token_count):
        raise SnapshotCorruptError(
            f"it says that it is of {facts.request_id!r} at {facts.token_count} tokens, generation "
            f"{facts.generation}, which belongs elsewhere"
        )


def _listed(items: Iterable[Loose]) -> Iterator[Finding]:
    for each in items:
        yield Finding(each.kind, each.path, _WHAT[each.kind], each.freed_bytes)


_WHAT = {
    "temporary": "being written, or left by a writer that died",
    "trash": "forgotten, its bytes not yet freed",
    "unfinished": "a session half made or half removed",
    "quarantined": "corrupt, moved aside earlier",
}


def _is_same(found: stat_result, snapshot: SnapshotFile) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_ino == snapshot.inode


def _make_if_missing(files: FileSystem, name: str, dir_fd: int) -> None:
    try:
        files.make_directory(name, dir_fd=dir_fd)
    except FileExistsError:
        return
