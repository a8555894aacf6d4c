"""README's Python, run as it stands but for the folder; and the words that it says of the code."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import tensors
from remotes import new_memory_url, warm_up

from snapstore import SnapshotStore, StoreOptions
from snapstore._reasons import FAILED, REJECTED
from snapstore.testing import FaultyFileSystem

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def _client() -> None:
    warm_up()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run("def prefill", name=value)``: the block with this in it, given these names; what it defines."""

    def run(mark: str, **given: Any) -> dict[str, Any]:
        (block,) = [block for block in BLOCKS if mark in block]
        defined = {"__name__": "readme", **given}
        exec(compile(block.replace("/var/tmp", str(tmp_path)), f"README: {mark}", "exec"), defined)
        return defined

    return run


def test_every_block_is_run_here() -> None:
    marks = set(re.findall(r'run\(\s*"([^"]+)"', Path(__file__).read_text()))
    assert [block for block in BLOCKS if sum(mark in block for mark in marks) != 1] == []


def test_the_scheduler_saves_resumes_and_forgets(run: Run) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    fed: list[int] = []

    def step(tokens: list[int], cache: Any) -> None:
        fed.append(len(tokens))
        states = torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1)
        cache.update(states, -states, 0)

    readme = run("def prefill", step=step)
    store, prompt = readme["store"], list(range(3000))
    try:
        for name, shared in [("alice", 0), ("bob", 2500)]:
            readme["prefill"](
                SimpleNamespace(id=name, tokens=prompt), transformers.DynamicCache(), "alice", shared
            )
        assert fed == [1024, 1024, 952, 952]
        assert store.boundaries("alice") == (1024, 2048, 3000) and store.boundaries("bob") == (3000,)
        one, other = (store.load(name, 3000).tensors for name in ("alice", "bob"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        readme["abort"](SimpleNamespace(id="alice"))
        assert store.boundaries("alice") == () and not store.has("alice", 3000)
    finally:
        assert store.shutdown(cleanup=True).clean


def test_the_drop_in_for_omlx_is_where_it_says(run: Run) -> None:
    pytest.importorskip("mlx")
    readme = run("compat.omlx import")
    assert {"BoundarySnapshotSSDStore", "reset_boundary_snapshot_root"} <= readme.keys()


def test_blocks_are_put_and_got(run: Run) -> None:
    content = memoryview(bytearray(b"a block"))
    blocks = run("BlockStore(", key="key", memoryview=content)["blocks"]
    content[:] = bytes(7)
    assert blocks.get_into("key", content) and bytes(content) == b"a block"
    blocks.shutdown(cleanup=True)


def test_another_node_loads_what_one_has_saved(run: Run, tmp_path: Path) -> None:
    url = new_memory_url()
    with SnapshotStore(tmp_path / "other", StoreOptions(remote=url)) as other:
        assert other.save("request", 1024, tensors(1)).wait_published(5)
    readme = run(
        "request.id, remote=True",
        SnapshotStore=SnapshotStore,
        StoreOptions=lambda **options: StoreOptions(**{**options, "remote": url}),
        request=SimpleNamespace(id="request"),
    )
    assert (readme["start"], readme["snapshot"].source) == (1024, "remote")
    readme["store"].shutdown()


def test_the_server_forgets_and_shows_its_store(run: Run) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    app = run("FastAPI(")["app"]

    async def story() -> None:
        transport = httpx.ASGITransport(app=app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            store = app.state.store
            await (await store.save("alice", 1, tensors(1)))
            assert (await client.get("http://e/snapstore/requests/alice/snapshots/1")).status_code == 200
            assert (await client.delete("http://e/requests/alice")).json() == {"clean": True}
            assert not await store.has("alice", 1)
            assert (await client.post("http://e/snapstore/cleanup")).status_code == 401
            bearer = {"Authorization": "Bearer secret"}
            assert (await client.post("http://e/snapstore/cleanup", headers=bearer)).status_code == 200
            assert (await client.get("http://e/snapstore/health")).json()["status"] == "ok"

    asyncio.run(story())


def test_metrics_and_a_handler_see_what_fails(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    monkeypatch.setattr(prometheus, "REGISTRY", registry)
    log = logging.getLogger("snapstore")
    monkeypatch.setattr(log, "handlers", log.handlers[:])
    paged: list[tuple[str, str]] = []
    files = FaultyFileSystem()
    with SnapshotStore(root, file_system=files) as store:
        run("class Pager", store=store, page=lambda *said: paged.append(said))
        files.fail("write", errno.ENOSPC, ".tmp")
        assert store.save("alice", 1, tensors(1)).exception(10)
        assert registry.get_sample_value("snapstore_saves_failed_total", {"reason": "no_space"}) == 1
    ((message, event),) = paged
    assert event == "save_failed" and message.startswith("save_failed (no_space)")


def test_every_reason_is_named() -> None:
    failed, rejected = re.search(  # type: ignore[union-attr]
        r"of a failed save (.*?); of one that was not\s+accepted (.*?)\. ", README, re.DOTALL
    ).groups()
    assert tuple(re.findall(r"`(\w+)`", failed)) == FAILED
    assert tuple(re.findall(r"`(\w+)`", rejected)) == REJECTED
