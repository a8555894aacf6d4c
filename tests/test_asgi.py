"""``snapstore.asgi`` through real HTTP on loopback: answers, ranges, tokens, hostile clients, load."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from helpers import tensors
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from serving import Served, load, serving
from starlette.applications import Starlette
from starlette.routing import Mount

from snapstore import RootError, SnapshotStore, StoreOptions
from snapstore.aio import AsyncSnapshotStore
from snapstore.asgi import create_app, create_root_app
from snapstore.metrics import StoreCollector
from snapstore.testing import FaultyFileSystem

TOKEN = "s3cret-\u00e9"
BEARER = {"Authorization": f"Bearer {TOKEN}".encode().decode("latin-1")}
ODD_IDS = [
    "a/b",
    "",
    " ",
    "..",
    ".",
    "\n",
    "\x00",
    "a?b#c&d=e",
    "%2F",
    "é漢🙂",
    "a/snapshots/5",
    "<b>",
    "x" * 5000,
    "\\",
    "+",
]


@contextmanager
def served(store: SnapshotStore, **options: Any) -> Iterator[Served]:
    shared = AsyncSnapshotStore(store)
    try:
        with serving(lambda: create_app(shared, **options)) as server:
            yield server
    finally:
        asyncio.run(shared.shutdown(cleanup=True))


@pytest.fixture
def store(root: Path) -> SnapshotStore:
    return SnapshotStore(root)


def at(request_id: str, rest: str = "snapshots") -> str:
    return f"/requests/{quote(request_id, safe='')}/{rest}"


# --- answers ---


def test_health_is_200_while_saves_are_taken_and_503_when_not(root: Path) -> None:
    files = FaultyFileSystem()
    store = SnapshotStore(root, StoreOptions(stuck_after_s=0.05), file_system=files)
    with served(store) as server:
        assert server.json("/health")[0] == 200 and server.json("/health")[1]["status"] == "ok"
        files.fail("write", 5, ".tmp")
        store.save("a", 1, tensors(1)).exception(10)
        status, health = server.json("/health")
        assert (status, health["status"]) == (200, "degraded") and "Input/output error" in health["reasons"][
            0
        ]
        with files.pause("rename", ".safetensors") as gate:
            store.save("a", 2, tensors(1))
            gate.wait_reached()
            while store.health().status != "stuck":
                time.sleep(0.005)
            status, health = server.json("/health")
            assert (status, health["status"]) == (503, "stuck") and health["writing_s"] > 0.05
        store.shutdown()
        assert server.json("/health")[0] == 503 and server.json("/health")[1]["status"] == "dead"


def test_stats_and_metrics_say_what_the_store_says(store: SnapshotStore) -> None:
    with served(store) as server:
        store.save("a", 1, tensors(1)).result(10)
        status, stats = server.json("/stats")
        assert status == 200 and (stats["accepted"], stats["committed"], stats["live_requests"]) == (1, 1, 1)
        status, headers, body = server.get("/metrics")
        families = {each.name: each for each in text_string_to_metric_families(body.decode())}
        assert status == 200 and headers["content-type"].startswith("text/plain")
        assert families["snapstore_saves_committed"].samples[0].value == 1
        wanted = "application/openmetrics-text; version=1.0.0"
        assert server.get("/metrics", Accept=wanted)[1]["content-type"].startswith(
            "application/openmetrics-text"
        )
        assert "docs" not in server.json("/nowhere")[1] and server.get("/nowhere")[0] == 404


def test_a_registry_of_the_caller_is_shown_with_the_store_in_it_once(store: SnapshotStore) -> None:
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    create_app(store, registry=registry)
    other = CollectorRegistry()
    with served(store, registry=other) as server:
        assert other.get_sample_value("snapstore_saves_accepted_total") == 0
        assert b"snapstore_saves_accepted_total 0.0" in server.get("/metrics")[2]


def test_any_text_is_a_request_id(store: SnapshotStore) -> None:
    with served(store, token=TOKEN) as server:
        infos = {each: store.save(each, 5, tensors(number)).result(10) for number, each in enumerate(ODD_IDS)}
        for request_id, info in infos.items():
            status, found = server.json(at(request_id))
            assert (status, found) == (200, {"request_id": request_id, "snapshots": [{"token_count": 5}]})
            assert server.get(at(request_id, "snapshots/5"))[2] == info.path.read_bytes()
        for request_id in ODD_IDS:
            status, report = server.json(at(request_id, "cleanup"), "POST", **BEARER)
            assert status == 200 and report["clean"] and report["removed"] == 1, request_id
            assert server.json(at(request_id))[0] == 404


def test_a_file_is_streamed_whole_or_in_part(store: SnapshotStore) -> None:
    with served(store) as server:
        info = store.save("a", 7, {"x": np.arange(300_000, dtype=np.int64)}).result(10)
        whole, path = info.path.read_bytes(), at("a", "snapshots/7")
        status, headers, body = server.get(path)
        assert (status, body) == (200, whole) and headers["content-length"] == str(len(whole))
        assert headers["accept-ranges"] == "bytes" and headers["content-type"] == "application/octet-stream"
        size = len(whole)
        for asked, start, stop in [
            ("bytes=0-0", 0, 1), ("bytes=0-", 0, size), ("bytes=100-199", 100, 200), ("BYTES = 5 - 9", 5, 10),
            (f"bytes={size - 1}-{10**30}", size - 1, size), ("bytes=-3", size - 3, size), (f"bytes=-{10**30}", 0, size),
        ]:  # fmt: skip
            status, headers, body = server.get(path, Range=asked)
            assert (status, body) == (206, whole[start:stop]), asked
            assert headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        for asked in ("bytes=0-1,5-6", "lines=1-2"):
            assert server.get(path, Range=asked)[::2] == (200, whole)
        tag = headers["etag"]
        assert server.get(path, Range="bytes=0-3", If_Range=tag)[0] == 206
        store.save("a", 7, {"x": np.arange(300_000, dtype=np.int64)}).result(10)
        status, headers, body = server.get(path, Range="bytes=0-3", If_Range=tag)
        assert status == 200 and len(body) == size and headers["etag"] != tag
        status, headers, body = server.get(path, "HEAD")
        assert (status, body, headers["content-length"]) == (200, b"", str(size))


def test_writes_need_the_token_and_without_one_there_are_none(store: SnapshotStore) -> None:
    store.save("a", 1, tensors(1)).result(10)
    with serving(lambda: create_app(store)) as server:
        for path in ("/cleanup", at("a", "cleanup")):
            assert server.get(path, "POST")[0] == server.get(path, "POST", **BEARER)[0] == 403
    with served(store, token=TOKEN) as server:
        for shown in (
            "",
            "Bearer",
            "Bearer ",
            "Basic " + TOKEN,
            "Bearer x",
            f"Bearer {TOKEN}x",
            TOKEN,
            "Bearer \x80",
        ):
            header = shown.encode("utf-8").decode("latin-1")
            status, headers, _ = server.get("/cleanup", "POST", Authorization=header)
            assert status == 401 and headers["www-authenticate"] == "Bearer", shown
        assert server.get("/cleanup", "POST")[0] == 401 and store.has("a", 1)
        for wrong in ("-1", "nan", "inf", "1e9", "x", ""):
            assert server.get(f"/cleanup?timeout_s={wrong}", "POST", **BEARER)[0] == 400
        assert server.get("/cleanup")[0] == 405 and store.has("a", 1)
        status, report = server.json("/cleanup?timeout_s=5", "POST", **BEARER)
        assert status == 200 and report["clean"] and report["removed"] == 1 and not store.has("a", 1)
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="protects nothing"):
            create_app(store, token=empty)


def test_two_stores_live_in_one_app_and_answer_for_themselves(root: Path, tmp_path: Path) -> None:
    one, two = SnapshotStore(root), SnapshotStore(tmp_path / "two")
    one.save("a", 1, tensors(1)).result(10)

    def both() -> Starlette:
        return Starlette(routes=[Mount("/one", create_app(one)), Mount("/t%77o", create_app(two, token="t"))])

    with serving(both) as server:
        assert server.json("/one/stats")[1]["committed"] == 1
        assert server.json("/one" + at("a"))[0] == 200
        assert server.get("/one" + at("a", "snapshots/1"))[0] == 200
        assert server.get("/one/cleanup", "POST", Authorization="Bearer t")[0] == 403
    with serving(lambda: Starlette(routes=[Mount("/two", create_app(two, token="t"))])) as server:
        assert server.json("/two/stats")[1]["committed"] == 0 and server.get("/two" + at("a"))[0] == 404
        assert server.get("/two/cleanup", "POST", Authorization="Bearer t")[0] == 200
    one.shutdown(cleanup=True)
    two.shutdown(cleanup=True)


def test_it_is_mounted_in_an_engines_fastapi_app(store: SnapshotStore) -> None:
    fastapi = pytest.importorskip("fastapi")
    info = store.save("a/b \u00e9", 1, tensors(1)).result(10)
    content = info.path.read_bytes()

    def engine() -> Any:
        app = fastapi.FastAPI()
        app.mount("/snapstore", create_app(store, token=TOKEN))

        @app.get("/requests/{request_id}")
        async def mine(request_id: str) -> dict[str, str]:
            return {"engine": request_id}

        return app

    with serving(engine) as server:
        assert server.json("/requests/a") == (200, {"engine": "a"})
        assert list(server.json("/openapi.json")[1]["paths"]) == ["/requests/{request_id}"]
        assert server.json("/snapstore/health")[1]["status"] == "ok"
        assert server.json("/snapstore/stats")[1]["committed"] == 1
        assert b"snapstore_saves_committed_total 1.0" in server.get("/snapstore/metrics")[2]
        here = "/snapstore" + at("a/b \u00e9", "snapshots/1")
        assert server.get(here)[2] == content
        assert server.get(here, Range="bytes=8-15")[::2] == (206, content[8:16])
        assert server.get("/snapstore" + at("nobody", "snapshots/1"))[0] == 404
        cleanup = "/snapstore" + at("a/b \u00e9", "cleanup")
        assert server.get(cleanup, "POST")[0] == 401
        status, report = server.json(cleanup, "POST", **BEARER)
        assert status == 200 and report["removed"] == 1
        assert server.get(here)[0] == 404 and server.get("/snapstore/nothing")[0] == 404
    store.shutdown(cleanup=True)


# --- hostile clients ---


def raw(port: int, request: bytes) -> int:
    """What the server answers to these bytes; 0 if it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            connection.sendall(request)
            answer = connection.makefile("rb").readline()
        except ConnectionError:
            return 0
    return int(answer.split()[1]) if answer else 0


