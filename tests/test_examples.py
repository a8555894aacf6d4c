"""The examples do what they say: the same tokens as a model alone, whatever is aborted, preempted, reset or stopped."""

from __future__ import annotations

import asyncio
import errno
import importlib
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import files_below

from snapstore import SnapshotStore
from snapstore.testing import FaultyFileSystem

torch = pytest.importorskip("torch", reason="the examples' model is in torch")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPT = [(7 * i + i * i) % 64 for i in range(96)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small to share out: on a busy machine that takes forty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``example("scheduler")``: the module, as it is when run from its own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def model(example: Any) -> Any:
    return example("tiny_hybrid").TinyHybrid()


@pytest.fixture
def scheduler(example: Any, model: Any, store: SnapshotStore) -> Any:
    return example("scheduler").Scheduler(model, store)


def alone(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """What the model says without a batch, a chunk, a boundary or a store."""
    state, tokens = model.empty(1), list(prompt)
    done = 0
    while len(tokens) < len(prompt) + max_tokens:
        following = model.step(torch.tensor([tokens[done]]), torch.tensor([True]), state)
        done += 1
        if done == len(tokens):
            tokens.append(int(following))
    return tokens[len(prompt) :]


def count_fed(model: Any) -> list[int]:
    """A list that grows by the number of active slots at each step of the model."""
    fed: list[int] = []
    step = model.step

    def counting(tokens: Any, active: Any, state: Any) -> Any:
        fed.append(int(active.sum()))
        return step(tokens, active, state)

    model.step = counting
    return fed


def test_requests_in_one_batch_get_what_each_would_get_alone(scheduler: Any, model: Any) -> None:
    prompts = {f"request-{n}": [n, *PROMPT[n : 5 * n + 3]] for n in range(11)}
    requests = {name: scheduler.submit(name, prompt, 20) for name, prompt in prompts.items()}
    scheduler.run()
    assert {name: each.output for name, each in requests.items()} == {
        name: alone(model, prompt, 20) for name, prompt in prompts.items()
    }


def test_a_long_prompt_does_not_hold_up_who_decodes(scheduler: Any, model: Any) -> None:
    short = scheduler.submit("short", [1, 2, 3], 100)
    scheduler.step()
    assert len(short.output) == 1
    long = scheduler.submit("long", PROMPT, 4)
    for step in range(1, 12):
        scheduler.step()
        assert (len(short.output), long.done) == (1 + step, 8 * step)


def test_a_request_begins_where_the_longest_shared_prefix_was_saved(scheduler: Any, model: Any) -> None:
    scheduler.submit("alice", PROMPT, 8)
    scheduler.submit("bob", PROMPT[:40], 8)
    scheduler.run()
    fed = count_fed(model)
    for length, expected in [(15, 0), (16, 0), (17, 16), (47, 32), (48, 32), (49, 48), (96, 80)]:
        fed.clear()
        request = scheduler.submit(f"carol-{length}", [*PROMPT[:length]], 4)
        scheduler.run()
        assert request.skipped == expected, length
        assert sum(fed) == length - expected + 3
        assert request.output == alone(model, PROMPT[:length], 4)
        scheduler.abort(request.id)
    other = scheduler.submit("dave", [*PROMPT[:33], 63, *PROMPT[34:]], 4)
    scheduler.run()
    assert other.skipped == 32


def test_a_preempted_request_goes_on_where_it_was(scheduler: Any, model: Any) -> None:
    request = scheduler.submit("alice", PROMPT, 12)
    fed = count_fed(model)
    for _ in range(5):
        scheduler.step()
    assert request.done == 40
    scheduler.preempt("alice")
    assert request.slot is None and scheduler.store.boundaries("alice") == (16, 32, 40)
    for _ in range(8):
        scheduler.step()
    scheduler.preempt("alice")
    assert len(request.output) > 0
    scheduler.run()
    assert sum(fed) == 96 + 11
    assert request.output == alone(model, PROMPT, 12)


def test_preempted_by_the_token_of_another_in_the_same_step(scheduler: Any, model: Any) -> None:
    def act(request: Any) -> None:
        if request.id == "first" and len(request.output) in (3, 9):
            scheduler.preempt("second")
            scheduler.preempt("first")

    scheduler.on_token = act
    first, second = scheduler.submit("first", [1, 2], 20), scheduler.submit("second", [3, 4], 20)
    scheduler.run()
    assert first.output == alone(model, [1, 2], 20)
    assert second.output == alone(model, [3, 4], 20)


def test_an_aborted_request_leaves_nothing_and_its_id_begins_anew(
    scheduler: Any, model: Any, store: SnapshotStore, files: FaultyFileSystem
) -> None:
    gate = files.pause("rename", ".safetensors")
    scheduler.submit("alice", PROMPT, 4)
    for _ in range(4):
        scheduler.step()
    gate.wait_reached()
    store_cleanup = store.cleanup_request
    store.cleanup_request = lambda name, timeout_s=0.05: store_cleanup(name, timeout_s=0.05)  # type: ignore[method-assign]
    scheduler.abort("alice")
    assert store.boundaries("alice") == () and not scheduler.running
    other = [5, *PROMPT[:40]]
    again = scheduler.submit("alice", other, 4)
    scheduler.run()
    gate.open()
    assert again.skipped == 0 and again.output == alone(model, other, 4)
    assert store.boundaries("alice") == (16, 32)
    assert store.flush(10)
    assert store.boundaries("alice") == (16, 32)


def test_a_reset_forgets_everything(scheduler: Any, model: Any, store: SnapshotStore) -> None:
    for n in range(6):
        scheduler.submit(f"request-{n}", PROMPT[n:], 4)
    for _ in range(5):
        scheduler.step()
    scheduler.reset()
    assert not scheduler.waiting and not scheduler.running and store.stats().live_snapshots == 0
    request = scheduler.submit("request-0", PROMPT, 4)
    scheduler.run()
    assert request.skipped == 0 and request.output == alone(model, PROMPT, 4)


def test_only_the_latest_finished_requests_keep_their_boundaries(
    scheduler: Any, store: SnapshotStore, example: Any
) -> None:
    for n in range(12):
        scheduler.submit(f"request-{n}", [n, *PROMPT[:20]], 2)
        scheduler.run()
    kept = [n for n in range(12) if store.boundaries(f"request-{n}")]
    assert kept == list(range(12 - example("scheduler").KEEP, 12))


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_the_tokens_are_right_and_nothing_is_left(
    scheduler: Any, model: Any, store: SnapshotStore, seed: int
) -> None:
    dice = random.Random(seed)
    requests: dict[str, Any] = {}

    def disturb(request: Any = None) -> None:
        name = f"request-{dice.randrange(8)}"
        match dice.randrange(40):
            case 0:
                scheduler.abort(name)
                requests.pop(name, None)
            case 1 | 2 | 3:
                scheduler.preempt(name)
            case 4:
                if dice.random() < 0.2:
                    scheduler.reset()
                    for gone in [name for name, each in requests.items() if not each.finished]:
                        del requests[gone]

    scheduler.on_token = disturb
    for _ in range(40):
        name = f"request-{dice.randrange(8)}"
        shared = dice.randrange(64)
        prompt = [*PROMPT[:shared], *(dice.randrange(64) for _ in range(1 + dice.randrange(20)))]
        requests[name] = scheduler.submit(name, prompt, 1 + dice.randrange(12))
        for _ in range(dice.randrange(6)):
            scheduler.step()
            disturb()
    scheduler.on_token = lambda request: None
    scheduler.run()
    assert requests
    for request in requests.values():
        assert request.output == alone(model, list(request.prompt), request.max_tokens), request.id
    assert store.flush(10)
    assert store.stats().live_snapshots == sum(len(store.boundaries(name)) for name in scheduler.known)
    scheduler.reset()
    assert store.stats().live_requests == 0


def test_a_damaged_boundary_is_passed_over(scheduler: Any, model: Any, store: SnapshotStore) -> None:
    scheduler.submit("short", PROMPT[:36], 1)
    scheduler.submit("long", PROMPT[:90], 1)
    scheduler.run()
    assert store.flush(10)
    (damaged,) = store.session.glob("*/80.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x99")
    request = scheduler.submit("next", PROMPT, 4)
    scheduler.run()
    assert request.skipped == 32 and request.output == alone(model, PROMPT, 4)


def test_a_full_disk_costs_boundaries_and_no_request(
    scheduler: Any, model: Any, store: SnapshotStore, files: FaultyFileSystem
) -> None:
    files.fail("write", errno.ENOSPC, ".tmp", times=float("inf"))
    request = scheduler.submit("alice", PROMPT, 4)
    scheduler.run()
    assert store.flush(10)
    assert store.boundaries("alice") == ()
    again = scheduler.submit("bob", PROMPT, 4)
    scheduler.run()
    assert request.output == again.output == alone(model, PROMPT, 4) and again.skipped == 0


def test_the_engine_stops_when_its_store_is_shut_down(scheduler: Any, store: SnapshotStore) -> None:
    def stop(request: Any) -> None:
        if len(request.output) == 5:
            assert store.shutdown(cleanup=True).clean

    scheduler.on_token = stop
    request = scheduler.submit("alice", [1, 2, 3], 1_000_000)
    scheduler.run()
    assert scheduler.stopping and 5 <= len(request.output) < 40


# --- as programs ---


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=EXAMPLES
    )


def test_the_scheduler_runs_as_a_program() -> None:
    with start("scheduler.py") as process:
        out, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (0, "")
    assert "request-6: skipped  96 tokens" in out and out.count("then [") == 6


FOREVER = """
import sys
from scheduler import Scheduler
from snapstore import SnapshotStore
from snapstore.signals import install_sigterm_handler
from tiny_hybrid import TinyHybrid

store = SnapshotStore(sys.argv[1])
with install_sigterm_handler(store, grace_s=10):
    def say(request):
        print(request.id, len(request.output), store.session, flush=True)
    scheduler = Scheduler(TinyHybrid(), store, say)
    for n in range(6):
        scheduler.submit(f"request-{n}", list(range(40)), 1_000_000)
    scheduler.run()
    print("stopped", scheduler.stopping, flush=True)
    sys.stdin.read()
"""


def test_sigterm_ends_the_engine_and_its_session(root: Path) -> None:
    command = [sys.executable, "-c", FOREVER, str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=EXAMPLES, **pipes) as process:  # type: ignore[call-overload]
        for _ in range(100):
            session = Path(process.stdout.readline().split()[2])
        assert session.exists()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert not session.exists()


# --- the server ---


@asynccontextmanager
async def served(example: Any, root: Path) -> AsyncIterator[tuple[Any, Any]]:
    """A client of the application in this very process, and its engine."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    app = example("server").application(str(root))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            yield client, app.state.engine


def announced(store: Any) -> asyncio.Event:
    """Set when the store has taken another save."""
    event, save = asyncio.Event(), store.save

    async def announcing(*args: Any) -> Any:
        ticket = await save(*args)
        event.set()
        return ticket

    store.save = announcing
    return event


def ask(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"json": {"prompt": prompt, "max_tokens": max_tokens}}


def test_the_server_answers_and_shares_prefixes(example: Any, model: Any, root: Path) -> None:
    async def story() -> None:
        async with served(example, root) as (client, engine):
            answer = await client.post("/requests/alice", **ask(PROMPT, 6))
            assert [int(line) for line in answer.text.split()] == alone(model, PROMPT, 6)
            prompts = {f"bob-{n}": PROMPT[: 30 + 10 * n] for n in range(6)}
            answers = await asyncio.gather(
                *(client.post(f"/requests/{name}", **ask(prompt, 6)) for name, prompt in prompts.items())
            )
            for each, prompt in zip(answers, prompts.values(), strict=True):
                assert [int(line) for line in each.text.split()] == alone(model, prompt, 6)
            seen = (await client.get("/")).json()
            assert seen["status"] == "ok" and seen["boundaries"]["alice"] == [16, 32, 48, 64, 80, 96]
            assert seen["skipped"]["alice"] == 0 and seen["skipped"]["bob-4"] == 64
            assert (await client.post("/requests/carol", json={"prompt": "?"})).status_code == 422
            assert (await client.get("/snapstore/health")).json()["status"] == "ok"
            assert "snapstore_saves_accepted_total" in (await client.get("/snapstore/metrics")).text
            assert (await client.delete("/requests/alice")).status_code == 204
            assert await engine.store.boundaries("alice") == ()
            session = engine.store.store.session
        assert not session.exists()

    asyncio.run(story())


def test_a_request_that_is_deleted_or_closed_while_it_runs_is_forgotten(
    example: Any, model: Any, root: Path
) -> None:
    async def story() -> None:
        async with served(example, root) as (client, engine):
            tokens = engine.generate("alice", PROMPT, 1_000_000)
            for _ in range(30):
                await anext(tokens)
            assert len(await engine.store.boundaries("alice")) == 7
            await client.delete("/requests/alice")
            assert [each async for each in tokens] == []
            assert await engine.store.boundaries("alice") == ()

            tokens = engine.generate("bob", PROMPT, 1_000_000)
            await anext(tokens)
            await tokens.aclose()
            assert await engine.store.boundaries("bob") == ()

            saving = announced(engine.store)
            waiting = asyncio.ensure_future(client.post("/requests/carol", **ask(PROMPT, 1_000_000)))
            await asyncio.wait_for(saving.wait(), 20)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert await engine.store.boundaries("carol") == () and not engine.running
            assert await engine.store.flush(10)
            assert engine.store.stats().live_requests == 0

    asyncio.run(story())


def test_the_same_id_again_takes_the_place_of_the_one_that_runs(example: Any, model: Any, root: Path) -> None:
    async def story() -> None:
        async with served(example, root) as (client, engine):
            first = engine.generate("alice", PROMPT, 1_000_000)
            await anext(first)
            answer = await client.post("/requests/alice", **ask(PROMPT[1:40], 4))
            assert [int(line) for line in answer.text.split()] == alone(model, PROMPT[1:40], 4)
            assert [each async for each in first] == []
            assert await engine.store.boundaries("alice") == (16, 32)

    asyncio.run(story())


def test_a_hung_disk_holds_up_no_answer(
    example: Any, model: Any, root: Path, files: FaultyFileSystem
) -> None:
    aio = pytest.importorskip("snapstore.aio")
    pytest.importorskip("fastapi")

    async def story(store: SnapshotStore) -> None:
        engine = example("server").Engine(model, aio.AsyncSnapshotStore(store))
        got = [each async for each in engine.generate("alice", PROMPT, 6)]
        assert got == alone(model, PROMPT, 6)
        again = [each async for each in engine.generate("bob", PROMPT, 6)]
        assert again == got and engine.known["bob"].skipped == 80
        gate.open()
        await engine.store.shutdown(cleanup=True)

    store = SnapshotStore(root, file_system=files)
    with files.pause("create", ".tmp") as gate:
        asyncio.run(story(store))


def test_the_server_runs_as_a_program_forgets_who_hangs_up_and_ends_at_sigterm(
    root: Path, model: Any, eventually: Any
) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with start("server.py", str(root), str(port)) as process:
        drained = threading.Thread(target=process.stderr.read)  # type: ignore[union-attr]
        drained.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                eventually(lambda: answers(client), timeout_s=30)
                text = client.post("/requests/alice", **ask(PROMPT, 6)).text
                assert [int(line) for line in text.split()] == alone(model, PROMPT, 6)
                with client.stream("POST", "/requests/bob", **ask(PROMPT, 1_000_000)) as stream:
                    lines = stream.iter_lines()
                    for _ in range(20):
                        next(lines)
                eventually(lambda: list(client.get("/").json()["boundaries"]) == ["alice"], timeout_s=20)
            (session,) = [path for path in root.iterdir() if not path.name.startswith(".")]
            eventually(lambda: len(files_below(session)) == 6)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        finally:
            process.kill()
            drained.join()
    assert not session.exists()
    assert [path.name for path in root.iterdir()] == [".snapstore"]


def answers(client: Any) -> bool:
    import httpx

    try:
        return bool(client.get("/").json()["status"] == "ok")
    except httpx.TransportError:
        return False
