"""What SGLang may expect of any storage backend; run against ours and against the engine's own file backend.

A class of tests has a fixture ``make``: ``make(**changes)`` gives a backend on the same folder each time, with these
changes to its configuration.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="SGLang's pages are torch's")

PAGE_SIZE = 4
WIDTH = 24


class HostPool:
    """A pool of pages in host memory, with the three methods that a backend may use."""

    def __init__(self, pages: int = 16, dtype: Any = None, page_size: int = PAGE_SIZE) -> None:
        self.page_size = page_size
        self.dtype = dtype or torch.bfloat16
        self.buffer = torch.zeros(pages * page_size, WIDTH, dtype=self.dtype)

    def fill(self, seed: int) -> None:
        self.buffer = torch.randn(self.buffer.shape, generator=torch.manual_seed(seed)).to(self.dtype)

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        page = self.buffer[index : index + self.page_size]
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> Any:
        return torch.zeros(self.page_size * WIDTH, dtype=self.dtype)

    def set_from_flat_data_page(self, index: int, data_page: Any) -> None:
        self.buffer[index : index + self.page_size] = data_page.reshape(self.page_size, WIDTH)

    def page(self, number: int) -> Any:
        return self.get_data_page(number * self.page_size)


def names() -> Any:
    """The engine's module: its own or the stand-in."""
    return importlib.import_module("sglang.srt.mem_cache.hicache_storage")


def config(extra: dict[str, Any], **changes: Any) -> Any:
    said: dict[str, Any] = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": False,
        "model_name": "org/Tiny-Hybrid", "extra_config": extra,
    }  # fmt: skip
    return names().HiCacheStorageConfig(**{**said, **changes})


def hashes(count: int, start: int = 0) -> list[str]:
    return [f"{number:064x}" for number in range(start, start + count)]


def indices(pages: list[int], page_size: int = PAGE_SIZE) -> Any:
    return torch.tensor([page * page_size + offset for page in pages for offset in range(page_size)])


def page_of(owner: str, number: int) -> tuple[str, Any]:
    """A key, and a page that no other key has."""
    key = hashlib.sha256(f"{owner} {number}".encode()).hexdigest()
    return key, torch.frombuffer(bytearray(key.encode()), dtype=torch.bfloat16)


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))


Make = Callable[..., Any]