def test_hostile_requests_are_answered_with_4xx_never_500(store: SnapshotStore) -> None:
    info = store.save("a", 1, tensors(1)).result(10)
    end = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    paths = [
        b"/requests/" + byte + b"/" + rest for byte in odd_bytes() for rest in (b"snapshots", b"snapshots/1")
    ]
    paths += [b"/requests/a/snapshots/" + bad for bad in BAD_TOKENS]
    paths += [b"/requests/" + b"%61" * 20_000 + b"/snapshots", b"/requests/" + b"a" * 60_000 + b"/snapshots"]
    requests = [b"GET " + path + end + b"\r\n" for path in paths]
    requests += [b"POST /requests/%ff/cleanup" + end + b"Authorization: Bearer t\r\n\r\n"]
    fetch = b"GET /requests/a/snapshots/1" + end
    requests += [fetch + b"Range: " + bad + b"\r\n\r\n" for bad in bad_ranges(info.path.stat().st_size)]
    with served(store, token="t") as server:
        for request in requests:
            status = raw(server.port, request)
            hung_up = (
                status == 0 and len(request) > 40_000
            )  # before it had read it all, and so its answer is lost
            assert 400 <= status < 500 or hung_up, (status, request[:200])
        tokens = [bytes([byte]) for byte in range(1, 256) if byte not in b"\r\n"] + [
            b"t" * 50_000,
            b"t, Bearer t",
        ]
        for token in tokens:
            if token.strip() != b"t":
                request = b"POST /cleanup" + end + b"Authorization: Bearer " + token + b"\r\n\r\n"
                assert raw(server.port, request) in (
                    (400, 401, 431) if len(token) < 40_000 else (0, 400, 401, 431)
                ), token[:20]
        assert store.has("a", 1) and server.json("/health")[0] == 200


