"""Two nodes and an object store between them: a request moves on when its node is killed, and ends everywhere.

    make demo-remote

SeaweedFS is started on loopback; each node is a process with a root of its own. Any S3 does in its place: give
``StoreOptions`` its URL, and ``remote_options`` or the environment its endpoint and credentials.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench._object_stores import BUCKET, SeaweedFS, options_for, running
from snapstore import SnapshotNotFoundError, SnapshotStore, StoreOptions

URL = f"s3://{BUCKET}/demo"
REQUEST = "chat-42"
BLOCK = 1024


def opened(name: str, root: Path, endpoint: str) -> SnapshotStore:
    """A store as this node would have it."""
    options = {**options_for(endpoint), "node": name}
    return SnapshotStore(root / name, StoreOptions(remote=URL, remote_options=options))


def state_after(tokens: int) -> dict[str, np.ndarray]:
    """What a model would have in its caches: 16 MB that follow from the tokens."""
    return {"ssm": np.full((48, 85_000), tokens, np.float32)}


def prefill(root: Path, endpoint: str) -> None:
    """The first node: four blocks of a prompt; then it waits to be killed."""
    store = opened("node-a", root, endpoint)
    for tokens in range(BLOCK, 4 * BLOCK + 1, BLOCK):
        started_s = time.perf_counter()
        ticket = store.save(REQUEST, tokens, state_after(tokens))
        saved_s = time.perf_counter() - started_s
        ticket.wait_published()
        shared_s = time.perf_counter() - started_s
        say(
            f"node-a  {tokens} tokens: save {saved_s * 1e3:.1f} ms, on the object store after {shared_s * 1e3:.0f} ms"
        )
    say("node-a  ready")
    time.sleep(600)


def go_on(root: Path, endpoint: str) -> None:
    """The second node: resumes where the first one was, goes on, and in the end the request is aborted."""
    with opened("node-b", root, endpoint) as store:
        tokens = store.latest(REQUEST, remote=True)
        assert tokens is not None
        for _ in range(2):
            started_s = time.perf_counter()
            snapshot = store.load(REQUEST, tokens)
            took_s = time.perf_counter() - started_s
            assert np.array_equal(snapshot.tensors["ssm"], state_after(tokens)["ssm"])
            say(f"node-b  resumes at {tokens} tokens, from {snapshot.source}, in {took_s * 1e3:.0f} ms")
            store.flush()
        store.save(REQUEST, tokens + BLOCK, state_after(tokens + BLOCK)).wait_published()
        say(
            f"node-b  goes on to {tokens + BLOCK} tokens; there: latest is {store.latest(REQUEST, remote=True)}"
        )
        report = store.cleanup_request(REQUEST)
        say(f"node-b  abort: clean={report.clean} after {report.waited_s * 1e3:.1f} ms")
        while store.stats().remote.endings:
            time.sleep(0.01)


def late(root: Path, endpoint: str) -> None:
    """The first node once more: what was aborted is gone for it as well."""
    with opened("node-c", root, endpoint) as store:
        try:
            store.load(REQUEST, 4 * BLOCK)
        except SnapshotNotFoundError as error:
            say(f"node-c  {error}")
        say(f"node-c  health: {store.health().status}, {store.health().remote}")


def say(text: str) -> None:
    """At once, so that the order is that of the nodes."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Start the object store, and the nodes one after the other."""
    with tempfile.TemporaryDirectory(prefix="snapstore-demo-") as folder:
        root = Path(folder)
        say("starting SeaweedFS on loopback")
        with running(SeaweedFS(root / "seaweedfs")) as server:
            first = start("prefill", root, server.endpoint, stdout=subprocess.PIPE)
            assert first.stdout is not None
            for line in first.stdout:
                say(line.decode().rstrip())
                if line.endswith(b"ready\n"):
                    break
            first.kill()
            first.wait()
            say("node-a  killed")
            return start("go_on", root, server.endpoint).wait() or start("late", root, server.endpoint).wait()


def start(part: str, root: Path, endpoint: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
    """A node as a process of its own."""
    command = [sys.executable, __file__, part, str(root), endpoint]
    return subprocess.Popen(command, stdout=stdout)  # noqa: S603 - this very file


if __name__ == "__main__":
    if len(sys.argv) == 4:
        {"prefill": prefill, "go_on": go_on, "late": late}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main())
