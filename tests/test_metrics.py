"""``snapstore.metrics``: what a scrape says, read back with prometheus_client's own parser."""

from __future__ import annotations

import errno
import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import tensors
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from snapstore import DiskQuotaError, SnapshotStore, StoreClosedError, StoreFullError, StoreOptions
from snapstore._latency import BOUNDS_S, Histogram, Latencies, Reasons
from snapstore._reasons import FAILED, REJECTED, reason_of
from snapstore.metrics import StoreCollector
from snapstore.testing import FakeDevice, FaultyFileSystem


def registry_of(store: Any) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    return registry


def scrape(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the exposition text, by name and labels."""
    text = generate_latest(registry).decode()
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    found = {(each.name, tuple(sorted(each.labels.items()))): each.value for each in samples}
    assert len(found) == len(samples), "a series is there twice"
    return found


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return scrape(registry)[f"snapstore_{name}", tuple(sorted(labels.items()))]


def test_counters_gauges_and_histograms_say_what_happened(root: Path, files: FaultyFileSystem) -> None:
    with SnapshotStore(root, file_system=files) as store:
        registry = registry_of(store)
        info = store.save("a", 1, tensors(1)).result(10)
        store.load("a", 1)
        with files.pause("rename", ".safetensors") as gate:
            store.save("b", 1, tensors(2))
            gate.wait_reached()
            store.save("c", 1, tensors(3))
            store.load("c", 1)
            assert store.cleanup_request("c").clean
            assert value(registry, "writer_state", state="writing") == 1
            assert value(registry, "pending_saves") == 1
            assert value(registry, "pending_bytes") == info.nbytes
            assert value(registry, "pending_oldest_seconds") > 0
            assert value(registry, "write_in_hand_seconds") > 0
        store.flush(10)
        expected = {
            "saves_accepted_total": 3, "saves_committed_total": 2, "saves_cancelled_total": 1,
            "saves_committed_bytes_total": 2 * info.nbytes, "pending_saves": 0, "live_snapshots": 2,
            "save_seconds_count": 3, "queue_wait_seconds_count": 2, "write_seconds_count": 2,
            "cleanup_wait_seconds_count": 1, "trash_bytes": 0, "leaked_bytes": 0,
        }  # fmt: skip
        assert {name: value(registry, name) for name in expected} == expected
        assert value(registry, "session_bytes") > 0 and value(registry, "disk_free_bytes") > 0
        assert value(registry, "load_seconds_count", source="disk") == 1
        assert value(registry, "load_seconds_count", source="memory") == 1
        assert (
            value(registry, "health", state="ok") == 1 and value(registry, "writer_state", state="idle") == 1
        )
    assert value(registry, "health", state="dead") == 1 and value(registry, "writer_state", state="dead") == 1


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no_space"),
        (errno.EIO, "io_error"),
        (errno.EROFS, "read_only"),
        (errno.EACCES, "denied"),
    ],
)
def test_a_failed_save_is_counted_by_its_reason(
    root: Path, files: FaultyFileSystem, number: int, reason: str
) -> None:
    with SnapshotStore(root, file_system=files) as store:
        registry = registry_of(store)
        files.fail("write", number, ".tmp")
        ticket = store.save("a", 1, tensors(1))
        assert ticket.exception(10) is not None
        found = scrape(registry)
        failed = {labels: count for (name, labels), count in found.items() if name.endswith("_failed_total")}
        assert {dict(labels)["reason"]: count for labels, count in failed.items() if count} == {reason: 1}
        assert value(registry, "saves_failed_bytes_total", reason=reason) == ticket.nbytes
        assert value(registry, "health", state="degraded") == 1


def test_a_rejected_save_is_counted_by_its_reason(root: Path, files: FaultyFileSystem) -> None:
    options = StoreOptions(max_pending_jobs=1, on_full="reject", max_session_bytes=1_000_000)
    store = SnapshotStore(root, options, file_system=files)
    registry = registry_of(store)
    with files.pause("rename", ".safetensors"):
        store.save("a", 1, tensors(1))
        with pytest.raises(StoreFullError):
            store.save("a", 2, tensors(1))
        with pytest.raises(DiskQuotaError):
            store.save("a", 3, {"x": np.zeros(2_000_000, np.uint8)})
    store.shutdown(cleanup=True)
    with pytest.raises(StoreClosedError):
        store.save("a", 4, tensors(1))
    for reason in REJECTED:
        expected = 1 if reason in ("full", "quota", "closed") else 0
        assert value(registry, "saves_rejected_total", reason=reason) == expected
    assert value(registry, "saves_rejected_bytes_total", reason="quota") == 2_000_000


def test_a_stuck_writer_and_a_stuck_device_are_seen_without_asking_them(
    root: Path, files: FaultyFileSystem, eventually: Any
) -> None:
    device = FakeDevice()
    options = StoreOptions(stuck_after_s=0.05, device_timeout_s=0.1)
    with SnapshotStore(root, options, file_system=files) as store:
        registry = registry_of(store)
        with files.pause("rename", ".safetensors") as gate:
            store.save("a", 1, tensors(1))
            gate.wait_reached()
            stuck = store.save("d", 1, {"x": device.tensor(np.arange(8.0))})
            eventually(lambda: value(registry, "writer_state", state="stuck") == 1)
            eventually(stuck.done)
            assert value(registry, "device_state", device=device.name, state="stuck") == 1
            assert value(registry, "leaked_bytes") > 0 and value(registry, "health", state="stuck") == 1
            assert value(registry, "saves_failed_total", reason="timeout") == 1
        device.automatic = True
        eventually(lambda: value(registry, "leaked_bytes") == 0)


def test_one_scrape_is_one_moment(root: Path) -> None:
    """Sums hold in every scrape while saves, cleanups and commits go on."""
    with SnapshotStore(root) as store:
        registry = registry_of(store)
        done = threading.Event()

        def work() -> None:
            for number in range(300):
                store.save(f"r{number % 7}", number, tensors(1, nbytes=64))
                if number % 11 == 0:
                    store.cleanup_request(f"r{number % 7}", timeout_s=0)
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        scrapes = 0
        while not done.is_set() or scrapes < 5:
            found = scrape(registry)
            total = {
                name.removeprefix("snapstore_"): each for (name, labels), each in found.items() if not labels
            }
            failed = sum(each for (name, _), each in found.items() if name == "snapstore_saves_failed_total")
            ended = total["saves_committed_total"] + total["saves_cancelled_total"] + failed
            assert total["saves_accepted_total"] == ended + total["pending_saves"]
            assert total["queue_wait_seconds_count"] >= total["saves_committed_total"]
            scrapes += 1
        thread.join()


def test_names_and_units_follow_the_conventions(root: Path) -> None:
    with SnapshotStore(root) as store, SnapshotStore(root) as other:
        store.save("a", 1, tensors(1)).result(10)
        registry = registry_of({"one": store, 'odd "name"\n\\': other})
        text = generate_latest(registry).decode()
        families = list(text_string_to_metric_families(text))
        assert [family.name for family in families] == list(dict.fromkeys(family.name for family in families))
        for family in families:
            assert re.fullmatch(r"snapstore_[a-z][a-z0-9_]*", family.name), family.name
            assert family.documentation and not family.documentation.endswith("."), family.name
            assert not re.search(r"_(ms|milliseconds|kb|mib|count|sum|bucket)$", family.name), family.name
            assert {each.labels["store"] for each in family.samples} <= {"one", 'odd "name"\n\\'}
            if family.type == "counter":
                assert all(each.name.endswith("_total") for each in family.samples), family.name
            elif family.type == "histogram":
                assert family.name.endswith("_seconds")
                check_histogram(family)
        assert {family.type for family in families} == {"counter", "gauge", "histogram"}
        assert list(parse_openmetrics(generate_openmetrics(registry).decode()))


def check_histogram(family: Any) -> None:
    series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    for each in family.samples:
        if each.name.endswith("_bucket"):
            labels = tuple(sorted((name, text) for name, text in each.labels.items() if name != "le"))
            series.setdefault(labels, []).append((float(each.labels["le"]), each.value))
    for buckets in series.values():
        assert [bound for bound, _ in buckets] == [*BOUNDS_S, math.inf]
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)


def test_a_second_collector_in_one_registry_is_refused_by_it(root: Path) -> None:
    with SnapshotStore(root) as store, SnapshotStore(root) as other:
        registry = registry_of(store)
        with pytest.raises(ValueError, match="Duplicated"):
            registry.register(StoreCollector(other))


def test_every_error_has_a_reason_of_the_list() -> None:
    errors: list[BaseException] = [
        OSError(errno.EDQUOT, "x"), OSError(), ValueError(), KeyboardInterrupt(), MemoryError(), TimeoutError(),
        StoreClosedError("x"), RuntimeError("x"),
    ]  # fmt: skip
    words = [reason_of(error) for error in errors]
    assert words == ["no_space", "io_error", "bug", "interrupted", "no_memory", "timeout", "closed", "bug"]
    assert set(words) <= {*FAILED, *REJECTED}


def test_a_histogram_counts_into_the_bucket_that_holds_it() -> None:
    histogram = Histogram()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[0] + 1e-9, BOUNDS_S[-1], 1e9):
        histogram = histogram.with_one(seconds)
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-2], histogram.counts[-1]) == (
        2,
        1,
        1,
        1,
    )
    assert histogram.total == 5 and histogram.sum_s == pytest.approx(
        sum((BOUNDS_S[0] * 2, BOUNDS_S[-1], 1e9))
    )
    assert Latencies().with_one("write", -1.0).write.sum_s == 0.0
    assert Reasons().with_one("b", 1).with_one("a", 2).with_one("b", 3).by_reason == (
        ("a", 1, 2),
        ("b", 2, 4),
    )


def test_the_dashboard_and_the_alerts_ask_for_series_that_there_are(root: Path) -> None:
    device = FakeDevice(automatic=True)
    with SnapshotStore(root) as store:
        store.save("a", 1, {"x": device.tensor(np.arange(8.0))}).result(10)
        there = {name for name, _ in scrape(registry_of(store))}
    docs = Path(__file__).parents[1] / "docs"
    dashboard = json.loads((docs / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((docs / "alerts.yml").read_text())
    asked += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert len(asked) > 40
    for expression in asked:
        names = re.findall(r"snapstore_\w+", expression)
        assert names and set(names) <= there, expression
        for reason in re.findall(r'reason=~?"([^"]+)"', expression):
            assert set(reason.split("|")) <= {*FAILED, *REJECTED}
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert len({(each["x"], each["y"]) for each in places}) == len(places)
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
