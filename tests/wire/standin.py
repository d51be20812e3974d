"""A stand-in for whom the proxy calls: an inference engine that speaks SGLang's HTTP API, the provider of
external models under /ext, and the receiver of callbacks. It answers what a test tells it to.

The recorded exchanges were made against a deterministic engine whose rule for picking words is not
recorded, but whose answers are: a replay hands the answer for the next call to `answer_next`, in the order
the calls come. Without a prepared answer the engine derives one from the prompt's ids alone, so that two
proxies given the same conversation record the same tensors, and a chat that was resubmitted goes on where
it stopped.

The provider answers as the recorded one did, whatever it is asked; a callback is taken.

Log-probabilities follow the recordings' rule, -(id % 1000) / 1000. One thread a connection; every call is
kept in `received` in the order it came in. Streaming sends cumulative chunks, as SGLang does without
incremental output. Loopback only; no limits, no security: a test tool.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

EOS = 151645
GENERATE = "/generate"
EXTERNAL = "/ext/chat/completions"
CALLBACK = "/callback/online_ready"
ANSWERED = (GENERATE, EXTERNAL, CALLBACK)
WATCHDOG_S = 60.0
# Ordinary English words with a leading space in Qwen's vocabulary; any ids would do.
WORDS = [
    6438,
    6624,
    6973,
    7640,
    8538,
    11464,
    11605,
    12035,
    12757,
    13779,
    14084,
    14291,
    14858,
    15683,
    10514,
    10725,
]


def logprob(token: int) -> float:
    return -(token % 1000) / 1000


@dataclass
class Answer:
    """One answer to a call. `hold`: not sent before this event is set; `dies`: the connection just
    closes. `tokens` and `finish` are the engine's.
    """

    tokens: Sequence[int] = ()
    finish: str = "stop"
    status: int = 200
    text: str = ""
    hold: threading.Event | None = None
    dies: bool = False
    breaks_after: int | None = None
    """A stream ends without its end after this many tokens (the provider's: chunks)."""


@dataclass
class Call:
    path: str
    body: Any
    raw: bytes
    order: int
    headers: dict[str, str] = field(default_factory=dict)
    """Names in lower case."""


@dataclass
class _Book:
    """What handlers share; guarded by `changed`, which is notified on every new call."""

    received: list[Call] = field(default_factory=list)
    prepared: deque[Answer] = field(default_factory=deque)
    standing: Callable[[Call], Answer] | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)


def derived(body: dict[str, Any], length: int = 24) -> Answer:
    """The answer an unprepared engine gives: a function of the prompt's ids, `length` tokens with the final
    eos.
    """
    ids, budget = body["input_ids"], int(body["sampling_params"]["max_new_tokens"])
    seed = hashlib.sha256(json.dumps(ids).encode()).digest()
    tokens = [WORDS[seed[i % 32] % len(WORDS)] for i in range(length - 1)] + [EOS]
    return Answer(tokens[:budget], "stop" if length <= budget else "length")


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def provided(model: str | None) -> bytes:
    """The recorded provider's whole answer."""
    message = {"role": "assistant", "content": "Hello from ext"}
    return compact(
        {
            "id": "ext-1",
            "object": "chat.completion",
            "created": 1,
            "model": str(model),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
        }
    )


