"""The real proxy, two workers, before a network that means no good: each way to send, stall, leave or crowd.

What the HTTP layer does with bytes is tested close by in tests/unit/http and tests/property; here it is the
whole: settings, two processes on one socket, sessions behind it, and the log.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import ADMIN, WATCHDOG_S, Proxy, wait_until

MIB = 1 << 20
IDLE = 10_000


@contextlib.contextmanager
def descriptors(soft: int) -> Iterator[None]:
    """This process's soft limit, which children started meanwhile inherit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy("--max-body-bytes", "8M") as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=WATCHDOG_S)


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode()


def post(path: str, body: bytes, *lines: str) -> bytes:
    return head("POST", path, f"Content-Length: {len(body)}", *lines) + body


def chat_body(text: str = "hi", **fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 16, **fields}).encode()


def all_of(sock: socket.socket) -> bytes:
    """What comes until the other side closes; a reset is an end, too."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            got += piece
    return got


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def said(proxy: Proxy, data: bytes, *, half_close: bool = False) -> list[int]:
    """Statuses of all that is answered to `data` until the proxy closes."""
    with connect(proxy) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        return statuses(all_of(sock))


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


# -- ways to send ------------------------------------------------------------------------------------------
def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    data = head("GET", "/get_version") + head("GET", "/nothing") + post("/configure", b"{}")
    assert said(proxy, data + head("GET", "/get_version", "Connection: close")) == [200, 404, 200, 200]


def test_a_chunked_chat_is_a_chat(proxy: Proxy) -> None:
    body = chat_body()
    chunks = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in body) + b"0\r\n\r\n"
    data = head("POST", "/chat/completions", "Transfer-Encoding: chunked", "Connection: close") + chunks
    assert said(proxy, data) == [200]


def test_a_client_that_sends_no_more_gets_its_answer(proxy: Proxy) -> None:
    assert said(proxy, post("/chat/completions", chat_body()), half_close=True) == [200]


def test_oversized_is_refused_before_it_is_read(proxy: Proxy) -> None:
    assert said(proxy, head("POST", "/chat/completions", f"Content-Length: {9 * MIB}")) == [413]
    chunk = b"100000\r\n" + b"a" * MIB + b"\r\n"
    data = head("POST", "/chat/completions", "Transfer-Encoding: chunked") + chunk * 9
    assert said(proxy, data) in ([413], [])  # what is still sent may make a reset overtake the answer
    assert said(proxy, head("GET", "/" + "a" * 20000)) == [414]
    assert said(proxy, head("GET", "/", "A: " + "a" * 70000)) == [431]


def test_expect_continue_is_answered_before_the_body_comes(proxy: Proxy) -> None:
    body = chat_body()
    with connect(proxy) as sock:
        sock.sendall(
            post("/chat/completions", body, "Expect: 100-continue", "Connection: close")[: -len(body)]
        )
        assert statuses(sock.recv(65536)) == [100]
        sock.sendall(body)
        assert statuses(all_of(sock)) == [200]
    too_large = head("POST", "/chat/completions", f"Content-Length: {9 * MIB}", "Expect: 100-continue")
    assert said(proxy, too_large) == [413], "nobody is asked to send what will be refused"


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: +5",),
        ("Content-Length : 5",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding:\x0bchunked",),
        ("X: a\nTransfer-Encoding: chunked",),
        ("Host: b",),
    ],
    ids=repr,
)
def test_smuggling_is_refused_and_what_follows_is_no_request(proxy: Proxy, lines: tuple[str, ...]) -> None:
    smuggled = post("/rl/start_session", b'{"task_id":"smuggled"}', f"Authorization: Bearer {ADMIN}")
    found = said(proxy, head("POST", "/configure", *lines) + b"0\r\n\r\n" + smuggled)
    assert len(found) == 1
    assert found[0] in (400, 501)
    assert proxy.log("smuggled") == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 501, 505)),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), (400,)),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", (501,)),
        (head("TRACE", "/health", "Connection: close"), (405,)),
        (head("BREW", "/health"), (501,)),
    ],
    ids=["http2", "tls", "connect", "trace", "unknown"],
)
def test_what_is_not_spoken_here_gets_one_answer(
    proxy: Proxy, data: bytes, expected: tuple[int, ...]
) -> None:
    lines = len(proxy.lines)
    found = said(proxy, data)
    assert len(found) == 1
    assert found[0] in expected
    assert len(proxy.lines) - lines <= 1


# -- clients that leave ------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["in the head", "before the body", "in the body", "after the body"])
def test_a_client_gone_before_its_answer_leaves_nothing_broken(proxy: Proxy, stage: str) -> None:
    _, key = proxy.start("gone")
    data = post("/chat/completions", chat_body("x" * 1000), f"Authorization: Bearer {key}")
    body_at = data.index(b"\r\n\r\n") + 4
    upto = {"in the head": 20, "before the body": body_at, "in the body": -100, "after the body": len(data)}
    for leave in (reset, socket.socket.close):
        sock = connect(proxy)
        sock.sendall(data[: upto[stage]])
        leave(sock)
    assert proxy.chat(key).status == 200
    wait_until(lambda: proxy.engine_stats()["in_flight"] == 0, "the engine is done")
    if stage == "after the body":  # a reset may take the request with it, an orderly end does not
        assert 2 <= proxy.reward(key).json["interaction_count"] <= 3
    else:
        assert proxy.reward(key).json["interaction_count"] == 1
    assert proxy.log(" fault ") == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_gone_while_the_engine_works_is_recorded_all_the_same(proxy: Proxy, stream: bool) -> None:
    _, key = proxy.start("left")
    proxy.engine(token_latency_s=0.02)
    try:
        sock = connect(proxy)
        body = chat_body(stream=stream, max_tokens=20)
        sock.sendall(post("/chat/completions", body, f"Authorization: Bearer {key}"))
        wait_until(lambda: proxy.engine_stats()["in_flight"], "the engine works")
        if stream:
            assert statuses(sock.recv(65536)) == [200]
        reset(sock)
        wait_until(lambda: proxy.engine_stats()["in_flight"] == 0, "the engine is done")
    finally:
        proxy.engine(token_latency_s=0.0)
    answer = wait_until(lambda: (found := proxy.reward(key)).status == 200 and found, "the turn was recorded")
    assert answer.json["interaction_count"] == 1
    assert proxy.log(" fault ") == []


def test_streams_that_nobody_reads_end_and_are_recorded(proxy: Proxy) -> None:
    """What waits for such a client is bounded; its turn is kept, and the worker serves others meanwhile."""
    before = sum(map(rss_bytes, proxy.worker_pids()))
    keys = [proxy.start("unread")[1] for _ in range(6)]
    socks = []
    try:
        for key in keys:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", proxy.port))
            socks.append(sock)
            body = chat_body("tell", stream=True, max_tokens=20000)
            sock.sendall(post("/chat/completions", body, f"Authorization: Bearer {key}"))
        for sock in socks:
            assert select.select([sock], [], [], WATCHDOG_S)[0], "it begins"
        assert proxy.ask("GET", "/get_version").status == 200
        wait_until(lambda: proxy.engine_stats()["in_flight"] == 0, "the engine is done")
        for key in keys:
            wait_until(lambda key=key: proxy.reward(key).status == 200, "the turn was recorded")
        assert sum(map(rss_bytes, proxy.worker_pids())) - before < len(keys) * 24 * MIB
    finally:
        for sock in socks:
            sock.close()


@pytest.mark.slow
# -- clients that stall: slow ones are timed by the layer's own limits, so these wait some seconds ---------
def test_slow_heads_are_timed_out_together(proxy: Proxy) -> None:
    """Fifty dripping heads cost ten seconds, and nobody else waits for them."""
    socks = [connect(proxy) for _ in range(50)]
    for sock in socks:
        sock.sendall(b"GET /health HT")
    began = time.monotonic()
    while time.monotonic() - began < 2.0:
        assert proxy.ask("GET", "/get_version").status == 200
        for sock in socks:
            sock.sendall(b"T")
    for sock in socks:
        with sock:
            assert statuses(all_of(sock)) in ([408], [400])


# -- crowds ------------------------------------------------------------------------------------------------
def test_ten_thousand_idle_connections() -> None:
    """They are all served once, stay, and cost the others nothing but memory."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < IDLE + 500:
        pytest.skip(f"needs {IDLE + 500} descriptors, and the hard limit is {hard}")
    with descriptors(IDLE + 500 if hard == resource.RLIM_INFINITY else hard), Proxy() as proxy:
        before = sum(map(rss_bytes, proxy.worker_pids()))
        socks: list[socket.socket] = []
        try:
            request = head("GET", "/get_version")
            for begin in range(0, IDLE, 500):
                batch = [connect(proxy) for _ in range(begin, begin + 500)]
                socks += batch
                for sock in batch:
                    sock.sendall(request)
                for sock in batch:
                    assert statuses(sock.recv(4096)) == [200]
            assert proxy.ask("GET", "/health").status == 200
            _, key = proxy.start("crowd")
            assert proxy.chat(key).status == 200
            for sock in socks[:: IDLE // 100]:
                sock.sendall(request)
                assert statuses(sock.recv(4096)) == [200], "an idle one was dropped"
            grown = sum(map(rss_bytes, proxy.worker_pids())) - before
            assert grown < IDLE * 16384, f"{grown / IDLE:.0f} bytes a connection"
        finally:
            for sock in socks:
                sock.close()
        assert proxy.log(" fault ") == []


def test_descriptors_running_out() -> None:
    """The proxy stays up, says so without flooding its log, and serves who waits as soon as others go."""
    with Proxy(workers=1, hard_descriptors=128) as proxy:
        pids = proxy.worker_pids()
        socks = [connect(proxy) for _ in range(200)]
        try:
            for sock in socks:
                sock.sendall(head("GET", "/get_version"))
            assert statuses(socks[0].recv(4096)) == [200]
            wait_until(lambda: proxy.log("not accepting connections"), "the log says so")
            for sock in socks[:150]:
                sock.close()
            for sock in socks[150:]:
                assert statuses(sock.recv(4096)) == [200]
        finally:
            for sock in socks:
                sock.close()
        assert proxy.worker_pids() == pids
        _, key = proxy.start("after")
        assert proxy.chat(key).status == 200
        # those who waited may all come before it is seen that others have gone: then it is full once more
        assert len(proxy.log("not accepting connections")) <= 2
        assert proxy.log(" fault ") == []


def test_bodies_of_all_connections_together_are_bounded() -> None:
    """One worker, forty clients of 15 MiB each, none of whom ends: most are told to come back, memory
    stays, and small requests are served all along."""
    with Proxy("--max-body-bytes", "16M", workers=1) as proxy:
        (pid,) = proxy.worker_pids()
        before = rss_bytes(pid)
        data = head("POST", "/configure", f"Content-Length: {15 * MIB}") + b"a" * (14 * MIB)
        socks: dict[socket.socket, int] = {}
        with selectors.DefaultSelector() as selector:
            for _ in range(40):
                sock = connect(proxy)
                sock.setblocking(False)
                socks[sock] = 0
                selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
            deadline = time.monotonic() + WATCHDOG_S
            while any(sent < len(data) for sent in socks.values()):
                assert time.monotonic() < deadline
                for key, events in selector.select(1.0):
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    with contextlib.suppress(BlockingIOError):
                        try:
                            if events & selectors.EVENT_READ:
                                answer = sock.recv(65536)
                                if answer:
                                    assert statuses(answer) == [503]
                                    assert b"retry-after: 1" in answer
                                socks[sock] = len(data)
                            else:
                                socks[sock] += sock.send(memoryview(data)[socks[sock] : socks[sock] + MIB])
                        except ConnectionError:
                            socks[sock] = len(data)
                    if socks[sock] >= len(data):
                        selector.unregister(sock)
        # an answer, an end or a reset is there to be read where a client was turned away
        wait_until(lambda: len(select.select(list(socks), [], [], 0)[0]) >= 20, "256 MiB hold 18 of these")
        assert rss_bytes(pid) - before < 400 * MIB
        assert proxy.ask("GET", "/health").status == 200
        _, session_key = proxy.start("small")
        assert proxy.chat(session_key).status == 200
        for sock in socks:
            sock.close()
        assert proxy.log(" fault ") == []
