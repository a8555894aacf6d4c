"""Nodes are killed, the server is killed, stalled, cut off, and corrupts: then what is visible is whole and right."""

from __future__ import annotations

import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from object_stores import Proxy
from remote_node import REQUESTS, is_right
from remotes import warm_up

from bench._object_stores import BUCKET, SeaweedFS, options_for, running
from snapstore import SnapshotStore, StoreOptions
from snapstore._maintenance.plan import Rules, make_plan
from snapstore.remote._objects import ObjectStore
from snapstore.remote._survey import RemoteSnapshot, survey
from snapstore.remote._upkeep import Pruning, verify

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]


@pytest.fixture(scope="session", autouse=True)
def _client():
    warm_up()


SECONDS = float(os.environ.get("SNAPSTORE_CHAOS_S", "25"))
MODES = ["pass", "pass", "pass", "pass", "slow", "stall", "cut", "refuse", "flip", "flip"]


class Fleet:
    """The nodes' processes."""

    def __init__(self, folder: Path, url: str, options: dict[str, Any], names: str) -> None:
        self.folder, self.url, self.options, self.names = folder, url, options, names
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        given = {
            "name": name,
            "root": str(self.folder / name),
            "url": self.url,
            "options": self.options,
            "log": str(self.folder / f"{name}.log"),
        }
        script = Path(__file__).with_name("remote_node.py")
        self._processes[name] = subprocess.Popen([sys.executable, str(script), json.dumps(given)])

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        assert process.wait(20) == -9, "it ended by itself"

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(20)

    def told(self) -> list[list[Any]]:
        lines: list[list[Any]] = []
        for name in self.names:
            path = self.folder / f"{name}.log"
            if path.exists():
                lines += [json.loads(line) for line in path.read_text().splitlines()]
        return lines


@pytest.mark.parametrize(("seed", "names"), [(1, "ab"), (2, "abcd")])
def test_after_any_trouble_what_is_visible_is_whole_and_nothing_aborted_is(tmp_path, seed, names):
    chance = random.Random(seed)
    with running(SeaweedFS(tmp_path / "server")) as server:
        proxy = Proxy(server.port)
        url = f"s3://{BUCKET}/{secrets.token_hex(8)}"
        fleet = Fleet(tmp_path, url, options_for(proxy.endpoint), names)
        try:
            for name in names:
                fleet.start(name)
            done = make_trouble(chance, fleet, proxy, server)
            for name in names:
                fleet.kill(name)
        finally:
            fleet.close()
            proxy.close()
        told = fleet.told()
        counts = Counter(
            event if event in ("aborted", "WRONG") else f"{event} {what}" for event, what in told
        )
        print(f"\n{names}: {done}, bits flipped {proxy.flipped}; {dict(counts)}")  # noqa: T201
        assert "WRONG" not in counts
        settle(tmp_path, url, options_for(server.endpoint), names)
        look_closely(tmp_path, url, options_for(server.endpoint), names, told)


def make_trouble(chance: random.Random, fleet: Fleet, proxy: Proxy, server: SeaweedFS) -> dict[str, int]:
    done: Counter[str] = Counter()
    end_s = time.monotonic() + SECONDS
    while time.monotonic() < end_s:
        time.sleep(chance.uniform(0.3, 1.5))
        proxy.mode = chance.choice(MODES)
        done[proxy.mode] += 1
        if chance.random() < 0.5:
            name = chance.choice(fleet.names)
            fleet.kill(name)
            fleet.start(name)
            done["nodes killed"] += 1
        if chance.random() < 0.08:
            server.kill()
            time.sleep(chance.uniform(0, 1))
            server.start()
            done["servers killed"] += 1
    proxy.mode = "pass"
    time.sleep(8)
    return dict(done)


def settle(folder: Path, url: str, options: dict[str, Any], names: str) -> None:
    """The nodes start once more, and carry out what they had written down."""
    stores = [open_node(folder, url, options, name) for name in names]
    deadline_s = time.monotonic() + 60
    for store in stores:
        while store.health().remote.status == "opening" or store.stats().remote.endings:
            assert time.monotonic() < deadline_s, store.health()
            time.sleep(0.05)
        assert store.shutdown().clean


def open_node(folder: Path, url: str, options: dict[str, Any], name: str) -> SnapshotStore:
    given = {**options, "node": name}
    return SnapshotStore(
        folder / name, StoreOptions(remote=url, remote_options=given, remote_policy="on_publish")
    )


def look_closely(folder: Path, url: str, options: dict[str, Any], names: str, told: list[list[Any]]) -> None:
    store = ObjectStore(url, options, 20.0)
    found = survey(store, grace_s=0, tombstone_s=0)
    assert found.findings == []
    identities = load_everywhere(folder, url, options, names, visible(found))
    assert identities, "something is left to be looked at"
    lives, snapshots = aborted(told)
    for identity in identities:
        assert tuple(identity) not in snapshots, f"{identity} was aborted"
        node, run, request, epoch = identity[:4]
        assert all(epoch > over for over in lives.get((node, run, request), ())), f"{identity} was aborted"
    garbage = sum(len(session.loose) for session in found.sessions)
    plan = make_plan(found.sessions, found.surroundings, Rules(), time.time() + 60)
    report = Pruning(store, lambda _: None, lambda: True).carry_out(plan)
    assert report.errors == () and report.snapshots == 0
    after = survey(store, grace_s=0, tombstone_s=0)
    assert not any(session.loose for session in after.sessions) and not after.unfinished
    checked = verify(store, after, lambda _: None)
    assert checked.findings == () and checked.checked == len(identities)
    store.close()
    ended = sum(map(len, lives.values()))
    print(f"visible {len(identities)}, lives aborted {ended}, garbage {garbage} objects")  # noqa: T201


def visible(found: Any) -> list[tuple[str, int]]:
    return [
        (each.of.request_id, each.token_count)
        for session in found.sessions
        for each in session.snapshots
        if isinstance(each, RemoteSnapshot)
    ]


def load_everywhere(
    folder: Path, url: str, options: dict[str, Any], names: str, keys: list[tuple[str, int]]
) -> list[list[Any]]:
    """On every node alike; what they say of themselves."""
    said = []
    for name in names:
        store = open_node(folder, url, options, name)
        snapshots = [store.load(*key) for key in keys]
        assert all(each.source == "remote" for each in snapshots)
        assert all(is_right(each, key[0]) for each, key in zip(snapshots, keys, strict=True))
        assert all(store.latest(request, remote=True) == latest(keys, request) for request in REQUESTS)
        said.append([each.metadata for each in snapshots])
        assert store.shutdown(timeout_s=20).clean
    assert all(each == said[0] for each in said)
    return said[0]


def latest(keys: list[tuple[str, int]], request: str) -> int | None:
    return max((count for each, count in keys if each == request), default=None)


def aborted(told: list[list[Any]]) -> tuple[dict[tuple[Any, ...], list[int]], set[tuple[Any, ...]]]:
    """Lives of nodes that were cleaned up, and snapshots of other nodes that the one that cleaned up had loaded."""
    lives: dict[tuple[Any, ...], list[int]] = {}
    snapshots = set()
    for event, what in told:
        if event == "aborted":
            (node, run, request, epoch), others = what
            lives.setdefault((node, run, request), []).append(epoch)
            snapshots |= {tuple(each) for each in others}
    return lives, snapshots
