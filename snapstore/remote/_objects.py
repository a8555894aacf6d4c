"""The only room that talks to obstore. Every method blocks for the network, as long as the client's time-outs allow.

Whatever fails is ``RemoteFailure``; what is not there is ``FileNotFoundError``, as obstore has it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError
from obstore.store import MemoryStore, from_url

from snapstore._committed import CommittedFile
from snapstore._errors import RootError, SnapshotCorruptError
from snapstore.remote import _names
from snapstore.remote._manifest import Manifest, decode, encode

MULTIPART_BYTES = 16 * 1024 * 1024
_PART_BYTES = 5 * 1024 * 1024
"""The least that S3 takes: so the parts of 16 MiB are on their way, and hashed, at once."""
_MARKER = {"format": 1}
_CHECKSUMS = {"checksum_algorithm", "aws_checksum_algorithm"}

NO_PUT_IF_ABSENT = "put-if-absent: an object that two nodes give one name may be overwritten"
NO_COMPARE_AND_SWAP = (
    "compare-and-swap of manifests: nodes that change one request at the same moment may undo each other's change, "
    "an ended life may be visible again"
)

_memories: dict[str, MemoryStore] = {}
_memories_lock = threading.Lock()


class RemoteFailure(OSError):
    """The remote store did not do what it was asked."""


class UnreadableError(Exception):
    """A local file that was to go there can not be read."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A manifest as it was read, and what its next writer has to name."""

    manifest: Manifest | None
    version: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing; ``modified_s`` by the remote store's clock."""

    name: str
    nbytes: int
    modified_s: float


def connect(url: str, options: Mapping[str, Any], timeout_s: float) -> Any:
    """A client of obstore. ``ValueError`` for options that it does not take. Asks nobody yet."""
    if url.startswith("memory:"):
        with _memories_lock:
            return _memories.setdefault(url.rstrip("/"), MemoryStore())
    given = dict(options)
    if url.startswith("file:"):
        return from_url(url, **{"mkdir": True, "automatic_cleanup": True, **given})
    limits: dict[str, Any] = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=min(5.0, timeout_s)),
    }
    if url.startswith(("s3:", "s3a:")) and not {*given, *(given.get("config") or {})} & _CHECKSUMS:
        given["checksum_algorithm"] = "sha256"  # else what is altered on its way there is taken as it comes
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"):
        limits["allow_http"] = True  # obstore forgets this variable where it is given any client options
    given["client_options"] = {**limits, **(given.get("client_options") or {})}
    given.setdefault("retry_config", {"max_retries": 2, "retry_timeout": timedelta(seconds=timeout_s)})
    try:
        return from_url(url, **given)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(
                f"remote={url!r} can not be opened with these remote_options: {error}"
            ) from error
        raise


