"""How a store is, from one moment: counters, health and latencies. Takes no lock, asks neither disk nor device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from snapstore._device_records import DeviceFacts
from snapstore._engine import Engine
from snapstore._records import Published
from snapstore._types import HealthStatus, RemoteStats, StoreHealth, StoreStats

_LOOKS = 8


class Moment(NamedTuple):
    """What was published at one moment, by the state and by the devices."""

    published: Published
    devices: DeviceFacts
    pinned_bytes: int
    remote: RemoteStats | None
    now_s: float

    @classmethod
    def of(cls, engine: Engine) -> Moment:
        """Now. With the state the same before and after the look at the devices, both are of one moment."""
        published = engine.state.published
        for _ in range(_LOOKS):
            devices, pinned_bytes = engine.staging.facts, engine.staging.pinned.pinned_bytes
            before, published = published, engine.state.published
            if published is before:
                break
        remote = None if engine.remote is None else engine.remote.stats()
        return cls(published, devices, pinned_bytes, remote, engine.monotonic_s())


def stats_at(moment: Moment) -> StoreStats:
    """See ``SnapshotStore.stats``."""
    published, devices = moment.published, moment.devices
    return StoreStats(
        **{name: value for name, value in published._asdict().items() if name in StoreStats.__slots__},
        oldest_pending_s=_age_s(published.oldest_since_s, moment.now_s),
        on_devices=devices.on_their_way,
        leaked_bytes=devices.leaked_bytes,
        pageable_copies=devices.pageable_copies,
        pinned_bytes=moment.pinned_bytes,
        remote=moment.remote,
    )


def health_at(engine: Engine, moment: Moment) -> StoreHealth:
    """See ``SnapshotStore.health``."""
    published, devices = moment.published, moment.devices.devices
    writing_s = _age_s(published.writing_since_s, moment.now_s)
    remote = None if engine.remote is None else engine.remote.health()
    verdicts = list(_verdicts(engine, moment, writing_s))
    if remote is not None and remote.status == "unreachable":
        verdicts.append(("degraded", f"the remote store is unreachable: {remote.error}"))
    status: HealthStatus = max((each for each, _ in verdicts), key=_RISING.index, default="ok")
    return StoreHealth(
        status,
        tuple(reason for _, reason in verdicts),
        writing_s,
        _age_s(published.oldest_since_s, moment.now_s),
        published.last_error,
        published.free_bytes,
        published.writer_restarts,
        devices,
        remote,
    )


_RISING: tuple[HealthStatus, ...] = ("ok", "degraded", "stuck", "dead")


def _verdicts(engine: Engine, moment: Moment, writing_s: float) -> Iterator[tuple[HealthStatus, str]]:
    published = moment.published
    if published.last_error is not None:
        yield "degraded", f"the last write or removal failed: {published.last_error}"
    removing_s = _age_s(engine.removing_since_s, moment.now_s)
    for name, taken_s in (("write", writing_s), ("removal", removing_s)):
        if taken_s > engine.options.stuck_after_s:
            yield "stuck", f"one {name} has taken {taken_s:.1f} s so far"
    for device in moment.devices.devices:
        if device.status != "ok":
            bad: HealthStatus = "stuck" if device.status == "stuck" else "degraded"
            yield bad, f"{device.name} is {device.status}: {device.error}"
    if published.closing or not engine.writer_alive or not engine.belongs_here:
        yield "dead", published.closing or "the writer thread is gone"


def _age_s(since_s: float | None, now_s: float) -> float:
    return 0.0 if since_s is None else max(0.0, now_s - since_s)
