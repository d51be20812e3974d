"""What is measured: each scenario's requests.

A scenario prepares its requests on a Target (sessions, texts, warm caches; not measured) and gives them
back, as bytes or as something to run. All text is seeded and tokenized with Qwen's vocabulary; a user's own
conversations come from a file of JSON lines (`recorded`).
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import load
from benchmarks.targets import ADMIN, CONNECTIONS, Target, checked

OUTPUT_TOKENS = 64
TURNS = 8
MIB = base64.b64encode(bytes(random.Random(5).randbytes(1 << 20))).decode()
TENSOR = json.dumps({"type": "tensor", "data": MIB, "shape": [512, 512], "dtype": "torch.float32"}).encode()


def chat(messages: Sequence[dict[str, Any]], key: str, **more: Any) -> bytes:
    body = {"messages": messages, "max_tokens": OUTPUT_TOKENS, **more}
    return load.request("POST", "/chat/completions", body, key)


Prepared = Sequence[bytes] | Callable[[], load.Outcome]


def health(_target: Target, count: int) -> Prepared:
    return [load.request("GET", "/health")] * count


def start_session(target: Target, count: int) -> Prepared:
    task = target.text.words(4).replace(" ", "-")
    return [
        load.request("POST", "/rl/start_session", {"task_id": f"{task}-{i}"}, ADMIN) for i in range(count)
    ]


def chats(target: Target, count: int, messages: int, tokens: int, fresh: int | None) -> Prepared:
    """Chats of `tokens` tokens in; all but about `fresh` of them were sent before. None: every token is
    new.
    """
    keys = [key for _, key in target.sessions(-(-count // TURNS))]
    histories = [target.text.messages(messages - 1, tokens - (fresh or 0)) for _ in range(8)]
    if fresh is not None:
        warm = [[*history, {"role": "user", "content": "and?"}] for history in histories]
        every = 4 * target.workers if target.workers > 1 else 1  # so that each worker has seen each of them
        learnt = [chat(conversation, "") for conversation in warm for _ in range(every)]
        target.run(learnt, connections=CONNECTIONS * target.workers)
    requests = []
    for number in range(count):
        if fresh is None:
            conversation = [*target.text.messages(messages, tokens)]
        else:
            latest = {"role": "user", "content": target.text.words(fresh)}
            conversation = [*histories[number % len(histories)], latest]
        requests.append(chat(conversation, keys[number // TURNS]))
    return requests


def chat_short(target: Target, count: int) -> Prepared:
    return chats(target, count, 5, 200, 20)


def chat_short_fresh(target: Target, count: int) -> Prepared:
    return chats(target, count, 5, 200, None)


def chat_long(target: Target, count: int) -> Prepared:
    return chats(target, count, 30, 4000, 150)


def chat_long_fresh(target: Target, count: int) -> Prepared:
    return chats(target, count, 30, 4000, None)


def set_reward(target: Target, count: int) -> Prepared:
    keys = [key for _, key in target.sessions(count)]
    target.run([chat([{"role": "user", "content": "hello"}], key) for key in keys])
    return [load.request("POST", "/rl/set_reward", {"reward": 1.0}, key) for key in keys]


def growing(target: Target) -> Iterator[list[dict[str, str]]]:
    """The messages of 8 turns that grow to about 4,000 tokens."""
    messages: list[dict[str, str]] = [{"role": "system", "content": target.text.words(30)}]
    for _ in range(TURNS):
        messages.append({"role": "user", "content": target.text.words(420)})
        yield list(messages)
        messages.append({"role": "assistant", "content": target.text.words(OUTPUT_TOKENS)})


def export(target: Target, count: int) -> Prepared:
    sessions = target.sessions(count)
    for turn in zip(*(growing(target) for _ in sessions), strict=True):
        target.run([chat(messages, key) for messages, (_, key) in zip(turn, sessions, strict=True)])
    target.run([load.request("POST", "/rl/set_reward", {"reward": 1.0}, key) for _, key in sessions])
    return [
        load.request("POST", "/export_trajectories", {"session_ids": [name]}, ADMIN) for name, _ in sessions
    ]


def _life(target: Target, number: int) -> Generator[bytes, bytes, None]:
    """One session from start to clear; a generator that is sent every reply's body."""
    task = f"life-{target.text.words(3).replace(' ', '-')}-{number}"
    started = json.loads((yield load.request("POST", "/rl/start_session", {"task_id": task}, ADMIN)))[
        "sessions"
    ][0]
    key = started["session_api_key"]
    for messages in growing(target):
        yield chat(messages, key)
    yield load.request("POST", "/rl/set_reward", {"reward": 1.0}, key)
    body = {"session_ids": [started["session_id"]]}
    exported = json.loads((yield load.request("POST", "/export_trajectories", body, ADMIN)))["traj"]
    shards = [tensor["data"]["shard"]["data"]["shard_id"] for tensor in exported.values()]
    yield load.request("POST", "/data/batch", {"shard_ids": shards})
    yield load.request("DELETE", "/data/clear", {"shard_ids": shards})


