"""``StoreCollector``: a store's counters, gauges and latencies for prometheus_client.

    registry = CollectorRegistry()
    registry.register(StoreCollector(store, labels={"store": "boundaries"}))

A scrape reads one published value, so all that it says is of one moment. It takes no lock and asks neither disk nor
device: it is answered while both hang. Nothing is registered anywhere but where the caller does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, get_args

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from snapstore._latency import BOUNDS_S, Histogram, Reasons
from snapstore._look import Moment, health_at, stats_at
from snapstore._reasons import FAILED, REJECTED
from snapstore._store import SnapshotStore
from snapstore._types import DeviceStatus, HealthStatus, StoreHealth, StoreStats

__all__ = ["StoreCollector"]

_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_OWN_LABELS = frozenset({"reason", "source", "state", "device", "le"})


class StoreCollector(Collector):
    """What ``registry.register`` takes.

    Args:
        store: an open ``SnapshotStore``. Shut down, it is still answered for, as ``dead``.
        labels: put on every series, to tell the stores of one registry apart. The same names for each of them.
    """

    def __init__(self, store: SnapshotStore, *, labels: Mapping[str, str] | None = None) -> None:
        self._engine = store._engine
        self._labels = dict(labels or {})
        for name in self._labels:
            if not _LABEL.fullmatch(name) or name in _OWN_LABELS:
                raise ValueError(f"{name!r} can not be a label here; choose another name")

    def describe(self) -> list[Metric]:
        """None: a registry that holds two stores' collectors would take their equal names for a mistake."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Everything, of one moment. Never blocks."""
        moment = Moment.of(self._engine)
        families = _Families(self._labels, moment)
        yield from families.counters(stats_at(moment))
        yield from families.gauges(stats_at(moment), health_at(self._engine, moment))
        yield from families.histograms()


class _Families(NamedTuple):
    """The families of one scrape."""

    labels: Mapping[str, str]
    moment: Moment

    def counters(self, stats: StoreStats) -> Iterator[Metric]:
        for word, what in (
            ("accepted", "Saves that were accepted"),
            ("committed", "Accepted saves that are on disk"),
            (
                "cancelled",
                "Accepted saves that were cancelled by a cleanup, a later save of the key, or shutdown",
            ),
        ):
            yield self._counter(f"saves_{word}", what, getattr(stats, word))
            yield self._counter(
                f"saves_{word}_bytes", f"{what}, in tensor bytes", getattr(stats, f"{word}_bytes")
            )
        published = self.moment.published
        yield from self._reasons(
            "failed", "Accepted saves that could not be written", published.failures, FAILED
        )
        yield from self._reasons("rejected", "Saves that were not accepted", published.rejections, REJECTED)
        yield self._counter(
            "cleanup_timeouts", "Cleanups that did not see the end in time", stats.cleanup_timeouts
        )
        yield self._counter(
            "writer_restarts", "Starts of the writer after a bug ended it", stats.writer_restarts
        )
        yield self._counter(
            "device_copies_pageable",
            "Device copies through memory that was not pinned",
            stats.pageable_copies,
        )

    def gauges(self, stats: StoreStats, health: StoreHealth) -> Iterator[Metric]:
        for name, what, value in (
            ("pending_saves", "Accepted saves that are not settled", stats.pending),
            ("pending_bytes", "Tensor bytes of those", stats.pending_bytes),
            ("pending_oldest_seconds", "Age of the oldest of those", stats.oldest_pending_s),
            ("live_requests", "Requests that are not cleaned up", stats.live_requests),
            ("live_snapshots", "Snapshots on disk that are not cleaned up", stats.live_snapshots),
            ("session_bytes", "Disk that those take", stats.session_bytes),
            ("trash_bytes", "Disk of what is forgotten and not freed yet", stats.trash_bytes),
            ("device_pending_saves", "Saves that wait for a device's copy", stats.on_devices),
            ("leaked_bytes", "Memory kept because a device may still touch it", stats.leaked_bytes),
            ("pinned_bytes", "Host memory that is locked for device copies", stats.pinned_bytes),
            (
                "write_in_hand_seconds",
                "How long the write in the writer's hand has taken so far",
                health.writing_s,
            ),
        ):
            yield self._gauge(name, what, value)
        if health.free_bytes is not None:
            yield self._gauge("disk_free_bytes", "Free disk, as last measured", health.free_bytes)
        yield self._states("state", "How the store is; 1 for the state that it is in", health.status)
        devices = self._gauges("device_state", "How a device is; 1 for its state", ["device", "state"])
        for device in health.devices:
            for state in get_args(DeviceStatus):
                self._add(devices, [device.name, state], float(device.status == state))
        yield devices

    def histograms(self) -> Iterator[Metric]:
        latencies = self.moment.published.latencies
        for name, what, histogram in (
            (
                "save_seconds",
                "Time of a save on the calling thread, without its wait for room",
                latencies.save,
            ),
            ("queue_wait_seconds", "From a save's acceptance to the writer's hand", latencies.queue_wait),
            ("write_duration_seconds", "Time of a save in the writer's hand", latencies.write),
            ("cleanup_wait_seconds", "Wait of a cleanup for its files to go", latencies.cleanup_wait),
        ):
            family = HistogramMetricFamily(f"snapstore_{name}", what, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), *_buckets(histogram))
            yield family
        load = HistogramMetricFamily(
            "snapstore_load_seconds", "Time of a load that found something", labels=[*self.labels, "source"]
        )
        for source, histogram in (("memory", latencies.load_memory), ("disk", latencies.load_disk)):
            load.add_metric([*self.labels.values(), source], *_buckets(histogram))
        yield load

    def _reasons(self, word: str, what: str, reasons: Reasons, known: tuple[str, ...]) -> Iterator[Metric]:
        """Every known reason, also those that have not happened: a rate needs a 0 to rise from."""
        found = {reason: (count, nbytes) for reason, count, nbytes in reasons.by_reason}
        names = [*self.labels, "reason"]
        counts = CounterMetricFamily(f"snapstore_saves_{word}", f"{what}, by reason", labels=names)
        sizes = CounterMetricFamily(f"snapstore_saves_{word}_bytes", f"{what}, in tensor bytes", labels=names)
        for reason in sorted({*known, *found}):
            count, nbytes = found.get(reason, (0, 0))
            self._add(counts, [reason], count)
            self._add(sizes, [reason], nbytes)
        yield counts
        yield sizes

    def _states(self, name: str, what: str, current: str) -> Metric:
        family = self._gauges(name, what, ["state"])
        for state in get_args(HealthStatus):
            self._add(family, [state], float(state == current))
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(f"snapstore_{name}", what, labels=list(self.labels))
        self._add(family, [], value)
        return family

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = self._gauges(name, what, [])
        self._add(family, [], value)
        return family

    def _gauges(self, name: str, what: str, more: list[str]) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"snapstore_{name}", what, labels=[*self.labels, *more])

    def _add(self, family: CounterMetricFamily | GaugeMetricFamily, more: list[str], value: float) -> None:
        family.add_metric([*self.labels.values(), *more], value)


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Cumulative, as Prometheus counts, and the sum."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets, histogram.sum_s
