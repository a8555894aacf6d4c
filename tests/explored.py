"""What is explored: a few clients beside each other on one store, and several stores on one root."""

from __future__ import annotations

import errno
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import obstore
from calls import OUTSIDE, ROOT, Calls, content_of, tensors

from snapstore import (
    RemoteUnavailableError,
    SaveCancelledError,
    SaveState,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreClosedError,
    StoreOptions,
)
from snapstore.testing import World

_numbers = itertools.count()
OPTIONS = StoreOptions(stuck_after_s=1e9)

Step = Callable[[Calls], object]


@dataclass(frozen=True)
class Scenario:
    """Clients beside each other on one store. Called with a world, it is what ``explore`` takes."""

    name: str
    clients: Sequence[Sequence[Step]]
    options: StoreOptions = OPTIONS
    before: Sequence[Step] = ()
    faults: int = 0
    device: bool = False

    def __str__(self) -> str:
        return self.name

    def __call__(self, world: World) -> None:
        with world.calm():
            world.files.make_directory(OUTSIDE)
            store = open_store(world, self.options)
            on = Calls(world, store, fails=self.faults > 0 or self.device, litters=self.faults > 0)
            for step in self.before:
                step(on)
        world.fault_numbers, world.faults = (errno.EIO, errno.ENOSPC), self.faults
        clients = [
            world.go(f"client {number}", lambda steps=steps: [step(on) for step in steps])
            for number, steps in enumerate(self.clients)
        ]
        if self.device:
            clients.append(world.go("device", lambda: run_device(on)))
        for client in clients:
            client.result()
        world.faults = 0
        world.hanging.clear()
        with world.calm():
            end(on)
        assert self.device or not world.stalls, f"nobody could go on but by a time-out, {world.stalls} times"
        assert world.files.open_descriptors == 0, f"{world.files.open_descriptors} descriptors are open"


def run_device(on: Calls) -> None:
    """One operation after the other, at any time; in the end all at once."""
    for _ in range(12):
        on.world.switch("device")
        on.device.complete(1)
    on.device.automatic = True


def open_store(world: World, options: StoreOptions = OPTIONS) -> SnapshotStore:
    return SnapshotStore(ROOT, options, threads=world.threads, file_system=world.files)


def end(on: Calls) -> None:
    """At rest, everything agrees; a second use works; and after the end nothing is left."""
    on.world.settle()
    report = on.report
    if report is None:
        assert on.store.flush() and on.store.drain(60.0)
        on.world.settle()
        on.check()
        use_again(on)
        on.shutdown(cleanup=True)
        report = on.report
        assert report is not None and report.session_removed and not report.errors, report
    else:
        on.check_ended(report)
    if report.session_removed:
        assert str(on.store.session) not in on.world.files.tree()


def use_again(on: Calls) -> None:
    assert on.store.cleanup_all().clean, "the files of what was forgotten are still there"
    on.save("again", 1)
    assert on.store.flush() and on.store.has("again", 1), f"{on.calls[-1]} does not work any more"
    assert on.store.cleanup_all().clean, "a second cleanup does not work any more"
    on.world.settle()
    assert not on.files() and not on.strays(), f"left behind: {on.files()} {on.strays()}"


# -- the scenarios --------------------------------------------------------------------------------------------------


def save(request_id: str = "a", token_count: int = 1) -> Step:
    return lambda on: on.save(request_id, token_count)


def save_from_device(request_id: str = "a", token_count: int = 1) -> Step:
    return lambda on: on.save_from_device(request_id, token_count)


def save_by_bell(request_id: str = "a", token_count: int = 1) -> Step:
    return lambda on: on.save_by_bell(request_id, token_count)


def lend(request_id: str = "a", token_count: int = 1) -> Step:
    return lambda on: on.lend(request_id, token_count)


def load(request_id: str = "a", token_count: int = 1) -> Step:
    return lambda on: on.load(request_id, token_count)


def cleanup(request_id: str = "a", timeout_s: float = 2.0) -> Step:
    return lambda on: on.cleanup(request_id, timeout_s)


def cleanup_by_bell(request_id: str = "a") -> Step:
    return lambda on: on.cleanup_by_bell(request_id)


