"""What single steps of a request cost: `make bench-micro` (pytest-benchmark). Wall time of one thread.

No verdicts: the everyday suite does not run these. `--benchmark-compare` puts two commits side by side.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from areal_fast.core._core import Arena
from areal_fast.core._messages import fingerprint
from areal_fast.core._tokens import ids_json
from areal_fast.engine.reply import completion
from areal_fast.engine.sampling import Sampling
from areal_fast.engine.sglang import SGLang
from areal_fast.engine.templates import ChatTemplate
from areal_fast.engine.tokenizer import HfTokenizer, load_tokenizer
from areal_fast.http.head import parse_request_head
from areal_fast.protocol.chat import decode_chat
from areal_fast.protocol.records import INTERACTION
from areal_fast.store import SessionStore
from tests import qwen_folder

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")
HEAD = (
    b"POST /chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer key\r\nContent-Length: 12\r\n\r\n"
)


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(256 << 20) as made:
        made.proc_enter(os.getpid())
        yield made


@pytest.fixture
def slot(arena: Arena) -> int:
    found, _ = arena.start(b"task", b"key")
    assert arena.pin_slot(found)
    return found


@pytest.fixture(scope="session")
def tokenizer() -> HfTokenizer:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    made = load_tokenizer(str(qwen_folder.build(cache / "areal_fast-qwen")))
    assert isinstance(made, HfTokenizer)
    return made


def messages(count: int, words: int) -> list[dict[str, Any]]:
    text = " ".join(WORDS[i % len(WORDS)] for i in range(words))
    roles = ["system", *(("user", "assistant")[i % 2] for i in range(count - 1))]
    return [{"role": role, "content": f"{i} {text}"} for i, role in enumerate(roles)]


def test_touch(benchmark: Any, arena: Arena, slot: int) -> None:
    benchmark(arena.touch, slot)


def test_pin_and_unpin(benchmark: Any, arena: Arena, slot: int) -> None:
    def both() -> None:
        arena.unpin(arena.pin_key(b"key"))

    benchmark(both)


def test_start_a_session(benchmark: Any, arena: Arena) -> None:
    started: list[int] = []

    def one() -> None:
        started.append(arena.start(b"task", b"key-%d" % len(started))[0])

    benchmark.pedantic(one, rounds=5000)


def test_append_1_kib(benchmark: Any, arena: Arena, slot: int) -> None:
    meta, data = bytes(64), (bytes(1024),)
    benchmark.pedantic(lambda: arena.append(slot, INTERACTION, meta, data), rounds=20_000)


def test_turn_without_engine(benchmark: Any, arena: Arena) -> None:
    """begin, reserve, commit: what recording one interaction of 200 + 64 tokens costs."""
    store = SessionStore(arena)
    session = store.by_key(store.start("task").sessions[0][1])
    assert session is not None
    prompt, output, logprobs = np.arange(200, dtype="<i4"), np.arange(64, dtype="<i4"), np.zeros(64, "<f4")

    def one() -> None:
        turn = session.begin_turn(reserve_tokens=264)
        turn.commit(
            prompt_ids=prompt,
            output_ids=output,
            logprobs=logprobs,
            version_runs=[(0, 64)],
            stop_reason="stop",
        )

    benchmark.pedantic(one, rounds=3000)


def test_request_head(benchmark: Any) -> None:
    benchmark(parse_request_head, HEAD)


def test_chat_body(benchmark: Any) -> None:
    benchmark(decode_chat, msgspec.json.encode({"messages": messages(30, 120), "max_tokens": 64}))


def test_engine_answer(benchmark: Any) -> None:
    rows = [[-0.25 * i, 1000 + i, None] for i in range(64)]
    answer = {"meta_info": {"finish_reason": {"type": "length"}, "output_token_logprobs": rows}}
    benchmark(SGLang().parse, msgspec.json.encode(answer))


@pytest.mark.parametrize("count", [5, 30])
def test_template(benchmark: Any, tokenizer: HfTokenizer, count: int) -> None:
    template: ChatTemplate = tokenizer.template
    benchmark(template.render, messages(count, 120), None, {})


@pytest.mark.parametrize("count", [5, 30])
def test_segments_known(benchmark: Any, tokenizer: HfTokenizer, count: int) -> None:
    text = tokenizer.template.render(messages(count, 120), None, {})
    tokenizer.encode(text)
    benchmark(tokenizer.encode, text)


@pytest.mark.parametrize("count", [5, 30])
def test_known_chat(benchmark: Any, tokenizer: HfTokenizer, count: int) -> None:
    """From a body whose messages were all seen before to its prompt."""
    body = msgspec.json.encode({"messages": messages(count, 120), "max_tokens": 64})
    assert tokenizer.known.take(body) is not None
    benchmark(tokenizer.known.take, body)


def test_ids_as_json(benchmark: Any) -> None:
    ids = np.random.default_rng(1).integers(0, 150_000, 4000, np.int32).tobytes()
    benchmark(ids_json, ids)


def test_engine_request(benchmark: Any) -> None:
    """4,000 ids, parameters that were sent before."""
    ids = np.random.default_rng(1).integers(0, 150_000, 4000, np.int32).tobytes()
    sampling = Sampling(max_new_tokens=64, stop_token_ids=(1, 2))
    benchmark(SGLang().generate, ids, sampling, 64, stream=False)


def test_reply(benchmark: Any) -> None:
    benchmark(completion, "chatcmpl-" + "0" * 29, 1_700_000_000, "some words " * 30, "stop", 4000, 64)


def test_fingerprint_of_a_body(benchmark: Any) -> None:
    benchmark(fingerprint, bytes(22_000))


def test_text_of_64_ids(benchmark: Any, tokenizer: HfTokenizer) -> None:
    benchmark(tokenizer.decode, array("i", range(1000, 1064)))


def test_segments_new(benchmark: Any, tokenizer: HfTokenizer) -> None:
    """30 messages of known words, none of them seen as a whole."""
    text = tokenizer.template.render(messages(30, 120), None, {})

    def fresh() -> tuple[tuple[str], dict[str, Any]]:
        tokenizer.segments.clear()
        return (text,), {}

    benchmark.pedantic(tokenizer.encode, setup=fresh, rounds=200)
