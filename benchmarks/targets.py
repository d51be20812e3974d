"""Who is measured: a proxy under test, the engine behind all of them, nginx as the floor; and which CPUs
they run on.

`engine` is the embedded engine in a process of its own, the same one for everybody. `nginx` is a plain
reverse proxy before that engine, with kept connections on both sides: what any proxy must at least do,
without recording anything. Ours and the original are started by tests/wire/proxy.py, each with its own
server settings.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy import Server, free_port, original, ours

from benchmarks import load, meter

ADMIN = "areal-admin-key"
CONNECTIONS = 8
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
NUMBERS = itertools.count()
"""So that no two tasks of a run have the same name."""


class Text:
    """Seeded text of about a token a word. `run_seed` (--seed) makes all of a run's text another."""

    run_seed = 0

    def __init__(self, seed: int):
        self._random = random.Random(seed + 1_000_003 * self.run_seed)

    def words(self, count: int) -> str:
        return " ".join(self._random.choices(WORDS, k=count))

    def messages(self, count: int, tokens: int) -> list[dict[str, str]]:
        """`count` messages of `tokens` in all; a system message first, then user and assistant in turn."""
        roles = ["system", *itertools.islice(itertools.cycle(("user", "assistant")), count - 1)]
        return [{"role": role, "content": self.words(tokens // count - 5)} for role in roles]


@dataclass
class Target:
    """One of the proxies: `name` is ours, original or nginx; `pid` the root of its process tree."""

    name: str
    address: str
    pid: int
    text: Text
    workers: int = 1

    def run(
        self, requests: Sequence[bytes], *, bodies: bool = False, connections: int = CONNECTIONS
    ) -> load.Outcome:
        return checked(
            load.run(load.closed(self.address, requests, connections=connections, keep_bodies=bodies))
        )

    def sessions(self, count: int) -> list[tuple[str, str]]:
        """Starts that many sessions: (id, key) each."""
        task = f"bench-{self.text.words(3).replace(' ', '-')}-{next(NUMBERS)}"
        starts = [
            load.request("POST", "/rl/start_session", {"task_id": f"{task}-{i}"}, ADMIN) for i in range(count)
        ]
        replies = [json.loads(body)["sessions"][0] for body in self.run(starts, bodies=True).bodies]
        return [(reply["session_id"], reply["session_api_key"]) for reply in replies]

    def ask(self, path: str) -> dict[str, Any]:
        """What GET of that path answers, over a connection of its own."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        try:
            connection.request("GET", path)
            found: dict[str, Any] = json.loads(connection.getresponse().read())
            return found
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        return self.ask("/health")

    def cpu_s(self) -> float:
        """CPU seconds of the whole tree so far."""
        return meter.tree_cpu_s(self.pid)


def checked(outcome: load.Outcome) -> load.Outcome:
    if outcome.failures:
        raise SystemExit(f"{outcome.failures} requests failed, first: {outcome.first_failure!r}")
    return outcome


@contextlib.contextmanager
def engine(*flags: str) -> Iterator[str]:
    """The embedded engine in a process of its own; yields its URL."""
    port = free_port()
    tokens = ["--tokens", "1000-100000", "--eos-id", "151645"]
    server = Server([sys.executable, "-m", "areal_fast.embedded", "--port", str(port), *tokens, *flags], port)
    try:
        yield server.url
    finally:
        server.stop()


@contextlib.contextmanager
def proxy(whose: str, backend: str, *flags: str, workers: int = 1, seed: int = 3) -> Iterator[Target]:
    """Ours or the original over `backend`, pinned and at rest. `flags` and `workers` are ours alone: the
    original is started as AReaL starts it."""
    with contextlib.ExitStack() as stack:
        if whose == "ours":
            server = stack.enter_context(ours(backend, tokenizer_folder(), flags, workers=workers))
        else:
            from areal_env import areal_python

            server = stack.enter_context(original(areal_python(), backend, tokenizer_folder()))
        target = Target(whose, server.address, server.pid, Text(seed), workers)
        pin(target)
        settle(target)
        yield target


def settle(target: Target) -> None:
    """Its first requests are answered, and what it does after a start is done: it takes less than 5 % of a
    core, or 20 s are over."""
    target.run([load.request("GET", "/health")] * 1000, connections=64)
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        before, began = target.cpu_s(), time.perf_counter()
        time.sleep(0.25)
        if target.cpu_s() - before < 0.05 * (time.perf_counter() - began):
            return


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
    """nginx with one worker as plain reverse proxy before `backend`, pinned; None where it is not
    installed."""
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
            target = Target("nginx", server.address, server.pid, Text(1))
            pin(target)
            yield target
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


USABLE = sorted(os.sched_getaffinity(0))
"""The CPUs that this process was given, before it stepped aside from any of them."""


def place(pids: Iterable[int], cpus: Iterable[int]) -> None:
    """All threads of these processes on these CPUs."""
    wanted = set(cpus)
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task.name), wanted)


def pin(target: Target) -> None:
    """The proxy on the last CPU; a no-op on one CPU."""
    if len(USABLE) > 1:
        place(meter.tree(target.pid), USABLE[-1:])


def step_aside(cpus: int = 1) -> None:
    """This process, and what it starts from now on, off the last `cpus` CPUs, where there are others."""
    if len(USABLE) > cpus:
        os.sched_setaffinity(0, USABLE[:-cpus])