def odd_bytes() -> list[bytes]:
    return [b"%%%02X" % byte for byte in range(256) if chr(byte) != "a"] + [
        b"%",
        b"%G0",
        b"%C3%28",
        b"%ED%A0%80",
        b"..%2f..",
    ]


BAD_TOKENS = [
    b"-1",
    b"x",
    b"1.0",
    b"1e3",
    b"",
    b"%31%00",
    b"9223372036854775808",
    b"9" * 5000,
    b"%D9%A1",
    b"0x1",
    b"+1",
    b"1%20",
]


def bad_ranges(size: int) -> list[bytes]:
    bad = [
        b"bytes",
        b"bytes=",
        b"bytes=-",
        b"bytes=x-",
        b"bytes=5-1",
        b"bytes=--5",
        b"bytes=1-2-3",
        b"0-5",
        b"bytes=\xff-1",
    ]
    return [
        *bad,
        b"bytes=-0",
        b"bytes=%d-" % size,
        b"bytes=%s-" % (b"9" * 5000),
        b"bytes=" + b"1" * 50_000 + b"-x",
    ]


def test_a_client_that_leaves_in_the_middle_of_a_file_leaves_nothing_behind(
    store: SnapshotStore, eventually: Any
) -> None:
    store.save("a", 1, {"x": np.zeros(32 << 20, np.uint8)}).result(20)
    with served(store) as server:
        server.json("/health")
        before = descriptors()
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(b"GET /requests/a/snapshots/1 HTTP/1.1\r\nHost: x\r\n\r\n")
                connection.recv(1000)
        eventually(lambda: (gc.collect() and False) or descriptors() <= before)
        assert server.json("/health")[0] == 200


