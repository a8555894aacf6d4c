"""What stores do while something strikes: the same actions for faults in this process and for kills in another."""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import assert_same, tensors
from processes import PATIENCE_S, Processes

from snapstore import (
    SaveFailedError,
    SaveState,
    SaveTicket,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotStore,
    StoreOptions,
    _paths,
)
from snapstore._engine import Engine
from snapstore._maintenance.plan import Rules, make_plan
from snapstore._maintenance.prune import carry_out
from snapstore._maintenance.root import opened_root
from snapstore._maintenance.survey import sessions, surroundings
from snapstore._maintenance.verify import verify_root
from snapstore._state import State
from snapstore.testing import FaultyFileSystem

Key = tuple[str, int]

BEFORE: dict[Key, int] = {("a", 1): 0, ("a", 2): 0, ("b", 1): 0}
"""What is committed before an action begins: key -> version of its content."""


def content(key: Key, version: int) -> dict[str, Any]:
    """Differs for each key and version."""
    return tensors(zlib.crc32(f"{key}{version}".encode()), 2048)


def save(store: SnapshotStore, key: Key, version: int) -> SaveTicket:
    return store.save(*key, content(key, version), metadata=version)


def version_of(store: SnapshotStore, key: Key) -> int | None:
    """Which version of the key is there, after a look at every bit of it; ``None``: none."""
    try:
        snapshot = store.load(*key)
    except (SnapshotNotFoundError, SaveFailedError):
        return None
    assert_same(snapshot, content(key, snapshot.metadata))
    return int(snapshot.metadata)


def everything_in(store: SnapshotStore, keys: set[Key]) -> dict[Key, int | None]:
    """Versions of these keys, and the proof that there is nothing else."""
    found = {key: version_of(store, key) for key in keys}
    assert store.stats().live_snapshots == sum(version is not None for version in found.values())
    for request_id, token_count in keys:
        listed = token_count in store.boundaries(request_id)
        assert listed == (found[request_id, token_count] is not None)
    return found


def sessions_in(root: Path) -> list[Path]:
    """Everything in a root but its marker and what was put in quarantine: sessions, and what is left of some."""
    stays = {_paths.MARKER, _paths.QUARANTINE}
    return sorted(path for path in root.iterdir() if path.name not in stays) if root.exists() else []


