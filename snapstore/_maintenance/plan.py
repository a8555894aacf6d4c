"""What ``prune`` would remove: a pure function of what the survey saw, the rules, and the time.

Each rule narrows: a snapshot goes only if every rule that was given lets it go, and its owner is dead or the rules
say ``include_live``. ``keep_latest`` counts over the whole root; ``max_bytes`` over what ``session`` and ``request``
select, whoever owns it. Whatever a dead owner left without a snapshot (files half written, trash) goes by the same
rules, except that a rule on requests does not speak of it. A dead session that nothing stays in goes as a whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from snapstore._maintenance.survey import Finding, Loose, Owner, Session, SnapshotFile, Surroundings


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What may go. ``None`` and ``False``: the rule was not given."""

    older_than_s: int | None = None
    by: Literal["mtime", "atime"] = "mtime"
    max_bytes: int | None = None
    keep_latest: int | None = None
    request: str | None = None
    session: str | None = None
    leftovers: bool = False
    include_live: bool = False

    @property
    def given(self) -> bool:
        """Whether any rule selects; without one only leftovers go, whole."""
        rules = (self.older_than_s, self.max_bytes, self.keep_latest, self.request, self.session)
        return self.leftovers or any(rule is not None for rule in rules)


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """What goes from one session. ``whole``: then the directory goes too, if it is empty by then."""

    name: str
    inode: int
    owner: Owner
    snapshots: tuple[SnapshotFile, ...]
    loose: tuple[Loose, ...]
    whole: bool

    @property
    def in_use(self) -> bool:
        """The owner is alive, or may be: files are renamed aside before they are deleted."""
        return self.owner.liveness != "dead"

    @property
    def freed_bytes(self) -> int:
        """Bytes of disk that come free."""
        return sum(each.freed_bytes for each in self.snapshots) + sum(each.freed_bytes for each in self.loose)


@dataclass(frozen=True, slots=True)
class Plan:
    """The removals, session by session, oldest first within each.

    Attributes:
        unfinished: sessions half made or half removed by a process that died.
        in_use: snapshots that the rules select and that stay, because their owner is alive or not to be known.
        over_bytes: by how much ``max_bytes`` is still missed when all this is gone.
        unnamed: snapshots that a rule on requests passed over, because no file tells the request.
        findings: what is odd where the rules look; what is foreign stays, and its session with it.
    """

    sessions: tuple[SessionPlan, ...] = ()
    unfinished: tuple[Loose, ...] = ()
    in_use: int = 0
    over_bytes: int = 0
    unnamed: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def snapshots(self) -> int:
        """How many snapshots go."""
        return sum(len(each.snapshots) for each in self.sessions)

    @property
    def requests(self) -> int:
        """Of how many requests."""
        return len({each.of.request_hash for part in self.sessions for each in part.snapshots})

    @property
    def freed_bytes(self) -> int:
        """Bytes of disk that come free."""
        return sum(each.freed_bytes for each in self.sessions) + sum(
            each.freed_bytes for each in self.unfinished
        )

    @property
    def empty(self) -> bool:
        """True if there is nothing to do."""
        return not (self.sessions or self.unfinished)


