"""What the tests of the remote tier share: several nodes on one object store, and gates in the way of its client."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore
from obstore.store import MemoryStore

from snapstore import SnapshotStore, StoreOptions
from snapstore._files import FileSystem

_numbers = itertools.count()


def warm_up() -> None:
    """The client's own threads and descriptors, once a process."""
    store = MemoryStore()
    obstore.put(store, "warm", b"up")
    bytes(obstore.get(store, "warm").bytes())


def new_memory_url() -> str:
    """An object store in this process that no other test knows."""
    return f"memory://test-{next(_numbers)}"


class Nodes:
    """Stores that share one object store, each with a root of its own, as on several machines."""

    def __init__(self, folder: Path, url: str, **options: Any) -> None:
        self.folder = folder
        self.url = url
        self._given = options.pop("remote_options", {})
        self._options = options
        self.client_options = dict(self._given)
        self._open: list[SnapshotStore] = []

    def __call__(self, name: str, file_system: FileSystem | None = None, **options: Any) -> SnapshotStore:
        given = {"node": name, "timeout_s": 5.0, **self._given, **options.pop("remote_options", {})}
        chosen = StoreOptions(remote=self.url, remote_options=given, **{**self._options, **options})
        store = SnapshotStore(self.folder / name, chosen, file_system=file_system)
        self._open.append(store)
        return store

    def close(self) -> None:
        while self._open:
            self._open.pop().shutdown(timeout_s=5.0)


class Gate:
    """Calls that it holds back go on when it is opened; ``reached`` says that one has come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self._open.wait(20)

    def open(self) -> None:
        self._open.set()


@contextmanager
def held_back(monkeypatch: Any, call: str, chosen: Callable[[str], bool]) -> Iterator[Gate]:
    """The first of the client's calls of this name, on a chosen object, waits at the gate before it goes out."""
    gate, real, lock = Gate(), getattr(obstore, call), threading.Lock()
    left = [1]

    def gated(store: Any, name: str, *args: Any, **more: Any) -> Any:
        with lock:
            held = chosen(name) and left and left.pop()
        if held:
            gate.pass_through()
        return real(store, name, *args, **more)

    monkeypatch.setattr(obstore, call, gated)
    try:
        yield gate
    finally:
        gate.open()
        monkeypatch.setattr(obstore, call, real)


@contextmanager
def failing(monkeypatch: Any, error: Exception) -> Iterator[None]:
    """Every call of the client fails."""
    calls = ("put", "get", "get_range", "delete", "list", "head")
    real = {call: getattr(obstore, call) for call in calls}

    def fail(*args: Any, **more: Any) -> Any:
        raise error

    for call in calls:
        monkeypatch.setattr(obstore, call, fail)
    try:
        yield
    finally:
        for call in calls:
            monkeypatch.setattr(obstore, call, real[call])