PROVIDED_CHUNKS = [
    {
        "id": "ext-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "ext",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    for delta, finish in (({"role": "assistant", "content": "Hel"}, None), ({"content": "lo"}, "stop"))
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the tests' output is about the proxy."""

    def _reply(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._reply(200, b"{}")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        book = self.server.book
        with book.changed:
            headers = {name.lower(): value for name, value in self.headers.items()}
            call = Call(self.path, json.loads(raw) if raw else None, raw, len(book.received), headers)
            book.received.append(call)
            answer = None
            if self.path in ANSWERED:
                answer = book.prepared.popleft() if book.prepared else None
                if answer is None and book.standing is not None:
                    answer = book.standing(call)
            book.changed.notify_all()
        if self.path not in ANSWERED:
            self._reply(200, b"{}")
            return
        answer = answer or (derived(call.body) if self.path == GENERATE else Answer())
        if answer.hold is not None and not answer.hold.wait(WATCHDOG_S):
            raise TimeoutError("nobody released a held answer")
        if answer.dies:
            self.close_connection = True
            return
        if answer.status != 200:
            kind = "text/plain" if self.path == GENERATE else "application/json"
            self._reply(answer.status, answer.text.encode(), kind)
        elif self.path == CALLBACK:
            self._reply(200, b"{}")
        elif self.path == EXTERNAL:
            self._provide(call, answer)
        elif call.body.get("stream"):
            self._stream(call, answer)
        else:
            self._reply(200, json.dumps(self._message(call, answer, len(answer.tokens))).encode())

    def _message(self, call: Call, answer: Answer, sent: int) -> dict[str, Any]:
        tokens = list(answer.tokens[:sent])
        over = sent == len(answer.tokens)
        finish: dict[str, Any] = {"type": answer.finish}
        if answer.finish == "length":
            finish["length"] = len(tokens)
        if answer.finish == "abort":
            finish["message"] = answer.text or "Aborted"
        return {
            "text": "",
            "output_ids": tokens,
            "meta_info": {
                "id": f"standin-{call.order}",
                "finish_reason": finish if over else None,
                "prompt_tokens": len(call.body["input_ids"]),
                "completion_tokens": len(tokens),
                "output_token_logprobs": [[logprob(token), token, None] for token in tokens],
            },
        }

    def _provide(self, call: Call, answer: Answer) -> None:
        """What the recorded provider said."""
        if not call.body.get("stream"):
            self._reply(200, provided(call.body.get("model")))
            return
        self._start_stream()
        for sent, chunk in enumerate(PROVIDED_CHUNKS):
            if answer.breaks_after is not None and sent >= answer.breaks_after:
                self.close_connection = True
                return
            self._chunk(b"data: " + compact(chunk) + b"\n\n")
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _stream(self, call: Call, answer: Answer) -> None:
        self._start_stream()
        for sent in range(1 if answer.tokens else 0, len(answer.tokens) + 1):
            if answer.breaks_after is not None and sent > answer.breaks_after:
                self.close_connection = True
                return
            self._chunk(b"data: " + json.dumps(self._message(call, answer, sent)).encode() + b"\n\n")
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    book: _Book

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A proxy that hangs up is part of many tests."""


class StandIn:
    """The engine, running in this process's threads between `with` and its end."""

    def __init__(self) -> None:
        self.book = _Book()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.book = self.book
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.address}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WATCHDOG_S)

    @property
    def received(self) -> list[Call]:
        return self.book.received

    def answer_next(self, *answers: Answer) -> None:
        """The next calls that are answered by what a test says get these answers, in order."""
        with self.book.changed:
            self.book.prepared.extend(answers)

    def answer_always(self, rule: Callable[[Call], Answer] | None) -> None:
        """Calls without a prepared answer are answered by `rule`; None: by `derived`."""
        with self.book.changed:
            self.book.standing = rule

    def forget_prepared(self) -> int:
        """Drops what was prepared and not asked for; returns how many answers that was."""
        with self.book.changed:
            left = len(self.book.prepared)
            self.book.prepared.clear()
            return left

    def wait_for_call(self, path: str, after: int) -> Call:
        """The first call to `path` among those received from index `after` on; waits for it."""

        def found() -> Call | None:
            return next((call for call in self.book.received[after:] if call.path == path), None)

        with self.book.changed:
            call = self.book.changed.wait_for(found, WATCHDOG_S)
        if call is None:
            raise TimeoutError(f"the engine was never asked for {path}")
        return call
