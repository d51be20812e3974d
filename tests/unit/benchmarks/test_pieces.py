"""The benchmarks' own pieces: the load generator counts right, ratios and verdicts say what they mean."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable

import pytest

from benchmarks import load, meter, per_request, soak, targets

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _beside(serve: Serve, use: Callable[[str], Awaitable[load.Outcome]]) -> load.Outcome:
    """`use(address)` beside a server whose connections are served by `serve` until they end."""
    open_ones: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_ones.add(task)
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    try:
        return await use(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        await asyncio.gather(*open_ones)
        server.close()
        await server.wait_closed()


def test_every_request_is_sent_once_and_failures_are_counted() -> None:
    good = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    bad = b"HTTP/1.1 507 Full\r\ncontent-length: 4\r\n\r\nfull"
    answers = iter([good, chunked, bad, good, good, good])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(next(answers))

    async def use(address: str) -> load.Outcome:
        return await load.closed(address, [load.request("GET", "/")] * 6, connections=1, keep_bodies=True)

    outcome = asyncio.run(_beside(serve, use))
    assert len(outcome.latencies) == 6 and outcome.failures == 1
    assert outcome.first_failure == b"507 full"
    assert outcome.bodies[0] == b"ok"


def test_the_open_loop_charges_a_stall_to_all_that_were_due_during_it() -> None:
    """A server that answers nobody until four have asked: who was due first has waited longest."""

    async def run() -> load.Outcome:
        release, stop = asyncio.Event(), asyncio.Event()
        asked = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            while await reader.readuntil(b"\r\n\r\n"):
                asked += 1
                if asked >= 4:
                    release.set()
                    stop.set()
                await release.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

        async def use(address: str) -> load.Outcome:
            requests = itertools.repeat(load.request("GET", "/"))
            return await load.open_loop(address, requests, rate=50, stop=stop, limit_s=60, connections=4)

        return await _beside(serve, use)

    outcome = asyncio.run(run())
    stalled = sorted(zip(outcome.due, outcome.latencies, strict=True))[:4]
    assert [latency for _, latency in stalled] == sorted((latency for _, latency in stalled), reverse=True)


def test_a_connection_that_breaks_in_the_open_loop_is_a_failure() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def use(address: str) -> load.Outcome:
        requests = itertools.repeat(load.request("GET", "/"))
        return await load.open_loop(
            address, requests, rate=200, stop=asyncio.Event(), limit_s=0.2, connections=1
        )

    outcome = asyncio.run(_beside(serve, use))
    assert outcome.failures and not outcome.latencies
    with pytest.raises(SystemExit):
        targets.checked(outcome)


@pytest.mark.parametrize("keep", [True, False])
def test_a_reply_ends_where_it_ends_however_it_is_cut(keep: bool) -> None:
    """Content-Length and chunks, a byte at a time; a body that is not wanted is not kept, a failure's is."""
    lengthy = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n0\r\n\r\nab"
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    bad = b"HTTP/1.1 404 No\r\ncontent-length: 2\r\n\r\nno"

    async def replies() -> list[tuple[int, bytes]]:
        connection, found = load.Connection(), []
        connection.transport = NoTransport()  # type: ignore[assignment]
        for reply in (lengthy, chunked, bad):
            waiter = connection.ask(b"", keep)
            for at in range(len(reply)):
                assert not waiter.done()
                connection.data_received(reply[at : at + 1])
            found.append(waiter.result())
        return found

    bodies = [b"0\r\n\r\nab", b"2\r\nok\r\n0\r\n\r\n"] if keep else [b"", b""]
    assert asyncio.run(replies()) == [(200, bodies[0]), (200, bodies[1]), (404, b"no")]


class NoTransport:
    def write(self, data: bytes) -> None:
        pass


def test_cpu_of_a_tree_grows_with_work() -> None:
    before = meter.tree_cpu_s(os.getpid())
    while meter.tree_cpu_s(os.getpid()) < before + 0.05:
        sum(range(100_000))
    assert os.getpid() in meter.tree(os.getpid())


def test_quantiles() -> None:
    assert load.quantile(range(1000), 0.5) == 500
    assert load.quantile(range(1000), 0.999) == 999
    assert load.quantile([], 0.5) != load.quantile([], 0.5), "nothing was measured: not a number"


def test_ratios_are_taken_within_rounds() -> None:
    """Two rounds on a machine that became half as fast: the ratio is 10 in both."""
    mine = [{"cpu_ms": 1.0, "per_second": 100.0}, {"cpu_ms": 2.0, "per_second": 50.0}]
    theirs = [{"cpu_ms": 10.0, "per_second": 10.0}, {"cpu_ms": 20.0, "per_second": 5.0}]
    found = per_request.ratios({"ours": mine, "original": theirs}, "original")
    cpu = {"cpu": 10.0, "cpu_min": 10.0, "cpu_max": 10.0}
    assert found == cpu | {"per_second": 10.0, "per_second_min": 10.0, "per_second_max": 10.0}
    assert per_request.ratios({"ours": mine}, "original") == {}


def _windows(**series: list[float]) -> list[dict[str, float]]:
    steady = {"resident_mib": 200.0, "descriptors": 30.0, "granules": 50.0, "chat_p50_ms": 2.0}
    return [steady | {name: values[i] for name, values in series.items()} for i in range(24)]


@pytest.mark.parametrize("name", sorted(soak.ALLOWED))
def test_the_soak_sees_what_keeps_growing(name: str) -> None:
    grows = [100.0 * 1.2**i for i in range(24)]
    assert [line.split()[0] for line in soak.verdict(_windows(**{name: grows}))] == [name]


def test_the_soak_forgives_warm_up_and_noise() -> None:
    warm = [20.0 * i if i < 8 else 160.0 + i % 3 for i in range(24)]
    assert soak.verdict(_windows(resident_mib=warm, granules=[50.0 + 900 * (i % 2) for i in range(24)])) == []


def test_a_life_of_the_soak_ends_or_is_abandoned() -> None:
    started = b'{"sessions":[{"session_id":"s","session_api_key":"k"}]}'
    exported = b'{"traj":{"x":{"data":{"shard":{"data":{"shard_id":"a"}}}}}}'

    def paths(number: int) -> list[str]:
        steps, asked = soak.life(number), []
        data = next(steps)
        while True:
            asked.append(data.split()[1].decode())
            reply = started if asked[-1] == "/rl/start_session" else exported
            try:
                data = steps.send(reply)
            except StopIteration:
                return asked

    whole = paths(2)
    assert whole[0] == "/rl/start_session" and whole[-1] == "/data/clear"
    assert whole.count("/chat/completions") == 3
    assert set(paths(soak.ABANDON_EVERY)) == {"/rl/start_session", "/chat/completions"}


def test_workers_are_placed_where_they_are_told() -> None:
    before = os.sched_getaffinity(0)
    try:
        targets.place([os.getpid()], [min(before)])
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
