"""A load generator and a CPU meter for loopback benchmarks, small enough to be checked by reading.

`closed` keeps a number of connections busy: each sends its next request when the reply to the last is
complete. `open_loop` sends at fixed due times whatever the replies do, and counts a request's latency from
when it was *due*, so that a stalled server is charged for the requests that queued up meanwhile (no
coordinated omission). How late the generator itself was is reported beside it: where that is not small, the
machine was too busy to tell.

Requests are bytes made beforehand; replies are parsed just enough to find their end (Content-Length or
chunked). Everything is bounded in number and time, and goes to 127.0.0.1 only.

CPU is that of a whole process tree: every process's CPU clock, in nanoseconds (the kernel's own, ended
threads included), and the ticks of reaped children.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
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


class _Connection(asyncio.Protocol):
    """One keep-alive connection with one request outstanding. `waiter` gets (status, body)."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.waiter: asyncio.Future[tuple[int, bytes]] | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(exc or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        whole = self._reply()
        if whole is not None and self.waiter is not None and not self.waiter.done():
            self._buffer.clear()
            self.waiter.set_result(whole)

    def _reply(self) -> tuple[int, bytes] | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = bytes(self._buffer[:end]).lower()
        status, start = int(head[9:12]), end + 4
        at = head.find(b"content-length:")
        if at >= 0:
            length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            return (status, bytes(self._buffer[start:])) if len(self._buffer) >= start + length else None
        return (status, bytes(self._buffer[start:])) if self._buffer.endswith(b"0\r\n\r\n") else None

    def ask(self, data: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self.waiter = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self.waiter


async def _connect(address: str, count: int) -> list[_Connection]:
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(_Connection, host, int(port)))[1] for _ in range(count)]


def _close(connections: list[_Connection]) -> None:
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
    pool = await _connect(address, connections)

    async def drive(connection: _Connection) -> None:
        for data in source:
            began = time.perf_counter()
            status, body = await asyncio.wait_for(connection.ask(data), STALL_TIMEOUT_S)
            outcome.latencies.append(time.perf_counter() - began)
            _note(outcome, status, body, keep_bodies)

    began = time.perf_counter()
    try:
        await asyncio.gather(*(drive(connection) for connection in pool))
    finally:
        outcome.seconds = time.perf_counter() - began
        _close(pool)
        await asyncio.sleep(0)  # sockets close in the loop's next turn
    return outcome


async def conversation(
    address: str, lives: Iterator[Generator[bytes, bytes, None]], *, connections: int
) -> Outcome:
    """Lives of dependent requests: each is a generator that is sent every reply's body and yields the next
    request.
    """
    outcome = Outcome()
    pool = await _connect(address, connections)

    async def drive(connection: _Connection) -> None:
        for life in lives:
            began = time.perf_counter()
            data = next(life, None)
            while data is not None:
                status, answer = await asyncio.wait_for(connection.ask(data), STALL_TIMEOUT_S)
                _note(outcome, status, answer, False)
                try:
                    data = life.send(answer)
                except StopIteration:
                    data = None
            outcome.latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    try:
        await asyncio.gather(*(drive(connection) for connection in pool))
    finally:
        outcome.seconds = time.perf_counter() - began
        _close(pool)
        await asyncio.sleep(0)  # sockets close in the loop's next turn
    return outcome


async def open_loop(
    address: str, data: bytes, *, rate: float, stop: asyncio.Event, limit_s: float, connections: int = 64
) -> Outcome:
    """`rate` requests a second until `stop` or `limit_s`; `due` are perf_counter times, beside the latencies.

    A thread of its own keeps the time: an event loop's timers are rounded to milliseconds, a sleep is not.
    """
    outcome = Outcome()
    everyone = await _connect(address, connections)
    idle = deque(everyone)
    waiting: deque[float] = deque()
    running: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    over = threading.Event()

    async def one(connection: _Connection, due: float) -> None:
        while True:
            outcome.lateness.append(time.perf_counter() - due)
            status, body = await connection.ask(data)
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
        number = 0
        while not over.is_set():
            due = began + number / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            loop.call_soon_threadsafe(fire, due)
            number += 1

    began = time.perf_counter()
    clock = threading.Thread(target=keep_time, daemon=True)
    clock.start()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), limit_s)
    over.set()
    await asyncio.to_thread(clock.join)
    while running:
        await asyncio.wait(running, timeout=STALL_TIMEOUT_S)
    outcome.seconds = time.perf_counter() - began
    _close(everyone)
    await asyncio.sleep(0)
    return outcome


def _stat(pid: int) -> tuple[int, int] | None:
    """(parent, ticks of reaped children), or None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), int(fields[13]) + int(fields[14])


def tree(root: int) -> set[int]:
    """The process and all its living descendants."""
    parents = {
        int(name): found[0] for name in os.listdir("/proc") if name.isdigit() and (found := _stat(int(name)))
    }
    members = {root}
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    return members


def tree_cpu_s(root: int) -> float:
    """CPU seconds that the process tree has used so far, user and system."""
    return sum(_cpu_s(pid) + found[1] / TICKS_PER_S for pid in tree(root) if (found := _stat(pid)))


def _cpu_s(pid: int) -> float:
    """The process's own CPU time, by its clock (clock_getcpuclockid(3); 2 is CPUCLOCK_SCHED)."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def tree_rss_bytes(root: int) -> int:
    """Proportional resident memory (PSS) of the tree, so that what processes share counts once."""
    total = 0
    for pid in tree(root):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total
