"""A stand-in for an MoE engine whose answers are large: POST /generate with routed experts, and small ones.

    python -m benchmarks.routed_engine --port N

The embedded engine makes its answers on one event loop, which 100 MiB would hold up; then a small turn would
wait for the engine, not for the proxy. Here each connection has a thread, which sends without Python's lock.
An answer has 64 ids with log-probs and, if asked for, base64 of int32 [prompt + 64 - 1, 94 layers, top 8],
which was made before the first request.
"""

from __future__ import annotations

import argparse
import base64
import socketserver

import numpy as np

TOKENS = 64
SLICE_BYTES = 256 << 10  # short calls: others of this CPU get their turn between two
WIDTH = 94 * 8
"""Layers times experts a token: as Qwen3-235B-A22B has."""
ROWS = ",".join(f"[-0.{7 * i + 11},{1000 + 37 * i},null]" for i in range(TOKENS))
IDS = ",".join(str(1000 + 37 * i) for i in range(TOKENS))


def experts(rows: int, width: int) -> bytes:
    """int32 [rows, width], little-endian: the experts, of 128, each token was sent to in each layer."""
    row = 7 * np.arange(rows, dtype=np.int32)[:, None]
    return ((row + np.arange(width, dtype=np.int32)) % 128).astype("<i4").tobytes()


class Handler(socketserver.StreamRequestHandler):
    """One kept connection; requests with Content-Length only."""

    row_bytes = 4 * WIDTH
    raw = b""
    text = memoryview(b"")  # base64 of raw
    disable_nagle_algorithm = True

    def handle(self) -> None:
        while line := self.rfile.readline():
            path, length = line.split()[1], 0
            while (header := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = header.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            body = self.rfile.read(length)
            parts = self.answer(body) if path == b"/generate" else [b"{}"]
            total = sum(map(len, parts))
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % total
            self.wfile.write(head + parts[0])
            for part in parts[1:]:
                for at in range(0, len(part), SLICE_BYTES):
                    self.wfile.write(part[at : at + SLICE_BYTES])

    def answer(self, body: bytes) -> list[bytes | memoryview]:
        at = body.index(b"[", body.index(b'"input_ids"'))
        prompt = body.count(b",", at, body.index(b"]", at)) + 1
        start = (
            f'{{"text":"","output_ids":[{IDS}],"meta_info":{{"id":"x","finish_reason":{{"type":"length",'
            f'"length":{TOKENS}}},"prompt_tokens":{prompt},"completion_tokens":{TOKENS},'
            f'"output_token_logprobs":[{ROWS}]'
        ).encode()
        if b'"return_routed_experts":true' in body:
            size = (prompt + TOKENS - 1) * self.row_bytes
            if size > len(self.raw):
                raise ValueError(f"--rows {prompt + TOKENS} are needed")
            last = size // 3 * 3
            value = self.text[: last // 3 * 4], base64.b64encode(self.raw[last:size])
            return [start + b',"routed_experts":"', *value, b'"}}']
        return [start + b"}}"]


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, default=32_000, help="tokens an answer can be about")
    arguments = parser.parse_args()
    Handler.raw = experts(arguments.rows, WIDTH)
    Handler.text = memoryview(base64.b64encode(Handler.raw))
    with Server(("127.0.0.1", arguments.port), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
