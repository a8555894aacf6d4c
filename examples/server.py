"""The life of a request inside a FastAPI server, with ``snapstore.aio``: nothing here waits for a disk on the loop.

    python examples/server.py /var/tmp/engine 8000
    curl -N localhost:8000/requests/alice --json '{"prompt": [1, 2, 3], "max_tokens": 20}'    # a token a line
    curl -X DELETE localhost:8000/requests/alice
    curl localhost:8000/snapstore/metrics

A request is admitted when there is a place, begins at the longest saved prefix that it shares with an earlier one, and
is fed in chunks on a thread; its state is saved at each boundary. Deleted, or its client gone, it is forgotten. When
the server stops (uvicorn does so at SIGTERM), the store's session goes with it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from tiny_hybrid import State, TinyHybrid

from snapstore import SnapstoreError
from snapstore.aio import AsyncSnapshotStore
from snapstore.asgi import create_app

PLACES = 4
"""Requests at once; others wait."""
CHUNK = 8
BLOCK = 16


@dataclass(eq=False)
class Life:
    """One request: its tokens, and whether somebody has aborted it."""

    tokens: list[int]
    aborted: bool = False
    skipped: int = 0


@dataclass
class Engine:
    """A model and a store, shared by all requests. All of it runs on the event loop, but ``_feed``."""

    model: TinyHybrid
    store: AsyncSnapshotStore
    known: dict[str, Life] = field(default_factory=dict)
    running: dict[str, Life] = field(default_factory=dict)
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PLACES))

    async def generate(
        self, request_id: str, prompt: Sequence[int], max_tokens: int
    ) -> AsyncGenerator[int, None]:
        """Tokens as they come. If it is closed, cancelled or aborted before the end, the request is forgotten."""
        await self.abort(request_id)
        life = self.running[request_id] = Life(list(prompt))
        finished = False
        try:
            async with self.places:
                async for token in self._tokens(request_id, life, len(prompt) + max_tokens):
                    yield token
            finished = not life.aborted
        finally:
            if self.running.get(request_id) is life:
                del self.running[request_id]
                if finished:
                    self.known[request_id] = life
                else:
                    await self.store.cleanup_request(request_id)

    async def abort(self, request_id: str) -> None:
        """Forget a request, whatever it is doing. The marks are made before the first await."""
        self.known.pop(request_id, None)
        life = self.running.pop(request_id, None)
        if life is not None:
            life.aborted = True
        await self.store.cleanup_request(request_id)

    async def _tokens(self, request_id: str, life: Life, most: int) -> AsyncGenerator[int, None]:
        state, done = await self._begin(life)
        while len(life.tokens) < most and not life.aborted:
            count = min(CHUNK, len(life.tokens) - done, BLOCK - done % BLOCK)
            following = await asyncio.to_thread(self._feed, life.tokens[done : done + count], state)
            done += count
            if life.aborted:
                return
            if done % BLOCK == 0:
                await self._save(request_id, done, state)
            if done == len(life.tokens):
                life.tokens.append(following)
                yield following

    async def _begin(self, life: Life) -> tuple[State, int]:
        """The state to begin with: of the longest saved prefix, or of nothing."""
        found = []
        for donor, other in self.known.items():
            equal = takewhile(
                lambda pair: pair[0] == pair[1], zip(life.tokens[:-1], other.tokens, strict=False)
            )
            found.append((await self.store.latest(donor, at_most=sum(1 for _ in equal)) or 0, donor))
        for boundary, donor in sorted(found, reverse=True):
            if boundary:
                try:
                    snapshot = await self.store.load(donor, boundary)
                except SnapstoreError:
                    continue  # forgotten meanwhile, not written, or damaged: the next best
                life.skipped = boundary
                return {name: tensor[None] for name, tensor in snapshot.tensors.items()}, boundary
        return self.model.empty(1), 0

    def _feed(self, tokens: Sequence[int], state: State) -> int:
        following = torch.zeros(1, dtype=torch.int64)
        for token in tokens:
            following = self.model.step(torch.tensor([token]), torch.tensor([True]), state)
        return int(following)

    async def _save(self, request_id: str, done: int, state: State) -> None:
        try:
            await self.store.save(request_id, done, {name: tensor[0] for name, tensor in state.items()})
        except SnapstoreError as error:
            sys.stderr.write(f"{request_id} goes on without a boundary at {done}: {error}\n")


class Asked(BaseModel):
    """The body of a request."""

    prompt: list[int]
    max_tokens: int


def application(root: str) -> FastAPI:
    """The server; the store is opened when it starts, and ends, files and all, when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncSnapshotStore(root) as store:
            app.state.engine = Engine(TinyHybrid(), store)
            app.mount("/snapstore", create_app(store))  # /snapstore/health, /snapstore/metrics, ...
            try:
                yield
            finally:
                await store.shutdown(cleanup=True)

    app = FastAPI(lifespan=lifespan)

    @app.post("/requests/{request_id}")
    async def generate(request_id: str, asked: Asked) -> StreamingResponse:
        """A line a token."""
        return StreamingResponse(lines(app.state.engine, request_id, asked), media_type="text/plain")

    @app.delete("/requests/{request_id}", status_code=204)
    async def abort(request_id: str) -> None:
        await app.state.engine.abort(request_id)

    @app.get("/")
    async def look() -> dict[str, Any]:
        """How the store is, what is saved, and how many tokens each request did not have to compute."""
        engine: Engine = app.state.engine
        lives = {**engine.known, **engine.running}
        saved = {name: await engine.store.boundaries(name) for name in lives}
        skipped = {name: life.skipped for name, life in lives.items()}
        return {"status": engine.store.health().status, "boundaries": saved, "skipped": skipped}

    return app


async def lines(engine: Engine, request_id: str, asked: Asked) -> AsyncIterator[str]:
    """Closed when the client has gone, and with it the request."""
    async with aclosing(engine.generate(request_id, asked.prompt, asked.max_tokens)) as tokens:
        async for token in tokens:
            yield f"{token}\n"


if __name__ == "__main__":
    import uvicorn

    torch.set_num_threads(1)  # the model is too small to share out
    uvicorn.run(application(sys.argv[1]), port=int(sys.argv[2]), timeout_graceful_shutdown=5)
