"""vLLM's KV offloading on snapstore: a secondary tier that vLLM loads by configuration.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8000000000,
            "secondary_tiers": [{"type": "SnapstoreTier", "module_path": "snapstore.integrations.vllm",
                                 "root_dir": "/var/tmp/vllm", "max_bytes": 100000000000}]}}'

Blocks are opaque rows of the primary tier's memory. They are written from there without a copy, and vLLM keeps them
where they are until a job has ended: a job ends, and succeeds, when all its rows are on disk. All of it happens on the
tier's own threads; what the scheduler calls takes microseconds, but ``drain_jobs``, which waits for what is under way.

A process that is started again with the same model and layout finds its blocks. Two that run at once have a session
each, and do not find each other's.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import TIER_LABEL, JobResult, SecondaryTierManager, TransferJob

from snapstore._errors import SnapstoreError
from snapstore._options import Leftovers, StoreOptions
from snapstore._ticket import SaveTicket
from snapstore.blocks import BlockStats, BlockStore

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

__all__ = ["SnapstoreTier"]

GAUGES = {
    "used_bytes": "Bytes of blocks on disk and on their way there.",
    "blocks": "Blocks that are there.",
}
COUNTERS = {
    "stored": "Blocks that were taken.",
    "stored_bytes": "Bytes of blocks that were taken.",
    "hits": "Blocks that were read.",
    "misses": "Blocks that were asked for and not there.",
    "discarded": "Blocks that made room for others, or could not be read.",
}
PREFIX = "vllm:kv_offload_snapstore_"

_ROOM_S = 30.0
"""Longest that a row waits for room among those on their way to the disk, on a thread of the tier's own."""
_LAST_S = 10.0
"""What shutdown allows the jobs that are under way, and then the store."""
_LOAD, _STORE, _STOP = range(3)
"""What a thread takes first."""

_log = logging.getLogger(__name__)


@dataclass(order=True, slots=True)
class _Task:
    kind: int
    number: int
    job: TransferJob | None = None


