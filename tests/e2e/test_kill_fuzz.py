"""Whole lives under random kills: what was acknowledged is exported or dumped exactly once, never twice.

Agents live session after session (start, chats, reward, export, fetch, clear) and repeat a call whose
connection broke, as the gateway does; some sessions are abandoned and must be found as dumps. Meanwhile
workers, cleaner and engine are killed or stopped at random. The ledger at the end is made from replies alone.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import ADMIN, WATCHDOG_S, Answer, Proxy, alive, wait_until
from tests.e2e.test_life import shard_ids

SECONDS = 15.0
AGENTS = 8


class Lives(threading.Thread):
    """One agent. `exported`: interaction ids by session, `abandoned`: ids that only a dump can hold."""

    def __init__(self, proxy: Proxy, name: str, seed: int, stop: threading.Event) -> None:
        super().__init__()
        self.proxy = proxy
        self.task = name
        self.random = random.Random(seed)
        self.stopping = stop
        self.exported: dict[str, list[str]] = {}
        self.abandoned: dict[str, list[str]] = {}
        self.broken = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.live()
        except BaseException as error:
            self.error = error

    def ask(self, method: str, path: str, body: Any, key: str) -> Answer:
        """The reply, asked for again as often as the connection breaks or the engine is away."""
        deadline = time.monotonic() + WATCHDOG_S
        while True:
            try:
                answer = self.proxy.ask(method, path, body, key=key)
                if answer.status != 502:
                    return answer
            except (OSError, http.client.HTTPException):
                self.broken += 1
            assert time.monotonic() < deadline, f"{method} {path} never got through"
            time.sleep(0.01)

    def live(self) -> None:
        started = self.ask("POST", "/rl/start_session", {"task_id": self.task}, ADMIN)
        assert started.status == 201, started.body
        session_id, key = started.json["session_id"], started.json["api_key"]
        ids = []
        for turn in range(self.random.randint(1, 5)):
            body = {"messages": [{"role": "user", "content": f"turn {turn} " * 20}], "max_tokens": 8}
            chat = self.ask("POST", "/chat/completions", {**body, "stream": False}, key)
            assert chat.status == 200, chat.body
            ids.append(chat.json["id"])
        if self.random.random() < 0.2:
            self.abandoned[key] = ids
            return
        reward = self.ask("POST", "/rl/set_reward", {"reward": 1.0}, key)
        assert reward.status == 200, reward.body
        exported = self.ask("POST", "/export_trajectories", {"session_id": session_id}, ADMIN)
        assert exported.status == 200, exported.body
        interactions = exported.json["interactions"]
        held = [i for i in interactions if i in ids]
        assert held == ids, "in order, and nothing acknowledged is missing"
        self.exported[key] = ids
        shards = [shard for i in interactions.values() for shard in shard_ids(i)]
        fetched = self.ask("POST", "/data/batch", {"shard_ids": shards}, ADMIN)
        assert fetched.status == 200 and len(fetched.json) == len(shards)
        assert self.ask("DELETE", "/data/clear", {"shard_ids": shards}, ADMIN).status == 200


def accidents(proxy: Proxy, chance: random.Random, until: float) -> int:
    """Kill or stop somebody every now and then; how often."""
    count = 0
    while time.monotonic() < until:
        threading.Event().wait(chance.uniform(0.3, 1.2))
        try:
            health = proxy.health()
        except (OSError, http.client.HTTPException):
            continue
        rows = [*health["workers"], *health["workers"], health["cleaner"], health["engine"]]
        row = chance.choice([row for row in rows if row and row["pid"]] or [None])
        if row is None or not alive(row["pid"]):
            continue
        number = signal.SIGSTOP if chance.random() < 0.2 and row["proc"] >= 0 else signal.SIGKILL
        os.kill(row["pid"], number)
        count += 1
    return count


@pytest.mark.soak
def test_lives_under_random_kills(tmp_path: Path, seed: int) -> None:
    # longer than a request can wait for workers that are stopped one after the other, and started again
    flags = ("--session-timeout-seconds", "20", "--stale-session-cleanup-interval-seconds", "0.2")
    dumping = ("--stale-session-dump-path", str(tmp_path), "--hang-timeout-seconds", "1.5")
    with Proxy(*flags, *dumping, workers=3, log_level="warning") as proxy:
        stop = threading.Event()
        agents = [Lives(proxy, f"agent-{i}", seed + i, stop) for i in range(AGENTS)]
        for agent in agents:
            agent.start()
        count = accidents(proxy, random.Random(seed), time.monotonic() + SECONDS)
        stop.set()
        for agent in agents:
            agent.join(WATCHDOG_S)
            assert not agent.is_alive()
        for agent in agents:
            if agent.error is not None:
                raise AssertionError("\n".join(proxy.lines[-20:])) from agent.error
        lives = sum(len(agent.exported) for agent in agents)
        assert lives > 20 and count > 5, (lives, count)
        try:
            wait_until(lambda: proxy.health()["sessions"] == 0, "everything left has gone stale", 180)
        except AssertionError as error:  # who still holds what, and what the supervisor did
            held = proxy.ask("GET", "/admin/sessions", key=ADMIN).body.decode()
            raise AssertionError("\n".join([held, str(proxy.health()), *proxy.lines[-60:]])) from error
        wait_until(lambda: proxy.health()["arena"]["sessions_detached"] == 0, "and is dumped")
        wait_until(lambda: not list(tmp_path.glob(".*")), "no temporary file is left")

        dumped: list[str] = []
        for path in tmp_path.iterdir():
            dumped += json.loads(path.read_text())
        assert len(dumped) == len(set(dumped)), "something was dumped twice"
        exported = {i for agent in agents for ids in agent.exported.values() for i in ids}
        abandoned = {i for agent in agents for ids in agent.abandoned.values() for i in ids}
        assert abandoned <= set(dumped), "what nobody exported is in the dumps"
        twice = exported & set(dumped)
        assert len(twice) <= sum(agent.broken for agent in agents), (
            "exported in full, and dumped all the same"
        )
        arena = proxy.health()["arena"]
        assert arena["txns_open"] == arena["sessions_closing"] == 0
        assert arena["shards_active"] <= sum(agent.broken for agent in agents)
