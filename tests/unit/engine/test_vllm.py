"""The vLLM adapter: the original's bodies, answers whole and streamed, what is an error, images."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from areal_fast.engine.errors import EngineError
from areal_fast.engine.generate import Engine, VersionRun, adapter_for
from areal_fast.engine.sampling import Sampling, sampling_from_chat
from areal_fast.engine.segments import Prompt
from areal_fast.engine.sglang import SGLang
from areal_fast.engine.vllm import VLLM
from areal_fast.protocol.chat import decode_chat
from tests.unit.engine.test_generate import PROMPT, Reply, State, Transport, events, run, sampling

SAMPLING = Sampling(max_new_tokens=8, stop_token_ids=(9, 10))


def answer(ids: list[int], stop: str | None = "stop", logprob: float = -0.5) -> bytes:
    tokens = [f"token:{i}" for i in ids]
    logprobs = {
        "text_offset": [0] * len(ids),
        "token_logprobs": [logprob - i for i in range(len(ids))],
        "tokens": tokens,
        "top_logprobs": [{t: -0.5} for t in tokens],
    }
    choice = {
        "index": 0,
        "text": "never read",
        "logprobs": logprobs,
        "finish_reason": stop,
        "stop_reason": None,
    }
    return json.dumps({"id": "cmpl-1", "choices": [choice], "model": "m"}).encode()


def vllm(transport: Transport, state: State | None = None, **options: Any) -> Any:
    import asyncio

    engine = Engine(transport, state or State(), adapter=VLLM(), address="http://engine:1")
    return asyncio.run(engine.generate(PROMPT, options.pop("sampling", sampling()), **options))


def test_the_body_is_the_originals_byte_for_byte() -> None:
    path, body = VLLM().generate(Prompt.of([1, 2, 3]).data, SAMPLING, 8, stream=False)
    assert path == "/v1/completions"
    assert body == (
        b'{"top_p":1.0,"top_k":100000000,"max_tokens":8,"temperature":1.0,"stop_token_ids":[9,10],'
        b'"ignore_eos":false,"skip_special_tokens":true,"return_tokens_as_token_ids":true,"logprobs":0,'
        b'"use_beam_search":false,"stream":false,"prompt":[1,2,3]}'
    )
    more = msgspec.structs.replace(SAMPLING, frequency_penalty=0.5, stop=("x",), seed=0, temperature=0.0)
    body = VLLM().generate(Prompt.of([1]).data, more, 3, stream=True).body
    assert body == (
        b'{"top_p":1.0,"top_k":100000000,"max_tokens":3,"temperature":0.0,"stop_token_ids":[9,10],'
        b'"ignore_eos":false,"skip_special_tokens":true,"return_tokens_as_token_ids":true,"logprobs":0,'
        b'"use_beam_search":false,"stream":true,"frequency_penalty":0.5,"stop":["x"],"seed":0,"prompt":[1]}'
    )


def test_one_answer() -> None:
    transport = Transport(answer([5, 6, 9]))
    got = vllm(transport)
    assert list(got.output_ids) == [5, 6, 9] and got.stop_reason == "stop"
    assert list(got.logprobs) == [-0.5, -1.5, -2.5]
    assert transport.asked[0][0] == "/v1/completions"


def test_a_stream_of_what_is_new_however_it_is_cut() -> None:
    stream = Reply(
        200,
        events(
            answer([5], None), answer([], None), answer([6, 9]), b'{"choices":[],"usage":{"total_tokens":3}}'
        ),
    )
    shown: list[int] = []
    got = vllm(Transport(stream), on_tokens=shown.extend)
    assert list(got.output_ids) == shown == [5, 6, 9] and got.stop_reason == "stop"
    assert list(got.logprobs) == [-0.5, -0.5, -1.5]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_abort_continues_with_the_tokens_so_far(streaming: bool) -> None:
    state = State()

    def aborted(question: dict[str, Any]) -> Any:
        state.weights = 7
        return Reply(200, events(answer([5, 6], "abort"))) if streaming else answer([5, 6], "abort")

    second = Reply(200, events(answer([7, 9]))) if streaming else answer([7, 9])
    transport = Transport(aborted, second)
    shown: list[int] = []
    got = vllm(transport, state, **({"on_tokens": shown.extend} if streaming else {}))
    assert list(got.output_ids) == [5, 6, 7, 9]
    assert got.version_runs == [VersionRun(0, 2), VersionRun(7, 2)]
    asked = [(q["prompt"], q["max_tokens"]) for _, q in transport.asked]
    assert asked == [([1, 2, 3], 8), ([1, 2, 3, 5, 6], 6)]


def without(**changes: Any) -> bytes:
    whole = json.loads(answer([5, 9]))
    whole["choices"][0] |= changes
    return json.dumps(whole).encode()


BROKEN = [
    (answer([5, 9], logprob=-9999.0), "-9999"),
    (without(logprobs=None), "without logprobs"),
    (without(logprobs={"tokens": ["token:5"], "token_logprobs": [None]}), "cannot be read"),
    (without(logprobs={"tokens": ["token:5"], "token_logprobs": []}), "0 log-probabilities for 1 tokens"),
    (without(logprobs={"tokens": ["Hi"], "token_logprobs": [-1.0]}), "'Hi', not as token:ID"),
    (without(logprobs={"tokens": ["token:-1"], "token_logprobs": [-1.0]}), "not as token:ID"),
    (without(logprobs={"tokens": ["token:4294967296"], "token_logprobs": [-1.0]}), "not as token:ID"),
    (without(logprobs={"tokens": ["token:²"], "token_logprobs": [-1.0]}), "not as token:ID"),
    (without(finish_reason=None), "without finish_reason"),
    (b'{"choices":[]}', "without finish_reason"),
    (b'{"error":{"message":"no memory","code":500}}', "Engine failed: no memory"),
    (b"<html>", "cannot be read"),
    (b"[]", "cannot be read"),
]


@pytest.mark.parametrize(("body", "said"), BROKEN)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_answer_is_an_engine_error(body: bytes, said: str, streaming: bool) -> None:
    with pytest.raises(EngineError) as raised:
        if streaming:
            vllm(Transport(Reply(200, events(body))), on_tokens=lambda ids: None)
        else:
            vllm(Transport(body))
    assert said in str(raised.value)


def test_an_abort_before_prefill_brings_no_tokens() -> None:
    bare = without(finish_reason="abort", logprobs=None)
    got = vllm(Transport(bare, answer([5, 9])))
    assert list(got.output_ids) == [5, 9] and got.attempts == 2


def test_control_calls() -> None:
    adapter = VLLM()
    assert adapter.pause() == ("/areal_pause_generation", b"{}")
    assert adapter.resume() == ("/areal_continue_generation", b"{}")
    assert adapter.release_memory() == ("/sleep", b"{}")
    assert adapter.resume_memory(None) == ("/wake_up", b"{}")
    assert adapter.resume_memory(["weights", "a b"]).path == "/wake_up?tags=weights&tags=a+b"
    assert isinstance(adapter_for("vllm"), VLLM) and isinstance(adapter_for("sglang"), SGLang)


# -- images
# ------------------------------------------------------------------------------------------------------------

PNG = "data:image/png;base64,iVBORw=="
URL = "http://x/y.png"


def vision() -> Sampling:
    parts = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": PNG, "detail": None}},
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": {"url": "data:image/tiff;base64,abcd"}},
    ]
    body = {
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": parts}],
        "max_tokens": 8,
    }
    chat = decode_chat(json.dumps(body).encode())
    assert chat.messages[1]["content"] == [parts[0], *[{"type": "image"}] * 3]
    return sampling_from_chat(chat, 3, (9,))


def chat_answer(ids: list[int], stop: str | None = "stop", key: str = "message") -> bytes:
    content = [{"token": f"token:{i}", "logprob": -0.25, "bytes": None, "top_logprobs": []} for i in ids]
    choice = {"index": 0, key: {"content": "x"}, "logprobs": {"content": content}, "finish_reason": stop}
    return json.dumps({"choices": [choice]}).encode()


def test_images_go_as_messages() -> None:
    transport = Transport(chat_answer([5, 9]))
    got = vllm(transport, sampling=vision())
    assert list(got.output_ids) == [5, 9] and list(got.logprobs) == [-0.25] * 2
    path, body = transport.asked[0]
    assert path == "/v1/chat/completions" and "prompt" not in body
    assert list(body)[-1] == "messages" and body["logprobs"] is True
    urls = [part.get("image_url") for part in body["messages"][1]["content"]]
    # the kind is told from the data, as the original does; a URL stays what it was
    assert urls == [None, {"url": PNG}, {"url": URL}, {"url": "data:image/jpeg;base64,abcd"}]


def test_images_for_sglang_are_data() -> None:
    body = json.loads(SGLang().generate(Prompt.of([1]).data, vision(), 8, stream=False).body)
    assert body["image_data"] == ["iVBORw==", URL, "abcd"] and body["input_ids"] == [1]


def test_an_interrupted_answer_about_images_begins_anew() -> None:
    state = State()

    def aborted(question: dict[str, Any]) -> bytes:
        state.weights = 4
        return chat_answer([5, 6], "abort")

    transport = Transport(aborted, chat_answer([7, 9]))
    got = vllm(transport, state, sampling=vision())
    assert list(got.output_ids) == [7, 9] and got.version_runs == [VersionRun(4, 2)]
    assert [question["max_tokens"] for _, question in transport.asked] == [8, 8]


def test_a_stream_about_images() -> None:
    whole = Reply(200, events(chat_answer([5], None, "delta"), chat_answer([9], "stop", "delta")))
    shown: list[int] = []
    vllm(Transport(whole), sampling=vision(), on_tokens=shown.extend)
    assert shown == [5, 9]
    cut = Reply(200, events(chat_answer([5], "abort", "delta")))
    with pytest.raises(EngineError, match="cannot continue"):
        vllm(Transport(cut), sampling=vision(), on_tokens=lambda ids: None)


def test_sglang_still_continues_with_images() -> None:
    from tests.unit.engine.test_generate import answer as sglang_answer

    got = run(Transport(sglang_answer([5], "abort"), sglang_answer([9])), sampling=vision())
    assert list(got.output_ids) == [5, 9]
