"""One node of the chaos test, as a process: saves, loads and cleans up at random until it is killed.

Every snapshot says in its metadata who saved it, in which life of the request here; its tensors follow from that, so
whoever loads it knows what it must be. What was aborted is written to the log once the cleanup has returned clean.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import zlib
from collections import defaultdict
from typing import Any

import numpy as np

from snapstore import Snapshot, SnapshotCorruptError, SnapshotNotFoundError, SnapshotStore, StoreOptions

REQUESTS = [f"request-{number}" for number in range(12)]


def content_of(identity: list[Any]) -> dict[str, Any]:
    """The tensors of a snapshot that has this identity. Sometimes large enough to be uploaded in parts."""
    seed = zlib.crc32(json.dumps(identity).encode())
    nbytes = [3, 5000, 400_000, 400_000, 17 << 20][seed % 5 if seed % 50 == 4 else seed % 4]
    block = np.random.default_rng(seed).integers(0, 255, min(nbytes, 1 << 16), dtype=np.uint8)
    return {"state": np.resize(block, nbytes), "seed": np.array(seed, np.uint32)}


def is_right(snapshot: Snapshot, request: str) -> bool:
    """Bit for bit what its own identity says, and of the request that was asked for."""
    identity = snapshot.metadata
    expected = content_of(identity)
    return identity[2] == request and all(
        snapshot.tensors[name].dtype == tensor.dtype and np.array_equal(snapshot.tensors[name], tensor)
        for name, tensor in expected.items()
    )


class Node:
    """What it does, step by step."""

    def __init__(self, name: str, root: str, url: str, options: dict[str, Any], log: str) -> None:
        self.name = name
        self.run = time.time_ns()
        given = {**options, "node": name, "timeout_s": 2.0}
        self.store = SnapshotStore(root, StoreOptions(remote=url, remote_options=given))
        self.random = random.Random(f"{name}-{self.run}")
        self.epochs: dict[str, int] = defaultdict(int)
        self.loaded: dict[str, list[list[Any]]] = defaultdict(list)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(self) -> None:
        request = self.random.choice(REQUESTS)
        draw = self.random.random()
        if draw < 0.45:
            self.save(request)
        elif draw < 0.8:
            self.load(request)
        elif draw < 0.82:
            self.clean(request)
        else:
            time.sleep(0.02)

    def save(self, request: str) -> None:
        count = self.random.randrange(8)
        identity = [self.name, self.run, request, self.epochs[request], count, self.random.getrandbits(32)]
        self.store.save(request, count, content_of(identity), metadata=identity)

    def load(self, request: str) -> None:
        try:
            latest = self.store.latest(request, remote=True)
            if latest is None:
                return
            snapshot = self.store.load(request, latest)
        except (SnapshotNotFoundError, SnapshotCorruptError) as error:
            self.tell("missed", type(error).__name__)
            return
        if not is_right(snapshot, request):
            self.tell("WRONG", snapshot.metadata)
        self.tell("loaded", snapshot.source)
        if snapshot.source == "remote":
            self.loaded[request].append(snapshot.metadata)

    def clean(self, request: str) -> None:
        ended = [self.name, self.run, request, self.epochs[request]]
        self.epochs[request] += 1
        others = self.loaded.pop(request, [])
        if self.store.cleanup_request(request).clean:
            self.tell("aborted", [ended, others])

    def tell(self, event: str, what: Any) -> None:
        os.write(self.log, (json.dumps([event, what]) + "\n").encode())


def main() -> None:
    """Until it is killed."""
    node = Node(**json.loads(sys.argv[1]))
    node.tell("started", node.name)
    while True:
        node.step()


if __name__ == "__main__":
    main()
