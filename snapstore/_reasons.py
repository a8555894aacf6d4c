"""Stable words for why a save failed or was rejected: the same in the log's ``reason`` and in the metrics' label.

Words are only ever added. A dashboard or an alert may rely on each of them.
"""

from __future__ import annotations

import errno

from snapstore._device import DeviceLostError
from snapstore._errors import (
    DiskQuotaError,
    SaveCancelledError,
    SnapstoreError,
    StoreClosedError,
    StoreFullError,
)

REJECTED = ("full", "quota", "closed", "cancelled", "interrupted", "no_memory", "bug")
"""Why a save was not accepted: no room in time, a limit of disk, shut down, cleaned up or interrupted as it waited."""

FAILED = (
    *("no_space", "read_only", "denied", "io_error", "no_memory"),
    *("device", "timeout", "closed", "interrupted", "bug"),
)
"""Why an accepted save came to nothing, but for being cancelled. ``timeout``: its device did not copy it in time."""

_BY_TYPE: tuple[tuple[type[BaseException], str], ...] = (
    (StoreFullError, "full"),
    (DiskQuotaError, "quota"),
    (StoreClosedError, "closed"),
    (SaveCancelledError, "cancelled"),
    (TimeoutError, "timeout"),
    (MemoryError, "no_memory"),
)
_BY_NUMBER = {
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EFBIG: "no_space",
    errno.EROFS: "read_only",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.ENOMEM: "no_memory",
}


def reason_of(error: BaseException) -> str:
    """The word for an error."""
    for kind, word in _BY_TYPE:
        if isinstance(error, kind):
            return word
    if isinstance(error, OSError):
        return _BY_NUMBER.get(error.errno or 0, "io_error")
    if not isinstance(error, Exception):
        return "interrupted"
    if isinstance(error, SnapstoreError) or _is_of_a_device(error):
        return "device"
    return "bug"


def _is_of_a_device(error: Exception) -> bool:
    return isinstance(error, DeviceLostError) or type(error).__module__.partition(".")[0] == "torch"
