"""A small scheduler over a tiny hybrid model: the main job of snapstore, to read and to copy from.

    python -m snapstore.demo                    # torch and transformers
    python -m snapstore.demo --backend mlx      # mlx and mlx-lm

Requests are prefilled block by block and their caches are saved at each block's end. One is aborted while its save is
in flight. Another shares a prefix with an earlier one, resumes from that one's latest boundary, and skips the tokens.
The models are random and tiny; nothing is downloaded. The exit code is 1 if anything is not as promised.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import snapstore
from snapstore.caches import capture, restore

BLOCK = 64
"""Tokens between two boundaries."""


@dataclass
class Model:
    """What the scheduler needs of a model: an empty cache, and a step that feeds tokens through it."""

    name: str
    new_cache: Callable[[], Any]
    step: Callable[[Sequence[int], Any], bytes]
    """Feed tokens, update the cache in place; the bytes of the last logits."""


@dataclass
class Figures:
    """What the table at the end shows."""

    prefilled: int = 0
    skipped: int = 0
    save_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)


class Scheduler:
    """Prefill in blocks, save at each boundary, resume from a boundary, forget on abort."""

    def __init__(self, model: Model, store: snapstore.SnapshotStore) -> None:
        self.model = model
        self.store = store
        self.figures = Figures()

    def prefill(
        self, request_id: str, tokens: Sequence[int], *, like: str | None = None
    ) -> tuple[Any, bytes]:
        """Cache and last logits of a prompt; ``like`` names an earlier request whose tokens it may begin with."""
        cache, start = self.resume(like, len(tokens) - 1) if like else (self.model.new_cache(), 0)
        logits = b""
        for begin in range(start, len(tokens), BLOCK):
            block = tokens[begin : begin + BLOCK]
            logits = self.model.step(block, cache)
            self.figures.prefilled += len(block)
            self.save(request_id, begin + len(block), cache)
        return cache, logits

    def resume(self, request_id: str, at_most: int) -> tuple[Any, int]:
        """The cache at the largest boundary that is saved, and how many tokens it stands for."""
        boundary = self.store.latest(request_id, at_most=at_most)
        if boundary is None:
            return self.model.new_cache(), 0
        began = time.perf_counter()
        snapshot = self.store.load(request_id, boundary)
        self.figures.load_s.append(time.perf_counter() - began)
        self.figures.skipped += boundary
        return restore(snapshot, self.model.new_cache()), boundary

    def save(self, request_id: str, token_count: int, cache: Any) -> snapstore.SaveTicket:
        """Take the boundary. When ``save`` returns, the model may overwrite the cache."""
        tensors, metadata = capture(cache)
        began = time.perf_counter()
        ticket = self.store.save(request_id, token_count, tensors, metadata=metadata)
        self.figures.save_s.append(time.perf_counter() - began)
        return ticket

    def decode(self, cache: Any, first: bytes, count: int) -> list[bytes]:
        """Logits of ``count`` steps; which token comes next is drawn from the bytes of the last ones."""
        logits = [first]
        for _ in range(count):
            logits.append(self.model.step([sum(logits[-1][:64]) % 100], cache))
        return logits


def run(model: Model, root: Path) -> bool:
    """The story, then the table. True if everything was as promised."""
    store = snapstore.SnapshotStore(root)
    scheduler = Scheduler(model, store)
    dice = random.Random(7)  # noqa: S311 - prompts, not secrets
    prompt = [dice.randrange(100) for _ in range(4 * BLOCK)]

    # Two requests run to their end; their boundaries stay for those who begin alike.
    for name in ("alice", "bob"):
        tokens = prompt if name == "alice" else prompt[::-1]
        cache, logits = scheduler.prefill(name, tokens)
        scheduler.decode(cache, logits, 4)

    # One is aborted in the middle of its prefill, with its last save still on its way to the disk.
    cache = model.new_cache()
    model.step(prompt[:BLOCK], cache)
    aborted = scheduler.save("carol", BLOCK, cache)
    forgotten = store.cleanup_request("carol").clean and not store.has("carol", BLOCK)

    # One begins with three blocks of alice's, and then goes its own way.
    tokens = prompt[: 3 * BLOCK] + [dice.randrange(100) for _ in range(BLOCK)]
    cache, logits = scheduler.prefill("dave", tokens, like="alice")
    resumed = scheduler.decode(cache, logits, 4)
    alone = Scheduler(model, store)
    cache, logits = alone.prefill("dave, from nothing", tokens)
    identical = resumed == alone.decode(cache, logits, 4)

    written = store.flush(30)
    stats = store.stats()
    report = store.shutdown(cleanup=True)
    left = sum(path.is_file() for path in root.rglob("*")) - 1  # but the root's marker
    figures = scheduler.figures
    milliseconds = sorted(1000 * seconds for seconds in figures.save_s)
    show(
        ("model", model.name),
        ("tokens prefilled, skipped", f"{figures.prefilled}, {figures.skipped}"),
        ("snapshots saved", f"{stats.accepted} ({stats.committed} written, {stats.cancelled} cancelled)"),
        ("bytes saved", f"{stats.accepted_bytes / 2**20:.1f} MiB"),
        (
            "save p50, p99",
            f"{milliseconds[len(milliseconds) // 2]:.2f}, {quantiles(milliseconds, n=100)[98]:.2f} ms",
        ),
        ("load", f"{1000 * max(figures.load_s):.2f} ms"),
        ("aborted request", f"{aborted.state.value}, {'forgotten' if forgotten else 'STILL THERE'}"),
        ("logits identical", "yes" if identical else "NO"),
        ("files left", str(left)),
    )
    return identical and forgotten and written and report.clean and left == 0 and figures.skipped == 3 * BLOCK


def show(*rows: tuple[str, str]) -> None:
    """A table of two columns."""
    for name, value in rows:
        sys.stdout.write(f"{name:<28}{value}\n")


def torch_model() -> Model:
    """A random Falcon-H1 (attention and Mamba side by side) of two layers, in torch."""
    import torch
    from transformers import DynamicCache, FalconH1Config, FalconH1ForCausalLM

    torch.manual_seed(0)
    config = FalconH1Config(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
        mamba_chunk_size=16,
    )  # fmt: skip
    model = FalconH1ForCausalLM(config).eval()

    @torch.inference_mode()
    def step(tokens: Sequence[int], cache: Any) -> bytes:
        logits = model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True).logits[0, -1]
        return bytes(logits.numpy().tobytes())

    return Model("Falcon-H1, 2 layers, torch", lambda: DynamicCache(config=config), step)


def mlx_model() -> Model:
    """A random Falcon-H1 of two layers, in MLX."""
    import mlx.core as mx
    from mlx_lm.models import falcon_h1
    from mlx_lm.models.cache import make_prompt_cache

    mx.random.seed(0)
    config = falcon_h1.ModelArgs(
        model_type="falcon_h1", vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16,
    )  # fmt: skip
    model = falcon_h1.Model(config)
    mx.eval(model.parameters())

    def step(tokens: Sequence[int], cache: Any) -> bytes:
        logits = model(mx.array([list(tokens)]), cache=cache)[0, -1]
        mx.eval(logits)
        return bytes(memoryview(logits.astype(mx.float32)))

    return Model("Falcon-H1, 2 layers, MLX", lambda: make_prompt_cache(model), step)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: ``--backend torch`` or ``mlx``."""
    parser = argparse.ArgumentParser(prog="snapstore.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--backend", choices=("torch", "mlx"), default="torch", help="framework of the tiny model"
    )
    backend = parser.parse_args(arguments).backend
    with tempfile.TemporaryDirectory(prefix="snapstore-demo-") as folder:
        as_promised = run(mlx_model() if backend == "mlx" else torch_model(), Path(folder) / "root")
    sys.stdout.write("Everything is as promised.\n" if as_promised else "NOT as promised: see above.\n")
    return 0 if as_promised else 1


if __name__ == "__main__":
    sys.exit(main())
