"""One generation, whatever happens to the engine in between: pause, abort, weight update, resubmission.

A weight update pauses the engine, which aborts what it was generating. The tokens so far are good: they
were sampled from the weights in force when their attempt was sent. So the attempt's tokens are kept with
that version, the generation waits until nobody is paused, and asks again with prompt + tokens so far and
the remaining budget; at most `MAX_ATTEMPTS` calls, after which the answer counts as cut off by length.
Versions travel as runs (version, tokens).

Streaming is the same loop: tokens are handed to `on_tokens` as they come, and go on after an abort.

Invariants: sum of the runs' tokens = len(output_ids) = len(logprobs) ≤ max_new_tokens asked for; tokens
handed to `on_tokens`, in order, are output_ids; an exception means that nothing of the generation may be
recorded.

Must not: know sessions or HTTP statuses of our own API, retry a call that failed (the engine may have done
it).
Source: areal.experimental.inference_service.inf_bridge (agenerate).
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from areal_fast.engine.errors import EngineError, EngineFault, EngineTimeout, EngineUnreachable
from areal_fast.engine.routed import Receiver, RoutedFilter
from areal_fast.engine.sampling import Sampling
from areal_fast.engine.segments import Prompt
from areal_fast.engine.sglang import Attempt, Call, SGLang
from areal_fast.engine.sse import EventSplitter, EventTooLong
from areal_fast.engine.tokenizer import as_prompt
from areal_fast.engine.vllm import VLLM
from areal_fast.http import BrokenReply, ConnectFailed, Headers, Timeout

MAX_ATTEMPTS = 20
PAUSE_POLL_S = 0.02
CONTROL_TIMEOUT_S = 10.0
MEMORY_TIMEOUT_S = 30.0
_FINAL = frozenset({"stop", "length", "tool_calls"})


class EngineState(Protocol):
    """The words all workers share."""

    def paused(self) -> bool: ...

    def version(self) -> int: ...


class Stream(Protocol):
    """Part of areal_fast.http's StreamReply that is used here."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers: ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def close(self) -> None: ...


class Answer(Protocol):
    """Part of areal_fast.http's Reply that is used here."""

    @property
    def status(self) -> int: ...

    @property
    def body(self) -> bytes: ...


class Asked(Protocol):
    """Part of areal_fast.http's Request that is used here."""

    @property
    def error(self) -> Exception | None: ...

    @property
    def status(self) -> int: ...

    def take_body(self) -> bytes: ...


class Transport(Protocol):
    """Part of areal_fast.http.Client that is used here. Bodies go as JSON."""

    def begin(
        self, method: str, path: str, body: bytes, *, timeout_s: float, done: Callable[[Any], None]
    ) -> Asked: ...

    async def request(self, method: str, path: str, body: bytes, *, timeout_s: float) -> Answer: ...

    async def stream(self, method: str, path: str, body: bytes, *, timeout_s: float) -> Stream: ...


class Adapter(Protocol):
    """An engine's API: sglang.SGLang, vllm.VLLM."""

    name: str

    def generate(self, prompt: bytes, sampling: Sampling, max_new_tokens: int, *, stream: bool) -> Call: ...

    def continues(self, sampling: Sampling) -> bool: ...

    def parse(self, body: bytes) -> Attempt: ...

    def read_stream(self) -> StreamReader: ...

    def pause(self) -> Call: ...

    def resume(self) -> Call: ...

    def release_memory(self) -> Call: ...

    def resume_memory(self, tags: list[str] | None) -> Call: ...


class StreamReader(Protocol):
    def add(self, data: bytes) -> list[int]: ...

    def end(self) -> Attempt: ...


def adapter_for(backend_type: str) -> Adapter:
    """The adapter of --backend-type: sglang or vllm."""
    return VLLM() if backend_type == "vllm" else SGLang()


class VersionRun(NamedTuple):
    """`tokens` output tokens in a row that were sampled under weight `version`."""

    version: int
    tokens: int


class Generation(msgspec.Struct):
    """A finished generation."""

    output_ids: array[int]
    """array('i'), trailing stop tokens included."""
    logprobs: array[float]
    """array('f'), one a token."""
    version_runs: list[VersionRun]
    stop_reason: str
    """stop, length or tool_calls."""
    attempts: int


class First:
    """The first attempt of a generation, under way in nobody's task (`Engine.begin`)."""

    __slots__ = ("_asked", "_engine", "attempt", "version")

    def __init__(self, engine: Engine, version: int) -> None:
        self._engine = engine
        self._asked: Asked | None = None
        self.version = version
        self.attempt: Attempt | None = None

    def generation(self) -> Generation | None:
        """When it has ended: the whole generation, as nearly always, or None if it was interrupted; then
        `Engine.generate(first=…)` goes on. Raises as that."""
        asked = self._asked
        assert asked is not None
        self.attempt = attempt = self._engine.read(asked)
        if attempt.stop not in _FINAL:
            return None
        runs = [VersionRun(self.version, len(attempt.ids))] if attempt.ids else []
        return Generation(attempt.ids, attempt.logprobs, runs, attempt.stop, 1)


