"""The words of snapstore: keys, states, and the frozen records that its calls return."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Framework = Literal["numpy", "torch", "mlx"]
Source = Literal["memory", "disk"]
HealthStatus = Literal["ok", "degraded", "stuck", "dead"]
DeviceStatus = Literal["ok", "stuck", "lost"]
JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


class SaveState(enum.Enum):
    """Where an accepted save stands: ``STAGING -> QUEUED -> WRITING -> COMMITTED | CANCELLED | FAILED``."""

    STAGING = "staging"
    QUEUED = "queued"
    WRITING = "writing"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def settled(self) -> bool:
        """True in the three states that nothing leaves."""
        return self in _SETTLED


_SETTLED = frozenset({SaveState.COMMITTED, SaveState.CANCELLED, SaveState.FAILED})


@dataclass(frozen=True, slots=True, order=True)
class SnapshotKey:
    """One boundary of one request."""

    request_id: str
    token_count: int

    def __str__(self) -> str:
        shown = self.request_id if len(self.request_id) <= 64 else self.request_id[:61] + "..."
        return f"{shown!r} at {self.token_count} tokens"


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A committed snapshot. ``nbytes`` counts tensor bytes; the file is larger by its header."""

    key: SnapshotKey
    generation: int
    path: Path
    nbytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A loaded snapshot. The tensors are the caller's own memory, in the order in which they were saved."""

    key: SnapshotKey
    tensors: dict[str, Any]
    metadata: Any
    source: Source


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """What a cleanup did.

    Attributes:
        clean: no file of the generations that it ended exists, or will appear.
        cancelled: accepted saves that it cancelled (queued, being staged, or being written).
        removed: committed snapshots that it forgot.
        removed_bytes: tensor bytes of those.
        left_to_writer: generations that the writer thread still had in hand at return; it undoes its own file.
        waited_s: seconds that the call waited.
    """

    clean: bool
    cancelled: int
    removed: int
    removed_bytes: int
    left_to_writer: int
    waited_s: float


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """What a shutdown did, once; every caller gets the same report.

    Attributes:
        committed, cancelled, failed: saves settled so since shutdown began.
        abandoned: keys accepted and not settled in time. Not written, or written after this report.
        trash_left: forgotten directories whose bytes are not freed yet.
        writer_stopped: the writer thread is gone. (If only the sweeper hangs, ``errors`` says so.)
        session_removed: the session directory is gone.
        errors: what went wrong on the way, in words.
        waited_s: seconds that it took.
        leaked_bytes: memory that is kept because a device may still touch it.
    """

    committed: int
    cancelled: int
    failed: int
    abandoned: tuple[SnapshotKey, ...]
    trash_left: int
    writer_stopped: bool
    session_removed: bool
    errors: tuple[str, ...]
    waited_s: float
    leaked_bytes: int = 0

    @property
    def clean(self) -> bool:
        """Everything accepted was settled, the threads are gone, and nothing went wrong."""
        return self.writer_stopped and not self.abandoned and not self.errors


@dataclass(frozen=True, slots=True)
class StoreStats:
    """One moment of a store. ``accepted == committed + cancelled + failed + pending``, in jobs and in bytes.

    ``in_flight`` is what the writer has in hand, ``cancelled_in_hand`` how much of it is being undone.
    Bytes are tensor bytes, but ``session_bytes`` and ``trash_bytes``, which are blocks on disk. The last four are of
    the devices, at a moment of their own: saves that wait for a device's copy, memory kept because a device may still
    touch it, copies that went through memory that was not pinned, and host memory that is.
    """

    accepted: int
    accepted_bytes: int
    committed: int
    committed_bytes: int
    cancelled: int
    cancelled_bytes: int
    failed: int
    failed_bytes: int
    pending: int
    pending_bytes: int
    rejected: int
    rejected_bytes: int
    in_flight: int
    cancelled_in_hand: int
    live_requests: int
    live_snapshots: int
    session_bytes: int
    trash_bytes: int
    cleanup_timeouts: int
    writer_restarts: int
    oldest_pending_s: float
    on_devices: int = 0
    leaked_bytes: int = 0
    pageable_copies: int = 0
    pinned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DeviceHealth:
    """How a device's copies are. ``stuck``: none came for ``device_timeout_s``; ``lost``: none ever will.

    A stuck device is ``ok`` again when one comes after all. Saves of a device that is not ``ok`` fail at once.
    ``leaked_bytes`` of it are kept, since it may still touch them.
    """

    name: str
    status: DeviceStatus
    error: str | None
    leaked_bytes: int


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """How the store is, without asking the disk or the device.

    ``ok``; ``degraded``: the last write failed, or a device is lost, saves are still taken; ``stuck``: one write has
    been in the writer's hand for more than ``stuck_after_s``, or a device reached nothing for ``device_timeout_s``;
    ``dead``: shut down, or the writer thread is gone for good.
    """

    status: HealthStatus
    reasons: tuple[str, ...] = ()
    writing_s: float = 0.0
    oldest_pending_s: float = 0.0
    last_error: str | None = None
    free_bytes: int | None = None
    writer_restarts: int = 0
    devices: tuple[DeviceHealth, ...] = ()
