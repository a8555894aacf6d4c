"""What happens in child processes: the functions that take a ``Talk`` are started there (see ``processes``)."""

from __future__ import annotations

import asyncio
import atexit
import errno
import gc
import hashlib
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from actions import (
    ACTIONS,
    BEFORE,
    let_sweeper_finish,
    save,
    sessions_in,
    stage_for,
    version_of,
)
from helpers import tensors
from processes import PATIENCE_S, Talk
from pruning import prune

from snapstore import (
    RootError,
    SaveState,
    SaveTicket,
    SnapshotStore,
    SnapstoreError,
    StoreClosedError,
    StoreOptions,
)
from snapstore.signals import install_sigterm_handler
from snapstore.testing import FaultyFileSystem

_NEVER = threading.Event()


# -- children ---------------------------------------------------------------------------------------------------------


def dies_with_snapshots(talk: Talk, root: str, request_ids: list[str] | None = None) -> None:
    """Leaves a session without an owner behind, as a crash does, and others' leftovers as they are."""
    store = SnapshotStore(root, StoreOptions(leftovers="keep"))
    keys = BEFORE if request_ids is None else {(request_id, 1): 0 for request_id in request_ids}
    for key, version in keys.items():
        save(store, key, version).result(PATIENCE_S)
    talk.say("saved", store.session.name)
    os._exit(0)


def prunes_and_dies(talk: Talk, root: str, moment: int, rules: dict[str, Any]) -> None:
    """Kills itself before the change of the disk that has this number."""
    files, count = FaultyFileSystem(), iter(range(moment))

    def step() -> None:
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    for operation in ("unlink", "rename", "remove_directory"):
        files.call(operation, step, times=float("inf"))
    prune(Path(root), files, **rules)


def acts(talk: Talk, root: str, action: str, operation: str | None = None, skip: int = 0) -> None:
    """Makes an action, and stops for ever at the operation, if one is named."""
    stage = stage_for(ACTIONS[action], root)
    before = len(stage.files.calls)

    def stop() -> None:
        talk.say("stopped")
        _NEVER.wait()

    if operation is not None:
        stage.files.call(operation, stop, skip=skip)
    ACTIONS[action].act(stage)
    talk.say("done", json.dumps([call.operation for call in stage.files.calls[before:]]))
    _NEVER.wait()


def acts_when_told(talk: Talk, root: str, action: str, thread: str) -> None:
    """Makes an action; the thread of that name says its number and waits for a word before it touches the disk."""

    def wait() -> None:
        talk.say("thread", threading.get_native_id())
        talk.hear()

    def begins(frame: object, event: str, arg: object) -> None:
        sys.setprofile(None)
        if threading.current_thread().name == thread:
            threading.setprofile(None)
            wait()

    stage = stage_for(ACTIONS[action], root)
    stage.say = talk.say
    running = {each.name: each for each in threading.enumerate()}
    if thread == threading.main_thread().name:
        wait()
    elif thread in running:
        talk.say("thread", running[thread].native_id)
        talk.hear()
    else:
        threading.setprofile(begins)
    ACTIONS[action].act(stage)
    talk.say("done")
    _NEVER.wait()


def hammers(talk: Talk, root: str, seed: int) -> None:
    """Four threads save, replace and clean until the process is killed; what they have done is said as it is done.

    Before and after: ``saving`` and ``committed REQUEST TOKENS VERSION``, ``cleaning`` and ``cleaned REQUEST``.
    """
    store = SnapshotStore(root, StoreOptions(leftovers="adopt", max_pending_jobs=8))

    def hammer(number: int) -> None:
        random = Random(seed * 10 + number)
        for version in itertools.count(1):
            request_id = f"{number}-{random.randrange(3)}"
            for token_count in range(random.randrange(1, 4)):
                talk.say("saving", request_id, token_count, version)
                save(store, (request_id, token_count), version).result(PATIENCE_S)
                talk.say("committed", request_id, token_count, version)
            if random.random() < 0.3:
                talk.say("cleaning", request_id)
                if store.cleanup_request(request_id, timeout_s=PATIENCE_S).clean:
                    talk.say("cleaned", request_id)

    talk.say("hammering")
    for number in range(4):
        threading.Thread(target=hammer, args=(number,), daemon=True).start()
    _NEVER.wait()


