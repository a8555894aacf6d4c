"""``StoreOptions``: every choice of a store, validated once, when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from snapstore._threads import LONGEST_S

Durability = Literal["none", "data", "full"]
OnFull = Literal["wait", "reject"]
Leftovers = Literal["discard", "adopt", "keep"]
RemotePolicy = Literal["on_commit", "on_publish", "on_detach"]

MiB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """Choices of a store; times in seconds, sizes in bytes.

    Attributes:
        durability: ``"none"``: atomic rename, no fsync (survives the process, not the power);
            ``"data"``: fdatasync before the rename; ``"full"``: also the directories.
        on_full: with no room, ``"wait"`` up to ``save_timeout_s`` or ``"reject"`` at once.
        save_timeout_s: longest wait of ``save`` for room.
        cleanup_request_timeout_s, cleanup_all_timeout_s: default waits of the cleanups.
        shutdown_timeout_s: default deadline of ``shutdown``.
        device_timeout_s: a device copy without progress for so long has failed.
        stuck_after_s: ``health`` says ``stuck`` when one write takes longer.
        checksum: write xxh3_64 checksums into each file.
        verify_on_load: compare them on load (a file without checksums is still checked for shape and size).
        leftovers: what to do with sessions of dead owners when the store opens.
        max_pending_jobs, max_pending_bytes: room for saves not yet on disk. One job larger than the byte
            limit is admitted when nothing else is pending.
        max_session_bytes: most bytes on disk for this session, or ``None``.
        min_free_bytes: free space that saves must leave on the disk, or ``None``.
        max_pinned_bytes: host memory that is locked for device copies, at the first tensor of a device; ``None``:
            2 GiB, or a twentieth of the memory if that is less. 0: none, and copies are slower.
        remote: URL of an object store that other nodes share (``"s3://bucket/prefix"``, ``gs``, ``az``, ``file``,
            ``memory``), or ``None``; needs the extra ``remote``.
        remote_policy: what is published there: every commit, what ``publish`` names, or what is detached.
        remote_options: ``transfers`` (threads), ``max_in_flight_bytes``, ``timeout_s``, ``node``; the rest goes to
            obstore's ``from_url`` (``endpoint``, ``region``, credentials, ``client_options``, ``retry_config``, ...).
    """

    durability: Durability = "none"
    on_full: OnFull = "wait"
    save_timeout_s: float = 2.0
    cleanup_request_timeout_s: float = 2.0
    cleanup_all_timeout_s: float = 5.0
    shutdown_timeout_s: float = 10.0
    device_timeout_s: float = 30.0
    stuck_after_s: float = 10.0
    checksum: bool = True
    verify_on_load: bool = True
    leftovers: Leftovers = "discard"
    max_pending_jobs: int = 128
    max_pending_bytes: int = 512 * MiB
    max_session_bytes: int | None = None
    min_free_bytes: int | None = None
    max_pinned_bytes: int | None = None
    remote: str | None = None
    remote_policy: RemotePolicy = "on_commit"
    remote_options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name.endswith("_s"):
                seconds(value, option.name)
            elif option.name.startswith("max_pending"):
                _count(value, option.name, at_least=1)
            elif option.name in ("max_session_bytes", "min_free_bytes", "max_pinned_bytes"):
                if value is not None:
                    _count(value, option.name, at_least=0)
            elif option.name in ("remote", "remote_options"):
                self._check_remote()
            elif hints[option.name] is bool:
                if not isinstance(value, bool):
                    raise TypeError(f"{option.name} must be a bool, not {type(value).__name__}")
            elif value not in get_args(hints[option.name]):
                raise ValueError(
                    f"{option.name} must be one of {get_args(hints[option.name])}, not {value!r}"
                )

    def _check_remote(self) -> None:
        if self.remote is not None and not isinstance(self.remote, str):
            raise TypeError(f"remote must be a URL, not {type(self.remote).__name__}")
        if self.remote is not None and "://" not in self.remote:
            raise ValueError(f"remote must be a URL such as s3://bucket/prefix, not {self.remote!r}")
        if not isinstance(self.remote_options, Mapping):
            raise TypeError(f"remote_options must be a mapping, not {type(self.remote_options).__name__}")
        if self.remote is None and self.remote_options:
            raise ValueError("remote_options are for a remote store: give remote=URL too")


def seconds(value: float, name: str) -> float:
    """Check a duration: a number of seconds from 0 to the longest that a lock can be waited for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not 0 <= value <= LONGEST_S:
        raise ValueError(f"{name} must be finite, 0 or more and at most {LONGEST_S:.0f}, not {value!r}")
    return float(value)


def _count(value: int, name: str, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be {at_least} or more, not {value}")
