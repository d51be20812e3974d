"""Shards by each way, in and out, beside AReaL 1.0.4's own JSON, a bare loopback socket, and memcpy.

    python -m benchmarks shard_ways [--count 32] [--bytes 1048576] [--rounds 5] [--repeat 6] [--original]

One batch of `count` shards is put and fetched by every way, in turns, from a proxy with one worker on this
machine; each round takes every way once, every second round in the other order. For each way: bytes a second
as the client sees them, and CPU seconds a GiB of the proxy's whole process tree and of the client; and the
same a shard. "socket" is what the loopback carries between two processes that do nothing else: one, on the
proxy's CPU, sends a block of memory, the other receives into one. A ratio is taken within a round. Mapping,
which should cost the same whatever is mapped, is also measured on shards of a sixteenth and of 16 times that
size.

Clients receive into memory that is there already, as the loopback's does. JSON is not decoded here, and a
mapped shard is not read: what a reader does with its bytes is the reader's, whatever the way. --original
starts AReaL 1.0.4's data proxy (tests/wire/areal_env.py) beside ours and asks it for the same JSON.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from areal_fast.shards import raw
from areal_fast.shards.description import describe
from areal_fast.shards.local import LocalShards
from benchmarks import meter
from benchmarks.command import Progress, begun, flags, kept, parsed, spread
from benchmarks.targets import USABLE, Target, engine, place, proxy, step_aside

GIB = 1 << 30
JSON_TYPE = {"content-type": "application/json"}
Act = Callable[[], object]


class Way:
    """How one batch of `count` shards, `nbytes` in all, goes: `act`, after `once` a round and `before` each
    time. rounds: seconds a batch, CPU s of the tree of `pid`, the same of this process."""

    def __init__(
        self,
        act: Act,
        pid: int,
        nbytes: int,
        count: int,
        *,
        once: Act | None = None,
        before: Act | None = None,
    ) -> None:
        self.act = act
        self.pid = pid
        self.nbytes = nbytes
        self.count = count
        self.once = once
        self.before = before
        self.rounds: list[tuple[float, float, float]] = []

    def measure(self, repeat: int) -> None:
        wall = cpu = own = 0.0
        if self.once is not None:
            self.once()
        for _ in range(repeat):
            if self.before is not None:
                self.before()
            cpu -= meter.tree_cpu_s(self.pid) if self.pid else 0.0
            own -= time.process_time()
            wall -= time.perf_counter()
            self.act()
            wall += time.perf_counter()
            own += time.process_time()
            cpu += meter.tree_cpu_s(self.pid) if self.pid else 0.0
        self.rounds.append((wall / repeat, cpu / repeat, own / repeat))

    def found(self, socket: Way) -> dict[str, Any]:
        """Of its rounds, beside the socket's."""
        wall, cpu, own = zip(*self.rounds, strict=True)
        rates = [self.nbytes / one for one in wall]
        base = [socket.nbytes / one for one, _, _ in socket.rounds]
        return {
            "mb_s": spread(rate / 1e6 for rate in rates),
            "of_socket": spread(rate / other for rate, other in zip(rates, base, strict=True)),
            "proxy_s_a_gib": spread(one * GIB / self.nbytes for one in cpu),
            "client_s_a_gib": spread(one * GIB / self.nbytes for one in own),
            "us_a_shard": spread(1e6 * one / self.count for one in wall),
            "proxy_us_a_shard": spread(1e6 * one / self.count for one in cpu),
            "client_us_a_shard": spread(1e6 * one / self.count for one in own),
        }


@contextlib.contextmanager
def loopback(nbytes: int) -> Iterator[tuple[int, Act]]:
    """(sender's pid, a fetch of `nbytes`) over a TCP connection to a forked process."""
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        block = os.urandom(nbytes)
        while sock.recv(1):
            sock.sendall(block)
        os._exit(0)
    with listener, socket.create_connection(listener.getsockname()) as sock:
        into = memoryview(bytearray(nbytes))

        def fetch() -> None:
            sock.send(b"x")
            at = 0
            while at < nbytes:
                at += sock.recv_into(into[at:])

        yield pid, fetch
    os.waitpid(pid, 0)


