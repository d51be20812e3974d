"""A batch of shards by each way, from a proxy with one worker on this machine: CPU of both sides a shard.

    python -m benchmarks.shard_ways [--count 32] [--bytes 1048576] [--rounds 5] [--repeat 20]

"proxy" is the CPU of the whole process tree, "client" this process's; in microseconds a shard, median of the
rounds, with the lowest and highest beside. A mapped shard is not read here (nor are the others): what reading
memory costs is the reader's, whatever the way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from areal_fast.shards import raw
from areal_fast.shards.description import describe
from areal_fast.shards.local import LocalShards
from tests.e2e.running import Proxy, descendants


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants so far."""
    total = 0.0
    for one in (pid, *descendants(pid)):
        try:
            total += int(Path(f"/proc/{one}/schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue
    return total


def measure(proxy: Proxy, fetch: Callable[[], object], count: int, repeat: int) -> tuple[float, float, float]:
    """(proxy, client, wall) in µs a shard."""
    fetch()
    cpu, own, begun = tree_cpu_s(proxy.pid), time.process_time(), time.perf_counter()
    for _ in range(repeat):
        fetch()
    shards = count * repeat / 1e6
    wall = (time.perf_counter() - begun) / shards
    return (tree_cpu_s(proxy.pid) - cpu) / shards, (time.process_time() - own) / shards, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    what = describe("uint8", (options.bytes,))
    ids = [f"shard-{i}" for i in range(options.count)]
    size = max(256 << 20, 4 * options.count * options.bytes)
    with Proxy("--arena-max-bytes", str(size), workers=1, log_level="warning") as proxy:
        local = LocalShards(proxy.ask("GET", "/data/ways").json["local"])
        for shard_id in ids:
            local.put_bytes(shard_id, what, os.urandom(options.bytes))
        body = json.dumps({"shard_ids": ids}).encode()
        kind = {"content-type": "application/json"}
        over = proxy.connection()
        ways: dict[str, Callable[[], object]] = {
            "json": lambda: proxy.ask("POST", "/data/batch", body, headers=kind, over=over),
            "raw": lambda: proxy.ask(
                "POST", "/data/batch", body, headers={**kind, "accept": raw.MEDIA_TYPE}, over=over
            ),
            "local map": lambda: local.map(ids),
        }
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, fetch in ways.items():
                results[name].append(measure(proxy, fetch, options.count, options.repeat))
        over.close()
        local.close()
    print(f"{options.count} shards of {options.bytes} bytes, µs a shard: median (lowest to highest)")
    for name, rows in results.items():
        cells = []
        for title, values in zip(("proxy CPU", "client CPU", "wall"), zip(*rows, strict=True), strict=True):
            cells.append(f"{title} {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})")
        print(f"{name:10}", "; ".join(cells))


if __name__ == "__main__":
    main()
