"""Real processes for tests: forked in milliseconds from a server that has imported everything, steered through pipes.

    child = processes.start("commits_and_waits", root=str(root))    # a function of tests/scenarios.py
    assert child.says() == "ready"
    child.tell("go")
    child.kill()

The server has one thread when it forks, so a child begins as clean as a new process does, and its main thread is the
child's. A child ends as an interpreter does: by coming back from its function, by ``sys.exit``, by an exception.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
PATIENCE_S = 30.0


class Talk:
    """The child's end: lines to the test, and lines from it."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = os.fdopen(reader, "r", encoding="utf-8")
        self._writer = writer

    def say(self, *words: object) -> None:
        """One line, whole or not at all: it is short, and a pipe takes that in one piece."""
        os.write(self._writer, (" ".join(map(str, words)) + "\n").encode())

    def hear(self) -> str:
        """Wait for a line of the test. Without the test there is nothing left to do here."""
        line = self._reader.readline()
        if not line:
            os._exit(99)
        return line.rstrip("\n")


class Child:
    """The test's end of one child process."""

    def __init__(self, server: Processes, pid: int, reader: int, writer: int) -> None:
        self._server = server
        self.pid = pid
        self._reader = reader
        self._writer = writer
        self._heard = b""
        self._status: int | None = None

    def tell(self, line: str = "go") -> None:
        os.write(self._writer, f"{line}\n".encode())

    def says(self, timeout_s: float = PATIENCE_S) -> str:
        """The next line of the child. ``EOFError`` if it ended, ``TimeoutError`` if it says nothing."""
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            if not self._receive(deadline_s - time.monotonic()):
                raise EOFError(f"the child ended; its status is {self.wait()}")
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def all_it_said(self) -> list[str]:
        """Every whole line until the child's end."""
        while self._receive(PATIENCE_S):
            pass
        *lines, _torn = self._heard.decode().split("\n")
        self._heard = b""
        return lines

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal, SIGKILL unless told otherwise, and wait for the end. The status as ``subprocess`` has it."""
        self.signal(number)
        return self.wait()

    def signal(self, number: int) -> None:
        if self._status is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, or minus the signal that ended it."""
        if self._status is None:
            self._status = self._server.status_of(self.pid, timeout_s)
        return self._status

    def close(self) -> None:
        """Whatever it does: it is over. Who starts a thousand of them does this, or runs out of descriptors."""
        try:
            self.wait(0.0)
        except TimeoutError:
            self.kill()
        self._server.forget(self)
        os.close(self._reader)
        os.close(self._writer)

    def _receive(self, timeout_s: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            if not selector.select(max(0.0, timeout_s)):
                raise TimeoutError(f"the child {self.pid} said nothing more; before: {self._heard!r}")
        part = os.read(self._reader, 65536)
        self._heard += part
        return bool(part)


class Processes:
    """Starts children and ends what is left of them. One fork server serves it all."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, str(TESTS / "processes.py"), str(theirs.fileno())]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
            self._server = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
        self._socket.settimeout(PATIENCE_S)
        self._children: list[Child] = []

    def start(self, function: str, **arguments: Any) -> Child:
        """Run a function of ``scenarios`` in a process of its own: ``function(talk, **arguments)``."""
        (in_child, to_child), (from_child, out_of_child) = os.pipe(), os.pipe()
        try:
            request = {"function": function, "arguments": arguments, "cwd": str(Path.cwd())}
            descriptors = array.array("i", [in_child, out_of_child])
            self._socket.sendmsg(
                [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            )
        finally:
            os.close(in_child)
            os.close(out_of_child)
        child = Child(self, self._answer()["pid"], from_child, to_child)
        self._children.append(child)
        return child

    def status_of(self, pid: int, timeout_s: float) -> int:
        """Wait for the end of a child; the server is its parent."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._socket.send(json.dumps({"status of": pid}).encode())
            status = self._answer()["status"]
            if status is not None:
                return int(status)
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"the child {pid} has not ended after {timeout_s} s")
            time.sleep(0.001)

    def end_children(self) -> None:
        """Whoever is still there is killed; each one is one that was started here."""
        for child in tuple(self._children):
            child.close()

    def forget(self, child: Child) -> None:
        """It was closed."""
        self._children.remove(child)

    def close(self) -> None:
        self.end_children()
        self._socket.close()
        self._server.wait(PATIENCE_S)

    def _answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._socket.recv(4096))
        return answer


def serve(number: int) -> None:
    """The server: forks a child for each request, says who it is, and later how it ended."""
    importlib.import_module("scenarios")
    with socket.socket(fileno=number) as requests:
        while True:
            message, ancillary, _, _ = requests.recvmsg(65536, socket.CMSG_SPACE(2 * 4))
            if not message:
                return
            request = json.loads(message)
            if "status of" in request:
                pid, status = os.waitpid(request["status of"], os.WNOHANG)
                answer = {"status": os.waitstatus_to_exitcode(status) if pid else None}
                requests.send(json.dumps(answer).encode())
                continue
            reader, writer = array.array("i", ancillary[0][2])
            pid = os.fork()
            if pid == 0:
                requests.close()
                become(request, Talk(reader, writer))
            os.close(reader)
            os.close(writer)
            requests.send(json.dumps({"pid": pid}).encode())


def become(request: dict[str, Any], talk: Talk) -> None:
    """The child: what it was asked for, then the end of an interpreter, with everything that belongs to it."""
    os.chdir(request["cwd"])
    try:
        getattr(importlib.import_module("scenarios"), request["function"])(talk, **request["arguments"])
    except SystemExit:
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            talk.say("error", repr(traceback.format_exc()))
        raise
    sys.exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
