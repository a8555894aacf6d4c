"""What vLLM may expect of any secondary tier; run against ours and against the engine's own file-system tier.

A class of tests has a fixture ``make``: ``make(view, **config)`` gives a tier on the same folder each time.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

Make = Callable[..., Any]

ROW = 4096
"""Bytes of a row: a page, as direct I/O wants it."""


def names(module: str = "tiering.base") -> Any:
    """A module of the engine: its own or the stand-in."""
    return importlib.import_module(f"vllm.v1.kv_offload.{module}")


def view(rows: int = 16, seed: int | None = None) -> memoryview:
    """The primary tier's memory, as vLLM gives it: rows of signed bytes, at an address that is a page's."""
    area = np.zeros(rows * ROW + ROW, np.int8)
    start = -area.ctypes.data % ROW
    made = area[start : start + rows * ROW].reshape(rows, ROW)
    if seed is not None:
        made[:] = np.random.default_rng(seed).integers(-128, 128, made.shape, dtype=np.int8)
    return memoryview(made)


def row(memory: memoryview, number: int) -> bytes:
    return bytes(memory.cast("B")[number * ROW : (number + 1) * ROW])


def spec(model: str = "org/Tiny-Hybrid") -> Any:
    """As much of an ``OffloadingSpec`` as tiers look at."""
    parallel = SimpleNamespace(
        rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, is_parallelism_agnostic=True
    )
    config = SimpleNamespace(
        groups=(SimpleNamespace(tokens_per_block=16, layer_names=("layer.0",), group_id=0),),
        model=SimpleNamespace(name=model, dtype="bfloat16"),
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=parallel,
        replicated_layout=False,
        canonical_layout=False,
        kv_cache_layout=None,
    )
    events = SimpleNamespace(enable_kv_cache_events=False)
    return SimpleNamespace(config=config, blocks_per_chunk=1, extra_config={}, kv_events_config=events)


def keys(count: int, start: int = 0, group: int = 0) -> list[bytes]:
    """A block's hash and its group, as ``make_offload_key`` packs them."""
    return [number.to_bytes(32, "big") + group.to_bytes(4, "big") for number in range(start, start + count)]


REQUEST = SimpleNamespace(req_id="request-1", kv_transfer_params=None)


def job(number: int, wanted: list[bytes], rows: list[int], *, load: bool = False) -> Any:
    return names().TransferJob(number, wanted, np.array(rows, dtype=np.int64), load, REQUEST)


def finished(tier: Any, *numbers: int, timeout_s: float = 10.0) -> dict[int, Any]:
    """Poll as the scheduler does, until these jobs have ended."""
    results: dict[int, Any] = {}
    deadline_s = time.monotonic() + timeout_s
    while not results.keys() >= set(numbers):
        assert time.monotonic() < deadline_s, f"only {sorted(results)} of {numbers} ended"
        results.update((each.job_id, each) for each in tier.get_finished_jobs())
        time.sleep(0.001)
    return results


def store(tier: Any, number: int, wanted: list[bytes], rows: list[int]) -> Any:
    tier.submit_store(job(number, wanted, rows))
    return finished(tier, number)[number]


def load(tier: Any, number: int, wanted: list[bytes], rows: list[int]) -> Any:
    tier.submit_load(job(number, wanted, rows, load=True))
    return finished(tier, number)[number]


def look(tier: Any, key: bytes) -> str:
    """What ``lookup`` says in the end: a tier may ask for another step."""
    deadline_s = time.monotonic() + 10
    while (found := tier.lookup(key, REQUEST)).name == "RETRY":
        assert time.monotonic() < deadline_s
        tier.on_schedule_end(None)
        time.sleep(0.001)
    if hasattr(tier, "on_request_finished"):
        tier.on_request_finished(REQUEST)
    return str(found.name)


