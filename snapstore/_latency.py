"""How long things take, as immutable histograms: a scrape holds one value of all of them, made under the state lock."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Upper bounds of the buckets, in seconds, each inclusive; one more bucket takes the rest."""


class Histogram(NamedTuple):
    """How many observations fell into each bucket, and their sum."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    sum_s: float = 0.0

    def with_one(self, seconds: float) -> Histogram:
        """The histogram after one more observation."""
        index = bisect_left(BOUNDS_S, seconds)
        counts = self.counts
        return Histogram((*counts[:index], counts[index] + 1, *counts[index + 1 :]), self.sum_s + seconds)

    @property
    def total(self) -> int:
        """How many observations there were."""
        return sum(self.counts)


class Latencies(NamedTuple):
    """One histogram for each thing that is timed.

    ``save``: a call of save that was accepted, on its own thread, without its wait for room. ``queue_wait``: from
    acceptance to the writer's hand. ``write``: in the writer's hand, whatever came of it. ``load_memory``,
    ``load_disk`` and ``load_remote``: a call of load that found something. ``cleanup_wait``: the wait of a cleanup.
    """

    save: Histogram = Histogram()
    queue_wait: Histogram = Histogram()
    write: Histogram = Histogram()
    load_memory: Histogram = Histogram()
    load_disk: Histogram = Histogram()
    load_remote: Histogram = Histogram()
    cleanup_wait: Histogram = Histogram()

    def with_one(self, name: str, seconds: float) -> Latencies:
        """These with one more observation of ``name``."""
        at = self._fields.index(name)
        return Latencies._make((*self[:at], self[at].with_one(max(0.0, seconds)), *self[at + 1 :]))


class Reasons(NamedTuple):
    """How often something ended for each reason, and the bytes of that."""

    by_reason: tuple[tuple[str, int, int], ...] = ()

    def with_one(self, reason: str, nbytes: int) -> Reasons:
        """These with one more."""
        known = {name: (count, total) for name, count, total in self.by_reason}
        count, total = known.get(reason, (0, 0))
        known[reason] = count + 1, total + nbytes
        return Reasons(tuple((name, *known[name]) for name in sorted(known)))
