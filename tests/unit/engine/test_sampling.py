"""Budgets and parameters, with the texts of what is refused (recorded from the original)."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from areal_fast.engine.generate import Adapter
from areal_fast.engine.sampling import Sampling, sampling_from_chat
from areal_fast.engine.sglang import SGLang
from areal_fast.engine.vllm import VLLM
from areal_fast.protocol.chat import BadChat, decode_chat


def make(prompt_tokens: int = 20, engine_max_tokens: int | None = None, **fields: Any) -> Sampling:
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "x"}], **fields})
    return sampling_from_chat(decode_chat(body), prompt_tokens, [1, 2], engine_max_tokens=engine_max_tokens)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 512),
        ({"max_tokens": 8}, 8),
        ({"max_tokens": 8.5}, 8),
        ({"max_completion_tokens": 5}, 5),
        ({"max_tokens": None, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 1_000_000_000}, 32748),
        ({"max_total_tokens": 30}, 10),
        ({"max_total_tokens": 30, "max_tokens": 4}, 4),
        ({"max_total_tokens": 1000, "engine_max_tokens": 100}, 80),
        ({"max_total_tokens": 50, "engine_max_tokens": 100}, 30),
        ({"engine_max_tokens": 100}, 80),
        ({"engine_max_tokens": 100_000}, 32748),
        ({"prompt_tokens": 32700}, 68),
    ],
)
def test_budget(fields: dict[str, Any], expected: int) -> None:
    assert make(**fields).max_new_tokens == expected


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        (
            {"max_tokens": 0},
            "max_new_tokens must be > 0, got 0 (max_tokens=32768, input_len=20, max_new_tokens=0)",
        ),
        (
            {"max_tokens": -3},
            "max_new_tokens must be > 0, got -3 (max_tokens=32768, input_len=20, max_new_tokens=-3)",
        ),
        (
            {"prompt_tokens": 32768},
            "max_new_tokens must be > 0, got 0 (max_tokens=32768, input_len=32768, max_new_tokens=512)",
        ),
        ({"max_total_tokens": 5}, "len of prompt tokens 20 exceeds max_total_tokens 5"),
        ({"engine_max_tokens": 20}, "len of prompt tokens 20 exceeds max_total_tokens 20"),
        (
            {"max_tokens": 8, "max_completion_tokens": 8},
            "max_tokens and max_completion_tokens cannot be set at the same time. "
            "max_tokens has been deprecated. Please use max_completion_tokens instead. "
            "To set the total max tokens, please use max_total_tokens instead.",
        ),
    ],
)
def test_refused_budgets(fields: dict[str, Any], detail: str) -> None:
    with pytest.raises(BadChat) as raised:
        make(**fields)
    assert str(raised.value) == detail


def test_parameters() -> None:
    default = make()
    assert (default.temperature, default.top_p, default.frequency_penalty) == (1.0, 1.0, 0.0)
    assert default.stop == () and default.seed is None and not default.return_routed_experts
    assert default.stop_token_ids == (1, 2) and default.images is None
    assert make(temperature=0).temperature == 0.0
    assert make(temperature=None, top_p=None, frequency_penalty=None, stop=None, n=None) == default
    assert make(top_p=0).top_p == 1.0 and make(top_p=0.5).top_p == 0.5
    assert (
        make(stop="\n").stop == ("\n",)
        and make(stop=["a", "b"]).stop == ("a", "b")
        and make(stop=[]).stop == ()
    )
    assert make(seed=0).seed == 0
    assert make(metadata={"return_routed_experts": True}).return_routed_experts
    assert not make(metadata={"a": "b"}).return_routed_experts


def test_a_seed_is_used_only_where_the_request_has_none() -> None:
    body = b'{"messages":[{"role":"user","content":"x"}]%b}'
    seeds = [
        sampling_from_chat(decode_chat(body % more), 3, [1], seed=9).seed for more in (b"", b',"seed":4')
    ]
    assert seeds == [9, 4]


def test_a_sampling_that_repeats_is_the_same_object() -> None:
    one = decode_chat(b'{"messages":[{}],"max_tokens":5}')
    first = sampling_from_chat(one, 10, [1, 2])
    assert sampling_from_chat(one, 11, (1, 2)) is first
    for other in (
        sampling_from_chat(one, 10, [1]),
        sampling_from_chat(one, 10, [1, 2], seed=3),
        sampling_from_chat(one, 10, [1, 2], engine_max_tokens=14),
    ):
        assert other != first
    assert sampling_from_chat(one, 10, [1, 2]) == first


def test_what_is_remembered_of_a_sampling_is_of_no_other() -> None:
    adapters: list[Adapter] = [SGLang(), VLLM()]
    for adapter in adapters:
        for round in range(2):
            for budget in range(1, 600):
                # gone at once: another one may get its id
                sampling = Sampling(max_new_tokens=budget, stop_token_ids=(9,), seed=round)
                for asked in (budget, budget + 1):
                    for stream in (False, True):
                        body = json.loads(adapter.generate(b"", sampling, asked, stream=stream).body)
                        said = body.get("sampling_params", body)
                        assert (said.get("max_new_tokens") or said.get("max_tokens")) == asked
                        assert said.get("sampling_seed", said.get("seed")) == round
                        assert body["stream"] is stream


@pytest.mark.parametrize("adapter", [SGLang(), VLLM()])
def test_what_is_remembered_of_samplings_is_bounded(adapter: SGLang | VLLM) -> None:
    for i in range(600):
        long = Sampling(max_new_tokens=9, stop_token_ids=(1,), stop=(f"{i}" * 2000,))
        for sampling in (long, Sampling(max_new_tokens=i + 1, stop_token_ids=(1,))):
            body = adapter.generate(b"", sampling, sampling.max_new_tokens, stream=False).body
            assert body == type(adapter)().generate(b"", sampling, sampling.max_new_tokens, stream=False).body
    kept = adapter._spelled[False]._kept
    assert 0 < len(kept) <= 256 and all(len(text) < 4096 for _, text in kept.values())