def test_a_disk_that_does_not_open_a_file_is_a_503_in_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapstore.asgi._source.OPEN_S", 0.1)
    files = FaultyFileSystem()
    store = SnapshotStore(root, file_system=files)
    with served(store) as server:
        store.save("a", 1, tensors(1)).result(10)
        with files.pause("open_read", ".safetensors") as gate:
            status, answer = server.json(at("a", "snapshots/1"))
            assert status == 503 and answer["type"] == "TimeoutError" and gate.reached
        files.fail("open_read", 13, ".safetensors")
        status, answer = server.json(at("a", "snapshots/1"))
        assert (status, answer["reason"]) == (503, "denied")
        assert server.get(at("a", "snapshots/1"))[0] == 200


# --- load ---


def test_10_000_requests_end_without_an_error_or_a_leak(store: SnapshotStore) -> None:
    store.save("a", 1, tensors(1, nbytes=2000)).result(10)
    paths = [
        "/health",
        "/stats",
        at("a"),
        at("a", "snapshots/1"),
        at("nobody"),
        "/metrics",
        at("a", "snapshots/1"),
    ]
    with served(store) as server:
        warm = load(server.port, paths, count=200)
        gc.collect()
        before = (descriptors(), len(gc.get_objects()), server.call(threads))
        result = load(server.port, paths, count=5_000)
        gc.collect()
        after = (descriptors(), len(gc.get_objects()), server.call(threads))
        assert warm["errors"] == result["errors"] == []
        assert len(result["latencies_s"]) == 10_000 and result["statuses"] == [200, 404]
        assert after[0] <= before[0] and after[2] <= max(before[2], 8), (before, after)
        assert after[1] - before[1] < 2_000, "objects that 10,000 requests left behind"