def starts_with_others(talk: Talk, root: str, name: str) -> None:
    """Opens when told, works, says which leftovers it has renamed aside, and leaves when told."""
    files = FaultyFileSystem()
    talk.say("ready")
    talk.hear()
    store = SnapshotStore(root, file_system=files)
    for token_count in range(3):
        save(store, (name, token_count), 0).result(PATIENCE_S)
    let_sweeper_finish(store)
    found = [version_of(store, (name, token_count)) for token_count in range(3)]
    renamed = [
        call.paths[0] for call in files.calls if call.operation == "rename" and ".dead-" in call.paths[1]
    ]
    talk.say("worked", json.dumps({"found": found, "reclaimed": [Path(path).name for path in renamed]}))
    talk.hear()
    report = store.shutdown(cleanup=True)
    talk.say("left", report.clean, report.session_removed, *report.errors)


def holds_a_store(talk: Talk, root: str) -> None:
    """Until told to end."""
    store = SnapshotStore(root)
    for key, version in BEFORE.items():
        save(store, key, version).result(PATIENCE_S)
    talk.say(store.session.name)
    talk.hear()
    talk.say(store.shutdown().clean)


def forks_while_a_disk_hangs(talk: Talk, root: str) -> None:
    """Neither a fork nor another store waits for an ``open`` that never comes back."""
    files = FaultyFileSystem()
    gate = files.pause("open_lock")
    threading.Thread(target=SnapshotStore, args=(root,), kwargs={"file_system": files}, daemon=True).start()
    gate.wait_reached()
    started_s = time.monotonic()
    with SnapshotStore(root + "-beside") as store:
        save(store, ("a", 1), 0).result(PATIENCE_S)
    pid = os.fork()
    if pid == 0:
        with SnapshotStore(root + "-of-the-child") as store:
            save(store, ("a", 1), 0).result(PATIENCE_S)
        os._exit(7)
    talk.say("took", time.monotonic() - started_s < 5, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


# -- forks ------------------------------------------------------------------------------------------------------------


def _grandchild_lives_on(talk: Talk, look: Callable[[], object]) -> int:
    """Fork; the child says what it sees, and lives until the test has gone."""
    pid = os.fork()
    if pid == 0:
        talk.say("forked", look())
        talk.hear()
        os._exit(0)
    return pid


def forks_while_it_holds(talk: Talk, root: str) -> None:
    """The parent of the fork dies; its child lives on."""
    store = SnapshotStore(root)
    for key, version in BEFORE.items():
        save(store, key, version).result(PATIENCE_S)
    _grandchild_lives_on(talk, lambda: json.dumps(refusals_of(store)))
    talk.say(store.session.name)
    talk.hear()
    os._exit(0)


def _until_a_fork_has_begun() -> tuple[threading.Event, Callable[[], None]]:
    """Said when the descriptor is there and nobody else knows; then a fork is given all the time it can take."""
    in_flux, forking = threading.Event(), threading.Event()
    os.register_at_fork(before=forking.set)

    def stay() -> None:
        in_flux.set()
        forking.wait(PATIENCE_S)
        time.sleep(0.2)

    return in_flux, stay


def forks_while_a_lock_is_opened(talk: Talk, root: str) -> None:
    files = FaultyFileSystem()
    in_flux, stay = _until_a_fork_has_begun()
    files.call("open_lock", stay, when="after")
    with ThreadPoolExecutor(1) as opener:
        opening = opener.submit(SnapshotStore, root, file_system=files)
        in_flux.wait(PATIENCE_S)
        _grandchild_lives_on(talk, lambda: "lives")
        store = opening.result(PATIENCE_S)
    save(store, ("a", 1), 0).result(PATIENCE_S)
    talk.say(store.session.name)
    talk.hear()
    os._exit(0)


def forks_while_a_lock_is_given_up(talk: Talk, root: str) -> None:
    files = FaultyFileSystem()
    store = SnapshotStore(root, file_system=files)
    save(store, ("a", 1), 0).result(PATIENCE_S)
    in_flux, stay = _until_a_fork_has_begun()
    files.call("close", stay, "owner.lock")
    with ThreadPoolExecutor(1) as ending:
        report = ending.submit(store.shutdown)
        in_flux.wait(PATIENCE_S)
        _grandchild_lives_on(talk, lambda: "lives")
        report.result(PATIENCE_S)
    talk.say(store.session.name)
    talk.hear()
    os._exit(0)


def refusals_of(store: SnapshotStore) -> dict[str, str]:
    """What each method says in a process that the store does not belong to."""
    uses: dict[str, Callable[[], object]] = {
        "save": lambda: store.save("child", 1, {}),
        "load": lambda: store.load("a", 1),
        "has": lambda: store.has("a", 1),
        "boundaries": lambda: store.boundaries("a"),
        "latest": lambda: store.latest("a"),
        "detach": lambda: store.detach("a", 1, "/tmp/nowhere"),
        "cleanup_request": lambda: store.cleanup_request("a"),
        "cleanup_all": store.cleanup_all,
        "flush": store.flush,
        "drain_request": lambda: store.drain_request("a", timeout_s=0),
        "shutdown": store.shutdown,
    }
    said = {}
    for name, use in uses.items():
        try:
            said[name] = f"no error: {use()}"
        except SnapstoreError as error:
            said[name] = type(error).__name__
    return {**said, "health": store.health().status}


def forks_in_the_middle(talk: Talk, root: str) -> None:
    """Saves go on in the parent while children are forked that leave as they like; none ends what is not its own."""
    store = SnapshotStore(root)
    tickets = []
    with store:
        for number in range(6):
            tickets.append(save(store, ("a", number), number))
            pid = os.fork()
            if pid == 0:
                leave_in_one_of_several_ways(store, number)
            _, status = os.waitpid(pid, 0)
            talk.say("child", os.waitstatus_to_exitcode(status))
            assert tickets[-1].result(PATIENCE_S)
        talk.say("parent", [version_of(store, ("a", number)) for number in range(6)] == list(range(6)))
        talk.say("status", store.health().status)


class Told(logging.Handler):
    """Says what snapstore logs, from WARNING on."""

    def __init__(self, talk: Talk) -> None:
        super().__init__(logging.WARNING)
        self._talk = talk
        logging.getLogger("snapstore").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._talk.say("logged", record.getMessage())


def forks_with_a_pinned_writer(talk: Talk, root: str) -> None:
    """The child ends as an interpreter does; what is not written yet is the parent's affair."""
    store = _store_that_is("pinned writer", root, talk)
    Told(talk)
    pid = os.fork()
    if pid == 0:
        sys.exit(0)
    talk.say("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), store.stats().pending)
    os._exit(0)


def leave_in_one_of_several_ways(store: SnapshotStore, number: int) -> None:
    if number % 3 == 0:
        os._exit(0)
    if number % 3 == 1:
        sys.exit(0)  # through the parent's `with`, and through atexit
    del store
    gc.collect()
    sys.exit(0)


# -- full disks -------------------------------------------------------------------------------------------------------


class Heard(logging.Handler):
    """What snapstore has logged, from WARNING on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("snapstore").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def cause_of(ticket: SaveTicket) -> int | None:
    """The error number that a save failed with."""
    error = ticket.exception(PATIENCE_S)
    return error.__cause__.errno if error is not None and isinstance(error.__cause__, OSError) else None


def fills_a_disk(
    root: Path, fill: Callable[[SnapshotStore], None], make_room: Callable[[SnapshotStore], None]
) -> dict[str, Any]:
    """A store on a disk that fills up under it, before and after there is room again; what there was to see."""
    heard, seen = Heard(), {}
    store = SnapshotStore(root)
    kept = save(store, ("kept", 1), 0).result(PATIENCE_S)
    fill(store)
    big = {"big": tensors(1, 512 * 1024)["conv"]}
    seen["errors"] = [
        cause_of(store.save("kept", 1, big)),
        *(cause_of(store.save("new", n, big)) for n in range(5)),
    ]
    seen["health"] = [store.health().status]
    seen["warnings"] = len(heard.lines)
    make_room(store)
    seen["kept"] = version_of(store, ("kept", 1)) == 0 and kept.path.exists()
    seen["temporaries"] = [path.name for path in Path(store.session, ".tmp").iterdir()]
    save(store, ("after", 1), 1).result(PATIENCE_S)
    seen["after"] = version_of(store, ("after", 1))
    seen["health"].append(store.health().status)
    seen["warnings since"] = len(heard.lines) - seen["warnings"]
    seen["clean"] = store.shutdown(cleanup=True).clean
    seen["left"] = [path.name for path in sessions_in(root)]
    return seen


def fills_a_small_disk(disk: str) -> None:
    """To be run where a small file system is mounted; says what it saw on its standard output."""
    ballast = Path(disk) / "ballast"

    def fill(_: SnapshotStore) -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    print(json.dumps(fills_a_disk(Path(disk) / "root", fill, lambda _: ballast.unlink())))  # noqa: T201


def runs_out_of_inodes(disk: str) -> None:
    """There is room for bytes, and none for one more file."""
    ballast = Path(disk) / "ballast"
    ballast.mkdir()

    def fill(_: SnapshotStore) -> None:
        with suppress(OSError):
            for number in itertools.count():
                (ballast / str(number)).touch()

    print(json.dumps(fills_a_disk(Path(disk) / "root", fill, lambda _: shutil.rmtree(ballast))))  # noqa: T201


def stays_full(disk: str) -> None:
    """The same, and no room comes back before the end: it ends in time all the same, and says what failed."""
    store = SnapshotStore(Path(disk) / "root")
    tickets = [store.save("a", number, tensors(number, 16 * 1024)) for number in range(64)]
    report = store.shutdown(timeout_s=PATIENCE_S)
    errors = {cause_of(ticket) for ticket in tickets}
    failed = sum(ticket.state is SaveState.FAILED for ticket in tickets)
    try:
        SnapshotStore(Path(disk) / "root", StoreOptions(leftovers="keep")).shutdown()
        reopened = "opened"
    except RootError as error:
        reopened = errno.errorcode[error.errno or 0]
    with (
        SnapshotStore(Path(disk) / "root", StoreOptions(leftovers="adopt"))
        if reopened == "opened"
        else nullcontext() as again
    ):
        adopted = again.stats().live_snapshots if again is not None else None
    said = {
        "errors": sorted(filter(None, errors)),
        "all settled": failed + len(tickets) - failed == len(tickets) and report.abandoned == (),
        "failed": failed,
        "stopped": report.writer_stopped,
        "reopened": reopened,
        "adopted": adopted == len(tickets) - failed if adopted is not None else None,
    }
    print(json.dumps(said))  # noqa: T201


def writes_within_a_limit(talk: Talk, root: str) -> None:
    """A limit on the size of files: a disk that is full for big ones only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_: SnapshotStore) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))

    def make_room(_: SnapshotStore) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    talk.say(json.dumps(fills_a_disk(Path(root), fill, make_room)))


