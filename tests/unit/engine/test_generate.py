"""Generation against a scripted engine: budgets, versions, pause, abort, resubmission, streams, faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from areal_fast.engine import generate
from areal_fast.engine.errors import EngineError, EngineTimeout, EngineUnreachable
from areal_fast.engine.generate import Engine, VersionRun
from areal_fast.engine.sampling import Sampling
from areal_fast.engine.segments import Prompt
from areal_fast.http import BrokenReply, ConnectFailed, Headers, Timeout

PROMPT = Prompt.of([1, 2, 3])


def answer(ids: list[int], stop: str | None = "stop", **meta: Any) -> bytes:
    rows = [[-0.5 - i, token, None] for i, token in enumerate(ids)]
    info = {
        "finish_reason": None if stop is None else {"type": stop},
        "output_token_logprobs": rows,
        "prompt_tokens": 3,
        "completion_tokens": len(ids),
        **meta,
    }
    return msgspec.json.encode({"text": "never read", "meta_info": info})


class State:
    def __init__(self) -> None:
        self.is_paused = False
        self.weights = 0

    def paused(self) -> bool:
        return self.is_paused

    def version(self) -> int:
        return self.weights


class Reply:
    def __init__(self, status: int, chunks: list[bytes | Exception]) -> None:
        self.status = status
        self.headers = Headers([])
        self.body = b"".join(c for c in chunks if isinstance(c, bytes))
        self._chunks = chunks
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            await asyncio.sleep(0)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def close(self) -> None:
        self.closed = True


Step = bytes | Exception | Reply | Callable[[dict[str, Any]], Any]


class Transport:
    """Plays `steps` in order, the last one for ever; keeps what it was asked."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.timeouts: list[float] = []
        self.replies: list[Reply] = []

    async def _next(self, path: str, body: bytes, timeout_s: float) -> Reply:
        question = msgspec.json.decode(body)
        self.asked.append((path, question))
        self.timeouts.append(timeout_s)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if callable(step):
            step = step(question)
        await asyncio.sleep(0)
        if isinstance(step, Exception):
            raise step
        reply = step if isinstance(step, Reply) else Reply(200, [step])
        self.replies.append(reply)
        return reply

    async def request(self, method: str, path: str, body: bytes, *, timeout_s: float) -> Reply:
        assert method == "POST"
        return await self._next(path, body, timeout_s)

    async def stream(self, method: str, path: str, body: bytes, *, timeout_s: float) -> Reply:
        return await self._next(path, body, timeout_s)


def sampling(max_new_tokens: int = 8, **more: Any) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, stop_token_ids=(9, 10), **more)


def run(transport: Transport, state: State | None = None, **options: Any) -> generate.Generation:
    engine = Engine(transport, state or State(), address="http://engine:1")
    return asyncio.run(engine.generate(PROMPT, options.pop("sampling", sampling()), **options))


def events(*texts: bytes) -> list[bytes | Exception]:
    return [b"data: " + text + b"\n\n" for text in texts] + [b"data: [DONE]\n\n"]


def test_one_answer() -> None:
    transport = Transport(answer([5, 6, 9]))
    got = run(transport)
    assert list(got.output_ids) == [5, 6, 9] and got.stop_reason == "stop" and got.attempts == 1
    assert list(got.logprobs) == [-0.5, -1.5, -2.5]
    assert got.version_runs == [VersionRun(0, 3)]
    assert transport.asked[0][0] == "/generate" and transport.timeouts == [120.0]


