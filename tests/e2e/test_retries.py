"""Repeats of chats and exports over real sockets, with several workers."""

from __future__ import annotations

import json
import os
import signal
import socket

from tests.e2e.running import ADMIN, Proxy, wait_until


def abandoned(proxy: Proxy, path: str, body: bytes, key: str) -> socket.socket:
    """A request whose client will not read its answer."""
    client = socket.create_connection(("127.0.0.1", proxy.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def test_a_chat_whose_client_hung_up_is_answered_from_its_record() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}).encode()
    with Proxy() as proxy:
        session_id, key = proxy.start("gone")
        proxy.engine(token_latency_s=0.05)
        client = abandoned(proxy, "/chat/completions", body, key)
        wait_until(lambda: proxy.engine_stats()["in_flight"] == 1, "the engine works on it")
        client.close()
        wait_until(lambda: proxy.engine_stats()["in_flight"] == 0, "the engine is done")
        proxy.engine(token_latency_s=0.0)
        with proxy.each_worker() as workers:
            ids = []
            for connection in [*workers.values(), *workers.values()]:
                answer = proxy.ask("POST", "/chat/completions", body, key=key, over=connection)
                ids.append(answer.json["id"])
                # a connection's next request comes after its last reply is noted
                assert proxy.ask("GET", "/health", over=connection).status == 200
        assert len(set(ids)) == 4
        assert proxy.engine_stats()["requests"] == 4
        assert proxy.reward(key).json["interaction_count"] == 4
        assert ids[0] in proxy.export(session_id).json["interactions"]


def test_a_chat_that_was_answered_is_a_new_sample_though_its_worker_died() -> None:
    with Proxy() as proxy:
        _, key = proxy.start("killed")
        with proxy.each_worker() as workers:
            ids = {proxy.chat(key, over=connection).json["id"] for connection in workers.values()}
            for connection in workers.values():  # a connection's next request comes after the reply is noted
                assert proxy.ask("GET", "/health", over=connection).status == 200
            proxy.kill(*workers)
        wait_until(lambda: len(set(proxy.worker_pids()) - set(workers)) == 2, "both have successors")
        assert proxy.chat(key).json["id"] not in ids
        assert len(ids) == 2


def test_an_export_whose_worker_died_before_its_reply_is_repeated_with_removal() -> None:
    """The session goes only with a reply that arrived, so that an identical request finds it as it was."""
    with Proxy() as proxy:
        session_id, key = proxy.start("export")
        first = proxy.chat(key).json["id"]
        proxy.reward(key)
        body = json.dumps({"session_id": session_id, "remove_session": True}).encode()
        client = abandoned(proxy, "/export_trajectories", body[:-1], ADMIN)
        for pid in proxy.worker_pids():
            os.kill(pid, signal.SIGKILL)
        client.close()
        wait_until(lambda: proxy.health()["sessions"] == 1, "a worker answers again")
        answer = proxy.ask("POST", "/export_trajectories", body, key=ADMIN)
        assert list(answer.json["interactions"]) == [first]
        assert proxy.ask("POST", "/export_trajectories", body, key=ADMIN).status == 404
