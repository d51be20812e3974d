"""Does the cleaner make anyone wait? /health latency, open loop, while hundreds of large sessions are dumped.

    python -m benchmarks cleanup_latency [--cleanups 20] [--sessions 500] [--rate 2000] [--workers 1]

A proxy is filled with sessions of 8 turns that grow to about 4,000 tokens; then all are touched at once, so
that they go stale together. From that moment on /health is asked at a fixed rate, whatever the replies do.
The time until the first session disappears is the quiet window, the time from there until the last dump is
on disk, fsync included, the busy one: same process, same memory, same load, seconds apart. A cleanup is one
such pair; quantiles are over all of them, and so many are taken with each placing:

  shared  workers and cleaner on the last CPU, the generator on the others
  free    the workers alone on the last CPU, the cleaner on the one before: on a machine of two CPUs that is
          the generator's, whose own lateness then says what of a latency is its own

Latencies count from when a request was due. If the machine does not carry the rate (the generator is late by
more than a millisecond in every hundredth request of a quiet second), the highest of half, a quarter … of it
that it does carry is taken, and the result says so. AReaL 1.0.4 has no stale-session dumps to compare with;
the figures of the pull request that had them are in README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import load, machine, scenarios
from benchmarks.command import Progress, begun, flags, kept, parsed
from benchmarks.targets import USABLE, Target, checked, engine, place, proxy, step_aside

LOOK_EVERY_S = 0.02
WINDOW_LIMIT_S = 300.0
LATE_S = 0.001
HEALTH = load.request("GET", "/health")
PLACINGS = ("shared", "free")


def fill(target: Target, count: int) -> None:
    """`count` sessions of 8 turns, each with a reward, none exported; all touched at the end."""
    sessions = target.sessions(count)
    for turn in zip(*(scenarios.growing(target) for _ in sessions), strict=True):
        target.run([scenarios.chat(messages, key) for messages, (_, key) in zip(turn, sessions, strict=True)])
    target.run([load.request("POST", "/rl/set_reward", {"reward": 1.0}, key) for _, key in sessions])
    if (live := target.health()["sessions"]) != count:
        raise SystemExit(f"{live} sessions are left after filling: raise --session-timeout")


@contextlib.contextmanager
def with_dumps(session_timeout: float, workers: int, where: str | None) -> Iterator[tuple[Target, Path]]:
    """A proxy whose sessions go stale after so many seconds, and the folder where it dumps them."""
    dumps = Path(tempfile.mkdtemp(prefix="areal_fast-bench-", dir=where))
    stale = [
        "--session-timeout-seconds", str(session_timeout),
        "--stale-session-cleanup-interval-seconds", "0.5",
        "--stale-session-dump-path", str(dumps),
        "--arena-max-bytes", "1G",
    ]  # fmt: skip
    try:
        with engine() as backend, proxy("ours", backend, *stale, workers=workers, seed=2) as target:
            yield target, dumps
    finally:
        shutil.rmtree(dumps)


async def first_and_last(target: Target, dumps: Path, count: int) -> tuple[float, float]:
    """When the first of `count` sessions disappeared and when the last dump was there (perf_counter)."""
    began, first = time.perf_counter(), 0.0
    (reader,) = await load.connect(target.address, 1)
    while time.perf_counter() - began < WINDOW_LIMIT_S:
        if not first:
            _, body = await reader.ask(HEALTH)
            if json.loads(body)["sessions"] < count:
                first = time.perf_counter()
        elif sum(name.endswith(".json") for name in os.listdir(dumps)) >= count:
            load.close([reader])
            return first, time.perf_counter()
        await asyncio.sleep(LOOK_EVERY_S)
    raise SystemExit(f"only {len(os.listdir(dumps))} of {count} dumps after {WINDOW_LIMIT_S:g} s")


def emptied(folder: Path) -> int:
    """Deletes all files of a folder; returns their bytes."""
    total = 0
    for path in folder.iterdir():
        total += path.stat().st_size
        path.unlink()
    return total


def carried(target: Target, wanted: float) -> float:
    """The rate of `wanted`, its half, its quarter … at which the generator keeps its time."""
    rate = wanted
    while rate > 50:
        loop = load.open_loop(
            target.address, itertools.repeat(HEALTH), rate=rate, stop=asyncio.Event(), limit_s=1.0
        )
        if load.quantile(load.run(loop).lateness, 0.99) < LATE_S:
            return rate
        rate /= 2
    return rate


async def one_cleanup(target: Target, rate: float, dumps: Path, count: int) -> dict[str, Any]:
    """Loads /health from now until `count` dumps are there; returns latencies of both windows."""
    stop = asyncio.Event()

    async def watch() -> tuple[float, float]:
        try:
            return await first_and_last(target, dumps, count)
        finally:
            stop.set()

    watcher = asyncio.ensure_future(watch())
    outcome = checked(
        await load.open_loop(
            target.address, itertools.repeat(HEALTH), rate=rate, stop=stop, limit_s=WINDOW_LIMIT_S
        )
    )
    first, last = await watcher
    timed = list(zip(outcome.due, outcome.latencies, strict=True))
    return {
        "without_cleanup": [latency for due, latency in timed if due < first - LOOK_EVERY_S],
        "during_cleanup": [latency for due, latency in timed if first - LOOK_EVERY_S <= due <= last],
        "late_p99": load.quantile(outcome.lateness, 0.99),
        "cleanup_s": last - first,
    }


def window(latencies: list[float]) -> dict[str, float]:
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
    found = {name: 1000 * load.quantile(latencies, share) for name, share in shares.items()}
    return found | {"max_ms": 1000 * max(latencies, default=float("nan")), "requests": len(latencies)}


def compared(cleanups: list[dict[str, Any]]) -> dict[str, Any]:
    """Both windows over all cleanups, and during over without."""
    found: dict[str, Any] = {}
    for name in ("without_cleanup", "during_cleanup"):
        found[name] = window([latency for one in cleanups for latency in one.pop(name)])
    names = ("p50_ms", "p99_ms", "p999_ms", "max_ms")
    ratio = {name: found["during_cleanup"][name] / found["without_cleanup"][name] for name in names}
    return found | {"ratio": ratio, "cleanup_runs": cleanups}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    step_aside()
    placings = arguments.placing or (PLACINGS if len(USABLE) > 1 else PLACINGS[:1])
    cleanups: dict[str, list[dict[str, Any]]] = {placing: [] for placing in placings}
    with with_dumps(arguments.session_timeout, arguments.workers, arguments.dump_dir) as (target, dumps):
        result: dict[str, Any] = {"dump_filesystem": machine.filesystem(dumps)}
        cleaner = target.health()["cleaner"]["pid"]
        result["rate"] = carried(target, arguments.rate)
        if result["rate"] < arguments.rate:
            print(f"this machine carries {result['rate']:g} requests/s, not {arguments.rate:g}", flush=True)
        said = Progress(arguments.cleanups * len(placings))
        for number in range(arguments.cleanups * len(placings)):
            placing = placings[number % len(placings)]
            place([cleaner], USABLE[-2:-1] if placing == "free" else USABLE[-1:])
            fill(target, arguments.sessions)
            before = target.cpu_s()
            one = load.run(one_cleanup(target, result["rate"], dumps, arguments.sessions))
            one |= {"cpu_s": target.cpu_s() - before, "dumped_bytes": emptied(dumps)}
            cleanups[placing].append(one)
            said(
                f"{placing}: {one['dumped_bytes'] / 1e6:.0f} MB in {one['cleanup_s']:.2f} s, generator late "
                f"p99 {1000 * one['late_p99']:.2f} ms"
            )
    return result | {"placings": {placing: compared(found) for placing, found in cleanups.items()}}


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--cleanups", type=int, default=20, help="with each placing")
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2000.0, help="/health requests a second")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--placing", action="append", choices=PLACINGS)
    parser.add_argument(
        "--session-timeout", type=float, default=5.0, help="must exceed one turn of all sessions"
    )
    parser.add_argument(
        "--dump-dir", default=None, help="where dumps go; default: the temporary folder's disk"
    )
    arguments = parsed(parser)
    if arguments.quick:
        arguments.cleanups, arguments.sessions = min(arguments.cleanups, 2), min(arguments.sessions, 100)
    sys.setswitchinterval(0.0002)  # the generator's clock is a thread, and must get its turn in time
    asked = {
        name: getattr(arguments, name) for name in ("cleanups", "sessions", "workers", "session_timeout")
    }
    result = begun("cleanup_latency", arguments, **asked, cpus=len(USABLE)) | run(arguments)
    print(f"{'':8}{'':16} {'p50':>8} {'p99':>8} {'p99.9':>8} {'max':>8} requests, at {result['rate']:g}/s")
    for placing, found in result["placings"].items():
        for name in ("without_cleanup", "during_cleanup", "ratio"):
            figures = " ".join(
                f"{found[name][key]:8.3f}" for key in ("p50_ms", "p99_ms", "p999_ms", "max_ms")
            )
            print(f"{placing:8}{name.replace('_', ' '):16} {figures} {found[name].get('requests', '')}")
    kept(result)


if __name__ == "__main__":
    main()
