"""``fleet``: 10,000 nodes with 1,000,000 live snapshots, simulated with latencies measured here. It has no limit."""

from __future__ import annotations

import heapq
import json
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter, time

import obstore

from bench._measure import SNAPSTORE, Case, Figure, percentile
from bench._object_stores import BUCKET, SeaweedFS, options_for, running
from bench._work import KiB, fresh_folder
from snapstore._maintenance.plan import Rules, make_plan
from snapstore.remote import _names
from snapstore.remote._manifest import EndLives, Entry, Manifest, Publish, Refused, decide, encode
from snapstore.remote._objects import ObjectStore, Seen
from snapstore.remote._survey import survey

OBJECT_BYTES = 256 * KiB
BOUNDARIES = 10
"""Snapshots of a request, one after the other; then it is cleaned up."""
MOVES = 0.05
"""Of the boundaries, how many are loaded and gone on with by another node."""
PRICES = {"put": 5.0e-6, "get": 4.0e-7, "delete": 0.0, "list": 5.0e-6}
"""US dollars a request, as the large providers list them for their standard class."""

Latencies = dict[str, list[float]]


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """Requests measured on SeaweedFS, then a fleet that makes them, then what listing and pruning it would take."""
    with ExitStack() as stack:
        server = stack.enter_context(running(SeaweedFS(stack.enter_context(fresh_folder()) / "server")))
        url = f"s3://{BUCKET}/{secrets.token_hex(4)}"
        store = ObjectStore(url, options_for(server.endpoint), 30.0)
        store.probe()
        measured = _measured(store, 100 if quick else 1000)
        case = Case("fleet", "one request on loopback", {}, 0)
        yield case, [_figure(case, name, values) for name, values in measured.items()]
        case = Case("fleet", "prune of one manifest's worth: list, read, plan", {}, 0)
        pruning = _prune_costs(store, quick)
        yield case, [_figure(case, name, values) for name, values in pruning.items()]
        store.close()
    nodes, live = (500, 20_000) if quick else (10_000, 1_000_000)
    fleet = Fleet(nodes, live, measured)
    case = Case("fleet", f"{nodes:,} nodes, {live:,} live snapshots: publish, as simulated", {}, 0)
    fleet.run(ends=20_000 if quick else 300_000)
    yield case, [_figure(case, name, values) for name, values in fleet.took_s.items()]
    print(fleet.summary())
    prune_s = live / BOUNDARIES * sum(map(median, pruning.values()))
    print(f"ls, stats or the plan of a prune of all that: {prune_s:,.0f} s, by the manifests read here\n")


def _figure(case: Case, name: str, values: list[float]) -> Figure:
    shown = f"{SNAPSTORE} {name}"
    return Figure(
        case.workload,
        case.name,
        shown,
        len(values),
        median(values),
        percentile(values, 0.99),
        max(values),
        None,
    )


def _measured(store: ObjectStore, rounds: int) -> Latencies:
    """Of each kind of request that a node makes."""
    found: Latencies = {"put object": [], "put manifest": [], "get manifest": [], "delete": []}
    content = bytes(OBJECT_BYTES)
    for number in range(rounds):
        request = f"measured-{number}"
        name = _names.object_name(request, "a.b.g1", 1)
        acts: dict[str, Callable[[], object]] = {
            "put object": partial(obstore.put, store.client, name, content, mode="create"),
            "put manifest": partial(store.write_manifest, Manifest(request), Seen(None, None)),
            "get manifest": partial(store.read_manifest, request),
            "delete": partial(store.delete, [name]),
        }
        for what, act in acts.items():
            found[what].append(_timed(act))
    return found


def _prune_costs(store: ObjectStore, quick: bool) -> Latencies:
    """A prefix of so many requests, surveyed and planned for; seconds a manifest."""
    requests = 200 if quick else 2000
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: _fill(store, f"pruned-{number}"), range(requests)))
    found: Latencies = {"survey": [], "plan": []}
    for _ in range(2 if quick else 5):
        started_s = perf_counter()
        seen = survey(store)
        found["survey"].append((perf_counter() - started_s) / requests)
        started_s = perf_counter()
        make_plan(seen.sessions, seen.surroundings, Rules(older_than_s=0, include_live=True), time())
        found["plan"].append((perf_counter() - started_s) / requests)
    return found


def _fill(store: ObjectStore, request: str) -> None:
    """What a request of ``BOUNDARIES`` snapshots leaves; its objects are small, since only their names count here."""
    manifest: Manifest | None = None
    for count in range(BOUNDARIES):
        entry = Entry(_names.object_name(request, "a.b.g1", count), 1, 1)
        obstore.put(store.client, entry.name, b"x")
        manifest = decide(manifest, Publish(request, "a.b.g1", count, entry, True, 1.0))
    assert manifest is not None
    store.write_manifest(manifest, Seen(None, None))


