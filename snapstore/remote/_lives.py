"""What a node knows of its requests' remote lives. Changed by the tier's own thread alone; flags are read by all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from snapstore._committed import CommittedFile
from snapstore._errors import SaveCancelledError
from snapstore._records import Commit
from snapstore._threads import Lock, Threads
from snapstore._ticket import SaveTicket
from snapstore.remote import _names
from snapstore.remote._journal import Recorded
from snapstore.remote._manifest import EndLives
from snapstore.remote._objects import Seen


@dataclass(slots=True, eq=False)
class Binding:
    """The remote life that a request's snapshots are published into.

    Attributes:
        begun: it was seen to be current; or it may be, since a try to begin it had no answer.
        over: why nothing is published into it any more; ``None``: it goes on.
        seen: the manifest as this node wrote it last, which saves one request where nobody else has.
        used: something of it is, or was, on its way there.
        published: what is visible of it, by boundary.
        tickets: of what is committed and was not to be published yet, by boundary.
        queued: uploads that are not over, by boundary.
        turn: held while its manifest is changed, so that a node does not lose against itself.
    """

    request_id: str
    life: str
    turn: Lock
    begun: bool = False
    used: bool = False
    over: str | None = None
    seen: Seen | None = None
    published: dict[int, Commit] = field(default_factory=dict)
    tickets: dict[int, tuple[Commit, SaveTicket]] = field(default_factory=dict)
    queued: dict[int, Upload] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Upload:
    """A snapshot on its way.

    Attributes:
        file: open already, where it is the store's no more.
        tag: of the file that the object was made from; another one under its path is another snapshot.
        put_s: when the object began to be put, once it is there whole.
        unanswered: the manifest may name the object: it was told to, and its answer was lost.
    """

    binding: Binding
    commit: Commit
    ticket: SaveTicket | None
    name: str
    lock: Lock
    file: CommittedFile | None = None
    replaced: bool = False
    tag: str = ""
    file_bytes: int = 0
    put_s: float | None = None
    unanswered: bool = False
    finished: bool = False
    waiters: list[Future[None]] = field(default_factory=list)

    @property
    def token_count(self) -> int:
        return self.commit.info.key.token_count

    @property
    def pointless(self) -> str | None:
        """Why it need not go on; ``None``: it does."""
        return "a later save of its key replaced it" if self.replaced else self.binding.over

    def rename(self) -> None:
        """Another name for the object."""
        key = self.commit.info.key
        self.name = _names.object_name(key.request_id, self.binding.life, key.token_count)

    def tell(self, waiter: Future[None]) -> bool:
        """Have it told at the end. False: that is over."""
        with self.lock:
            if not self.finished:
                self.waiters.append(waiter)
            return not self.finished

    def give_up_waiters(self) -> list[Future[None]]:
        """Those who wait for a later upload from now on."""
        with self.lock:
            waiters, self.waiters = self.waiters, []
        return waiters

    def finish(self, why_not: str | None = None) -> None:
        """Tell whoever waits."""
        if why_not is None and self.ticket is not None:
            self.ticket._publish()
        with self.lock:
            self.finished = True
            waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if why_not is None:
                waiter.set_result(None)
            else:
                key = self.commit.info.key
                waiter.set_exception(SaveCancelledError(f"{key} was not published: {why_not}", key=key))


@dataclass(slots=True, eq=False)
class Ending:
    """A cleanup's remote end under way. ``objects``: still to be deleted after the manifest."""

    end: EndLives
    attempted: bool
    objects: set[str] = field(default_factory=set)
    over: bool = False


@dataclass(slots=True, eq=False)
class Batch:
    """The ends of one cleanup, recorded together; ``left`` of them are not carried out."""

    endings: list[Ending]
    recorded: Recorded | None
    left: int


def upload_of(
    threads: Threads,
    binding: Binding,
    commit: Commit,
    ticket: SaveTicket | None = None,
    file: CommittedFile | None = None,
) -> Upload:
    """A new one, under a name of its own, in place of an earlier one of the boundary, whose waiters it takes along."""
    key = commit.info.key
    name = _names.object_name(key.request_id, binding.life, key.token_count)
    upload = Upload(binding, commit, ticket, name, threads.lock(), file)
    earlier = binding.queued.get(key.token_count)
    if earlier is not None:
        earlier.replaced = True
        upload.waiters = earlier.give_up_waiters()
    binding.queued[key.token_count] = upload
    binding.used = True
    binding.tickets.pop(key.token_count, None)
    return upload


Note = Callable[[], None]
"""What the tier's thread is to do, in order."""
