"""A load generator for loopback benchmarks, small enough to be checked by reading.

`closed` keeps a number of connections busy: each sends its next request when the reply to the last is
complete. `open_loop` sends at fixed due times whatever the replies do, and counts a request's latency from
when it was *due*, so that a stalled server is charged for the requests that queued up meanwhile (no
coordinated omission). How late the generator itself was is reported beside it: where that is not small, the
machine was too busy to tell.

Requests are bytes made beforehand; replies are parsed just enough to find their end (Content-Length or
chunked). Everything is bounded in number and time, and goes to 127.0.0.1 only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import uvloop

STALL_TIMEOUT_S = 120.0


def request(method: str, path: str, body: object = None, key: str = "") -> bytes:
    """One HTTP/1.1 request, keep-alive; `body` becomes JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join([*lines, "", ""]).encode() + data


@dataclass
class Outcome:
    """Latencies in seconds, in the order of completion; `failures` counts replies that were no 2xx."""

    latencies: list[float] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    failures: int = 0
    first_failure: bytes = b""
    seconds: float = 0.0


def quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request outstanding. `waiter` gets (status, body); the body of a 2xx
    is counted and not kept unless that was asked for, so that 44 MB of it cost the generator little."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.waiter: asyncio.Future[tuple[int, bytes]] | None = None
        self._keep = True
        self._begin()

    def _begin(self) -> None:
        self._buffer = bytearray()  # the head, then the body
        self._status = 0  # 0: the head is not complete
        self._needed = 0  # bytes of body to come; -1: it is chunked
        self._last = b""  # the last five bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(exc or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._buffer += data
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).lower()
            self._status = int(head[9:12])
            at = head.find(b"content-length:")
            self._needed = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else -1
            data = bytes(self._buffer[end + 4 :])
            self._buffer.clear()
        if self._keep or self._status >= 300:
            self._buffer += data
        if self._needed >= 0:
            self._needed = max(0, self._needed - len(data))
            whole = not self._needed
        else:
            self._last = (self._last + data[-5:])[-5:]
            whole = self._last == b"0\r\n\r\n"
        if whole and self.waiter is not None and not self.waiter.done():
            status, body = self._status, bytes(self._buffer)
            self._begin()
            self.waiter.set_result((status, body))

    def ask(self, data: bytes, keep: bool = True) -> asyncio.Future[tuple[int, bytes]]:
        self._keep = keep
        self.waiter = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self.waiter


T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on uvloop: half the generator's cost a request, which shares its CPU with the engine."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def connect(address: str, count: int) -> list[Connection]:
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(Connection, host, int(port)))[1] for _ in range(count)]


def close(connections: list[Connection]) -> None:
    for connection in connections:
        connection.transport.close()


def _note(outcome: Outcome, status: int, body: bytes, keep: bool) -> None:
    if not 200 <= status < 300:
        outcome.failures += 1
        outcome.first_failure = outcome.first_failure or b"%d %b" % (status, body[:300])
    if keep:
        outcome.bodies.append(body)


async def closed(
    address: str, requests: Iterable[bytes], *, connections: int = 8, keep_bodies: bool = False
) -> Outcome:
    """Every request once, `connections` at a time. With `keep_bodies` the order of bodies is that of
    completion.
    """
    outcome, source = Outcome(), iter(requests)
    pool = await connect(address, connections)

    async def drive(connection: Connection) -> None:
        for data in source:
            began = time.perf_counter()
            status, body = await asyncio.wait_for(connection.ask(data, keep_bodies), STALL_TIMEOUT_S)
            outcome.latencies.append(time.perf_counter() - began)
            _note(outcome, status, body, keep_bodies)

    began = time.perf_counter()
    try:
        await asyncio.gather(*(drive(connection) for connection in pool))
    finally:
        outcome.seconds = time.perf_counter() - began
        close(pool)
        await asyncio.sleep(0)  # sockets close in the loop's next turn
    return outcome


async def conversation(
    address: str, lives: Iterator[Generator[bytes, bytes, None]], *, connections: int, each: bool = False
) -> Outcome:
    """Lives of dependent requests: a life is a generator that is sent every reply's body and yields the next
    request. Latencies are those of lives or, with `each`, of requests.
    """
    outcome = Outcome()
    pool = await connect(address, connections)

    async def drive(connection: Connection) -> None:
        for life in lives:
            began = time.perf_counter()
            data = next(life, None)
            while data is not None:
                status, answer = await asyncio.wait_for(connection.ask(data), STALL_TIMEOUT_S)
                _note(outcome, status, answer, False)
                if each:
                    outcome.latencies.append(time.perf_counter() - began)
                    began = time.perf_counter()
                try:
                    data = life.send(answer)
                except StopIteration:
                    data = None
            if not each:
                outcome.latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    try:
        await asyncio.gather(*(drive(connection) for connection in pool))
    finally:
        outcome.seconds = time.perf_counter() - began
        close(pool)
        await asyncio.sleep(0)  # sockets close in the loop's next turn
    return outcome


async def open_loop(
    address: str,
    requests: Iterator[bytes],
    *,
    rate: float,
    stop: asyncio.Event,
    limit_s: float,
    connections: int = 64,
) -> Outcome:
    """`rate` of `requests` a second until `stop` or `limit_s`; `due` are perf_counter times, beside the
    latencies.

    A thread of its own keeps the time: an event loop's timers are rounded to milliseconds, a sleep is not.
    Both threads run before all others of their CPU where that is allowed (`_first`), so that what shares the
    generator's CPU is not taken for the server's slowness.
    """
    outcome = Outcome()
    everyone = await connect(address, connections)
    idle = deque(everyone)
    waiting: deque[float] = deque()
    running: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    over = threading.Event()

    async def one(connection: Connection, due: float) -> None:
        while True:
            outcome.lateness.append(time.perf_counter() - due)
            try:
                status, body = await connection.ask(next(requests), False)
            except OSError as error:  # and this connection is no longer of use
                _note(outcome, 0, str(error).encode(), False)
                return
            outcome.latencies.append(time.perf_counter() - due)
            outcome.due.append(due)
            _note(outcome, status, body, False)
            if not waiting:
                idle.append(connection)
                return
            due = waiting.popleft()

    def fire(due: float) -> None:
        if idle:
            task = loop.create_task(one(idle.popleft(), due))
            running.add(task)
            task.add_done_callback(running.discard)
        else:
            waiting.append(due)

    def keep_time() -> None:
        _first(True)
        number = 0
        while not over.is_set():
            due = began + number / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            loop.call_soon_threadsafe(fire, due)
            number += 1

    _first(True)
    began = time.perf_counter()
    clock = threading.Thread(target=keep_time, daemon=True)
    clock.start()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), limit_s)
    over.set()
    await asyncio.to_thread(clock.join)
    while running:
        await asyncio.wait(running, timeout=STALL_TIMEOUT_S)
    _first(False)
    outcome.seconds = time.perf_counter() - began
    close(everyone)
    await asyncio.sleep(0)
    return outcome


def _first(yes: bool) -> None:
    """This thread before all ordinary ones of its CPU, or again one of them (sched(7)); its children are
    ordinary in any case. Wants CAP_SYS_NICE: without it nothing changes, and lateness tells."""
    policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK if yes else os.SCHED_OTHER
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(1 if yes else 0))
