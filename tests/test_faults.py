"""Every operation on the disk fails, once and in every way: what was promised holds, and the next use works."""

from __future__ import annotations

import errno
import itertools
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from actions import (
    ACTIONS,
    BEFORE,
    Key,
    Spot,
    Stage,
    assert_adoptable,
    copied,
    engine_of,
    everything_in,
    let_sweeper_finish,
    save,
    spots_of,
    stage_for,
    template_for,
    wait_until,
)
from processes import PATIENCE_S, Processes
from trust_results import record

from snapstore import RootError, SaveFailedError, SaveState, SnapshotCorruptError, SnapshotStore, StoreOptions
from snapstore.testing import OPERATIONS, FaultyFileSystem, Gate

NUMBERS = [
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS),
    *(errno.EMFILE, errno.ENOENT, errno.ESTALE, errno.EINTR),
]
SHORT, LATE, LOST = "short write", "delay", "every operation from there on"
CAN_NOT_FAIL = frozenset({"tells_mounts"})
REMOVING = frozenset({"unlink", "remove_directory"})
LATE_S = 0.03


@pytest.fixture(scope="module")
def figures() -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()
    yield counted
    record("faults", "make faults", **counted)


@dataclass(frozen=True)
class Fault:
    """One way in which one operation goes wrong."""

    spot: Spot
    kind: int | str

    @property
    def number(self) -> int | str:
        """What an error says of it."""
        return errno.EIO if self.kind == LOST else self.kind

    def __str__(self) -> str:
        name = errno.errorcode[self.kind] if isinstance(self.kind, int) else self.kind
        return f"{name} at {self.spot.operation} {self.spot.skip}"

    @property
    def when(self) -> Any:
        """A close that fails has closed all the same; what is not there to be removed is gone."""
        gone = self.kind == errno.ENOENT and self.spot.operation in REMOVING
        return "after" if gone or self.spot.operation == "close" else "before"

    def plant(self, stage: Stage) -> None:
        operation, skip = self.spot.operation, self.spot.skip
        if isinstance(self.kind, int):
            stage.files.fail(operation, self.kind, skip=skip, when=self.when)
        elif self.kind == SHORT:
            stage.files.short_write(7)
        elif self.kind == LOST:
            stage.files.call(
                operation,
                lambda: lose(stage.files),
                skip=skip,
                when="after" if operation == "close" else "before",
            )
        else:
            stage.files.call(operation, lambda: time.sleep(LATE_S), skip=skip)


def lose(files: FaultyFileSystem) -> None:
    """Nothing works any more until the disk is back."""
    for operation in set(OPERATIONS) - CAN_NOT_FAIL:
        when: Any = "after" if operation == "close" else "before"
        files.fail(operation, errno.EIO, when=when, times=math.inf)
    raise OSError(errno.EIO, "the disk is gone")


def faults_at(spots: Iterable[Spot]) -> list[Fault]:
    """Each operation in each way; of writes that are short, all are."""
    shortened = [SHORT] if any(spot.operation == "write" for spot in spots) else []
    first = [Fault(Spot("write", 0), kind) for kind in shortened]
    return first + [Fault(spot, kind) for spot in spots for kind in (*NUMBERS, LATE, LOST)]


