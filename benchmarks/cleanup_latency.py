"""Does the cleaner make anyone wait? /health latency, open loop, while hundreds of large sessions are dumped.

    python benchmarks/cleanup_latency.py [--cleanups 20] [--sessions 500] [--rate 2000] [--workers 1]

A proxy is filled with sessions of 8 turns that grow to about 4,000 tokens; then all are touched at once, so
that they go stale together. From that moment on /health is asked at a fixed rate, whatever the replies do.
The time until the first session disappears is the quiet window, the time from there until the last dump is
on disk the busy one: same process, same memory, same load, seconds apart. A cleanup is one such pair;
quantiles are over all of them.

Latencies count from when a request was due. The generator's own lateness is in the result: where it moves
between the windows, CPUs were short and the figures say so rather than the proxy's. AReaL 1.0.4 has no
stale-session dumps to compare with; the figures of the pull request that had them are in README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "wire"), str(HERE.parent / "tests")]

import load  # noqa: E402
import machine  # noqa: E402
import scenarios  # noqa: E402
from proxy import ours  # noqa: E402

LOOK_EVERY_S = 0.02
WINDOW_LIMIT_S = 300.0


def fill(target: scenarios.Target, count: int) -> None:
    """`count` sessions of 8 turns, each with a reward, none exported; all touched at the end."""
    sessions = target.sessions(count)
    for turn in zip(*(scenarios.growing(target) for _ in sessions), strict=True):
        target.run([scenarios.chat(messages, key) for messages, (_, key) in zip(turn, sessions, strict=True)])
    target.run([load.request("POST", "/rl/set_reward", {"reward": 1.0}, key) for _, key in sessions])


def sessions(target: scenarios.Target) -> int:
    """How many are live, as /health says."""
    count: int = json.loads(target.run([load.request("GET", "/health")], bodies=True).bodies[0])["sessions"]
    return count


async def one_cleanup(target: scenarios.Target, rate: float, dumps: Path, count: int) -> dict[str, Any]:
    """Loads /health from now until `count` dumps are there; returns latencies of both windows."""
    stop = asyncio.Event()
    began = time.perf_counter()
    marks: dict[str, float] = {}

    async def watch() -> None:
        reader = await load._connect(target.address, 1)
        ask = load.request("GET", "/health")
        while time.perf_counter() - began < WINDOW_LIMIT_S:
            if "first" not in marks:
                _, body = await reader[0].ask(ask)
                if json.loads(body)["sessions"] < count:
                    marks["first"] = time.perf_counter()
            elif sum(name.endswith(".json") for name in os.listdir(dumps)) >= count:
                marks["last"] = time.perf_counter()
                break
            await asyncio.sleep(LOOK_EVERY_S)
        load._close(reader)
        stop.set()

    watcher = asyncio.ensure_future(watch())
    outcome = await load.open_loop(
        target.address, load.request("GET", "/health"), rate=rate, stop=stop, limit_s=WINDOW_LIMIT_S
    )
    await watcher
    scenarios.checked(outcome)
    if "last" not in marks:
        raise SystemExit(f"only {len(os.listdir(dumps))} of {count} dumps after {WINDOW_LIMIT_S:g} s")
    timed = list(zip(outcome.due, outcome.latencies, strict=True))
    return {
        "quiet": [latency for due, latency in timed if due < marks["first"] - LOOK_EVERY_S],
        "busy": [latency for due, latency in timed if marks["first"] - LOOK_EVERY_S <= due <= marks["last"]],
        "late_p99": load.quantile(outcome.lateness, 0.99),
        "cleanup_s": marks["last"] - marks["first"],
        "dumped_bytes": sum(path.stat().st_size for path in dumps.iterdir()),
    }


def window(latencies: list[float]) -> dict[str, float]:
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
    found = {name: 1000 * load.quantile(latencies, share) for name, share in shares.items()}
    return found | {"max_ms": 1000 * max(latencies, default=float("nan")), "requests": len(latencies)}


def run(arguments: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "cleanup_latency", "machine": machine.described()} | vars(
        arguments
    )
    quiet: list[float] = []
    busy: list[float] = []
    cleanups = []
    dumps = Path(tempfile.mkdtemp(prefix="areal_fast-bench-", dir=arguments.dump_dir))
    flags = [
        "--session-timeout-seconds", str(arguments.session_timeout),
        "--stale-session-cleanup-interval-seconds", "0.5",
        "--stale-session-dump-path", str(dumps),
        "--arena-max-bytes", "1G",
    ]  # fmt: skip
    try:
        with contextlib.ExitStack() as stack:
            backend = stack.enter_context(scenarios.engine())
            proxy = stack.enter_context(ours(backend, tokenizer, flags, workers=arguments.workers))
            target = scenarios.Target("ours", proxy.address, proxy.pid, scenarios.Text(2))
            for number in range(arguments.cleanups):
                fill(target, arguments.sessions)
                if (live := sessions(target)) != arguments.sessions:
                    raise SystemExit(f"{live} sessions are left after filling: raise --session-timeout")
                before = load.tree_cpu_s(proxy.pid)
                one = asyncio.run(one_cleanup(target, arguments.rate, dumps, arguments.sessions))
                quiet += one.pop("quiet")
                busy += one.pop("busy")
                cleanups.append(one | {"cpu_s": load.tree_cpu_s(proxy.pid) - before})
                rate = one["dumped_bytes"] / one["cleanup_s"] / 1e6
                print(f"cleanup {number + 1}: {one['cleanup_s']:.2f} s, {rate:.0f} MB/s", flush=True)
                for path in dumps.iterdir():
                    path.unlink()
    finally:
        shutil.rmtree(dumps)
    result["without_cleanup"], result["during_cleanup"] = window(quiet), window(busy)
    result["ratio"] = {
        name: result["during_cleanup"][name] / result["without_cleanup"][name]
        for name in ("p50_ms", "p99_ms", "p999_ms", "max_ms")
    }
    result["cleanup_runs"] = cleanups
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cleanups", type=int, default=20)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2000.0, help="/health requests a second")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--session-timeout", type=float, default=20.0, help="must exceed the time to fill")
    parser.add_argument(
        "--dump-dir", default=None, help="where dumps go; default: the temporary folder's disk"
    )
    arguments = parser.parse_args()
    sys.setswitchinterval(0.0002)  # the generator's clock is a thread, and must get its turn in time
    result = run(arguments, scenarios.tokenizer_folder())
    for name in ("without_cleanup", "during_cleanup", "ratio"):
        print(f"{name:16}", {key: round(value, 3) for key, value in result[name].items()})
    print("generator late p99, ms:", [round(1000 * one["late_p99"], 2) for one in result["cleanup_runs"]])
    print("kept in", machine.keep("cleanup_latency", result).relative_to(HERE.parent))


if __name__ == "__main__":
    main()