def test_the_body_is_the_originals_byte_for_byte() -> None:
    bodies: list[bytes] = []

    class Keeping(Transport):
        async def request(self, method: str, path: str, body: bytes, **more: Any) -> Reply:
            bodies.append(body)
            return await super().request(method, path, body, **more)

    run(Keeping(answer([5, 9])), sampling=sampling(8, stop=("\n",), frequency_penalty=0.3, temperature=0.0))
    assert bodies[0] == (
        b'{"input_ids":[1,2,3],"image_data":null,"sampling_params":{"top_p":1.0,"top_k":100000000,'
        b'"max_new_tokens":8,"temperature":0.0,"stop_token_ids":[9,10],"ignore_eos":false,'
        b'"skip_special_tokens":true,"frequency_penalty":0.3,"stop":["\\n"]},"return_logprob":true,"stream":false}'
    )
    run(Keeping(answer([5, 9])), sampling=sampling(8, seed=0, images=("aGk=",), return_routed_experts=True))
    assert bodies[1] == (
        b'{"input_ids":[1,2,3],"image_data":["aGk="],"sampling_params":{"top_p":1.0,"top_k":100000000,'
        b'"max_new_tokens":8,"temperature":1.0,"stop_token_ids":[9,10],"ignore_eos":false,'
        b'"skip_special_tokens":true,"frequency_penalty":0.0,"sampling_seed":0},"return_logprob":true,'
        b'"stream":false,"return_routed_experts":true}'
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_an_abort_continues_with_the_tokens_so_far_and_the_rest_of_the_budget(streaming: bool) -> None:
    state = State()

    def aborted(question: dict[str, Any]) -> Any:
        state.weights = 7
        return Reply(200, events(answer([5, 6], "abort"))) if streaming else answer([5, 6], "abort")

    second = Reply(200, events(answer([7, 9]))) if streaming else answer([7, 9])
    transport = Transport(aborted, second)
    shown: list[int] = []
    got = run(transport, state, **({"on_tokens": shown.extend} if streaming else {}))
    assert list(got.output_ids) == [5, 6, 7, 9] and got.attempts == 2
    assert got.version_runs == [VersionRun(0, 2), VersionRun(7, 2)]
    asked = [(q["input_ids"], q["sampling_params"]["max_new_tokens"]) for _, q in transport.asked]
    assert asked == [([1, 2, 3], 8), ([1, 2, 3, 5, 6], 6)]
    assert not streaming or shown == [5, 6, 7, 9]


def test_equal_versions_in_a_row_are_one_run() -> None:
    got = run(Transport(answer([5], "abort"), answer([6], "abort"), answer([9])))
    assert got.version_runs == [VersionRun(0, 3)]


def test_the_version_is_that_of_the_sending_not_of_the_receipt() -> None:
    state = State()

    def answered_late(question: dict[str, Any]) -> bytes:
        state.weights = 3
        return answer([5, 9])

    assert run(Transport(answered_late), state).version_runs == [VersionRun(0, 2)]


def test_twenty_aborts_end_by_length() -> None:
    transport = Transport(answer([5], "abort"))
    got = run(transport, sampling=sampling(50))
    assert got.stop_reason == "length" and got.attempts == 20 and list(got.output_ids) == [5] * 20
    budgets = [q["sampling_params"]["max_new_tokens"] for _, q in transport.asked]
    assert budgets == list(range(50, 30, -1))


def test_aborts_that_use_the_budget_up_end_by_length() -> None:
    got = run(Transport(answer([5, 5], "abort")), sampling=sampling(6))
    assert got.stop_reason == "length" and got.attempts == 3 and len(got.output_ids) == 6


def test_an_unknown_finish_reason_counts_as_an_abort() -> None:
    assert run(Transport(answer([5], "surprise"), answer([6, 9]))).attempts == 2


def test_abort_before_prefill_brings_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PAUSE_POLL_S", 0.0)
    bare = msgspec.json.encode(
        {"meta_info": {"finish_reason": {"type": "abort", "message": "before prefill"}}}
    )
    got = run(Transport(bare, answer([5, 9])))
    assert list(got.output_ids) == [5, 9] and got.attempts == 2
    got = run(Transport(bare))
    assert got.stop_reason == "length" and got.attempts == 20 and len(got.output_ids) == 0


def test_nothing_is_sent_while_paused() -> None:
    async def main() -> None:
        state, transport = State(), Transport(answer([5, 9]))
        state.is_paused = True
        engine = Engine(transport, state)
        task = asyncio.create_task(engine.generate(PROMPT, sampling()))
        for _ in range(3):
            await asyncio.sleep(generate.PAUSE_POLL_S)
        assert not transport.asked
        state.is_paused, state.weights = False, 4
        assert (await asyncio.wait_for(task, 10)).version_runs == [VersionRun(4, 2)]

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"meta_info":{}}',
        b'{"meta_info":{"finish_reason":{"type":"stop"}}}',
        b'{"meta_info":{"finish_reason":null,"output_token_logprobs":[]}}',
        b'{"meta_info":{"finish_reason":{"type":"stop"},"output_token_logprobs":[[null,5,null]]}}',
        b'{"meta_info":{"finish_reason":{"type":"stop"},"output_token_logprobs":[[-1.0,-5,null]]}}',
        b'{"meta_info":{"finish_reason":{"type":"stop"},"output_token_logprobs":[[-1.0,4294967296,null]]}}',
        b'{"meta_info":{"finish_reason":{"type":"stop"},"output_token_logprobs":[[-1.0]]}}',
        b"\xff",
    ],
)
def test_what_is_no_answer_is_an_engine_error(body: bytes) -> None:
    with pytest.raises(EngineError):
        run(Transport(body))