class Engine:
    """The engine behind one base URL. Any number of generations at once; all on one loop."""

    def __init__(
        self,
        client: Transport,
        state: EngineState,
        *,
        adapter: Adapter | None = None,
        request_timeout_s: float = 120.0,
        address: str = "",
    ) -> None:
        """`client` is a areal_fast.http.Client for the engine's base URL; `address` is for error texts."""
        self._client = client
        self._state = state
        self._adapter: Adapter = SGLang() if adapter is None else adapter
        self._timeout_s = request_timeout_s
        self.address = address

    async def generate(
        self,
        prompt: Prompt | array[int],
        sampling: Sampling,
        *,
        on_tokens: Callable[[list[int]], None] | None = None,
        routed: Receiver | None = None,
        first: First | None = None,
    ) -> Generation:
        """Generate to the end. With `on_tokens` the engine streams, and each new run of ids is handed over
        at once. `routed` gets the routed experts that each attempt brings. `first` was interrupted: go on
        from what it brought.

        Raises EngineUnreachable, EngineTimeout, EngineError; then nothing may be recorded.
        """
        data = as_prompt(prompt).data
        ids = array("i")
        logprobs = array("f")
        runs: list[VersionRun] = []
        stop = "length"
        attempts = 0
        while attempts < MAX_ATTEMPTS and len(ids) < sampling.max_new_tokens:
            attempts += 1
            if first is not None and first.attempt is not None:
                version, attempt, first = first.version, first.attempt, None
            else:
                while self._state.paused():
                    await asyncio.sleep(PAUSE_POLL_S)
                if ids and not self._adapter.continues(sampling):
                    if on_tokens is not None:
                        raise EngineError("Engine was interrupted in an answer that it cannot continue")
                    del ids[:], logprobs[:], runs[:]
                version = self._state.version()
                attempt = await self._attempt(data + ids.tobytes(), len(ids), sampling, on_tokens, routed)
            if attempt.ids:
                if ids:
                    ids.extend(attempt.ids)
                    logprobs.extend(attempt.logprobs)
                else:
                    ids, logprobs = attempt.ids, attempt.logprobs
                _add_run(runs, version, len(attempt.ids))
            if attempt.stop in _FINAL:
                stop = attempt.stop
                break
            if not attempt.ids:
                # interrupted before it began: whoever did it is about to say so in the shared words
                await asyncio.sleep(PAUSE_POLL_S)
        return Generation(ids, logprobs, runs, stop, attempts)

    def begin(self, prompt: Prompt, sampling: Sampling, ended: Callable[[Any], None]) -> First | None:
        """`generate` without a task, for what is neither streamed nor routed: ask now, and call `ended` once
        when the first attempt is over, never before this returns. None: it must wait (the engine is paused);
        nothing has happened."""
        if self._state.paused() or sampling.max_new_tokens <= 0:
            return None
        first = First(self, self._state.version())
        call = self._adapter.generate(prompt.data, sampling, sampling.max_new_tokens, stream=False)
        first._asked = self._client.begin("POST", call.path, call.body, timeout_s=self._timeout_s, done=ended)
        return first

    def read(self, asked: Asked) -> Attempt:
        """What an attempt that has ended brought. Raises EngineFault."""
        error = asked.error
        if error is not None:
            if isinstance(error, (Timeout, ConnectFailed, BrokenReply)):
                raise self._fault(error, self._timeout_s) from error
            raise error
        if asked.status >= 300:
            raise _refused(asked.status, asked.take_body())
        return self._adapter.parse(asked.take_body())

    async def _attempt(
        self,
        prompt: bytes,
        done: int,
        sampling: Sampling,
        on_tokens: Callable[[list[int]], None] | None,
        routed: Receiver | None,
    ) -> Attempt:
        """One call. `prompt` ends with the `done` tokens of the answer that are there already."""
        left = sampling.max_new_tokens - done
        call = self._adapter.generate(prompt, sampling, left, stream=on_tokens is not None)
        if on_tokens is not None:
            return await self._streamed(call, on_tokens, routed)
        if routed is not None:
            return await self._received(call, routed)
        return self._adapter.parse(await self.call(call, timeout_s=self._timeout_s))

    async def _received(self, call: Call, routed: Receiver) -> Attempt:
        """A whole answer whose routed experts go to the receiver while it arrives."""
        parts: list[bytes] = []
        try:
            reply = await self._client.stream("POST", call.path, call.body, timeout_s=self._timeout_s)
            try:
                inlet = _Inlet(reply, routed)
                async for part in inlet:
                    parts.append(part)
            finally:
                reply.close()
        except (Timeout, ConnectFailed, BrokenReply) as error:
            raise self._fault(error, self._timeout_s) from error
        body = b"".join(parts)
        if reply.status >= 300:
            raise _refused(reply.status, body)
        attempt = self._adapter.parse(body)
        await inlet.end(attempt)
        return attempt

    async def _streamed(
        self, call: Call, on_tokens: Callable[[list[int]], None], routed: Receiver | None
    ) -> Attempt:
        reader = self._adapter.read_stream()
        splitter = EventSplitter()
        inlet: _Inlet | None = None
        try:
            reply = await self._client.stream("POST", call.path, call.body, timeout_s=self._timeout_s)
            try:
                if reply.status >= 300:
                    parts = [chunk async for chunk in reply]
                    raise _refused(reply.status, b"".join(parts))
                if routed is not None:
                    inlet = _Inlet(reply, routed)
                async for chunk in inlet or reply:
                    for data in splitter.feed(chunk):
                        new = reader.add(data)
                        if new:
                            on_tokens(new)
                for data in splitter.finish():
                    new = reader.add(data)
                    if new:
                        on_tokens(new)
            except EventTooLong as error:
                raise EngineError(f"Engine sent {error}") from error
            finally:
                reply.close()
        except (Timeout, ConnectFailed, BrokenReply) as error:
            raise self._fault(error, self._timeout_s) from error
        attempt = reader.end()
        if inlet is not None:
            await inlet.end(attempt)
        return attempt

    # -- control
    # ----------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Ask the engine to stop generating (it aborts what is running). Raises EngineFault."""
        await self.call(self._adapter.pause(), timeout_s=CONTROL_TIMEOUT_S)

    async def resume(self) -> None:
        """Ask the engine to go on. Raises EngineFault."""
        await self.call(self._adapter.resume(), timeout_s=CONTROL_TIMEOUT_S)

    async def release_memory(self) -> None:
        await self.call(self._adapter.release_memory(), timeout_s=MEMORY_TIMEOUT_S)

    async def resume_memory(self, tags: list[str] | None = None) -> None:
        await self.call(self._adapter.resume_memory(tags), timeout_s=MEMORY_TIMEOUT_S)

    async def call(self, call: Call, *, timeout_s: float) -> bytes:
        """POST to the engine; its answer's body. Raises EngineFault."""
        try:
            reply = await self._client.request("POST", call.path, call.body, timeout_s=timeout_s)
        except (Timeout, ConnectFailed, BrokenReply) as error:
            raise self._fault(error, timeout_s) from error
        if reply.status >= 300:
            raise _refused(reply.status, reply.body)
        return reply.body

    def _fault(self, error: Timeout | ConnectFailed | BrokenReply, timeout_s: float) -> EngineFault:
        """What the HTTP client's error is here."""
        if isinstance(error, Timeout):
            return EngineTimeout(f"Engine {self.address} did not answer within {timeout_s:g} s")
        if isinstance(error, ConnectFailed):
            return EngineUnreachable(f"Cannot reach engine {self.address}: {error}")
        return EngineUnreachable(f"Engine {self.address} broke off: {error}")