def runs_out_of_descriptors(talk: Talk, root: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []

    def fill(_: SnapshotStore) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        with suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))

    def make_room(_: SnapshotStore) -> None:
        for fd in opened:
            os.close(fd)

    talk.say(json.dumps(fills_a_disk(Path(root), fill, make_room)))


def runs_out_of_memory(talk: Talk, root: str) -> None:
    """The kernel gives no more than a little: a large copy finds no memory, to be written or to be read into."""
    store = SnapshotStore(root)
    kept = {"x": np.arange(4 << 20, dtype=np.float64)}
    large = {"x": np.zeros(8 << 20, dtype=np.float64)}
    store.save("kept", 1, kept).result(PATIENCE_S)
    save(store, ("small", 1), 0).result(PATIENCE_S)
    held = store.load("kept", 1)  # or its memory would do for the next one
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), before[1]))
    seen: dict[str, Any] = {}
    for name, use in (("save", lambda: store.save("new", 1, large)), ("load", lambda: store.load("kept", 1))):
        try:
            use()
        except MemoryError as error:
            seen[name] = str(error)
    stats = store.stats()
    seen["charged"] = [stats.pending, stats.pending_bytes, stats.accepted - stats.committed - stats.failed]
    seen["small ones go on"] = save(store, ("small", 1), 1).result(PATIENCE_S).nbytes > 0
    resource.setrlimit(resource.RLIMIT_AS, before)
    del held
    store.save("new", 1, large).result(PATIENCE_S)
    seen["next"] = [bool((store.load("kept", 1).tensors["x"] == kept["x"]).all()), store.has("new", 1)]
    seen["health"] = store.health().status
    seen["clean"] = store.shutdown(cleanup=True).clean
    talk.say(json.dumps(seen))


