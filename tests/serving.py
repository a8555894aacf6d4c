"""A real server on loopback in a thread of its own, its loop with a ticker, and load on it from other processes."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

TICK_S = 0.01
R = TypeVar("R")


@dataclass
class Served:
    """A server that runs: where it is, and its loop, to do things on."""

    port: int
    loop: asyncio.AbstractEventLoop
    lags_s: list[float] = field(default_factory=list)

    def call(self, work: Callable[[], Awaitable[R]], timeout_s: float = 30.0) -> R:
        """Run a coroutine on the server's loop."""

        async def on_the_loop() -> R:
            return await work()

        return asyncio.run_coroutine_threadsafe(on_the_loop(), self.loop).result(timeout_s)

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, headers=named)
            answer = connection.getresponse()
            return (
                answer.status,
                {name.lower(): value for name, value in answer.getheaders()},
                answer.read(),
            )
        finally:
            connection.close()

    def json(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any]:
        status, _, body = self.get(path, method, **headers)
        return status, json.loads(body)


@contextmanager
def serving(make_app: Callable[[], Any]) -> Iterator[Served]:
    """``make_app`` is called on the server's loop."""
    import uvicorn  # the load below does not need it

    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # for all that it accepts
    ready: list[Served] = []
    up = threading.Event()
    box: list[Any] = []

    async def main() -> None:
        served = Served(listening.getsockname()[1], asyncio.get_running_loop())
        config = uvicorn.Config(make_app(), log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
        box.append(uvicorn.Server(config))
        ready.append(served)
        ticker = asyncio.create_task(tick(served.lags_s))
        up.set()
        await box[0].serve(sockets=[listening])
        ticker.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="test-server", daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield ready[0]
    finally:
        box[0].should_exit = True
        thread.join(15)
        listening.close()
        assert not thread.is_alive()


async def tick(lags_s: list[float]) -> None:
    """How much later than asked a sleeper is woken, every 10 ms."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + TICK_S
        await asyncio.sleep(TICK_S)
        lags_s.append(loop.time() - due_s)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def load(
    port: int, paths: list[str], *, workers: int = 2, seconds: float | None = None, count: int | None = None
) -> dict[str, Any]:
    """From ``workers`` other processes, one connection each: latencies by path, statuses, errors."""
    task = json.dumps({"port": port, "paths": paths, "seconds": seconds, "count": count})
    script = str(Path(__file__))
    running = [
        subprocess.Popen([sys.executable, script, task], stdout=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]
    results = [json.loads(each.communicate(timeout=120)[0]) for each in running]
    return {
        "latencies_s": [value for each in results for value in each["latencies_s"]],
        "statuses": sorted({status for each in results for status in each["statuses"]}),
        "errors": [error for each in results for error in each["errors"]],
    }


def _work(port: int, paths: list[str], seconds: float | None, count: int | None) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    latencies_s: list[float] = []
    statuses: set[int] = set()
    errors: list[str] = []
    end_s = time.monotonic() + (seconds if seconds is not None else 1e9)
    while time.monotonic() < end_s and (count is None or len(latencies_s) < count):
        path = paths[len(latencies_s) % len(paths)]
        started_s = time.perf_counter()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            statuses.add(answer.status)
        except (OSError, http.client.HTTPException) as error:
            errors.append(f"{path}: {type(error).__name__}: {error}")
            connection.close()
        latencies_s.append(time.perf_counter() - started_s)
    connection.close()
    return {"latencies_s": latencies_s, "statuses": sorted(statuses), "errors": errors[:10]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_work(**json.loads(sys.argv[1]))))
