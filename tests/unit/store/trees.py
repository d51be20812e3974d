"""Random conversation trees for the concat template, and how ours records and exports them.

A scenario is a list of chats in the order they start and end: messages, answer, output ids, why it stopped.
Tokens are code points; a message is its text and EOS, a generation prompt is one more token. Answers end with
any number of EOS, so that a child may be no longer than its parent.
"""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

import numpy as np

from areal_fast.protocol.chat import BadChat
from areal_fast.protocol.concat import answer_message, continued, follow, prefix_hashes
from areal_fast.store import SessionStore
from tests.unit.store.turns import ask, decode, started

EOS, OPEN = 1, 7


class Chat(NamedTuple):
    messages: list[dict[str, Any]]
    answer: str
    output: list[int]
    stop_reason: str


def template(messages: list[dict[str, Any]]) -> list[int]:
    ids = [token for m in messages for token in (*map(ord, f"{m.get('content')}{m.get('n', '')}"), EOS)]
    return [*ids, OPEN]


def scenario(seed: int, size: int = 14) -> list[Chat]:
    """Chats that begin, go on, branch, repeat, and go on from something slightly else."""
    draw = random.Random(seed)
    chats: list[Chat] = []
    while len(chats) < size:
        how = draw.choice(["begin", "on", "on", "on", "same", "other"]) if chats else "begin"
        if how == "begin":
            messages = [{"role": "system", "content": draw.choice("st")}]
        else:
            before = draw.choice(chats)
            messages = [*before.messages, {"role": "assistant", "content": before.answer}]
            if how == "other":
                messages[-1] = {**messages[-1], "name": "x"}
            elif how == "same":
                messages = before.messages
        for _ in range(draw.randrange(3) if how != "begin" else 1):
            number = draw.choice([{}, {"n": 2}, {"n": 2.0}])
            messages = [*messages, {"role": "user", "content": draw.choice("ab"), **number}]
        answer = "".join(draw.choice("xy") for _ in range(draw.randrange(1, 4)))
        stop_reason = draw.choice(["stop", "stop", "length"])
        ends = [EOS] * draw.randrange(1, 6) if stop_reason == "stop" else []
        chats.append(Chat(messages, answer, [*map(ord, answer), *ends], stop_reason))
    return chats


class Played(NamedTuple):
    """prompts[i]: of chat i, or None if it could not be aligned; leaves: chat → its tensors and reward."""

    prompts: list[list[int] | None]
    leaves: dict[int, dict[str, Any]]


def play(store: SessionStore, chats: list[Chat], rewards: dict[int, float], discount: float) -> Played:
    """Ours: record the chats, reward, export in style concat."""
    prompts: list[list[int] | None] = []
    numbers: dict[str, int] = {}
    with started(store) as session:
        for i, chat in enumerate(chats):
            turn = session.begin_turn(reserve_tokens=400)
            prefixes = prefix_hashes(chat.messages)
            turn.follow(prefixes)
            ids = np.array(template(chat.messages), np.int32)
            if turn.parent is not None:
                try:
                    parent = turn.parent
                    ids = continued(parent.ids, parent.prompt_len, parent.stop_reason, ids, EOS, [EOS])
                except BadChat:
                    prompts.append(None)
                    turn.abandon()
                    continue
            prompts.append(ids.tolist())
            n = len(chat.output)
            turn.commit(
                prompt_ids=ids,
                output_ids=chat.output,
                logprobs=np.arange(1, n + 1, dtype=np.float32) * -0.25 - i,
                version_runs=[(i, n - 1), (i + 1, 1)],
                stop_reason=chat.stop_reason,
                messages_hash=follow(prefixes[-1], answer_message(chat.answer, [])),
            )
            numbers[turn.interaction_id] = i
        ids_of = {i: interaction_id for interaction_id, i in numbers.items()}
        store.finish_timeout_ns = 10**15
        for i, reward in rewards.items():
            if i in ids_of:
                session.set_reward(reward, ids_of[i])
        store.finish_timeout_ns = 0
        last = max(ids_of)
        session.set_reward(rewards.get(last, 0.0), ids_of[last])
        done = ask(store, session.session_id, style="concat", discount=discount)
        done.delivered()
        body = json.loads(done.body)["interactions"]
    return Played(
        prompts,
        {
            numbers[interaction_id]: {
                "reward": item["reward"],
                **{name: read(store, ref) for name, ref in item["tensor_dict"].items()},
            }
            for interaction_id, item in body.items()
        },
    )


def read(store: SessionStore, reference: Any) -> Any:
    body = store.shards.get_json(reference["data"]["shard"]["data"]["shard_id"])
    assert body is not None
    return decode(json.loads(body.whole())).tolist()
