"""Is this machine, and this root, a good place for a store? Each finding comes with a sentence of advice.

What is tried on the disk is tried inside a session that is being made, under its lock: a doctor who is killed leaves
what any process leaves that dies while it opens a store, and the next store or prune removes it.
"""

from __future__ import annotations

import platform
import random
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from snapstore import _paths
from snapstore._files import FileSystem, opened, read_exactly, remove_tree, write_all
from snapstore._filing import write_snapshot
from snapstore._format import Facts, Layout, TensorSpec, encode_metadata
from snapstore._maintenance.root import Root
from snapstore._maintenance.survey import sessions, surroundings
from snapstore._maintenance.units import format_rate, format_size, plural
from snapstore._memory import allocate, segments_of
from snapstore._owner import OwnerLock
from snapstore._reader import read_data, read_header

Level = Literal["ok", "note", "problem"]

PROBE_BYTES = 64 * 1024 * 1024
_TENSORS = 16
_ROUNDS = 3
_CHUNK_BYTES = 4 * 1024 * 1024
_PAGE_BYTES = 4096
_RENAMES = 200
_SLOW_DEVICE_BYTES_S = 100 * 1024 * 1024
_FAR_FROM_RAW = 3
_LITTLE_SPACE_BYTES = 2 * 2**30

_NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "lustre",
    "gpfs",
    "fuse.sshfs",
    "afs",
    "virtiofs",
)
_MEMORY = ("tmpfs", "ramfs")
_CONTAINER = ("overlay", "aufs")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One finding: what was looked at, how it is, and what to do about it."""

    topic: str
    level: Level
    finding: str
    advice: str


@dataclass(frozen=True, slots=True)
class Speed:
    """A timed write and read of ``PROBE_BYTES``, best of a few, in microseconds.

    Attributes:
        write_us, read_us: as a store does it: header, checksums, chunks, rename; a read into fresh memory, compared.
        raw_write_us, raw_read_us: one system call for all of it, into and from the page cache; no store can be faster.
        device_us: the write and an ``fdatasync``.
    """

    nbytes: int
    write_us: int
    raw_write_us: int
    read_us: int
    raw_read_us: int
    device_us: int


@dataclass(frozen=True, slots=True)
class Checkup:
    """Everything that the doctor saw."""

    diagnoses: tuple[Diagnosis, ...]
    speed: Speed | None = None


def examine(root: Root | None) -> Checkup:
    """Look at Python and its packages; with a root also at its disk, which takes a second or two."""
    general = (_python(), _frameworks(), _packages())
    if root is None:
        advice = "Name a root to have its disk looked at: snapstore doctor ROOT"
        return Checkup((*general, Diagnosis("disk", "ok", "not looked at", advice)))
    tried, speed = _try_out(root)
    return Checkup(
        (*general, _access(root), _file_system(root), _space(root), *tried, _leftovers(root)), speed
    )


def _try_out(root: Root) -> tuple[list[Diagnosis], Speed | None]:
    """What only an attempt can tell. A disk that refuses the attempt is a finding too."""
    found: list[Diagnosis] = []
    try:
        with _laboratory(root) as lab:
            found += [lab.locks(), lab.renames()]
            if root.files.free_bytes(root.fd) < _LITTLE_SPACE_BYTES:
                return found, None
            speed = lab.speed()
    except OSError as error:
        advice = "A store could not work here either: mend the disk or the rights, or choose another root."
        return [*found, Diagnosis("writing", "problem", error.strerror or str(error), advice)], None
    return [*found, _writing(speed), _reading(speed)], speed


# --- this Python ---


def _python() -> Diagnosis:
    version = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    if sys.platform == "win32":
        return Diagnosis("Python", "problem", version, "snapstore needs the file locks of Linux or macOS.")
    return Diagnosis("Python", "ok", version, "Nothing to do.")


def _frameworks() -> Diagnosis:
    found = _versions(["numpy", "torch", "mlx", "transformers", "mlx-lm"])
    if any(name in found for name in ("numpy", "torch", "mlx")):
        return Diagnosis("frameworks", "ok", _listed(found), "Tensors of these can be saved and loaded.")
    advice = "Install one where tensors are saved: pip install 'snapstore[torch]' or 'snapstore[mlx]'."
    return Diagnosis("frameworks", "note", "none of numpy, torch, mlx", advice)


def _packages() -> Diagnosis:
    extras = {"aiofiles": "aio", "prometheus-client": "metrics", "starlette": "server", "obstore": "remote"}
    found = _versions(["snapstore", "safetensors", "xxhash", "click", "rich", "ml-dtypes", *extras])
    missing = [f"snapstore[{extra}]" for name, extra in extras.items() if name not in found]
    advice = (
        f"Should you want them: pip install '{_joined_extras(missing)}'." if missing else "Nothing to do."
    )
    return Diagnosis("packages", "ok", _listed(found), advice)


def _joined_extras(missing: Sequence[str]) -> str:
    return f"snapstore[{','.join(each[len('snapstore[') : -1] for each in missing)}]"


def _versions(names: Sequence[str]) -> dict[str, str]:
    """Of the packages that are installed; nothing is imported."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "none"


