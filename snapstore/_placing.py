"""Which bytes of a snapshot come from where, and go where in its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from snapstore._device import Block, Device, Move
from snapstore._device_records import Part, Submission
from snapstore._format import Layout
from snapstore._memory import copy_bytes
from snapstore._pinned import HostBuffer
from snapstore.adapters import Adapter


@dataclass(frozen=True, slots=True)
class Placed:
    """The tensors of one save, some of them on devices (``None``: in host memory); ``sources``: of the adapter."""

    adapter: Adapter
    tensors: Sequence[Any]
    sources: Sequence[Any]
    layout: Layout
    devices: Sequence[Device | None]
    borrow: bool

    @property
    def distinct_devices(self) -> list[Device]:
        return [device for device in dict.fromkeys(self.devices) if device is not None]


def part_of(submission: Submission, device: Device, placed: Placed) -> Part:
    """What this device is to do, asked of the caller's current stream. Raises what the device raises."""
    layout = placed.layout
    indices = [index for index in layout.file_order if placed.devices[index] is device]
    tensors = [placed.tensors[index] for index in indices]
    blocks = device.lend(tensors) if placed.borrow else device.pack(tensors)
    lent = {id(tensor) for tensor in tensors}
    gathers = any(id(block.data) not in lent for block in blocks)
    part = Part(submission, device, indices, blocks, device.mark(), gathers)
    assert part.nbytes == sum(layout.sizes[index] for index in indices)
    return part


def copy_host_tensors(placed: Placed, target: memoryview) -> None:
    """Blocks for one copy of what is in host memory, on the calling thread, also of what is lent."""
    near = [index for index, device in enumerate(placed.devices) if device is None]
    if near:
        look = placed.adapter.view([placed.sources[index] for index in near])
        for index, view in zip(near, look(), strict=True):
            offset = placed.layout.offsets[index]
            copy_bytes(view, target[offset : offset + len(view)])


def moves_of_part(part: Part) -> list[Move]:
    """For the device's thread."""
    submission = part.submission
    return list(moves_of(part.blocks, part.indices, submission.layout, submission.buffer))


def moves_of(
    blocks: Iterable[Block], indices: Sequence[int], layout: Layout, buffer: HostBuffer
) -> Iterator[Move]:
    """What to copy where: blocks and places in the file side by side, cut wherever either of them ends."""
    spans = _spans(layout, indices)
    return _matched(iter(blocks), (piece for begin, end in spans for piece in buffer.pieces(begin, end)))


def _matched(blocks: Iterator[Block], pieces: Iterable[memoryview]) -> Iterator[Move]:
    block, used = Block(None, 0), 0
    for piece in pieces:
        while len(piece):
            if used == block.nbytes:
                block, used = next(blocks), 0
                continue
            count = min(len(piece), block.nbytes - used)
            yield Move(block.data, used, piece[:count])
            piece, used = piece[count:], used + count


def _spans(layout: Layout, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The places of these tensors in the file, in its order, joined where they touch."""
    begin = end = 0
    for index in indices:
        if layout.offsets[index] != end:
            yield begin, end
            begin = layout.offsets[index]
        end = layout.offsets[index] + layout.sizes[index]
    yield begin, end
