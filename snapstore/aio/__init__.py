"""``AsyncSnapshotStore``: the same verbs as coroutines. The event loop never waits for a disk or a device.

What needs neither is done on the loop: answers from memory (``has``, ``stats``, ...), the copy of a save, the marks of
a cleanup, and every wait for the store's own threads (room, cleanups, ``flush``, ``drain_request``, ``shutdown``),
which takes no thread at all. ``load``, ``detach``, ``stream`` and opening run on a few threads of their own: a call
that hangs costs one of them, never the loop, and never more than there are.

Cancelling an await abandons the wait, not the work: a cleanup is done although nobody waits for it any more.

    async with AsyncSnapshotStore("/var/tmp/engine") as store:
        ticket = await store.save("request-1", 1024, tensors)
        info = await ticket
        async for chunk in store.stream(info.key):
            ...

For asyncio, as aiofiles is, and the tickets.
"""

from snapstore.aio._store import THREADS, AsyncSnapshotStore
from snapstore.aio._stream import Stream

__all__ = ["THREADS", "AsyncSnapshotStore", "Stream"]
