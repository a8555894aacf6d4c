"""``StoreCollector``: the counters, gauges and latencies of one store or several, for prometheus_client.

    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    registry.register(StoreCollector({"boundaries": store, "prefixes": other}))     # several: told apart by ``store``

A scrape reads one published value of each store, so all that it says of a store is of one moment. It takes no lock and
asks neither disk nor device: it is answered while both hang. Nothing is registered anywhere but where the caller does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, get_args

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from snapstore._engine import Engine
from snapstore._latency import BOUNDS_S, Histogram, Reasons
from snapstore._look import Moment, health_at, stats_at
from snapstore._reasons import FAILED, REJECTED
from snapstore._store import SnapshotStore
from snapstore._types import DeviceStatus, HealthStatus, RemoteStatus, StoreHealth, StoreStats

__all__ = ["StoreCollector"]

_WRITER_STATES = ("idle", "writing", "stuck", "dead")

_COUNTERS = (
    ("saves_accepted", "accepted", "Saves that were accepted"),
    ("saves_accepted_bytes", "accepted_bytes", "Tensor bytes of saves that were accepted"),
    ("saves_committed", "committed", "Accepted saves that are on disk"),
    ("saves_committed_bytes", "committed_bytes", "Tensor bytes of accepted saves that are on disk"),
    (
        "saves_cancelled",
        "cancelled",
        "Accepted saves that a cleanup, a later save of the key or shutdown cancelled",
    ),
    ("saves_cancelled_bytes", "cancelled_bytes", "Tensor bytes of accepted saves that were cancelled"),
    ("cleanup_timeouts", "cleanup_timeouts", "Cleanups that did not see their end in time"),
    ("writer_restarts", "writer_restarts", "Starts of the writer after a bug had ended it"),
    ("device_copies_pageable", "pageable_copies", "Device copies through memory that was not pinned"),
)
_GAUGES = (
    ("pending_saves", "pending", "Accepted saves that are not settled"),
    ("pending_bytes", "pending_bytes", "Tensor bytes of accepted saves that are not settled"),
    ("pending_oldest_seconds", "oldest_pending_s", "Age of the oldest accepted save that is not settled"),
    ("live_requests", "live_requests", "Requests that are not cleaned up"),
    ("live_snapshots", "live_snapshots", "Snapshots on disk that are not cleaned up"),
    ("session_bytes", "session_bytes", "Disk that live snapshots take"),
    ("trash_bytes", "trash_bytes", "Disk of what is forgotten and not freed yet"),
    ("device_pending_saves", "on_devices", "Saves that wait for a copy by a device"),
    ("leaked_bytes", "leaked_bytes", "Memory that is kept because a device may still touch it"),
    ("pinned_bytes", "pinned_bytes", "Host memory that is locked for device copies"),
)
_REMOTE_COUNTERS = (
    ("published", "Snapshots that other nodes can load since this store published them"),
    ("published_bytes", "Bytes of the files of those"),
    ("fetched", "Snapshots that were loaded from the remote store"),
    ("fetched_bytes", "Bytes of the files of those"),
    ("refused", "Snapshots that were not published, since their life had ended there"),
    ("ended", "Cleanups that were carried out in the remote store"),
    ("failed", "Requests to the remote store that failed"),
)
_REMOTE_GAUGES = (
    ("unpublished", "Snapshots that wait to be published, or are on their way"),
    ("unpublished_bytes", "Tensor bytes of those"),
    ("endings", "Cleanups still to be carried out in the remote store"),
    ("in_flight_bytes", "Bytes that are being moved now, either way"),
)
_HISTOGRAMS = (
    ("save_seconds", "save", "Time of a save on the calling thread, without its wait for room"),
    ("queue_wait_seconds", "queue_wait", "From the acceptance of a save to the hand of the writer"),
    ("write_seconds", "write", "Time of a save in the hand of the writer"),
    ("cleanup_wait_seconds", "cleanup_wait", "Wait of a cleanup for its files to go"),
)


class StoreCollector(Collector):
    """What ``registry.register`` takes.

    Args:
        store: an open ``SnapshotStore``, or several by name. Shut down, a store is still answered for, as ``dead``.
    """

    def __init__(self, store: SnapshotStore | Mapping[str, SnapshotStore]) -> None:
        self._label_names = [] if isinstance(store, SnapshotStore) else ["store"]
        named = {"": store} if isinstance(store, SnapshotStore) else dict(store)
        self._engines = {name: each._engine for name, each in named.items()}

    def describe(self) -> Iterable[Metric]:
        """The same families: a second collector in one registry is refused by it, since their series would mix."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Everything, of each store at one moment. Never blocks."""
        scrapes = [
            _Scrape.of([name] if self._label_names else [], engine) for name, engine in self._engines.items()
        ]
        names = self._label_names
        yield from _counters(names, scrapes)
        yield from _gauges(names, scrapes)
        yield from _histograms(names, scrapes)
        yield from _remote(names, [scrape for scrape in scrapes if scrape.stats.remote is not None])


class _Scrape(NamedTuple):
    """One store at one moment, and the values of its labels."""

    labels: list[str]
    moment: Moment
    stats: StoreStats
    health: StoreHealth
    writer: str

    @classmethod
    def of(cls, labels: list[str], engine: Engine) -> _Scrape:
        moment = Moment.of(engine)
        stats, health = stats_at(moment), health_at(engine, moment)
        writer = "writing" if stats.in_flight else "idle"
        if health.writing_s > engine.options.stuck_after_s:
            writer = "stuck"
        if not engine.writer_alive:
            writer = "dead"
        return cls(labels, moment, stats, health, writer)