def test_zero_tokens_and_stop_is_an_answer() -> None:
    assert run(Transport(answer([]))).stop_reason == "stop"


@pytest.mark.parametrize("streaming", [False, True])
def test_faults(streaming: bool) -> None:
    options = {"on_tokens": lambda ids: None} if streaming else {}
    with pytest.raises(EngineError, match=r"Engine returned 503: busy"):
        run(Transport(Reply(503, [b"busy"])), **options)
    with pytest.raises(EngineUnreachable, match="http://engine:1"):
        run(Transport(ConnectFailed("refused")), **options)
    with pytest.raises(EngineTimeout, match="120 s"):
        run(Transport(Timeout("late")), **options)
    with pytest.raises(EngineUnreachable, match="broke off"):
        run(Transport(BrokenReply("reset")), **options)
    assert (EngineError.status, EngineUnreachable.status, EngineTimeout.status) == (502, 502, 504)


class Receiving:
    """Keeps what a Receiver is told."""

    def __init__(self, refuse: str = "") -> None:
        self.told: list[Any] = []
        self._refuse = refuse

    async def attempt(self, at_most: int) -> None:
        self.told.append(b"")

    async def add(self, text: memoryview) -> None:
        self.told[-1] += bytes(text)
        if self._refuse == "add":
            raise ValueError("no")

    async def end(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.told.append((prompt_tokens, completion_tokens))
        if self._refuse == "end":
            raise ValueError("no")


def in_pieces(body: bytes, size: int) -> Reply:
    return Reply(200, [body[at : at + size] for at in range(0, len(body), size)])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("streamed", [False, True])
def test_routed_experts_go_to_the_receiver_of_each_attempt(size: int, streamed: bool) -> None:
    def step(*args: Any, **more: Any) -> Reply:
        body = answer(*args, **more)
        return in_pieces(b"data: " + body + b"\n\ndata: [DONE]\n\n" if streamed else body, size)

    receiving = Receiving()
    transport = Transport(
        step([5], "abort", routed_experts="AAAA" * 50),
        step([], "abort"),
        step([6, 9], routed_experts="BBBB", prompt_tokens=4),
    )
    handed: list[int] = []
    got = run(transport, routed=receiving, on_tokens=handed.extend if streamed else None)
    assert got.output_ids.tolist() == [5, 6, 9]
    assert not streamed or handed == [5, 6, 9]
    assert receiving.told == [b"AAAA" * 50, (3, 1), b"BBBB", (4, 2)]


@pytest.mark.parametrize("refuse", ["add", "end"])
def test_routed_experts_that_are_refused_fail_the_call(refuse: str) -> None:
    with pytest.raises(EngineError, match="routed experts"):
        run(Transport(answer([5], routed_experts="AAAA")), routed=Receiving(refuse))


def test_an_engine_that_refuses_is_quoted_also_when_experts_are_wanted() -> None:
    with pytest.raises(EngineError, match="503: busy"):
        run(Transport(Reply(503, [b"bu", b"sy"])), routed=Receiving())


# -- streams -------------------------------------------------------------------------------------


def _rows(ids: list[int]) -> list[list[Any]]:
    return [[-0.25 * token, token, None] for token in ids]


def _event(rows: list[list[Any]], count: int | None, stop: str | None = None) -> bytes:
    info: dict[str, Any] = {"finish_reason": stop and {"type": stop}, "output_token_logprobs": rows}
    if count is not None:
        info["completion_tokens"] = count
    return msgspec.json.encode({"text": "", "meta_info": info})


IDS = [5, 5, 5, 6, 5, 5, 7, 9]


# without the count, equal tokens in a row cannot be told from a repetition: incremental streams must have it
@pytest.mark.parametrize(("cumulative", "counted"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5, 6, 7, 8], [3, 6, 8], [8], [1, 1, 4, 8, 8]])
def test_cumulative_and_incremental_streams(cumulative: bool, counted: bool, cuts: list[int]) -> None:
    texts = []
    for start, end in zip([0, *cuts], cuts, strict=False):
        rows = _rows(IDS[:end] if cumulative else IDS[start:end])
        texts.append(_event(rows, end if counted else None, "stop" if end == len(IDS) else None))
    shown: list[list[int]] = []
    got = run(Transport(Reply(200, events(*texts))), on_tokens=shown.append)
    assert [token for piece in shown for token in piece] == IDS == list(got.output_ids)
    assert list(got.logprobs) == [-0.25 * token for token in IDS]
    assert all(shown), "nothing is handed over for an event without new tokens"


