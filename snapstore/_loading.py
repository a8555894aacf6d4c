"""Snapshots -> tensors of the caller's own: from memory while pending, from the file after; on the host or a device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from snapstore._device import Device
from snapstore._door import Tier
from snapstore._errors import SnapshotNotFoundError
from snapstore._files import FileSystem
from snapstore._format import Header, Layout
from snapstore._memory import copy_bytes, segments_of
from snapstore._pinned import HostBuffer
from snapstore._reader import read_snapshot
from snapstore._records import Commit, Job
from snapstore._staging import Staging
from snapstore._state import State
from snapstore._types import Framework, SnapshotKey
from snapstore.adapters import Adapter, adapter_named, device_named

Loaded = tuple[dict[str, Any], str]
"""Tensors by name, and the metadata as JSON."""


class Loader:
    """Where the tensors of one ``load`` are to go. ``framework=None``: the one that they were saved with.

    Args:
        device: in the framework's own words; the host if it is none that has a thread for copies.
    """

    def __init__(self, staging: Staging, framework: Framework | None, device: Any) -> None:
        self._staging = staging
        self._framework = framework
        self._device = device

    def from_memory(self, state: State, job: Job) -> Loaded:
        """What a pending job holds. Blocks for one copy on the host; for none, where a device takes it from there."""
        assert job.image is not None and job.content is not None
        layout, content, kept = job.image.layout, job.content, job.image.keeps
        uploads = False
        try:
            adapter, device = self._target(content.framework)
            uploads = device is not None and isinstance(kept, HostBuffer)
            if not uploads:
                buffer = self._buffer(device, layout.nbytes)
                for source, place in zip(job.image.segments, segments_of(layout, buffer.view), strict=True):
                    copy_bytes(source, place)
        finally:
            if not uploads:
                state.let_go_memory(job)
        if uploads and device is not None:
            tensors = self._staging.upload(device, layout, kept, lambda: state.let_go_memory(job))
        else:
            tensors = self._deliver(adapter, device, layout, buffer)
        return tensors, content.metadata_json

    def from_file(self, files: FileSystem, commit: Commit, *, verify: bool) -> Loaded:
        """What a file holds. Blocks for the disk and for one checksum."""

        def read(memory: Callable[[Header], memoryview]) -> tuple[Header, str]:
            info = commit.info
            header, facts, _ = read_snapshot(
                files, str(info.path), info.key, info.generation, verify=verify, memory=memory
            )
            return header, facts.metadata_json

        return self._read(read)

    def from_remote(self, state: State, tier: Tier, key: SnapshotKey, *, verify: bool) -> Loaded:
        """What the remote store holds. Blocks for the network. A cleanup that comes meanwhile makes it not found."""
        life = state.begin_fetch(key.request_id)
        try:
            fetch = tier.fetch(key)
            loaded = self._read(functools.partial(fetch.read, verify=verify))
            if not state.join(life, key, fetch.life):
                raise SnapshotNotFoundError(f"{key} was cleaned up while it was on its way", key=key)
        except BaseException:
            state.end_fetch(life)
            raise
        fetch.keep(life)
        return loaded

    def _read(self, read: Callable[[Callable[[Header], memoryview]], tuple[Header, str]]) -> Loaded:
        """Have it read into memory for the tensors' framework and device: into the last that was asked for."""
        taken: list[tuple[Adapter, Device | None, HostBuffer]] = []

        def memory(header: Header) -> memoryview:
            while taken:  # it is read once more, and may be another by now
                taken.pop()[2].give_back()
            adapter, device = self._target(header.facts.framework if header.facts else "numpy")
            taken.append((adapter, device, self._buffer(device, header.layout.nbytes)))
            return taken[0][2].view

        try:
            header, metadata_json = read(memory)
        except BaseException:
            for _, _, buffer in taken:
                buffer.give_back()
            raise
        ((adapter, device, buffer),) = taken
        return self._deliver(adapter, device, header.layout, buffer), metadata_json

    def _target(self, framework: str) -> tuple[Adapter, Device | None]:
        adapter = adapter_named(self._framework or framework)
        return adapter, device_named(adapter.framework, self._device)

    def _buffer(self, device: Device | None, nbytes: int) -> HostBuffer:
        if device is None:
            return self._staging.lend(nbytes)
        return self._staging.host_buffer(device, nbytes)

    def _deliver(
        self, adapter: Adapter, device: Device | None, layout: Layout, buffer: HostBuffer
    ) -> dict[str, Any]:
        if device is None:
            return adapter.from_host(layout, buffer.view, self._device)
        return self._staging.upload(device, layout, buffer, buffer.give_back)