def cleanup_all(timeout_s: float = 5.0) -> Step:
    return lambda on: on.cleanup_all(timeout_s)


def detach(request_id: str = "a", token_count: int = 1) -> Step:
    return lambda on: on.detach(request_id, token_count)


def shutdown(cleanup: bool = False) -> Step:
    return lambda on: on.shutdown(cleanup=cleanup)


def drain(request_id: str = "a") -> Step:
    return lambda on: on.drain(request_id)


def flush(on: Calls) -> None:
    on.flush()


def hang(on: Calls) -> None:
    """The next file that is to be made; until all clients have ended."""
    on.world.hanging.add("create")


NARROW = replace(OPTIONS, max_pending_jobs=1, save_timeout_s=1.0)
REJECTING = replace(OPTIONS, max_pending_bytes=8, on_full="reject")
TIGHT = replace(OPTIONS, max_session_bytes=9000)
FULL = replace(OPTIONS, durability="full")
PINNED = replace(OPTIONS, max_pinned_bytes=16384, device_timeout_s=5.0)

ONE_KEY = Scenario("two savers of one key", [[save(), save(), load()], [save(), load()]])
ONE_ID = Scenario(
    "a request id again and again",
    [[save(), cleanup("a", 0), save(), cleanup(), save()], [load(), load()]],
)
DURABLE = Scenario(
    "one file over another, durably", [[save(), save(), load()], [cleanup(), save()]], FULL, [save(), flush]
)
SMALL = [ONE_KEY, ONE_ID, DURABLE]
"""With few enough switching points to walk all schedules with two deviations."""

SCENARIOS = [
    *SMALL,
    Scenario("a cleanup beside the writer", [[save(), save("a", 2)], [cleanup(), save()], [save("b")]]),
    Scenario(
        "cleanups of everything",
        [[cleanup_all(), save()], [cleanup("a", 0), cleanup_all()], [save(), save("b")]],
    ),
    Scenario(
        "detach beside a cleanup", [[save(), detach(), save()], [cleanup(), save("a", 2)], [detach("a", 2)]]
    ),
    Scenario("load beside a cleanup", [[save(), save()], [load(), load(), load()], [cleanup(), save()]]),
    Scenario(
        "no room", [[save(), save(), load()], [save(), save("b")], [save("c"), cleanup(), load()]], NARROW
    ),
    Scenario("no waiting for room", [[save(), save(), load()], [save("b"), cleanup(), save()]], REJECTING),
    Scenario(
        "a session that is full", [[save(), save("a", 2), load()], [save("b"), cleanup(), save("b")]], TIGHT
    ),
    Scenario(
        "beside a write that hangs",
        [[save("b", 2), load("b")], [cleanup(), save(), cleanup_by_bell(), save(), load()], [cleanup()]],
        before=[save(), save("a", 2), flush, hang, save("b")],
    ),
    Scenario(
        "bells instead of waits",
        [[save_by_bell(), save_by_bell(), load()], [save_by_bell("b"), cleanup_by_bell()], [save()]],
        NARROW,
    ),
    Scenario("what is lent", [[lend(), lend(), load()], [load(), cleanup(), lend()]]),
    Scenario("the end beside savers", [[save(), save("a", 2)], [save("b"), save()], [shutdown()]]),
    Scenario(
        "an end that forgets", [[save(), save("a", 2)], [save("b"), cleanup()], [shutdown(cleanup=True)]]
    ),
    Scenario("two ends", [[save(), shutdown()], [save("b"), flush], [shutdown(cleanup=True)]]),
    Scenario(
        "a disk that fails", [[save(), save("a", 2), load()], [cleanup(), save()], [save("b")]], faults=2
    ),
    Scenario(
        "a disk that fails, durably",
        [[save(), save(), load()], [cleanup(), save()]],
        FULL,
        [save(), flush],
        faults=2,
    ),
    Scenario(
        "saves from a device",
        [
            [save_from_device(), save_from_device(), load()],
            [cleanup(), save_from_device(), drain()],
            [save()],
        ],
        PINNED,
        device=True,
    ),
    Scenario(
        "an end beside a device",
        [[save_from_device(), load()], [save_from_device("b"), save()], [shutdown()]],
        PINNED,
        device=True,
    ),
]


