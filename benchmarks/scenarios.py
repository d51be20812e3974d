"""What is measured and on whom: the scenarios' requests, the proxies under test, and the floor below them.

A scenario prepares its requests on a Target (sessions, texts, warm caches; not measured) and gives them
back, as bytes or as something to run. All text is seeded and tokenized with Qwen's vocabulary. `engine` is
the embedded engine in a process of its own, the same one for everybody. `nginx` is a plain reverse proxy
before that engine, with kept connections on both sides: what any proxy must at least do, without recording
anything.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "wire"), str(HERE.parent / "tests")]

import load  # noqa: E402
from proxy import Server, free_port  # noqa: E402

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
    """One of the proxies: `name` is ours, original or nginx; `pid` the root of its process tree."""

    name: str
    address: str
    pid: int
    text: Text

    def run(
        self, requests: Sequence[bytes], *, bodies: bool = False, connections: int = CONNECTIONS
    ) -> load.Outcome:
        return checked(
            asyncio.run(load.closed(self.address, requests, connections=connections, keep_bodies=bodies))
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
        return checked(asyncio.run(load.conversation(target.address, lives, connections=CONNECTIONS)))

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


def engine_call(_target: Target, count: int) -> Prepared:
    """What the short chat becomes behind a proxy: ~200 ids in, 64 out. For nginx, which has no chats."""
    chance = random.Random(3)
    body = {
        "input_ids": [chance.randrange(1000, 100_000) for _ in range(200)],
        "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 1.0},
        "return_logprob": True,
        "stream": False,
    }
    return [load.request("POST", "/generate", body)] * count


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
    "batch_32mib": (batch_32mib, 24, 6),
}
# CPU milliseconds a request to reach on a quiet 2 vCPU Ice Lake (GOALS): the yardstick of `per_request`
GOALS_MS = {
    "health": 0.025,
    "start_session": 0.04,
    "chat_short": 0.2,
    "chat_short_fresh": 0.5,
    "chat_long": 0.5,
    "set_reward": 0.04,
    "export": 0.6,
    "whole_life": 4.0,
    "put_1mib": 0.8,
    "get_1mib": 0.6,
    "batch_32mib": 20.0,
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


NGINX_CONFIG = """
daemon off; pid {folder}/pid; worker_processes 1; error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 1000000000; tcp_nodelay on;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  client_body_buffer_size 1m; proxy_buffers 16 64k; proxy_buffer_size 64k;
  upstream engine {{ server {engine}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(backend: str) -> Iterator[Target | None]:
    """nginx with one worker as plain reverse proxy before `backend`; None where it is not installed."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        yield None
        return
    folder, port = Path(tempfile.mkdtemp(prefix="areal_fast-nginx-")), free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(folder=folder, port=port, engine=backend.removeprefix("http://")))
    try:
        server = Server([binary, "-e", folder / "error.log", "-c", config], port)
        try:
            yield Target("nginx", server.address, server.pid, Text(1))
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def memcpy_mb_s() -> float:
    """What copying 64 MiB costs a core here, in MB/s of CPU time: the limit for tensors."""
    source, target = bytearray(os.urandom(1 << 20) * 64), bytearray(64 << 20)
    target[:] = source
    best = 0.0
    for _ in range(5):
        began = time.process_time()
        for _ in range(4):
            memoryview(target)[:] = source
        best = max(best, 4 * len(source) / (time.process_time() - began) / 1e6)
    return best


def tokenizer_folder() -> Path:
    """Qwen's tokenizer as a folder, built once."""
    import qwen_folder

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(qwen_folder.build(cache / "areal_fast-qwen"))


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


def own_cpus() -> None:
    """This process, and what it starts from now on, off the proxies' CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1:
        os.sched_setaffinity(0, set(cpus[:-1]))
