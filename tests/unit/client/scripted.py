"""A server that does what a script says, one action a request: the client's other end in tests.

Actions: bytes (sent as they are, the connection stays), `reply(...)` makes them; CLOSE reads the request and
closes; SILENT reads it and says nothing until the server ends. `CLOSE_AFTER + bytes` sends and closes.
Requests are kept, heads and bodies.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any, BinaryIO

CLOSE, SILENT = b"close", b"silent"
CLOSE_AFTER = b"\0then close\0"


def reply(value: Any, status: int = 200) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body


class ScriptedServer:
    """Listens on loopback until the context is left."""

    def __init__(self, *script: bytes) -> None:
        self.script = list(script)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        """(request line, headers in lower case, body)."""
        self.connections = 0
        self.closings = threading.Semaphore(0)
        """Released when a connection has been closed from this side."""
        self._open: list[socket.socket] = []
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._listen, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    @staticmethod
    def _line(stream: BinaryIO) -> str:
        try:
            return stream.readline().decode().strip()
        except OSError:
            return ""

    def _serve(self, connection: socket.socket) -> None:
        self._follow(connection)
        self.closings.release()

    def _follow(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while line := self._line(stream):
                headers: dict[str, str] = {}
                while text := self._line(stream):
                    name, _, value = text.partition(":")
                    headers[name.lower()] = value.strip()
                body = stream.read(int(headers.get("content-length", 0)))
                self.requests.append((line, headers, body))
                action = self.script.pop(0)
                if action == CLOSE:
                    return
                if action == SILENT:
                    self._over.wait(60)
                    return
                with contextlib.suppress(OSError):
                    connection.sendall(action.removeprefix(CLOSE_AFTER))
                if action.startswith(CLOSE_AFTER):
                    return
