"""The writer thread: claims a job, makes its file under a temporary name, renames it, commits it.

It looks at its job between chunks and before the rename, and the commit looks after it: whatever was cancelled
meanwhile is undone here (late-rename rescue). No error of one job ends the thread.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

from snapstore._files import FileSystem, disk_bytes, opened, write_all
from snapstore._format import Facts, checksums_of, encode_header
from snapstore._options import StoreOptions
from snapstore._records import Job, Life
from snapstore._session import Session
from snapstore._state import State
from snapstore._types import SnapshotInfo

CHUNK_BYTES = 4 * 1024 * 1024
"""Between two chunks the writer looks whether its job was cancelled: 1 to 2 ms of writing into the page cache."""

_log = logging.getLogger("snapstore.writer")


class Writer:
    """What the writer thread runs. It knows the state, the session and the disk; never a store."""

    def __init__(self, state: State, session: Session, files: FileSystem, options: StoreOptions) -> None:
        self._state = state
        self._session = session
        self._files = files
        self._options = options
        self._failures = 0

    def run(self) -> None:
        """Until the state says that it is over."""
        while self._settle_one():
            pass

    def _settle_one(self) -> bool:
        """A function of its own, so that the thread keeps nothing of the last job alive while it waits."""
        job = self._state.claim()
        if job is None:
            return False
        try:
            written = self._write(job)
        except Exception as error:  # whatever a job does, the next one goes on
            traceback.clear_frames(error.__traceback__)
            self._state.fail(job, error)
            self._note_failure(job, error)
            return True
        if written is None:
            self._state.finish_cancelled(job)
        elif not self._state.commit(job, *written):
            self._undo(written[0])
            self._state.finish_cancelled(job)
        else:
            self._note_success()
        return True

    def _write(self, job: Job) -> tuple[SnapshotInfo, int] | None:
        """Make the file; ``None`` if the job was cancelled before its rename, with nothing left behind."""
        temporary = self._session.temporary_path()
        final = self._session.snapshot_path(job.key.request_id, job.ticket.generation, job.key.token_count)
        try:
            size = self._write_temporary(job, temporary)
            if size is None or not self._state.is_current(job):
                self._files.unlink(temporary)
                return None
            self._make_generation(job.life)
            self._files.rename(temporary, final)
        except BaseException:
            self._discard(temporary)
            raise
        if self._options.durability == "full":
            self._files.sync_directory(
                self._session.generation_path(job.life.request_id, job.life.generation)
            )
        return SnapshotInfo(job.key, job.ticket.generation, Path(final), job.nbytes), size

    def _write_temporary(self, job: Job, path: str) -> int | None:
        """Blocks of disk that it takes; ``None`` if the job was cancelled on the way."""
        image = job.image
        assert image is not None and job.content is not None
        facts = Facts(
            request_id=job.key.request_id,
            token_count=job.key.token_count,
            generation=job.ticket.generation,
            framework=job.content.framework,
            metadata_json=job.content.metadata_json,
        )
        checksums = checksums_of(image.layout, image.segments) if self._options.checksum else None
        header = memoryview(encode_header(image.layout, facts, checksums))
        in_file_order = [image.segments[index] for index in image.layout.file_order]
        with opened(self._files, self._files.create(path)) as fd:
            whole = write_all(
                self._files,
                fd,
                [header, *in_file_order],
                chunk_bytes=CHUNK_BYTES,
                go_on=lambda: self._state.is_current(job),
            )
            if whole and self._options.durability != "none":
                self._files.sync_data(fd)
            return disk_bytes(self._files.status(fd)) if whole else None

    def _make_generation(self, life: Life) -> None:
        path = self._session.generation_path(life.request_id, life.generation)
        try:
            self._files.make_directory(path)
        except FileExistsError:
            return
        if self._options.durability == "full":
            self._files.sync_directory(self._session.path)

    def _undo(self, info: SnapshotInfo) -> None:
        """The commit said no: the life ended during the rename. The sweeper takes the directory; the file goes first."""
        self._discard(str(info.path))

    def _discard(self, path: str) -> None:
        try:
            self._files.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("could not remove %s: %s; the end of the session will", path, error)

    def _note_failure(self, job: Job, error: Exception) -> None:
        self._failures += 1
        level = logging.WARNING if self._failures == 1 else logging.DEBUG
        _log.log(
            level,
            "the save of %s failed: %s: %s (later ones are counted, and reported when writes work again)",
            job.key,
            type(error).__name__,
            error,
        )
        if isinstance(error, FileNotFoundError):
            try:
                self._session.mend()
            except OSError as again:
                _log.debug("the session directory can not be mended: %s", again)

    def _note_success(self) -> None:
        if self._failures:
            _log.warning("writes work again after %d failed saves", self._failures)
            self._failures = 0