# --- this root ---


def _access(root: Root) -> Diagnosis:
    mode = stat.S_IMODE(root.files.status(root.fd).st_mode)
    if mode & 0o077:
        advice = "Other users can look inside, where prompts have left their traces: chmod 700 it."
        return Diagnosis("root", "problem", f"mode {mode:04o}", advice)
    return Diagnosis("root", "ok", f"mode {mode:04o}, with its marker", "Nobody else can look inside.")


def _file_system(root: Root) -> Diagnosis:
    kind = root.files.file_system_type(root.fd)
    topic = "file system"
    if kind in _NETWORK:
        advice = "Locks and renames over a network are as good as its server; prefer a local disk."
        return Diagnosis(topic, "note", kind, advice)
    if kind in _MEMORY:
        advice = "Snapshots here take memory, and a reboot takes them; prefer a disk, unless you mean it."
        return Diagnosis(topic, "note", kind, advice)
    if kind in _CONTAINER:
        advice = "A container's own layer goes with the container, and is slow; mount a volume for the root."
        return Diagnosis(topic, "note", kind, advice)
    return Diagnosis(topic, "ok", kind or "not to be known here", "A local file system: nothing to do.")


def _space(root: Root) -> Diagnosis:
    free_bytes = root.files.free_bytes(root.fd)
    if free_bytes < _LITTLE_SPACE_BYTES:
        advice = "Saves will soon fail: prune, or give stores max_session_bytes and min_free_bytes."
        return Diagnosis("free space", "problem", format_size(free_bytes), advice)
    return Diagnosis(
        "free space", "ok", format_size(free_bytes), "StoreOptions.min_free_bytes can keep some free."
    )


def _leftovers(root: Root) -> Diagnosis:
    dead = [session for session in sessions(root) if session.owner.liveness == "dead"]
    around = surroundings(root)
    nbytes = sum(session.disk_bytes for session in dead) + sum(each.freed_bytes for each in around.unfinished)
    odd = sum(len(session.findings) for session in dead) + len(around.findings)
    if odd:
        advice = f"Run: snapstore verify {root.path}"
        return Diagnosis("leftovers", "problem", f"{plural(odd, 'thing')} that should not be there", advice)
    if dead or around.unfinished:
        found = (
            f"{plural(len(dead) + len(around.unfinished), 'session')} of dead owners, {format_size(nbytes)}"
        )
        advice = (
            f"The next store that opens here discards or adopts them; or run: snapstore prune {root.path}"
        )
        return Diagnosis("leftovers", "note", found, advice)
    return Diagnosis("leftovers", "ok", "none", "Nothing to do.")


