"""A continuous-batching scheduler around ``SnapshotStore``, to read and to copy from.

    python examples/scheduler.py

Every step admits what there is room for and feeds each running request: a chunk of its prompt, or one token. At every
``BLOCK`` tokens the state is saved, which is one copy: the model overwrites it in the next step. A request begins where
the longest prefix that it shares with another one was saved; one that is preempted is queued again under the same id
and goes on where it was; one that is aborted is forgotten, at any moment. SIGTERM ends the engine.
"""

from __future__ import annotations

import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from tiny_hybrid import State, TinyHybrid

from snapstore import SnapshotStore, SnapstoreError, StoreClosedError
from snapstore.signals import install_sigterm_handler

SLOTS = 4
"""Requests in the batch at once."""
CHUNK = 8
"""Tokens of a prompt that one step feeds, so that a long one does not hold up those who decode."""
BLOCK = 16
"""Tokens between two boundaries."""
KEEP = 8
"""Finished requests whose boundaries are kept for those who begin alike."""


@dataclass(eq=False)
class Request:
    """One request. ``tokens`` is the prompt and what was generated; ``done`` of them are in the state."""

    id: str
    prompt: Sequence[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    slot: int | None = None
    done: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def finished(self) -> bool:
        """Nothing more is to be generated."""
        return len(self.output) >= self.max_tokens


class Scheduler:
    """One batch of slots over one model and one store. All methods on one thread, also from ``on_token``."""

    def __init__(
        self, model: TinyHybrid, store: SnapshotStore, on_token: Callable[[Request], None] = lambda _: None
    ) -> None:
        self.model, self.store, self.on_token = model, store, on_token
        self.state: State = model.empty(SLOTS)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.known: dict[str, Request] = {}  # whose boundaries the store may have, the oldest first
        self.stopping = False

    # -- what a server calls ------------------------------------------------------------------------------------

    def submit(self, request_id: str, prompt: Sequence[int], max_tokens: int) -> Request:
        """Queue a request. An id may be used again: what an earlier one left is forgotten first."""
        self.abort(request_id)
        request = Request(request_id, prompt, max_tokens)
        self.waiting.append(request)
        return request

    def abort(self, request_id: str) -> None:
        """Forget a request, whatever it is doing. From here on its boundaries are nobody's prefix."""
        self.known.pop(request_id, None)
        self.waiting = deque(each for each in self.waiting if each.id != request_id)
        for request in [each for each in self.running.values() if each.id == request_id]:
            self._leave(request)
        self.store.cleanup_request(request_id)

    def preempt(self, request_id: str) -> None:
        """Take a running request out of the batch; it is next in the queue, under its id, and loses nothing."""
        for request in [each for each in self.running.values() if each.id == request_id]:
            self._save(request)
            self._leave(request)
            self.waiting.appendleft(request)

    def reset(self) -> None:
        """Drop every request and every boundary."""
        self.waiting.clear()
        for request in [*self.running.values()]:
            self._leave(request)
        self.known.clear()
        self.store.cleanup_all()

    # -- the engine's loop --------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until there is nothing to do, or the store is being shut down."""
        while (self.waiting or self.running) and not self.stopping:
            self.step()

    def step(self) -> None:
        """Admit, then feed every running request its share."""
        while self.waiting and len(self.running) < SLOTS:
            self._admit(self.waiting.popleft())
        share = {
            slot: (request, min(CHUNK, len(request.tokens) - request.done))
            for slot, request in self.running.items()
        }
        for turn in range(CHUNK):
            fed = [
                request for request, tokens in share.values() if turn < tokens and request.slot is not None
            ]
            if not fed:
                return
            self._feed(fed)

    def _admit(self, request: Request) -> None:
        """Give it a slot, and the state of the longest prefix that is saved: its own, or another's."""
        slot = min(set(range(SLOTS)) - self.running.keys())
        self.running[slot] = request
        request.slot, request.done = slot, 0
        self._place(request, self.model.empty(1))
        donors = [(self._boundary(request, each), each.id) for each in (request, *self.known.values())]
        self.known[request.id] = request
        for boundary, donor in sorted(donors, reverse=True):
            if boundary and self._resume(request, donor, boundary):
                return

    def _boundary(self, request: Request, donor: Request) -> int:
        """The largest boundary of ``donor`` within the tokens that both begin with; one is left to feed at least."""
        equal = takewhile(
            lambda pair: pair[0] == pair[1], zip(request.tokens[:-1], donor.tokens, strict=False)
        )
        shared = sum(1 for _ in equal)
        return self.store.latest(donor.id, at_most=shared) or 0

    def _resume(self, request: Request, donor: str, boundary: int) -> bool:
        try:
            snapshot = self.store.load(donor, boundary)
        except SnapstoreError:
            return False  # it could not be written, or is damaged: the next best, or from the beginning
        self._place(request, {name: tensor[None] for name, tensor in snapshot.tensors.items()})
        request.done = boundary
        request.skipped += boundary
        return True

    def _place(self, request: Request, state: State) -> None:
        for name, tensor in state.items():
            self.state[name][request.slot] = tensor[0]

    def _feed(self, fed: list[Request]) -> None:
        """One token for each of them, in one batch; then boundaries, new tokens, and who is done."""
        tokens = torch.zeros(SLOTS, dtype=torch.int64)
        active = torch.zeros(SLOTS, dtype=torch.bool)
        for request in fed:
            tokens[request.slot], active[request.slot] = request.tokens[request.done], True
        following = self.model.step(tokens, active, self.state).tolist()
        for request in fed:
            request.done += 1
            if request.done % BLOCK == 0:
                self._save(request)
        for (
            request
        ) in fed:  # after the books are right: what a token sets off may abort or preempt any of them
            if request.slot is not None and request.done == len(request.tokens):
                request.tokens.append(following[request.slot])
                if request.finished:
                    self._finish(request)
                self.on_token(request)

    def _save(self, request: Request) -> None:
        """Take the boundary. When ``save`` returns the state may be overwritten; the disk is somebody else's affair."""
        state = {name: tensor[request.slot] for name, tensor in self.state.items()}
        try:
            self.store.save(request.id, request.done, state)
        except StoreClosedError:
            self.stopping = True
        except SnapstoreError as error:
            sys.stderr.write(f"{request.id} goes on without a boundary at {request.done}: {error}\n")

    def _finish(self, request: Request) -> None:
        """Its boundaries stay, as long as it is among the latest."""
        self._leave(request)
        finished = [each.id for each in self.known.values() if each.slot is None and each.finished]
        for oldest in finished[:-KEEP]:
            self.known.pop(oldest)
            self.store.cleanup_request(oldest, timeout_s=0)

    def _leave(self, request: Request) -> None:
        if request.slot is not None:
            self.running.pop(request.slot)
            request.slot = None


def main() -> int:
    """Requests that begin alike, one that is aborted and one that is preempted; then the figures."""
    torch.set_num_threads(1)  # the model is too small to share out
    with tempfile.TemporaryDirectory(prefix="snapstore-scheduler-") as folder:
        store = SnapshotStore(Path(folder) / "root")
        with install_sigterm_handler(store):
            scheduler = Scheduler(TinyHybrid(), store)
            prompt = [(7 * i + i * i) % 64 for i in range(96)]
            scheduler.submit("alice", prompt, 16)
            scheduler.run()
            requests = [scheduler.submit(f"request-{n}", [*prompt[: 16 * n], n], 16) for n in range(1, 7)]
            scheduler.step()
            scheduler.abort("request-2")
            scheduler.preempt("request-3")
            scheduler.run()
            for request in requests:
                sys.stdout.write(f"{request.id}: skipped {request.skipped:3} tokens, then {request.output}\n")
            sys.stdout.write(f"{store.stats().committed + store.stats().pending} boundaries are saved\n")
        return 0 if store.shutdown(cleanup=True).clean else 1


if __name__ == "__main__":
    sys.exit(main())