class SnapstoreTier(SecondaryTierManager):  # type: ignore[misc]
    """Rows of the primary tier on disk, by their keys.

    Args:
        offloading_spec, primary_kv_view, tier_type, backpressure_detector: vLLM's.
        root_dir: where the blocks of all models lie; each model and layout has a folder of its own below it.
        max_bytes: most bytes on disk; the blocks that were used longest ago make room. Unlimited by default.
        threads: jobs at once. Loads go first.
        leftovers: what becomes of the blocks of a process that ended; see ``StoreOptions``.
        locality: of the disk, as vLLM publishes it.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        root_dir: str,
        max_bytes: int | None = None,
        threads: int = 4,
        leftovers: Leftovers = "adopt",
        locality: str | None = None,
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if type(threads) is not int or threads < 1:
            raise ValueError(f"threads must be a whole number, 1 or more, not {threads!r}")
        self.locality = Locality(locality) if locality is not None else None
        options = StoreOptions(leftovers=leftovers, save_timeout_s=_ROOM_S)
        self._blocks = BlockStore(_folder(root_dir, offloading_spec), options, max_bytes=max_bytes)
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._finished: deque[JobResult] = deque()
        self._state = threading.Condition()
        self._open_jobs = 0
        self._closing = False
        self._reported = self._blocks.stats()
        self._threads = [
            threading.Thread(target=self._work, name=f"snapstore-vllm-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def blocks(self) -> BlockStore:
        """The store behind it."""
        return self._blocks

    # -- what the scheduler calls -------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT from the moment a row is on its way to the disk, else MISS. Never waits for a disk."""
        return LookupResult.HIT if self._blocks.has(key.hex()) else LookupResult.MISS

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """These blocks are discarded later than others."""
        self._blocks.mark_used(key.hex() for key in keys)

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Have the rows written. The job succeeds when all of them are on disk, or were there already."""
        self._submit(_STORE, job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Have the rows filled. Of a job that fails in part, ``successful_keys`` names those that were."""
        self._submit(_LOAD, job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """The jobs that ended since the last call."""
        finished = []
        while self._finished:
            finished.append(self._finished.popleft())
        return finished

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Nothing to prefer: blocks are offloaded as they come."""
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        """Wait until no job is open: then nothing touches the primary tier's memory. As long as the disk takes."""
        with self._state:
            self._state.wait_for(lambda: self._open_jobs == 0)

    def shutdown(self) -> None:
        """End the jobs that are under way, fail those that wait. The blocks stay. Twice is fine."""
        with self._state:
            if self._closing:
                return
            self._closing = True
            for _ in self._threads:
                self._tasks.put(_Task(_STOP, next(self._numbers)))
        deadline_s = time.monotonic() + _LAST_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        report = self._blocks.shutdown(timeout_s=_LAST_S)
        if not report.clean or any(thread.is_alive() for thread in self._threads):
            wrong = "; ".join(report.errors) or f"{len(report.abandoned)} blocks were not written in time"
            _log.warning("the tier %s did not end cleanly: %s", self.tier_type, wrong)

    # -- metrics ------------------------------------------------------------------------------------------------

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """What ``get_stats`` reports, for Prometheus."""
        label = (TIER_LABEL,)
        gauges = {PREFIX + name: OffloadingGaugeMetadata(text, label) for name, text in GAUGES.items()}
        return gauges | {
            PREFIX + name: OffloadingCounterMetadata(text, label) for name, text in COUNTERS.items()
        }

    def get_stats(self) -> Any:
        """Gauges of now, and counters since the last call."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

        last, now = self._reported, self._blocks.stats()
        self._reported = now
        stats, label = OffloadingConnectorStats(), (self.tier_type,)
        for name in GAUGES:
            stats.set_gauge(PREFIX + name, getattr(now, name), label)
        for name, more in _growth(last, now).items():
            stats.increase_counter(PREFIX + name, more, label)
        return stats

    # -- on the tier's threads ----------------------------------------------------------------------------------

    def _submit(self, kind: int, job: TransferJob) -> None:
        with self._state:
            self._open_jobs += 1
            if not self._closing:
                self._tasks.put(_Task(kind, next(self._numbers), job))
                return
        self._finish(job, stored=False, loaded=None, transfer_s=0.0)

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """A function of its own, so that an idle thread keeps nothing of the last job alive."""
        task = self._tasks.get()
        if task.job is None:
            return False
        began_s = time.monotonic()
        loaded: list[OffloadKey] | None = None
        stored = False
        try:
            if self._closing:
                _log.debug("job %s is not begun: the tier is shut down", task.job.job_id)
            elif task.kind == _STORE:
                stored = self._store(task.job)
            else:
                loaded = self._load(task.job)
        except Exception:  # noqa: BLE001 - a thread's top: this job fails, the next is done
            _log.exception("job %s of the tier %s failed", task.job.job_id, self.tier_type)
        self._finish(task.job, stored, loaded, time.monotonic() - began_s)
        return True

    def _finish(
        self, job: TransferJob, stored: bool, loaded: list[OffloadKey] | None, transfer_s: float
    ) -> None:
        whole = stored or (loaded is not None and len(loaded) == len(job.keys))
        done = len(job.keys) if whole else len(loaded or ())
        result = JobResult(
            job_id=job.job_id,
            success=whole,
            successful_keys=tuple(loaded) if loaded and not whole else None,
            transfer_time=transfer_s,
            transfer_bytes=done * self.block_size_bytes,
        )
        with self._state:
            self._finished.append(result)
            self._open_jobs -= 1
            self._state.notify_all()

    def _store(self, job: TransferJob) -> bool:
        tickets: list[SaveTicket] = []
        try:
            for key, row in self._rows(job):
                ticket = self._blocks.put(key.hex(), row, borrow=True)
                if ticket is not None:
                    tickets.append(ticket)
        except (SnapstoreError, OSError) as error:
            _log.warning("job %s is not stored: %s: %s", job.job_id, type(error).__name__, error)
        finally:
            for ticket in tickets:
                ticket.wait_released(None)  # until then the rows are read, written or not
                ticket.exception(None)
        return all(self._blocks.has(key.hex()) for key in job.keys)

    def _load(self, job: TransferJob) -> list[OffloadKey]:
        loaded = []
        for key, row in self._rows(job):
            if self._blocks.get_into(key.hex(), row):
                loaded.append(key)
            else:
                self._blocks.discard(
                    key.hex()
                )  # of another length: or vLLM would find it and ask again for ever
        return loaded

    def _rows(self, job: TransferJob) -> Iterable[tuple[OffloadKey, memoryview]]:
        """Each key with its row. No view outlives the job: vLLM releases the memory when the tier has shut down."""
        flat, size = self._primary_kv_view.cast("B"), self.block_size_bytes
        for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
            row = flat[int(chunk) * size : (int(chunk) + 1) * size] if chunk >= 0 else flat[:0]
            if len(row) != size:
                raise ValueError(f"row {chunk} is not within the primary tier's {len(flat)} bytes")
            yield key, row


def _folder(root_dir: str, offloading_spec: OffloadingSpec) -> str:
    """A folder for this model and layout, by vLLM's own rule: blocks of one can not be read as another's."""
    mapper = FileMapper.from_offloading_spec(
        root_dir=root_dir,
        offloading_spec=offloading_spec,
        blocks_per_file=offloading_spec.blocks_per_chunk,
        parallel_agnostic=True,
    )
    return f"{mapper.base_path}_r{mapper.rank}"


def _growth(last: BlockStats, now: BlockStats) -> dict[str, int]:
    growth = {name: getattr(now, name) - getattr(last, name) for name in COUNTERS}
    return {name: more for name, more in growth.items() if more}