class Contract:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8", "float8_e4m3fn", "int64"])
    def test_a_page_comes_back_bit_for_bit(self, make: Make, dtype: str) -> None:
        backend = make()
        page = torch.arange(128, dtype=torch.uint8).view(getattr(torch, dtype))
        target = torch.zeros(128, dtype=torch.uint8).view(getattr(torch, dtype))
        assert backend.set("a" * 64, page) is True
        assert backend.exists("a" * 64)
        assert backend.get("a" * 64, target) is target
        assert same(target, page)

    def test_what_is_not_there_is_none_and_the_target_is_as_it_was(self, make: Make) -> None:
        backend = make()
        target = torch.full((8,), 7.0)
        assert backend.get("b" * 64, target) is None
        assert torch.equal(target, torch.full((8,), 7.0))
        assert not backend.exists("b" * 64)

    def test_the_memory_of_a_page_may_be_used_again_after_set(self, make: Make) -> None:
        backend = make()
        page = torch.arange(1000.0)
        assert backend.set("a" * 64, page)
        page.zero_()
        assert same(backend.get("a" * 64, torch.zeros(1000)), torch.arange(1000.0))

    def test_a_page_that_is_there_is_not_changed_by_another_set(self, make: Make) -> None:
        backend = make()
        assert backend.set("a" * 64, torch.ones(8)) and backend.set("a" * 64, torch.ones(8))
        assert same(backend.get("a" * 64, torch.zeros(8)), torch.ones(8))

    def test_batches(self, make: Make) -> None:
        backend, keys = make(), hashes(6)
        pages = [torch.full((8,), float(number)) for number in range(6)]
        assert backend.batch_set(keys[:4], pages[:4]) is True
        found = backend.batch_get(keys, [torch.zeros(8) for _ in keys])
        assert [page is None for page in found] == [False] * 4 + [True] * 2
        assert all(same(one, other) for one, other in zip(found[:4], pages, strict=False))
        assert backend.batch_exists(keys) == 4
        assert backend.batch_exists(keys[4:]) == 0 == backend.batch_exists([])

    def test_a_prefix_ends_at_its_first_gap(self, make: Make) -> None:
        backend, keys = make(), hashes(6)
        for number in (0, 1, 3, 4):
            backend.set(keys[number], torch.ones(8))
        assert backend.batch_exists(keys) == 2
        assert backend.batch_exists(keys[3:]) == 2

    def test_pools_beside_the_kv_cache(self, make: Make) -> None:
        backend, keys = make(), hashes(4)
        kv, mamba = HostPool(), HostPool(dtype=torch.float32, page_size=1)
        self.register(backend, kv=kv, mamba=mamba)
        kv.fill(1), mamba.fill(2)
        stored = backend.batch_set_v2(
            [
                self.transfer("kv", keys, indices([0, 1, 2, 3])),
                self.transfer("mamba", keys[3:], indices([5], 1)),
            ]
        )
        assert stored == {"kv": [True] * 4, "mamba": [True]}
        kv_page, mamba_page = [kv.page(number).clone() for number in range(4)], mamba.page(5).clone()
        kv.fill(8), mamba.fill(9)
        loaded = backend.batch_get_v2(
            [
                self.transfer("kv", [*keys, "missing"], indices([9, 8, 7, 6, 5])),
                self.transfer("mamba", [keys[3], keys[2]], indices([0, 1], 1)),
            ]
        )
        assert loaded == {"kv": [True] * 4 + [False], "mamba": [True, False]}
        assert all(same(kv.page(9 - number), kv_page[number]) for number in range(4))
        assert same(mamba.page(0), mamba_page)

    def test_indices_that_do_not_fit_the_pages_move_nothing(self, make: Make) -> None:
        backend, keys = make(), hashes(2)
        self.register(backend, kv=HostPool())
        for wrong in (None, indices([0]), indices([0, 1, 2])):
            assert backend.batch_set_v2([self.transfer("kv", keys, wrong)]) == {"kv": [False, False]}
            assert backend.batch_get_v2([self.transfer("kv", keys, wrong)]) == {"kv": [False, False]}
        assert backend.batch_exists(keys) == 0

    @pytest.mark.parametrize(
        ("policy", "window", "kv", "other", "usable", "hits", "restorable"),
        [
            ("ALL_PAGES", 1, 6, [0, 1, 2, 3, 4, 5], 6, 6, [1, 2, 3, 4, 5, 6]),
            ("ALL_PAGES", 1, 6, [0, 1, 2, 4, 5], 3, 3, [1, 2, 3]),
            ("ALL_PAGES", 1, 4, [0, 1, 2, 3, 4, 5], 4, 4, [1, 2, 3, 4]),
            ("ALL_PAGES", 1, 6, [1, 2], 0, None, []),
            ("TRAILING_PAGES", 1, 6, [2, 4], 5, 5, [3, 5]),
            ("TRAILING_PAGES", 1, 4, [2, 4], 3, 3, [3]),
            ("TRAILING_PAGES", 1, 6, [], 0, None, []),
            ("TRAILING_PAGES", 2, 6, [1, 2, 4], 3, 3, [3]),
            ("TRAILING_PAGES", 3, 6, [0, 1], 2, 2, [1, 2]),
            ("TRAILING_PAGES", 1, 0, [0, 1], 0, None, []),
        ],
    )
    def test_how_long_a_prefix_every_pool_can_restore(
        self,
        make: Make,
        policy: str,
        window: int,
        kv: int,
        other: list[int],
        usable: int,
        hits: Any,
        restorable: Any,
    ) -> None:
        backend, keys = make(), hashes(6)
        pools = {"kv": HostPool(), "mamba": HostPool(page_size=1)}
        self.register(backend, **pools)
        if kv:
            backend.batch_set_v2([self.transfer("kv", keys[:kv], indices(list(range(kv))))])
        for number in other:
            backend.batch_set_v2([self.transfer("mamba", [keys[number]], indices([number], 1))])
        asked = self.transfer("mamba", keys[:window], None)
        asked.hit_policy = names().PoolHitPolicy[policy]
        result = backend.batch_exists_v2(keys, [asked])
        expected = ({"kv": kv} if kv else {}) | ({} if hits is None else {"mamba": hits})
        assert (result.kv_hit_pages, dict(result.extra_pool_hit_pages)) == (usable, expected)
        assert result.restorable_prefix_pages == restorable
        alone = backend.batch_exists_v2(keys)
        assert (alone.kv_hit_pages, alone.restorable_prefix_pages) == (kv, list(range(1, kv + 1)))

    def test_a_policy_that_is_not_supported_is_an_error(self, make: Make) -> None:
        backend, keys = make(), hashes(1)
        self.register(backend, kv=HostPool(), mamba=HostPool())
        backend.set(keys[0], torch.ones(8))
        asked = self.transfer("mamba", keys, None)
        asked.hit_policy = names().PoolHitPolicy.BLOCK_GROUPS
        with pytest.raises(ValueError, match="polic"):
            backend.batch_exists_v2(keys, [asked])

    def test_clear_forgets_every_page(self, make: Make) -> None:
        backend, keys = make(), hashes(4)
        assert backend.batch_set(keys, [torch.ones(8)] * 4)
        backend.clear()
        assert backend.batch_exists(keys) == 0 and backend.get(keys[0], torch.zeros(8)) is None
        assert backend.set(keys[0], torch.full((8,), 2.0))
        assert same(backend.get(keys[0], torch.zeros(8)), torch.full((8,), 2.0))

    def test_the_next_server_finds_the_pages(self, make: Make) -> None:
        backend, keys = make(), hashes(4)
        pages = [torch.full((8,), float(number)) for number in range(4)]
        assert backend.batch_set(keys, pages)
        self.close(backend)
        again = make()
        assert again.batch_exists(keys) == 4
        found = again.batch_get(keys, [torch.zeros(8) for _ in keys])
        assert all(same(one, other) for one, other in zip(found, pages, strict=True))

    def test_another_model_and_another_rank_find_nothing(self, make: Make) -> None:
        first = make()
        assert first.set("a" * 64, torch.ones(8))
        self.close(first)
        for change in (
            {"model_name": "org/Other"},
            {"tp_rank": 1, "tp_size": 2},
            {"pp_rank": 1, "pp_size": 2},
        ):
            other = make(**change)
            assert not other.exists("a" * 64), change

    def register(self, backend: Any, **pools: HostPool) -> None:
        for name, pool in pools.items():
            backend.register_mem_host_pool_v2(pool, names().PoolName(name))

    def transfer(self, name: str, keys: list[str], host_indices: Any) -> Any:
        return names().PoolTransfer(name=names().PoolName(name), keys=keys, host_indices=host_indices)

    def close(self, backend: Any) -> None:
        if hasattr(backend, "close"):
            backend.close()


