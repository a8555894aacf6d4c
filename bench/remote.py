"""``remote``: publish to and fetch from an object store on loopback. Limit: obstore alone, with the bytes at hand.

Ours uploads with a checksum that the server compares, so the limit does; obstore without one is there to be compared.

The limit of a fetch is the bytes as obstore has them, by a name that it is told: read-only, compared with nothing. Ours
has tensors of the caller's own that are compared with their checksums, and asks the manifest once more whether the
snapshot still stands: after ``latest``, which is not timed, both at once; or where nothing is known, one after the
other. obstore with safetensors is what a user would write to have such tensors, still without checksums.

Server and client share the processors, and with others where the machine is not idle: then the time of the wall says
little, and the processor time of this process, measured apart, what ours does more than obstore alone.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from time import perf_counter, process_time, sleep
from typing import Any

import obstore
import safetensors.numpy
from obstore.store import from_url

from bench._measure import LIMIT, SNAPSTORE, Case, Contender, Figure
from bench._object_stores import BUCKET, SeaweedFS, options_for, running
from bench._work import MiB, fresh_folder, fresh_store, numpy_tensors
from snapstore import SnapshotStore

Clock = Callable[[], float]

ROOM = {"max_pending_jobs": 1000, "max_pending_bytes": 4096 * MiB}
GOAL = "<= 1.11 x limit"
ONCE_MORE = "the limit once more"
"""How far it is from 1 is how far the others may be off."""

SIZES = {"16 MiB in 48": (48, 16 * MiB), "256 MiB in 64": (64, 256 * MiB)}


def run(*, quick: bool) -> Iterator[tuple[Case, list[Figure]]]:
    """One snapshot at a time, there and back; then what a save costs with and without a remote store."""
    with ExitStack() as stack:
        server = stack.enter_context(running(SeaweedFS(stack.enter_context(fresh_folder()) / "server")))
        url, options = f"s3://{BUCKET}/{secrets.token_hex(4)}", options_for(server.endpoint)
        client = from_url(url, **options, checksum_algorithm="sha256")
        plain = from_url(url, **options)
        for size, (count, nbytes) in SIZES.items():
            rounds = (4 if quick else 60) if nbytes < 100 * MiB else (2 if quick else 5)
            with ExitStack() as inner:
                remote = {"remote": url, "remote_options": options, **ROOM}
                publisher = inner.enter_context(fresh_store(remote_policy="on_publish", **remote))
                readers = [inner.enter_context(fresh_store(max_session_bytes=1, **remote)) for _ in range(2)]
                tensors = numpy_tensors(count, nbytes)
                for verb, contenders in (
                    ("publish", partial(_publishing, client, plain, publisher, tensors)),
                    ("fetch", partial(_fetching, client, publisher, readers, tensors)),
                ):
                    case = Case("remote", f"{verb} {size}", contenders(perf_counter), rounds, 1, GOAL)
                    yield case, case.run()
                    if nbytes > 100 * MiB:
                        continue  # the server's volumes are not that many
                    name = f"{verb} {size}, processor time of this process"
                    case = Case("remote", name, contenders(process_time), rounds, 1)
                    yield case, case.run()
    with ExitStack() as stack:
        saving = _saving(stack, numpy_tensors(48, 16 * MiB))
        case = Case("remote", "save 16 MiB in 48", saving, 15 if quick else 100, goal="= limit")
        yield case, case.run()


def _publishing(
    client: Any, plain: Any, store: SnapshotStore, tensors: dict[str, Any], clock: Clock
) -> dict[str, Contender]:
    """From the file of a committed snapshot until other nodes see it; the limit uploads the same bytes from memory."""
    numbers = itertools.count(1)
    raw = store.save("sized", 0, tensors).result(60).path.read_bytes()

    def uploaded(by: Any) -> float:
        name = f"limit/{next(numbers)}"
        took_s = _timed(clock, lambda: obstore.put(by, name, raw))
        obstore.delete(by, name)
        return took_s

    def ours() -> float:
        request = f"request-{next(numbers)}"
        store.save(request, 1, tensors).result(60)
        took_s = _timed(clock, lambda: store.publish(request, timeout_s=120))
        store.cleanup_request(request)
        while store.stats().remote.endings:  # type: ignore[union-attr]
            sleep(0.005)  # what is deleted is not to be in the way of the next round
        return took_s

    return {
        LIMIT: lambda: uploaded(client),
        SNAPSTORE: ours,
        "obstore, unchecked": lambda: uploaded(plain),
        ONCE_MORE: lambda: uploaded(client),
    }


def _fetching(
    client: Any,
    publisher: SnapshotStore,
    readers: list[SnapshotStore],
    tensors: dict[str, Any],
    clock: Clock,
) -> dict[str, Contender]:
    """Until tensors of the caller's own are there, compared with their checksums. Nothing is kept on the local disk."""
    reader, other = readers
    (info,) = publisher.publish(publisher.save("fetched", 1, tensors).key.request_id, timeout_s=120)
    obstore.put(client, "limit/fetched", info.path.read_bytes())

    def limit() -> float:
        return _timed(clock, lambda: obstore.get(client, "limit/fetched").bytes())

    def with_safetensors() -> float:
        return _timed(
            clock, lambda: safetensors.numpy.load(bytes(obstore.get(client, "limit/fetched").bytes()))
        )

    def after_latest() -> float:
        token_count = reader.latest("fetched", remote=True)
        assert token_count is not None
        return _timed(clock, lambda: reader.load("fetched", token_count))

    return {
        LIMIT: limit,
        SNAPSTORE: after_latest,
        f"{SNAPSTORE}, where nothing is known": lambda: _timed(clock, lambda: other.load("fetched", 1)),
        "obstore and safetensors": with_safetensors,
        ONCE_MORE: limit,
    }


def _saving(stack: ExitStack, tensors: dict[str, Any]) -> dict[str, Contender]:
    """The calling thread's time; each is published, where it is to be, before the next round."""
    contenders: dict[str, Contender] = {}
    for name, options in {
        LIMIT: {},
        f"{SNAPSTORE} on_publish": {"remote_policy": "on_publish"},
        f"{SNAPSTORE} on_commit": {"remote_policy": "on_commit"},
    }.items():
        remote = {"remote": f"memory://bench-{name}", **options} if options else {}
        contenders[name] = _saver(stack.enter_context(fresh_store(**ROOM, **remote)), tensors)
    return contenders


def _saver(store: SnapshotStore, tensors: dict[str, Any]) -> Contender:
    numbers = itertools.count(1)

    def save() -> float:
        started_s = perf_counter()
        ticket = store.save(f"request-{next(numbers)}", 1, tensors)
        took_s = perf_counter() - started_s
        ticket.result(60)
        if store.options.remote_policy == "on_commit":
            ticket.wait_published(60)
        store.cleanup_request(ticket.key.request_id)
        return took_s

    return save


def _timed(clock: Clock, act: Any) -> float:
    started_s = clock()
    act()
    return clock() - started_s
