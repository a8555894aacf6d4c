"""Every error that snapstore raises. Each carries its data as attributes and says what to do.

Bad arguments are plain ``TypeError`` and ``ValueError``, raised before anything is reserved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from snapstore._types import SnapshotKey


class SnapstoreError(Exception):
    """Base of every error of this package.

    Attributes:
        key: the snapshot that the error is about, or ``None``.
        path: the file or directory that the error is about, or ``None``.
    """

    def __init__(
        self, message: str, *, key: SnapshotKey | None = None, path: Path | str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.key = key
        self.path = path

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message), self.__dict__


def _rebuild(cls: type[SnapstoreError], message: str) -> SnapstoreError:
    return cls(message)


class StoreClosedError(SnapstoreError):
    """The store is shut down, or is being shut down, or belongs to the process that forked this one."""


class StoreFullError(SnapstoreError, TimeoutError):
    """No room within ``save_timeout_s`` (or at once, with ``on_full="reject"``). Nothing was reserved.

    Attributes:
        nbytes: bytes that the save asked for.
        pending_bytes, pending_jobs: what was pending when it gave up.
        waited_s: seconds spent waiting for room.
    """

    nbytes: int = 0
    pending_bytes: int = 0
    pending_jobs: int = 0
    waited_s: float = 0.0


class DiskQuotaError(SnapstoreError, OSError):
    """The save would pass ``max_session_bytes`` or leave less than ``min_free_bytes``. Nothing was reserved.

    Attributes:
        nbytes: bytes that the save asked for.
        limit_bytes: the limit that it would have passed.
        used_bytes: what is used (session limit) or free (free-space limit) now.
    """

    nbytes: int = 0
    limit_bytes: int = 0
    used_bytes: int = 0


class SnapshotNotFoundError(SnapstoreError, KeyError):
    """No snapshot of this key: never saved, or forgotten by a cleanup."""


class RemoteUnavailableError(SnapshotNotFoundError):
    """Not here, and the remote store can not be asked now: it is down, slow, or refuses; ``health`` says which."""


class SaveCancelledError(SnapstoreError):
    """The save was accepted and then cancelled: by a cleanup, by a later save of its key, or by shutdown."""


class SaveFailedError(SnapstoreError):
    """The save was accepted and could not be written; ``__cause__`` says why."""


class SnapshotCorruptError(SnapstoreError, ValueError):
    """The file is not what was written: torn, altered, swapped, or of a newer format."""


class UnsupportedTensorError(SnapstoreError, TypeError):
    """This tensor can not be kept in a safetensors file, or not be made by this framework.

    Attributes:
        tensor_name: its name in the snapshot.
    """

    tensor_name: str = ""


class ShutdownTimeoutError(SnapstoreError, TimeoutError):
    """Shutdown reached its deadline with work left over; the report says what."""


class RootError(SnapstoreError, OSError):
    """The root can not be used: a link, not a directory, not ours, or not writable."""
