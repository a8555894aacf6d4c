"""A save in its three steps: threads and event loops make the same ones, and differ only in how they wait for room.

First ``offered``: everything is checked, nothing reserved. Then a ``Job`` from ``State``: ``reserve`` blocks for room;
``queue_up``, ``enter``, ``leave`` do not. Then ``fulfil``: the copy, on the calling thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from snapstore._device import Device
from snapstore._engine import Engine
from snapstore._format import Layout, encode_metadata
from snapstore._placing import Placed
from snapstore._records import Content, Job
from snapstore._staging import stage
from snapstore._ticket import SaveTicket
from snapstore._types import SnapshotKey
from snapstore.adapters import Adapter, adapter_for, devices_of


class Offer(NamedTuple):
    """A save that is not accepted yet: what it is of, and how its bytes are to be laid out."""

    key: SnapshotKey
    content: Content
    adapter: Adapter
    tensors: Sequence[Any]
    sources: Sequence[Any]
    layout: Layout
    devices: Sequence[Device | None] | None
    borrow: bool
    prepared_s: float

    @property
    def wanted(self) -> tuple[SnapshotKey, int, Content]:
        """What ``State.reserve`` takes."""
        return self.key, self.layout.nbytes, self.content

    @property
    def placed(self) -> Placed | None:
        """For what is on devices."""
        if self.devices is None:
            return None
        return Placed(self.adapter, self.tensors, self.sources, self.layout, self.devices, self.borrow)


def offered(
    engine: Engine, key: SnapshotKey, tensors: Mapping[str, Any], metadata: Any, *, borrow: bool
) -> Offer:
    """Check it all. Raises what is wrong with the tensors, the metadata or their device; does not wait."""
    started_s = engine.monotonic_s()
    if isinstance(tensors, Mapping):
        # One look at it: a mapping may change, or give its tensors in another order next time.
        tensors = dict(tensors)
    adapter = adapter_for(tensors)
    specs, sources = adapter.describe(tensors)
    content = Content(adapter.framework, encode_metadata(metadata))
    layout = Layout.of(specs)
    devices = devices_of(adapter.framework, tensors)
    in_order = tuple(tensors.values())
    prepared_s = engine.monotonic_s() - started_s
    offer = Offer(key, content, adapter, in_order, sources, layout, devices, borrow, prepared_s)
    if (placed := offer.placed) is not None:
        engine.staging.check(key, placed)
    return offer


def fulfil(engine: Engine, offer: Offer, job: Job) -> SaveTicket:
    """Bring the bytes to host memory, and let the writer have them. Blocks for one copy of what is on the host."""
    started_s = engine.monotonic_s()
    if (placed := offer.placed) is not None:
        engine.staging.submit(job, placed)
        if not offer.borrow:
            job.ticket._release()
    else:
        _stage(engine, offer, job)
    engine.state.note("save", offer.prepared_s + engine.monotonic_s() - started_s)
    return job.ticket


def _stage(engine: Engine, offer: Offer, job: Job) -> None:
    try:
        image = stage(offer.adapter, offer.sources, offer.layout, engine.pool, borrow=offer.borrow)
    except BaseException as error:
        engine.state.abandon(job, error)
        raise
    if not offer.borrow:
        job.ticket._release()
    engine.state.admit(job, image)
