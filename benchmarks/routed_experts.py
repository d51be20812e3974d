"""What does a turn cost whose engine answer has 100 MiB of routed experts, and who waits for it?

    python -m benchmarks routed_experts [--turns 8] [--rounds 6] [--mib 100] [--quick]

An MoE engine (routed_engine.py: 94 layers, top 8, as Qwen3-235B-A22B) answers a chat of some 26,000 known
tokens with the experts of each: 100 MiB of base64. One proxy, one worker, pinned to the last CPU.

  cold    CPU of the proxy's tree a turn, its granules never touched before: every page is a fault
  warm    the same with granules that earlier shards have left
  plain   the same chat without asking for experts: what of it is the chat itself
  delay   small chats (5 messages, 200 tokens, 100 a second) and /health (400 a second) in other sessions of
          the same worker, open loop: `quiet` while nothing else goes on, `busy` while such an answer is under
          way, in turns. The delay is the busy latency less the quiet median. `engine` is the engine asked
          directly (100 a second): how late it itself was with a small answer meanwhile

Once, a trajectory is exported, its shard is fetched and held against what the engine sent, and the agent's
reply must not have it. The original drops the experts, so there is nothing to compare with.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from proxy import Server, free_port

from benchmarks import load, routed_engine
from benchmarks.cleanup_latency import HEALTH, window
from benchmarks.command import Progress, begun, flags, kept, parsed, spread
from benchmarks.scenarios import chat, engine_call
from benchmarks.targets import ADMIN, Target, checked, proxy, step_aside

MESSAGES = 100
ASK = {"metadata": {"return_routed_experts": True}}
A_SECOND = {"chat": 100.0, "health": 400.0, "engine": 100.0}
QUIET_S = 0.7


@contextlib.contextmanager
def moe_engine(tokens: int) -> Iterator[str]:
    """For chats of so many tokens; yields its URL."""
    port = free_port()
    rows = ("--rows", str(tokens + tokens // 16 + 1000))
    server = Server([sys.executable, "-m", "benchmarks.routed_engine", "--port", str(port), *rows], port)
    try:
        yield server.url
    finally:
        server.stop()


class Turns:
    """Large turns on a proxy, each in a session of its own, of about so many tokens."""

    def __init__(self, target: Target, tokens: int) -> None:
        self.target = target
        self._history = target.text.messages(MESSAGES, tokens + 2 * MESSAGES)
        self._numbers = itertools.count()
        self.sessions: list[str] = []
        self.reply = b""

    def request(self, **more: Any) -> tuple[bytes, str]:
        """A chat in a new session: its bytes, and the session's key."""
        ((name, key),) = self.target.sessions(1)
        self.sessions.append(name)
        words = {"role": "user", "content": f"turn {next(self._numbers)}"}
        return chat([*self._history, words], key, **more), key

    def reward(self, key: str) -> None:
        self.target.run([load.request("POST", "/rl/set_reward", {"reward": 1.0}, key)])

    def cpu_ms(self, **more: Any) -> float:
        """CPU of one turn."""
        data, key = self.request(**more)
        before = self.target.cpu_s()
        (self.reply,) = self.target.run([data], bodies=True).bodies
        used = self.target.cpu_s() - before
        self.reward(key)
        return 1000 * used

    def drop(self, look: bool = False) -> int:
        """Export and clear the trajectories so far. With `look`, fetch the first one's experts, hold them
        against what the engine sent, and return the bytes of base64 there were."""
        looked = 0
        while self.sessions:
            body = {"session_ids": [self.sessions.pop()]}
            (answer,) = self.target.run(
                [load.request("POST", "/export_trajectories", body, ADMIN)], bodies=True
            ).bodies
            tensors = json.loads(answer)["traj"]
            ids = {name: tensor["data"]["shard"]["data"]["shard_id"] for name, tensor in tensors.items()}
            if look and "routed_experts" in ids and not looked:
                shard = load.request("GET", f"/data/{ids['routed_experts']}")
                got = json.loads(self.target.run([shard], bodies=True).bodies[0])
                rows = got["shape"][1] - 1
                sent = routed_engine.experts(rows, routed_engine.WIDTH)
                raw = base64.b64decode(got["data"])
                width = len(raw) // (rows + 1)
                if raw[:-width] != sent or any(raw[-width:]) or len(self.reply) > 1 << 16:
                    raise SystemExit(
                        "the exported experts are not those that the engine sent, or the agent got them"
                    )
                looked = len(base64.b64encode(sent))
            self.target.run([load.request("DELETE", "/data/clear", {"shard_ids": list(ids.values())})])
        return looked


def small_chats(target: Target) -> Iterator[bytes]:
    """Without end, no two the same: 20 sessions in turn."""
    keys = [key for _, key in target.sessions(20)]
    history = target.text.messages(4, 180)
    words = ({"role": "user", "content": target.text.words(20)} for _ in itertools.count())
    return (chat([*history, one], key) for one, key in zip(words, itertools.cycle(keys), strict=False))


