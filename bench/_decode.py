"""The device workload's loop like decoding: what saves cost the steps beside them."""

from __future__ import annotations

import time
from typing import Any

from bench._gpu import PATIENCE_S, Measured, as_case, cuda_tensors, warm_store
from bench._measure import LIMIT, SNAPSTORE, percentile
from bench._work import MiB
from snapstore import SnapshotStore

_EVERY = 16


class Decoder:
    """One graph a step, of two passes over weights that fill the memory bus; then its result comes to the host."""

    def __init__(self, layers: int) -> None:
        import torch

        self._weights = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
        self._state = torch.randn(8, 8192, device="cuda", dtype=torch.bfloat16)
        self._token = torch.zeros(8, device="cuda", dtype=torch.int64)
        self._answer = torch.zeros(8, dtype=torch.int64).pin_memory()
        self._done = torch.cuda.Event()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._forward()

    def begin(self) -> None:
        """Launch a step."""
        self._graph.replay()
        self._answer.copy_(self._token, non_blocking=True)
        self._done.record()

    def end(self) -> None:
        """Await its result."""
        self._done.synchronize()

    def _forward(self) -> None:
        import torch

        hidden = self._state
        for weight in self._weights + self._weights:
            hidden = torch.nn.functional.normalize(hidden @ weight, dim=-1)
        self._token.copy_(hidden.argmax(dim=-1))


def jitter(quick: bool) -> Measured:
    """Steps of about 4 ms; with every sixteenth, 16 MB are saved, after its launch and before its result."""
    steps, blocks = (320, 2) if quick else (1024, 4)
    decoder = Decoder(layers=16 if quick else 56)
    snapshot = cuda_tensors(48, 16 * MiB)
    every: dict[str, list[float]] = {LIMIT: [], SNAPSTORE: []}
    saving: dict[str, list[float]] = {LIMIT: [], SNAPSTORE: []}
    tails: dict[str, list[float]] = {LIMIT: [], SNAPSTORE: []}
    with warm_store(1024 * MiB) as store:
        for block in range(-1, blocks):
            for name, saver in ((LIMIT, None), (SNAPSTORE, store)):
                took_s = _decode(decoder, saver, snapshot, steps if block >= 0 else 128)
                if block >= 0:
                    every[name] += took_s
                    saving[name] += took_s[::_EVERY]
                    tails[name].append(percentile(took_s, 0.99))
                store.cleanup_request("decode")
                store.flush(PATIENCE_S)
    ratio = percentile(every[SNAPSTORE], 0.99) / percentile(every[LIMIT], 0.99)
    print(f"  p99 of a step with saves over without: {ratio:.4f} (goal <= 1.02)", flush=True)
    yield as_case("a step of a decode-like loop (limit: without saves)", every)
    yield as_case("its p99, by block of steps (limit: without saves)", tails, "x limit <= 1.02")
    yield as_case("the steps that save (limit: the same steps without)", saving)


def _decode(
    decoder: Decoder, store: SnapshotStore | None, snapshot: dict[str, Any], count: int
) -> list[float]:
    took_s = []
    for number in range(count):
        started_s = time.perf_counter()
        decoder.begin()
        if store is not None and number % _EVERY == 0:
            store.save("decode", number % 64, snapshot)
        decoder.end()
        took_s.append(time.perf_counter() - started_s)
    return took_s
