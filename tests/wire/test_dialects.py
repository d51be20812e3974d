"""What only a flag turns on, asked for as an operator would: the concat template and the v2 dialect.

Two turns of one conversation through a running proxy with two workers, then its export.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from exchange import send
from proxy import ours
from standin import GENERATE, StandIn, derived

ADMIN = "areal-admin-key"
TURNS = 2


def post(address: str, path: str, body: dict[str, Any], key: str = ADMIN) -> dict[str, Any]:
    headers = [("Content-Type", "application/json"), ("Authorization", f"Bearer {key}")]
    reply = send(address, "POST", path, headers, json.dumps(body).encode())
    assert reply.status in (200, 201), str(reply)
    answer: dict[str, Any] = reply.json()
    return answer


def episode(flags: Sequence[str], tokenizer: Path, style: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the engine was asked in two turns, and the exported batch: name → RTensor."""
    with StandIn() as engine, ours(engine.url, tokenizer, flags) as proxy:
        started = post(proxy.address, "/rl/start_session", {"task_id": "t"})
        key, messages = started["api_key"], [{"role": "user", "content": "hi"}]
        for _ in range(TURNS):
            chat = post(proxy.address, "/chat/completions", {"messages": messages, "max_tokens": 40}, key)
            said = chat["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "more"}]
        post(proxy.address, "/rl/set_reward", {"reward": 1}, key)
        export = {"session_ids": [started["session_id"]], "style": style}
        traj: dict[str, Any] = post(proxy.address, "/export_trajectories", export)["traj"]
        return [call.body for call in engine.received if call.path == GENERATE], traj


def shape(tensor: dict[str, Any]) -> list[int]:
    found: list[int] = tensor["data"]["data"]["shape"]
    return found


def test_concat_goes_on_from_the_parents_own_ids(qwen_tokenizer: Path) -> None:
    """Chat, template concat; Export, style concat: the leaf alone, as long as its prompt and its answer."""
    (first, second), traj = episode(["--chat-template-type", "concat"], qwen_tokenizer, "concat")
    before = first["input_ids"] + list(derived(first).tokens)
    assert second["input_ids"][: len(before)] == before
    assert len(second["input_ids"]) > len(before)
    length = len(second["input_ids"]) + len(derived(second).tokens)
    assert shape(traj["input_ids"]) == [1, length]


@pytest.mark.parametrize("sampling", [(), ("--deterministic-sampling",)])
def test_v2_tells_turns_and_rewards_before_discounting(qwen_tokenizer: Path, sampling: tuple[str]) -> None:
    """Export, Tensors (v2); Command line, --deterministic-sampling: each turn has a seed of its own."""
    asked, traj = episode(["--areal-dialect", "v2", *sampling], qwen_tokenizer, "individual")
    assert shape(traj["turn_ids"]) == shape(traj["input_ids"])
    assert shape(traj["original_rewards"]) == [TURNS]
    seeds = {body["sampling_params"].get("sampling_seed") for body in asked}
    assert len(seeds) == TURNS if sampling else seeds == {None}


@pytest.mark.parametrize(("dialect", "budget"), [("v2", 50_000), ("1.0", 32_768)])
def test_the_engines_limit_is_the_ceiling_in_v2_alone(
    qwen_tokenizer: Path, dialect: str, budget: int
) -> None:
    """Chat, Budget: never more than 32768 − prompt (v2: --engine-max-tokens or 32768)."""
    flags = ["--areal-dialect", dialect, "--engine-max-tokens", "50000"]
    with StandIn() as engine, ours(engine.url, qwen_tokenizer, flags) as proxy:
        post(proxy.address, "/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
        (asked,) = [call.body for call in engine.received if call.path == GENERATE]
        assert len(asked["input_ids"]) + asked["sampling_params"]["max_new_tokens"] == budget


def test_v2_registers_models_for_the_admin_alone(qwen_tokenizer: Path) -> None:
    """Rules, register_model: admin in v2, from loopback too."""
    with StandIn() as engine, ours(engine.url, qwen_tokenizer, ["--areal-dialect", "v2"]) as proxy:
        headers = [("Content-Type", "application/json")]
        assert send(proxy.address, "POST", "/register_model", headers, b'{"name": "m"}').status == 401
        assert post(proxy.address, "/register_model", {"name": "m"}) == {"status": "ok", "name": "m"}
