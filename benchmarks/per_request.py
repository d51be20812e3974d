"""CPU a request, ours beside the original: the same requests, the same engine, the same load, in turns.

    python benchmarks/per_request.py [--rounds 3] [--scenario NAME…] [--quick] [--only ours] [--workers 1]

Both proxies run at once; in every round each scenario is measured on one and then on the other, so that
what the machine does meanwhile hits both. Measured is the CPU time of the whole proxy process tree
(load.tree_cpu_s) divided by the requests answered; preparation (starting sessions, filling them) is not
measured. The engine is the embedded one, in a process of its own that counts for nobody. With two CPUs or
more the proxies are pinned to one and everything else to the others. A reply that is no 2xx fails the run.

The original is AReaL 1.0.4 (tests/wire/areal_env.py). It answers an export with one batch of 6 shards, ours
in the same form for the same request; GOALS-style figures of pr1268 (48 shards) are therefore not
reproduced here.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "wire"), str(HERE.parent / "tests")]

import load  # noqa: E402
import machine  # noqa: E402
from proxy import Server, free_port, original, ours  # noqa: E402

ADMIN = "areal-admin-key"
CONNECTIONS = 8
OUTPUT_TOKENS = 64
TURNS = 8
MIB = base64.b64encode(bytes(random.Random(5).randbytes(1 << 20))).decode()
TENSOR = json.dumps({"type": "tensor", "data": MIB, "shape": [512, 512], "dtype": "torch.float32"}).encode()
VOCABULARY = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
name president team minute idea kid body information back parent face others level office door
health person art war history party result change morning reason research girl guy moment air
teacher force education
"""
WORDS = VOCABULARY.split()


class Text:
    """Seeded text of about a token a word."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def words(self, count: int) -> str:
        return " ".join(self._random.choices(WORDS, k=count))

    def messages(self, count: int, tokens: int) -> list[dict[str, str]]:
        """`count` messages of `tokens` in all; a system message first, then user and assistant in turn."""
        roles = ["system", *itertools.islice(itertools.cycle(("user", "assistant")), count - 1)]
        return [{"role": role, "content": self.words(tokens // count - 5)} for role in roles]


def chat(messages: list[dict[str, str]], key: str) -> bytes:
    return load.request("POST", "/chat/completions", {"messages": messages, "max_tokens": OUTPUT_TOKENS}, key)


@dataclass
class Target:
    """One of the two proxies."""

    name: str
    address: str
    pid: int
    text: Text

    def run(self, requests: Sequence[bytes], *, bodies: bool = False) -> load.Outcome:
        return checked(
            asyncio.run(load.closed(self.address, requests, connections=CONNECTIONS, keep_bodies=bodies))
        )

    def sessions(self, count: int) -> list[tuple[str, str]]:
        """Starts that many sessions: (id, key) each."""
        task = f"bench-{self.text.words(3).replace(' ', '-')}-{id(object())}"
        starts = [
            load.request("POST", "/rl/start_session", {"task_id": f"{task}-{i}"}, ADMIN) for i in range(count)
        ]
        replies = [json.loads(body)["sessions"][0] for body in self.run(starts, bodies=True).bodies]
        return [(reply["session_id"], reply["session_api_key"]) for reply in replies]


def checked(outcome: load.Outcome) -> load.Outcome:
    if outcome.failures:
        raise SystemExit(f"{outcome.failures} requests failed, first: {outcome.first_failure!r}")
    return outcome


Prepared = Sequence[bytes] | Callable[[], load.Outcome]


def health(_target: Target, count: int) -> Prepared:
    return [load.request("GET", "/health")] * count


def start_session(target: Target, count: int) -> Prepared:
    task = target.text.words(4).replace(" ", "-")
    return [
        load.request("POST", "/rl/start_session", {"task_id": f"{task}-{i}"}, ADMIN) for i in range(count)
    ]


def _chats(target: Target, count: int, messages: int, tokens: int, fresh: int | None) -> Prepared:
    """Chats of `tokens` tokens in; all but about `fresh` of them were sent before. None: every token is
    new.
    """
    keys = [key for _, key in target.sessions(-(-count // TURNS))]
    histories = [target.text.messages(messages - 1, tokens - (fresh or 0)) for _ in range(8)]
    if fresh is not None:
        warm = [[*history, {"role": "user", "content": "and?"}] for history in histories]
        target.run([chat(conversation, "") for conversation in warm])
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
    return _chats(target, count, 5, 200, 20)


def chat_short_fresh(target: Target, count: int) -> Prepared:
    return _chats(target, count, 5, 200, None)


def chat_long(target: Target, count: int) -> Prepared:
    return _chats(target, count, 30, 4000, 150)


def chat_long_fresh(target: Target, count: int) -> Prepared:
    return _chats(target, count, 30, 4000, None)


def set_reward(target: Target, count: int) -> Prepared:
    keys = [key for _, key in target.sessions(count)]
    target.run([chat([{"role": "user", "content": "hello"}], key) for key in keys])
    return [load.request("POST", "/rl/set_reward", {"reward": 1.0}, key) for key in keys]


def _growing(target: Target) -> Iterator[list[dict[str, str]]]:
    """The messages of 8 turns that grow to about 4,000 tokens."""
    messages: list[dict[str, str]] = [{"role": "system", "content": target.text.words(30)}]
    for _ in range(TURNS):
        messages.append({"role": "user", "content": target.text.words(420)})
        yield list(messages)
        messages.append({"role": "assistant", "content": target.text.words(OUTPUT_TOKENS)})


def export(target: Target, count: int) -> Prepared:
    sessions = target.sessions(count)
    for turn in zip(*(_growing(target) for _ in sessions), strict=True):
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
    for messages in _growing(target):
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
        return checked(asyncio.run(load.conversation(target.address, lives, connections=CONNECTIONS)))

    return run


def put_mib(_target: Target, count: int) -> Prepared:
    return [load.request("PUT", f"/data/bench-{i % 16}", TENSOR) for i in range(count)]


def get_mib(target: Target, count: int) -> Prepared:
    target.run([load.request("PUT", f"/data/bench-{i}", TENSOR) for i in range(16)])
    return [load.request("GET", f"/data/bench-{i % 16}") for i in range(count)]


# scenario → (how to prepare it, requests a round for ours, for the original): about half a second of CPU each
SCENARIOS: dict[str, tuple[Callable[[Target, int], Prepared], int, int]] = {
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
}


def measure(target: Target, name: str, quick: bool) -> dict[str, float]:
    prepare, mine, theirs = SCENARIOS[name]
    count = max(8, (mine if target.name == "ours" else theirs) // (10 if quick else 1))
    prepared = prepare(target, count)
    before = load.tree_cpu_s(target.pid)
    outcome = prepared() if callable(prepared) else target.run(prepared)
    used = load.tree_cpu_s(target.pid) - before
    return {
        "requests": count,
        "cpu_ms": 1000 * used / count,
        "per_second": count / outcome.seconds,
        "p50_ms": 1000 * load.quantile(outcome.latencies, 0.5),
        "p99_ms": 1000 * load.quantile(outcome.latencies, 0.99),
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    cpu = [one["cpu_ms"] for one in rounds]
    return {
        "cpu_ms": statistics.median(cpu),
        "cpu_ms_min": min(cpu),
        "cpu_ms_max": max(cpu),
        "per_second": statistics.median(one["per_second"] for one in rounds),
        "rounds": rounds,
    }


@contextlib.contextmanager
def engine() -> Iterator[str]:
    """The embedded engine in a process of its own; yields its URL."""
    port = free_port()
    tokens = ["--tokens", "1000-100000", "--eos-id", "151645"]
    server = Server([sys.executable, "-m", "areal_fast.embedded", "--port", str(port), *tokens], port)
    try:
        yield server.url
    finally:
        server.stop()


def pin(target: Target) -> str:
    """The proxies on the last CPU, this process on the others; a no-op on one CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return "not pinned: one CPU"
    for pid in load.tree(target.pid):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), {cpus[-1]})
    return f"proxies on CPU {cpus[-1]}, engine and load on {cpus[:-1]}"