# -- SIGTERM ----------------------------------------------------------------------------------------------------------


def _in_c_for_long() -> None:
    """In C, without the interpreter's lock, and no signal interrupts it: ten seconds of it, or more."""
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 20_000_000)


def _store_that_is(situation: str, root: str, talk: Talk, tickets: int = 8) -> SnapshotStore:
    files = FaultyFileSystem()
    options = StoreOptions(max_pending_jobs=4, save_timeout_s=PATIENCE_S)
    store = SnapshotStore(root, options if situation == "full queue" else None, file_system=files)
    if situation in ("writing", "full queue"):
        files.delay("write", 0.03, ".tmp")
        for number in range(tickets if situation == "writing" else 4):
            save(store, ("a", number), number)
    if situation == "full queue":
        threading.Thread(target=_save_until_refused, args=(store, talk), daemon=True).start()
    if situation == "pinned writer":
        gate = files.pause("write", ".tmp")
        save(store, ("a", 0), 0)
        gate.wait_reached()
        save(store, ("a", 1), 1)
    return store


def _save_until_refused(store: SnapshotStore, talk: Talk) -> None:
    try:
        for number in itertools.count(4):
            save(store, ("a", number), number)
    except StoreClosedError:
        talk.say("refused")
        _NEVER.wait()


