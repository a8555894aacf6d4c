"""What is explored: a few clients beside each other, and what must hold of all they saw, in whatever order they ran.

A client is a list of steps on ``Calls``, which notes when each call began, when it ended, and what came of it. When all
have ended, ``Calls.check`` compares these notes with each other and with the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from actions import engine_of, state_of

from snapstore import (
    CleanupReport,
    DiskQuotaError,
    SaveCancelledError,
    SaveFailedError,
    SaveState,
    SaveTicket,
    ShutdownReport,
    Snapshot,
    SnapshotCorruptError,
    SnapshotKey,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreClosedError,
    StoreFullError,
)
from snapstore._cleanup import Cleaning
from snapstore._paths import parse_generation_name
from snapstore._saving import fulfil, offered
from snapstore.testing import FakeDevice, World

T = TypeVar("T")

ROOT = "/root"
OUTSIDE = "/outside"


@dataclass(eq=False)
class Call:
    """``began`` and ``ended`` count switching points: a call was over before another if it ended before that began."""

    verb: str
    request_id: str | None
    token_count: int | None
    began: int
    content: int = 0
    ended: int = 1 << 60
    outcome: Any = None

    def before(self, other: Call) -> bool:
        return self.ended <= other.began

    def concerns(self, other: Call) -> bool:
        return self.request_id is None or self.request_id == other.request_id

    @property
    def ticket(self) -> SaveTicket | None:
        return self.outcome if isinstance(self.outcome, SaveTicket) else None

    def __str__(self) -> str:
        outcome = self.outcome
        shown = (
            f"{outcome.state.value} {outcome.generation}"
            if isinstance(outcome, SaveTicket)
            else repr(outcome)
        )
        key = f"{self.request_id} {self.token_count} #{self.content}"
        return f"{self.verb} {key} [{self.began}, {self.ended}]: {shown}"


EXPECTED = (
    SaveCancelledError,
    SaveFailedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    StoreClosedError,
    StoreFullError,
    FutureTimeoutError,
    OSError,
)


@dataclass
class Calls:
    """One store, and all that was asked of it.

    ``fails``: its device may be slow, or its disk broken, so that saves may fail. ``litters``: its disk may be broken.
    """

    world: World
    store: SnapshotStore
    fails: bool = False
    litters: bool = False
    device: FakeDevice = field(default_factory=FakeDevice)
    calls: list[Call] = field(default_factory=list)
    cleaned: set[int] = field(default_factory=set)
    """Generations of which a cleanup said that no file is left."""

    def __post_init__(self) -> None:
        self.world.checks.append(self._check_cleaned)

    # -- steps ------------------------------------------------------------------------------------------------------

    def save(self, request_id: str, token_count: int) -> None:
        call = self._begin("save", request_id, token_count)
        call.content = len(self.calls)
        self._end(call, lambda: self.store.save(request_id, token_count, tensors(call.content)))

    def save_from_device(self, request_id: str, token_count: int) -> None:
        """And have the device overwrite the tensor, in the order of its stream."""
        call = self._begin("save", request_id, token_count)
        call.content = len(self.calls)
        tensor = self.device.tensor(tensors(call.content)["x"])
        self._end(call, lambda: self.store.save(request_id, token_count, {"x": tensor}))
        self.device.overwrite(tensor, 0)

    def save_by_bell(self, request_id: str, token_count: int) -> None:
        """As an event loop does: with a turn, and a look at each ring. No time-out helps where a ring is missing."""
        call = self._begin("save", request_id, token_count)
        call.content = len(self.calls)
        engine = engine_of(self.store)
        offer = offered(
            engine, SnapshotKey(request_id, token_count), tensors(call.content), None, borrow=False
        )

        def work() -> SaveTicket:
            turn = engine.state.queue_up(*offer.wanted)
            ending: BaseException | None = None
            try:
                job = self._at_a_ring(lambda: engine.state.enter(turn))
            except BaseException as error:
                ending = error
                raise
            finally:
                engine.state.leave(turn, ending)
            return fulfil(engine, offer, job)

        self._end(call, work)

    def cleanup_by_bell(self, request_id: str) -> None:
        call = self._begin("cleanup", request_id)

        def work() -> CleanupReport:
            cleaning = Cleaning(state_of(self.store), [request_id])
            self._at_a_ring(lambda: cleaning.over or None)
            return cleaning.end(waited=True)

        self._end(call, work)
        self._check_clean(call)

    def _at_a_ring(self, look: Callable[[], T | None]) -> T:
        rings: list[bool] = []
        with state_of(self.store).watched(lambda: rings.append(True)):
            while (answer := look()) is None:
                self.world.wait(lambda: bool(rings), None, "bell")
                rings.clear()
        return answer

    def lend(self, request_id: str, token_count: int) -> None:
        """Save without a copy; what was lent is written over as soon as it is released."""
        call = self._begin("save", request_id, token_count)
        call.content = len(self.calls)
        lent = tensors(call.content)
        self._end(call, lambda: self.store.save(request_id, token_count, lent, borrow=True))
        if call.ticket is not None and call.ticket.wait_released(1.0):
            lent["x"][:] = 255

    def load(self, request_id: str, token_count: int) -> None:
        call = self._begin("load", request_id, token_count)
        self._end(call, lambda: content_of(self.store.load(request_id, token_count)))

    def cleanup(self, request_id: str, timeout_s: float = 2.0) -> None:
        call = self._begin("cleanup", request_id)
        self._end(call, lambda: self.store.cleanup_request(request_id, timeout_s=timeout_s))
        self._check_clean(call)

    def cleanup_all(self, timeout_s: float = 5.0) -> None:
        call = self._begin("cleanup", None)
        self._end(call, lambda: self.store.cleanup_all(timeout_s=timeout_s))
        self._check_clean(call)

    def detach(self, request_id: str, token_count: int) -> None:
        call = self._begin("detach", request_id, token_count)
        call.content = len(self.calls)
        target = f"{OUTSIDE}/{call.content}"
        self._end(call, lambda: self.store.detach(request_id, token_count, target, timeout_s=3.0))

    def flush(self) -> None:
        call = self._begin("flush", None)
        self._end(call, lambda: self.store.flush(timeout_s=5.0))

    def drain(self, request_id: str) -> None:
        call = self._begin("drain", request_id)
        self._end(call, lambda: self.store.drain_request(request_id, timeout_s=1.0))

    def shutdown(self, *, cleanup: bool = False) -> None:
        call = self._begin("forget" if cleanup else "shutdown", None)
        self._end(call, lambda: self.store.shutdown(cleanup=cleanup, timeout_s=10.0))

    def _begin(self, verb: str, request_id: str | None, token_count: int | None = None) -> Call:
        call = Call(verb, request_id, token_count, self.world.points)
        self.calls.append(call)
        return call

    def _end(self, call: Call, act: Callable[[], Any]) -> None:
        try:
            call.outcome = act()
        except EXPECTED as error:
            call.outcome = error
        call.ended = self.world.points
        self._check_balance()

    # -- what must hold at any time ---------------------------------------------------------------------------------

    def _check_balance(self) -> None:
        stats = self.store.stats()
        assert stats.accepted == stats.committed + stats.cancelled + stats.failed + stats.pending, stats
        ended = stats.committed_bytes + stats.cancelled_bytes + stats.failed_bytes
        assert stats.accepted_bytes == ended + stats.pending_bytes, stats

    def _check_clean(self, call: Call) -> None:
        """After ``clean=True`` no file of what it ended exists."""
        if isinstance(call.outcome, CleanupReport) and call.outcome.clean:
            self.cleaned |= {
                save.ticket.generation
                for save in self.of("save")
                if save.before(call) and save.ticket is not None and call.concerns(save)
            }
            self._check_cleaned("rename")

    def _check_cleaned(self, operation: str) -> None:
        """Nor will any appear, be it for a moment."""
        if self.cleaned and operation in ("link", "make_directory", "rename"):
            there = self.cleaned & self._generations()
            assert not there, (
                f"after {operation} there are files of generations {there}, which were cleaned up"
            )

    # -- what must hold at the end ----------------------------------------------------------------------------------

    def check(self) -> None:
        """When everybody waits, and nothing was shut down yet."""
        try:
            self._check_counters()
            for save in self.of("save"):
                self._check_save(save)
            for load in self.of("load"):
                self._check_load(load)
            self._check_disk()
        except AssertionError as error:
            told = "\n".join(f"  {call}" for call in self.calls)
            raise AssertionError(f"{error}\nthe calls:\n{told}") from error

    def _check_counters(self) -> None:
        stats = self.store.stats()
        self._check_balance()
        assert (stats.pending, stats.pending_bytes, stats.in_flight) == (0, 0, 0), stats
        assert (stats.cancelled_in_hand, stats.writer_restarts) == (0, 0), stats
        assert (stats.on_devices, stats.leaked_bytes) == (0, 0), stats
        assert not self.device.faults, self.device.faults
        assert self.litters or stats.trash_bytes == 0, stats

    def _check_save(self, save: Call) -> None:
        ticket = save.ticket
        if ticket is None:
            self._check_refusal(save)
            return
        assert ticket.done() and ticket.released, f"{save} is accepted and never settled"
        if ticket.state is SaveState.CANCELLED:
            assert self.may_be_cancelled(save), f"{save} was cancelled, and nobody asked for that"
        if ticket.state is SaveState.FAILED:
            assert self.fails, f"{save} failed: {ticket.exception(0)}"

    def _check_refusal(self, save: Call) -> None:
        error = save.outcome
        if isinstance(error, StoreClosedError):
            assert any(not save.before(end) for end in self.of("shutdown", "forget")), f"{save} was refused"
        elif isinstance(error, SaveCancelledError):
            assert self.ended_by(save), f"{save} was refused"
        elif isinstance(error, DiskQuotaError):
            assert self.store.options.max_session_bytes, f"{save} was refused"
        else:
            assert self.fails or isinstance(error, StoreFullError), f"{save}: {error!r}"

    def may_be_cancelled(self, save: Call) -> bool:
        replacing = [
            later
            for later in self._saves(save.request_id, save.token_count)
            if later is not save and not later.before(save) and later.ticket is not None
        ]
        return bool(replacing or self.ended_by(save))

    def ended_by(self, save: Call) -> list[Call]:
        """Cleanups that may have ended it: all that were not over before it began."""
        return [each for each in self.of("cleanup") if each.concerns(save) and not each.before(save)]

    def _surely_ended(self, save: Call, at: int) -> bool:
        """Some cleanup began after it had returned, and was over by then."""
        return any(
            save.before(each) and each.ended <= at for each in self.of("cleanup") if each.concerns(save)
        )

    def _check_load(self, load: Call) -> None:
        if isinstance(load.outcome, list):
            save = self.saved(load.outcome)
            key = (load.request_id, load.token_count)
            assert (save.request_id, save.token_count) == key, f"{load} gave {save}"
            assert not self._surely_ended(save, load.began), f"{load} gave {save}, which was cleaned up"
            assert not self._surely_replaced(save, load.began), f"{load} gave {save}, which was replaced"
        elif isinstance(load.outcome, SnapshotNotFoundError):
            for save in self._saves(load.request_id, load.token_count):
                if save.ticket is not None and save.before(load):
                    lost = [each for each in self.ended_by(save) if not load.before(each)]
                    gone = (
                        lost
                        or self.of("detach", "shutdown", "forget")
                        or save.ticket.state is SaveState.FAILED
                    )
                    assert gone, f"{load} did not find {save}"
        else:
            assert self.fails or isinstance(load.outcome, StoreClosedError), f"{load}"

    def _surely_replaced(self, save: Call, at: int) -> bool:
        return any(
            save.before(later) and later.ended <= at
            for later in self._saves(save.request_id, save.token_count)
            if later.ticket is not None and later.ticket.state in self._replacing
        )

    @property
    def _replacing(self) -> set[SaveState]:
        """A save may also be replaced by one that fails later; then what was committed before is the last again."""
        return {SaveState.COMMITTED} if self.fails else {SaveState.COMMITTED, SaveState.CANCELLED}

    def _check_disk(self) -> None:
        """Every live entry has its file and loads; every file belongs to one; nothing is left in the making."""
        live = self._live()
        for save in self.of("save"):
            if save.ticket is not None and save.ticket.state is SaveState.COMMITTED:
                kept = not (self.ended_by(save) or self.of("detach"))
                assert not kept or str(save.ticket.result(0).path) in live, (
                    f"{save} is committed and not there"
                )
        missing = set(live) - self.files()
        assert not missing, f"live, and not on disk: {missing}"
        for detach in self.of("detach"):
            detached = isinstance(detach.outcome, Path)
            assert not detached or str(detach.outcome) in self.world.files.tree(), f"{detach} is not there"
        if not self.litters:
            left = (self.files() - set(live)) | self.strays()
            assert not left, f"left behind: {left}"
            dead = self._directories() - {path.rpartition("/")[0] for path in live}
            assert not dead, f"directories of dead generations: {dead}"

    def _live(self) -> dict[str, Call]:
        """Which save each file is of that can be loaded."""
        live = {}
        for request_id in {str(call.request_id) for call in self.of("save")}:
            for token_count in self.store.boundaries(request_id):
                save = self.saved(content_of(self.store.load(request_id, token_count)))
                assert (save.request_id, save.token_count) == (request_id, token_count)
                assert save.ticket is not None and save.ticket.state is SaveState.COMMITTED, (
                    f"{save} is there"
                )
                assert not self._surely_ended(save, self.world.points), f"{save} is there, and was cleaned up"
                assert not self._surely_replaced(save, self.world.points), f"{save} is there: not the last"
                live[str(save.ticket.result(0).path)] = save
        return live

    # -- the disk ---------------------------------------------------------------------------------------------------

    def files(self) -> set[str]:
        """Snapshot files of the session."""
        return {path for path in self._below(1) if path.rpartition("/")[0] in self._directories()}

    def _directories(self) -> set[str]:
        """Of generations, dead or alive."""
        return {path for path in self._below(0) if parse_generation_name(path.rpartition("/")[2]) is not None}

    def _generations(self) -> set[int]:
        parsed = (parse_generation_name(path.rpartition("/")[2]) for path in self._directories())
        return {each.generation for each in parsed if each is not None}

    def strays(self) -> set[str]:
        """Whatever is still in the making, or in the trash."""
        session = self.store.session
        return {
            path for path in self._below(1) if path.startswith((f"{session}/.tmp/", f"{session}/.trash/"))
        }

    def _below(self, levels: int) -> list[str]:
        """Paths in the session, in it or so many levels below."""
        above = f"{self.store.session}/"
        return [
            path
            for path in self.world.files.tree()
            if path.startswith(above) and path.count("/", len(above)) == levels
        ]

    # -- the notes --------------------------------------------------------------------------------------------------

    def of(self, *verbs: str) -> list[Call]:
        return [call for call in self.calls if call.verb in verbs]

    def _saves(self, request_id: str | None, token_count: int | None) -> Iterator[Call]:
        return (
            call
            for call in self.of("save")
            if (call.request_id, call.token_count) == (request_id, token_count)
        )

    def saved(self, content: list[int]) -> Call:
        assert len(set(content)) == 1, f"torn: {content}"
        return next(call for call in self.of("save") if call.content == content[0])

    def check_ended(self, report: ShutdownReport) -> None:
        """After a shutdown beside everything else: whatever was accepted is settled, and said to be so."""
        assert self.store.shutdown() is report
        stats = self.store.stats()
        assert (stats.pending, stats.pending_bytes, stats.cancelled_in_hand) == (0, 0, 0), stats
        told = set(report.abandoned)
        for save in self.of("save"):
            if save.ticket is None:
                self._check_refusal(save)
                continue
            assert save.ticket.done() and save.ticket.released, f"{save} is accepted and never settled"
            dropped = save.ticket.state is SaveState.CANCELLED and save.ticket.key not in told
            forgot = self.of("forget")
            assert not dropped or forgot or self.may_be_cancelled(save), f"{save} was dropped in silence"

    @property
    def report(self) -> ShutdownReport | None:
        """Of the first shutdown that was asked for."""
        return next((call.outcome for call in self.of("shutdown", "forget")), None)


def tensors(content: int) -> dict[str, Any]:
    return {"x": np.full(8, content, np.uint8)}


def content_of(snapshot: Snapshot) -> list[int]:
    return list(snapshot.tensors["x"].tolist())
