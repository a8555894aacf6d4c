"""SIGTERM, in real processes: in time, in order, whatever the main thread does, and with whatever was there before."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from actions import assert_adoptable, engine_of, save, sessions_in, state_of, wait_until
from helpers import tensors
from processes import Child, Processes

from snapstore import SaveState, SnapshotStore, StoreClosedError, StoreOptions
from snapstore._files import FileSystem
from snapstore._owner import liveness, read_record
from snapstore.signals import install_sigterm_handler
from snapstore.testing import FaultyFileSystem

SITUATIONS = ["idle", "writing", "full queue", "pinned writer", "main thread in C", "inside asyncio"]


def terminated(child: Child) -> tuple[list[str], int, float]:
    """What it said after SIGTERM, its status, and how long it took."""
    started_s = time.monotonic()
    child.signal(signal.SIGTERM)
    lines = child.all_it_said()
    status = child.wait()
    return lines, status, time.monotonic() - started_s


def ready(child: Child) -> str:
    word, _, name = child.says().partition(" ")
    assert word == "ready", name
    return name


@pytest.mark.parametrize("situation", SITUATIONS)
def test_sigterm_ends_the_stores_and_the_process_with_status_0(
    processes: Processes, root: Path, situation: str
) -> None:
    child = processes.start("is_terminated", root=str(root), situation=situation, grace_s=2.0)
    ready(child)
    lines, status, took_s = terminated(child)
    assert status == 0
    assert took_s < (3.0 if situation in ("pinned writer", "main thread in C") else 1.5)
    assert ("refused" in lines) is (situation == "full queue")
    if situation == "pinned writer":
        assert len(sessions_in(root)) == 1
        assert_adoptable(root, {("a", 0): {None}, ("a", 1): {None}})
    else:
        assert sessions_in(root) == []
        left_by_itself = situation != "main thread in C"
        assert lines[-1:] == (["left by itself 0"] if left_by_itself else []), (
            "and there was nothing to warn of"
        )


def test_without_cleanup_what_was_accepted_is_written_first(processes: Processes, root: Path) -> None:
    child = processes.start("is_terminated", root=str(root), situation="writing", cleanup=False)
    ready(child)
    assert terminated(child)[1] == 0
    assert_adoptable(root, {("a", number): {number} for number in range(8)})


def test_a_main_thread_in_c_keeps_nobody_waiting(processes: Processes, root: Path) -> None:
    """The store has ended long before a Python signal handler could have run."""
    child = processes.start("is_terminated", root=str(root), situation="main thread in C", before="exits")
    ready(child)
    time.sleep(0.2)
    started_s = time.monotonic()
    child.signal(signal.SIGTERM)
    wait_until(lambda: sessions_in(root) == [])
    assert time.monotonic() - started_s < 2.0
    with pytest.raises(TimeoutError):
        child.says(timeout_s=0.2)
    child.kill()


@pytest.mark.parametrize("situation", ["idle", "writing", "inside asyncio"])
def test_a_python_handler_is_called_once_in_the_main_thread_when_the_stores_have_ended(
    processes: Processes, root: Path, situation: str
) -> None:
    child = processes.start("is_terminated", root=str(root), situation=situation, before="exits")
    ready(child)
    lines, status, _ = terminated(child)
    assert status == 7
    assert [line for line in lines if line.startswith("chained")] == ["chained True dead"]


@pytest.mark.parametrize("how", ["uninstall", "exit"])
def test_a_main_thread_that_leaves_meanwhile_does_not_stop_the_ending(
    processes: Processes, root: Path, how: str
) -> None:
    child = processes.start("leaves_when_it_is_refused", root=str(root), how=how)
    ready(child)
    child.signal(signal.SIGTERM)
    assert child.says() == "leaves"
    with pytest.raises(TimeoutError):
        child.wait(1.0)
    assert sessions_in(root) != []
    child.tell()
    assert child.wait() == 0
    assert sessions_in(root) == []


def test_a_python_handler_that_returns_keeps_the_process_and_gets_the_next_sigterm_at_once(
    processes: Processes, root: Path
) -> None:
    child = processes.start("is_terminated", root=str(root), situation="idle", before="returns")
    ready(child)
    for _ in range(3):
        child.signal(signal.SIGTERM)
        assert child.says() == "chained True dead"
    with pytest.raises(TimeoutError):
        child.wait(0.1)
    child.kill()


def test_where_sigterm_was_ignored_the_process_goes_on(processes: Processes, root: Path) -> None:
    child = processes.start("is_terminated", root=str(root), situation="idle", before="ignored")
    ready(child)
    for _ in range(2):
        child.signal(signal.SIGTERM)
        wait_until(lambda: sessions_in(root) == [])
    with pytest.raises(TimeoutError):
        child.wait(0.3)
    child.kill()


def test_a_second_sigterm_does_not_abort_the_ending(processes: Processes, root: Path) -> None:
    child = processes.start(
        "is_terminated", root=str(root), situation="writing", cleanup=False, before="exits"
    )
    ready(child)
    for _ in range(20):
        child.signal(signal.SIGTERM)
        time.sleep(0.005)
    lines, status, _ = terminated(child)
    assert status == 7 and [line for line in lines if "chained" in line] == ["chained True dead"]
    assert_adoptable(root, {("a", number): {number} for number in range(8)})


@pytest.mark.parametrize("grace_s", [0.0, 0.5, 1.5])
def test_the_deadline_ends_what_does_not_end(processes: Processes, root: Path, grace_s: float) -> None:
    child = processes.start("is_terminated", root=str(root), situation="pinned writer", grace_s=grace_s)
    name = ready(child)
    _, status, took_s = terminated(child)
    assert status == 0 and 0.8 * grace_s <= took_s < grace_s + 1.0
    assert liveness(FileSystem(), str(root / name), read_record(FileSystem(), str(root / name))) == "dead"


def test_handlers_of_a_loop_that_was_there_before_are_called_when_the_stores_have_ended(
    processes: Processes, root: Path
) -> None:
    child = processes.start("is_terminated_in_a_loop_with_handlers", root=str(root), when="before")
    assert child.says() == "ready"
    child.signal(signal.SIGUSR1)
    assert child.says() == "usr1", "its other signals pass through"
    lines, status, _ = terminated(child)
    assert lines == ["term dead", "wakeup descriptor is the loop's again True"]
    assert status == 5 and sessions_in(root) == []


def test_a_loop_that_takes_the_wakeup_descriptor_later_does_not_switch_it_off(
    processes: Processes, root: Path
) -> None:
    child = processes.start("is_terminated_in_a_loop_with_handlers", root=str(root), when="after")
    assert child.says() == "ready"
    for number, word in ((signal.SIGUSR1, "usr1"), (signal.SIGUSR2, "usr2")):
        child.signal(number)
        assert child.says() == word
    _, status, took_s = terminated(child)
    assert status == 0 and took_s < 1.5 and sessions_in(root) == []


def test_a_sigterm_for_a_forked_child_is_the_childs_own(processes: Processes, root: Path) -> None:
    child = processes.start("forks_with_a_handler", root=str(root))
    assert child.says() == f"child {-signal.SIGTERM}"
    assert child.says() == "store ok True"
    assert child.says() == "ready"
    assert terminated(child)[1] == 0
    assert sessions_in(root) == []


# -- in this process ----------------------------------------------------------------------------------------------


@pytest.fixture
def came() -> Iterator[list[int]]:
    """SIGTERM goes to a Python handler that writes it down."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def raise_sigterm(came: list[int], times: int = 1) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: len(came) == times)