def is_terminated(
    talk: Talk,
    root: str,
    situation: str,
    grace_s: float = 5.0,
    cleanup: bool = True,
    before: str = "default",
) -> None:
    """Waits for SIGTERM in one of several situations, with a handler on top of one of several."""
    heard = Heard()
    atexit.register(lambda: talk.say("left by itself", len(heard.lines)))

    def ends_with_seven(signum: int, frame: object) -> None:
        talk.say("chained", threading.current_thread() is threading.main_thread(), store.health().status)
        sys.exit(7)

    def goes_on(signum: int, frame: object) -> None:
        talk.say("chained", threading.current_thread() is threading.main_thread(), store.health().status)

    handlers = {
        "default": signal.SIG_DFL,
        "ignored": signal.SIG_IGN,
        "exits": ends_with_seven,
        "returns": goes_on,
    }
    signal.signal(signal.SIGTERM, handlers[before])
    store = _store_that_is(situation, root, talk)
    install_sigterm_handler(store, grace_s=grace_s, cleanup=cleanup)
    if situation == "inside asyncio":
        asyncio.run(_waits_in_asyncio(talk, store))
    talk.say("ready", store.session.name)
    if situation == "main thread in C":
        _in_c_for_long()
    while True:
        time.sleep(PATIENCE_S)


