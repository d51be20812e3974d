"""Rules of the wire page that no recording shows, or that the original breaks: against ours with two workers.

The recordings are one client after another; here an engine fails, a client goes away in the middle, an
export's reply is never read. The page's section is named in each test's docstring.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from exchange import Reply, events, send
from proxy import Server, ours
from standin import EOS, Answer, StandIn

ADMIN = "areal-admin-key"
WORDS = [6438, 6624, 6973, 7640, EOS]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def engine() -> Iterator[StandIn]:
    with StandIn() as standin:
        yield standin


@pytest.fixture(scope="module")
def proxy(engine: StandIn, qwen_tokenizer: Path) -> Iterator[Server]:
    with ours(engine.url, qwen_tokenizer, ["--request-timeout", "3"]) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_prepared(engine: StandIn) -> Iterator[None]:
    yield
    engine.answer_always(None)
    assert engine.forget_prepared() == 0, "the engine was asked less often than the test meant"


class Client:
    """One client of the proxy, with a session key or the admin's."""

    def __init__(self, address: str, key: str | None = ADMIN):
        self.address, self.key = address, key

    def __call__(self, method: str, path: str, body: Any = None) -> Reply:
        headers = [("Content-Type", "application/json")]
        if self.key is not None:
            headers.append(("Authorization", f"Bearer {self.key}"))
        data = b"" if body is None else json.dumps(body).encode()
        return send(self.address, method, path, headers, data)

    def chat(self, text: str = "hi", **more: Any) -> Reply:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8} | more
        return self("POST", "/chat/completions", body)

    def reward(self, value: float = 1.0, **more: Any) -> Reply:
        return self("POST", "/rl/set_reward", {"reward": value} | more)

    def export(self, session_id: str, **more: Any) -> Reply:
        return self("POST", "/export_trajectories", {"session_id": session_id} | more)


@pytest.fixture
def admin(proxy: Server) -> Client:
    return Client(proxy.address)


@pytest.fixture
def session(admin: Client) -> tuple[str, Client]:
    started = admin("POST", "/rl/start_session", {"task_id": f"rules{next(_numbers)}"}).json()
    return started["session_id"], Client(admin.address, started["api_key"])


def in_background(call: Callable[[], Reply]) -> Callable[[], Reply]:
    """Start it; the result's call waits for the reply."""
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(call()), daemon=True)
    thread.start()

    def wait() -> Reply:
        thread.join(60)
        return replies[0]

    return wait


def hang_up_after_sending(client: Client, method: str, path: str, body: Any) -> None:
    """Send a request and reset the connection without reading a byte."""
    host, _, port = client.address.rpartition(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )


def lose_an_export(admin: Client, request: dict[str, Any]) -> None:
    """Ask for an export and hang up, until the proxy has seen one reply that did not arrive: a connection
    that is reset at once may never have been served at all."""
    before, until = undelivered(admin), time.monotonic() + 90
    while undelivered(admin) == before:
        assert time.monotonic() < until, "no export was lost"
        hang_up_after_sending(admin, "POST", "/export_trajectories", request)
        seen = time.monotonic() + 1
        while undelivered(admin) == before and time.monotonic() < seen:
            time.sleep(0.01)


def undelivered(admin: Client) -> int:
    found = re.search(
        r"^areal_fast_exports_undelivered_total (\d+)", admin("GET", "/metrics").body.decode(), re.M
    )
    assert found is not None
    return int(found[1])


def rewards_of(reply: Reply) -> list[float]:
    return [item["reward"] for item in reply.json()["interactions"].values()]


def test_an_engine_that_fails_is_502_and_leaves_nothing(engine: StandIn, session: tuple[str, Client]) -> None:
    """Chat: the engine's own error 502 with its status and text; a failed call leaves nothing behind."""
    engine.answer_next(Answer(status=500, text="out of cheese"))
    reply = session[1].chat()
    assert (
        reply.status == 502 and "500" in reply.json()["detail"] and "out of cheese" in reply.json()["detail"]
    )
    engine.answer_next(
        Answer(dies=True), Answer(dies=True)
    )  # a kept connection that ends is tried again once
    assert session[1].chat().status == 502
    assert session[1].reward().json()["detail"] == "No interactions in session"