class Servers:
    """Processes with a backend each, all of the same configuration. See ``sglang_process``."""

    def __init__(self, *arguments: str) -> None:
        self._command = [sys.executable, str(Path(__file__).with_name("sglang_process.py")), *arguments]
        self._running: list[subprocess.Popen[str]] = []

    def start(self) -> Server:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._running.append(subprocess.Popen(self._command, text=True, **pipes))
        return Server(self._running[-1])

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._running:
            process.kill()
            process.communicate()


class Server:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def says(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def __call__(self, order: str) -> Any:
        """Give an order, and await the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self.says()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class TwoServers:
    """What two servers on one folder may expect of ours; a fixture ``servers`` starts them."""

    def test_neither_touches_the_others_pages_and_each_goes_on_after_a_restart(
        self, servers: Servers
    ) -> None:
        one, two = servers.start(), servers.start()
        assert one.says() == two.says() == "ready"
        for server, order in [
            (one, "set one 6"),
            (two, "set two 6"),
            (one, "set both 3"),
            (two, "set both 3"),
        ]:
            assert all(server(order))
        assert one("flush") and two("flush")
        assert not any(one("has two 6")) and not any(two("has one 6"))
        assert all(one("has one 6")) and all(two("has two 6"))
        assert all(one("has both 3")) and all(two("has both 3"))
        one("close"), one.kill()
        one = servers.start()
        assert one.says() == "ready"
        assert all(one("has one 6")) and all(one("has both 3")), "what it left it goes on with"
        assert not any(one("has two 6")), "and with nothing that has an owner"
        assert all(two("has two 6")) and all(two("has both 3"))
        assert one("clear") is True
        assert not any(one("has one 6")) and not any(one("has both 3"))
        assert all(two("has two 6")) and all(two("has both 3"))
        two.kill()
        two = servers.start()
        assert two.says() == "ready"
        assert all(two("has two 6")) and all(two("has both 3")), "killed, it lost nothing that was on disk"
        assert all(two("set more 3")) and all(one("set more 3"))
        assert all(two("has more 3")) and all(one("has more 3"))
        for server in (one, two):
            server("close")