class _Inlet:
    """The pieces of an engine's reply without its routed experts, which go to the receiver on the way."""

    def __init__(self, reply: Stream, routed: Receiver) -> None:
        self._reply = reply
        self._routed = routed
        self._filter = RoutedFilter()
        self._begun = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        length = self._reply.headers.get(b"content-length") or b""
        left = int(length) if length.isdigit() else 0
        async for chunk in self._reply:
            for inside, data in self._filter.feed(chunk):
                if not inside:
                    yield bytes(data)
                    continue
                try:
                    if not self._begun:
                        self._begun = True
                        await self._routed.attempt(max(left, 0))
                    await self._routed.add(data)
                except ValueError as error:
                    raise EngineError(f"Engine sent routed experts that cannot be read: {error}") from error
            left -= len(chunk)
        if held := self._filter.rest():
            yield held

    async def end(self, attempt: Attempt) -> None:
        if not self._begun:
            return
        try:
            await self._routed.end(attempt.prompt_tokens, attempt.completion_tokens)
        except ValueError as error:
            raise EngineError(f"Engine sent routed experts that do not fit: {error}") from error


def _add_run(runs: list[VersionRun], version: int, tokens: int) -> None:
    if runs and runs[-1].version == version:
        runs[-1] = VersionRun(version, runs[-1].tokens + tokens)
    else:
        runs.append(VersionRun(version, tokens))


def _refused(status: int, body: bytes) -> EngineFault:
    return EngineError(f"Engine returned {status}: {body[:500].decode(errors='replace')}")
