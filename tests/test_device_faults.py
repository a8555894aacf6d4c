"""Planted faults: each mistake that device copies invite is made in a copy of the package, and a test must see it.

The list is the point: a change that makes one of these tests blind fails here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """In ``module``, ``right`` becomes ``wrong``; then ``test`` must fail."""

    name: str
    module: str
    right: str
    wrong: str
    test: str


FAULTS = [
    Fault(
        "the copy does not wait for the producer's event",
        "_staging.py",
        "channel.start(part.after, moves_of_part(part))",
        "channel.start(None, moves_of_part(part))",
        "test_device_save.py::test_a_copy_waits_for_whoever_makes_the_values",
    ),
    Fault(
        "memory is freed on a time-out",
        "_flights.py",
        "            self._end_locked(part.submission, verdict, error)\n            self._drop_parts_locked(",
        "            self._end_locked(part.submission, verdict, error)\n"
        "            if part.flying:\n"
        "                lane.flying.remove(part)\n"
        "                self._over_locked(part, verdict)\n"
        "            self._drop_parts_locked(",
        "test_device_wedge.py::test_nothing_that_a_stuck_device_may_touch_is_freed_or_used_again",
    ),
    Fault(
        "a flag says that a snapshot is there, instead of a count of its parts",
        "_flights.py",
        "submission.parts_left -= 1",
        "submission.parts_left = 0",
        "test_device_save.py::test_host_and_device_tensors_go_into_one_snapshot",
    ),
    Fault(
        "every copy is polled, not the oldest",
        "_staging.py",
        "if part is not None and channel.done(part.mark):",
        "if part is not None and [channel.done(each.mark) for each in lane.flying][0]:",
        "test_device_save.py::test_only_the_oldest_copy_is_polled",
    ),
    Fault(
        "an end is taken twice, at the time-out and at the late arrival",
        "_flights.py",
        "        if submission.ended:\n            return\n",
        "",
        "test_device_wedge.py::test_a_late_event_brings_the_device_back",
    ),
    Fault(
        "a thread's variable keeps the last tensors alive",
        "_staging.py",
        "part.let_go()",
        "self._last = part",
        "test_device_save.py::test_lent_tensors_are_kept_until_released_and_not_longer",
    ),
    Fault(
        "what was lent is forgotten as soon as the copy is asked for",
        "_staging.py",
        "            part.mark = channel.start(part.after, moves_of_part(part))\n",
        "            part.mark = channel.start(part.after, moves_of_part(part))\n            part.blocks = ()\n",
        "test_device_save.py::test_lent_tensors_are_kept_until_released_and_not_longer",
    ),
    Fault(
        "what was lent is said to be released when `save` returns",
        "_saving.py",
        "        if not offer.borrow:\n            job.ticket._release()\n    else:",
        "        job.ticket._release()\n    else:",
        "test_device_save.py::test_lent_tensors_are_kept_until_released_and_not_longer",
    ),
    Fault(
        "a buffer goes back when the copy has arrived, not when the file is written",
        "_staging.py",
        "            if submission not in verdict.admit:\n",
        "            if submission.ended:\n",
        "test_device_save.py::test_a_buffer_goes_back_only_when_its_file_is_written",
    ),
    Fault(
        "a drain counts events, not saves",
        "_flights.py",
        "                for submission in self._outstanding\n                if request_id",
        "                for submission in self._outstanding\n"
        "                if all(part.mark for part in submission.parts)\n"
        "                if request_id",
        "test_device_drain.py::test_drain_counts_a_save_from_when_it_was_handed_over_not_from_its_event",
    ),
    Fault(
        "a pack that has no copy behind it is taken for nothing",
        "_placing.py",
        "gathers = any(id(block.data) not in lent for block in blocks)",
        "gathers = False",
        "test_device_drain.py::test_drain_waits_for_a_pack_though_its_save_is_over",
    ),
    Fault(
        "a copy is asked for though its request was cleaned up",
        "_flights.py",
        "if submission.job.life.alive and",
        "if",
        "test_device_drain.py::test_a_save_that_is_cancelled_before_it_is_asked_for_never_is",
    ),
    Fault(
        "a request id is the fence, not its generation",
        "_flights.py",
        "if submission.job.life.alive and",
        "if submission.job.life.alive is (submission.job.ticket.generation == 1) and",
        "test_device_drain.py::test_a_new_life_of_an_id_is_not_mistaken_for_the_one_that_was_cancelled",
    ),
    Fault(
        "only copies with an event are watched, not a call of the driver",
        "_flights.py",
        "if lane.busy and lane.status == \"ok\"",
        "if any(part.mark for part in lane.flying) and lane.status == \"ok\"",
        "test_device_wedge.py::test_a_call_of_the_driver_that_never_returns_is_seen_as_well",
    ),
    Fault(
        "the age of the oldest is taken for a lack of progress",
        "_flights.py",
        "            lane.since_s = self.monotonic_s()\n            self._recover_locked(lane)\n            self._over",
        "            self._recover_locked(lane)\n            self._over",
        "test_device_wedge.py::test_progress_is_what_counts_not_the_age_of_the_oldest",
    ),
    Fault(
        "a stuck device stays so for ever",
        "_flights.py",
        'if lane.status == "stuck":',
        'if lane.status == "lost":',
        "test_device_wedge.py::test_a_late_event_brings_the_device_back",
    ),
    Fault(
        "a load's memory is used again before the device has read it",
        "_loading.py",
        "return self._staging.upload(device, layout, buffer, buffer.give_back)",
        "tensors = self._staging.upload(device, layout, buffer, lambda: None)\n"
        "        buffer.give_back()\n"
        "        return tensors",
        "test_device_load.py::test_the_memory_of_a_load_is_used_again_only_when_the_device_has_read_it",
    ),
    Fault(
        "a load does not wait for what is on its way",
        "_store.py",
        "self._state.find(key, self._options.device_timeout_s)",
        "self._state.commit_of(key) or self._state.find(key)",
        "test_device_load.py::test_a_load_gives_the_later_save_of_a_key_never_the_one_that_it_replaces",
    ),
    Fault(
        "a CUDA stream does not wait for the producer's event",
        "adapters/_torch_cuda.py",
        "self._stream.wait_event(after)",
        "pass",
        "test_device_torch.py::test_a_save_s_copy_waits_on_a_stream_of_its_own_for_the_caller_s",
    ),
    Fault(
        "the caller's CUDA stream does not wait for a load",
        "adapters/_torch_cuda.py",
        "            current.wait_event(mark)\n",
        "",
        "test_device_torch.py::test_the_caller_s_stream_waits_for_a_load_and_keeps_its_memory",
    ),
    Fault(
        "the allocator may use a load's memory again while the caller's stream reads it",
        "adapters/_torch_cuda.py",
        "            arena.record_stream(current)\n",
        "",
        "test_device_torch.py::test_the_caller_s_stream_waits_for_a_load_and_keeps_its_memory",
    ),
]  # fmt: skip


def copy_of_the_package(folder: Path) -> Path:
    shutil.copytree(
        CHECKOUT / "snapstore", folder / "snapstore", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    (folder / "tests").mkdir()
    tests = CHECKOUT / "tests"
    helpers = (path for path in tests.glob("*.py") if not path.name.startswith("test_"))
    for path in (*helpers, *(tests / name for name in {fault.test.partition("::")[0] for fault in FAULTS})):
        shutil.copy(path, folder / "tests")
    return folder


def run(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(folder / "tmp"),
    ]
    return subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=folder,
        env={**os.environ, "SNAPSTORE_PATIENCE_S": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )


def test_without_a_fault_these_tests_pass(tmp_path: Path) -> None:
    done = run(copy_of_the_package(tmp_path), *dict.fromkeys(fault.test for fault in FAULTS))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_planted_fault_is_seen(fault: Fault, tmp_path: Path) -> None:
    path = copy_of_the_package(tmp_path) / "snapstore" / fault.module
    source = path.read_text()
    assert source.count(fault.right) == 1, f"{fault.module} has changed: plant this fault anew"
    path.write_text(source.replace(fault.right, fault.wrong))
    done = run(tmp_path, fault.test)
    assert done.returncode == 1, done.stdout
    assert fault.test.partition("::")[2] in done.stdout, done.stdout