def test_uninstall_puts_everything_back(root: Path, came: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1), set(threading.enumerate())
    store = SnapshotStore(root)
    handler = install_sigterm_handler(store)
    assert signal.getsignal(signal.SIGTERM) is not before[0]
    handler.uninstall()
    handler.uninstall()
    raise_sigterm(came)
    assert store.health().status == "ok"
    store.shutdown(cleanup=True)
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1), set(threading.enumerate())) == before


def test_handlers_come_off_in_any_order(root: Path, came: list[int]) -> None:
    """What was installed on top stays; the one below lets SIGTERM through."""
    stores = [SnapshotStore(root) for _ in range(2)]
    first, second = (install_sigterm_handler(store, grace_s=5) for store in stores)
    first.uninstall()
    raise_sigterm(came)
    assert [store.health().status for store in stores] == ["ok", "dead"]
    second.uninstall()
    raise_sigterm(came, 2)
    assert stores[0].shutdown(cleanup=True).clean
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def test_two_handlers_end_their_stores_one_after_the_other(root: Path, came: list[int]) -> None:
    stores = [SnapshotStore(root) for _ in range(2)]
    with install_sigterm_handler(stores[0], grace_s=5), install_sigterm_handler(stores[1], grace_s=5):
        raise_sigterm(came)
        assert [store.health().status for store in stores] == ["dead", "dead"]
        assert sessions_in(root) == []


