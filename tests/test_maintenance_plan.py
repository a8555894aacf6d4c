"""What a prune would remove, rule by rule: the plan is a pure function, so nothing here touches a disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapstore import _paths
from snapstore._maintenance.plan import Plan, Rules, make_plan
from snapstore._maintenance.survey import (
    Finding,
    Generation,
    Loose,
    Owner,
    Session,
    SnapshotFile,
    Surroundings,
)

NOW_S = 1_800_000_000
KIB = 1024


def session(name: str, liveness: str = "dead", *, opened_s: int = NOW_S - 9000) -> Session:
    return Session(name, hash(name), opened_s, Owner(liveness, 1, "host"))  # type: ignore[arg-type]


def having(base: Session, *snapshots: tuple[str, int, int], size: int = KIB, loose: int = 0) -> Session:
    """Snapshots as (request, tokens, age in seconds)."""
    generations: dict[str, Generation] = {}
    files = []
    for request, tokens, age_s in snapshots:
        number = len(generations)
        name = _paths.generation_name(request, number)
        of = generations.setdefault(
            request, Generation(base.name, name, _paths.request_hash(request), number, request)
        )
        time_ns = (NOW_S - age_s) * 10**9
        files.append(SnapshotFile(of, tokens, size, size, size, time_ns, time_ns, tokens))
    temporaries = [
        Loose("temporary", f"{base.name}/t{i}", f"t{i}", KIB, (NOW_S - 9000) * 10**9, i) for i in range(loose)
    ]
    return replace(base, snapshots=tuple(files), temporaries=tuple(temporaries))


def plan(*sessions: Session, around: Surroundings | None = None, **rules: Any) -> Plan:
    return make_plan(sessions, around or Surroundings((), (), ()), Rules(**rules), NOW_S)


def going(planned: Plan) -> list[tuple[str, int]]:
    return sorted(
        (each.of.request_id or "", each.token_count) for part in planned.sessions for each in part.snapshots
    )


DEAD = having(session("1-dead"), ("a", 1, 9000), ("a", 2, 600), ("b", 1, 60), loose=2)
LIVE = having(session("2-live", "alive"), ("a", 3, 9000), ("c", 1, 60))
UNKNOWN = having(session("3-unknown", "unknown"), ("d", 1, 9000))
ALL = (DEAD, LIVE, UNKNOWN)


@pytest.mark.parametrize("rules", [{}, {"leftovers": True}])
def test_without_a_rule_all_that_dead_owners_left_goes_and_nothing_else(rules: dict[str, Any]) -> None:
    planned = plan(*ALL, **rules)
    assert [part.name for part in planned.sessions] == ["1-dead"]
    assert going(planned) == [("a", 1), ("a", 2), ("b", 1)]
    (part,) = planned.sessions
    assert part.whole and len(part.loose) == 2 and not part.in_use
    assert planned.in_use == 0
    assert planned.freed_bytes == 5 * KIB
    assert (planned.snapshots, planned.requests) == (3, 2)


def test_live_and_unknown_owners_are_counted_and_left() -> None:
    planned = plan(*ALL, older_than_s=3600)
    assert going(planned) == [("a", 1)]
    assert planned.in_use == 2


def test_include_live_takes_them_too_but_never_their_directories() -> None:
    planned = plan(*ALL, older_than_s=0, include_live=True)
    assert len(going(planned)) == 6
    assert [(part.name, part.whole, part.in_use) for part in planned.sessions] == [
        ("1-dead", True, False),
        ("2-live", False, True),
        ("3-unknown", False, True),
    ]


def test_files_being_written_and_trash_of_live_owners_are_never_in_a_plan() -> None:
    for liveness in ("alive", "unknown"):
        busy = having(session("x", liveness), ("a", 1, 9000), loose=3)
        planned = plan(busy, older_than_s=0, include_live=True)
        assert all(not part.loose for part in planned.sessions)
        assert going(planned) == [("a", 1)]


def test_age_counts_to_the_second_and_by_the_time_that_was_asked_for() -> None:
    assert going(plan(DEAD, older_than_s=600)) == [("a", 1), ("a", 2)]
    assert going(plan(DEAD, older_than_s=601)) == [("a", 1)]
    read_lately = replace(DEAD.snapshots[0], atime_ns=NOW_S * 10**9)
    touched = replace(DEAD, snapshots=(read_lately, *DEAD.snapshots[1:]))
    assert going(plan(touched, older_than_s=600, by="atime")) == [("a", 2)]


def test_keep_latest_counts_over_the_whole_root_also_what_may_not_go() -> None:
    assert going(plan(*ALL, keep_latest=1)) == [("a", 1), ("a", 2)]
    assert going(plan(*ALL, keep_latest=2)) == [("a", 1)]
    assert going(plan(DEAD, keep_latest=1)) == [("a", 1)]
    assert going(plan(*ALL, keep_latest=1, session="1-dead")) == [("a", 1), ("a", 2)]


def test_max_bytes_takes_the_oldest_first_and_no_more_than_it_must() -> None:
    old, middle, new = ("a", 1, 300), ("a", 2, 200), ("a", 3, 100)
    for order in ((old, middle, new), (new, old, middle)):
        three = having(session("1"), *order)
        assert going(plan(three, max_bytes=3 * KIB)) == []
        assert going(plan(three, max_bytes=3 * KIB - 1)) == [("a", 1)]
        assert going(plan(three, max_bytes=2 * KIB)) == [("a", 1)]
        assert going(plan(three, max_bytes=0)) == [("a", 1), ("a", 2), ("a", 3)]


def test_max_bytes_takes_what_no_snapshot_needs_before_any_snapshot() -> None:
    planned = plan(DEAD, max_bytes=3 * KIB)
    assert going(planned) == []
    assert [len(part.loose) for part in planned.sessions] == [2]
    assert not planned.sessions[0].whole


def test_max_bytes_counts_live_sessions_passes_them_over_and_says_what_it_misses() -> None:
    planned = plan(*ALL, max_bytes=2 * KIB)
    assert going(planned) == [("a", 1), ("a", 2), ("b", 1)]
    assert planned.over_bytes == KIB
    assert planned.in_use == 3


def test_hard_links_free_nothing_so_max_bytes_does_not_count_on_them() -> None:
    linked = replace(DEAD.snapshots[0], freed_bytes=0)
    both = replace(DEAD, snapshots=(linked, *DEAD.snapshots[1:]), temporaries=())
    assert going(plan(both, max_bytes=2 * KIB)) == [("a", 1), ("a", 2)]


def test_every_rule_narrows() -> None:
    assert going(plan(*ALL, request="a", older_than_s=3600)) == [("a", 1)]
    assert going(plan(*ALL, request="[ab]", keep_latest=2)) == [("a", 1)]
    assert going(plan(*ALL, session="2-live", older_than_s=0)) == []
    assert going(plan(*ALL, request="?", session="1-dead", max_bytes=KIB)) == [("a", 1), ("a", 2)]
    assert going(plan(*ALL, older_than_s=60, leftovers=True)) == [("a", 1), ("a", 2), ("b", 1)]


def test_a_rule_on_requests_speaks_neither_of_trash_nor_of_what_has_no_name() -> None:
    nameless = replace(DEAD.snapshots[0], of=replace(DEAD.snapshots[0].of, request_id=None))
    planned = plan(replace(DEAD, snapshots=(nameless, *DEAD.snapshots[1:])), request="*")
    assert going(planned) == [("a", 2), ("b", 1)]
    assert planned.unnamed == 1
    assert not any(part.loose or part.whole for part in planned.sessions)


def test_a_session_with_anything_foreign_in_it_stays_and_the_rest_of_it_goes() -> None:
    for kind, whole in (("foreign", False), ("unreadable", False), ("linked", True)):
        odd = replace(DEAD, findings=(Finding(kind, "x", "why"),))  # type: ignore[arg-type]
        planned = plan(odd)
        assert len(going(planned)) == 3
        assert planned.sessions[0].whole is whole
        assert planned.findings == odd.findings


def test_empty_sessions_of_dead_owners_go_if_they_are_old_enough() -> None:
    husk = session("1", opened_s=NOW_S - 100)
    assert [part.whole for part in plan(husk).sessions] == [True]
    assert [part.whole for part in plan(husk, older_than_s=100).sessions] == [True]
    assert plan(husk, older_than_s=101).empty
    assert plan(replace(husk, opened_at_s=None), older_than_s=1).empty
    assert plan(husk, request="*").empty
    assert plan(session("1", "alive"), older_than_s=0, include_live=True).empty
    assert plan(session("1", "unknown")).empty


def test_half_made_sessions_go_unless_the_rules_speak_of_something_else() -> None:
    torn = Loose("unfinished", "n", "n", KIB, (NOW_S - 100) * 10**9, 1)
    around = Surroundings((torn,), (), (Finding("foreign", "x", "why"),))
    assert plan(around=around).unfinished == (torn,)
    assert plan(around=around, older_than_s=100).unfinished == (torn,)
    assert plan(around=around, older_than_s=101).unfinished == ()
    for rules in ({"request": "*"}, {"session": "x"}):
        assert plan(around=around, **rules).unfinished == plan(around=around, **rules).findings == ()


SNAPSHOTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 500)),
    max_size=8,
    unique_by=lambda t: t[:2],
)
SESSIONS = st.lists(st.tuples(st.sampled_from(["alive", "dead", "unknown"]), SNAPSHOTS), max_size=4)
RULES = st.fixed_dictionaries(
    {},
    optional={
        "older_than_s": st.integers(0, 500),
        "max_bytes": st.integers(0, 20 * KIB),
        "keep_latest": st.integers(1, 4),
        "request": st.sampled_from(["*", "a", "[bc]"]),
        "session": st.sampled_from(["s0", "s1"]),
        "include_live": st.booleans(),
    },
)


def built(described: Iterable[tuple[str, list[tuple[str, int, int]]]]) -> list[Session]:
    return [
        having(session(f"s{i}", liveness), *snapshots) for i, (liveness, snapshots) in enumerate(described)
    ]


@given(SESSIONS, RULES)
def test_whatever_the_rules_no_plan_breaks_one(described: Any, rules: dict[str, Any]) -> None:
    sessions = built(described)
    planned = plan(*sessions, **rules)
    owners = {each.name: each.owner.liveness for each in sessions}
    everything = [each for one in sessions for each in one.snapshots]
    gone = [each for part in planned.sessions for each in part.snapshots]
    assert len(set(gone)) == len(gone) and set(gone) <= set(everything)
    for each in gone:
        assert owners[each.of.session] == "dead" or rules.get("include_live")
        assert NOW_S - each.mtime_ns // 10**9 >= rules.get("older_than_s", 0)
        assert rules.get("session") in (None, each.of.session)
        assert rules.get("request", "*") in ("*", each.of.request_id, "[bc]")
    for request in "abc":
        ranks = sorted(_rank(each) for each in everything if each.of.request_id == request)
        kept = [_rank(each) for each in everything if each.of.request_id == request and each not in gone]
        latest = ranks[-rules["keep_latest"] :] if "keep_latest" in rules else []
        assert set(latest) <= set(kept)
    for part in planned.sessions:
        if part.whole:
            assert owners[part.name] == "dead"
            assert {each for each in everything if each.of.session == part.name} <= set(gone)


@given(SESSIONS, RULES, RULES)
def test_one_more_rule_never_lets_more_go(
    described: Any, rules: dict[str, Any], more: dict[str, Any]
) -> None:
    """But for the default, which is a rule itself; and max_bytes, whose sum other rules change."""
    for each in (rules, more):
        each.pop("include_live", None)
        each.pop("max_bytes", None)
    if not rules:
        rules = {"older_than_s": 0}
    sessions = built(described)
    assert set(going(plan(*sessions, **{**more, **rules}))) <= set(going(plan(*sessions, **rules)))


def _rank(snapshot: SnapshotFile) -> tuple[str, int, int]:
    return snapshot.of.session, snapshot.of.number, snapshot.token_count
