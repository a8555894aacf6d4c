"""mlx-lm 0.31, whose caches have a ``state`` and a ``meta_state`` of strings: captured as 0.32, and exchanged with it.

The classes here are those of the installed mlx-lm with what 0.31.3 has in their place, so that both can be tested in
one process. (All other tests of this folder also pass with mlx-lm 0.31.3 itself.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", exc_type=ImportError)
pytest.importorskip("mlx_lm")

from mlx_lm.models import cache as mlx_cache  # noqa: E402
from taken import same, taken  # noqa: E402

from snapstore import caches  # noqa: E402


class RotatingKVCache(mlx_cache.RotatingKVCache):
    @property
    def state(self) -> Any:
        if self.offset < self.keys.shape[2]:
            return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]
        return self.keys, self.values

    @state.setter
    def state(self, v: Any) -> None:
        self.keys, self.values = v

    @property
    def meta_state(self) -> Any:
        return tuple(map(str, (self.keep, self.max_size, self.offset, self._idx)))

    @meta_state.setter
    def meta_state(self, v: Any) -> None:
        self.keep, self.max_size, self.offset, self._idx = map(int, v)


class ArraysCache(mlx_cache.ArraysCache):
    @property
    def state(self) -> Any:
        return self.cache

    @state.setter
    def state(self, v: Any) -> None:
        self.cache = v

    @property
    def meta_state(self) -> Any:
        return ""


class BatchRotatingKVCache(mlx_cache.BatchRotatingKVCache):
    @property
    def state(self) -> Any:
        k, v = self.keys, self.values
        if self._offset < k.shape[2]:
            k, v = k[..., : self._offset, :], v[..., : self._offset, :]
        return k, v, self.offset, self.left_padding

    @state.setter
    def state(self, v: Any) -> None:
        self.keys, self.values, self.offset, self.left_padding = v

    @property
    def meta_state(self) -> Any:
        return tuple(map(str, (self.max_size, self._offset, self._idx, self.rotated)))

    @meta_state.setter
    def meta_state(self, v: Any) -> None:
        self.max_size, self._offset, self._idx = map(int, v[:3])
        self.rotated = bool(v[3])  # bool("False"): 0.31 itself restores a batch that never rotated as rotated


class CacheList(mlx_cache.CacheList):
    @property
    def state(self) -> Any:
        return [c.state for c in self.caches]

    @property
    def meta_state(self) -> Any:
        return [type(c).__name__ for c in self.caches], [c.meta_state for c in self.caches]


class Old:
    """mlx_lm.models.cache as 0.31 has it."""

    RotatingKVCache = RotatingKVCache
    ArraysCache = ArraysCache
    BatchRotatingKVCache = BatchRotatingKVCache
    CacheList = CacheList


@pytest.fixture(autouse=True)
def known_by_their_names() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RotatingKVCache", "ArraysCache", "BatchRotatingKVCache", "CacheList"):
            patch.setattr(getattr(Old, name), "__module__", "mlx_lm.models.cache")
        yield


def fresh(version: Any) -> list[Any]:
    pair = version.CacheList(version.ArraysCache(2), version.RotatingKVCache(8, keep=2))
    return [pair, version.RotatingKVCache(8), version.BatchRotatingKVCache(8, [1, 0])]


def feed(cache: list[Any], count: int) -> list[Any]:
    (arrays, rotating), *others = cache[0].caches, *cache[1:]
    arrays[1] = mx.random.normal((1, count))
    given = [mx.random.normal((batch, 1, count, 4)) for batch in (1, 1, 2)]
    return [layer.update_and_fetch(x, x) for layer, x in zip((rotating, *others), given, strict=True)]


def after(version: Any, *counts: int) -> list[Any]:
    mx.random.seed(1)
    cache = fresh(version)
    for count in counts:
        feed(cache, count)
    return cache


@pytest.mark.parametrize("counts", [(), (3,), (3, 4, 6), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("captured", [Old, mlx_cache], ids=["from 0.31", "from 0.32"])
@pytest.mark.parametrize("passed", [Old, mlx_cache], ids=["to 0.31", "to 0.32"])
def test_a_cache_moves_within_a_version_and_between_them(captured: Any, passed: Any, counts: Any) -> None:
    live = after(captured, *counts)
    cache = caches.restore(taken(live), fresh(passed))
    assert same([vars(layer) for layer in cache[1:]], [vars(layer) for layer in live[1:]])
    for step in (1, 4, 1):
        mx.random.seed(step)
        expected = feed(live, step)
        mx.random.seed(step)
        assert same(feed(cache, step), expected)


def test_nothing_is_lost_as_in_the_librarys_own_round_trip() -> None:
    live = after(Old, 3)[2]
    own = Old.BatchRotatingKVCache(8, [1, 0])
    own.state, own.meta_state = live.state, live.meta_state
    assert own.rotated is True  # this is why the table lists attributes instead
    assert caches.restore(taken([live]), [Old.BatchRotatingKVCache(8, [1, 0])])[0].rotated is False
