"""A committed file, opened to be read as it is: its descriptor outlives the snapshot's removal."""

from __future__ import annotations

import io
import os
from typing import Any

from snapstore._errors import SnapshotCorruptError
from snapstore._files import FileSystem
from snapstore._types import SnapshotInfo


class CommittedFile(io.RawIOBase):
    """The bytes of one committed file, through the store's file system. Opening and each read block for the disk.

    Args:
        files: the disk.
        info: where the file is.
        fd: the file, if it is open already; it is closed with this.

    Attributes:
        info: what was committed.
        nbytes: length of the file, header included.
        tag: a text that differs for every file, also for two saves of one key.
    """

    def __init__(self, files: FileSystem, info: SnapshotInfo, fd: int | None = None) -> None:
        self._files = files
        self._offset = 0
        self._fd = -1
        self._fd = files.open_read(str(info.path)) if fd is None else fd
        try:
            status = files.status(self._fd)
        except BaseException:
            self.close()
            raise
        self.info = info
        self.nbytes = status.st_size
        self.tag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Where the next read begins. Does not block."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self.nbytes}[whence]
        self._offset = max(0, start + offset)
        return self._offset

    def tell(self) -> int:
        """Where the next read begins."""
        return self._offset

    def readinto(self, buffer: Any, /) -> int:
        """Blocks for the disk."""
        count = self._files.read_into(self._fd, memoryview(buffer).cast("B"), self._offset)
        self._offset += count
        return count

    def close(self) -> None:
        """Also on collection."""
        if not self.closed:
            super().close()
            if self._fd >= 0:
                self._files.close(self._fd)


def gone(info: SnapshotInfo) -> SnapshotCorruptError:
    """The index has it and the disk has not."""
    return SnapshotCorruptError(
        f"the file of {info.key} is gone from {info.path}, and not by this store; save it again",
        key=info.key,
        path=info.path,
    )
