"""The way back: a snapshot's object -> memory of the caller's own, each part checked while the next ones travel."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from snapstore._errors import SnapshotCorruptError, SnapshotNotFoundError
from snapstore._format import Facts, Header
from snapstore._memory import HostImage
from snapstore._reader import check_identity, data_from, header_from
from snapstore._records import Content, Life
from snapstore._state import State
from snapstore._threads import Threads
from snapstore._types import SnapshotKey
from snapstore.remote._arriving import PART_BYTES, Arriving
from snapstore.remote._manifest import Entry, RemoteLife
from snapstore.remote._objects import ObjectStore
from snapstore.remote._pool import Kind, Pool, Task

CHUNK_BYTES = 1024 * 1024
"""Copied, then hashed while a cache has it."""

_MOST_HINTS = 1024


class Figures(Protocol):
    """Who counts."""

    def note_fetched(self, nbytes: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """What has come, in memory that nobody writes to."""

    object: Arriving
    header: Header
    facts: Facts

    def image(self) -> HostImage:
        """For the local disk. Blocks for a copy of what lies in several parts."""
        layout, start = self.header.layout, self.header.data_offset
        places = zip(layout.offsets, layout.sizes, strict=True)
        segments = [self.object.view(start + offset, start + offset + size) for offset, size in places]
        return HostImage(layout, lambda: segments)


class Hints:
    """Lives as ``latest`` and ``has`` found them: where a load begins, beside its own look. Safe from any thread."""

    def __init__(self, threads: Threads) -> None:
        self._lock = threads.lock()
        self._lives: OrderedDict[str, RemoteLife] = OrderedDict()

    def note(self, request_id: str, life: RemoteLife | None) -> None:
        """What was found."""
        with self._lock:
            self._lives.pop(request_id, None)
            if life is not None:
                self._lives[request_id] = life
            if len(self._lives) > _MOST_HINTS:
                self._lives.popitem(last=False)

    def of(self, key: SnapshotKey) -> Entry | None:
        """What is likely to be found. Of an object in several parts nothing: the look would wait for a thread."""
        with self._lock:
            life = self._lives.get(key.request_id)
        entry = None if life is None else life.boundaries.get(key.token_count)
        return entry if entry is not None and entry.nbytes < 2 * PART_BYTES else None


@dataclass(slots=True)
class RemoteFetch:
    """One load. See ``_door.Fetch``."""

    key: SnapshotKey
    look: Callable[[], RemoteLife | None]
    objects: ObjectStore
    pool: Pool
    state: State
    timeout_s: float
    figures: Figures
    hint: Entry | None
    life: str = ""
    _fetched: Fetched | None = field(default=None)

    def read(self, memory: Callable[[Header], memoryview], *, verify: bool) -> tuple[Header, str]:
        """See ``_door.Fetch.read``."""
        for last in (False, True):  # what is gone since the look, or came altered, is looked for again
            arriving = self._begin()
            try:
                fetched = self._read(arriving, memory, verify=verify)
            except (FileNotFoundError, SnapshotCorruptError) as error:
                arriving.give_up()
                if last:
                    raise self._corrupt(arriving.entry, error) from error
                continue
            except BaseException:
                arriving.give_up()
                raise
            self._fetched = fetched
            self.figures.note_fetched(arriving.entry.nbytes)
            return fetched.header, fetched.facts.metadata_json
        raise AssertionError("the last try returns or raises")

    def keep(self, life: Life) -> None:
        """See ``_door.Fetch.keep``."""
        work = functools.partial(self._keep, life)
        self.pool.put(Task(Kind.LOCAL, work, lambda _: self.state.end_fetch(life)))

    def _begin(self) -> Arriving:
        """Have that brought which the manifest names; the hint from the start, beside the look that must agree."""
        hint, self.hint = self.hint, None
        begun = None if hint is None else self._bring(hint)
        try:
            entry = self._look_up()
        except BaseException:
            if begun is not None:
                begun.give_up()
            raise
        if begun is not None and begun.entry == entry:
            return begun
        if begun is not None:
            begun.give_up()
        return self._bring(entry)

    def _bring(self, entry: Entry) -> Arriving:
        return Arriving(self.objects, self.pool, entry, self.timeout_s)

    def _look_up(self) -> Entry:
        found = self.look()
        entry = found.boundaries.get(self.key.token_count) if found else None
        if found is None or entry is None:
            raise SnapshotNotFoundError(
                f"no snapshot of {self.key}: neither here nor in the remote store, or cleaned up",
                key=self.key,
            )
        self.life = found.name
        return entry

    def _read(self, arriving: Arriving, memory: Callable[[Header], memoryview], *, verify: bool) -> Fetched:
        header = header_from(arriving.fill, arriving.entry.nbytes)
        facts = check_identity(header, self.key, arriving.entry.generation)
        data_from(arriving.fill, header, CHUNK_BYTES, verify=verify, memory=memory)
        return Fetched(arriving, header, facts)

    def _corrupt(self, entry: Entry, error: Exception) -> SnapshotCorruptError:
        return SnapshotCorruptError(
            f"{entry.name} in the remote store is not the snapshot of {self.key} that was published: {error}; "
            "publish it again",
            key=self.key,
            path=entry.name,
        )

    def _keep(self, life: Life) -> None:
        fetched, self._fetched = self._fetched, None
        assert fetched is not None
        content = Content(fetched.facts.framework, fetched.facts.metadata_json)  # type: ignore[arg-type]
        try:
            job = self.state.keep(life, self.key, fetched.header.layout.nbytes, content)
            if job is None:
                return
            try:
                image = fetched.image()
            except BaseException as error:  # noqa: BLE001 - nobody waits for it: the save that it was has failed
                self.state.abandon(job, error)
                return
            self.state.admit(job, image)
        finally:
            self.state.end_fetch(life)