def whole_life(target: Target, count: int) -> Prepared:
    def run() -> load.Outcome:
        lives = (_life(target, number) for number in range(count))
        return checked(load.run(load.conversation(target.address, lives, connections=CONNECTIONS)))

    return run


def put_mib(_target: Target, count: int) -> Prepared:
    return [load.request("PUT", f"/data/bench-{i % 16}", TENSOR) for i in range(count)]


def get_mib(target: Target, count: int) -> Prepared:
    target.run([load.request("PUT", f"/data/bench-{i}", TENSOR) for i in range(16)])
    return [load.request("GET", f"/data/bench-{i % 16}") for i in range(count)]


def batch_32mib(target: Target, count: int) -> Prepared:
    target.run([load.request("PUT", f"/data/bench-{i}", TENSOR) for i in range(32)])
    names = [f"bench-{i}" for i in range(32)]
    return [load.request("POST", "/data/batch", {"shard_ids": names})] * count


def read_conversations(file: Path) -> list[list[dict[str, Any]]]:
    """One conversation a line: a JSON list of messages, or an object with `messages`. Raises SystemExit."""
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
                messages = value["messages"] if isinstance(value, dict) else value
                assert messages and all(isinstance(one["role"], str) for one in messages)
            except (ValueError, LookupError, TypeError, AssertionError):
                raise SystemExit(f"{file}:{number}: not a JSON list of messages") from None
            found.append(messages)
    if not found:
        raise SystemExit(f"{file}: no conversations")
    return found


def turns_of(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What the agent sent, chat by chat: all before each answer, and the whole where no answer ends it."""
    ends = [i for i, one in enumerate(messages) if one["role"] == "assistant" and i]
    if messages[-1]["role"] != "assistant":
        ends.append(len(messages))
    return [messages[:end] for end in ends]


def recorded(file: Path) -> Callable[[Target, int], Prepared]:
    """The conversations of a file as a scenario: each in a session of its own, its chats in their order, the
    file again and again until there are `count` chats."""
    conversations = [turns_of(messages) for messages in read_conversations(file)]

    def prepare(target: Target, count: int) -> Prepared:
        chosen: list[list[list[dict[str, Any]]]] = []
        while sum(map(len, chosen)) < count:
            chosen.append(conversations[len(chosen) % len(conversations)])

        def life(turns: list[list[dict[str, Any]]], key: str) -> Generator[bytes, bytes, None]:
            for turn in turns:
                yield chat(turn, key)

        keys = [key for _, key in target.sessions(len(chosen))]

        def run() -> load.Outcome:
            lives = map(life, chosen, keys)
            return checked(
                load.run(load.conversation(target.address, lives, connections=CONNECTIONS, each=True))
            )

        return run

    return prepare


def engine_call(_target: Target, count: int) -> list[bytes]:
    """What the short chat becomes behind a proxy: ~200 ids in, 64 out. For nginx, which has no chats."""
    chance = random.Random(3)
    body = {
        "input_ids": [chance.randrange(1000, 100_000) for _ in range(200)],
        "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 1.0},
        "return_logprob": True,
        "stream": False,
    }
    return [load.request("POST", "/generate", body)] * count


Scenario = tuple[Callable[[Target, int], Prepared], int, int]
"""How to prepare it; requests a round for ours and for the original: about half a second of CPU each."""
SCENARIOS: dict[str, Scenario] = {
    "health": (health, 40_000, 8_000),
    "start_session": (start_session, 20_000, 4_000),
    "chat_short": (chat_short, 4_000, 400),
    "chat_short_fresh": (chat_short_fresh, 2_000, 400),
    "chat_long": (chat_long, 1_000, 160),
    "chat_long_fresh": (chat_long_fresh, 200, 80),
    "set_reward": (set_reward, 8_000, 1_500),
    "export": (export, 400, 60),
    "whole_life": (whole_life, 160, 24),
    "put_1mib": (put_mib, 800, 200),
    "get_1mib": (get_mib, 800, 300),
    "batch_32mib": (batch_32mib, 24, 6),
}