async def beside(
    target: Target, streams: dict[str, tuple[str, Iterator[bytes]]], large: list[bytes]
) -> dict[str, list[float]]:
    """Latencies of what was due while `large` were asked for one after the other, or for QUIET_S if there are
    none; and how late the generator was, all the time."""
    stop = asyncio.Event()
    running = [
        asyncio.ensure_future(load.open_loop(address, what, rate=A_SECOND[kind], stop=stop, limit_s=120))
        for kind, (address, what) in streams.items()
    ]
    (connection,) = await load.connect(target.address, 1)
    await asyncio.sleep(QUIET_S)  # all connections are there
    began = time.perf_counter()
    if not large:
        await asyncio.sleep(QUIET_S)
    for data in large:
        status, body = await connection.ask(data)
        if status != 200:
            raise SystemExit(f"a large turn was answered {status}: {body[:200]!r}")
    ended = time.perf_counter()
    stop.set()
    load.close([connection])
    found: dict[str, list[float]] = {"late": []}
    for kind, outcome in zip(streams, map(checked, await asyncio.gather(*running)), strict=True):
        timed = zip(outcome.due, outcome.latencies, strict=True)
        found[kind] = [latency for due, latency in timed if began <= due <= ended]
        found["late"] += outcome.lateness
    return found


def delays(turns: Turns, engine: str, rounds: int, in_a_row: int) -> dict[str, Any]:
    """Latencies of the small streams, quiet and busy in turns, over all rounds."""
    found: dict[str, dict[str, list[float]]] = {
        which: {"chat": [], "health": [], "engine": [], "late": []} for which in ("quiet", "busy")
    }
    (small,) = engine_call(turns.target, 1)
    streams = {
        "chat": (turns.target.address, small_chats(turns.target)),
        "health": (turns.target.address, itertools.repeat(HEALTH)),
        "engine": (engine.removeprefix("http://"), itertools.repeat(small)),
    }
    for _ in range(rounds):
        for which, kinds in found.items():
            asked = [turns.request(**ASK) for _ in range(in_a_row if which == "busy" else 0)]
            outcomes = load.run(beside(turns.target, streams, [data for data, _ in asked]))
            for kind, latencies in outcomes.items():
                kinds[kind] += latencies
            for _, key in asked:
                turns.reward(key)
        turns.drop()
    result: dict[str, Any] = {
        which: {kind: window(values) for kind, values in kinds.items()} for which, kinds in found.items()
    }
    result["delay_ms"] = {
        kind: {
            name: result["busy"][kind][name] - result["quiet"][kind]["p50_ms"]
            for name in ("p50_ms", "p99_ms", "max_ms")
        }
        for kind in ("chat", "health")
    }
    return result


def run(mib: float, turns_each: int, rounds: int) -> dict[str, Any]:
    step_aside()
    arena = (
        "--arena-max-bytes",
        str(int((turns_each + 4) * 2 * mib) << 20),
        "--max-body-bytes",
        str(64 << 20),
    )
    costs: dict[str, list[float]] = {"cold": [], "warm": [], "plain": []}
    tokens = int(mib * 2**20 * 3 / 4 / (4 * routed_engine.WIDTH))
    with moe_engine(tokens) as backend, proxy("ours", backend, *arena) as target:
        turns = Turns(target, tokens)
        said = Progress(3 * turns_each + 1)
        turns.cpu_ms()  # the history becomes known
        turns.cpu_ms(**ASK)  # the engine makes its answer
        for name, ask in (("cold", ASK), ("warm", ASK), ("plain", {})):
            for _ in range(turns_each):
                costs[name].append(turns.cpu_ms(**ask))
                said(f"{name} {costs[name][-1]:.1f} ms CPU")
                if name == "warm":
                    turns.drop()
            if name == "cold":
                nbytes = turns.drop(look=True)
        turns.drop()
        began = time.monotonic()
        found = delays(turns, backend, rounds, max(1, turns_each // 2))
        said(f"delays, in {time.monotonic() - began:.0f} s")
    cpu_ms = {name: spread(values) for name, values in costs.items()}
    return {"base64_mib": nbytes / 2**20, "cpu_ms": cpu_ms} | found


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--turns", type=int, default=8, help="of each kind")
    parser.add_argument("--rounds", type=int, default=6, help="of quiet and busy windows")
    parser.add_argument("--mib", type=float, default=100.0, help="base64 of an answer")
    arguments = parsed(parser)
    turns, rounds = (3, 2) if arguments.quick else (arguments.turns, arguments.rounds)
    sys.setswitchinterval(0.0002)  # the generator's clock is a thread, and must get its turn in time
    result = begun("routed_experts", arguments) | run(arguments.mib, turns, rounds)
    print(f"a turn with {result['base64_mib']:.1f} MiB of routed experts, CPU ms: median [extremes]")
    for name, one in result["cpu_ms"].items():
        print(f"  {name:6}{one['median']:8.1f} [{one['min']:.1f}, {one['max']:.1f}]")
    print(f"{'latency, ms':14} {'p50':>8} {'p99':>8} {'max':>8}")
    for which in ("quiet", "busy"):
        for kind, one in result[which].items():
            figures = " ".join(f"{one[key]:8.2f}" for key in ("p50_ms", "p99_ms", "max_ms"))
            print(f"{which:6}{kind:8} {figures} of {one['requests']}")
    kept(result)


if __name__ == "__main__":
    main()