def test_a_stream_split_at_every_byte() -> None:
    data = b"".join(events(_event(_rows(IDS[:3]), 3), _event(_rows(IDS), 8, "length")))  # type: ignore[arg-type]
    data = b": hello\r\n\r\n" + data.replace(b"\n\n", b"\r\n\r\n", 1)
    chunks: list[bytes | Exception] = [data[i : i + 1] for i in range(len(data))]
    got = run(Transport(Reply(200, chunks)), on_tokens=lambda ids: None)
    assert list(got.output_ids) == IDS and got.stop_reason == "length"


def test_a_stream_that_fails() -> None:
    first = b"data: " + _event(_rows([5]), 1) + b"\n\n"
    cases: list[tuple[list[bytes | Exception], type[Exception], str]] = [
        ([first, b'data: {"error":{"message":"out of memory"}}\n\n'], EngineError, "out of memory"),
        ([first, b'data: {"error":"bad"}\n\n'], EngineError, "bad"),
        ([first], EngineError, "without finish_reason"),
        ([first, BrokenReply("reset")], EngineUnreachable, "broke off"),
        ([first, Timeout("late")], EngineTimeout, "120 s"),
        ([first, b"data: {oops\n\n"], EngineError, "cannot be read"),
        ([first, b"data: " + _event(_rows([5, 6]), 9) + b"\n\n"], EngineError, "does not add up"),
        (
            [b'data: {"meta_info":{"finish_reason":{"type":"stop"}}}\n\n'],
            EngineError,
            "output_token_logprobs",
        ),
    ]
    for chunks, kind, text in cases:
        shown: list[int] = []
        transport = Transport(Reply(200, chunks))
        with pytest.raises(kind, match=text):
            run(transport, on_tokens=shown.extend)
        assert transport.replies[0].closed, "the connection must not be left half read"


def test_a_last_event_without_its_line_feed_counts() -> None:
    got = run(Transport(Reply(200, [b"data: " + _event(_rows([9]), 1, "stop")])), on_tokens=lambda ids: None)
    assert list(got.output_ids) == [9]


def test_control_calls() -> None:
    async def main() -> None:
        transport = Transport(b"{}")
        engine = Engine(transport, State())
        await engine.pause()
        await engine.resume()
        await engine.release_memory()
        await engine.resume_memory(["weights"])
        await engine.resume_memory()
        assert transport.asked == [
            ("/pause_generation", {}),
            ("/continue_generation", {}),
            ("/release_memory_occupation", {}),
            ("/resume_memory_occupation", {"tags": ["weights"]}),
            ("/resume_memory_occupation", {}),
        ]
        assert transport.timeouts == [10.0, 10.0, 30.0, 30.0, 30.0]
        with pytest.raises(EngineError, match="500"):
            await Engine(Transport(Reply(500, [b"no"])), State()).pause()

    asyncio.run(main())
