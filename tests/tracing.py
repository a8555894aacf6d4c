"""Kills at system calls: ``strace`` counts those of one thread, and at the chosen one the process gets SIGKILL.

It is attached to the thread of a child that waits for a word, so nothing has to be started anew for a kill.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import PATIENCE_S, Child, Processes

STRACE = shutil.which("strace")
NOT_THE_DISK = frozenset(("read", "write", "poll", "epoll_wait", "lseek"))
"""What the child talks to its test with, and what Python reads of ``/proc``."""

DISK_THREADS = {
    "save": ["snapstore-writer"],
    "save durably": ["snapstore-writer"],
    "cleanup": ["snapstore-sweeper"],
    "shutdown": ["snapstore-writer", "snapstore-sweeper"],
    "shutdown with cleanup": ["snapstore-sweeper"],
    "load": ["MainThread"],
    "open": ["MainThread", "snapstore-sweeper"],
    "reclaim": ["MainThread", "snapstore-sweeper"],
    "adopt": ["MainThread", "snapstore-sweeper"],
    "prune": ["MainThread"],
    "verify": ["MainThread"],
}
"""Which threads touch the disk in each action of ``actions``."""


@dataclass(frozen=True)
class Call:
    """One system call of a thread in an action: its name, and which of that name."""

    action: str
    thread: str
    name: str
    number: int


def works() -> bool:
    """``strace`` is here and may trace a process that it has not started itself."""
    if STRACE is None:
        return False
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        # Nothing but its first line is read, so it may say no more than the pipe takes.
        command = [STRACE, "-e", "trace=none", "-p", str(other.pid)]
        tried = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tried.stderr is not None
        attached = "attached" in tried.stderr.readline()
        other.communicate(b"\n")
        tried.communicate(timeout=PATIENCE_S)
    return attached


@contextmanager
def attached(thread: int, *options: str) -> Iterator[None]:
    """Trace one thread within the block; its process must have ended by the end of it."""
    command = [str(STRACE), "-p", str(thread), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert "attached" in said, said
        yield
        tracer.communicate(timeout=PATIENCE_S)


def calls_of(processes: Processes, action: str, thread: str, root: Path, trace: Path) -> list[Call]:
    """What a thread asks the kernel for in an action that goes through undisturbed, in order."""
    child, number = _waiting(processes, action, thread, root)
    with attached(number, "-e", "trace=%file,%desc", "-o", str(trace)):
        child.tell()
        said = _until_done(child)
        assert said[-1:] == ["done"], said
        child.close()
    counted: Counter[str] = Counter()
    calls = []
    for line in trace.read_text().splitlines():
        called = re.match(r"(\w+)\(", line)
        if called and called[1] not in NOT_THE_DISK:
            counted[called[1]] += 1
            calls.append(Call(action, thread, called[1], counted[called[1]]))
    return calls


def killed_at(processes: Processes, call: Call, root: Path) -> list[str]:
    """What the child had said when it was killed at that call; ``done`` is the last if it never came to it."""
    child, number = _waiting(processes, call.action, call.thread, root)
    inject = f"inject={call.name}:signal=SIGKILL:when={call.number}"
    with attached(number, "-e", f"trace={call.name}", "-e", inject, "-o", "/dev/null"):
        child.tell()
        said = _until_done(child)
        assert child.kill() == -9, "an injected signal ends it as any other does"
    child.close()
    return said


def _waiting(processes: Processes, action: str, thread: str, root: Path) -> tuple[Child, int]:
    child = processes.start("acts_when_told", root=str(root), action=action, thread=thread)
    word, _, number = child.says().partition(" ")
    assert word == "thread", (word, number)
    return child, int(number)


def _until_done(child: Child) -> list[str]:
    said = []
    while said[-1:] != ["done"]:
        try:
            said.append(child.says())
        except EOFError:
            break
    return said