def _writing(speed: Speed) -> Diagnosis:
    device = speed.nbytes / speed.device_us * 1e6
    found = _timed_text(speed.nbytes, speed.write_us, speed.raw_write_us)
    found += f"; to the device {format_rate(int(device), 1)}"
    if device < _SLOW_DEVICE_BYTES_S:
        advice = (
            "A slow disk: saves do not wait for it, but what is pending takes memory (max_pending_bytes)."
        )
        return Diagnosis("writing", "note", found, advice)
    if speed.write_us > _FAR_FROM_RAW * speed.raw_write_us:
        advice = "Far from what the disk takes: is the processor busy? Look again when it is not."
        return Diagnosis("writing", "note", found, advice)
    return Diagnosis("writing", "ok", found, "Near what the machine can do: nothing to do.")


def _reading(speed: Speed) -> Diagnosis:
    found = _timed_text(speed.nbytes, speed.read_us, speed.raw_read_us)
    advice = "A load pays for fresh memory and the checksum; verify_on_load=False saves the latter."
    return Diagnosis("reading", "ok", found, advice)


def _timed_text(nbytes: int, took_us: int, raw_us: int) -> str:
    return (
        f"{format_size(nbytes)} in {took_us / 1000:.0f} ms ({format_rate(nbytes, took_us / 1e6)}), "
        f"{took_us / raw_us:.1f} x one system call ({raw_us / 1000:.0f} ms)"
    )


# --- trying it out ---


@contextmanager
def _laboratory(root: Root) -> Iterator[_Laboratory]:
    """A directory to try things in, which nobody takes for a session and everybody for a leftover if we die."""
    name = _paths.unborn_session_name()
    root.files.make_directory(name, dir_fd=root.fd)
    with ExitStack() as undo:
        fd = undo.enter_context(root.directory(name))
        with suppress(OSError):  # where locks are refused, trying them says so
            lock = OwnerLock.take(root.files, ".", create=True, dir_fd=fd)
            if lock is not None:
                undo.callback(lock.release)
        undo.callback(remove_tree, root.files, name, dir_fd=root.fd, keep_last=_paths.OWNER_LOCK)
        yield _Laboratory(root.files, fd)


