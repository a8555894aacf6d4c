"""``snapstore ls``, ``verify``, ``stats`` and ``prune`` of a URL: the same flags, and the same care."""

from __future__ import annotations

import json

import obstore
import pytest
from helpers import assert_same, tensors
from remotes import Nodes, held_back, new_memory_url, warm_up

from snapstore import SnapshotNotFoundError
from snapstore._maintenance.plan import Rules, make_plan
from snapstore.cli import main
from snapstore.remote import _names
from snapstore.remote._manifest import Manifest, RemoteLife
from snapstore.remote._objects import ObjectStore, Seen
from snapstore.remote._survey import GRACE_S, TOMBSTONE_S, survey
from snapstore.remote._upkeep import Pruning

KIB = 1024


@pytest.fixture(scope="session", autouse=True)
def _client():
    warm_up()


@pytest.fixture
def nodes(tmp_path):
    nodes = Nodes(tmp_path, new_memory_url())
    yield nodes
    nodes.close()


@pytest.fixture
def there(nodes):
    """The object store, looked at from outside."""
    store = ObjectStore(nodes.url, {}, 5.0)
    yield store
    store.close()


@pytest.fixture
def command(nodes, capsys):
    """Run it on the nodes' URL; exit status and the JSON that it prints."""

    def run(name, *arguments):
        status = main([name, nodes.url, "--json", *arguments])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else err

    return run


def fill(nodes, requests=2, counts=(1024, 2048)):
    node = nodes("a")
    for number in range(requests):
        for count in counts:
            assert node.save(f"request-{number}", count, tensors(count)).wait_published(5)
    return node


def leave_garbage(there) -> str:
    """An object as a node leaves it that dies before its manifest is written."""
    name = _names.object_name("request-0", "x.y.g1", 512)
    obstore.put(there.client, name, b"x" * KIB)
    return name


def prune(there, rules=None, **ages):
    found = survey(there, **ages)
    plan = make_plan(found.sessions, found.surroundings, rules or Rules(), 2**33)
    return Pruning(there, lambda _: None, lambda: True).carry_out(plan)


def objects(there):
    return {each.name for each in there.list(_names.SNAPSHOTS)}


def test_ls_and_stats_and_verify_show_what_is_visible(nodes, command, there):
    fill(nodes)
    leave_garbage(there)
    status, answer = command("ls", "--snapshots", "--sort", "tokens", "--filter", "request=request-1")
    assert status == 0 and [row["tokens"] for row in answer["rows"]] == [1024, 2048]
    assert {row["owner"] for row in answer["rows"]} == {"unknown"}
    status, answer = command("ls", "--requests")
    assert [row["snapshots"] for row in answer["rows"]] == [2, 2]
    status, answer = command("stats")
    assert (answer["requests"], answer["snapshots"]["count"], answer["temporaries"]["count"]) == (2, 4, 1)
    assert answer["free_bytes"] is None
    status, answer = command("verify")
    assert (status, answer["checked"], answer["wrong"]) == (0, 4, 0)
    assert [each["kind"] for each in answer["findings"]] == ["temporary"]


def test_people_get_text(nodes, capsys):
    fill(nodes)
    for name in ("ls", "stats", "verify", "prune"):
        arguments = ["--dry-run"] if name == "prune" else []
        assert main([name, nodes.url, *arguments]) == 0
    assert "4 snapshots" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest"])
def test_verify_finds_damage(nodes, command, there, damage):
    fill(nodes, requests=1)
    name = min(objects(there))
    raw = bytearray(there.get_range(name, 0, 10**6))
    if damage == "manifest":
        obstore.put(there.client, _names.manifest_name("request-0"), b"{}")
    elif damage == "gone":
        there.delete([name])
    else:
        raw[-1] ^= 1
        obstore.put(there.client, name, bytes(raw if damage == "flip" else raw[:-1]))
    status, answer = command("verify")
    assert status == 1 and [each["kind"] for each in answer["findings"]] == ["corrupt"]


def test_without_rules_only_garbage_goes_and_only_when_it_is_old(nodes, there):
    fill(nodes)
    before = objects(there)
    garbage = leave_garbage(there)
    assert prune(there).freed_bytes == 0 and garbage in objects(there)
    report = prune(there, grace_s=0)
    assert (report.freed_bytes, report.snapshots, report.errors) == (KIB, 0, ())
    assert objects(there) == before


