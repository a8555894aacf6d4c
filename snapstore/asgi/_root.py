"""A root as a source: a thread looks at it now and then, and requests are answered from its last look."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

from snapstore._committed import CommittedFile
from snapstore._errors import SnapshotNotFoundError
from snapstore._files import FileSystem
from snapstore._maintenance.headers import snapshots_of
from snapstore._maintenance.listing import RequestRow, SessionRow, request_rows, session_rows
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.survey import sessions, surroundings
from snapstore._types import SnapshotInfo, SnapshotKey
from snapstore.aio import Stream
from snapstore.aio._crew import Crew, outcome_of
from snapstore.aio._stream import MiB
from snapstore.asgi._source import in_time, no_such_request

THREADS = 4
STUCK_S = 10.0
"""A look that takes longer means a disk that hangs."""
ROWS = 200
HISTORY = 720

_log = logging.getLogger("snapstore.asgi")


@dataclass(frozen=True, slots=True)
class Look:
    """What one look saw; ``problem`` if it could not."""

    at_s: float = 0.0
    took_s: float = 0.0
    sessions: tuple[SessionRow, ...] = ()
    requests: tuple[RequestRow, ...] = ()
    request_count: int = 0
    snapshot_count: int = 0
    disk_bytes: int = 0
    free_bytes: int = 0
    findings: int = 0
    problem: str | None = None


class RootSource(Collector):
    """Reads, and nothing else. The first look is made at once, on the thread that makes this."""

    def __init__(self, path: str, interval_s: float) -> None:
        self._path = path
        self._files = FileSystem()
        self._interval_s = interval_s
        self._history: deque[tuple[float, int, int]] = deque(maxlen=HISTORY)
        self._looking_since_s: float | None = None
        self._ended = threading.Event()
        self._last = self._look()
        self._note()
        self._crew = Crew(THREADS)
        self._thread = threading.Thread(target=self._watch, name="snapstore-root-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the threads. Never blocks."""
        if not self._ended.is_set():
            self._ended.set()
            self._crew.release()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """A thread's top."""
        while not self._ended.wait(self._interval_s):
            try:
                self._last = self._look()
            except Exception as error:  # noqa: BLE001 - a thread's top: what is wrong now may be gone at the next look
                level = logging.DEBUG if self._last.problem else logging.WARNING
                _log.log(level, "look_failed: %s", error, extra={"event": "look_failed", "path": self._path})
                self._last = replace(self._last, problem=f"{type(error).__name__}: {error}")
            self._note()

    def _note(self) -> None:
        last = self._last
        self._history.append((round(time.time(), 1), last.disk_bytes, last.request_count))

    def _look(self) -> Look:
        """Blocks for the disk: one header is read for each request."""
        self._looking_since_s = started_s = time.monotonic()
        try:
            with opened_root(self._files, self._path) as root:
                seen = list(sessions(root, request_ids=True))
                around = surroundings(root)
                free_bytes = self._files.free_bytes(root.fd)
        finally:
            self._looking_since_s = None
        now_s = time.time()
        requests = sorted(request_rows(seen, now_s), key=lambda row: row.age_s)
        loose = (*around.unfinished, *around.quarantined)
        return Look(
            at_s=now_s,
            took_s=time.monotonic() - started_s,
            sessions=tuple(session_rows(seen, now_s))[-ROWS:],
            requests=tuple(requests[:ROWS]),
            request_count=len({row.request_hash for row in requests}),
            snapshot_count=sum(len(each.snapshots) for each in seen),
            disk_bytes=sum(each.disk_bytes for each in seen) + sum(each.freed_bytes for each in loose),
            free_bytes=free_bytes,
            findings=sum(len(each.findings) for each in seen) + len(around.findings),
        )

    # -- the routes ---------------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """Never blocks."""
        last, since_s = self._last, self._looking_since_s
        looking_s = 0.0 if since_s is None else time.monotonic() - since_s
        status, reasons = "ok", []
        if last.findings:
            status = "degraded"
            reasons.append(f"{last.findings} things are odd: see snapstore verify")
        if looking_s > STUCK_S:
            status = "stuck"
            reasons.append(f"a look at the root has taken {looking_s:.1f} s so far")
        if last.problem is not None:
            status = "dead"
            reasons.append(last.problem)
        return {"status": status, "reasons": reasons, "age_s": max(0.0, time.time() - last.at_s)}

    def stats(self) -> dict[str, Any]:
        """Never blocks."""
        last = self._last
        return {
            "root": self._path,
            "at_s": last.at_s,
            "took_s": last.took_s,
            "sessions": [asdict(row) for row in last.sessions],
            "requests": [asdict(row) for row in last.requests],
            "request_count": last.request_count,
            "snapshot_count": last.snapshot_count,
            "disk_bytes": last.disk_bytes,
            "free_bytes": last.free_bytes,
            "findings": last.findings,
            "history": list(self._history),
        }

    async def snapshots(self, request_id: str) -> list[dict[str, Any]]:
        """Of all sessions; of a token count that several lives have, the latest."""
        found = await outcome_of(self._crew.submit(self._snapshots, request_id))
        if not found:
            raise no_such_request(request_id)
        return [
            {"token_count": each.token_count, "nbytes": each.nbytes, "session": each.of.session}
            for each in sorted(found, key=lambda each: each.token_count)
        ]

    def _snapshots(self, request_id: str) -> list[Any]:
        with opened_root(self._files, self._path) as root:
            return list({each.token_count: each for each in snapshots_of(root, request_id)}.values())

    async def open(self, request_id: str, token_count: int) -> Stream:
        """The file of the latest life that has it."""
        key = SnapshotKey(request_id, token_count)

        async def opening() -> CommittedFile:
            return await outcome_of(self._crew.submit(self._open, key))

        return await in_time(Stream(opening, self._crew, MiB, 0, None))

    def _open(self, key: SnapshotKey) -> CommittedFile:
        with opened_root(self._files, self._path) as root:
            for each in reversed(snapshots_of(root, key.request_id)):
                if each.token_count != key.token_count:
                    continue
                info = SnapshotInfo(key, each.of.number, Path(each.path), each.nbytes)
                try:
                    with (
                        root.directory(each.of.session) as session,
                        root.directory(each.of.name, session) as fd,
                    ):
                        file = self._files.open_read(each.name, dir_fd=fd)
                except FileNotFoundError:
                    continue  # cleaned up between the look and the open
                return CommittedFile(self._files, info, file)
        raise SnapshotNotFoundError(f"no snapshot of {key}: never saved here, or cleaned up", key=key)

    async def cleanup(self, request_id: str | None, timeout_s: float | None) -> dict[str, Any]:
        """Never."""
        del request_id, timeout_s
        raise HTTPException(403, "this server only reads")

    def collect(self) -> Iterator[Metric]:
        """For its registry: the figures of the last look. Never blocks."""
        last = self._last
        owners = GaugeMetricFamily("snapstore_root_sessions", "Sessions below the root", labels=["owner"])
        for liveness in ("alive", "dead", "unknown"):
            owners.add_metric([liveness], sum(row.owner.liveness == liveness for row in last.sessions))
        yield owners
        for name, what, value in (
            ("requests", "Requests that have snapshots", last.request_count),
            ("snapshots", "Snapshots", last.snapshot_count),
            ("bytes", "Disk that the root takes", last.disk_bytes),
            ("disk_free_bytes", "Free disk", last.free_bytes),
            ("findings", "Things below the root that are odd", last.findings),
            ("look_seconds", "How long the last look took", last.took_s),
        ):
            yield GaugeMetricFamily(f"snapstore_root_{name}", what, value=value)
