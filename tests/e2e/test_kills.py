"""Processes killed and stopped under load: what fails, what goes on, and that nothing acknowledged is
lost."""

from __future__ import annotations

import http.client
import os
import signal
import threading
from dataclasses import dataclass, field

import pytest

from tests.e2e.running import ADMIN, WATCHDOG_S, Proxy, alive, descendants, wait_until


@dataclass
class Agent:
    """One session chatting over a kept connection until told to stop."""

    session_id: str
    key: str
    acknowledged: list[str] = field(default_factory=list)
    broken: int = 0
    refused: list[int] = field(default_factory=list)


class Load:
    """Agents in threads. `broken` counts calls whose connection broke, `refused` answers that are no 200."""

    def __init__(self, proxy: Proxy, agents: int) -> None:
        self.proxy = proxy
        self.agents = [Agent(*proxy.start(f"agent-{i}")) for i in range(agents)]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._chat, args=(agent,)) for agent in self.agents]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WATCHDOG_S)
            assert not thread.is_alive()

    def _chat(self, agent: Agent) -> None:
        connection = self.proxy.connection()
        while not self._stop.is_set():
            try:
                answer = self.proxy.chat(agent.key, "go on", max_tokens=8, over=connection)
            except (OSError, http.client.HTTPException):
                agent.broken += 1
                connection.close()
                connection = self.proxy.connection()
                continue
            if answer.status == 200:
                agent.acknowledged.append(answer.json["id"])
            else:
                agent.refused.append(answer.status)
        connection.close()

    @property
    def turns(self) -> int:
        return sum(len(agent.acknowledged) for agent in self.agents)

    def more(self, turns: int) -> None:
        """Wait until so many more turns were acknowledged."""
        target = self.turns + turns
        wait_until(lambda: self.turns >= target, f"{turns} more turns")

    def check_nothing_lost(self) -> None:
        """Every session can be rewarded and exported, and holds what its agent was told it holds."""
        for agent in self.agents:
            assert agent.refused == []
            assert self.proxy.reward(agent.key).status == 200
            exported = self.proxy.export(agent.session_id)
            assert exported.status == 200, exported.body
            held = list(exported.json["interactions"])
            assert [i for i in held if i in set(agent.acknowledged)] == agent.acknowledged
            assert len(held) - len(agent.acknowledged) <= agent.broken


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
def impatient() -> Proxy:
    return Proxy("--hang-timeout-seconds", "3")


def test_a_killed_worker_costs_only_its_own_requests(proxy: Proxy) -> None:
    with proxy, Load(proxy, 8) as load:
        load.more(40)
        for _ in range(3):
            victim = wait_until(lambda: (p := proxy.worker_pids()) and len(p) == 2 and p, "two workers")[0]
            os.kill(victim, signal.SIGKILL)
            load.more(40)
            wait_until(lambda v=victim: not alive(v), "it is dead")
            wait_until(lambda v=victim: v not in proxy.worker_pids(), "it was replaced")
        load.stop()
        assert sum(agent.broken for agent in load.agents) <= 3 * len(load.agents)
        load.check_nothing_lost()
        restarts = [w["restarts"] for w in proxy.health()["workers"]]
        assert sum(restarts) == 3
        pattern = "WARNING .* restarting role=worker-. why=.*SIGKILL"
        wait_until(lambda: len(proxy.log(pattern)) == 3, "three restarts are logged")


def test_a_stopped_worker_is_noticed_and_replaced(impatient: Proxy) -> None:
    with impatient as proxy, Load(proxy, 6) as load:
        load.more(20)
        victim = proxy.worker_pids()[0]
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: not alive(victim), "the stopped worker was killed")
        assert proxy.logged(rf"killing role=worker-. pid={victim} .*no heartbeat")
        load.more(20)
        load.stop()
        load.check_nothing_lost()
        wait_until(lambda: len(proxy.worker_pids()) == 2, "there are two workers again")


def test_a_pause_of_the_whole_tree_kills_nobody(impatient: Proxy) -> None:
    with impatient as proxy:
        everyone = [proxy.pid, *descendants(proxy.pid)]
        workers = sorted(proxy.worker_pids())
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        threading.Event().wait(5.0)  # longer than the hang timeout: what must not be counted
        for pid in reversed(everyone):
            os.kill(pid, signal.SIGCONT)
        ticks = proxy.health()["uptime_s"]
        wait_until(lambda: proxy.health()["uptime_s"] > ticks + 1.0, "it runs on")
        assert sorted(proxy.worker_pids()) == workers
        assert not proxy.log("killing")


def test_a_killed_supervisor_leaves_nothing_running(proxy: Proxy) -> None:
    with proxy, Load(proxy, 4) as load:
        load.more(10)
        children = descendants(proxy.pid)
        assert len(children) == 4, "two workers, the cleaner, the engine"
        os.kill(proxy.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, children)), "every child is gone")


def test_a_killed_supervisor_takes_stopped_children_with_it(proxy: Proxy) -> None:
    with proxy:
        children = descendants(proxy.pid)
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        os.kill(proxy.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, children)), "every child is gone")


def test_a_killed_engine_comes_back(proxy: Proxy) -> None:
    with proxy:
        _, key = proxy.start("t")
        assert proxy.chat(key).status == 200
        os.kill(proxy.health()["engine"]["pid"], signal.SIGKILL)
        wait_until(lambda: proxy.chat(key).status == 200, "the engine is back")
        assert proxy.logged("restarting role=engine")


def test_signals_to_children_do_nothing(proxy: Proxy) -> None:
    with proxy:
        children = descendants(proxy.pid)
        for pid in children:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        _, key = proxy.start("t")
        for _ in range(10):
            assert proxy.chat(key).status == 200
        assert all(map(alive, children))


def test_a_reward_in_one_worker_survives_its_death() -> None:
    """What is acknowledged is in the arena: the worker that took it may die at once."""
    with Proxy(workers=2) as proxy:
        session_id, key = proxy.start("t")
        with proxy.each_worker() as workers:
            pid, connection = next(iter(workers.items()))
            chat = proxy.chat(key, over=connection)
            assert proxy.ask("POST", "/rl/set_reward", {"reward": 1}, key=key, over=connection).status == 200
            os.kill(pid, signal.SIGKILL)
        exported = proxy.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)
        assert list(exported.json["interactions"]) == [chat.json["id"]]