def compare(arguments: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "per_request", "machine": machine.described()}
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(engine())
        targets = []
        if arguments.only != "original":
            mine = stack.enter_context(ours(backend, tokenizer, workers=arguments.workers))
            targets.append(Target("ours", mine.address, mine.pid, Text(1)))
        if arguments.only != "ours":
            from areal_env import areal_python

            theirs = stack.enter_context(original(areal_python(), backend, tokenizer))
            targets.append(Target("original", theirs.address, theirs.pid, Text(1)))
        for target in targets:
            result["pinning"] = pin(target)
        if len(cpus) > 1:
            os.sched_setaffinity(0, set(cpus[:-1]))
        measured: dict[str, dict[str, list[dict[str, float]]]] = {}
        for number in range(arguments.rounds):
            for name in arguments.scenario or SCENARIOS:
                for target in targets if number % 2 == 0 else targets[::-1]:
                    one = measure(target, name, arguments.quick)
                    measured.setdefault(name, {}).setdefault(target.name, []).append(one)
                    print(
                        f"round {number + 1}  {name:18} {target.name:9} {one['cpu_ms']:9.3f} ms CPU",
                        flush=True,
                    )
        result["memory_mib"] = {t.name: round(load.tree_rss_bytes(t.pid) / 2**20, 1) for t in targets}
    result["workers"] = arguments.workers
    result["scenarios"] = {
        name: {who: summary(rounds) for who, rounds in by_target.items()}
        for name, by_target in measured.items()
    }
    return result


def table(result: dict[str, Any]) -> str:
    lines = [f"{'CPU ms a request':18} {'ours':>28} {'original 1.0.4':>28} {'ratio':>7}"]
    for name, by_target in result["scenarios"].items():
        cells = [
            f"{one['cpu_ms']:9.3f} [{one['cpu_ms_min']:.3f}, {one['cpu_ms_max']:.3f}]" if one else "–"
            for one in (by_target.get("ours"), by_target.get("original"))
        ]
        both = len(by_target) == 2 and by_target["ours"]["cpu_ms"] > 0
        medians = {who: one["cpu_ms"] for who, one in by_target.items()}
        ratio = f"{medians['original'] / medians['ours']:6.1f}×" if both else ""
        lines.append(f"{name:18} {cells[0]:>28} {cells[1]:>28} {ratio:>7}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--only", choices=("ours", "original"), help="one proxy alone")
    arguments = parser.parse_args()
    import qwen_folder

    tokenizer = qwen_folder.build(
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "areal_fast-qwen"
    )
    result = compare(arguments, tokenizer)
    print(table(result))
    print("kept in", machine.keep("per_request", result).relative_to(HERE.parent))


if __name__ == "__main__":
    main()