def test_a_slow_engine_is_504(engine: StandIn, session: tuple[str, Client]) -> None:
    """Chat: engine timed out 504."""
    release = threading.Event()
    engine.answer_next(Answer(WORDS, hold=release))
    try:
        assert session[1].chat().status == 504
    finally:
        release.set()


def test_an_engine_that_fails_in_mid_stream(engine: StandIn, session: tuple[str, Client]) -> None:
    """Chat: `data: {"error":…}`, no [DONE], nothing recorded."""
    engine.answer_next(Answer(WORDS, breaks_after=2))
    reply = session[1].chat(stream=True)
    last = events(reply.body)[-1]
    assert reply.status == 200 and "error" in last
    assert session[1].reward().status == 400


def test_a_stream_comes_token_by_token(engine: StandIn, session: tuple[str, Client]) -> None:
    """Chat: streams as the engine does; what it adds up to is what is recorded."""
    engine.answer_next(Answer(WORDS))
    chunks = events(session[1].chat(stream=True).body)
    assert chunks[-1] == "[DONE]"
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:-1]]
    assert [piece for piece in pieces if piece] == [" meeting", " fair", " dro", " fish"]


def test_a_client_that_leaves_does_not_lose_its_turn(
    engine: StandIn, session: tuple[str, Client], admin: Client
) -> None:
    """Chat: the client gone, the engine's answer is still taken and recorded."""
    release, seen = threading.Event(), len(engine.received)
    engine.answer_next(Answer(WORDS, hold=release))
    body = {"messages": [{"role": "user", "content": "bye"}], "max_tokens": 8}
    hang_up_after_sending(session[1], "POST", "/chat/completions", body)
    engine.wait_for_call("/generate", seen)
    release.set()
    deadline = time.monotonic() + 30
    while (reply := session[1].reward()).status == 400 and time.monotonic() < deadline:
        assert reply.json()["detail"] == "No interactions in session"
    assert reply.json()["interaction_count"] == 1
    assert len(admin.export(session[0]).json()["interactions"]) == 1


def test_an_interaction_in_flight_stays_with_its_trajectory(
    engine: StandIn, session: tuple[str, Client], admin: Client
) -> None:
    """Rewards: it is added to the trajectory that was active when it started, if that is not yet exported."""
    name, client = session
    engine.answer_next(Answer(WORDS))
    client.chat("first")
    release, seen = threading.Event(), len(engine.received)
    engine.answer_next(Answer(WORDS, hold=release))
    second = in_background(lambda: client.chat("second"))
    engine.wait_for_call("/generate", seen)
    assert client.reward(1.0).json()["interaction_count"] == 1
    release.set()
    assert second().status == 200
    assert len(admin.export(name).json()["interactions"]) == 2
    assert client.reward().json()["detail"] == "No interactions in session"


def test_what_was_exported_is_gone_for_every_worker_at_once(
    engine: StandIn, session: tuple[str, Client], admin: Client
) -> None:
    """Export: one whose reply arrived is gone, whichever worker is asked next, and however soon."""
    name, client = session
    engine.answer_always(lambda call: Answer(WORDS))
    for _ in range(40):
        client.chat()
        client.reward()
        assert admin.export(name).status == 200
        assert client.reward().json().get("detail") == "No interactions in session"
        body = {"task_id": "other", "api_key": client.key}
        assert admin("POST", "/rl/start_session", body).status == 409


def test_an_interaction_that_outlives_its_trajectory_starts_no_other(
    engine: StandIn, session: tuple[str, Client], admin: Client
) -> None:
    """Rewards: else it is kept as late, and never becomes the first turn of the next episode."""
    name, client = session
    engine.answer_next(Answer(WORDS))
    client.chat("first")
    release, seen = threading.Event(), len(engine.received)
    engine.answer_next(Answer(WORDS, hold=release))
    late = in_background(lambda: client.chat("late"))
    engine.wait_for_call("/generate", seen)
    client.reward(1.0)
    assert len(admin.export(name).json()["interactions"]) == 1
    release.set()
    assert late().status == 200
    engine.answer_next(Answer(WORDS))
    client.chat("next episode")
    assert client.reward(2.0).json()["interaction_count"] == 1
    assert rewards_of(admin.export(name)) == [2.0]


