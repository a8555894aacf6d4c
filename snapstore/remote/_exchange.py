"""What the transfer threads do: publish a snapshot, carry out a cleanup's end. Each may be tried again at any point.

An object is put before the manifest names it, and deleted after no manifest does. Where one of the two is cut off in
between, an object is left that nobody sees; ``snapstore prune URL`` finds it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from snapstore._committed import CommittedFile
from snapstore._errors import RemoteUnavailableError, SnapshotCorruptError
from snapstore._files import FileSystem
from snapstore._memory import BufferPool
from snapstore._threads import Threads
from snapstore._types import RemoteStats, SnapshotKey
from snapstore.remote._lives import Binding, Ending, Upload
from snapstore.remote._manifest import Entry, Event, Manifest, Publish, Refused, decide
from snapstore.remote._objects import ObjectStore, RemoteFailure, Seen
from snapstore.remote._pool import Kind, Pool, Task

UNSEEN_S = 15 * 60.0
"""An object that was put longer ago than this is put again before a manifest names it: prune may have taken it."""

_CHANGES = 50
"""How often a manifest may be found changed by others before it counts as a failure."""

_UNREADABLE = 5
"""How often a manifest may come altered before it counts as altered where it lies."""

_log = logging.getLogger("snapstore.remote")


class Exchange:
    """One store's dealings with the remote store. ``begin_*`` never block; the rest is for transfer threads."""

    def __init__(
        self, objects: ObjectStore, pool: Pool, files: FileSystem, buffers: BufferPool, threads: Threads
    ) -> None:
        self._objects = objects
        self._pool = pool
        self._files = files
        self._buffers = buffers
        self._threads = threads
        self._lock = threads.lock()
        self._alone = threads.lock()
        self._stats = RemoteStats()
        self._uploads: dict[Upload, int] = {}
        self._unreadable: Counter[str] = Counter()

    # -- uploads ------------------------------------------------------------------------------------------------

    def begin_upload(self, upload: Upload) -> None:
        """Publish it when its turn comes."""
        nbytes = upload.commit.info.nbytes
        with self._lock:
            self._uploads[upload] = nbytes
            refused = upload.binding.over
        if refused is not None:
            self._finish(upload, refused)
            return
        failed = functools.partial(self._upload_failed, upload)
        self._pool.put(Task(Kind.UPLOAD, functools.partial(self._upload, upload), failed, nbytes, of=upload))

    def drop(self, upload: Upload) -> None:
        """It has become pointless before its turn came. Never blocks."""
        self._finish(upload, upload.pointless or "it was dropped")

    def _upload(self, upload: Upload) -> None:
        why = upload.pointless
        if why is None:
            why = self._put(upload)
        if why is None:
            why = self._show(upload)
        self._finish(upload, why)

    def _put(self, upload: Upload) -> str | None:
        """Bring the object there, unless an earlier try has; why it can not be."""
        if upload.put_s is not None and self._threads.monotonic_s() - upload.put_s < UNSEEN_S:
            return None
        started_s = self._threads.monotonic_s()
        try:
            file = upload.file or CommittedFile(self._files, upload.commit.info)
        except FileNotFoundError:
            return "its file is gone"
        try:
            if upload.tag not in ("", file.tag):
                return "a later save of its key replaced it"
            upload.tag, upload.file_bytes = file.tag, file.nbytes
            if upload.put_s is not None:
                upload.rename()
            self._objects.put(upload.name, file, self._buffers.lend)
        finally:
            if upload.file is None:
                file.close()
        upload.put_s = started_s
        return None

    def _show(self, upload: Upload) -> str | None:
        """Have the manifest name it; why it can not be."""
        binding, key = upload.binding, upload.commit.info.key
        with binding.turn:
            if (why := upload.pointless) is not None:
                return why
            event = Publish(
                key.request_id,
                binding.life,
                key.token_count,
                Entry(upload.name, upload.file_bytes, upload.commit.info.generation),
                may_begin=not binding.begun,
                now_s=time.time(),
            )
            upload.unanswered = True
            try:
                dropped = self._change_cached(event, binding)
            except Refused as error:
                upload.unanswered = False
                binding.over = binding.over or str(error)
                return binding.over
            upload.unanswered = False
            binding.begun = True
            binding.published[key.token_count] = upload.commit
        self._clear(dropped)
        return None

    def _upload_failed(self, upload: Upload, error: BaseException) -> None:
        """Something of this one upload: a local file that can not be read, a manifest that nobody can."""
        extra = {"event": "publish_failed", "request_id": upload.commit.info.key.request_id}
        _log.log(_level_of(error), "publish_failed: %s: %s", upload.commit.info.key, error, extra=extra)
        self._finish(upload, f"{type(error).__name__}: {error}")

    def _finish(self, upload: Upload, why_not: str | None) -> None:
        binding = upload.binding
        with self._lock:
            if self._uploads.pop(upload, None) is None:
                return
            if why_not is None:
                self._count(published=1, published_bytes=upload.file_bytes)
            elif not upload.replaced:
                self._count(refused=1)
        if binding.queued.get(upload.token_count) is upload:
            with suppress(KeyError):  # the tier's thread may put a later one there
                del binding.queued[upload.token_count]
        if upload.file is not None:
            upload.file.close()
        if why_not is not None and upload.put_s is not None and not upload.unanswered:
            self._clear([upload.name])
        upload.finish(why_not)

    # -- ends ---------------------------------------------------------------------------------------------------

    def begin_end(self, ending: Ending, over: Callable[[], None]) -> None:
        """Carry it out, and say so; or that it never can be."""

        def failed(error: BaseException) -> None:
            extra = {"event": "remote_end_failed", "request_id": ending.end.request_id}
            _log.log(_level_of(error), "remote_end_failed: %r: %s", ending.end.request_id, error, extra=extra)

        with self._lock:
            self._count(endings=1)
        self._pool.put(Task(Kind.END, functools.partial(self._end, ending, over), failed))

    def _end(self, ending: Ending, over: Callable[[], None]) -> None:
        try:
            seen = self._read(ending.end.request_id)
            if seen.manifest is not None or ending.attempted:
                ending.objects |= self._change(ending.end, seen)[0]
                self._objects.delete(sorted(ending.objects))
        except SnapshotCorruptError as error:
            _log.warning("remote_end_failed: %r has nothing visible: %s", ending.end.request_id, error)
        ending.over = True
        with self._lock:
            self._count(endings=-1, ended=1)
        over()

    # -- manifests ----------------------------------------------------------------------------------------------

    def _change_cached(self, event: Publish, binding: Binding) -> frozenset[str]:
        """``_change``, from the manifest that this node wrote last, if nobody else may have written since."""
        cached, binding.seen = binding.seen, None
        if cached is None and event.may_begin and self._objects.swaps:
            cached = Seen(None, None)  # most requests are new, and a put-if-absent is as good as a look
        seen = cached or self._read(event.request_id)
        try:
            dropped, after = self._change(event, seen)
        except Refused:
            if cached is None:
                raise
            dropped, after = self._change(event, self._read(event.request_id))
        if self._objects.swaps:
            binding.seen = after
        return dropped

    def _change(self, event: Event, seen: Seen) -> tuple[frozenset[str], Seen]:
        """Names of the objects that are visible no more, and the manifest as it is now."""
        with self._alone_if_need_be():
            if not self._objects.swaps:
                seen = self._read(event.request_id)
            for _ in range(_CHANGES):
                wanted = decide(seen.manifest, event)
                if wanted == seen.manifest:
                    return frozenset(), seen
                written = self._objects.write_manifest(wanted, seen)
                if written is not None:
                    return _objects_of(seen.manifest) - wanted.objects, written
                seen = self._read(event.request_id)
        raise RemoteFailure(
            f"the manifest of {event.request_id!r} was changed by others {_CHANGES} times on end"
        )

    def _read(self, request_id: str) -> Seen:
        """The manifest. One that is altered is read again later, since it may be the wire; after that it is corrupt."""
        try:
            seen = self._objects.read_manifest(request_id)
        except SnapshotCorruptError as error:
            with self._lock:
                self._unreadable[request_id] += 1
                given_up = self._unreadable[request_id] > _UNREADABLE
            if given_up:
                raise
            raise RemoteFailure(f"the manifest of {request_id!r} can not be read: {error}") from error
        with self._lock:
            self._unreadable.pop(request_id, None)
        return seen

    @contextmanager
    def _alone_if_need_be(self) -> Iterator[None]:
        """Where the remote store can not compare and swap, at least this process does not undo its own changes."""
        if self._objects.swaps:
            yield
        else:
            with self._alone:
                yield

    def _clear(self, names: Iterable[str]) -> None:
        """Delete what nobody sees; what stays is prune's."""
        gone = sorted(names)
        if gone:
            self._pool.put(Task(Kind.END, functools.partial(self._objects.delete, gone), lambda _: None))

    # -- figures ------------------------------------------------------------------------------------------------

    def stats(self) -> RemoteStats:
        """Of one moment, but for what is in flight."""
        with self._lock:
            left, nbytes = len(self._uploads), sum(self._uploads.values())
            stats = self._stats
        in_flight = self._pool.in_flight_bytes
        return replace(stats, unpublished=left, unpublished_bytes=nbytes, in_flight_bytes=in_flight)

    def unpublished(self) -> tuple[SnapshotKey, ...]:
        """Keys of the uploads that are not over."""
        with self._lock:
            return tuple(upload.commit.info.key for upload in self._uploads)

    def note_fetched(self, nbytes: int) -> None:
        """A snapshot was loaded."""
        with self._lock:
            self._count(fetched=1, fetched_bytes=nbytes)

    def note_failed(self) -> None:
        """A request failed."""
        with self._lock:
            self._count(failed=1)

    def _count(self, **more: int) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + by for name, by in more.items()}
        )


def _level_of(error: BaseException) -> int:
    """What only comes to its end with the store is in shutdown's report, or written down for the next one."""
    return logging.DEBUG if isinstance(error, RemoteUnavailableError) else logging.WARNING


def _objects_of(manifest: Manifest | None) -> frozenset[str]:
    return frozenset() if manifest is None else manifest.objects
