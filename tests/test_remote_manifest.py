"""Decisions about manifests: pure, so every order of events is tried without any store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapstore import SnapshotCorruptError
from snapstore.remote._breaker import FAILURES, PAUSE_S, Breaker
from snapstore.remote._manifest import (
    EndLives,
    Entry,
    Manifest,
    Publish,
    Refused,
    Remove,
    decide,
    decode,
    encode,
    visible,
)


def publish(
    life: str, tokens: int = 1024, *, begins: bool = True, at_s: float = 10.0, name: str = ""
) -> Publish:
    entry = Entry(name or f"{life}/{tokens}", 100, 1)
    return Publish("r", life, tokens, entry, begins, at_s)


def end(*lives: str, at_s: float = 0.0) -> EndLives:
    return EndLives("r", frozenset(lives), at_s)


def after(*events: Publish | EndLives | Remove) -> Manifest:
    manifest = None
    for event in events:
        manifest = decide(manifest, event)
    assert manifest is not None
    return manifest


def boundaries(manifest: Manifest) -> dict[int, str]:
    return (
        {count: entry.name for count, entry in manifest.current.boundaries.items()}
        if manifest.current
        else {}
    )


def test_a_first_publish_begins_a_life_and_others_join_it():
    manifest = after(publish("a"), publish("a", 2048, begins=False))
    assert manifest.current.name == "a" and boundaries(manifest) == {1024: "a/1024", 2048: "a/2048"}


def test_asked_twice_it_changes_nothing():
    once = after(publish("a"))
    assert decide(once, publish("a")) == once
    ended = decide(once, end("a"))
    assert decide(ended, end("a")) == ended


def test_a_later_publish_of_a_boundary_replaces_it():
    assert boundaries(after(publish("a"), publish("a", name="other"))) == {1024: "other"}


def test_a_new_life_takes_over_as_a_whole_and_for_good():
    manifest = after(publish("a"), publish("a", 2048), publish("b"))
    assert boundaries(manifest) == {1024: "b/1024"}
    for begins in (True, False):
        with pytest.raises(Refused):
            decide(manifest, publish("a", 4096, begins=begins))


def test_a_late_publish_of_an_ended_life_is_refused():
    manifest = after(publish("a"), end("a"))
    assert manifest.current is None
    with pytest.raises(Refused):
        decide(manifest, publish("a"))


def test_a_life_that_was_ended_before_it_was_seen_to_begin_never_begins():
    with pytest.raises(Refused):
        decide(after(end("a")), publish("a"))


def test_a_cleanup_ends_what_had_begun_by_then_and_nothing_later():
    manifest = after(publish("a", at_s=10.0))
    assert decide(manifest, end(at_s=9.0)) == manifest
    assert decide(manifest, end("b", at_s=9.0)).current == manifest.current
    assert decide(manifest, end(at_s=10.0)).current is None


def test_what_is_removed_is_named_by_its_object():
    manifest = after(publish("a"), publish("a", 2048))
    assert decide(manifest, Remove("r", frozenset({"stale"}))) == manifest
    assert boundaries(decide(manifest, Remove("r", frozenset({"a/1024"})))) == {2048: "a/2048"}
    assert decide(manifest, Remove("r", manifest.objects)).current is None


def test_a_node_sees_neither_what_it_has_cleaned_up_nor_a_life_beside_its_own():
    manifest = after(publish("a", at_s=10.0))
    assert visible(None, None, ()) is None
    assert visible(manifest, None, ()) == manifest.current == visible(manifest, "a", ())
    assert visible(manifest, "b", ()) is None
    assert visible(manifest, None, [end(at_s=11.0)]) is None
    assert visible(manifest, None, [end(at_s=9.0)]) == manifest.current


LIVES = st.sampled_from("abcd")
EVENTS = st.one_of(
    st.tuples(st.just("publish"), LIVES, st.sampled_from([1, 2])),
    st.tuples(st.just("end"), LIVES, st.just(0)),
)


@given(st.lists(EVENTS, max_size=30))
def test_whatever_the_order_what_is_visible_is_of_one_life_and_an_ended_life_never_comes_back(events):
    manifest, over, begun = None, set(), set()
    for kind, life, count in events:
        before = manifest.current.name if manifest and manifest.current else None
        try:
            event = (
                publish(life, count, begins=life not in begun) if kind == "publish" else end(life, at_s=-1.0)
            )
            manifest = decide(manifest, event)
        except Refused:
            assert life in over
            continue
        now = manifest.current.name if manifest.current else None
        if before is not None and now != before:
            over.add(before)
        if kind == "end":
            over.add(life)
        begun |= {now} - {None}
        assert now not in over
        assert all(name.startswith(f"{now}/") for name in boundaries(manifest).values())
        assert decode(encode(manifest)) == manifest


def test_no_content_comes_twice_since_its_hash_is_its_etag():
    manifest = after(publish("a"))
    assert encode(manifest) != encode(manifest)


def test_a_flipped_bit_of_a_manifest_is_found():
    raw = encode(after(publish("a"), publish("a", 2048)))
    for position in range(len(raw) - 1):
        altered = bytearray(raw)
        altered[position] ^= 1
        with pytest.raises(SnapshotCorruptError):
            decode(bytes(altered))
    for cut in range(len(raw) - 1):
        with pytest.raises(SnapshotCorruptError):
            decode(raw[:cut])


class TestBreaker:
    def test_nothing_goes_before_the_first_ping_was_answered(self):
        breaker = Breaker(lambda: 0.0)
        assert not breaker.closed and breaker.ping_due_s == 0.0
        breaker.begin_ping()
        assert breaker.ping_due_s is None
        breaker.worked(ping=True)
        assert breaker.closed

    def test_failures_in_a_row_open_it_and_pings_wait_longer_and_longer(self):
        now = [0.0]
        breaker = Breaker(lambda: now[0])
        breaker.begin_ping()
        breaker.worked(ping=True)
        for _ in range(FAILURES - 1):
            assert not breaker.failed(OSError())
        breaker.worked()
        opened = [breaker.failed(OSError("down")) for _ in range(FAILURES)]
        assert opened == [False] * (FAILURES - 1) + [True] and not breaker.closed
        assert breaker.error == "OSError: down" and breaker.ping_due_s == PAUSE_S
        breaker.worked()
        assert not breaker.closed, "an answer to an old request does not close it"
        now[0] = PAUSE_S
        assert breaker.ping_due_s == 0.0
        breaker.begin_ping()
        breaker.failed(OSError(), ping=True)
        assert breaker.ping_due_s == 2 * PAUSE_S
        breaker.begin_ping()
        breaker.worked(ping=True)
        assert breaker.closed and breaker.error is None
