"""A remote tier: several nodes on one object store. Races are forced by gates before the client's calls."""

from __future__ import annotations

import asyncio
import errno
import gc
import secrets
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import obstore
import prometheus_client
import pytest
from helpers import assert_same, tensors
from remotes import Nodes, failing, held_back, new_memory_url, warm_up

from bench._object_stores import BUCKET, Moto, SeaweedFS, options_for, running
from snapstore import (
    RemoteUnavailableError,
    SaveCancelledError,
    SnapshotCorruptError,
    SnapshotKey,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreOptions,
)
from snapstore._threads import Threads
from snapstore.aio import AsyncSnapshotStore
from snapstore.metrics import StoreCollector
from snapstore.remote import _arriving, _names
from snapstore.remote._fetch import Hints
from snapstore.remote._manifest import Entry, RemoteLife
from snapstore.remote._objects import MULTIPART_BYTES, ObjectStore
from snapstore.remote._pool import Kind, Pool, Task
from snapstore.testing import FaultyFileSystem


@pytest.fixture(scope="session", autouse=True)
def _client():
    warm_up()


SERVERS = [pytest.param(Moto, marks=pytest.mark.servers), pytest.param(SeaweedFS, marks=pytest.mark.servers)]
"""`make servers` runs every test on these too."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Started at the first test that wants one of a kind, and shared: each test has a prefix of its own."""
    with ExitStack() as stack:
        started = {}

        def server(kind):
            if kind not in started:
                started[kind] = stack.enter_context(running(kind(tmp_path_factory.mktemp("server"))))
            return started[kind]

        yield server


def nodes_on(kind, request, tmp_path):
    if kind == "memory":
        nodes = Nodes(tmp_path, new_memory_url())
    elif kind == "file":
        nodes = Nodes(tmp_path, f"file://{tmp_path}/shared")
    else:
        server = request.getfixturevalue("servers")(kind)
        url = f"s3://{BUCKET}/{secrets.token_hex(8)}"
        nodes = Nodes(tmp_path, url, remote_options=options_for(server.endpoint))
    yield nodes
    nodes.close()


@pytest.fixture(params=["memory", *SERVERS])
def nodes(request, tmp_path):
    yield from nodes_on(request.param, request, tmp_path)


@pytest.fixture(params=["memory", "file", *SERVERS])
def anywhere(request, tmp_path):
    yield from nodes_on(request.param, request, tmp_path)


def there(nodes: Nodes) -> ObjectStore:
    """The object store, looked at from outside."""
    return ObjectStore(nodes.url, nodes.client_options, 5.0)


def objects(nodes: Nodes) -> list[str]:
    return sorted(each.name for each in there(nodes).list(_names.SNAPSHOTS))


def is_object(name: str) -> bool:
    return name.startswith(_names.SNAPSHOTS)


def is_manifest(name: str) -> bool:
    return name.startswith(_names.MANIFESTS)