@pytest.mark.slow
def test_an_export_whose_reply_was_never_read_is_given_again(
    engine: StandIn, session: tuple[str, Client], admin: Client
) -> None:
    """Export: a reply that never arrived is replayed to an identical request, also after removal. The reply
    is large, so that it cannot hide in the socket's buffers."""
    name, client = session
    turns = 300
    engine.answer_always(lambda call: Answer(WORDS))
    for turn in range(turns):
        assert client.chat(f"turn {turn}").status == 200
    client.reward()
    request = {"session_id": name, "remove_session": True}
    lose_an_export(admin, request)
    again = admin("POST", "/export_trajectories", request)
    assert again.status == 200 and len(again.json()["interactions"]) == turns
    assert admin("POST", "/export_trajectories", request).status == 404


@pytest.mark.slow
def test_a_lost_reply_is_replayed_although_something_newer_became_ready(
    engine: StandIn, session: tuple[str, Client], admin: Client
) -> None:
    """Export: replayed to an identical request; one that did arrive is gone, and an identical request means
    the next.
    """
    name, client = session
    turns = 300
    engine.answer_always(lambda call: Answer(WORDS))
    for turn in range(turns):
        assert client.chat(f"turn {turn}").status == 200
    client.reward(1.0)
    request = {"session_id": name}
    lose_an_export(admin, request)
    assert client.chat("next episode").status == 200
    assert client.reward(2.0).json()["trajectory_id"] == 1
    sizes = [len(admin("POST", "/export_trajectories", request).json()["interactions"]) for _ in range(2)]
    assert sizes == [turns, 1]


def test_removal_with_a_trajectory_takes_only_that(
    engine: StandIn, session: tuple[str, Client], admin: Client
) -> None:
    """Export: with a trajectory_id, remove_session takes only that trajectory; the session goes with the
    last.
    """
    name, client = session
    engine.answer_always(lambda call: Answer(WORDS))
    for value in (1.0, 2.0):
        client.chat()
        client.reward(value)
    first = admin.export(name, trajectory_id=0, remove_session=True)
    assert rewards_of(first) == [1.0]
    second = admin.export(name, trajectory_id=1, remove_session=True)
    assert rewards_of(second) == [2.0]
    assert admin.export(name).status == 404


def test_a_pause_that_the_engine_refuses_changes_nothing(
    proxy: Server, admin: Client, session: tuple[str, Client], engine: StandIn
) -> None:
    """Rules: if the engine fails, 502 and the flag as before (the original stays paused for ever)."""
    unreachable = socket.socket()
    unreachable.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{unreachable.getsockname()[1]}"
    assert admin("POST", "/configure_backend", {"backend_addr": address}).status == 200
    try:
        assert admin("POST", "/pause_generation").status == 502
        assert admin("GET", "/health").json()["paused"] is False
        assert session[1].chat().status == 502
    finally:
        assert admin("POST", "/configure_backend", {"backend_addr": engine.url}).status == 200
        unreachable.close()


def test_what_is_set_is_set_in_every_worker(admin: Client) -> None:
    """Rules: takes effect in every worker before the reply. Each request is a connection of its own."""
    for version in (11, 12, 13):
        assert admin("POST", "/set_version", {"version": version}).status == 200
        assert {admin("GET", "/get_version").json()["version"] for _ in range(24)} == {version}


def test_prompts_and_keys_that_do_not_fit(session: tuple[str, Client], admin: Client) -> None:
    """Chat: a prompt over the budget is 400. Sessions: the key is bound while its session is live."""
    assert session[1].chat("word " * 40000).status == 400
    body = {"task_id": "other", "api_key": session[1].key}
    assert admin("POST", "/rl/start_session", body).status == 409
    assert Client(admin.address, None).chat(max_tokens=4).status == 200
    assert Client(admin.address, "nobody's key").reward().status == 401


def test_a_group_starts_whole_or_not_at_all(admin: Client, session: tuple[str, Client]) -> None:
    """Sessions: all of a group start or none."""
    before = admin("GET", "/health").json()["sessions"]
    body = {"task_id": "whole", "api_key": session[1].key, "group_size": 5}
    assert admin("POST", "/rl/start_session", body).status == 409
    assert admin("GET", "/health").json()["sessions"] == before
    started = admin("POST", "/rl/start_session", body | {"api_key": None}).json()
    assert [member["session_id"] for member in started["sessions"]] == [f"whole-{n}" for n in range(5)]
    assert len({member["session_api_key"] for member in started["sessions"]}) == 5
