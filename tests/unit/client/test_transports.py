"""Both clients over real sockets to a server that follows a script: what breaks, where, and what they make of
it. What holds for one holds for the other."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from areal_fast.client import (
    AsyncClient,
    BadReply,
    Client,
    Request,
    ShardsNotFound,
    TimedOut,
    Unreachable,
)
from areal_fast.client.shards import WAYS
from tests.unit.client.scripted import CLOSE, CLOSE_AFTER, SILENT, ScriptedServer, reply

Run = Callable[..., Any]
STARTED = reply({"session_id": "t-0", "api_key": "k"}, 201)
VERSION = reply({"version": 3})


@pytest.fixture(params=["blocking", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    """run(url, lambda client: client.call(…), …): the results of calls that one client makes in turn."""

    def blocking(url: str, *calls: Callable[[Any], Any], **options: Any) -> list[Any]:
        with Client(url, "admin", **options) as client:
            return [call(client) for call in calls]

    def awaiting(url: str, *calls: Callable[[Any], Any], **options: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            async with AsyncClient(url, "admin", **options) as client:
                return [await call(client) for call in calls]

        return asyncio.run(all_of_them())

    return blocking if request.param == "blocking" else awaiting


def get_version(client: Any) -> Any:
    return client.get_version()


def start(client: Any) -> Any:
    return client.start_session("t")


def test_connections_are_kept(run: Run) -> None:
    with ScriptedServer(VERSION, VERSION, STARTED) as server:
        versions = run(server.url, get_version, get_version, start)
        assert versions[:2] == [3, 3]
        assert server.connections == 1
        line, headers, body = server.requests[2]
        assert line == "POST /rl/start_session HTTP/1.1" and headers["authorization"] == "Bearer admin"
        assert headers["content-type"] == "application/json" and b'"task_id":"t"' in body


def test_a_broken_connection_is_bridged_for_what_is_safe(run: Run) -> None:
    seen: list[Request] = []
    half = CLOSE_AFTER + VERSION[:-4]
    with ScriptedServer(CLOSE, half, reply({}, 503), VERSION) as server:
        assert run(server.url, get_version, observe=seen.append) == [3]
        assert len(server.requests) == 4
    assert [type(one.error) for one in seen] == [Unreachable, Unreachable, type(None), type(None)]
    assert all(one.path == "/get_version" and one.began <= one.ended for one in seen)


def test_a_start_whose_reply_broke_is_said_and_not_repeated(run: Run) -> None:
    with ScriptedServer(CLOSE) as server:
        with pytest.raises(Unreachable, match="may have been carried out") as caught:
            run(server.url, start)
        assert caught.value.sent and len(server.requests) == 1


def test_a_server_that_closed_a_kept_connection_costs_a_start_nothing(run: Run) -> None:
    """The end of a kept connection has arrived when the next call begins: it goes over a new one."""
    with ScriptedServer(CLOSE_AFTER + VERSION, STARTED) as server:

        def after_the_end(client: Any) -> Any:
            if isinstance(client, Client):
                assert server.closings.acquire(timeout=30)
                return start(client)

            async def later() -> Any:
                assert await asyncio.to_thread(server.closings.acquire, timeout=30)
                return await start(client)

            return later()

        _, session = run(server.url, get_version, after_the_end)
        assert session.id == "t-0" and server.connections == 2


def test_nobody_there(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(Unreachable, match="Is the proxy running") as caught:
        run(url, start, retries=1)
    assert not caught.value.sent


def test_silence_is_a_time_out_and_final(run: Run) -> None:
    with ScriptedServer(SILENT) as server:
        with pytest.raises(TimedOut, match=r"0\.2 s"):
            run(server.url, get_version, timeout_s=0.2)
        assert len(server.requests) == 1


def test_what_is_not_http_is_said(run: Run) -> None:
    with ScriptedServer(CLOSE_AFTER + b"220 mail ready\r\n") as server:
        with pytest.raises((BadReply, Unreachable)):
            run(server.url, get_version, retries=0)


def test_the_original_proxys_missing_shards(run: Run) -> None:
    missing = {"status": "error", "message": "One or more…", "missing_shard_ids": ["b"]}
    with ScriptedServer(reply(missing, 400), reply({"message": "Shard a not found"}, 404)) as server:
        with pytest.raises(ShardsNotFound) as caught:
            run(server.url, lambda client: client.get_many(["a", "b"]), ways=("json",))
        assert caught.value.shard_ids == ["b"]
        with pytest.raises(ShardsNotFound, match="Shard a not found"):
            run(server.url, lambda client: client.get("a"), ways=("json",))


def test_a_reply_without_a_length_is_read_to_its_end(run: Run) -> None:
    with ScriptedServer(CLOSE_AFTER + b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"version":4}') as server:
        assert run(server.url, get_version) == [4]


def test_only_plain_http() -> None:
    for make in (Client, AsyncClient):
        for url in ("https://x", "localhost:80", ""):
            with pytest.raises(ValueError, match="http"):
                make(url)


def test_a_forked_child_has_connections_of_its_own() -> None:
    with ScriptedServer(VERSION, VERSION, VERSION) as server, Client(server.url) as client:
        assert client.get_version() == 3
        child = os.fork()
        if child == 0:
            os._exit(0 if client.get_version() == 3 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert client.get_version() == 3
        assert server.connections == 2


def test_threads_share_a_client() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ScriptedServer(*[VERSION] * 60) as server, Client(server.url) as client:
        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(lambda _: client.get_version(), range(60))) == [3] * 60
        assert server.connections <= 6


def test_asyncio_run_twice() -> None:
    """A client used in another loop starts anew there."""
    with ScriptedServer(VERSION, VERSION) as server:
        client = AsyncClient(server.url)

        async def once() -> int:
            async with client:
                return await client.get_version()

        assert [asyncio.run(once()), asyncio.run(once())] == [3, 3]
        assert client.ways == dict.fromkeys((), 0) and set(WAYS) >= set(client.ways)


COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "x",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}],
}


def test_a_repeated_chat_carries_one_idempotency_key() -> None:
    pytest.importorskip("openai")
    chat_reply = reply(COMPLETION).replace(b"\r\n", b"\r\ncontent-type: application/json\r\n", 1)
    messages: Any = [{"role": "user", "content": "hi"}]

    async def twice(url: str) -> None:
        async with AsyncClient(url) as client, client.session("s", "key") as session:
            await session.openai().chat.completions.create(model="x", messages=messages)

    with ScriptedServer(CLOSE, chat_reply, CLOSE, chat_reply, chat_reply) as server:
        with Client(server.url) as client, client.session("s", "key") as session:
            session.openai().chat.completions.create(model="x", messages=messages)
        asyncio.run(twice(server.url))
        with Client(server.url) as client, client.session("s", "key") as session:
            copy = session.openai().with_options(timeout=30)
            copy.chat.completions.create(model="x", messages=messages)
        keys = [headers["idempotency-key"] for _, headers, _ in server.requests]
        assert {headers["authorization"] for _, headers, _ in server.requests} == {"Bearer key"}
    assert keys[0] == keys[1] and keys[2] == keys[3] and len(set(keys)) == 3
