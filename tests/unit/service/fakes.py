"""An exchange without a network and an engine without a model, for testing routes and the chat turn."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from areal_fast.engine.generate import Generation, VersionRun
from areal_fast.engine.sampling import Sampling
from areal_fast.engine.segments import Prompt
from tests.model_arena import ModelArena

__all__ = ["FakeEngine", "FakeExchange", "ModelArena", "WordTokenizer"]


class FakeHeaders:
    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = {name.lower().encode(): value.encode("latin-1") for name, value in headers.items()}

    def get(self, name: bytes) -> bytes | None:
        return self._headers.get(name)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self._headers.items())


class FakeExchange:
    """Records what it is answered. `hang_up()` is the client going away."""

    def __init__(
        self,
        method: str,
        path: str,
        body: Any = b"",
        *,
        key: str | None = None,
        content_type: str | None = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.method = method
        self.path = path
        self.query = ""
        self.peer: tuple[str, int] = ("127.0.0.1", 5)
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = dict(headers or {})
        if content_type is not None:
            headers["content-type"] = content_type
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        self.headers = FakeHeaders(headers)
        self.status = 0
        self.size: int | None = None
        self.answer = b""
        self.answer_headers: dict[bytes, bytes] = {}
        self.ended = False
        self.gone = False
        self.input_ended = False
        self._on_sent: list[Callable[[bool], None]] = []

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: bytes = b"application/json",
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        assert self.status == 0, "answered twice"
        self.status, self.answer, self.ended = status, body, True
        self.answer_headers = {b"content-type": content_type, **dict(headers)}

    def start(
        self,
        status: int,
        content_type: bytes,
        headers: Sequence[tuple[bytes, bytes]] = (),
        *,
        size: int | None = None,
    ) -> None:
        assert self.status == 0, "answered twice"
        self.status, self.size = status, size
        self.answer_headers = {b"content-type": content_type, **dict(headers)}

    def write(self, data: bytes) -> None:
        assert self.status and not self.ended
        self.answer += data

    @property
    def started(self) -> bool:
        return self.status != 0

    @property
    def finished(self) -> bool:
        return self.ended

    async def drain(self) -> None:
        return

    def finish(self) -> None:
        assert self.status and not self.ended
        self.ended = True

    def on_sent(self, callback: Callable[[bool], None]) -> None:
        self._on_sent.append(callback)

    def sent(self, arrived: bool) -> None:
        """The reply left in full, or the connection broke first."""
        for callback in self._on_sent:
            callback(arrived)

    @property
    def json(self) -> Any:
        return json.loads(self.answer)

    def events(self) -> list[Any]:
        """The events of a streamed answer; "[DONE]" as text."""
        found = []
        for event in self.answer.decode().split("\n\n"):
            if event:
                assert event.startswith("data: ")
                found.append("[DONE]" if event == "data: [DONE]" else json.loads(event[6:]))
        return found


def run(handled: Awaitable[None] | None) -> None:
    if handled is not None:

        async def wait() -> None:
            await handled

        asyncio.run(wait())


class WordTokenizer:
    """One token a character: its code point. 1 ends a reply."""

    eos_id = 1
    pad_id = 1
    vocab_size = 1 << 20
    stop_ids = (1,)

    def encode_chat(self, messages: list[dict[str, Any]], tools: Any, kwargs: Any) -> Prompt:
        return Prompt.of(ord(c) for m in messages for c in f"{m.get('role')}:{m.get('content')}\n")

    async def prompt(self, messages: list[dict[str, Any]], tools: Any, kwargs: Any) -> Prompt:
        return self.encode_chat(messages, tools, kwargs)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def incremental(self) -> Any:
        tokenizer = self

        class Pieces:
            def add(self, ids: Sequence[int]) -> str:
                return tokenizer.decode(ids)

            def finish(self) -> str:
                return ""

        return Pieces()


class FakeEngine:
    """Answers `text` and the stop token; fails with `error` after `fail_after` tokens if one is set."""

    address = "http://engine"

    def __init__(self, text: str = "hello") -> None:
        self.text = text
        self.error: Exception | None = None
        self.fail_after = 0
        self.hold: asyncio.Event | None = None
        self.asked: list[tuple[Prompt, Sampling]] = []
        self.paused = False

    async def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        on_tokens: Callable[[list[int]], None] | None = None,
        routed: Any = None,
        first: Any = None,
    ) -> Generation:
        self.asked.append((prompt, sampling))
        if self.hold is not None:
            await self.hold.wait()
        ids = [*map(ord, self.text), 1][: sampling.max_new_tokens]
        if self.error is not None:
            if on_tokens is not None and self.fail_after:
                on_tokens(ids[: self.fail_after])
            raise self.error
        if on_tokens is not None:
            for token in ids:
                on_tokens([token])
        return Generation(
            output_ids=array("i", ids),
            logprobs=array("f", [-0.5] * len(ids)),
            version_runs=[VersionRun(3, len(ids))],
            stop_reason="stop" if ids[-1] == 1 else "length",
            attempts=1,
        )

    async def pause(self) -> None:
        if self.error is not None:
            raise self.error
        self.paused = True

    async def resume(self) -> None:
        if self.error is not None:
            raise self.error
        self.paused = False

    async def release_memory(self) -> None:
        if self.error is not None:
            raise self.error

    async def resume_memory(self, tags: list[str] | None = None) -> None:
        await self.release_memory()
