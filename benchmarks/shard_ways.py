"""Shards by each way, in and out, beside AReaL 1.0.4's own JSON, a bare loopback socket, and memcpy.

    python -m benchmarks.shard_ways [--count 32] [--bytes 1048576] [--rounds 5] [--repeat 6] [--original]

One batch of `count` shards is put and fetched by every way, in turns, from a proxy with one worker on this
machine; each round takes every way once, every second round in the other order. For each way: bytes a second
as the client sees them, and CPU seconds a GiB of the proxy's whole process tree and of the client. "socket"
is what the loopback carries between two processes that do nothing else: one sends a block of memory, the
other receives into one; its "proxy" is the sender. A ratio is taken within a round.

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
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from areal_fast.shards import raw
from areal_fast.shards.description import describe
from areal_fast.shards.local import LocalShards
from benchmarks.machine import described
from tests.e2e.running import ROOT, Proxy, descendants

sys.path.insert(0, str(ROOT / "tests" / "wire"))

GIB = 1 << 30
JSON_TYPE = {"content-type": "application/json"}
Act = Callable[[], object]


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants so far, of the threads that there are; 0 of none."""
    total = 0.0
    for one in (pid, *descendants(pid)) if pid else ():
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue
    return total


class Way:
    """How one batch goes: `act`, after `once` a round and `before` each time. rounds: (bytes a second, CPU s
    a GiB of the tree of `pid`, the same of this process)."""

    def __init__(self, act: Act, pid: int, *, once: Act | None = None, before: Act | None = None) -> None:
        self.act = act
        self.pid = pid
        self.once = once
        self.before = before
        self.rounds: list[tuple[float, float, float]] = []

    def measure(self, nbytes: int, repeat: int) -> None:
        wall = cpu = own = 0.0
        if self.once is not None:
            self.once()
        for _ in range(repeat):
            if self.before is not None:
                self.before()
            cpu -= tree_cpu_s(self.pid)
            own -= time.process_time()
            wall -= time.perf_counter()
            self.act()
            wall += time.perf_counter()
            own += time.process_time()
            cpu += tree_cpu_s(self.pid)
        moved = nbytes * repeat
        self.rounds.append((moved / wall, cpu * GIB / moved, own * GIB / moved))


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

    def __init__(self, port: int, nbytes: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
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
    proxy: Proxy, local: LocalShards, over: Http, ids: list[str], blocks: list[bytes]
) -> dict[str, Way]:
    """By name."""
    json_ways = over.ways(ids, blocks)
    what = describe("float32", (len(blocks[0]) // 4,))
    layout = raw.lay_out([(shard_id, what) for shard_id in ids])
    file = layout.header + b"".join(blocks)
    listed = json.dumps({"shard_ids": ids}).encode()

    def put_files() -> None:
        for shard_id, block in zip(ids, blocks, strict=True):
            local.put_bytes(shard_id, what, block)

    def put_raw() -> None:
        over.ask("PUT", "/data/batch", file, {"content-type": raw.MEDIA_TYPE})

    def get_raw() -> None:
        over.ask("POST", "/data/batch", listed, {**JSON_TYPE, "accept": raw.MEDIA_TYPE})

    def map_all() -> None:
        local.map(ids)

    pid, clear = proxy.pid, json_ways["clear"]
    return {
        "put raw": Way(put_raw, pid, before=clear),
        "put json": Way(json_ways["put"], pid, before=clear),
        "put by file": Way(put_files, pid, before=clear),
        "get raw": Way(get_raw, pid, once=put_raw),
        "get raw of files": Way(get_raw, pid, once=put_files),
        "get json": Way(json_ways["get"], pid, once=put_raw),
        "map files": Way(map_all, pid, once=put_files),
        "map after a raw put": Way(map_all, pid, before=put_raw),
    }


def show(ways: dict[str, Way], nbytes: int, count: int) -> None:
    """A line a way: medians, and extremes of what is compared."""
    base = [rate for rate, _, _ in ways["socket"].rounds]
    print(
        f"{'way':22}{'MB/s':>8}{'of the socket':>22}{'proxy s/GiB':>24}{'client s/GiB':>14}{'us a shard':>12}"
    )
    for name, way in ways.items():
        rates, cpus, owns = zip(*way.rounds, strict=True)
        ratios = [rate / other for rate, other in zip(rates, base, strict=True)]
        print(
            f"{name:22}{statistics.median(rates) / 1e6:8.0f}"
            f"{statistics.median(ratios):8.2f} [{min(ratios):5.2f},{max(ratios):6.2f}]"
            f"{statistics.median(cpus):9.3f} [{min(cpus):.3f}, {max(cpus):.3f}]"
            f"{statistics.median(owns):13.3f}{nbytes / count / statistics.median(rates) * 1e6:12.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--original", action="store_true")
    options = parser.parse_args()
    ids = [f"shard-{i}" for i in range(options.count)]
    blocks = [os.urandom(options.bytes) for _ in ids]
    nbytes = options.count * options.bytes
    with contextlib.ExitStack() as stack:
        sender, fetch = stack.enter_context(loopback(nbytes))
        into, block = memoryview(bytearray(nbytes)), os.urandom(nbytes)
        ways = {
            "socket": Way(fetch, sender),
            "memcpy": Way(lambda: into.__setitem__(slice(None), block), 0),
        }
        flags = (
            "--arena-max-bytes",
            str(max(256 << 20, 4 * nbytes)),
            "--max-body-bytes",
            str(2 * nbytes + (64 << 20)),
        )
        proxy = stack.enter_context(Proxy(*flags, workers=1, log_level="warning"))
        local = stack.enter_context(LocalShards(proxy.ask("GET", "/data/ways").json["local"]))
        ways |= our_ways(proxy, local, Http(proxy.port, nbytes), ids, blocks)
        if options.original:
            from areal_env import areal_python
            from proxy import original

            from benchmarks.scenarios import tokenizer_folder

            server = stack.enter_context(
                original(
                    areal_python(),
                    f"http://{proxy.health()['backend'].removeprefix('http://')}",
                    tokenizer_folder(),
                )
            )
            json_ways = Http(int(server.address.rpartition(":")[2]), nbytes).ways(ids, blocks)
            pid = server.pid
            ways["original: put json"] = Way(json_ways["put"], pid, before=json_ways["clear"])
            ways["original: get json"] = Way(json_ways["get"], pid, once=json_ways["put"])
        for i in range(options.rounds):
            for way in list(ways.values())[:: -1 if i % 2 else 1]:
                way.measure(nbytes, options.repeat)
    print(json.dumps(described()))
    print(f"{options.count} shards of {options.bytes} bytes, {options.rounds} rounds: median [extremes]")
    show(ways, nbytes, options.count)


if __name__ == "__main__":
    main()
