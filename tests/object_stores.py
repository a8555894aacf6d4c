"""A proxy that treats an object store badly."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Between client and server: passes bytes on, or treats them as ``mode`` says, from one chunk to the next.

    ``pass``; ``slow``: each chunk waits; ``stall``: nothing goes on until the mode is another; ``cut``: connections end
    in the middle of what they carry; ``refuse``: they end at once; ``flip``: a bit is flipped, both ways, of what is
    large, and sometimes of what is small.
    """

    def __init__(self, upstream_port: int) -> None:
        self.mode = "pass"
        self.flipped = self.passed = 0
        self._upstream = upstream_port
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="test-proxy", daemon=True)
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._closing, self.mode = True, "cut"
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            _end(each)
        for thread in [self._thread, *self._threads]:
            thread.join(5)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.mode == "refuse":
                    raise OSError
                server = socket.create_connection(("127.0.0.1", self._upstream), timeout=5)
            except OSError:
                _end(client)
                continue
            server.settimeout(None)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            for source, target in ((client, server), (server, client)):
                thread = threading.Thread(target=self._carry, args=(source, target), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                mode = self.mode
                while mode == "stall" and not self._closing:
                    time.sleep(0.01)
                    mode = self.mode
                if mode == "slow":
                    time.sleep(0.02)
                if mode in ("cut", "refuse") or self._closing:
                    target.sendall(chunk[: len(chunk) // 2])
                    break
                if mode == "flip" and (len(chunk) > 30000 or (len(chunk) > 600 and self.passed % 4 == 0)):
                    at = 20000 if len(chunk) > 30000 else len(chunk) - 20
                    chunk = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
                    self.flipped += 1
                self.passed += 1
                target.sendall(chunk)
        _end(source)
        _end(target)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