def test_visible_snapshots_stay_without_include_live(nodes, command, there):
    fill(nodes)
    _, answer = command("prune", "--older-than", "0s", "--yes")
    assert answer["in_use"] == 4 and len(objects(there)) == 4


def test_a_time_to_live_and_a_quota(nodes, there):
    node = fill(nodes, counts=(1, 2, 3))
    size = next(iter(there.list(_names.SNAPSHOTS))).nbytes
    assert prune(there, Rules(max_bytes=4 * size + 100, include_live=True)).snapshots == 2
    assert len(objects(there)) == 4
    assert prune(there, Rules(keep_latest=1, include_live=True, request="request-1")).snapshots >= 1
    reader = nodes("b")
    assert reader.latest("request-1", remote=True) == 3
    assert_same(reader.load("request-1", 3), tensors(3))
    report = prune(there, Rules(older_than_s=0, include_live=True))
    assert report.errors == () and objects(there) == set()
    with pytest.raises(SnapshotNotFoundError):
        nodes("c").load("request-1", 3)
    assert node.health().status == "ok"


def test_a_dry_run_removes_nothing_and_names_what_would_go(nodes, command, there):
    fill(nodes)
    _, answer = command("prune", "--older-than", "0s", "--include-live", "--dry-run")
    assert {each["path"] for each in answer["removals"]} == objects(there) and len(objects(there)) == 4


def test_what_is_published_while_a_plan_is_made_stays(nodes, there):
    node = fill(nodes, requests=1, counts=(1,))
    found = survey(there, grace_s=0)
    plan = make_plan(found.sessions, found.surroundings, Rules(older_than_s=0, include_live=True), 2**33)
    assert node.save("request-0", 1, tensors(7)).wait_published(5)
    report = Pruning(there, lambda _: None, lambda: True).carry_out(plan)
    assert (report.snapshots, report.changed) == (0, 1)
    assert_same(nodes("b").load("request-0", 1), tensors(7))


def test_an_upload_that_waits_for_its_manifest_is_no_garbage(nodes, there, monkeypatch):
    node = nodes("a")
    with held_back(monkeypatch, "put", lambda name: name.startswith(_names.MANIFESTS)) as gate:
        ticket = node.save("request", 1, tensors(1))
        assert gate.reached.wait(5)
        assert prune(there).freed_bytes == 0
        found = survey(there, grace_s=0)
        gate.open()
        assert ticket.wait_published(5)
    plan = make_plan(found.sessions, found.surroundings, Rules(), 2**33)
    assert Pruning(there, lambda _: None, lambda: True).carry_out(plan).changed == 1
    assert_same(nodes("b").load("request", 1), tensors(1))


def test_a_manifest_without_a_life_goes_when_nothing_can_come_late_any_more(nodes, there, eventually):
    node = fill(nodes, requests=1)
    node.cleanup_request("request-0")
    eventually(lambda: node.stats().remote.endings == 0)
    assert prune(there).freed_bytes == 0
    assert there.read_manifest("request-0").manifest is not None
    assert prune(there, tombstone_s=0).freed_bytes > 0
    assert there.read_manifest("request-0").manifest is None
    assert GRACE_S >= 3600 and TOMBSTONE_S >= 24 * 3600


def test_what_belongs_to_an_unreadable_manifest_stays(nodes, there):
    fill(nodes, requests=1)
    before = objects(there)
    obstore.put(there.client, _names.manifest_name("request-0"), b"{}")
    report = prune(there, grace_s=0)
    assert report.snapshots == 0 and objects(there) == before


def test_a_prefix_without_the_marker_is_refused(capsys):
    url = new_memory_url()
    for name in ("ls", "stats", "verify", "prune"):
        assert main([name, url, *(["--yes"] if name == "prune" else [])]) == 2
        assert "no .snapstore marker" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["verify", "--quarantine"], ["stats", "--watch"], ["prune", "--by", "atime", "--yes"], ["prune"]],
)
def test_what_makes_no_sense_there_is_wrong_usage(nodes, arguments, capsys):
    fill(nodes, requests=1)
    assert main([arguments[0], nodes.url, *arguments[1:]]) == 2
    assert capsys.readouterr().err


def test_a_swapped_manifest_is_seen_by_the_next_writer(there):
    there.probe()
    seen = there.write_manifest(Manifest("r", RemoteLife("a", 1.0)), Seen(None, None))
    assert seen is not None and there.write_manifest(Manifest("r"), Seen(None, None)) is None
    other = there.write_manifest(Manifest("r"), seen)
    assert other is not None and there.write_manifest(Manifest("r"), seen) is None
