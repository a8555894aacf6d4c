"""The writer thread: claims a job, makes its file under a temporary name, renames it, commits it.

It looks at its job between chunks and before the rename, and the commit looks after it: whatever was cancelled
meanwhile is undone here (late-rename rescue). No error of one job ends the thread.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from snapstore._events import Repeats
from snapstore._files import GONE, FileSystem, disk_bytes, opened, rename_surely, same_file
from snapstore._filing import write_snapshot
from snapstore._format import Facts
from snapstore._options import StoreOptions
from snapstore._records import Job, Life
from snapstore._session import Session
from snapstore._state import State
from snapstore._types import SnapshotInfo

_NO_LINKS = frozenset({errno.ENOENT, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""There is nothing to link to, or this file system has no second names for files."""

_log = logging.getLogger("snapstore.writer")


class Writer:
    """What the writer thread runs. It knows the state, the session and the disk; never a store."""

    def __init__(self, state: State, session: Session, files: FileSystem, options: StoreOptions) -> None:
        self._state = state
        self._session = session
        self._files = files
        self._options = options
        self._full = options.durability == "full"
        self._session_unsynced = False
        self._failures = Repeats(_log, "save_failed", state.monotonic_s)
        self._litter: list[str] = []

    def run(self) -> None:
        """Until the state says that it is over."""
        while self._settle_one():
            pass
        self._tidy()

    def _settle_one(self) -> bool:
        """A function of its own, so that the thread keeps nothing of the last job alive while it waits."""
        job = self._state.claim()
        if job is None:
            return False
        try:
            written = self._write(job)
        except Exception as error:  # noqa: BLE001 - whatever a job does, the next one goes on
            traceback.clear_frames(error.__traceback__)
            self._note_failure(job, error)
            self._state.fail(job, error)
            self._mend(error)
            return True
        if written is None:
            self._state.finish_cancelled(job)
        elif not self._state.commit(job, *written):
            self._undo(written[0])
            self._state.finish_cancelled(job)
        else:
            self._note_success()
        return True

    def _write(self, job: Job) -> tuple[SnapshotInfo, int, int | None] | None:
        """Make the file: what it is, the bytes of disk that it takes, and those that are free, if that is to be known.

        ``None`` if the job was cancelled before its rename, with nothing left behind.
        """
        temporary = self._session.temporary_path()
        final = self._session.snapshot_path(job.key.request_id, job.ticket.generation, job.key.token_count)
        fd = self._files.create(temporary)
        try:
            made = self._write_temporary(job, fd)
            if made is None or not self._state.is_current(job):
                self._files.unlink(temporary)
                return None
            self._session.look()
            self._make_generation(job.life)
            free_bytes = self._free_bytes()
            info = SnapshotInfo(job.key, job.ticket.generation, Path(final), job.nbytes)
            # The last that may fail: a failed save replaces nothing.
            self._put_in_place(temporary, final, made)
        except BaseException:
            self._discard(temporary)
            raise
        return info, disk_bytes(made), free_bytes

    def _write_temporary(self, job: Job, fd: int) -> os.stat_result | None:
        """Fill and close the file. What the disk says of it; ``None`` if the job was cancelled on the way."""
        image = job.image
        assert image is not None
        with opened(self._files, fd):
            whole = write_snapshot(
                self._files,
                fd,
                image.layout,
                image.segments,
                _facts_of(job),
                checksum=self._options.checksum,
                go_on=lambda: self._state.is_current(job),
            )
            if whole and self._options.durability != "none":
                self._files.sync_data(fd)
            return self._files.status(fd) if whole else None

    def _make_generation(self, life: Life) -> None:
        try:
            self._files.make_directory(self._session.generation_path(life.request_id, life.generation))
            self._session_unsynced = True
        except FileExistsError:
            pass
        if self._full and self._session_unsynced:
            self._files.sync_directory(self._session.path)
            self._session_unsynced = False

    def _put_in_place(self, temporary: str, final: str, made: os.stat_result) -> None:
        """With ``full`` a save can still fail after its rename; what it replaced is kept until then, and put back."""
        is_it = functools.partial(same_file, made)
        if not self._full:
            rename_surely(self._files, temporary, final, is_it)
            return
        earlier = self._keep_earlier(final)
        try:
            rename_surely(self._files, temporary, final, is_it)
            try:
                self._files.sync_directory(os.path.dirname(final))
            except BaseException:
                self._put_back(earlier, final, is_it)
                raise
        finally:
            if earlier is not None:
                self._discard(earlier)  # also where it was put back: then it is gone

    def _keep_earlier(self, final: str) -> str | None:
        """A second name for the file that is about to be replaced; ``None`` if there is none, or no links here."""
        earlier = self._session.temporary_path()
        try:
            self._files.link(final, earlier)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return None
            self._discard(earlier)  # it may have been made all the same
            raise
        return earlier

    def _put_back(self, earlier: str | None, final: str, is_it: Callable[[os.stat_result], bool]) -> None:
        try:
            if earlier is not None:
                self._files.rename(earlier, final)
            elif is_it(self._files.status_at(final)):
                self._files.unlink(final)
        except OSError as error:
            _log.debug("%s could not be put back as it was: %s", final, error)

    def _undo(self, info: SnapshotInfo) -> None:
        """The commit said no: the life ended during the rename. The sweeper takes the directory; the file goes now."""
        self._discard(str(info.path))

    def _discard(self, path: str) -> None:
        """Remove a file that nobody will look for; what will not go is tried again when writes work."""
        try:
            self._files.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.debug("could not remove %s: %s; it is tried again", path, error)
            self._litter.append(path)

    def _tidy(self) -> None:
        litter, self._litter = self._litter, []
        for path in litter:
            self._discard(path)

    def _free_bytes(self) -> int | None:
        try:
            return self._files.free_bytes(self._session.root)
        except OSError as error:
            _log.debug("the free space is not to be known: %s", error)
            return None

    def _note_failure(self, job: Job, error: Exception) -> None:
        """One warning at the change, not one a job."""
        key = job.key
        facts = {"request_id": key.request_id, "token_count": key.token_count, "nbytes": job.nbytes}
        self._failures.failed(error, f"the save of {key} failed", generation=job.ticket.generation, **facts)

    def _mend(self, error: Exception) -> None:
        """Somebody may have removed the directories that it writes into."""
        if not isinstance(error, OSError) or error.errno not in GONE:
            return
        try:
            self._session.mend()
        except OSError as again:
            _log.debug("the session directory can not be mended: %s", again)

    def _note_success(self) -> None:
        self._failures.worked()
        if self._litter:
            self._tidy()


def _facts_of(job: Job) -> Facts:
    assert job.content is not None
    return Facts(
        request_id=job.key.request_id,
        token_count=job.key.token_count,
        generation=job.ticket.generation,
        framework=job.content.framework,
        metadata_json=job.content.metadata_json,
    )