def test_every_store_has_its_chance_though_others_are_stuck_or_broken(
    root: Path, came: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And all of the time: none of them comes after another."""
    files, slow = FaultyFileSystem(), FaultyFileSystem()
    stuck, sound = SnapshotStore(root, file_system=files), SnapshotStore(root, file_system=slow)
    broken = SnapshotStore(root)
    handler = install_sigterm_handler(stuck, broken, sound, grace_s=1, cleanup=False)
    with files.pause("write", ".tmp") as gate, handler:
        pinned = save(stuck, ("a", 1), 0)
        gate.wait_reached()
        slow.delay("write", 0.1, ".tmp")
        tickets = [save(sound, ("a", number), 0) for number in range(3)]
        monkeypatch.setattr(engine_of(broken), "refuse", lambda why: 1 / 0)
        started_s = time.monotonic()
        raise_sigterm(came)
        assert time.monotonic() - started_s < 1.5
        assert [ticket.state for ticket in tickets] == [SaveState.COMMITTED] * 3
        wait_until(lambda: not broken.session.exists())  # its writer is told to end at the end of its time
        assert "ZeroDivisionError" in caplog.text and "stuck" in caplog.text
    pinned.exception(10)
    engine_of(stuck).join_briefly(10)


def test_saves_are_refused_first(root: Path, came: list[int]) -> None:
    """Of all stores, before any of them is waited for."""
    files = FaultyFileSystem()
    stores = [SnapshotStore(root, file_system=files), SnapshotStore(root)]
    with files.pause("write", ".tmp") as gate, install_sigterm_handler(*stores, grace_s=5, cleanup=False):
        pinned = save(stores[0], ("a", 1), 0)
        gate.wait_reached()
        os.kill(os.getpid(), signal.SIGTERM)
        for store in stores:
            wait_until(lambda store=store: store.health().status == "dead")
            with pytest.raises(StoreClosedError, match="SIGTERM"):
                store.save("late", 1, tensors(1))
        assert came == [] and not pinned.done()
        gate.open()
        wait_until(lambda: len(came) == 1)
    assert pinned.result(0)


def test_copies_that_are_under_way_are_waited_for_but_not_for_ever(
    root: Path, came: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their share of the grace is less than half of it."""
    store = SnapshotStore(root)
    waited: list[float] = []
    monkeypatch.setattr(state_of(store), "await_staged", waited.append)
    with install_sigterm_handler(store, grace_s=10):
        raise_sigterm(came)
    assert 3.0 < waited[0] <= 4.0 and store.health().status == "dead"


def test_a_pipe_full_of_other_signals_keeps_nothing_from_working(root: Path, came: list[int]) -> None:
    store = SnapshotStore(root)
    usr1: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: usr1.append(number))
    try:
        with install_sigterm_handler(store, grace_s=5):
            for _ in range(2000):
                os.kill(os.getpid(), signal.SIGUSR1)
            raise_sigterm(came)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(usr1) > 0 and store.health().status == "dead"


def test_it_is_refused_outside_the_main_thread(root: Path) -> None:
    store = SnapshotStore(root)
    said: list[BaseException] = []

    def elsewhere(act: Callable[[], object]) -> None:
        def run() -> None:
            try:
                act()
            except ValueError as error:
                said.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    before = signal.getsignal(signal.SIGTERM)
    elsewhere(lambda: install_sigterm_handler(store))
    assert signal.getsignal(signal.SIGTERM) is before
    with install_sigterm_handler(store) as handler:
        elsewhere(handler.uninstall)
    assert [("main thread" in str(error)) for error in said] == [True, True]
    store.shutdown(cleanup=True)


def test_bad_arguments_are_refused_before_anything_is_installed(root: Path) -> None:
    store = SnapshotStore(root, StoreOptions())
    before = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    for error, arguments, options in [
        (ValueError, [], {}),
        (TypeError, [root], {}),
        (TypeError, [store, None], {}),
        (ValueError, [store], {"grace_s": -1}),
        (ValueError, [store], {"grace_s": float("nan")}),
        (TypeError, [store], {"grace_s": "1"}),
        (TypeError, [store], {"cleanup": 1}),
    ]:
        with pytest.raises(error):
            install_sigterm_handler(*arguments, **options)  # type: ignore[arg-type]
    assert (signal.getsignal(signal.SIGTERM), set(threading.enumerate())) == before
    store.shutdown(cleanup=True)