def _counters(names: list[str], scrapes: list[_Scrape]) -> Iterator[Metric]:
    for name, field, what in _COUNTERS:
        family = CounterMetricFamily(f"snapstore_{name}", what, labels=names)
        for scrape in scrapes:
            family.add_metric(scrape.labels, getattr(scrape.stats, field))
        yield family
    yield from _by_reason(
        "failed", names, FAILED, [(scrape.labels, scrape.moment.published.failures) for scrape in scrapes]
    )
    yield from _by_reason(
        "rejected",
        names,
        REJECTED,
        [(scrape.labels, scrape.moment.published.rejections) for scrape in scrapes],
    )


def _by_reason(
    word: str, names: list[str], known: tuple[str, ...], found: list[tuple[list[str], Reasons]]
) -> Iterator[Metric]:
    """Every known reason, also those that have not happened: a rate needs a 0 to rise from."""
    labels = [*names, "reason"]
    counts = CounterMetricFamily(f"snapstore_saves_{word}", f"Saves that {_WHAT[word]}", labels=labels)
    sizes = CounterMetricFamily(
        f"snapstore_saves_{word}_bytes", f"Tensor bytes of saves that {_WHAT[word]}", labels=labels
    )
    for values, reasons in found:
        seen = {reason: (count, nbytes) for reason, count, nbytes in reasons.by_reason}
        for reason in sorted({*known, *seen}):
            count, nbytes = seen.get(reason, (0, 0))
            counts.add_metric([*values, reason], count)
            sizes.add_metric([*values, reason], nbytes)
    yield counts
    yield sizes


_WHAT = {"failed": "were accepted and could not be written", "rejected": "were not accepted"}


def _gauges(names: list[str], scrapes: list[_Scrape]) -> Iterator[Metric]:
    for name, field, what in _GAUGES:
        family = GaugeMetricFamily(f"snapstore_{name}", what, labels=names)
        for scrape in scrapes:
            family.add_metric(scrape.labels, getattr(scrape.stats, field))
        yield family
    free = GaugeMetricFamily("snapstore_disk_free_bytes", "Free disk, as last measured", labels=names)
    in_hand = GaugeMetricFamily(
        "snapstore_write_in_hand_seconds",
        "How long the write that is under way has taken so far",
        labels=names,
    )
    for scrape in scrapes:
        in_hand.add_metric(scrape.labels, scrape.health.writing_s)
        if scrape.health.free_bytes is not None:
            free.add_metric(scrape.labels, scrape.health.free_bytes)
    yield in_hand
    yield free
    yield from _states(names, scrapes)


def _states(names: list[str], scrapes: list[_Scrape]) -> Iterator[Metric]:
    labels = [*names, "state"]
    health = GaugeMetricFamily("snapstore_health", "1 for how the store is", labels=labels)
    writer = GaugeMetricFamily("snapstore_writer_state", "1 for what the writer does", labels=labels)
    device = GaugeMetricFamily(
        "snapstore_device_state", "1 for how the device is", labels=[*names, "device", "state"]
    )
    for scrape in scrapes:
        _one_of(health, scrape.labels, get_args(HealthStatus), scrape.health.status)
        _one_of(writer, scrape.labels, _WRITER_STATES, scrape.writer)
        for each in scrape.health.devices:
            _one_of(device, [*scrape.labels, each.name], get_args(DeviceStatus), each.status)
    yield health
    yield writer
    yield device


def _remote(names: list[str], scrapes: list[_Scrape]) -> Iterator[Metric]:
    """Of stores that have a remote store; nothing where none has."""
    if not scrapes:
        return
    for name, what in _REMOTE_COUNTERS:
        counter = CounterMetricFamily(f"snapstore_remote_{name}", what, labels=names)
        for scrape in scrapes:
            counter.add_metric(scrape.labels, getattr(scrape.stats.remote, name))
        yield counter
    for name, what in _REMOTE_GAUGES:
        gauge = GaugeMetricFamily(f"snapstore_remote_{name}", what, labels=names)
        for scrape in scrapes:
            gauge.add_metric(scrape.labels, getattr(scrape.stats.remote, name))
        yield gauge
    state = GaugeMetricFamily("snapstore_remote_state", "1 for how it is", labels=[*names, "state"])
    for scrape in scrapes:
        if scrape.health.remote is not None:
            _one_of(state, scrape.labels, get_args(RemoteStatus), scrape.health.remote.status)
    yield state


def _one_of(family: GaugeMetricFamily, labels: list[str], states: Iterable[str], current: str) -> None:
    for state in states:
        family.add_metric([*labels, state], float(state == current))


def _histograms(names: list[str], scrapes: list[_Scrape]) -> Iterator[Metric]:
    for name, field, what in _HISTOGRAMS:
        family = HistogramMetricFamily(f"snapstore_{name}", what, labels=names)
        for scrape in scrapes:
            family.add_metric(scrape.labels, *_buckets(getattr(scrape.moment.published.latencies, field)))
        yield family
    load = HistogramMetricFamily(
        "snapstore_load_seconds", "Time of a load that found something", labels=[*names, "source"]
    )
    for scrape in scrapes:
        latencies = scrape.moment.published.latencies
        load.add_metric([*scrape.labels, "memory"], *_buckets(latencies.load_memory))
        load.add_metric([*scrape.labels, "disk"], *_buckets(latencies.load_disk))
        if scrape.stats.remote is not None:
            load.add_metric([*scrape.labels, "remote"], *_buckets(latencies.load_remote))
    yield load


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Cumulative, as Prometheus counts, and the sum."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets, histogram.sum_s