class ObjectStore:
    """One prefix of an object store. Safe from any thread.

    Attributes:
        lost: guarantees that it can not give, in words; known after ``probe``.
    """

    def __init__(self, url: str, options: Mapping[str, Any], timeout_s: float) -> None:
        self.url = url
        self._client: Any = connect(url, options, timeout_s)
        self._creates = self._swaps = True
        self.lost: tuple[str, ...] = ()

    @property
    def client(self) -> Any:
        """Of obstore. ``RemoteFailure`` once it is closed."""
        if self._client is None:
            raise RemoteFailure("the store is shut down")
        return self._client

    def close(self) -> None:
        """Let its connections go. Never blocks."""
        self._client = None

    @property
    def swaps(self) -> bool:
        """Manifests can be compared and swapped."""
        return self._swaps

    # -- the prefix ---------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """See that it answers, leave the marker, and find out which conditions of a put it keeps."""
        self.check_marker(may_be_missing=True)
        self.learn_conditions()

    def learn_conditions(self) -> None:
        """Try each condition on an object of its own; see ``lost``."""
        name = _names.probe_name()
        with _failing():
            first = obstore.put(self.client, name, b"1", mode="create")
            try:
                self._creates = not self._puts(name, b"2", "create")
                current = _version(first) if self._creates else _version(obstore.head(self.client, name))
                self._swaps = self._puts(name, b"3", current) and not self._puts(name, b"4", current)
            finally:
                obstore.delete(self.client, name)
        missing = ((self._creates, NO_PUT_IF_ABSENT), (self._swaps, NO_COMPARE_AND_SWAP))
        self.lost = tuple(words for kept, words in missing if not kept)

    def _puts(self, name: str, content: bytes, mode: Any) -> bool:
        """Whether a put under a condition goes through."""
        try:
            obstore.put(self.client, name, content, mode=mode)
        except (AlreadyExistsError, PreconditionError, NotSupportedError, NotImplementedError):
            return False
        return True

    def ping(self) -> None:
        """Whether it answers."""
        self.check_marker(may_be_missing=False)

    def check_marker(self, *, may_be_missing: bool) -> None:
        """``RootError`` where another format is, or none: nothing is ever deleted below a prefix without it."""
        try:
            raw = self._get(_names.MARKER)
        except FileNotFoundError:
            if not may_be_missing:
                raise RootError(
                    f"{self.url} has no {_names.MARKER} marker, so it is no snapstore prefix"
                ) from None
            with _failing():
                self._puts(
                    _names.MARKER, json.dumps(_MARKER).encode(), "create" if self._creates else "overwrite"
                )
            return
        try:
            found = json.loads(raw)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("format") != _MARKER["format"]:
            raise RootError(f"the marker of {self.url} says {found!r}; this snapstore knows {_MARKER}")

    # -- manifests ----------------------------------------------------------------------------------------------

    def read_manifest(self, request_id: str) -> Seen:
        """The manifest of a request."""
        return self.read_manifest_named(_names.manifest_name(request_id))

    def read_manifest_named(self, name: str) -> Seen:
        """The manifest of that name. ``SnapshotCorruptError`` if it is none, and came so twice."""
        try:
            return self._read_manifest(name)
        except SnapshotCorruptError:
            return self._read_manifest(name)

    def _read_manifest(self, name: str) -> Seen:
        with _failing():
            try:
                found = obstore.get(self.client, name)
                raw = bytes(found.bytes())
            except FileNotFoundError:
                return Seen(None, None)
            return Seen(decode(raw), _version(found.meta))

    def write_manifest(self, manifest: Manifest, seen: Seen) -> Seen | None:
        """In place of the one that was seen; ``None``: somebody else has changed it."""
        mode: Any = "overwrite"
        if seen.version is None and self._creates:
            mode = "create"
        elif seen.version is not None and self._swaps:
            mode = seen.version
        with _failing():
            try:
                done = obstore.put(
                    self.client, _names.manifest_name(manifest.request_id), encode(manifest), mode=mode
                )
            except (AlreadyExistsError, PreconditionError):
                return None
        return Seen(manifest, _version(done))

    # -- objects ------------------------------------------------------------------------------------------------

    def put(self, name: str, file: CommittedFile, memory: Callable[[int], memoryview]) -> None:
        """An immutable object: put if absent; from 16 MiB in parts, where only its name keeps it from being lost.

        ``memory``: to read a piece into. ``UnreadableError``: of the file, so that it says nothing of the remote store.
        """
        with _failing():
            if file.nbytes >= MULTIPART_BYTES:
                obstore.put(self.client, name, _pieces(file, _PART_BYTES, memory), chunk_size=_PART_BYTES)
                return
            content = next(_pieces(file, MULTIPART_BYTES, memory))
            try:
                obstore.put(self.client, name, content, mode="create" if self._creates else "overwrite")
            except AlreadyExistsError:
                return  # an earlier try of ours, whose answer was lost: nobody else knows the name

    def get_range(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes of an object; fewer where it ends before. ``FileNotFoundError``."""
        try:
            with _failing():
                return memoryview(obstore.get_range(self.client, name, start=start, end=stop))
        except RemoteFailure:
            with _failing():
                if obstore.head(self.client, name)["size"] > start:
                    raise
            return memoryview(b"")

    def look_at(self, name: str) -> Listed | None:
        """One object; ``None``: it is not there."""
        with _failing():
            try:
                meta = obstore.head(self.client, name)
            except FileNotFoundError:
                return None
        return Listed(name, meta["size"], meta["last_modified"].timestamp())

    def get_stream(self, name: str, chunk_bytes: int) -> Iterator[memoryview]:
        """The bytes of an object, in order. ``FileNotFoundError``."""
        with _failing():
            for chunk in obstore.get(self.client, name).stream(min_chunk_size=chunk_bytes):
                yield memoryview(chunk)

    def delete(self, names: Sequence[str]) -> None:
        """What is gone already is fine."""
        with _failing():
            for name in names:
                try:
                    obstore.delete(self.client, name)
                except FileNotFoundError:
                    continue

    def list(self, prefix: str) -> Iterator[Listed]:
        """All objects below, page by page."""
        with _failing():
            for page in obstore.list(self.client, prefix):
                for each in page:
                    yield Listed(each["path"], each["size"], each["last_modified"].timestamp())

    def _get(self, name: str) -> bytes:
        with _failing():
            return bytes(obstore.get(self.client, name).bytes())


def _pieces(file: CommittedFile, nbytes: int, memory: Callable[[int], memoryview]) -> Iterator[memoryview]:
    """The file from its beginning, each piece read once, into memory of its own that goes out as it is."""
    file.seek(0)
    while (left := file.nbytes - file.tell()) > 0:
        piece = memory(min(nbytes, left))
        done = 0
        while done < len(piece):
            try:
                count = file.readinto(piece[done:])
            except OSError as error:
                raise UnreadableError(f"{file.info.path} can not be read: {error}") from error
            if count == 0:
                raise UnreadableError(f"{file.info.path} ends {left - done} bytes too early")
            done += count
        yield piece


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError, ValueError) as error:
        if isinstance(error, RootError) or type(error).__module__.startswith("snapstore"):
            raise
        raise RemoteFailure(str(error).partition("\n")[0]) from error


def _version(meta: Any) -> dict[str, str]:
    """ETag, and the version where the store has one."""
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None}
