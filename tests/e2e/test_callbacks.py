"""Callbacks of a running proxy: until one is taken, by one worker at a time, also when one is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections import Counter

import pytest

from tests.e2e.running import ADMIN, Proxy, wait_until
from tests.unit.service.provider import Provider, Scripted

pytestmark = pytest.mark.slow


def told(receiver: Provider) -> list[tuple[str, int]]:
    bodies = [json.loads(call.body) for call in list(receiver.received)]
    return [(body["session_id"], body["trajectory_id"]) for body in bodies]


def test_it_is_posted_until_it_is_taken_and_never_again() -> None:
    with Provider() as receiver, Proxy("--callback-server-addr", receiver.url + "/") as proxy:
        receiver.answers += [Scripted(500, [b"no"]), Scripted(503, [b"no"]), Scripted(200, [b"{}"])]
        session_id, key = proxy.start("cb")
        proxy.chat(key)
        proxy.reward(key)
        wait_until(lambda: len(receiver.received) == 3, "two refusals and one that is taken")
        first = receiver.received[0]
        assert first.path == "/ext/callback/online_ready"
        assert first.headers["authorization"] == f"Bearer {ADMIN}"
        assert json.loads(first.body) == {"session_id": session_id, "trajectory_id": 0}
        proxy.chat(key)
        proxy.reward(key)
        wait_until(lambda: (session_id, 1) in told(receiver), "the next trajectory")
        proxy.kill(*proxy.worker_pids())
        _, other = proxy.start("later")
        wait_until(lambda: proxy.chat(other).status == 200, "a worker answers again")
        proxy.reward(other)
        wait_until(lambda: ("later-0", 0) in told(receiver), "successors tell too")
        assert Counter(told(receiver)) == {(session_id, 0): 3, (session_id, 1): 1, ("later-0", 0): 1}


def test_what_was_exported_first_is_not_told_of() -> None:
    with Provider() as receiver, Proxy("--callback-server-addr", receiver.url) as proxy:
        session_id, key = proxy.start("quick")
        proxy.chat(key)
        with contextlib.closing(proxy.connection()) as connection:
            proxy.ask("POST", "/rl/set_reward", {"reward": 1.0}, key=key, over=connection)
            body = {"session_id": session_id}
            exported = proxy.ask("POST", "/export_trajectories", body, key=ADMIN, over=connection)
        assert exported.status == 200
        _, later = proxy.start("later")
        proxy.chat(later)
        proxy.reward(later)
        wait_until(lambda: told(receiver), "the later one is told of")
        assert told(receiver) == [("later-0", 0)]


def test_a_slow_receiver_delays_no_other_and_export_ends_the_telling() -> None:
    hold = threading.Event()
    with Provider() as receiver, Proxy("--callback-server-addr", receiver.url) as proxy:
        receiver.answers.append(Scripted(500, [b"no"], hold=hold))
        slow, slow_key = proxy.start("slow")
        proxy.chat(slow_key)
        proxy.reward(slow_key)
        wait_until(lambda: told(receiver) == [(slow, 0)], "the slow one is being told of")
        fast, fast_key = proxy.start("fast")
        proxy.chat(fast_key)
        proxy.reward(fast_key)
        wait_until(lambda: (fast, 0) in told(receiver), "the fast one, while the slow one hangs")
        proxy.export(slow)
        hold.set()
        _, last_key = proxy.start("last")
        proxy.chat(last_key)
        proxy.reward(last_key)
        wait_until(lambda: ("last-0", 0) in told(receiver), "later ones are told of")
        assert Counter(told(receiver))[slow, 0] == 1


def test_a_killed_worker_leaves_its_telling_to_another() -> None:
    with Provider() as receiver, Proxy("--callback-server-addr", receiver.url) as proxy:
        with proxy.each_worker() as workers:
            (doomed, its), (other, others) = workers.items()
            session_id, key = proxy.start("killed")
            proxy.chat(key, over=others)
            hold = threading.Event()
            receiver.answers += [Scripted(500, [b""]), Scripted(500, [b"no"], hold=hold)]
            proxy.ask("POST", "/rl/set_reward", {"reward": 1.0}, key=key, over=its)
            wait_until(lambda: len(receiver.received) == 2, "the second try is under way")
            os.kill(doomed, signal.SIGKILL)
            wait_until(lambda: len(receiver.received) == 3, "another worker has told it")
            hold.set()
        assert other in proxy.worker_pids()
        assert set(told(receiver)) == {(session_id, 0)}


def test_a_delayed_reward_of_a_killed_worker_becomes_ready_and_is_told_of() -> None:
    flags = ("--set-reward-finish-timeout", "1.0")
    with Provider() as receiver, Proxy("--callback-server-addr", receiver.url, *flags) as proxy:
        with proxy.each_worker() as workers:
            (doomed, its), _ = workers.items()
            session_id, key = proxy.start("delayed")
            proxy.chat(key, over=its)
            answer = proxy.ask("POST", "/rl/set_reward", {"reward": 1.0}, key=key, over=its)
            assert not answer.json["trajectory_ready"]
            os.kill(doomed, signal.SIGKILL)
        wait_until(lambda: told(receiver), "it became ready without anybody asking")
        assert told(receiver) == [(session_id, 0)]
        assert len(proxy.export(session_id).json["interactions"]) == 1
