"""Seeded fuzzing of the HTTP layer: whatever comes, nothing crashes, hangs, or ends in a 500.

    python -m tests.fuzz.http_fuzz --seed 1 --seconds 60          # prints its seed; a finding names its case
    pytest tests/fuzz/http_fuzz.py                                # a short run with a fixed number of cases

A case is some messages, mutated, cut and sent to a real server over a socket, sometimes reset or half closed
in the middle. Checked: every reply is well-formed HTTP with a status that the layer gives; the handler never
sees a request of which the parser alone (fed the same bytes) knows nothing; the server answers a plain
request afterwards; no connection, task or exception is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import time

import uvloop

from areal_fast.http import Exchange, Limits
from areal_fast.http.head import ProtocolError
from areal_fast.http.parser import END, ReplyParser, RequestParser
from tests.unit.http.serving import Raw, Serving, chunked, echo, get, post, serving, until
from tests.unit.http.test_parser import SMUGGLING

LIMITS = Limits(
    max_body_bytes=2000,
    max_header_bytes=1000,
    max_request_line_bytes=300,
    max_headers=20,
    max_pipelined_bytes=500,
    header_timeout_s=0.2,
    body_timeout_s=0.2,
    idle_timeout_s=0.2,
    linger_timeout_s=0.2,
    write_timeout_s=5.0,
)
EXPECTED = frozenset({100, 200, 400, 408, 413, 414, 417, 431, 501, 505})
TOKENS = [
    *(
        b"\r\n",
        b"\r",
        b"\n",
        b"\0",
        b" ",
        b"\t",
        b":",
        b";",
        b",",
        b"0",
        b"\r\n\r\n",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"%",
    ),
    *(
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"Connection: close\r\n",
    ),
    *(
        b"ffffffffffffffff",
        b"-1",
        b"0\r\n\r\n",
        b"\xff\xfe",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"A" * 400,
    ),
]


def message(rng: random.Random) -> bytes:
    kind = rng.randrange(7)
    if kind == 0:
        return get(rng.choice(["/", "/slow", "/stream", "/a?b", "/%41"]))
    if kind == 1:
        return post(rng.randbytes(rng.randrange(300)))
    if kind == 2:
        return chunked(*[rng.randbytes(rng.randrange(1, 50)) for _ in range(rng.randrange(6))])
    if kind == 3:
        return rng.choice(sorted(SMUGGLING.values()))
    if kind == 4:
        return post(b"x" * rng.randrange(4000), "/", "Expect: 100-continue")
    if kind == 5:
        return rng.randbytes(rng.randrange(1, 60))
    return get("/", "Connection: " + rng.choice(["close", "keep-alive", "upgrade"]))


def case(rng: random.Random) -> list[bytes]:
    """Pieces to send one by one."""
    data = bytearray(b"".join(message(rng) for _ in range(rng.randrange(1, 5))))
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        put = rng.choice([b"", rng.choice(TOKENS), rng.randbytes(2)])
        data[at : at + rng.choice([0, 0, 1, 3, 20])] = put
    edges = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 1, 3])))})
    return [bytes(data[a:b]) for a, b in itertools.pairwise(edges)]


def handler(exchange: Exchange) -> object:
    if exchange.path == "/slow":

        async def slow() -> None:
            await asyncio.sleep(0.001)
            echo(exchange)

        return slow()
    if exchange.path == "/stream":

        async def stream() -> None:
            exchange.start(200, b"text/event-stream")
            for _ in range(3):
                exchange.write(b"data: x\n\n")
                await exchange.drain()
                await asyncio.sleep(0)
            exchange.finish()

        return stream()
    echo(exchange)
    return None


def requests_in(pieces: list[bytes]) -> int:
    """Whole requests that the parser alone finds."""
    parser = RequestParser(
        LIMITS.max_body_bytes, LIMITS.max_header_bytes, LIMITS.max_request_line_bytes, LIMITS.max_headers
    )
    parser.feed(b"".join(pieces))
    found = 0
    with contextlib.suppress(ProtocolError):
        while (event := parser.next()) is not None:
            found += event is END
    return found


def statuses(data: bytes) -> list[int]:
    """Statuses of the replies in `data`; raises ProtocolError if it is not a row of replies."""
    found = []
    while data:
        interim = data.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        if interim:
            data = data[len(b"HTTP/1.1 100 Continue\r\n\r\n") :]
            continue
        parser = ReplyParser(1 << 20, 65536)
        parser.feed(data)
        while (event := parser.next()) is not END:
            if event is None:
                parser.feed_eof()
            elif not isinstance(event, bytes):
                found.append(event.status)  # type: ignore[union-attr]
        data = data[len(data) - parser.buffered :]
    return found


async def play(served: Serving, rng: random.Random) -> None:
    pieces = case(rng)
    raw: Raw = await served.connect()
    end = rng.randrange(8)
    try:
        for piece in pieces:
            await raw.send(piece)
            if rng.random() < 0.5:
                await asyncio.sleep(0)
        if end == 0:
            raw.reset()
            return
        if end < 4:
            raw.writer.write_eof()
        got = await raw.ended()
    except (ConnectionError, OSError):
        return
    finally:
        await raw.close()
        served._raw.remove(raw)
    if b" HEAD " not in b"".join(pieces) and not b"".join(pieces).startswith(b"HEAD"):
        seen = statuses(got)
        assert set(seen) <= EXPECTED, seen
        assert seen.count(200) <= requests_in(pieces), (seen, pieces)


async def fuzz(seed: int, *, cases: int = 0, seconds: float = 0.0) -> int:
    done = 0
    until_time = time.monotonic() + seconds
    async with serving(handler, LIMITS) as served:  # type: ignore[arg-type]
        while done < cases or time.monotonic() < until_time:
            number = done
            done += 1
            try:
                await asyncio.wait_for(play(served, random.Random(f"{seed}/{number}")), 20)
                assert not served.errors, served.errors
                if number % 20 == 0:
                    assert (await served.ask(get())).status == 200
            except BaseException:
                print(
                    f"seed {seed}, case {number}: {case(random.Random(f'{seed}/{number}'))}", file=sys.stderr
                )
                raise
        await until(lambda: served.server.connections <= len(served._raw))
    assert not served.server.connections
    return done


def test_short() -> None:
    assert uvloop.run(fuzz(7, cases=300)) == 300


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments.add_argument("--seconds", type=float, default=30.0)
    chosen = arguments.parse_args()
    print(f"seed {chosen.seed}")
    print(f"{uvloop.run(fuzz(chosen.seed, seconds=chosen.seconds))} cases")


if __name__ == "__main__":
    main()