# -- several stores on one root -------------------------------------------------------------------------------------


def leave_leftovers(world: World, *keys: tuple[str, int]) -> dict[tuple[str, int], list[int]]:
    """A session whose owner is gone, with these snapshots; what they hold."""
    with world.calm():
        on = Calls(world, open_store(world, replace(OPTIONS, leftovers="keep")))
        for request_id, token_count in keys:
            on.save(request_id, token_count)
        assert on.store.flush()
        held = {key: content_of(on.store.load(*key)) for key in keys}
        assert not on.store.shutdown().errors
    return held


def sessions(world: World) -> set[str]:
    """What is in the root beside its marker."""
    return {
        path.removeprefix(f"{ROOT}/")
        for path in world.files.tree()
        if path.startswith(f"{ROOT}/") and path.count("/") == 2 and not path.startswith(f"{ROOT}/.snapstore")
    }


def leave_to_the_next(world: World) -> None:
    """What one store found in another's hands is reclaimed by the next one."""
    last = open_store(world)
    world.settle()
    assert last.shutdown(cleanup=True).session_removed
    check_nothing_left(world)


def check_nothing_left(world: World) -> None:
    assert not sessions(world), f"left in the root: {sessions(world)}"
    assert world.files.open_descriptors == 0, f"{world.files.open_descriptors} descriptors are open"


def two_stores_that_reclaim(world: World) -> None:
    """Leftovers go, each once; what lives is left alone, also while it comes to be."""
    leave_leftovers(world, ("a", 1), ("b", 1))

    def live() -> Calls:
        on = Calls(world, open_store(world))
        on.save("a", 1)
        on.cleanup("a")
        on.save("a", 2)
        return on

    clients = [world.go(f"store {number}", live) for number in range(2)]
    stores = [client.result() for client in clients]
    with world.calm():
        world.settle()
        alive = {each.store.session.name for each in stores}
        assert sessions(world) == alive, f"there are {sessions(world)}, and alive are {alive}"
        for each in stores:
            end(each)
        check_nothing_left(world)


def two_stores_that_adopt(world: World) -> None:
    """Each snapshot of a dead session becomes one store's own, and no snapshot is lost."""
    held = leave_leftovers(world, ("a", 1), ("a", 2), ("b", 1))
    adopting = replace(OPTIONS, leftovers="adopt")
    clients = [world.go(f"store {number}", lambda: open_store(world, adopting)) for number in range(2)]
    stores = [client.result() for client in clients]
    with world.calm():
        world.settle()
        for key, content in held.items():
            having = [store for store in stores if store.has(*key)]
            assert len(having) == 1, f"{key} is in {len(having)} stores"
            assert content_of(having[0].load(*key)) == content
        for store in stores:
            assert store.shutdown(cleanup=True).session_removed
        leave_to_the_next(world)


def one_store_leaves_while_another_adopts(world: World) -> None:
    """The snapshots are the old store's, the new one's, or the next one's; never nobody's."""
    with world.calm():
        leaving = Calls(world, open_store(world))
        leaving.save("a", 1)
    adopting = replace(OPTIONS, leftovers="adopt")
    last = world.go("leaving", lambda: [leaving.save("a", 2), leaving.flush(), leaving.shutdown()])
    first = world.go("adopting", lambda: open_store(world, adopting))
    last.result()
    stores = [first.result()]
    with world.calm():
        world.settle()
        stores.append(open_store(world, adopting))
        for save in leaving.of("save"):
            if save.ticket is None or save.ticket.state is not SaveState.COMMITTED:
                continue
            having = [store for store in stores if store.has("a", save.token_count or 0)]
            assert len(having) == 1, f"{save} is in {len(having)} stores"
            assert leaving.saved(content_of(having[0].load("a", save.token_count or 0))) is save
        for store in stores:
            assert store.shutdown(cleanup=True).session_removed
        leave_to_the_next(world)


