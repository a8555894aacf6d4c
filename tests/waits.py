"""Every wait that a store has, all at once, in a process that is stopped meanwhile or whose wall clock jumps.

Run as a script: ``waits.py ROOT TIMEOUT_S JUMP_S``. Prints a line when all of them wait, and at the end what each came
to and how long it took. Nothing that they wait for ever happens.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REAL_TIME = time.time
JUMP_S = [0.0]
time.time = lambda: REAL_TIME() + JUMP_S[0]  # before anything can have taken a copy of it

import numpy as np  # noqa: E402

from snapstore import SnapshotStore, StoreOptions, _paths  # noqa: E402
from snapstore.aio import AsyncSnapshotStore  # noqa: E402
from snapstore.testing import FakeDevice, FaultyFileSystem  # noqa: E402

TENSORS = {"x": np.arange(8)}


class Stuck:
    """A store whose writer stands before its first file until the end, with one save in hand and one behind it."""

    def __init__(self, root: Path, name: str, timeout_s: float, until_the_end: ExitStack) -> None:
        files = FaultyFileSystem()
        options = StoreOptions(
            max_pending_jobs=2, save_timeout_s=timeout_s, device_timeout_s=timeout_s,
            cleanup_request_timeout_s=timeout_s, cleanup_all_timeout_s=timeout_s, shutdown_timeout_s=timeout_s,
        )  # fmt: skip
        self.store = SnapshotStore(root / name, options, file_system=files)
        until_the_end.callback(self.store.shutdown, cleanup=True, timeout_s=30)
        gate = until_the_end.enter_context(files.pause("create", _paths.TEMPORARY))
        self.in_hand = self.store.save("held", 1, TENSORS, borrow=True)
        gate.wait_reached()
        self.behind = self.store.save("behind", 1, TENSORS)


def waits_of(root: Path, timeout_s: float, until_the_end: ExitStack) -> dict[str, Callable[[], Any]]:
    """What to wait for, by name; those that would disturb others have a store of their own."""
    shared, cleaned, emptied, ended, awaited = (
        Stuck(root, name, timeout_s, until_the_end)
        for name in ("shared", "cleaned", "emptied", "ended", "awaited")
    )
    store = shared.store

    async def flushes() -> bool:
        return await AsyncSnapshotStore(awaited.store).flush(timeout_s)

    return {
        "nothing": lambda: threading.Event().wait(timeout_s),
        "save": lambda: store.save("more", 1, TENSORS),
        "result": lambda: shared.in_hand.result(timeout_s),
        "exception": lambda: shared.behind.exception(timeout_s),
        "wait_released": lambda: shared.in_hand.wait_released(timeout_s),
        "drain_request": lambda: store.drain_request("held", timeout_s=timeout_s),
        "flush": lambda: store.flush(timeout_s),
        "detach": lambda: store.detach("held", 1, root / "detached", timeout_s=timeout_s),
        "cleanup_request": lambda: cleaned.store.cleanup_request("held").clean,
        "cleanup_all": lambda: emptied.store.cleanup_all().clean,
        "shutdown": lambda: ended.store.shutdown().clean,
        "a device": saving_from_a_device(root, timeout_s, until_the_end),
        "await flush": lambda: asyncio.run(flushes()),
    }


def saving_from_a_device(root: Path, timeout_s: float, until_the_end: ExitStack) -> Callable[[], Any]:
    """A save whose copy never arrives: its time begins with the save."""
    device = FakeDevice()
    store = SnapshotStore(root / "device", StoreOptions(device_timeout_s=timeout_s))
    until_the_end.callback(store.shutdown, cleanup=True, timeout_s=30)
    until_the_end.callback(setattr, device, "automatic", True)
    return lambda: store.save("device", 1, {"x": device.tensor(np.arange(8))}).exception()


def main(root: Path, timeout_s: float, jump_s: float) -> None:
    with ExitStack() as until_the_end:
        begun, seen = threading.Semaphore(0), {}

        def measure(name: str, wait: Callable[[], Any]) -> None:
            started_s = time.monotonic()
            begun.release()
            try:
                outcome = wait()
            except Exception as error:  # noqa: BLE001 - it is told
                outcome = error
            said = type(outcome).__name__ if isinstance(outcome, Exception) else outcome
            seen[name] = said, time.monotonic() - started_s

        waits = waits_of(root, timeout_s, until_the_end)
        threads = [threading.Thread(target=measure, args=each) for each in waits.items()]
        for thread in threads:
            thread.start()
        for _ in threads:
            begun.acquire()
        print("waiting", flush=True)  # noqa: T201
        if jump_s:
            time.sleep(timeout_s / 3)
            JUMP_S[0] = jump_s
        for thread in threads:
            thread.join()
        print(json.dumps(seen), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