async def threads() -> int:
    import threading

    return len([each for each in threading.enumerate() if each.name.startswith("snapstore-aio")])


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


# --- serve ---


@pytest.fixture
def filled(root: Path) -> Path:
    with SnapshotStore(root) as store:
        for number in range(3):
            store.save("request <b>1</b>\n&é", number, tensors(number))
        store.save("second", 5, tensors(9))
    return root


@contextmanager
def served_root(root: Path) -> Iterator[Served]:
    app = create_root_app(root, interval_s=0.05)
    try:
        with serving(lambda: app) as server:
            yield server
    finally:
        app.state.close()


def test_a_root_is_served_read_only_beside_live_stores(filled: Path, eventually: Any) -> None:
    with served_root(filled) as server, SnapshotStore(filled, StoreOptions(leftovers="keep")) as live:
        info = live.save("live", 3, tensors(4)).result(10)
        eventually(lambda: server.json("/stats")[1]["request_count"] == 3)
        stats = server.json("/stats")[1]
        assert stats["snapshot_count"] == 5 and stats["disk_bytes"] > 0 and len(stats["history"]) > 1
        assert {row["owner"]["liveness"] for row in stats["sessions"]} == {"alive", "dead"}
        status, health = server.json("/health")
        assert (status, health["status"], health["reasons"]) == (200, "ok", [])
        assert [each["token_count"] for each in server.json(at("request <b>1</b>\n&é"))[1]["snapshots"]] == [
            0,
            1,
            2,
        ]
        assert server.get(at("live", "snapshots/3"))[2] == info.path.read_bytes()
        assert server.get(at("live", "snapshots/3"), Range="bytes=0-7")[2] == info.path.read_bytes()[:8]
        assert server.get(at("nobody"))[0] == server.get(at("live", "snapshots/4"))[0] == 404
        for path in ("/cleanup", at("live", "cleanup")):
            assert server.get(path, "POST", Authorization="Bearer x")[0] == 403
        names = {each.name for each in text_string_to_metric_families(server.get("/metrics")[2].decode())}
        assert {"snapstore_root_bytes", "snapstore_root_sessions"} <= names
    with pytest.raises(RootError):
        create_root_app(filled.parent)


def test_a_root_that_goes_away_is_dead_and_no_500(filled: Path, eventually: Any) -> None:
    with served_root(filled) as server:
        assert server.json("/health")[0] == 200
        shutil.rmtree(filled)
        eventually(lambda: server.json("/health")[0] == 503)
        assert server.json(at("second"))[0] == 503 and server.json("/stats")[0] == 200


@pytest.fixture
def serve_command(filled: Path) -> Iterator[str]:
    """The address of ``snapstore serve`` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "snapstore",
        "serve",
        str(filled),
        "--port",
        "0",
        "--interval",
        "1s",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors


def test_the_serve_command_listens_on_this_machine_only(serve_command: str) -> None:
    assert serve_command.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(serve_command + "health", timeout=10) as answer:
        assert json.load(answer)["status"] == "ok"
    with urllib.request.urlopen(serve_command, timeout=10) as answer:
        page = answer.read().decode()
    assert not re.search(r"(src|href)\s*=|url\(|@import", page), "the page has no external asset"


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")
def test_the_status_page_draws_itself_in_a_browser(serve_command: str, tmp_path: Path) -> None:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=4000", "--dump-dom", serve_command,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    page = done.stdout
    assert re.search(r'id="health"[^>]*data-status="ok"[^>]*>ok<', page), page[-3000:]
    assert "request &lt;b&gt;1&lt;/b&gt;" in page and "<b>1</b>" not in page, "ids are text, never HTML"
    figures = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page))
    assert (figures["sessions"], figures["requests"], figures["snapshots"]) == ("1", "2", "4")
    assert re.search(r'<polyline points="[\d.]+,[\d.]+ [\d., ]+"', page) and "second" in page
