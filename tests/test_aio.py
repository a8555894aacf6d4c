"""``snapstore.aio``: the verbs as coroutines, what they wait for, and what a cancelled await leaves behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_at_rest, assert_same, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from snapstore import (
    SaveCancelledError,
    SaveFailedError,
    SnapshotKey,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreClosedError,
    StoreFullError,
    StoreOptions,
)
from snapstore.aio import THREADS, AsyncSnapshotStore
from snapstore.aio._turnstile import Turnstile
from snapstore.testing import FakeDevice, FaultyFileSystem

PATIENCE_S = 10.0


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main(), 30)

    asyncio.run(bounded())


@asynccontextmanager
async def opened(
    root: Path, files: FaultyFileSystem | None = None, *, threads: int = THREADS, **options: Any
) -> AsyncIterator[AsyncSnapshotStore]:
    """A store with faults; at the end it is well again and leaves nothing."""
    store = SnapshotStore(root, StoreOptions(**options), file_system=files)
    shared = AsyncSnapshotStore(store, threads=threads)
    try:
        yield shared
    finally:
        if files is not None:
            files.heal()
        report = await shared.shutdown(cleanup=True)
        assert report.clean and report.session_removed, report


async def reached(gate: Any) -> None:
    """Without a thread: the gate is looked at between other things of the loop."""
    for _ in range(10_000):
        if gate.reached:
            return
        await asyncio.sleep(0.001)
    raise AssertionError("no thread reached the gate")


def descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))


# --- the verbs ---


def test_every_verb_does_what_the_store_s_own_does(root: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncSnapshotStore(root, StoreOptions(max_pending_jobs=4)) as store:
            value = tensors(1)
            ticket = await store.save("a", 64, value, metadata={"n": 1})
            info = await ticket
            assert info.key == SnapshotKey("a", 64) and await store.has("a", 64)
            loaded = await store.load("a", 64)
            assert_same(loaded, value)
            assert loaded.metadata == {"n": 1} and loaded.source == "disk"
            await (await store.save("a", 128, tensors(2)))
            assert await store.boundaries("a") == (64, 128)
            assert (await store.latest("a"), await store.latest("a", at_most=100)) == (128, 64)
            assert await store.flush(5) and await store.drain_request("a", timeout_s=5)
            target = await store.detach("a", 128, tmp_path / "out")
            assert target.exists() and await store.boundaries("a") == (64,)
            assert b"".join([chunk async for chunk in store.stream(info.key)]) == info.path.read_bytes()
            assert store.health().status == "ok" and store.stats().committed == 2
            report = await store.cleanup_request("a")
            assert report.clean and report.removed == 1 and not info.path.exists()
            await (await store.save("b", 1, tensors(3)))
            assert (await store.cleanup_all()).removed == 1
            report = await store.shutdown(cleanup=True)
            assert report.clean and report.session_removed
            with pytest.raises(StoreClosedError):
                await store.save("c", 1, tensors(4))
            assert store.health().status == "dead"

    run(main)


def test_it_wraps_an_open_store_and_two_live_on_one_loop(root: Path, tmp_path: Path) -> None:
    async def main() -> None:
        mine = SnapshotStore(root)
        async with AsyncSnapshotStore(mine) as first, AsyncSnapshotStore(tmp_path / "two") as second:
            assert first.store is mine
            await (await first.save("a", 1, tensors(1)))
            await (await second.save("a", 1, tensors(2)))
            assert_same(await first.load("a", 1), tensors(1))
            assert_same(await second.load("a", 1), tensors(2))
            assert (await first.cleanup_all()).removed == 1 and await second.has("a", 1)
        assert mine.health().status == "dead"

    run(main)


def test_bad_arguments_are_refused_before_anything_happens(root: Path) -> None:
    with pytest.raises(ValueError, match="options"):
        AsyncSnapshotStore(SnapshotStore.__new__(SnapshotStore), StoreOptions())
    for threads, error in ((0, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="threads"):
            AsyncSnapshotStore(root, threads=threads)  # type: ignore[arg-type]
    unopened = AsyncSnapshotStore(root)
    with pytest.raises(StoreClosedError, match="not open"):
        unopened.stats()

    async def main() -> None:
        async with opened(root) as store:
            for bad in ({"chunk_bytes": 0}, {"start": -1}, {"stop": -1}):
                with pytest.raises(ValueError, match=next(iter(bad))):
                    store.stream(SnapshotKey("a", 1), **bad)
            with pytest.raises(TypeError):
                await store.save(7, 1, tensors())  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="timeout_s"):
                await store.cleanup_request("a", timeout_s=-1)

    run(main)


def test_errors_keep_their_type_and_their_data(root: Path, files: FaultyFileSystem) -> None:
    async def main() -> None:
        async with opened(root, files) as store:
            with pytest.raises(SnapshotNotFoundError) as caught:
                await store.load("nobody", 7)
            assert caught.value.key == SnapshotKey("nobody", 7)
            with pytest.raises(SnapshotNotFoundError):
                await store.stream(SnapshotKey("nobody", 7)).open()
            files.fail("write", errno.ENOSPC, ".tmp")
            ticket = await store.save("a", 1, tensors(1))
            with pytest.raises(SaveFailedError) as failed:
                await ticket
            assert (
                isinstance(failed.value.__cause__, OSError) and failed.value.__cause__.errno == errno.ENOSPC
            )
            with pytest.raises(SaveFailedError):
                await store.load("a", 1)

    run(main)


# --- waiting for room ---


def test_saves_wait_for_room_in_their_order_without_a_thread(root: Path, files: FaultyFileSystem) -> None:
    async def main() -> None:
        async with opened(root, files, max_pending_jobs=1, save_timeout_s=20) as store:
            order: list[int] = []
            gate = files.pause("rename", ".safetensors")

            async def save(number: int) -> None:
                await store.save("a", number, tensors(number))
                order.append(number)

            tasks = [asyncio.create_task(save(number)) for number in range(20)]
            await reached(gate)
            assert order == [0] and store.stats().pending == 1
            gate.open()
            await asyncio.gather(*tasks)
            assert order == list(range(20)) and store.threads == 0
            assert await store.flush(5)

    run(main)


def test_a_full_store_says_so_in_time_with_its_figures(root: Path, files: FaultyFileSystem) -> None:
    async def main() -> None:
        async with opened(root, files, max_pending_jobs=1, save_timeout_s=0.05) as store:
            with files.pause("rename", ".safetensors") as gate:
                await store.save("a", 1, tensors(1))
                await reached(gate)
                results = await asyncio.gather(
                    *(store.save("b", n, tensors(n)) for n in range(5)), return_exceptions=True
                )
                assert all(isinstance(error, StoreFullError) for error in results)
                assert all(0.05 <= error.waited_s < 2 and error.pending_jobs == 1 for error in results)
                assert store.stats().rejected == 5 and not await store.boundaries("b")
            assert await store.flush(5)
        async with opened(root, files, max_pending_jobs=1, on_full="reject") as store:
            with files.pause("rename", ".safetensors"):
                await store.save("a", 1, tensors(1))
                with pytest.raises(StoreFullError):
                    await store.save("a", 2, tensors(1))

    run(main)


def test_a_cleanup_ends_the_wait_for_room_and_a_cancelled_one_leaves_nothing(
    root: Path, files: FaultyFileSystem
) -> None:
    async def main() -> None:
        async with opened(root, files, max_pending_jobs=1, save_timeout_s=20) as store:
            with files.pause("rename", ".safetensors") as gate:
                await store.save("a", 1, tensors(1))
                await reached(gate)
                forgotten = asyncio.create_task(store.save("b", 1, tensors(2)))
                given_up = asyncio.create_task(store.save("c", 1, tensors(3)))
                patient = asyncio.create_task(store.save("d", 1, tensors(4)))
                await asyncio.sleep(0)
                await store.cleanup_request("b", timeout_s=0)
                given_up.cancel()
                with pytest.raises(SaveCancelledError):
                    await forgotten
                with pytest.raises(asyncio.CancelledError):
                    await given_up
                assert store.stats().rejected == 2 and store.stats().live_requests == 2
            await (await patient)
            assert await store.boundaries("c") == ()

    run(main)


# --- threads that hang ---


def test_calls_that_hang_cost_no_more_threads_than_the_bound_and_starve_nobody(
    root: Path, files: FaultyFileSystem
) -> None:
    async def main() -> None:
        async with opened(root, files, threads=3) as store:
            await (await store.save("a", 1, tensors(1)))
            with files.pause("read_into", ".safetensors", times=math.inf) as gate:
                hung = [asyncio.create_task(store.load("a", 1)) for _ in range(20)]
                await reached(gate)
                for _ in range(100):
                    await asyncio.sleep(0.01)
                    if store.threads == 3:
                        break
                assert store.threads == 3 and not any(task.done() for task in hung)
                await (await store.save("b", 1, tensors(2)))
                assert await store.flush(5) and await store.drain_request("b", timeout_s=5)
                assert (await store.cleanup_request("b")).clean
                with pytest.raises(TimeoutError):
                    await store.detach("a", 1, root.parent / "out", timeout_s=0.05)
                for task in hung[10:]:
                    task.cancel()
                await asyncio.wait(hung[10:], timeout=PATIENCE_S)
                assert store.threads == 3
            for task in hung[:10]:
                assert_same(await task, tensors(1))
            assert await store.has("a", 1)

    run(main)


def test_one_load_at_a_time_and_no_turn_is_lost_with_a_cancelled_one() -> None:
    async def main() -> None:
        gate, inside = Turnstile(), [0, 0]

        async def load() -> None:
            async with gate.turn():
                inside[0] += 1
                inside[1] = max(inside)
                await asyncio.sleep(0)
                inside[0] -= 1

        async with gate.turn():
            waiting = [asyncio.create_task(load()) for _ in range(10)]
            await asyncio.sleep(0)
            waiting[3].cancel()
        waiting[0].cancel()  # its turn has come, and it does not know it yet
        await asyncio.wait(waiting)
        assert [task.cancelled() for task in waiting] == [number in (0, 3) for number in range(10)]
        assert inside == [0, 1]

    run(main)


def test_a_load_that_takes_long_does_not_hold_up_the_next() -> None:
    async def main() -> None:
        gate, ended = Turnstile(), asyncio.Event()

        async def load() -> None:
            async with gate.turn():
                await ended.wait()

        hung = [asyncio.create_task(load()) for _ in range(3)]
        async with gate.turn():
            assert not any(task.done() for task in hung)
            ended.set()
        await asyncio.wait(hung)

    run(main)


def test_the_threads_end_with_the_store_and_with_one_that_is_dropped(root: Path, eventually: Any) -> None:
    def named() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name.startswith("snapstore-aio")]

    async def main() -> None:
        async with opened(root) as store:
            await (await store.save("a", 1, tensors(1)))
            dropped = AsyncSnapshotStore(store.store)
            await asyncio.gather(*(dropped.load("a", 1) for _ in range(10)))
            assert named()
            del dropped
            gc.collect()
            assert await store.load("a", 1)

    run(main)
    eventually(lambda: not named())


def test_a_cleanup_finishes_although_its_caller_was_cancelled(root: Path, files: FaultyFileSystem) -> None:
    async def main() -> None:
        async with opened(root, files) as store:
            info = await (await store.save("a", 1, tensors(1)))
            with files.pause("rename", ".trash") as gate:
                cleaning = asyncio.create_task(store.cleanup_request("a", timeout_s=20))
                await reached(gate)
                cleaning.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cleaning
                assert not await store.has("a", 1) and info.path.exists()
            assert (await store.cleanup_request("a")).clean
            assert not info.path.exists()

    run(main)


def test_a_cleanup_that_times_out_says_so_and_is_counted(root: Path, files: FaultyFileSystem) -> None:
    async def main() -> None:
        async with opened(root, files) as store:
            with files.pause("rename", ".safetensors") as gate:
                await store.save("a", 1, tensors(1))
                await reached(gate)
                report = await store.cleanup_request("a", timeout_s=0.05)
                assert (report.clean, report.cancelled, report.left_to_writer) == (False, 1, 1)
                assert report.waited_s >= 0.05 and store.stats().cleanup_timeouts == 1
                assert not (await store.cleanup_all(timeout_s=0)).clean
                assert store.stats().cleanup_timeouts == 1
            assert (await store.cleanup_request("a")).clean

    run(main)


def test_a_shutdown_goes_on_although_its_caller_was_cancelled(root: Path, files: FaultyFileSystem) -> None:
    async def main() -> None:
        store = AsyncSnapshotStore(SnapshotStore(root, file_system=files))
        gate = files.pause("rename", ".safetensors")
        ticket = await store.save("a", 1, tensors(1))
        await reached(gate)
        ending = asyncio.create_task(store.shutdown())
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        gate.open()
        assert (await ticket).path.exists()
        assert (await store.shutdown()).clean

    run(main)


def test_a_drain_waits_for_the_device_and_takes_back_what_it_has_not_begun(root: Path) -> None:
    async def main() -> None:
        device = FakeDevice()
        async with opened(root) as store:
            ticket = await store.save("a", 1, {"x": device.tensor([1.0, 2.0])}, borrow=True)
            assert not await store.drain_request("a", timeout_s=0.05)
            device.automatic = True
            assert await store.drain_request("a", timeout_s=10) and ticket.released
            assert await store.flush(10)

    run(main)


# --- streams ---


@pytest.mark.parametrize("chunk_bytes", [1, 7, 4096, 1 << 20])
def test_a_stream_is_the_file(root: Path, chunk_bytes: int) -> None:
    async def main() -> None:
        async with opened(root) as store:
            info = await (await store.save("a", 1, tensors(1, nbytes=300)))
            whole = info.path.read_bytes()
            chunks = [chunk async for chunk in store.stream(info.key, chunk_bytes)]
            assert b"".join(chunks) == whole and {len(each) for each in chunks[:-1]} <= {chunk_bytes}
            async with store.stream(info.key, chunk_bytes, start=5, stop=50) as stream:
                assert (stream.info, stream.nbytes) == (info, len(whole))
                assert b"".join([chunk async for chunk in stream]) == whole[5:50]
            assert [chunk async for chunk in store.stream(info.key, start=len(whole) + 9)] == []

    run(main)


def test_a_cleanup_and_a_shutdown_cut_no_stream_that_is_open(root: Path) -> None:
    async def main() -> None:
        async with opened(root) as store:
            info = await (await store.save("a", 1, tensors(1, nbytes=100_000)))
            whole = info.path.read_bytes()
            async with store.stream(info.key, 1000) as stream:
                first = await anext(stream)
                assert (await store.cleanup_request("a")).clean and not info.path.exists()
                await store.shutdown(cleanup=True)
                assert first + b"".join([chunk async for chunk in stream]) == whole

    run(main)


def test_a_stream_of_a_pending_snapshot_waits_for_its_commit(root: Path, files: FaultyFileSystem) -> None:
    async def main() -> None:
        async with opened(root, files) as store:
            with files.pause("rename", ".safetensors") as gate:
                ticket = await store.save("a", 1, tensors(1))
                await reached(gate)
                opening = asyncio.create_task(store.stream(ticket.key).open())
                given_up = asyncio.create_task(store.stream(ticket.key).open())
                await asyncio.sleep(0)
                given_up.cancel()
                assert not opening.done()
            async with await opening as stream:
                assert stream.nbytes == (await ticket).path.stat().st_size

    run(main)


def test_a_stream_that_is_left_early_or_in_the_middle_of_a_read_is_closed(
    root: Path, files: FaultyFileSystem, eventually: Any
) -> None:
    async def main() -> None:
        async with opened(root, files) as store:
            info = await (await store.save("a", 1, tensors(1)))
            before = descriptors()
            async for _ in store.stream(info.key, 16):
                break
            gc.collect()
            stream = await store.stream(info.key).open()
            del stream
            gc.collect()
            with files.pause("read_into", ".safetensors") as gate:
                reading = asyncio.create_task(anext(store.stream(info.key)))
                await reached(gate)
                reading.cancel()
                await asyncio.wait([reading])
                assert descriptors() > before, "the read still uses it"
                del reading
            await asyncio.sleep(0)
            eventually(lambda: gc.collect() or descriptors() == before)

    run(main)


# --- cancellation, wherever it strikes ---


@types.coroutine
def observed(work: Coroutine[Any, Any, Any], on_await: Callable[[int], None]) -> Generator[Any, Any, Any]:
    """Run a coroutine, and call ``on_await`` with their number at the points where it lets go of the loop."""
    step: Callable[[], Any] = lambda: work.send(None)  # noqa: E731
    for number in range(1_000_000):
        try:
            awaited = step()
        except StopIteration as end:
            return end.value
        on_await(number)
        try:
            sent = yield awaited
            step = lambda sent=sent: work.send(sent)  # noqa: E731
        except BaseException as error:  # noqa: BLE001 - handed on, whatever it is
            step = lambda error=error: work.throw(error)  # noqa: E731
    raise AssertionError("it never ends")


VERBS: dict[str, Callable[[AsyncSnapshotStore, Path], Coroutine[Any, Any, Any]]] = {
    "save": lambda store, _: store.save("new", 1, tensors(5)),
    "resave": lambda store, _: store.save("old", 1, tensors(6)),
    "load": lambda store, _: store.load("old", 1),
    "has": lambda store, _: store.has("old", 1),
    "boundaries": lambda store, _: store.boundaries("old"),
    "latest": lambda store, _: store.latest("old"),
    "detach": lambda store, path: store.detach("old", 1, path / "out", timeout_s=0.3),
    "cleanup_request": lambda store, _: store.cleanup_request("old", timeout_s=0.3),
    "cleanup_all": lambda store, _: store.cleanup_all(timeout_s=0.3),
    "flush": lambda store, _: store.flush(0.3),
    "drain_request": lambda store, _: store.drain_request("old", timeout_s=0.3),
    "stream": lambda store, _: _read(store, "old"),
    "open": lambda store, _: store.open(),
    "shutdown": lambda store, _: store.shutdown(timeout_s=5),
}


async def _read(store: AsyncSnapshotStore, request_id: str) -> bytes:
    async with store.stream(SnapshotKey(request_id, 1), 512) as stream:
        return b"".join([chunk async for chunk in stream])


@settings(max_examples=60)
@given(
    verb=st.sampled_from(sorted(VERBS)),
    point=st.integers(0, 12),
    stuck=st.sampled_from(
        [None, ("rename", ".safetensors"), ("read_into", ".safetensors"), ("rename", ".trash")]
    ),
    full=st.booleans(),
)
def test_cancellation_at_any_await_of_any_verb_leaves_the_invariants_true(
    tmp_path_factory: pytest.TempPathFactory, verb: str, point: int, stuck: tuple[str, str] | None, full: bool
) -> None:
    base = tmp_path_factory.mktemp("cancel")
    files = FaultyFileSystem()

    async def main() -> None:
        store = AsyncSnapshotStore(
            SnapshotStore(
                base / "root", StoreOptions(max_pending_jobs=2, save_timeout_s=0.3), file_system=files
            ),
            threads=2,
        )
        await (await store.save("old", 1, tensors(1)))
        gate = files.pause(*stuck, times=math.inf) if stuck else None
        if full:
            for number in (10, 11):
                await store.save("filler", number, tensors(number))
        await _cancelled(VERBS[verb](store, base), point)
        if gate is not None:
            files.heal()
            gate.open()
        await _assert_sound(store, ended=verb == "shutdown")

    run(main)


async def _cancelled(work: Coroutine[Any, Any, Any], point: int) -> None:
    """Run it as a task that is cancelled when it waits for the ``point``-th time; what else it raises is its own."""

    def on_await(number: int) -> None:
        if number == point:
            asyncio.get_running_loop().call_soon(task.cancel)

    async def whole() -> Any:
        return await _awaitable(observed(work, on_await))

    task = asyncio.ensure_future(whole())
    await asyncio.wait([task], timeout=0.4)
    task.cancel()  # a call that hangs, and awaits at fewer points, is cancelled where it is
    with suppress(asyncio.CancelledError, StoreFullError, TimeoutError, SnapshotNotFoundError):
        await task


async def _awaitable(work: Awaitable[Any]) -> Any:
    return await work


async def _assert_sound(store: AsyncSnapshotStore, *, ended: bool) -> None:
    stats = store.stats()
    assert stats.accepted == stats.committed + stats.cancelled + stats.failed + stats.pending
    if not ended or store.health().status != "dead":
        assert await store.flush(5)
        for boundary in await store.boundaries("old"):
            await store.load("old", boundary)
        ticket = await store.save("afterwards", 1, tensors(9))
        await ticket
        assert_same(await store.load("afterwards", 1), tensors(9))
        assert (await store.cleanup_all(timeout_s=5)).clean
        after = store.stats()
        assert (after.live_requests, after.pending, after.pending_bytes, after.session_bytes) == (0, 0, 0, 0)
    report = await store.shutdown(cleanup=True)
    assert report.writer_stopped and not report.abandoned


def test_a_cancelled_load_leaves_the_loop_in_peace_when_it_ends_after_it(
    root: Path, files: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    store = AsyncSnapshotStore(SnapshotStore(root, file_system=files))
    gate = files.pause("read_into", ".safetensors")

    async def main() -> None:
        await (await store.save("a", 1, tensors(1)))
        loading = asyncio.create_task(store.load("a", 1))
        await reached(gate)
        loading.cancel()

    run(main)
    gate.open()
    files.heal()

    async def end() -> None:
        assert await store.flush(5)
        assert_at_rest(store.store)
        await store.shutdown(cleanup=True)

    run(end)
    assert "exception" not in caplog.text.lower()
