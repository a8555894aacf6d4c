"""``torch.cuda`` with the host for a device: the calls that need a GPU are noted, and answered at once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from snapstore.adapters import _torch_cuda


class Stream:
    def __init__(self, cuda: CudaOnHost, name: str, priority: int = 0) -> None:
        self._cuda = cuda
        self.name = name
        self.priority = priority

    def wait_event(self, event: Event) -> None:
        assert event.cuda_event, "an event that was not recorded is not waited for"
        self._cuda.note("wait", self, event.cuda_event)


class Event:
    def __init__(self, cuda: CudaOnHost) -> None:
        self._cuda = cuda
        self.cuda_event = 0

    def record(self, stream: Stream) -> None:
        self.cuda_event = next(self._cuda.numbers)
        self._cuda.note("record", stream, self.cuda_event)

    def query(self) -> bool:
        return bool(self.cuda_event)


class CudaOnHost:
    """In a test's ``monkeypatch`` every torch tensor is on the device "cpu", which is the host.

    Attributes:
        journal: what was asked, in order: ``(what, which stream, which event)``.
        pinned: sizes of areas of pinned memory, by address.
        refuses_to_pin: as a machine does that has locked all it can.
        driver: functions of the driver, by name; it has no others.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.journal: list[tuple[str, str, int]] = []
        self.pinned: dict[int, int] = {}
        self.refuses_to_pin = False
        self.driver: dict[str, Callable[..., int]] = {}
        self.numbers = itertools.count(1)
        self.streams: list[Stream] = []
        self._caller = Stream(self, "the caller's")
        self._here = threading.local()
        device = _torch_cuda.CudaDevice(0)
        device.name = "cpu"
        for name, stand_in in {
            "Event": lambda: Event(self),
            "Stream": self._make_stream,
            "current_stream": lambda index: self._current,
            "stream": self._within,
            "set_stream": lambda stream: setattr(self._here, "stream", stream),
            "set_device": lambda index: None,
            "current_device": lambda: 0,
            "is_current_stream_capturing": lambda: False,
            "cudart": lambda: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        frombuffer = torch.frombuffer

        def noted(*args: Any, **options: Any) -> torch.Tensor:
            self.note("touch", self._current)
            return frombuffer(*args, **options)

        monkeypatch.setattr(torch, "frombuffer", noted)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.note("keep", stream))
        monkeypatch.setattr(_torch_cuda, "driver_function", self.driver.get)
        monkeypatch.setattr(_torch_cuda, "devices_of", lambda tensors: [device] * len(tensors) or None)
        monkeypatch.setattr(_torch_cuda, "device_named", lambda name: device)

    def note(self, what: str, stream: Stream, event: int = 0) -> None:
        self.journal.append((what, stream.name, event))

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert address not in self.pinned and flags == 1
        if self.refuses_to_pin:
            return 2
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return {2: "out of memory"}[code]

    @property
    def _current(self) -> Stream:
        return getattr(self._here, "stream", self._caller)

    def _make_stream(self, index: int, priority: int = 0) -> Stream:
        assert index == 0
        self.streams.append(Stream(self, f"own {len(self.streams) + 1}", priority))
        return self.streams[-1]

    @contextmanager
    def _within(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self._current, stream
        try:
            yield
        finally:
            self._here.stream = before
