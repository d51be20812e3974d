"""The embedded engine as it is used: a process of its own, reached over HTTP."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from areal_fast.embedded.engine import Switches

WATCHDOG_S = 90.0


class Reply:
    """An answer: status, headers, body; `json` and `events` read it."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of each server-sent event; the stream must end in [DONE]."""
        events = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n") if event]
        assert events.pop() == b"[DONE]"
        return [json.loads(event) for event in events]


class Engine:
    """A running embedded engine and a client for it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self._threads = ThreadPoolExecutor(8)

    def call(self, method: str, path: str, body: Any = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WATCHDOG_S)
        try:
            connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body))
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def later(self, method: str, path: str, body: Any = None) -> Future[Reply]:
        """The same from another thread."""
        return self._threads.submit(self.call, method, path, body)

    def configure(self, **switches: Any) -> None:
        """Set these switches and all others to their defaults."""
        reply = self.call("POST", "/embedded/configure", {**msgspec.structs.asdict(Switches()), **switches})
        assert reply.status == 200, reply.body

    def generate(self, input_ids: Any = (1, 2, 3), *, later: bool = False, **more: Any) -> Any:
        """POST /generate. Members of sampling_params and of the body may be given by name."""
        outer = {"stream", "rid", "return_logprob", "return_routed_experts", "text"}
        body = {
            "return_logprob": True,
            **{name: value for name, value in more.items() if name in outer},
            "sampling_params": {name: value for name, value in more.items() if name not in outer},
        }
        if "text" not in body:
            body["input_ids"] = list(input_ids)
        return (self.later if later else self.call)("POST", "/generate", body)

    def complete(self, prompt: Any = (1, 2, 3), *, later: bool = False, **more: Any) -> Any:
        """POST /v1/completions as AReaL sends it."""
        body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "logprobs": 0}
        body |= {"return_tokens_as_token_ids": True, **more}
        return (self.later if later else self.call)("POST", "/v1/completions", body)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.call("GET", "/embedded/stats").json
        return stats

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Until GET /embedded/stats satisfies `condition`."""
        until = time.monotonic() + WATCHDOG_S
        while not condition(stats := self.stats()):
            assert time.monotonic() < until, f"it did not come to pass: {stats}"
            time.sleep(0.005)
        return stats

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(WATCHDOG_S) == 0
        self._threads.shutdown()
        assert self.process.stdout is not None
        self.process.stdout.close()


def start_engine(*flags: str) -> tuple[Engine, str]:
    """A new engine on a free port, and the line it printed."""
    command = [sys.executable, "-m", "areal_fast.embedded", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    return Engine(process, int(line.rsplit(":", 1)[1])), line


@pytest.fixture(scope="session")
def _running() -> Iterator[Engine]:
    engine, _ = start_engine()
    yield engine
    engine.close()


@pytest.fixture
def engine(_running: Engine) -> Iterator[Engine]:
    """An engine in its initial state: no switch on, not paused, nothing in flight."""
    _running.configure()
    _running.call("POST", "/continue_generation")
    _running.call("POST", "/wake_up")
    _running.call("POST", "/abort_request", {"abort_all": True})
    _running.wait(lambda stats: stats["in_flight"] == 0)
    yield _running
