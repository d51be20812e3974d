"""Somebody else's chat API: a scripted HTTP server on loopback that remembers what it was sent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

JSON = "application/json"
EVENTS = "text/event-stream"


@dataclass
class Scripted:
    """One answer. cut: the connection ends before its end. gate: waited for before the last chunk,
    hold: before anything."""

    status: int
    chunks: Sequence[bytes]
    kind: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    gate: threading.Event | None = None
    hold: threading.Event | None = None


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


class Provider:
    """Use as a context manager. Answers what was queued, in order; then 200 `{}`."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.answers: deque[Scripted] = deque()
        book = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                book.received.append(Received(self.path, headers, body))
                answer = book.answers.popleft() if book.answers else Scripted(200, [b"{}"])
                if answer.hold is not None:
                    answer.hold.wait(30)
                self.send_response(answer.status)
                self.send_header("content-type", answer.kind)
                self.send_header("transfer-encoding", "chunked")
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for i, chunk in enumerate(answer.chunks):
                    if answer.gate is not None and i == len(answer.chunks) - 1:
                        answer.gate.wait(30)
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                    self.wfile.flush()
                if answer.cut:
                    self.close_connection = True
                    return
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, format: str, *args: Any) -> None:
                return

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                return  # who asked was killed

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/ext"

    def __enter__(self) -> Provider:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