def a_store_that_is_dropped(world: World) -> None:
    """What it accepted is written all the same; then its threads go, and the next store adopts it."""
    with world.calm():
        store = open_store(world)
    ticket = store.save("a", 1, tensors(7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del store
    with world.calm():
        world.settle()
        assert ticket.result(0).key.token_count == 1
        with open_store(world, replace(OPTIONS, leftovers="adopt")) as after:
            assert content_of(after.load("a", 1)) == [7] * 8
        leave_to_the_next(world)


def two_stores_that_adopt_from_a_bad_disk(world: World) -> None:
    """What one could not read or move is there for the next; nothing is lost, and nothing is there twice."""
    held = leave_leftovers(world, ("a", 1), ("a", 2), ("b", 1))
    adopting = replace(OPTIONS, leftovers="adopt")
    stores: list[SnapshotStore] = []

    def adopt() -> None:
        with suppress(OSError):
            stores.append(open_store(world, adopting))

    world.fault_numbers, world.faults = (errno.EIO, errno.EACCES), 1
    for client in [world.go(f"store {number}", adopt) for number in range(2)]:
        client.result()
    world.faults = 0
    with world.calm():
        world.settle()
        stores.append(open_store(world, adopting))
        for key, content in held.items():
            having = [store for store in stores if store.has(*key)]
            assert len(having) == 1, f"{key} is in {len(having)} stores"
            assert content_of(having[0].load(*key)) == content
        for store in stores:
            assert store.shutdown(cleanup=True).session_removed
        leave_to_the_next(world)


def a_node_that_publishes_beside_a_cleanup_and_leaves(world: World) -> None:
    """What was cleaned up is not visible once its end is carried out, by this node or the next; the other is."""
    url = f"memory://explored-{next(_numbers)}"
    here = {"node": "a", "transfers": 2}
    options = replace(OPTIONS, remote=url, remote_policy="on_publish", remote_options=here)
    with world.calm():
        on = Calls(world, open_store(world, options))
        on.save("a", 1)
        on.save("b", 1)
        world.settle()
    with network(world):
        clients = [
            world.go("publisher", lambda: [published(on.store, each) for each in "ab"]),
            world.go("cleaner", lambda: on.store.cleanup_request("a").clean),
            world.go("leaver", on.store.shutdown),
        ]
        (_, b_published), cleaned, _ = [client.result() for client in clients]
    with world.calm():
        world.settle()
        with open_store(world, options) as after:
            world.settle()
            assert after.stats().remote.endings == 0
            seen = [after.has(each, 1, remote=True) for each in "ab"]
            assert not (cleaned and seen[0]), "what was cleaned up is visible"
            assert seen[1] or not b_published, "what was published is not visible"
    assert world.files.open_descriptors == 0


@contextmanager
def network(world: World) -> Iterator[None]:
    """Each request to an object store is a switching point."""
    calls = {name: getattr(obstore, name) for name in ("get", "get_range", "put", "delete")}

    def switching(name: str, store: Any, path: str, *args: Any, **more: Any) -> Any:
        world.switch(name, path.partition("/")[0])
        return calls[name](store, path, *args, **more)

    for name in calls:
        setattr(obstore, name, partial(switching, name))
    try:
        yield
    finally:
        for name, call in calls.items():
            setattr(obstore, name, call)


def published(store: SnapshotStore, request_id: str) -> bool:
    try:
        return bool(store.publish(request_id, timeout_s=30.0))
    except (
        SaveCancelledError,
        SnapshotNotFoundError,
        StoreClosedError,
        RemoteUnavailableError,
        TimeoutError,
    ):
        return False


STORIES = [
    a_node_that_publishes_beside_a_cleanup_and_leaves,
    a_store_that_is_dropped,
    two_stores_that_reclaim,
    two_stores_that_adopt,
    two_stores_that_adopt_from_a_bad_disk,
    one_store_leaves_while_another_adopts,
]
EVERYTHING: list[Callable[[World], None]] = [*SCENARIOS, *STORIES]


def name_of(scenario: Callable[[World], None]) -> str:
    return scenario.name if isinstance(scenario, Scenario) else scenario.__name__.replace("_", " ")


def named(name: str) -> Callable[[World], None]:
    return next(each for each in EVERYTHING if name_of(each) == name)
