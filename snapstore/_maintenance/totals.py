"""What ``snapstore stats`` counts: one pass over the sessions, a few counters, whatever the size of the root."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from snapstore._maintenance.root import Root
from snapstore._maintenance.survey import Loose, Session, Surroundings, sessions, surroundings

AGES_S = (60, 600, 3600, 6 * 3600, 86400, 7 * 86400)
"""Bounds between the bars of the ages; the last bar is open."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How many, and what they take on disk."""

    count: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram: values from ``low`` up to, not with, ``high``; ``None``: no upper bound."""

    low: int
    high: int | None
    count: int


@dataclass(frozen=True, slots=True)
class Totals:
    """A root in figures. Ages are seconds since a snapshot was written, ``None`` without any."""

    alive: int
    dead: int
    unknown: int
    requests: int
    snapshots: Amount
    temporaries: Amount
    trash: Amount
    unfinished: Amount
    quarantined: Amount
    findings: int
    oldest_s: int | None
    newest_s: int | None
    ages: tuple[Bar, ...]
    sizes: tuple[Bar, ...]
    free_bytes: int | None

    @property
    def disk_bytes(self) -> int:
        """All that the root takes."""
        parts = (self.snapshots, self.temporaries, self.trash, self.unfinished, self.quarantined)
        return sum(part.disk_bytes for part in parts)


def totals(root: Root) -> Totals:
    """Count. Blocks for the disk."""
    return count(sessions(root), surroundings(root), root.files.free_bytes(root.fd))


def count(found: Iterable[Session], around: Surroundings, free_bytes: int | None) -> Totals:
    """What these sessions and their surroundings come to."""
    counter = _Counter(time.time())
    for session in found:
        counter.add(session)
    return Totals(
        alive=counter.owners["alive"],
        dead=counter.owners["dead"],
        unknown=counter.owners["unknown"],
        requests=len(counter.requests),
        snapshots=Amount(counter.snapshots, counter.snapshot_bytes),
        temporaries=_amount(counter.temporaries),
        trash=_amount(counter.trash),
        unfinished=_amount(around.unfinished),
        quarantined=_amount(around.quarantined),
        findings=counter.findings + len(around.findings),
        oldest_s=max(counter.ages_s, default=None),
        newest_s=min(counter.ages_s, default=None),
        ages=_age_bars(counter.ages_s),
        sizes=_size_bars(counter.sizes),
        free_bytes=free_bytes,
    )


class _Counter:
    """Sums over sessions. Ages and sizes are kept as counts of seconds and of powers of two."""

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s
        self.owners: Counter[str] = Counter()
        self.requests: set[str] = set()
        self.snapshots = 0
        self.snapshot_bytes = 0
        self.temporaries: list[Loose] = []
        self.trash: list[Loose] = []
        self.findings = 0
        self.ages_s: Counter[int] = Counter()
        self.sizes: Counter[int] = Counter()

    def add(self, session: Session) -> None:
        self.owners[session.owner.liveness] += 1
        self.findings += len(session.findings)
        self.temporaries += session.temporaries
        self.trash += session.trash
        for each in session.snapshots:
            self.requests.add(each.of.request_hash)
            self.snapshots += 1
            self.snapshot_bytes += each.disk_bytes
            self.ages_s[max(0, int(self._now_s - each.mtime_ns / 1e9))] += 1
            self.sizes[max(each.nbytes, 1).bit_length() - 1] += 1


def _amount(items: list[Loose] | tuple[Loose, ...]) -> Amount:
    return Amount(len(items), sum(each.freed_bytes for each in items))


def _age_bars(ages_s: Counter[int]) -> tuple[Bar, ...]:
    """All bars from the first to the last that has anything."""
    bounds = (0, *AGES_S)
    bars = [
        Bar(low, high, sum(count for age_s, count in ages_s.items() if low <= age_s < (high or float("inf"))))
        for low, high in zip(bounds, (*AGES_S, None), strict=True)
    ]
    return _trimmed(bars)


def _size_bars(sizes: Counter[int]) -> tuple[Bar, ...]:
    """A bar for each factor of four."""
    by_four: Counter[int] = Counter()
    for power, count in sizes.items():
        by_four[power // 2] += count
    most = max(by_four, default=-1)
    return _trimmed([Bar(4**power, 4 ** (power + 1), by_four[power]) for power in range(most + 1)])


def _trimmed(bars: list[Bar]) -> tuple[Bar, ...]:
    filled = [index for index, bar in enumerate(bars) if bar.count]
    return tuple(bars[filled[0] : filled[-1] + 1]) if filled else ()