def some_each(spots: list[Spot]) -> list[Fault]:
    """Some forty operations, or all where there are not many more, each in one way, in turn."""
    chosen = spots[:: max(1, len(spots) // 40)]
    return [
        Fault(spot, kind) for spot, kind in zip(chosen, itertools.cycle([*NUMBERS, LATE, LOST]), strict=False)
    ]


def undisturbed(action: str, root: Path) -> list[Spot]:
    stage = stage_for(ACTIONS[action], root)
    before = len(stage.files.calls)
    ACTIONS[action].act(stage)
    calls = [call.operation for call in stage.files.calls[before:]]
    assert stage.raised == []
    stage.opened.shutdown(cleanup=True)
    return [spot for spot in spots_of(calls) if spot.operation not in CAN_NOT_FAIL]


def with_fault(action: str, root: Path, fault: Fault) -> Stage:
    """Make the action while the operation fails, once."""
    stage = stage_for(ACTIONS[action], root)
    fault.plant(stage)
    try:
        ACTIONS[action].act(stage)
    except RootError as error:
        told = error.errno
        no_marker = fault.kind == errno.ENOENT and told == errno.EEXIST
        refused = stage.store is None and (told == fault.number or no_marker)
    else:
        refused = stage.store is not None
    assert refused, "the cause is in the error"
    stage.files.heal()
    return stage


def assert_tickets_tell_the_truth(stage: Stage, fault: Fault) -> None:
    for key, ticket in stage.tickets.items():
        assert ticket.done(), key
        if ticket.state is SaveState.FAILED:
            error = ticket.exception(0)
            assert isinstance(error, SaveFailedError)
            assert isinstance(error.__cause__, OSError) and error.__cause__.errno == fault.number
            if stage.report is None:
                assert everything_of(stage)[key] in what_may_be_read(stage, key, fault)
        else:
            assert ticket.state is SaveState.COMMITTED
            assert stage.report is not None or everything_of(stage)[key] == 1


def what_may_be_read(stage: Stage, key: Key, fault: Fault) -> set[int | None]:
    """What was there before; or the new one, where the disk was lost between its rename and the way back."""
    both = fault.kind == LOST and stage.options.durability == "full" and key in BEFORE
    return {BEFORE.get(key), 1} if both else {BEFORE.get(key)}


def assert_errors_tell_the_cause(stage: Stage, fault: Fault) -> None:
    """What a reader or an operator was told."""
    for error in stage.raised:
        vanished = isinstance(error, (SnapshotCorruptError, RootError)) and fault.kind == errno.ENOENT
        assert vanished or (isinstance(error, OSError) and error.errno == fault.number), repr(error)


def everything_of(stage: Stage) -> dict[tuple[str, int], int | None]:
    return everything_in(stage.opened, {*BEFORE, *stage.tickets})


def assert_second_use_works(stage: Stage, action: str) -> None:
    """Writes, and with them the store, are well again; nothing half-made is left, and a cleanup cleans."""
    store = stage.opened
    if action in ("load", "prune", "verify"):
        stage.raised.clear()
        ACTIONS[action].act(stage)
        assert stage.raised == []
    save(store, ("next", 1), 0).result(PATIENCE_S)
    for request_id in ("next", "a" if action == "cleanup" else "next"):
        assert store.cleanup_request(request_id, timeout_s=PATIENCE_S).clean
    let_sweeper_finish(store)
    assert store.health().status == "ok", store.health()
    assert list((store.session / ".tmp").iterdir()) == []
    assert list((store.session / ".trash").iterdir()) == []
    stats = store.stats()
    assert (stats.pending, stats.trash_bytes) == (0, 0)
    assert store.shutdown().writer_stopped


def look_after(action: str, root: Path, fault: Fault) -> None:
    stage = with_fault(action, root, fault)
    if stage.store is None:
        assert action in ("open", "reclaim", "adopt")
    else:
        assert_tickets_tell_the_truth(stage, fault)
        assert_errors_tell_the_cause(stage, fault)
        if action.startswith("shutdown"):
            assert stage.report.writer_stopped
            assert stage.report.session_removed or not stage.report.clean or "cleanup" not in action
        else:
            assert_second_use_works(stage, action)
    assert_adoptable(root, ACTIONS[action].may_be)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_fault_at_any_operation_breaks_no_promise(
    processes: Processes, tmp_path: Path, figures: Counter[str], action: str, every: bool
) -> None:
    """Operations in one way each, in turn; or every operation in every way."""
    template = template_for(action, processes, tmp_path / "template")
    spots = undisturbed(action, copied(template, tmp_path / "undisturbed"))
    faults = faults_at(spots) if every else some_each(spots)
    for fault in faults:
        root = copied(template, tmp_path / str(fault).replace(" ", "-"))
        try:
            look_after(action, root, fault)
        except BaseException as error:
            error.args = (f"{fault}: {error}",)
            raise
        shutil.rmtree(root)
    figures.update(actions=1, operations=len(spots), faults=len(faults))


# -- disks that hang --------------------------------------------------------------------------------------------------

SOON_S = 1.0
"""What a call may take beyond its own time-out on a busy machine."""


def assert_within(limit_s: float, act: Callable[[], Any]) -> Any:
    started_s = time.monotonic()
    result = act()
    took_s = time.monotonic() - started_s
    assert took_s < limit_s + SOON_S, f"{took_s:.2f} s"
    return result


def assert_a_store_beside_is_well(root: Path) -> None:
    """In the same root, on the same disk, by another way."""
    store = assert_within(0, lambda: SnapshotStore(root, StoreOptions(leftovers="keep")))
    assert_within(0, lambda: save(store, ("beside", 1), 0).result(PATIENCE_S))
    assert assert_within(0, lambda: store.shutdown(cleanup=True)).clean


def assert_the_store_never_waits(store: SnapshotStore) -> None:
    """For a disk that hangs in one operation: each call ends within its own time-out, and says how it is."""
    ticket = assert_within(0, lambda: save(store, ("own", 1), 0))
    assert_within(0, lambda: (store.health(), store.boundaries("a"), store.latest("own")))
    stats = assert_within(0, store.stats)
    assert stats.accepted == stats.committed + stats.cancelled + stats.failed + stats.pending
    assert_within(0.1, lambda: store.flush(0.1))
    assert_within(0.1, lambda: store.cleanup_request("own", timeout_s=0.1))
    assert not store.has("own", 1)
    assert_within(0.2, lambda: store.shutdown(timeout_s=0.2))
    assert ticket.done() or ticket.state is SaveState.WRITING


def frozen_at(files: FaultyFileSystem, spot: Spot, *, whole: bool) -> Gate:
    """The one operation never comes back; or none that is made from there on."""
    gate = Gate()

    def freeze() -> None:
        for operation in OPERATIONS if whole else ():
            files.call(operation, gate.pass_through, times=math.inf)
        gate.pass_through()

    files.call(spot.operation, freeze, skip=spot.skip)
    return gate


def look_at_a_hang(action: str, root: Path, spot: Spot, *, whole: bool = False) -> None:
    """For ever, as far as anybody here can see; and in the end it comes back all the same."""
    stage = stage_for(ACTIONS[action], root)
    stage.timeout_s = 0.2
    gate = frozen_at(stage.files, spot, whole=whole)
    with ThreadPoolExecutor(1) as caller:
        with gate:
            acting = caller.submit(ACTIONS[action].act, stage)
            wait_until(lambda: gate.reached or acting.done())
            assert_a_store_beside_is_well(root)
            if action.startswith("shutdown"):
                assert_within(stage.timeout_s, lambda: acting.result(PATIENCE_S))
            elif stage.store is not None:
                assert_the_store_never_waits(stage.store)
        acting.result(PATIENCE_S)
    assert stage.opened.shutdown().waited_s < PATIENCE_S
    assert engine_of(stage.opened).join_briefly(PATIENCE_S) == 0
    assert stage.opened.stats().cancelled_in_hand == 0
    may_be = {**ACTIONS[action].may_be, ("own", 1): {None}}
    if action == "prune":
        may_be["live", 1] = {None, 0}  # its owner had ended by the time that the disk came back
    assert_adoptable(root, may_be)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_disk_that_hangs_holds_up_nobody_who_does_not_wait_for_it(
    processes: Processes, tmp_path: Path, figures: Counter[str], action: str, every: bool
) -> None:
    """In one operation, in another the whole disk; or both in every one."""
    template = template_for(action, processes, tmp_path / "template")
    spots = undisturbed(action, copied(template, tmp_path / "undisturbed"))
    some = [(spots[len(spots) // 3], False), (spots[len(spots) * 2 // 3], True)]
    chosen = list(itertools.product(spots, (False, True))) if every else some
    for spot, whole in chosen:
        root = copied(template, tmp_path / f"{spot.operation}-{spot.skip}-{whole}")
        try:
            look_at_a_hang(action, root, spot, whole=whole)
        except BaseException as error:
            error.args = (f"hung in {spot}, the whole disk {whole}: {error}",)
            raise
        shutil.rmtree(root)
    figures.update(hangs=len(chosen))
