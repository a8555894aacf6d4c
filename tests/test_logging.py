"""What the log says: nothing unasked, the event first, facts and reason beside it, and no failure again and again."""

from __future__ import annotations

import errno
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tensors
from prometheus_client import CollectorRegistry

import snapstore
from snapstore import SnapshotStore, StoreOptions, _events
from snapstore.metrics import StoreCollector
from snapstore.testing import FaultyFileSystem


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.INFO]


def test_without_a_configuration_nothing_is_printed(tmp_path: Path) -> None:
    assert any(isinstance(each, logging.NullHandler) for each in logging.getLogger("snapstore").handlers)
    script = f"""
import errno, numpy as np
from snapstore import SnapshotStore
from snapstore.testing import FaultyFileSystem
files = FaultyFileSystem()
files.fail("write", errno.EIO, ".tmp")
with SnapshotStore({str(tmp_path / "root")!r}, file_system=files) as store:
    assert store.save("a", 1, {{"x": np.zeros(9)}}).exception(10)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failure_says_its_event_its_reason_and_whose_it_is(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = FaultyFileSystem()
    with SnapshotStore(root, file_system=files) as store:
        files.fail("write", errno.ENOSPC, ".tmp")
        registry = CollectorRegistry()
        registry.register(StoreCollector(store))
        ticket = store.save("request", 7, tensors(1))
        assert ticket.exception(10)
        [record] = told(caplog)
        assert record.name == "snapstore.writer" and record.levelno == logging.WARNING
        text = record.getMessage()
        assert text.startswith(f"save_failed (no_space): the save of {ticket.key} failed: OSError: ")
        assert text.endswith("; what follows of this kind is summed up")
        facts = {name: getattr(record, name) for name in ("event", "reason", "request_id", "token_count")}
        assert facts == {
            "event": "save_failed",
            "reason": "no_space",
            "request_id": "request",
            "token_count": 7,
        }
        assert (record.generation, record.nbytes) == (ticket.generation, ticket.nbytes)
        labels = {"reason": record.reason}
        assert registry.get_sample_value("snapstore_saves_failed_total", labels) == 1
        assert registry.get_sample_value("snapstore_saves_failed_bytes_total", labels) == ticket.nbytes


def test_repeated_failures_are_summed_up_and_their_end_is_told(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    files = FaultyFileSystem()
    with SnapshotStore(root, file_system=files) as store:
        files.fail("write", errno.EIO, ".tmp", times=50)
        for number in range(50):
            assert store.save("a", number, tensors(1)).exception(10)
        assert [record.event for record in told(caplog)] == ["save_failed"]
        monkeypatch.setattr(_events, "SUMMARY_S", 0.0)
        files.fail("write", errno.EIO, ".tmp")
        assert store.save("a", 50, tensors(1)).exception(10)
        monkeypatch.setattr(_events, "SUMMARY_S", math.inf)
        files.fail("write", errno.ENOSPC, ".tmp")
        assert store.save("a", 51, tensors(1)).exception(10)
        store.save("a", 52, tensors(1)).result(10)
        assert store.flush(10)
    records = told(caplog)
    assert [record.event for record in records] == [
        "save_failed", "save_failed_again", "save_failed", "save_failed_over",
    ]  # fmt: skip
    again, other, over = records[1:]
    assert (again.count, again.reasons) == (50, {"io_error": 50})
    assert again.getMessage().startswith("save_failed_again: io_error 50; the last: ")
    assert other.reason == "no_space" and over.count == 52


def test_removals_that_fail_are_told_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files = FaultyFileSystem()
    with SnapshotStore(root, StoreOptions(leftovers="keep"), file_system=files) as store:
        for number in range(5):
            store.save(f"r{number}", 1, tensors(1)).result(10)
        files.fail("rename", errno.EACCES, ".trash", times=5)
        assert not store.cleanup_all().clean
        assert store.cleanup_all().clean
    events = [(record.event, getattr(record, "reason", None)) for record in told(caplog)]
    assert events == [("removal_failed", "denied"), ("removal_failed_over", None)]
    assert (
        told(caplog)[0]
        .getMessage()
        .startswith(
            "removal_failed (denied): could not remove; it is tried again at the next cleanup and at shutdown: "
        )
    )


def test_every_record_above_debug_names_its_event() -> None:
    """Where a logger is called in the core, the text begins with a word that is also in ``extra``."""
    package = Path(snapstore.__file__).parent
    silent = []
    for path in sorted(package.glob("_*.py")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if any(
                f"_log.{level}(" in line for level in ("info", "warning", "error", "critical", "exception")
            ):
                call = "\n".join(lines[number : number + 12])
                if "extra=" not in call:
                    silent.append(f"{path.name}:{number + 1}")
    assert silent == []