def wait_until(predicate: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not predicate():
        assert time.monotonic() < deadline_s, "it never came to be"
        time.sleep(0.001)


def assert_adoptable(root: Path, may_be: dict[Key, set[int | None]]) -> None:
    """Whole or not there; what must be there is; and afterwards nothing is left beside the session that has it."""
    store = SnapshotStore(root, StoreOptions(leftovers="adopt"))
    found = everything_in(store, set(may_be))
    assert all(version in may_be[key] for key, version in found.items()), found
    wait_until(lambda: sessions_in(root) == [store.session])
    assert save(store, ("next", 1), 0).result(PATIENCE_S)
    report = store.shutdown(cleanup=True)
    assert report.clean and report.session_removed, report
    assert sessions_in(root) == []


def engine_of(store: SnapshotStore) -> Engine:
    """What is behind a store, for tests that break it."""
    return store._engine  # noqa: SLF001 - users have no business there


def state_of(store: SnapshotStore) -> State:
    return engine_of(store).state


# -- actions ----------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Where an action is made, and what it leaves to look at."""

    root: Path
    files: FaultyFileSystem
    options: StoreOptions
    store: SnapshotStore | None = None
    tickets: dict[Key, SaveTicket] = field(default_factory=dict)
    report: Any = None
    raised: list[Exception] = field(default_factory=list)
    """What a caller was told besides, where that may be."""
    timeout_s: float = PATIENCE_S
    say: Callable[..., None] = lambda *words: None
    """Hears of what a user was told: ``committed REQUEST TOKENS VERSION``, ``cleaned REQUEST``."""

    @property
    def opened(self) -> SnapshotStore:
        assert self.store is not None
        return self.store

    def open(self) -> SnapshotStore:
        self.store = SnapshotStore(self.root, self.options, file_system=self.files)
        return self.store

    def save(self, key: Key, version: int) -> None:
        ticket = self.tickets[key] = save(self.opened, key, version)
        ticket.add_done_callback(
            lambda each: each.state is SaveState.COMMITTED and self.say("committed", *key, version)
        )


def open_with_snapshots(stage: Stage) -> None:
    store = stage.open()
    for key, version in BEFORE.items():
        save(store, key, version).result(PATIENCE_S)


def open_nothing_yet(stage: Stage) -> None:
    """The store is opened by the action itself."""


def save_and_replace(stage: Stage) -> None:
    for key in (("a", 3), ("a", 1), ("c", 1)):
        stage.save(key, 1)
    stage.opened.flush(stage.timeout_s)


def load_everything(stage: Stage) -> None:
    """What can not be read just now is an error, never something else than was saved."""
    for key, version in BEFORE.items():
        try:
            assert version_of(stage.opened, key) == version
        except (OSError, SnapshotCorruptError) as error:
            stage.raised.append(error)


def clean_one_request(stage: Stage) -> None:
    stage.report = stage.opened.cleanup_request("a", timeout_s=stage.timeout_s)
    if stage.report.clean:
        stage.say("cleaned", "a")
    let_sweeper_finish(stage.opened)


def let_sweeper_finish(store: SnapshotStore) -> None:
    """Until it has looked at all that it was given. It takes a second request when it is done with the first."""
    state, thread = state_of(store), engine_of(store)._sweeper_thread  # noqa: SLF001 - nothing else tells
    for _ in range(2):
        state.ask_sweeper()
        wait_until(lambda: not state._sweep_asked or not thread.is_alive())  # noqa: SLF001 - nor of a request


def shut_down(stage: Stage) -> None:
    stage.save(("c", 1), 1)
    stage.report = stage.opened.shutdown(timeout_s=stage.timeout_s)


def shut_down_with_cleanup(stage: Stage) -> None:
    stage.report = stage.opened.shutdown(cleanup=True, timeout_s=stage.timeout_s)


def open_a_store_beside(stage: Stage) -> None:
    """A live store on a sound disk, beside a dead session of which one file is torn."""
    (torn,) = stage.root.glob("*/*.g*/2.safetensors")
    os.truncate(torn, torn.stat().st_size - 1)
    stage.store = SnapshotStore(stage.root, stage.options)
    save(stage.store, ("live", 1), 0).result(PATIENCE_S)


def prune_leftovers(stage: Stage) -> None:
    try:
        with opened_root(stage.files, str(stage.root), to_change=True) as root:
            plan = make_plan(sessions(root), surroundings(root), Rules(), time.time())
            stage.report = carry_out(root, plan)
    except OSError as error:
        stage.raised.append(error)


def verify_and_quarantine(stage: Stage) -> None:
    try:
        with opened_root(stage.files, str(stage.root), to_change=True) as root:
            stage.report = verify_root(root, on_read=lambda _: None, quarantine=True)
    except OSError as error:
        stage.raised.append(error)


def open_beside_leftovers(stage: Stage) -> None:
    let_sweeper_finish(stage.open())


@dataclass(frozen=True)
class Action:
    """What is done, and which versions of each key may be there whenever it is interrupted."""

    act: Callable[[Stage], None]
    may_be: dict[Key, set[int | None]]
    prepare: Callable[[Stage], None] = open_with_snapshots
    leftovers: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _all_of(*versions: int | None) -> dict[Key, set[int | None]]:
    return {key: set(versions) for key in BEFORE}


_SAVED: dict[Key, set[int | None]] = {
    **_all_of(0),
    ("a", 1): {0, 1},
    ("a", 3): {None, 1},
    ("c", 1): {None, 1},
}

_MAINTAINED: dict[Key, set[int | None]] = {**_all_of(0), ("a", 2): {None}, ("live", 1): {0}}
_BESIDE: dict[str, Any] = {"leftovers": True, "options": {"leftovers": "keep"}}

ACTIONS = {
    "save": Action(save_and_replace, _SAVED),
    "save durably": Action(save_and_replace, _SAVED, options={"durability": "full"}),
    "cleanup": Action(clean_one_request, {**_all_of(None, 0), ("b", 1): {0}}),
    "shutdown": Action(shut_down, {**_all_of(0), ("c", 1): {None, 1}}),
    "shutdown with cleanup": Action(shut_down_with_cleanup, _all_of(None, 0)),
    "load": Action(load_everything, _all_of(0)),
    "open": Action(open_beside_leftovers, {}, open_nothing_yet),
    "reclaim": Action(open_beside_leftovers, _all_of(None, 0), open_nothing_yet, leftovers=True),
    "adopt": Action(
        open_beside_leftovers, _all_of(0), open_nothing_yet, leftovers=True, options={"leftovers": "adopt"}
    ),
    "prune": Action(
        prune_leftovers,
        {**_MAINTAINED, ("a", 1): {None, 0}, ("b", 1): {None, 0}},
        open_a_store_beside,
        **_BESIDE,
    ),
    "verify": Action(verify_and_quarantine, _MAINTAINED, open_a_store_beside, **_BESIDE),
}


@dataclass(frozen=True)
class Spot:
    """One operation of an action: which, and how many of its kind were made before it."""

    operation: str
    skip: int


def template_for(action: str, processes: Processes, path: Path) -> Path:
    """A root as it is before the action, to be copied: what takes time is done once."""
    if ACTIONS[action].leftovers:
        child = processes.start("dies_with_snapshots", root=str(path))
        assert child.says().startswith("saved") and child.wait() == 0
    elif action != "open":
        SnapshotStore(path).shutdown()
    return path


def copied(template: Path, root: Path) -> Path:
    if template.exists():
        shutil.copytree(template, root)
    return root


def stage_for(action: Action, root: str | Path) -> Stage:
    stage = Stage(Path(root), FaultyFileSystem(), StoreOptions(**action.options))
    action.prepare(stage)
    return stage


CHANGING = frozenset(
    (
        *("close", "create", "link", "lock", "make_directory", "open_lock", "rename", "remove_directory"),
        *("sync_data", "sync_directory", "tighten", "unlink", "write"),
    )
)
"""What changes what a kill leaves behind: one before anything else leaves what one before the next of these leaves."""


def spots_of(calls: list[str]) -> list[Spot]:
    """Every operation of an action that went through undisturbed, in order."""
    return [Spot(operation, calls[:index].count(operation)) for index, operation in enumerate(calls)]