def make_plan(sessions: Iterable[Session], around: Surroundings, rules: Rules, now_s: float) -> Plan:
    """Decide. Reads the sessions once, in order, and keeps of each only what may go."""
    chooser = _Chooser(rules, now_s)
    for session in sessions:
        chooser.look_at(session)
    return chooser.decide(around)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Something that age, request and session let go. ``bound``: but its owner is not dead."""

    item: SnapshotFile | Loose
    session: str
    time_ns: int
    bound: bool


@dataclass(slots=True)
class _Part:
    """What is known of a session that anything may go from; ``things``: all that it holds."""

    session: Session
    things: int
    going: list[_Candidate] = field(default_factory=list)


class _Chooser:
    """Gathers candidates in one pass, and decides when all have been seen."""

    def __init__(self, rules: Rules, now_s: float) -> None:
        self._rules = rules
        self._only_dead = rules.leftovers or not rules.given
        self._before_ns = None if rules.older_than_s is None else int((now_s - rules.older_than_s) * 1e9)
        self._parts: dict[str, _Part] = {}
        self._candidates: list[_Candidate] = []
        self._latest: dict[str, list[tuple[str, int, int]]] = {}
        self._findings: list[Finding] = []
        self._total_bytes = 0
        self._unnamed = 0

    def look_at(self, session: Session) -> None:
        """Take what the rules on age, request and session select, and count what the others need."""
        for each in session.snapshots:
            self._note_latest(each)
        if self._rules.session not in (None, session.name):
            return
        self._findings += session.findings
        self._look_at_snapshots(session)
        dead = session.owner.liveness == "dead"
        if dead and self._rules.request is None:
            for loose in session.loose:
                self._total_bytes += loose.freed_bytes
                self._consider(loose, session, loose.mtime_ns)
            if not (session.snapshots or session.loose) and self._is_before(_birth_ns(session)):
                self._part(session)

    def decide(self, around: Surroundings) -> Plan:
        """The plan."""
        in_use, over_bytes = self._choose([each for each in self._candidates if not self._kept(each.item)])
        rules = self._rules
        everywhere = rules.session is None and rules.request is None
        going = [each for each in around.unfinished if everywhere and self._is_before(each.mtime_ns)]
        return Plan(
            sessions=tuple(filter(None, map(self._session_plan, self._parts.values()))),
            unfinished=tuple(going),
            in_use=in_use,
            over_bytes=over_bytes,
            unnamed=self._unnamed,
            findings=(*self._findings, *(around.findings if everywhere else ())),
        )

    def _look_at_snapshots(self, session: Session) -> None:
        for each in session.snapshots:
            if not self._request_matches(each):
                continue
            self._total_bytes += each.disk_bytes
            self._consider(each, session, each.atime_ns if self._rules.by == "atime" else each.mtime_ns)

    def _consider(self, item: SnapshotFile | Loose, session: Session, time_ns: int) -> None:
        dead = session.owner.liveness == "dead"
        if self._is_before(time_ns) and (dead or not self._only_dead):
            bound = not (dead or self._rules.include_live)
            self._candidates.append(_Candidate(item, session.name, time_ns, bound))
            self._part(session)

    def _choose(self, candidates: list[_Candidate]) -> tuple[int, int]:
        """Give each part what goes from it. How many stay because they are in use, and the bytes still too many."""
        limit = self._rules.max_bytes
        in_use, left_bytes = 0, self._total_bytes
        for each in sorted(candidates, key=_first_to_go):
            if limit is not None and left_bytes <= limit:
                break
            if each.bound:
                in_use += 1
            else:
                self._parts[each.session].going.append(each)
                left_bytes -= each.item.freed_bytes
        return in_use, max(0, left_bytes - limit) if limit is not None else 0

    def _session_plan(self, part: _Part) -> SessionPlan | None:
        session = part.session
        blocked = any(each.kind in _BLOCKING for each in session.findings)
        dead = session.owner.liveness == "dead"
        whole = dead and not blocked and len(part.going) == part.things
        if not (part.going or whole):
            return None
        items = [each.item for each in part.going]
        return SessionPlan(
            name=session.name,
            inode=session.inode,
            owner=session.owner,
            snapshots=tuple(each for each in items if isinstance(each, SnapshotFile)),
            loose=tuple(each for each in items if isinstance(each, Loose)),
            whole=whole,
        )

    def _part(self, session: Session) -> _Part:
        """Keeps the session without its snapshots: of a session that is not touched nothing is kept."""
        part = self._parts.get(session.name)
        if part is None:
            things = len(session.snapshots) + len(session.loose)
            bare = replace(session, snapshots=(), temporaries=(), trash=())
            part = self._parts[session.name] = _Part(bare, things)
        return part

    def _note_latest(self, snapshot: SnapshotFile) -> None:
        """Keep the ranks of the ``keep_latest`` highest snapshots of each request."""
        if self._rules.keep_latest is None:
            return
        ranks = self._latest.setdefault(snapshot.of.request_hash, [])
        heapq.heappush(ranks, _rank(snapshot))
        if len(ranks) > self._rules.keep_latest:
            heapq.heappop(ranks)

    def _kept(self, item: SnapshotFile | Loose) -> bool:
        return isinstance(item, SnapshotFile) and _rank(item) in self._latest.get(item.of.request_hash, ())

    def _request_matches(self, snapshot: SnapshotFile) -> bool:
        if self._rules.request is None:
            return True
        if snapshot.of.request_id is None:
            self._unnamed += 1
            return False
        return fnmatchcase(snapshot.of.request_id, self._rules.request)

    def _is_before(self, time_ns: int | None) -> bool:
        return self._before_ns is None or (time_ns is not None and time_ns <= self._before_ns)


_BLOCKING = ("foreign", "unreadable")
"""Findings that keep a session directory from going: something in it is not ours to remove."""


def _first_to_go(candidate: _Candidate) -> tuple[bool, int]:
    return isinstance(candidate.item, SnapshotFile), candidate.time_ns


def _rank(snapshot: SnapshotFile) -> tuple[str, int, int]:
    """Later sessions, later lives, more tokens: the order of "latest" within one request."""
    return snapshot.of.session, snapshot.of.number, snapshot.token_count


def _birth_ns(session: Session) -> int | None:
    return None if session.opened_at_s is None else session.opened_at_s * 10**9
