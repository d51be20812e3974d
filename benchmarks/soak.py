"""Does anything grow while a proxy is simply used for long? Churning sessions at 80 % of what it can do.

    SOAK_SECONDS=1800 python -m benchmarks soak [--workers 2]

Sessions live whole lives: start, growing chats, reward, export, fetch, clear. Every eighth is left in the
middle, goes stale and is dumped (the dumps are deleted as they come). First the proxy is driven as hard as it
goes, closed loop, for a few seconds; then lives begin at 80 % of that rate, in the order of a clock. At the
end of each of 24 windows resident memory (PSS) of the process tree, its open descriptors, granules of the
arena in use and the window's chat latency are noted.

The first third is warm-up. After it the least of each figure in the last third of windows must not exceed the
least of the third before by more than `ALLOWED`: what leaks raises the floor, what merely fluctuates does
not. Exit status 1, and a line for what grew. What no machine's mood explains is strict (descriptors,
granules), what it does is not (latency).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from proxy import ours

from benchmarks import load, meter
from benchmarks.command import begun, flags, kept, parsed
from benchmarks.scenarios import chat
from benchmarks.targets import ADMIN, Target, Text, engine, tokenizer_folder

WINDOWS = 24
SHARE = 0.8
CONNECTIONS = 48
TURNS = 4
ABANDON_EVERY = 8
CONVERSATIONS = 64
SESSION_TIMEOUT_S = 3.0
# how far the floor of the last third may lie above that of the middle one: factor, and a constant in its unit
ALLOWED = {
    "resident_mib": (1.05, 4.0),
    "descriptors": (1.0, 4.0),
    "granules": (1.05, 256.0),
    "chat_p50_ms": (2.0, 2.0),
}


def life(number: int) -> Generator[bytes, bytes, None]:
    """One session, to the end or not. Is sent every reply's body. What is said repeats after CONVERSATIONS
    lives, so that caches of text are full after warm-up and hide no leak."""
    text = Text(number % CONVERSATIONS)
    task = {"task_id": f"soak-{number}"}
    started = json.loads((yield load.request("POST", "/rl/start_session", task, ADMIN)))["sessions"][0]
    key = started["session_api_key"]
    messages = [{"role": "system", "content": text.words(30)}]
    for _ in range(1 + number % TURNS):
        messages.append({"role": "user", "content": text.words(60)})
        yield chat(messages, key)
        messages.append({"role": "assistant", "content": text.words(40)})
    if number % ABANDON_EVERY == 0:
        return
    yield load.request("POST", "/rl/set_reward", {"reward": float(number % 3)}, key)
    body = {"session_ids": [started["session_id"]]}
    exported = json.loads((yield load.request("POST", "/export_trajectories", body, ADMIN)))["traj"]
    shards = [tensor["data"]["shard"]["data"]["shard_id"] for tensor in exported.values()]
    yield load.request("POST", "/data/batch", {"shard_ids": shards})
    yield load.request("DELETE", "/data/clear", {"shard_ids": shards})


class Driver:
    """Lives on a number of connections. `chats`: latencies of the window, in seconds."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._number = 0
        self.chats: list[float] = []
        self.done = 0
        self.behind = 0

    async def _live(self, connection: load.Connection) -> None:
        self._number += 1
        steps, reply = life(self._number), b""
        data = next(steps, None)
        while data is not None:
            began = time.perf_counter()
            status, reply = await asyncio.wait_for(connection.ask(data), load.STALL_TIMEOUT_S)
            if data.startswith(b"POST /chat/"):
                self.chats.append(time.perf_counter() - began)
            if not 200 <= status < 300:
                raise SystemExit(f"soak: {data[:60]!r} was answered {status} {reply[:200]!r}")
            try:
                data = steps.send(reply)
            except StopIteration:
                break
        self.done += 1

    async def flat_out(self, seconds: float) -> float:
        """Lives a second, as many as go."""
        pool = await load.connect(self._target.address, CONNECTIONS)
        before, began = self.done, time.perf_counter()

        async def drive(connection: load.Connection) -> None:
            while time.perf_counter() - began < seconds:
                await self._live(connection)

        await asyncio.gather(*map(drive, pool))
        took = time.perf_counter() - began
        load.close(pool)
        return (self.done - before) / took

    async def at_rate(self, rate: float, seconds: float) -> None:
        """Lives begin `rate` times a second, whoever is still alive; those that find no connection free are
        counted in `behind` and begin when there is one."""
        pool = await load.connect(self._target.address, CONNECTIONS)
        free: asyncio.Queue[load.Connection] = asyncio.Queue()
        for connection in pool:
            free.put_nowait(connection)
        running: set[asyncio.Task[None]] = set()

        async def one(connection: load.Connection) -> None:
            try:
                await self._live(connection)
            finally:
                free.put_nowait(connection)

        began, number = time.perf_counter(), 0
        while (due := began + number / rate) < began + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self.behind += free.empty()
            connection = await free.get()
            task = asyncio.ensure_future(one(connection))
            running.add(task)
            task.add_done_callback(running.discard)
            number += 1
            if time.perf_counter() > began + seconds:
                break
        await asyncio.gather(*running)
        load.close(pool)


