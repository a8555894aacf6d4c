"""Every operation on the disk fails once, with every error number: what was promised holds, and the next use works."""

from __future__ import annotations

import errno
import itertools
import shutil
from pathlib import Path

import pytest
from actions import (
    ACTIONS,
    BEFORE,
    Spot,
    Stage,
    assert_adoptable,
    copied,
    everything_in,
    let_sweeper_finish,
    save,
    spots_of,
    stage_for,
    template_for,
)
from processes import PATIENCE_S, Processes

from snapstore import RootError, SaveFailedError, SaveState

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE]
CAN_NOT_FAIL = frozenset({"tells_mounts"})


def undisturbed(action: str, root: Path) -> list[Spot]:
    stage = stage_for(ACTIONS[action], root)
    before = len(stage.files.calls)
    ACTIONS[action].act(stage)
    calls = [call.operation for call in stage.files.calls[before:]]
    stage.opened.shutdown(cleanup=True)
    return [spot for spot in spots_of(calls) if spot.operation not in CAN_NOT_FAIL]


def with_fault(action: str, root: Path, spot: Spot, number: int) -> Stage:
    """Make the action while the operation fails, once; a close that fails has closed all the same."""
    stage = stage_for(ACTIONS[action], root)
    when = "after" if spot.operation == "close" else "before"
    stage.files.fail(spot.operation, number, skip=spot.skip, when=when)  # type: ignore[arg-type]
    try:
        ACTIONS[action].act(stage)
    except RootError as error:
        told = error.errno
        refused = stage.store is None and told in (number, errno.EINVAL)
    else:
        refused = stage.store is not None
    assert refused, "the cause is in the error"
    stage.files.heal()
    return stage


def assert_tickets_tell_the_truth(stage: Stage, number: int) -> None:
    for key, ticket in stage.tickets.items():
        assert ticket.done(), key
        if ticket.state is SaveState.FAILED:
            error = ticket.exception(0)
            assert isinstance(error, SaveFailedError)
            assert isinstance(error.__cause__, OSError) and error.__cause__.errno == number
            assert stage.report is not None or everything_of(stage)[key] == BEFORE.get(key)
        else:
            assert ticket.state is SaveState.COMMITTED
            assert stage.report is not None or everything_of(stage)[key] == 1


def everything_of(stage: Stage) -> dict[tuple[str, int], int | None]:
    return everything_in(stage.opened, {*BEFORE, *stage.tickets})


def assert_second_use_works(stage: Stage) -> None:
    """Writes, and with them the store, are well again; nothing half-made is left, and a cleanup cleans."""
    store = stage.opened
    save(store, ("next", 1), 0).result(PATIENCE_S)
    for request_id in ("next", "a" if stage.report is not None else "next"):
        assert store.cleanup_request(request_id, timeout_s=PATIENCE_S).clean
    let_sweeper_finish(store)
    assert store.health().status == "ok", store.health()
    assert list((store.session / ".tmp").iterdir()) == []
    assert list((store.session / ".trash").iterdir()) == []
    stats = store.stats()
    assert (stats.pending, stats.trash_bytes) == (0, 0)
    assert store.shutdown().writer_stopped


def look_after(action: str, root: Path, spot: Spot, number: int) -> None:
    stage = with_fault(action, root, spot, number)
    if stage.store is None:
        assert action in ("open", "reclaim", "adopt")
    else:
        assert_tickets_tell_the_truth(stage, number)
        if action.startswith("shutdown"):
            assert stage.report.writer_stopped
            assert stage.report.session_removed or not stage.report.clean or "cleanup" not in action
        else:
            assert_second_use_works(stage)
    assert_adoptable(root, ACTIONS[action].may_be)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("each", ["operation", pytest.param("error", marks=pytest.mark.slow)])
def test_a_fault_at_any_operation_breaks_no_promise(
    processes: Processes, tmp_path: Path, action: str, each: str
) -> None:
    """Each operation with one error number, in turn; or with every one of them."""
    template = template_for(action, processes, tmp_path / "template")
    spots = undisturbed(action, copied(template, tmp_path / "undisturbed"))
    in_turn = zip(spots, itertools.cycle(ERRORS), strict=False)
    for spot, number in in_turn if each == "operation" else itertools.product(spots, ERRORS):
        root = copied(template, tmp_path / f"{errno.errorcode[number]}-{spot.operation}-{spot.skip}")
        try:
            look_after(action, root, spot, number)
        except BaseException as error:
            error.args = (f"{errno.errorcode[number]} at {spot}: {error}",)
            raise
        shutil.rmtree(root)
