"""Pruning and verifying a prefix beside stores at work: manifests first, objects after, each looked at again before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from snapstore._errors import SnapshotCorruptError
from snapstore._format import decode_header, header_size, verify_checksums
from snapstore._maintenance.plan import Plan
from snapstore._maintenance.prune import PruneReport
from snapstore._maintenance.survey import Finding, Loose, SnapshotFile
from snapstore._maintenance.verify import VerifyReport
from snapstore._memory import segments_of
from snapstore._reader import check_identity
from snapstore._types import SnapshotKey
from snapstore.remote import _names
from snapstore.remote._manifest import Remove, decide
from snapstore.remote._objects import ObjectStore, RemoteFailure
from snapstore.remote._survey import RemoteSnapshot, Survey, Tombstone

_CHANGES = 50
_PART_BYTES = 16 * 1024 * 1024


class Pruning:
    """One prune under way."""

    def __init__(
        self, store: ObjectStore, progress: Callable[[int], None], go_on: Callable[[], bool]
    ) -> None:
        self._store = store
        self._progress = progress
        self._go_on = go_on
        self._snapshots = self._freed_bytes = self._changed = 0
        self._requests: set[str] = set()
        self._errors: list[str] = []
        self._interrupted = False

    def carry_out(self, plan: Plan) -> PruneReport:
        """Remove what the plan names and is still so. Blocks for the network."""
        self._store.learn_conditions()
        by_request: dict[str, list[SnapshotFile]] = defaultdict(list)
        for part in plan.sessions:
            for snapshot in part.snapshots:
                by_request[snapshot.of.request_id or ""].append(snapshot)
        steps: list[Callable[[], None]] = [
            *(self._step(self._hide, request_id, snapshots) for request_id, snapshots in by_request.items()),
            *(self._step(self._drop, loose) for part in plan.sessions for loose in part.loose),
            *(self._step(self._bury, each) for each in plan.unfinished if isinstance(each, Tombstone)),
        ]
        for step in steps:
            if not self._go_on():
                self._interrupted = True
                break
            step()
        return PruneReport(
            snapshots=self._snapshots, requests=len(self._requests), freed_bytes=self._freed_bytes, sessions=0,
            in_use=plan.in_use, changed=self._changed, gone=0, over_bytes=plan.over_bytes, errors=tuple(self._errors),
            interrupted=self._interrupted,
        )  # fmt: skip

    def _step(self, act: Callable[..., None], *what: object) -> Callable[[], None]:
        def guarded() -> None:
            try:
                act(*what)
            except (RemoteFailure, SnapshotCorruptError) as error:
                self._errors.append(str(error))

        return guarded

    def _hide(self, request_id: str, snapshots: list[SnapshotFile]) -> None:
        """Visible ones: out of the manifest, then deleted; not what was replaced since the plan was made."""
        names = {each.path: each for each in snapshots if isinstance(each, RemoteSnapshot)}
        for _ in range(_CHANGES):
            seen = self._store.read_manifest(request_id)
            there = names.keys() & (seen.manifest.objects if seen.manifest else frozenset())
            self._changed += len(names) - len(there) if not there else 0
            if not there or seen.manifest is None:
                return
            wanted = decide(seen.manifest, Remove(request_id, frozenset(there)))
            if self._store.write_manifest(wanted, seen) is not None:
                break
        else:
            raise RemoteFailure(f"the manifest of {request_id!r} was changed by others again and again")
        self._store.delete(sorted(there))
        self._changed += len(names) - len(there)
        self._snapshots += len(there)
        self._requests.add(request_id)
        self._note(names[name].freed_bytes for name in there)

    def _drop(self, loose: Loose) -> None:
        """An object that no manifest names, if that is still so."""
        name = _names.parse_object_name(loose.path)
        if name is None:
            return
        manifest = self._store.read_manifest_named(_names.manifest_name_of(name.request_hash)).manifest
        if manifest is not None and loose.path in manifest.objects:
            self._changed += 1
            return
        self._store.delete([loose.path])
        self._note([loose.freed_bytes])

    def _bury(self, tombstone: Tombstone) -> None:
        """A manifest without a life, if that is still so."""
        manifest = self._store.read_manifest_named(tombstone.path).manifest
        if manifest is not None and manifest.current is None:
            self._store.delete([tombstone.path])
            self._note([tombstone.freed_bytes])

    def _note(self, sizes: Iterable[int]) -> None:
        for nbytes in sizes:
            self._freed_bytes += nbytes
            self._progress(nbytes)


def verify(store: ObjectStore, found: Survey, on_read: Callable[[int], None]) -> VerifyReport:
    """Read every visible snapshot, one at a time, and compare it with its checksums. Takes memory for the largest."""
    findings = list(found.findings)
    reported = {each.path for each in findings}
    checked = checked_bytes = without = 0
    for session in found.sessions:
        for loose in session.loose:
            why = "no manifest names it: being published, or left by a node that died"
            findings.append(Finding("temporary", loose.path, why, loose.freed_bytes))
        for snapshot in session.snapshots:
            if not isinstance(snapshot, RemoteSnapshot) or snapshot.path in reported:
                continue
            try:
                has_checksums = _check(store, snapshot, on_read)
            except FileNotFoundError:
                continue  # cleaned up since the survey
            except SnapshotCorruptError as error:
                findings.append(Finding("corrupt", snapshot.path, str(error), snapshot.nbytes))
                has_checksums = True
            checked, checked_bytes = checked + 1, checked_bytes + snapshot.nbytes
            without += not has_checksums
    return VerifyReport(checked, checked_bytes, without, tuple(findings))


def _check(store: ObjectStore, snapshot: RemoteSnapshot, on_read: Callable[[int], None]) -> bool:
    raw = bytearray()
    for chunk in store.get_stream(snapshot.path, _PART_BYTES):
        raw += chunk
        on_read(len(chunk))
    view = memoryview(raw)
    header = decode_header(view[: header_size(view[:8], len(raw))], len(raw))
    key = SnapshotKey(snapshot.of.request_id or "", snapshot.token_count)
    check_identity(header, key, snapshot.of.number)
    verify_checksums(header, segments_of(header.layout, view[header.data_offset :]))
    return header.checksums is not None