class TestRoundTrip:
    def test_what_one_node_saves_another_loads(self, anywhere):
        a, b = anywhere("a"), anywhere("b")
        ticket = a.save("request", 1024, tensors(1), metadata={"layers": [1, None, "ä"]})
        assert ticket.wait_published(5) and ticket.published
        snapshot = b.load("request", 1024)
        assert_same(snapshot, tensors(1))
        assert (snapshot.source, snapshot.metadata) == ("remote", {"layers": [1, None, "ä"]})

    def test_what_was_loaded_is_kept(self, nodes, eventually):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1024, tensors(1), metadata=[1]).wait_published(5)
        b.load("request", 1024)
        eventually(lambda: b.has("request", 1024))
        b.flush()
        snapshot = b.load("request", 1024)
        assert_same(snapshot, tensors(1))
        assert (snapshot.source, snapshot.metadata) == ("disk", [1])
        b.shutdown()
        assert b.stats().remote.published == 0, "it is not sent back"

    def test_nothing_is_kept_beyond_the_quota(self, nodes):
        a, b = nodes("a"), nodes("b", max_session_bytes=1000)
        a.save("request", 1024, tensors(1)).wait_published(5)
        for _ in range(2):
            assert b.load("request", 1024).source == "remote"
        b.shutdown()
        assert b.stats().accepted == 0

    @pytest.mark.parametrize("why", ["no memory", "no space"])
    def test_what_can_not_be_kept_is_loaded_all_the_same(self, nodes, monkeypatch, files, eventually, why):
        nodes("a").save("request", 1, tensors(1)).wait_published(5)
        with nodes("b", file_system=files) as b:
            if why == "no space":
                files.fail("write", errno.ENOSPC, ".tmp")
            else:
                monkeypatch.setattr(
                    _arriving.Arriving, "view", lambda *_: (_ for _ in ()).throw(MemoryError())
                )
            assert b.load("request", 1).source == "remote"
            eventually(lambda: b.stats().failed == 1)
            assert b.boundaries("request") == ()
            eventually(lambda: b.stats().live_requests == 0)
            assert_same(b.load("request", 1), tensors(1))

    def test_frameworks_dtypes_and_odd_shapes(self, anywhere):
        torch = pytest.importorskip("torch")
        a, b = anywhere("a"), anywhere("b")
        odd = {
            "b": torch.randn(3, 5).to(torch.bfloat16),
            "empty": torch.zeros(0, 4),
            "scalar": torch.tensor(7),
            "f8": torch.randn(9).to(torch.float8_e4m3fn),
        }
        a.save("request", 0, odd).wait_published(5)
        loaded = b.load("request", 0).tensors
        for name, tensor in odd.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
            assert loaded[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))

    def test_what_is_loaded_is_the_callers_own(self, nodes, eventually):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        mine = b.load("request", 1)
        for tensor in mine.tensors.values():
            tensor[...] = 0
        b.flush()
        assert_same(b.load("request", 1), tensors(1))

    def test_a_large_snapshot_goes_in_parts_both_ways(self, anywhere):
        a, b = anywhere("a"), anywhere("b")
        large = {"w": np.arange(MULTIPART_BYTES // 4 + 12345, dtype=np.uint32), "x": np.array([1], np.uint8)}
        assert a.save("request", 1, large).wait_published(20)
        assert_same(b.load("request", 1), large)

    def test_headers_and_tensors_across_parts(self, nodes, monkeypatch, eventually):
        monkeypatch.setattr(_arriving, "PART_BYTES", 100)
        a, b = nodes("a"), nodes("b")
        many = {f"t{index}": np.full(index, index, np.uint16) for index in range(40)}
        a.save("request", 1, many).wait_published(5)
        assert_same(b.load("request", 1), many)
        eventually(lambda: b.stats().committed == 1)
        kept = b.load("request", 1)
        assert kept.source == "disk"
        assert_same(kept, many)

    def test_has_latest_and_boundaries(self, nodes):
        a, b = nodes("a"), nodes("b")
        for count in (1024, 4096):
            a.save("request", count, tensors(count)).wait_published(5)
        assert (b.has("request", 1024), b.has("request", 1024, remote=True)) == (False, True)
        assert not b.has("request", 2048, remote=True) and not b.has("other", 1024, remote=True)
        assert (b.latest("request"), b.latest("request", remote=True)) == (None, 4096)
        assert b.latest("request", at_most=4000, remote=True) == 1024
        assert b.latest("other", remote=True) is None
        assert b.boundaries("request") == ()
        with pytest.raises(SnapshotNotFoundError) as caught:
            b.load("request", 2048)
        assert not isinstance(caught.value, RemoteUnavailableError)

    @pytest.mark.parametrize("nbytes", [1000, MULTIPART_BYTES])
    def test_a_file_that_can_not_be_read_says_nothing_of_the_remote_store(self, anywhere, files, nbytes):
        a, b = anywhere("a", file_system=files, remote_policy="on_publish"), anywhere("b")
        content = {"x": np.arange(nbytes, dtype=np.uint8)}
        a.save("request", 1, content).result(10)
        files.fail("read_into", errno.EIO, times=1)
        with pytest.raises(SaveCancelledError, match="can not be read"):
            a.publish("request", timeout_s=5)
        assert a.stats().remote.failed == 0 and objects(anywhere) == []
        a.publish("request", timeout_s=20)
        assert_same(b.load("request", 1), content)

    def test_what_latest_has_found_is_on_its_way_before_the_manifest_says_so_again(self, nodes, monkeypatch):
        a, b, c = nodes("a"), nodes("b"), nodes("c")
        a.save("request", 1, tensors(1)).wait_published(5)
        assert b.latest("request", remote=True) == 1
        loaded = []
        for store, announced in ((b, True), (c, False)):
            thread = threading.Thread(target=lambda store=store: loaded.append(store.load("request", 1)))
            with (
                held_back(monkeypatch, "get_range", is_object) as content,
                held_back(monkeypatch, "get", is_manifest) as manifest,
            ):
                thread.start()
                assert manifest.reached.wait(5)
                assert content.reached.wait(5 if announced else 0.05) == announced
                content.open()
                thread.join(0.05)
                assert thread.is_alive(), "the manifest has the last word"
            thread.join(5)
            assert_same(loaded[-1], tensors(1))

    def test_what_latest_has_found_and_is_no_more_is_not_loaded(self, nodes, monkeypatch, eventually):
        a, b = nodes("a"), nodes("b", max_session_bytes=1)
        a.save("request", 1, tensors(1)).wait_published(5)
        assert b.latest("request", remote=True) == 1
        with held_back(monkeypatch, "delete", is_object):
            a.save("request", 1, tensors(2, 50_000)).wait_published(5)
            assert_same(b.load("request", 1), tensors(2, 50_000))
        assert b.latest("request", remote=True) == 1
        with nodes("c", max_session_bytes=1) as c:
            assert c.latest("request", remote=True) == 1
            a.cleanup_request("request")
            eventually(lambda: a.stats().remote.endings == 0)
            for store in (b, c):
                with pytest.raises(SnapshotNotFoundError, match="neither here nor in the remote store"):
                    store.load("request", 1)

    def test_saved_again_it_is_replaced_and_its_object_goes(self, nodes, eventually):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        a.save("request", 1, tensors(2)).wait_published(5)
        assert_same(b.load("request", 1), tensors(2))
        eventually(lambda: len(objects(nodes)) == 1)

    def test_a_server_can_await_it_all(self, nodes):
        a = nodes("a", remote_policy="on_publish")

        async def serve():
            async with AsyncSnapshotStore(nodes("b")) as b:
                a.save("request", 1024, tensors(1))
                assert await b.latest("request", remote=True) is None
                mine = AsyncSnapshotStore(a)
                infos = await mine.publish("request", timeout_s=5)
                assert [info.key.token_count for info in infos] == [1024]
                assert await b.has("request", 1024, remote=True) and not await b.has("request", 1024)
                assert await b.latest("request", remote=True) == 1024
                assert (await b.load("request", 1024)).source == "remote"
                await mine.cleanup_request("request")
                assert not await mine.has("request", 1024, remote=True)

        asyncio.run(serve())


class TestPolicies:
    def test_on_publish_nothing_goes_before_it_is_asked_for(self, nodes):
        a, b = nodes("a", remote_policy="on_publish"), nodes("b")
        tickets = [a.save("request", count, tensors(count)) for count in (1, 2)]
        a.flush()
        assert not b.has("request", 1, remote=True)
        (info,) = a.publish("request", 2, timeout_s=5)
        assert info.key.token_count == 2 and [ticket.published for ticket in tickets] == [False, True]
        assert b.boundaries("request") == () and b.latest("request", remote=True) == 2
        assert len(a.publish("request", timeout_s=5)) == 2 and all(ticket.published for ticket in tickets)
        assert a.stats().remote.published == 2, "what is there is not sent again"

    def test_on_publish_waits_for_the_commit(self, nodes):
        a, b = nodes("a", remote_policy="on_publish"), nodes("b")
        a.save("request", 1, tensors(1, 8 << 20))
        a.publish("request", 1, timeout_s=10)
        assert_same(b.load("request", 1), tensors(1, 8 << 20))

    def test_on_detach_the_file_goes_out_both_ways(self, nodes, tmp_path, eventually):
        a, b = nodes("a", remote_policy="on_detach"), nodes("b")
        for count in (1, 2):
            a.save("request", count, tensors(count))
            a.flush()
            assert not b.has("request", count, remote=True)
            path = a.detach("request", count, tmp_path / f"{count}.safetensors")
            path.unlink()
            eventually(lambda count=count: b.has("request", count, remote=True))
        assert_same(b.load("request", 1), tensors(1))
        a.cleanup_request("request")
        eventually(lambda: not nodes("c").has("request", 2, remote=True))

    def test_publishing_what_is_not_there(self, nodes, root):
        with pytest.raises(SnapshotNotFoundError):
            nodes("a").publish("request", 1, timeout_s=1)
        with SnapshotStore(root) as store, pytest.raises(ValueError, match="no remote store"):
            store.publish("request", timeout_s=1)

    def test_without_a_remote_store_nothing_is_published(self, root):
        with SnapshotStore(root) as store:
            ticket = store.save("request", 1, tensors())
            assert not ticket.published and not ticket.wait_published(5)
            assert store.has("request", 1, remote=True) and store.latest("request", remote=True) == 1
            assert store.stats().remote is None and store.health().remote is None


class TestLives:
    def test_a_request_that_moves_on_keeps_its_boundaries(self, nodes):
        a, b, c = nodes("a"), nodes("b"), nodes("c")
        a.save("request", 1024, tensors(1)).wait_published(5)
        b.load("request", 1024)
        assert b.save("request", 2048, tensors(2)).wait_published(5)
        assert c.latest("request", at_most=1024, remote=True) == 1024
        assert_same(c.load("request", 1024), tensors(1))
        assert_same(c.load("request", 2048), tensors(2))

    def test_of_two_nodes_that_save_one_id_the_last_to_begin_wins_as_a_whole(self, nodes):
        a, b, c = nodes("a"), nodes("b"), nodes("c")
        for count in (1, 2):
            assert a.save("request", count, tensors(count)).wait_published(5)
        assert b.save("request", 3, tensors(3)).wait_published(5)
        late = a.save("request", 4, tensors(4))
        with pytest.raises(SaveCancelledError, match="life"):
            a.publish("request", 4, timeout_s=5)
        assert not late.published and a.has("request", 4), "here it is as ever"
        assert c.latest("request", remote=True) == 3 and not c.has("request", 1, remote=True)
        assert not b.has("request", 1, remote=True)
        assert not a.has("request", 3, remote=True), "what it has is of another life"

    def test_a_cleanup_ends_the_life_everywhere(self, nodes, eventually):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1024, tensors(1)).wait_published(5)
        assert a.cleanup_request("request").clean
        with pytest.raises(SnapshotNotFoundError):
            a.load("request", 1024)
        eventually(lambda: not b.has("request", 1024, remote=True))
        eventually(lambda: objects(nodes) == [])
        eventually(lambda: a.stats().remote.endings == 0)
        assert a.save("request", 1, tensors(3)).wait_published(5)
        assert_same(b.load("request", 1), tensors(3))
        with pytest.raises(SnapshotNotFoundError):
            b.load("request", 1024)

    def test_a_cleanup_on_another_node_ends_it_too(self, nodes, eventually):
        a, b, c = nodes("a"), nodes("b"), nodes("c")
        a.save("request", 1024, tensors(1)).wait_published(5)
        b.cleanup_request("request")
        assert not b.has("request", 1024, remote=True)
        eventually(lambda: not c.has("request", 1024, remote=True))
        a.save("request", 2048, tensors(2)).result(5)
        with pytest.raises(SaveCancelledError):
            a.publish("request", 2048, timeout_s=5)

    def test_cleanup_all_and_shutdown_with_cleanup(self, nodes, eventually):
        a, b = nodes("a"), nodes("b")
        for name in ("x", "y"):
            a.save(name, 1, tensors(1)).wait_published(5)
        assert a.cleanup_all().clean
        eventually(lambda: not b.has("x", 1, remote=True) and not b.has("y", 1, remote=True))
        a.save("z", 1, tensors(1)).wait_published(5)
        assert a.shutdown(cleanup=True).clean
        assert not b.has("z", 1, remote=True)

    def test_shutdown_without_cleanup_publishes_what_is_left_and_leaves_it(self, nodes):
        a, b = nodes("a"), nodes("b")
        for count in range(20):
            a.save("request", count, tensors(count))
        report = a.shutdown()
        assert report.clean and report.unpublished == ()
        for count in range(20):
            assert_same(b.load("request", count), tensors(count))


class TestLateArrivals:
    def test_while_its_end_waits_a_life_is_invisible_on_the_node_that_cleaned_up(self, nodes, monkeypatch):
        a = nodes("a")
        a.save("request", 1, tensors(1)).wait_published(5)
        with held_back(monkeypatch, "put", is_manifest) as gate:
            assert a.cleanup_request("request").clean
            assert gate.reached.wait(5)
            assert not a.has("request", 1, remote=True)
            with pytest.raises(SnapshotNotFoundError):
                a.load("request", 1)

    def test_an_object_that_comes_after_the_cleanup_is_never_visible(self, nodes, monkeypatch, eventually):
        a, b = nodes("a"), nodes("b")
        with held_back(monkeypatch, "put", is_object) as gate:
            ticket = a.save("request", 1, tensors(1))
            assert gate.reached.wait(5)
            assert a.cleanup_request("request").clean
        eventually(lambda: a.stats().remote.unpublished == 0)
        assert not b.has("request", 1, remote=True) and not ticket.published
        eventually(lambda: objects(nodes) == [])

    def test_a_manifest_that_comes_after_the_cleanup_is_refused(self, nodes, monkeypatch, eventually):
        a, b = nodes("a"), nodes("b")
        with held_back(monkeypatch, "put", is_manifest) as gate:
            ticket = a.save("request", 1, tensors(1))
            assert gate.reached.wait(5)
            assert a.cleanup_request("request").clean
            eventually(lambda: a.stats().remote.endings == 0)
            assert not b.has("request", 1, remote=True)
        eventually(lambda: a.stats().remote.unpublished == 0)
        assert not b.has("request", 1, remote=True) and not ticket.published
        eventually(lambda: objects(nodes) == [])

    def test_a_later_life_is_not_touched_by_an_end_that_comes_late(self, nodes, monkeypatch, eventually):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        with held_back(monkeypatch, "get", is_manifest) as gate:
            a.cleanup_request("request")
            assert gate.reached.wait(5)
            assert b.save("request", 2, tensors(2)).wait_published(5)
        eventually(lambda: a.stats().remote.endings == 0)
        assert nodes("c").latest("request", remote=True) == 2

    def test_cleaned_up_while_it_is_on_its_way_it_is_not_found_and_not_kept(self, nodes, monkeypatch):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        caught = []

        def load():
            try:
                b.load("request", 1)
            except SnapshotNotFoundError as error:
                caught.append(error)

        thread = threading.Thread(target=load)
        with held_back(monkeypatch, "get_range", is_object) as gate:
            thread.start()
            assert gate.reached.wait(5)
            b.cleanup_request("request")
        thread.join(5)
        assert len(caught) == 1 and b.boundaries("request") == ()
        assert b.save("request", 2, tensors(2)).wait_published(5), (
            "it is not bound to the life that it has ended"
        )
        assert b.shutdown().clean and b.stats().accepted == 1

    def test_a_save_that_comes_while_it_is_on_its_way_wins_here(self, nodes, monkeypatch):
        a, b = nodes("a"), nodes("b", remote_policy="on_publish")
        a.save("request", 1, tensors(1)).wait_published(5)
        loaded = []
        thread = threading.Thread(target=lambda: loaded.append(b.load("request", 1)))
        with held_back(monkeypatch, "get_range", is_object) as gate:
            thread.start()
            assert gate.reached.wait(5)
            b.save("request", 1, tensors(2))
        thread.join(5)
        assert_same(loaded[0], tensors(1))
        b.flush()
        assert_same(b.load("request", 1), tensors(2))

    def test_what_was_saved_here_in_place_of_what_was_on_its_way_is_loaded(self, nodes, monkeypatch):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        loaded = []
        thread = threading.Thread(target=lambda: loaded.append(b.load("request", 1)))
        with held_back(monkeypatch, "get", is_manifest) as gate:
            thread.start()
            assert gate.reached.wait(5)
            a.cleanup_request("request")
            assert b.save("request", 1, tensors(2)).wait_published(5)
        thread.join(5)
        assert_same(loaded[0], tensors(2))

    def test_nodes_at_once_end_in_one_life_that_loads(self, nodes):
        stores = [nodes(name) for name in "abc"]

        def work(store, number):
            for round_ in range(6):
                for request in ("x", "y"):
                    store.save(request, round_ * 10 + number, tensors(number))
                if round_ == 3:
                    store.cleanup_request("y")

        threads = [threading.Thread(target=work, args=each) for each in zip(stores, range(3), strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for store in stores:
            assert store.shutdown().clean
        for request in ("x", "y"):
            manifest = there(nodes).read_manifest(request).manifest
            reader = nodes(f"reader-{request}")
            for count in manifest.current.boundaries if manifest.current else ():
                assert_same(reader.load(request, count), tensors(count % 10))
                assert f"/{manifest.current.name}/" in manifest.current.boundaries[count].name


class TestTrouble:
    def test_a_dead_store_degrades_and_local_work_goes_on(self, nodes, monkeypatch, eventually):
        a, b = nodes("a"), nodes("b")
        a.save("before", 1, tensors(1)).wait_published(5)
        with failing(monkeypatch, obstore.exceptions.GenericError("connection refused")):
            ticket = a.save("request", 1, tensors(2))
            assert ticket.result(5) and a.load("request", 1).source == "disk"
            eventually(lambda: a.health().remote.status == "unreachable")
            health = a.health()
            assert health.status == "degraded" and "connection refused" in health.reasons[0]
            for _ in range(10):
                with pytest.raises(RemoteUnavailableError, match="connection refused"):
                    b.load("before", 1)
            with pytest.raises(RemoteUnavailableError):
                a.has("other", 1, remote=True)
            with pytest.raises(TimeoutError, match="connection refused"):
                a.publish("request", timeout_s=0.1)
            assert not ticket.published and a.stats().remote.unpublished == 1
        assert ticket.wait_published(10), "it is tried again"
        assert_same(nodes("c").load("request", 1), tensors(2))
        assert a.health().status == "ok"

    def test_a_store_that_does_not_answer_costs_a_load_its_time_and_local_work_none(
        self, nodes, monkeypatch, deadline
    ):
        a, b = nodes("a"), nodes("b", remote_options={"timeout_s": 0.2})
        a.save("request", 1, tensors(1)).wait_published(5)
        with held_back(monkeypatch, "get_range", is_object), deadline(5):
            with pytest.raises(RemoteUnavailableError, match=r"did not answer within 0\.2 s"):
                b.load("request", 1)
            assert b.save("other", 1, tensors(2)).result(5)
            assert_same(b.load("other", 1), tensors(2))
        assert_same(b.load("request", 1), tensors(1))

    def test_a_store_that_is_dead_from_the_start(self, nodes, monkeypatch, eventually):
        with failing(monkeypatch, obstore.exceptions.GenericError("no route")):
            a = nodes("a")
            assert a.health().remote.status in ("opening", "unreachable")
            with pytest.raises(RemoteUnavailableError):
                a.load("request", 1)
            ticket = a.save("request", 1, tensors(1))
        assert ticket.wait_published(10)

    def test_what_is_not_published_at_shutdown_is_told(self, nodes, monkeypatch, deadline):
        a = nodes("a")
        a.save("x", 1, tensors(1)).wait_published(5)
        with failing(monkeypatch, obstore.exceptions.GenericError("gone")), deadline(5):
            ticket = a.save("request", 1, tensors(2))
            ticket.result(5)
            report = a.shutdown(timeout_s=2)
        assert report.unpublished == (ticket.key,) and report.writer_stopped

    def test_after_shutdown_a_cleanup_waits_for_nobody(self, nodes, deadline):
        a = nodes("a")
        a.shutdown(cleanup=True)
        with deadline(1.0):
            assert not a.cleanup_request("request").clean
        with pytest.raises(RemoteUnavailableError, match="shut down"):
            a.load("request", 1)

    def test_an_end_survives_a_restart(self, nodes, monkeypatch, eventually):
        a = nodes("a")
        a.save("request", 1, tensors(1)).wait_published(5)
        with failing(monkeypatch, obstore.exceptions.GenericError("gone")):
            assert a.cleanup_request("request").clean, "it is written down"
            a.shutdown(cleanup=True, timeout_s=1)
        assert nodes("b").has("request", 1, remote=True)
        again = nodes("a")
        eventually(lambda: not nodes("c").has("request", 1, remote=True))
        eventually(lambda: list((nodes.folder / "a" / ".endings").iterdir()) == [])
        assert again.stats().remote.ended == 1

    def test_what_was_cleaned_up_before_a_restart_is_gone_from_its_beginning(self, nodes, monkeypatch):
        """Also while its end is still being carried out."""
        a = nodes("a")
        a.save("request", 1, tensors(1)).wait_published(5)
        with failing(monkeypatch, obstore.exceptions.GenericError("gone")):
            assert a.cleanup_request("request").clean
            a.shutdown(cleanup=True, timeout_s=1)
        with held_back(monkeypatch, "put", is_manifest) as gate:
            again = nodes("a")
            assert gate.reached.wait(5)
            assert not again.has("request", 1, remote=True)
            with pytest.raises(SnapshotNotFoundError):
                again.load("request", 1)

    def test_an_end_is_written_down_beside_another_store_that_makes_the_place_for_it(self, nodes):
        files, place = FaultyFileSystem(), nodes.folder / "a" / ".endings"
        a = nodes("a", files)
        a.save("request", 1, tensors(1)).wait_published(5)
        files.call("make_directory", place.mkdir, ".endings")
        assert a.cleanup_request("request").clean

    def test_an_object_that_a_manifest_may_name_is_not_deleted(self, nodes, monkeypatch, eventually):
        """The answer was lost, and before the next try a later save replaces it, which takes its time."""
        a, put, gone = nodes("a"), obstore.put, obstore.exceptions.GenericError("gone")
        a.save("other", 1, tensors(1)).wait_published(5)
        outage = ExitStack()

        def lose_the_answer(store, name, *args, **more):
            done = put(store, name, *args, **more)
            if is_manifest(name):
                outage.enter_context(failing(monkeypatch, gone))
                raise gone
            return done

        monkeypatch.setattr(obstore, "put", lose_the_answer)
        first = a.save("request", 1, tensors(1))
        eventually(lambda: obstore.put is not lose_the_answer)
        later = a.save("request", 1, tensors(2))
        later.result(5)
        outage.close()
        monkeypatch.setattr(obstore, "put", put)
        with held_back(monkeypatch, "put", is_object) as gate:
            assert gate.reached.wait(15)
            a.cleanup_request("other")
            eventually(lambda: a.stats().remote.endings == 0)  # what was to be deleted before is
            assert not first.published
            assert_same(nodes("b").load("request", 1), tensors(1))
            gate.open()
            assert later.wait_published(5)
        assert_same(nodes("c").load("request", 1), tensors(2))

    def test_an_end_of_another_remote_store_is_left_alone(self, nodes, monkeypatch):
        a = nodes("a")
        a.save("request", 1, tensors(1)).wait_published(5)
        with failing(monkeypatch, obstore.exceptions.GenericError("gone")):
            a.cleanup_request("request")
            a.shutdown(timeout_s=1)
        elsewhere = Nodes(nodes.folder, new_memory_url())
        elsewhere("a").shutdown()
        assert len(list((nodes.folder / "a" / ".endings").iterdir())) == 1

    def test_altered_bytes_are_corrupt_and_never_wrong_numbers(self, nodes):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        (name,) = objects(nodes)
        store = there(nodes)
        raw = bytearray(store.get_range(name, 0, 10**6))
        for position in (3, 20, 500, len(raw) - 1):
            altered = bytearray(raw)
            altered[position] ^= 1
            store.delete([name])
            obstore.put(store.client, name, bytes(altered))
            with pytest.raises(SnapshotCorruptError, match="in the remote store"):
                b.load("request", 1)
        for content in (bytes(raw[:-1]), b"", None):
            store.delete([name])
            if content is not None:
                obstore.put(store.client, name, content)
            with pytest.raises(SnapshotCorruptError, match="in the remote store"):
                b.load("request", 1)
        assert b.boundaries("request") == ()
        store.close()

    def test_what_comes_whole_at_the_second_try_is_what_is_loaded(self, nodes, monkeypatch):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        real, altered = obstore.get_range, []

        def alter_once(client, name, **span):
            content = bytearray(real(client, name, **span))
            if is_object(name) and not altered:
                altered.append(name)
                content[-1] ^= 1
            return content

        monkeypatch.setattr(obstore, "get_range", alter_once)
        assert_same(b.load("request", 1), tensors(1))
        assert altered

    def test_what_was_published_anew_between_two_tries_is_what_is_loaded(self, nodes, monkeypatch):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        real, replaced = obstore.get_range, []

        def replace_once(client, name, **span):
            content = bytearray(real(client, name, **span))
            if is_object(name) and not replaced:
                replaced.append(name)
                content[-1] ^= 1
                a.save("request", 1, tensors(2, 50_000)).wait_published(5)
            return content

        monkeypatch.setattr(obstore, "get_range", replace_once)
        assert_same(b.load("request", 1), tensors(2, 50_000))

    def test_an_object_of_another_snapshot_is_corrupt(self, nodes):
        a, b = nodes("a"), nodes("b")
        for count in (1, 2):
            a.save("request", count, tensors(count)).wait_published(5)
        one, two = objects(nodes)
        store = there(nodes)
        raw = bytes(store.get_range(two, 0, 10**6))
        store.delete([one])
        obstore.put(store.client, one, raw)
        store.close()
        wrong = 1 if one.rpartition("/")[2].startswith("1.") else 2
        with pytest.raises(SnapshotCorruptError, match="in the remote store"):
            b.load("request", wrong)

    def test_a_manifest_that_comes_altered_is_read_again(self, nodes, eventually):
        a, b = nodes("a"), nodes("b")
        a.save("request", 1, tensors(1)).wait_published(5)
        name, store = _names.manifest_name("request"), there(nodes)
        raw = bytes(obstore.get(store.client, name).bytes())
        obstore.put(store.client, name, raw.replace(b"g1", b"g2", 1))
        with pytest.raises(SnapshotCorruptError):
            b.load("request", 1)
        a.cleanup_request("request")
        eventually(lambda: a.stats().remote.failed >= 2)
        assert a.stats().remote.endings == 1, "it is not given up"
        obstore.put(store.client, name, raw)
        store.close()
        eventually(lambda: a.stats().remote.endings == 0, timeout_s=15)
        assert not b.has("request", 1, remote=True)
        eventually(lambda: objects(nodes) == [])

    def test_an_end_that_can_never_be_read_is_given_up(self, nodes, eventually):
        a = nodes("a")
        a.save("request", 1, tensors(1)).wait_published(5)
        store = there(nodes)
        obstore.put(store.client, _names.manifest_name("request"), b"{}")
        store.close()
        a.cleanup_request("request")
        eventually(lambda: a.stats().remote.endings == 0, timeout_s=15)
        with pytest.raises(SnapshotCorruptError):
            nodes("b").has("request", 1, remote=True)

    def test_a_prefix_of_somebody_else_is_not_used(self, nodes, eventually):
        obstore.put(there(nodes).client, _names.MARKER, b'{"format": 99}')
        a = nodes("a")
        eventually(lambda: a.health().remote.status == "unreachable")
        assert "99" in a.health().remote.error

    def test_which_guarantees_are_lost_is_said(self, tmp_path, eventually, caplog):
        nodes = Nodes(tmp_path, f"file://{tmp_path}/shared")
        a = nodes("a")
        eventually(lambda: a.health().remote.status == "ok")
        assert any("compare-and-swap" in lost for lost in a.health().remote.lost)
        assert "remote_guarantee_lost" in caplog.text and a.health().status == "ok"
        nodes.close()

    def test_a_store_that_is_dropped_ends_its_threads(self, tmp_path, eventually):
        held = [SnapshotStore(tmp_path / "x", StoreOptions(remote=new_memory_url()))]
        with pytest.warns(ResourceWarning, match="dropped"):
            _drop(held)
        eventually(lambda: not [each for each in threading.enumerate() if "remote" in each.name])


def _drop(held: list[SnapshotStore]) -> None:
    held.clear()
    gc.collect()


def test_hints_are_of_the_latest_looks_and_of_what_one_request_brings():
    hints, life = (
        Hints(Threads()),
        RemoteLife("life", 1.0, {1: Entry("small", 100, 1), 2: Entry("large", 2**30, 1)}),
    )
    for number in range(1025):
        hints.note(f"request-{number}", life)
    assert hints.of(SnapshotKey("request-0", 1)) is None
    assert hints.of(SnapshotKey("request-1", 1)) == Entry("small", 100, 1)
    assert hints.of(SnapshotKey("request-1", 2)) is None and hints.of(SnapshotKey("request-1", 3)) is None
    hints.note("request-1", None)
    assert hints.of(SnapshotKey("request-1", 1)) is None


def test_all_that_waited_for_one_upload_goes_when_it_is_over():
    wrong, begun, gate, together = [], threading.Event(), threading.Event(), threading.Barrier(3)
    pool = Pool(4, 10, lambda: None, lambda error: None, Threads())
    pool.start()
    pool.put(Task(Kind.UPLOAD, lambda: begun.set() or gate.wait(5), wrong.append, 10))
    assert begun.wait(5)
    for _ in range(2):
        pool.put(Task(Kind.UPLOAD, lambda: together.wait(5), wrong.append, 5))
    awake = threading.Barrier(4)
    for _ in range(3):
        pool.put(Task(Kind.ASK, lambda: awake.wait(5), wrong.append))
    awake.wait(5)
    assert together.n_waiting == 0, "no more is under way at once than is allowed"
    gate.set()
    together.wait(5)
    assert pool.await_idle(time.monotonic() + 5) and not wrong
    pool.close()
    assert pool.join(time.monotonic() + 5)


def test_prometheus_is_told(nodes):
    registry = prometheus_client.CollectorRegistry()
    a, b = nodes("a"), nodes("b")
    registry.register(StoreCollector({"a": a, "b": b}))
    a.save("request", 1, tensors(1)).wait_published(5)
    b.load("request", 1)
    told = {
        (name, store): registry.get_sample_value(f"snapstore_remote_{name}", {"store": store})
        for name in ("published_total", "fetched_total", "failed_total", "unpublished")
        for store in "ab"
    }
    assert told == {
        ("published_total", "a"): 1,
        ("published_total", "b"): 0,
        ("fetched_total", "a"): 0,
        ("fetched_total", "b"): 1,
        ("failed_total", "a"): 0,
        ("failed_total", "b"): 0,
        ("unpublished", "a"): 0,
        ("unpublished", "b"): 0,
    }
    assert registry.get_sample_value("snapstore_remote_state", {"store": "a", "state": "ok"}) == 1
    loads = {"store": "b", "source": "remote"}
    assert registry.get_sample_value("snapstore_load_seconds_count", loads) == 1


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"remote": "bucket/prefix"}, ValueError),
            ({"remote": Path("/x")}, TypeError),
            ({"remote": "memory://x", "remote_policy": "sometimes"}, ValueError),
            ({"remote_options": {"node": "a"}}, ValueError),
            ({"remote": "memory://x", "remote_options": [("node", "a")]}, TypeError),
        ],
    )
    def test_bad_ones_are_refused(self, options, error):
        with pytest.raises(error):
            StoreOptions(**options)

    @pytest.mark.parametrize(
        ("url", "options", "error"),
        [
            ("memory://x", {"transfers": 0}, ValueError),
            ("memory://x", {"transfers": "8"}, TypeError),
            ("memory://x", {"timeout_s": 0}, ValueError),
            ("s3://bucket", {"endpont": "http://127.0.0.1"}, ValueError),
            ("carrier-pigeon://x", {}, ValueError),
        ],
    )
    def test_bad_ones_of_the_tier_are_refused_when_it_opens(self, root, url, options, error):
        with pytest.raises(error):
            SnapshotStore(root, StoreOptions(remote=url, remote_options=options))
        assert [path.name for path in root.iterdir()] == [".snapstore"]

    def test_secrets_are_not_shown(self):
        assert "hush" not in repr(StoreOptions(remote="s3://x", remote_options={"secret_access_key": "hush"}))