async def _waits_in_asyncio(talk: Talk, store: SnapshotStore) -> None:
    await save(store, ("a", 0), 0)
    talk.say("ready", store.session.name)
    await asyncio.sleep(PATIENCE_S)


def leaves_when_it_is_refused(talk: Talk, root: str, how: str) -> None:
    """Its loop ends at the first save that SIGTERM has refused, while the disk still holds up the end of the store."""
    files = FaultyFileSystem()
    store = SnapshotStore(root, file_system=files)
    save(store, ("a", 0), 0).result(PATIENCE_S)
    gate = files.pause("remove_directory", "")
    threading.Thread(target=lambda: (talk.hear(), gate.open()), daemon=True).start()
    handler = install_sigterm_handler(store, grace_s=PATIENCE_S)
    talk.say("ready", store.session.name)
    with suppress(StoreClosedError):
        for number in itertools.count(1):
            save(store, ("a", number), number)
    gate.wait_reached()
    talk.say("leaves")
    if how == "uninstall":
        handler.uninstall()


def is_terminated_in_a_loop_with_handlers(talk: Talk, root: str, when: str) -> None:
    """The event loop has handlers of its own, installed before this package's or after: both work."""

    async def main() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, lambda: talk.say("usr1"))
        store = _store_that_is("idle", root, talk)
        if when == "before":
            loop.add_signal_handler(
                signal.SIGTERM, lambda: (talk.say("term", store.health().status), over.set())
            )
        handler = install_sigterm_handler(store, grace_s=5)
        if when == "after":
            loop.add_signal_handler(signal.SIGUSR2, lambda: talk.say("usr2"))
        talk.say("ready")
        await asyncio.wait_for(over.wait(), PATIENCE_S)
        handler.uninstall()
        talk.say("wakeup descriptor is the loop's again", signal.set_wakeup_fd(-1) != -1)

    asyncio.run(main())
    sys.exit(5)


def forks_with_a_handler(talk: Talk, root: str) -> None:
    """The child has neither the handler nor the pipe."""
    store = SnapshotStore(root)
    install_sigterm_handler(store, grace_s=5)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, b"up")
        _NEVER.wait()
    os.read(reader, 2)
    os.kill(pid, signal.SIGTERM)
    talk.say("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    time.sleep(0.1)
    talk.say("store", store.health().status, bool(save(store, ("a", 1), 0).result(PATIENCE_S)))
    talk.say("ready")
    time.sleep(PATIENCE_S)


# -- the end of an interpreter ----------------------------------------------------------------------------------------

_kept: list[object] = []


def ends(talk: Talk, root: str, how: str, situation: str) -> None:
    """Leaves a store open, in one of several situations, and ends as told when told."""
    store = _store_that_is(situation, root, talk)
    _kept.append(store)
    if situation == "saves just accepted":
        for number in range(20):
            save(store, ("a", number), number)
    if situation == "others save":
        for number in range(4):
            threading.Thread(target=_saves_for_ever, args=(store, number), daemon=True).start()
    if situation == "shutdown under way":
        threading.Thread(target=store.shutdown, kwargs={"cleanup": True}, daemon=True).start()
    if situation == "a handler of ours shuts down":
        save(store, ("a", 0), 0)
        atexit.register(lambda: talk.say("report", store.shutdown(cleanup=True).clean))
    talk.say("ready")
    talk.hear()
    if how == "sys.exit":
        sys.exit(3)
    if how == "exception":
        raise ValueError("on purpose")
    if how == "os._exit":
        os._exit(4)


def _saves_for_ever(store: SnapshotStore, number: int) -> None:
    for count in itertools.count():
        save(store, (f"thread-{number}", count % 4), count)