class Contract:
    def test_rows_come_back_bit_for_bit_wherever_they_are_wanted(self, make: Make) -> None:
        memory = view(16, seed=1)
        tier, wanted = make(memory), keys(4)
        expected = [row(memory, number) for number in range(16)]
        assert store(tier, 1, wanted, [3, 1, 2, 0]).success
        result = load(tier, 2, wanted, [8, 9, 10, 11])
        assert result.success and result.transfer_bytes == 4 * ROW and result.transfer_time >= 0
        assert [row(memory, number) for number in range(8, 12)] == [expected[each] for each in (3, 1, 2, 0)]
        assert [row(memory, each) for each in (*range(8), *range(12, 16))] == [
            expected[each] for each in (*range(8), *range(12, 16))
        ]

    def test_what_was_stored_is_found_and_nothing_else(self, make: Make) -> None:
        tier = make(view(4, seed=1))
        assert look(tier, keys(1)[0]) == "MISS"
        assert store(tier, 1, keys(2), [0, 1]).success
        assert [look(tier, key) for key in keys(3)] == ["HIT", "HIT", "MISS"]
        assert look(tier, keys(1, group=1)[0]) == "MISS"

    def test_a_job_that_fails_in_part_says_which_rows_were_filled(self, make: Make) -> None:
        memory = view(8, seed=1)
        tier, wanted = make(memory), keys(3)
        first, untouched = row(memory, 0), row(memory, 6)
        assert store(tier, 1, wanted[:2], [0, 1]).success
        result = load(tier, 2, wanted, [4, 5, 6])
        assert not result.success and list(result.successful_keys) == wanted[:2]
        assert row(memory, 4) == first and row(memory, 6) == untouched
        result = load(tier, 3, wanted[2:], [7])
        assert not result.success and not result.successful_keys

    def test_what_is_there_is_stored_again_without_harm(self, make: Make) -> None:
        memory = view(4, seed=1)
        tier, expected = make(memory), row(memory, 0)
        assert store(tier, 1, keys(1), [0]).success and store(tier, 2, keys(2), [0, 1]).success
        assert load(tier, 3, keys(1), [3]).success and row(memory, 3) == expected

    def test_many_jobs_at_once_end_once_each(self, make: Make) -> None:
        memory = view(64, seed=1)
        tier, wanted = make(memory), keys(64)
        expected = [row(memory, number) for number in range(64)]
        for number in range(16):
            rows = list(range(4 * number, 4 * number + 4))
            tier.submit_store(job(number, wanted[rows[0] : rows[-1] + 1], rows))
        results = finished(tier, *range(16))
        assert len(results) == 16 and all(each.success for each in results.values())
        np.asarray(memory)[:] = 0
        for number in range(16):
            rows = list(range(4 * number, 4 * number + 4))
            tier.submit_load(job(100 + number, wanted[rows[0] : rows[-1] + 1], rows, load=True))
        assert all(each.success for each in finished(tier, *range(100, 116)).values())
        assert [row(memory, number) for number in range(64)] == expected
        assert list(tier.get_finished_jobs()) == []

    def test_after_drain_every_result_is_there(self, make: Make) -> None:
        memory = view(32, seed=1)
        tier = make(memory)
        for number in range(32):
            tier.submit_store(job(number, keys(1, number), [number]))
        tier.drain_jobs()
        assert sorted(each.job_id for each in tier.get_finished_jobs()) == list(range(32))

    def test_the_next_server_finds_the_rows(self, make: Make) -> None:
        memory = view(8, seed=1)
        tier, expected = make(memory), [row(memory, number) for number in range(4)]
        assert store(tier, 1, keys(4), [0, 1, 2, 3]).success
        tier.shutdown()
        other = view(8)
        again = make(other)
        assert [look(again, key) for key in keys(5)] == ["HIT"] * 4 + ["MISS"]
        assert load(again, 1, keys(4), [4, 5, 6, 7]).success
        assert [row(other, number) for number in range(4, 8)] == expected

    def test_another_model_finds_nothing(self, make: Make) -> None:
        assert store(make(view(4, seed=1)), 1, keys(1), [0]).success
        assert look(make(view(4), offloading_spec=spec("org/Other")), keys(1)[0]) == "MISS"

    def test_a_new_request_asks_for_blocks_as_they_come(self, make: Make) -> None:
        context = make(view(1)).on_new_request(REQUEST)
        assert context == names("base").RequestOffloadingContext()

    def test_an_empty_job_ends_well(self, make: Make) -> None:
        assert store(make(view(1)), 1, [], []).success