class Http:
    """One kept connection; replies go into one buffer."""

    def __init__(self, address: str, nbytes: int) -> None:
        self.connection = http.client.HTTPConnection(address, timeout=300)
        self._into = memoryview(bytearray(2 * nbytes + (1 << 20)))

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> int:
        """Bytes of the reply. A connection that was closed while other ways had their turn is opened anew."""
        try:
            self.connection.request(method, path, body, headers)
            reply = self.connection.getresponse()
        except (ConnectionError, http.client.HTTPException):
            self.connection.close()
            self.connection.request(method, path, body, headers)
            reply = self.connection.getresponse()
        at = 0
        while read := reply.readinto(self._into[at:]):
            at += read
        if reply.status != 200:
            raise RuntimeError(f"{method} {path}: {reply.status} {bytes(self._into[: min(at, 200)])!r}")
        return at

    def ways(self, ids: list[str], blocks: list[bytes]) -> dict[str, Act]:
        """By name: the JSON of the original, which ours speaks as well."""
        listed = json.dumps({"shard_ids": ids}).encode()
        bodies = [
            json.dumps(
                {
                    "type": "tensor",
                    "data": base64.b64encode(block).decode(),
                    "shape": [len(block) // 4],
                    "dtype": "torch.float32",
                }
            ).encode()
            for block in blocks
        ]

        def put() -> None:
            for shard_id, body in zip(ids, bodies, strict=True):
                self.ask("PUT", f"/data/{shard_id}", body, JSON_TYPE)

        def clear() -> None:
            self.ask("DELETE", "/data/clear", listed, JSON_TYPE)

        return {"put": put, "get": lambda: self.ask("POST", "/data/batch", listed, JSON_TYPE), "clear": clear}


def our_ways(
    target: Target, local: LocalShards, over: Http, ids: list[str], blocks: list[bytes]
) -> dict[str, Way]:
    """By name."""
    json_ways = over.ways(ids, blocks)
    what = describe("float32", (len(blocks[0]) // 4,))
    layout = raw.lay_out([(shard_id, what) for shard_id in ids])
    file = layout.header + b"".join(blocks)
    listed = json.dumps({"shard_ids": ids}).encode()
    nbytes, count = sum(map(len, blocks)), len(blocks)

    def put_raw() -> None:
        over.ask("PUT", "/data/batch", file, {"content-type": raw.MEDIA_TYPE})

    def get_raw() -> None:
        over.ask("POST", "/data/batch", listed, {**JSON_TYPE, "accept": raw.MEDIA_TYPE})

    def way(act: Act, *, once: Act | None = None, before: Act | None = None) -> Way:
        return Way(act, target.pid, nbytes, count, once=once, before=before)

    put_files, map_all, clear = by_file(local, ids, blocks), lambda: local.map(ids), json_ways["clear"]
    return {
        "put raw": way(put_raw, before=clear),
        "put json": way(json_ways["put"], before=clear),
        "put by file": way(put_files, before=clear),
        "get raw": way(get_raw, once=put_raw),
        "get raw of files": way(get_raw, once=put_files),
        "get json": way(json_ways["get"], once=put_raw),
        "map files": way(map_all, once=put_files),
        "map after a raw put": way(map_all, before=put_raw),
    }


def by_file(local: LocalShards, ids: list[str], blocks: list[bytes]) -> Act:
    what = describe("float32", (len(blocks[0]) // 4,))

    def put() -> None:
        for shard_id, block in zip(ids, blocks, strict=True):
            local.put_bytes(shard_id, what, block)

    return put


def maps_of(target: Target, local: LocalShards, count: int, size: int) -> Way:
    """Mapping of shards of another size."""
    ids, blocks = [f"of-{size}-{i}" for i in range(count)], [os.urandom(size)] * count
    return Way(lambda: local.map(ids), target.pid, size * count, count, once=by_file(local, ids, blocks))


def table(ways: dict[str, dict[str, Any]]) -> str:
    """A line a way: medians, and extremes of what is compared."""
    lines = [
        f"{'way':22}{'MB/s':>8}{'of the socket':>22}{'proxy s/GiB':>24}{'client':>8}{'µs a shard, CPU':>24}"
    ]
    for name, one in ways.items():
        share, cpu = one["of_socket"], one["proxy_s_a_gib"]
        both = one["proxy_us_a_shard"]["median"] + one["client_us_a_shard"]["median"]
        lines.append(
            f"{name:22}{one['mb_s']['median']:8.0f}"
            f"{share['median']:8.2f} [{share['min']:5.2f},{share['max']:6.2f}]"
            f"{cpu['median']:9.3f} [{cpu['min']:.3f}, {cpu['max']:.3f}]"
            f"{one['client_s_a_gib']['median']:8.3f}{one['us_a_shard']['median']:14.0f}{both:10.0f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    ids = [f"shard-{i}" for i in range(options.count)]
    blocks = [os.urandom(options.bytes) for _ in ids]
    nbytes = options.count * options.bytes
    step_aside()
    with contextlib.ExitStack() as stack:
        sender, fetch = stack.enter_context(loopback(nbytes))
        place([sender], USABLE[-1:])
        into, block = memoryview(bytearray(nbytes)), os.urandom(nbytes)
        ways = {
            "socket": Way(fetch, sender, nbytes, options.count),
            "memcpy": Way(lambda: into.__setitem__(slice(None), block), 0, nbytes, options.count),
        }
        arena, body = max(256 << 20, 4 * nbytes) + 17 * nbytes, 2 * nbytes + (64 << 20)
        room = ("--arena-max-bytes", str(arena), "--max-body-bytes", str(body))
        backend = stack.enter_context(engine())
        target = stack.enter_context(proxy("ours", backend, *room))
        local = stack.enter_context(LocalShards(target.ask("/data/ways")["local"]))
        ways |= our_ways(target, local, Http(target.address, nbytes), ids, blocks)
        for size in (options.bytes // 16, options.bytes * 16):
            ways[f"map files, {size >> 10} KiB"] = maps_of(target, local, options.count, size)
        if options.original:
            theirs = stack.enter_context(proxy("original", backend))
            acts = Http(theirs.address, nbytes).ways(ids, blocks)
            put = Way(acts["put"], theirs.pid, nbytes, options.count, before=acts["clear"])
            get = Way(acts["get"], theirs.pid, nbytes, options.count, once=acts["put"])
            ways |= {"original: put json": put, "original: get json": get}
        said = Progress(options.rounds * len(ways))
        for i in range(options.rounds):
            for name, way in list(ways.items())[:: -1 if i % 2 else 1]:
                way.measure(options.repeat)
                said(f"{name:22}{way.nbytes / way.rounds[-1][0] / 1e6:10.0f} MB/s")
        return {name: way.found(ways["socket"]) for name, way in ways.items()}


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=1 << 20, help="of a shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--original", action="store_true")
    options = parsed(parser)
    if options.quick:
        options.rounds, options.repeat = min(options.rounds, 2), 1
    result = begun("shard_ways", options, count=options.count, bytes=options.bytes)
    result["ways"] = run(options)
    print(f"{options.count} shards of {options.bytes} bytes, {options.rounds} rounds: median [extremes]")
    print(table(result["ways"]))
    kept(result)


if __name__ == "__main__":
    main()