def descriptors(root: int) -> int:
    """Open ones of the whole tree, sockets of clients excepted: how many of those there are is the load's."""
    count = 0
    for pid in meter.tree(root):
        folder = Path(f"/proc/{pid}/fd")
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                count += not os.readlink(folder / name).startswith("socket:")
    return count


def sample(target: Target, driver: Driver) -> dict[str, float]:
    health = target.health()
    chats, driver.chats = driver.chats, []
    return {
        "resident_mib": meter.tree_rss_bytes(target.pid) / 2**20,
        "descriptors": descriptors(target.pid),
        "granules": health["arena"]["granules_used"],
        "sessions": health["sessions"],
        "chats": len(chats),
        "chat_p50_ms": 1000 * load.quantile(chats, 0.5),
        "chat_p99_ms": 1000 * load.quantile(chats, 0.99),
    }


def verdict(windows: list[dict[str, float]]) -> list[str]:
    """What grew after warm-up, a line each. See the top of the file."""
    third = len(windows) // 3
    middle, last = windows[third : 2 * third], windows[2 * third :]
    grown = []
    for name, (factor, constant) in ALLOWED.items():
        before, after = (min(one[name] for one in part) for part in (middle, last))
        if after > before * factor + constant:
            grown.append(f"{name} grew from {before:.1f} to {after:.1f}")
    return grown


def soak(seconds: float, workers: int) -> dict[str, Any]:
    dumps = Path(tempfile.mkdtemp(prefix="areal_fast-soak-"))
    settings = [
        "--session-timeout-seconds", str(SESSION_TIMEOUT_S),
        "--stale-session-cleanup-interval-seconds", "0.5",
        "--stale-session-dump-path", str(dumps),
        "--arena-max-bytes", "256M",
    ]  # fmt: skip
    windows: list[dict[str, float]] = []
    dumped = 0
    try:
        with contextlib.ExitStack() as stack:
            backend = stack.enter_context(engine())
            server = stack.enter_context(ours(backend, tokenizer_folder(), settings, workers=workers))
            target = Target("ours", server.address, server.pid, Text(12))
            driver = Driver(target)
            full = load.run(driver.flat_out(min(10.0, seconds / 10)))
            driver.chats.clear()
            rate = max(0.5, SHARE * full)
            print(f"{full:.1f} lives a second flat out; soaking at {rate:.1f} for {seconds:g} s", flush=True)
            for number in range(WINDOWS):
                load.run(driver.at_rate(rate, seconds / WINDOWS))
                for path in list(dumps.iterdir()):
                    if path.suffix == ".json":
                        path.unlink()
                        dumped += 1
                windows.append(sample(target, driver))
                found = ", ".join(f"{name} {value:.1f}" for name, value in windows[-1].items())
                print(f"  {number + 1:2}/{WINDOWS}: {found}", flush=True)
    finally:
        shutil.rmtree(dumps, ignore_errors=True)
    return {
        "lives_a_second_flat_out": full,
        "rate": rate,
        "lives": driver.done,
        "late_starts": driver.behind,
        "dump_files": dumped,
        "windows": windows,
        "grew": verdict(windows),
    }


def main() -> int:
    parser = flags(__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SOAK_SECONDS", 1800)))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parsed(parser)
    result = begun("soak", arguments, seconds=arguments.seconds, workers=arguments.workers)
    result |= soak(arguments.seconds, arguments.workers)
    for line in result["grew"]:
        print(line)
    print(f"{result['lives']} lives, {result['dump_files']} dumps; grew: {result['grew'] or 'nothing'}")
    if arguments.seconds >= 300:
        kept(result)
    return 1 if result["grew"] else 0


if __name__ == "__main__":
    sys.exit(main())