class _Laboratory:
    """Experiments in an open directory."""

    def __init__(self, files: FileSystem, fd: int) -> None:
        self._files = files
        self._fd = fd

    def locks(self) -> Diagnosis:
        """Whether a lock keeps a second one out: we hold this directory's."""
        try:
            second = OwnerLock.take(self._files, ".", create=False, dir_fd=self._fd)
        except OSError as error:
            advice = "Leftovers of dead stores can not be told from live ones here; use another file system."
            return Diagnosis("locks", "problem", f"refused: {error.strerror}", advice)
        if second is None:
            advice = "A free lock proves that a store is dead: leftovers can be told from live sessions."
            return Diagnosis("locks", "ok", "exclude each other", advice)
        second.release()
        advice = "Two stores could take each other's session for a leftover; use another file system."
        return Diagnosis("locks", "problem", "do not exclude each other", advice)

    def renames(self) -> Diagnosis:
        """Whether somebody who opens a name while it is replaced always finds the old file or the new one."""
        name, temporary = _paths.random_name(), _paths.random_name()
        self._write(name, [memoryview(bytes(_PAGE_BYTES))])
        watcher = _Watcher(lambda buffer: self._read(name, buffer))
        watcher.start()
        try:
            for number in range(_RENAMES):
                self._write(temporary, [memoryview(bytes([number]) * _PAGE_BYTES)])
                self._files.rename(temporary, name, from_fd=self._fd, to_fd=self._fd)
        finally:
            seen = watcher.stop()
        if seen is not None:
            advice = "A reader can meet a snapshot that is half made; use another file system."
            return Diagnosis("renames", "problem", seen, advice)
        found = f"{_RENAMES} replaced a file that was being read, and no reader noticed"
        return Diagnosis("renames", "ok", found, "A snapshot appears whole or not at all.")

    def speed(self) -> Speed:
        """Time a snapshot of ``PROBE_BYTES``, and single system calls with the same bytes; the best of a few rounds."""
        sizes = [PROBE_BYTES // _TENSORS] * _TENSORS
        layout = Layout.of(TensorSpec(f"tensor-{i}", "U8", (size,)) for i, size in enumerate(sizes))
        buffer, kept = allocate(PROBE_BYTES), allocate(PROBE_BYTES)
        noise = random.Random(0).randbytes(_CHUNK_BYTES)  # noqa: S311 - bytes that do not compress
        for start in range(0, PROBE_BYTES, _CHUNK_BYTES):
            buffer[start : start + _CHUNK_BYTES] = noise
        rounds = [self._round(layout, buffer, kept) for _ in range(_ROUNDS)]
        return Speed(PROBE_BYTES, *map(min, zip(*rounds, strict=True)))

    def _round(self, layout: Layout, buffer: memoryview, kept: memoryview) -> tuple[int, int, int, int, int]:
        snapshot, raw, synced = (_paths.random_name() for _ in range(3))
        times_us = (
            _timed_us(lambda: self._write_snapshot(snapshot, layout, buffer)),
            _timed_us(lambda: self._write(raw, [buffer])),
            _timed_us(lambda: self._read_snapshot(snapshot)),
            _timed_us(lambda: self._read(raw, kept)),
            _timed_us(lambda: self._write(synced, [buffer], sync=True)),
        )
        for name in (snapshot, raw, synced):
            self._files.unlink(name, dir_fd=self._fd)
        return times_us

    def _write_snapshot(self, name: str, layout: Layout, buffer: memoryview) -> None:
        """As a store's writer does it."""
        temporary, segments = _paths.random_name(), segments_of(layout, buffer)
        facts = Facts("doctor", 0, 0, "numpy", encode_metadata(None))
        with opened(self._files, self._files.create(temporary, dir_fd=self._fd)) as fd:
            write_snapshot(self._files, fd, layout, segments, facts, checksum=True, go_on=lambda: True)
        self._files.rename(temporary, name, from_fd=self._fd, to_fd=self._fd)

    def _read_snapshot(self, name: str) -> None:
        with opened(self._files, self._files.open_read(name, dir_fd=self._fd)) as fd:
            read_data(self._files, fd, read_header(self._files, fd), verify=True)

    def _write(self, name: str, buffers: Sequence[memoryview], *, sync: bool = False) -> None:
        with opened(self._files, self._files.create(name, dir_fd=self._fd)) as fd:
            write_all(self._files, fd, buffers, 0)
            if sync:
                self._files.sync_data(fd)

    def _read(self, name: str, buffer: memoryview) -> None:
        with opened(self._files, self._files.open_read(name, dir_fd=self._fd)) as fd:
            read_exactly(self._files, fd, buffer, 0)


class _Watcher:
    """A thread that reads one name again and again, and remembers if it ever finds less than one whole file."""

    def __init__(self, read: Callable[[memoryview], None]) -> None:
        self._read = read
        self._done = threading.Event()
        self._seen: str | None = None
        self._thread = threading.Thread(target=self._run, name="snapstore-doctor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> str | None:
        """End it; what it saw that no reader should see."""
        self._done.set()
        self._thread.join()
        return self._seen

    def _run(self) -> None:
        buffer = memoryview(bytearray(_PAGE_BYTES))
        while self._seen is None and not self._done.is_set():
            try:
                self._read(buffer)
            except OSError as error:
                self._seen = f"the name was gone while it was replaced ({error.strerror})"
            else:
                self._seen = "a reader saw parts of two files" if len(set(buffer)) > 1 else None


def _timed_us(action: Callable[[], None]) -> int:
    started_s = time.perf_counter()
    action()
    return max(1, int((time.perf_counter() - started_s) * 1e6))