def _timed(act: Callable[[], object]) -> float:
    started_s = perf_counter()
    act()
    return perf_counter() - started_s


@dataclass(slots=True)
class Request:
    """One request of the fleet: on which node it is, and the manifest as the object store has it."""

    name: str
    node: int
    life: str
    manifest: Manifest | None = None
    version: int = 0
    known: int = 0
    published: int = 0


@dataclass(slots=True)
class Fleet:
    """Discrete events, decided by the very functions that nodes use. Latencies are drawn from those measured.

    Little's law gives the pace: so many live snapshots, each alive until its request has all of its boundaries.
    """

    nodes: int
    live: int
    measured: Latencies
    took_s: Latencies = field(
        default_factory=lambda: {"publish": [], "cleanup": [], "publish after a move": []}
    )
    requests: Counter[str] = field(default_factory=Counter)
    manifest_bytes: list[int] = field(default_factory=list)
    now_s: float = 0.0
    refused: int = 0

    def run(self, ends: int) -> None:
        """Until so many snapshots are published; at first every node has its share of requests half-way."""
        chance = random.Random(1)  # noqa: S311 - a simulation that comes out the same each time
        pace_s = 1.0
        alive = 2 * self.live // BOUNDARIES
        events: list[tuple[float, int]] = []
        fleet = [Request(f"r{i}", i % self.nodes, f"n{i % self.nodes}.s.g{i}") for i in range(alive)]
        for index, request in enumerate(fleet):
            for count in range(chance.randrange(BOUNDARIES)):
                self._publish(request, count, chance, count_it=False)
            heapq.heappush(events, (chance.random() * pace_s, index))
        while ends:
            self.now_s, index = heapq.heappop(events)
            request = fleet[index]
            if request.published == BOUNDARIES:
                self._clean(request, chance)
                fleet[index] = Request(f"{request.name}'", request.node, f"{request.life}'")
            else:
                moved = request.published > 0 and chance.random() < MOVES
                if moved:
                    request.node = chance.randrange(self.nodes)
                    self.requests["get"] += 2
                self._publish(request, request.published, chance, moved=moved)
                ends -= 1
            heapq.heappush(events, (self.now_s + pace_s * chance.uniform(0.5, 1.5), index))

    def _publish(
        self,
        request: Request,
        count: int,
        chance: random.Random,
        *,
        moved: bool = False,
        count_it: bool = True,
    ) -> None:
        entry = Entry(_names.object_name(request.name, request.life, count), OBJECT_BYTES, 1)
        took_s = self._draw("put object", chance)
        made: Counter[str] = Counter(put=2)
        if moved:
            took_s += self._draw("get manifest", chance)
            made["get"] += 1
        try:
            event = Publish(request.name, request.life, count, entry, not request.published, self.now_s)
            request.manifest = decide(request.manifest, event)
        except Refused:
            self.refused += 1
        took_s += self._draw("put manifest", chance)
        request.published += 1
        if count_it:
            self.requests += made
            self.took_s["publish after a move" if moved else "publish"].append(took_s)
            if chance.random() < 0.01:
                assert request.manifest is not None
                self.manifest_bytes.append(len(encode(request.manifest)))

    def _clean(self, request: Request, chance: random.Random) -> None:
        request.manifest = decide(
            request.manifest, EndLives(request.name, frozenset({request.life}), self.now_s)
        )
        self.requests += Counter(get=1, put=1, delete=BOUNDARIES)
        deletes = [self._draw("delete", chance) for _ in range(BOUNDARIES)]
        rest = self._draw("get manifest", chance) + self._draw("put manifest", chance)
        self.took_s["cleanup"].append(rest + sum(deletes))

    def _draw(self, name: str, chance: random.Random) -> float:
        return chance.choice(self.measured[name])

    def summary(self) -> str:
        """In words, beside the table."""
        published = len(self.took_s["publish"]) + len(self.took_s["publish after a move"])
        dollars = sum(self.requests[name] * price for name, price in PRICES.items())
        a_second = {name: round(count / self.now_s) for name, count in self.requests.items()}
        share = sum(self.manifest_bytes) / len(self.manifest_bytes) / OBJECT_BYTES
        each = f"{dollars / published * 1e6:,.2f} US dollars a million snapshots"
        return (
            f"simulated {self.now_s:.2f} s: {published / self.now_s:,.0f} snapshots published a second; "
            f"requests a second {json.dumps(a_second)}; manifests {median(self.manifest_bytes):,.0f} bytes at the "
            f"median, {share:.2%} of a snapshot of 256 KiB; {each}"
        )
