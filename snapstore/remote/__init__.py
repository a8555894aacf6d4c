"""The remote tier: snapshots on an object store that several nodes share. Opened by ``StoreOptions(remote=URL)``.

    PREFIX/.snapstore                                         marker
    PREFIX/requests/<hash>.json                               manifest: the life of the request that is current
    PREFIX/snapshots/<hash>/<life>/<tokens>.<random>.safetensors    immutable; never overwritten by other bytes

A *remote life* is what a request's snapshots belong to, across nodes; its name has node, session and generation in it.
A node's first publish of a request begins one, and ends the one that was current: a life wins or loses as a whole. A
node that loaded from a life joins it, and publishes into it from then on. A cleanup ends the life, on whichever node.

    1. A snapshot is visible iff the manifest of its request names it. Its object is complete before that.
    2. A manifest changes by compare-and-swap only, and by ``_manifest.decide`` alone, which may be asked twice.
    3. A life that has ended is never current again: whoever ended it is in the manifest, or it had been seen to begin.
    4. What ends a life changes the manifest first, a missing one included, so that a put that comes late finds another
       ETag than it expects.
    5. A cleanup's end is on the local disk before it counts as done there (``_journal``), and may be carried out twice.

Rooms: ``_names`` every name; ``_manifest`` records and decisions, pure; ``_objects`` the only one that talks to
obstore; ``_breaker`` whether to ask at all; ``_pool`` threads; ``_journal`` ends not yet carried out; ``_exchange`` the
way there, ``_fetch`` the way back; ``_lives`` and ``_tier`` what is known of each request, in order.
"""

from snapstore.remote._tier import RemoteTier

__all__ = ["RemoteTier"]
