"""Snapshots of LLM request state that can not be sliced: taken at once, written in the background, forgotten provably.

    import snapstore

    with snapstore.SnapshotStore("/var/tmp/snapshots") as store:
        ticket = store.save("request-1", 1024, {"conv": conv, "ssm": ssm})
        snapshot = store.load("request-1", 1024)

See ``SnapshotStore``. Importing this package imports neither torch nor mlx, starts no thread, installs no handler.
"""

import logging

from snapstore._errors import (
    DiskQuotaError,
    RemoteUnavailableError,
    RootError,
    SaveCancelledError,
    SaveFailedError,
    ShutdownTimeoutError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapstoreError,
    StoreClosedError,
    StoreFullError,
    UnsupportedTensorError,
)
from snapstore._options import StoreOptions
from snapstore._store import SnapshotStore, shutdown_all
from snapstore._ticket import SaveTicket
from snapstore._types import (
    CleanupReport,
    RemoteHealth,
    RemoteStats,
    SaveState,
    ShutdownReport,
    Snapshot,
    SnapshotInfo,
    SnapshotKey,
    StoreHealth,
    StoreStats,
)

__version__ = "0.1.0"

__all__ = [
    "CleanupReport",
    "DiskQuotaError",
    "RemoteHealth",
    "RemoteStats",
    "RemoteUnavailableError",
    "RootError",
    "SaveCancelledError",
    "SaveFailedError",
    "SaveState",
    "SaveTicket",
    "ShutdownReport",
    "ShutdownTimeoutError",
    "Snapshot",
    "SnapshotCorruptError",
    "SnapshotInfo",
    "SnapshotKey",
    "SnapshotNotFoundError",
    "SnapshotStore",
    "SnapstoreError",
    "StoreClosedError",
    "StoreFullError",
    "StoreHealth",
    "StoreOptions",
    "StoreStats",
    "UnsupportedTensorError",
    "shutdown_all",
]

logging.getLogger("snapstore").addHandler(logging.NullHandler())
