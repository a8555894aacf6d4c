"""oMLX's ``BoundarySnapshotSSDStore``, name and surface, on top of ``SnapshotStore``.

    from snapstore.compat.omlx import BoundarySnapshotSSDStore, reset_boundary_snapshot_root

    store = BoundarySnapshotSSDStore(base_dir)
    store.save(request_id, token_count, cache, extract_cache_states)    # True, or False and one WARNING with the reason
    layers = store.load(request_id, token_count)                        # list of dicts, or None and one WARNING

``extract_cache_states(cache)`` gives the layers: a list with a dict (or ``None``) a layer, or that list first in a
tuple. Each comes back as it was: flat and nested states, gaps, scalars, ``meta_state`` and whatever else is in it.

What differs from the original: files are snapstore's (in ``base_dir/_snapstore``, a directory of its own for each
process); a state is kept exactly, whatever ``gdn_sidecar_state_dtype`` says; with ``block_size`` it is kept whole, too;
a cleanup touches nothing that is saved after it; ``shutdown`` writes what was accepted. ``snapshots`` is the store
itself, with tickets, statistics and health.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snapstore._errors import SnapstoreError
from snapstore._files import FileSystem, exists
from snapstore._options import MiB, StoreOptions
from snapstore._session import Budget, check_root, reclaim
from snapstore._store import SnapshotStore
from snapstore._types import CleanupReport
from snapstore.compat._layers import Layers, put_together, read_file, take_apart

__all__ = ["BoundarySnapshotSSDStore", "reset_boundary_snapshot_root"]

ROOT = "_snapstore"
"""The store's root below ``base_dir``; beside, not in, the directory that oMLX's own class uses."""

STATE_DTYPES = ("fp32", "bf16", "int8", "rht_int8", "rht_int16")
"""What ``gdn_sidecar_state_dtype`` may say."""

RESET_S = 30.0
"""Longest that ``reset_boundary_snapshot_root`` takes, as far as the disk lets it."""

_EXPECTED = (SnapstoreError, OSError, TypeError, ValueError, RuntimeError)
"""What a call may meet: errors of the store, the disk, the arguments, and of MLX, which raises ``RuntimeError``."""

_log = logging.getLogger(__name__)


def reset_boundary_snapshot_root(base_dir: str | os.PathLike[str]) -> None:
    """Remove what dead processes left below ``base_dir``. Sessions of processes that live are spared.

    For a server's start. Blocks for the disk, between two files at most ``RESET_S``; what would not go is one WARNING.
    ``RootError`` if the directory there is not one of ours.
    """
    files, root = FileSystem(), _root(base_dir)
    if not exists(files, root):
        return
    check_root(files, root)
    budget = Budget(time.monotonic, sessions=1 << 30, deadline_s=time.monotonic() + RESET_S)
    reclaim(files, root, budget, lambda: None)
    if budget.errors:
        _log.warning("%d files below %s could not be removed: %s", len(budget.errors), root, budget.errors[0])


class BoundarySnapshotSSDStore:
    """Snapshots of requests at token boundaries, by oMLX's names. Every method may be called from any thread.

    Args:
        base_dir: the cache directory; the store's root is made in it.
        pending_max_bytes: most bytes accepted and not yet on disk; ``save`` waits for room, bounded.
        gdn_sidecar_state_dtype: one of ``STATE_DTYPES``. All are kept exactly; other than ``"fp32"`` is one WARNING.
        file_system: the disk, for tests; see ``snapstore.testing``.

    Raises:
        RootError: the directory can not be used: it is a link, or holds something else.
    """

    def __init__(
        self,
        base_dir: str | os.PathLike[str],
        *,
        pending_max_bytes: int = 512 * MiB,
        gdn_sidecar_state_dtype: str = "fp32",
        file_system: FileSystem | None = None,
    ) -> None:
        if gdn_sidecar_state_dtype not in STATE_DTYPES:
            raise ValueError(
                f"gdn_sidecar_state_dtype must be one of {STATE_DTYPES}, not {gdn_sidecar_state_dtype!r}"
            )
        if gdn_sidecar_state_dtype != "fp32":
            _log.warning(
                "states are kept exactly, not as %s: this store has no codec", gdn_sidecar_state_dtype
            )
        self._files = file_system or FileSystem()
        options = StoreOptions(max_pending_bytes=pending_max_bytes)
        self._store = SnapshotStore(_root(base_dir), options, file_system=self._files)
        self._meters = threading.Lock()
        self._peak_bytes = 0
        self._waited_ms = 0.0

    @property
    def snapshots(self) -> SnapshotStore:
        """The store behind it: tickets, reports, statistics, health."""
        return self._store

    def save(
        self,
        request_id: str,
        token_count: int,
        snapshot_cache: Any,
        extract_cache_states_fn: Callable[[Any], Any],
        *,
        block_size: int | None = None,
    ) -> bool:
        """Take a snapshot; True when it is accepted and readable. Waits for room at most 2 s, never for a disk.

        ``block_size`` is noted in the file. False always comes with one WARNING.
        """
        try:
            layers = _layers_of(extract_cache_states_fn(snapshot_cache))
        except Exception as error:  # noqa: BLE001 - the engine's own code: a snapshot is not worth a request
            return _no("save", request_id, token_count, error)
        try:
            tensors, metadata = take_apart(layers, _checked_block_size(block_size))
            full = self._would_wait(sum(int(tensor.nbytes) for tensor in tensors.values()))
            began_s = time.monotonic()
            try:
                ticket = self._store.save(request_id, token_count, tensors, metadata=metadata)
            finally:
                self._note_wait(time.monotonic() - began_s if full else 0.0)
        except _EXPECTED as error:
            return _no("save", request_id, token_count, error)
        with self._meters:
            self._peak_bytes = max(self._peak_bytes, ticket.nbytes, self.pending_bytes)
        return True

    def load(self, request_id: str, token_count: int) -> Layers | None:
        """The layers as they were saved, from memory or from disk. ``None`` always comes with one WARNING."""
        try:
            snapshot = self._store.load(request_id, token_count)
            return put_together(snapshot.tensors, snapshot.metadata)
        except _EXPECTED as error:
            _no("load", request_id, token_count, error)
            return None

    def load_file(self, path: str | os.PathLike[str]) -> Layers | None:
        """The layers in a file that was taken from such a store, or that oMLX wrote. ``None``: one WARNING says why.

        Links and whatever else is no regular file are refused. Blocks for the disk.
        """
        try:
            return read_file(self._files, os.fspath(path))
        except _EXPECTED as error:
            _log.warning("no layers from %s: %s", path, _words(error))
            return None

    def has(self, request_id: str, token_count: int) -> bool:
        """True if ``load`` would find it. Never blocks for a disk, and is no WARNING when it is not there."""
        return self._store.has(request_id, token_count)

    def take_staged_file(
        self,
        request_id: str,
        token_count: int,
        destination: str | os.PathLike[str],
        *,
        timeout_s: float = 30.0,
    ) -> Path | None:
        """Wait until it is written, then move its file to ``destination``: no cleanup touches it any more.

        ``None``, with one WARNING: it is not there, was not written in time, or can not be moved.
        """
        try:
            return self._store.detach(request_id, token_count, destination, timeout_s=timeout_s)
        except _EXPECTED as error:
            _no("take_staged_file", request_id, token_count, error)
            return None

    def cleanup_request(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """Forget a request; from here on ``load`` and ``has`` say no. Waits at most 2 s, for its own write only.

        False, with one WARNING: a file is still in the making; whoever makes it removes it.
        """
        return _clean(
            self._store.cleanup_request(request_id, timeout_s=timeout_s), f"request {request_id[:64]!r}"
        )

    def cleanup_all(self, *, timeout_s: float | None = None) -> bool:
        """``cleanup_request`` for all requests, with one wait of at most 5 s."""
        return _clean(self._store.cleanup_all(timeout_s=timeout_s), "all requests")

    def shutdown(self, cleanup: bool = False) -> bool:
        """Write what was accepted, or with ``cleanup`` forget everything, and end the threads; within 10 s.

        False, with one WARNING: something was left over. Twice is fine.
        """
        report = self._store.shutdown(cleanup=cleanup)
        if not report.clean:
            wrong = "; ".join(report.errors) or f"{len(report.abandoned)} saves were not written in time"
            _log.warning("shutdown left something over: %s", wrong)
        return report.clean

    @property
    def pending_bytes(self) -> int:
        """Bytes accepted and not yet on disk, now."""
        return self._store.stats().pending_bytes

    @property
    def pending_peak_bytes(self) -> int:
        """The most that was pending when a ``save`` returned; at least the largest one."""
        return self._peak_bytes

    @property
    def backpressure_ms(self) -> float:
        """Milliseconds that saves took for which there was no room when they came."""
        return self._waited_ms

    def _would_wait(self, nbytes: int) -> bool:
        stats, limits = self._store.stats(), self._store.options
        too_much = stats.pending_bytes + nbytes > limits.max_pending_bytes
        return stats.pending > 0 and (too_much or stats.pending >= limits.max_pending_jobs)

    def _note_wait(self, waited_s: float) -> None:
        with self._meters:
            self._waited_ms += 1000 * waited_s


def _root(base_dir: str | os.PathLike[str]) -> str:
    return str(Path(base_dir, ROOT).absolute())


def _layers_of(extracted: Any) -> list[Any]:
    layers = extracted[0] if isinstance(extracted, tuple) and extracted else extracted
    if not isinstance(layers, list) or not layers:
        raise ValueError("extract_cache_states_fn gave no list of layers")
    for index, layer in enumerate(layers):
        if not (layer is None or isinstance(layer, dict)):
            raise TypeError(f"layer {index} is a {type(layer).__qualname__}, neither a dict nor None")
    return layers


def _checked_block_size(block_size: int | None) -> int | None:
    if block_size is not None and (type(block_size) is not int or block_size < 1):
        raise ValueError(f"block_size must be a whole number of tokens, 1 or more, not {block_size!r}")
    return block_size


def _clean(report: CleanupReport, what: str) -> bool:
    if not report.clean:
        _log.warning(
            "the cleanup of %s is not done: a file is still in the making, and will be removed", what
        )
    return report.clean


def _no(verb: str, request_id: object, token_count: object, error: Exception) -> bool:
    _log.warning("%s of %.64r at %r tokens: %s", verb, request_id, token_count, _words(error))
    return False


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
