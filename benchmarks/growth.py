"""Does anything cost more as more of it is there? Sessions, turns, shards, sessions of one task; and what
idle costs.

    python -m benchmarks growth [--quick] [--part sessions|turns|shards|task|memory|idle …]

  sessions  CPU a chat turn, a start and /health with 1,000 … 100,000 live sessions, beside a proxy with few
  turns     CPU a turn in one session of 10 … 1,000 turns (each turn says one thing more than the last)
  shards    CPU a put and a get with 1,000 … 1,000,000 shards, in one process over the store (no HTTP)
  task      the 4,000th start_session of one task_id beside the first hundreds
  memory    arena and resident memory of 1,000 live sessions of 8 turns, ~2k tokens
  idle      share of a core that a proxy with 20,000 empty sessions takes when nobody asks

Ours alone: a cost that is flat needs no rival. Every figure is CPU time of the whole process tree; `ratio` is
the last over the first. `memory`, `idle` and `task` are measured on the original as well, with
--original: its sessions cost what they cost there (smaller numbers with --quick).
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import load, meter
from benchmarks.command import begun, flags, kept, parsed
from benchmarks.scenarios import TURNS, chat
from benchmarks.targets import ADMIN, Target, engine, proxy, step_aside

ARENA_BYTES = 2 << 30
PROBE = 1500
"""Requests by which a cost is measured: about half a second of CPU."""
ASKED = ("start", "turn", "health")


@contextlib.contextmanager
def alone(whose: str, *more: str) -> Iterator[Target]:
    """One proxy over the embedded engine, pinned."""
    arena = ("--arena-max-bytes", str(ARENA_BYTES))
    with engine() as backend, proxy(whose, backend, *arena, *more) as target:
        yield target


def cost_ms(target: Target, requests: list[bytes]) -> float:
    """CPU ms a request."""
    before = target.cpu_s()
    target.run(requests)
    return 1000 * (target.cpu_s() - before) / len(requests)


def starts(task: str, numbers: range, same: bool = False) -> list[bytes]:
    return [
        load.request("POST", "/rl/start_session", {"task_id": task if same else f"{task}-{i}"}, ADMIN)
        for i in numbers
    ]


def grown(points: list[dict[str, float]], *costs: str) -> dict[str, Any]:
    """`points` and, of each cost, the last over the first."""
    return {"points": points, "ratio": {cost: points[-1][cost] / points[0][cost] for cost in costs}}


def sessions(quick: bool) -> dict[str, Any]:
    """A chat turn, a start and /health with more and more sessions live, in turns with the same on a proxy
    that has few: the machine may change its pace in the minutes that this takes."""
    points, live, probe, pieces = [], 50, PROBE // (5 if quick else 1), 5
    arena = ("--arena-max-bytes", str(ARENA_BYTES))
    with (
        engine() as backend,
        proxy("ours", backend, *arena) as many,
        proxy("ours", backend, *arena) as few,
    ):
        talk = [[*many.text.messages(4, 180), {"role": "user", "content": "and?"}] for _ in range(8)]
        for target in (many, few):
            target.sessions(50)
            target.run([chat(talk[i % 8], "") for i in range(64)])
        for wanted in (1_000, 3_000) if quick else (1_000, 10_000, 30_000, 100_000):
            many.run(starts("crowd", range(live, wanted - probe - 50)))
            fresh = [(one, [key for _, key in one.sessions(50)]) for one in (many, few)]
            costs: dict[str, list[float]] = {f"{few}{name}_ms": [] for few in ("", "few_") for name in ASKED}
            for piece in range(pieces):
                numbers = range(wanted + piece * probe // pieces, wanted + (piece + 1) * probe // pieces)
                for one, keys in fresh[:: -1 if piece % 2 else 1]:
                    prefix = "" if one is many else "few_"
                    costs[f"{prefix}start_ms"].append(cost_ms(one, starts("probe", numbers)))
                    turns_asked = [chat(talk[i % 8], keys[i % 50]) for i in range(probe // pieces)]
                    costs[f"{prefix}turn_ms"].append(cost_ms(one, turns_asked))
                    costs[f"{prefix}health_ms"].append(cost_ms(one, [load.request("GET", "/health")] * probe))
            live = wanted
            point = {name: statistics.median(found) for name, found in costs.items()}
            for name in ASKED:
                pairs = zip(costs[f"{name}_ms"], costs[f"few_{name}_ms"], strict=True)
                point[f"{name}_beside_few"] = statistics.median(a / b for a, b in pairs)
            points.append({"live": wanted} | point)
            said(
                f"{wanted:7} sessions: "
                + ", ".join(f"{name} {point[f'{name}_ms']:.3f} ms" for name in ASKED)
                + "; beside few "
                + ", ".join(f"{point[f'{name}_beside_few']:.2f}" for name in ASKED)
            )
    return grown(points, *(f"{name}_beside_few" for name in ASKED))


def turns(quick: bool) -> dict[str, Any]:
    """A turn, in sessions that have had more and more, each time beside sessions that have had none. The
    prompt's length is the same throughout: what is asked is what the session's own length costs."""
    points, had, probe, last = [], 0, 25, 0
    with alone("ours") as target:
        keys = [key for _, key in target.sessions(8)]
        talk = target.text.messages(5, 200)

        def take(whom: list[str], count: int) -> list[bytes]:
            nonlocal last
            last += count
            numbers = range(last - count, last)
            says = [[*talk, {"role": "user", "content": f"turn {number}"}] for number in numbers]
            return [chat(words, key) for words in says for key in whom]

        for wanted in (10, 200) if quick else (10, 100, 500, 1_000):
            for _ in range(had, wanted):
                target.run(take(keys, 1))
            young = [key for _, key in target.sessions(8)]
            cost_ms(target, take(young, 1))
            pairs = [(cost_ms(target, take(keys, 5)), cost_ms(target, take(young, 5))) for _ in range(probe)]
            had = wanted + 5 * probe
            turn_ms, young_ms = (statistics.median(costs) for costs in zip(*pairs, strict=True))
            beside = statistics.median(long / short for long, short in pairs)
            points.append({"turns": had, "turn_ms": turn_ms, "young_ms": young_ms, "beside_young": beside})
            said(f"{had:7} turns in a session: {turn_ms:.3f} ms a turn, {beside:.2f} of a new session's")
    return grown(points, "beside_young")


def shards(quick: bool) -> dict[str, Any]:
    """Small tensors put and got, with more and more of them there."""
    from areal_fast.core._core import Arena
    from areal_fast.shards import ShardStore

    count = 20_000 if quick else 1_000_000
    body = b'{"type":"tensor","data":"AAAAAAAAAAA=","shape":[2],"dtype":"torch.float32"}'
    arena = Arena.create(8 << 30 if not quick else 512 << 20, shard_slots=count + 4096)
    points, there, probe = [], 0, 5_000
    try:
        arena.proc_enter(os.getpid())
        store = ShardStore(arena, "here:1")
        for wanted in (10_000, 20_000) if quick else (10_000, 100_000, 1_000_000):
            for i in range(there, wanted - probe):
                store.put_json(f"shard-{i}", body)

            def put(first: int = wanted - probe) -> None:
                for i in range(first, first + probe):
                    store.put_json(f"shard-{i}", body)

            def get(step: int = max(1, wanted // probe)) -> None:
                for i in range(0, probe * step, step):
                    assert store.get_json(f"shard-{i}")

            there = wanted
            point = {
                "shards": wanted,
                "put_us": 1e6 * timed(put) / probe,
                "get_us": min(1e6 * timed(get) / probe for _ in range(3)),
            }
            points.append(point)
            said(f"{wanted:7} shards: put {point['put_us']:.2f} us, get {point['get_us']:.2f} us")
        return grown(points, "put_us", "get_us")
    finally:
        arena.close()


def timed(work: Callable[[], None]) -> float:
    gc.collect()
    began = time.process_time()
    work()
    return time.process_time() - began


def task(quick: bool, whose: str = "ours") -> dict[str, Any]:
    """Starts of one and the same task_id."""
    with alone(whose) as target:
        target.run(starts("warm", range(200)))
        points = []
        step = 250 if quick else 500
        for first in range(0, 1_000 if quick else 4_000, step):
            ms = cost_ms(target, starts("same", range(first, first + step), same=True))
            points.append({"sessions": first + step, "start_ms": ms})
        said(f"{whose}: {step}th start {points[0]['start_ms']:.3f} ms, last {points[-1]['start_ms']:.3f} ms")
    return grown(points, "start_ms")


def memory(quick: bool, whose: str = "ours") -> dict[str, Any]:
    """Sessions of 8 turns that grow to ~2k tokens, kept."""
    points, live = [], 0
    with alone(whose) as target:
        target.run([chat(target.text.messages(5, 200), "") for _ in range(16)])
        before = meter.tree_rss_bytes(target.pid)
        for wanted in (50, 100) if quick else (250, 500, 1_000):
            new = target.sessions(wanted - live)
            live = wanted
            said_so_far = [[{"role": "system", "content": target.text.words(30)}] for _ in new]
            for _ in range(TURNS):
                for words in said_so_far:
                    words.append({"role": "user", "content": target.text.words(180)})
                target.run([chat(words, key) for words, (_, key) in zip(said_so_far, new, strict=True)])
                for words in said_so_far:
                    words.append({"role": "assistant", "content": target.text.words(64)})
            resident = meter.tree_rss_bytes(target.pid)
            point: dict[str, float] = {"sessions": wanted, "resident_mib": (resident - before) / 2**20}
            if whose == "ours":
                point["arena_mib"] = target.health()["arena"]["granules_used"] * 4096 / 2**20
            points.append(point)
            said(f"{whose}: " + ", ".join(f"{name} {value:.1f}" for name, value in point.items()))
    last = points[-1]
    kib_a_turn = last["resident_mib"] * 1024 / (last["sessions"] * TURNS)
    return {"points": points, "resident_kib_a_turn": kib_a_turn}


def idle(quick: bool, whose: str = "ours") -> dict[str, Any]:
    """A proxy that holds empty sessions while nobody asks it for anything."""
    count, seconds = (2_000, 5.0) if quick else (20_000, 20.0)
    if whose == "original":
        count = min(count, 4_000)  # its start costs more with every session
    stale = ("--session-timeout-seconds", "36000", "--stale-session-cleanup-interval-seconds", "1")
    with alone(whose, *stale) as target:
        target.run(starts("empty", range(count)))
        time.sleep(2.0)
        before, began = target.cpu_s(), time.perf_counter()
        time.sleep(seconds)
        used = target.cpu_s() - before
        share = used / (time.perf_counter() - began)
    said(f"{whose}: {count} empty sessions idle at {100 * share:.2f} % of a core")
    return {"sessions": count, "share_of_a_core": share, "seconds": seconds}


def said(line: str) -> None:
    print("  " + line, flush=True)


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "sessions": sessions,
    "turns": turns,
    "shards": shards,
    "task": task,
    "memory": memory,
    "idle": idle,
}
BESIDE: dict[str, Callable[[bool, str], dict[str, Any]]] = {"task": task, "memory": memory, "idle": idle}


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--original", action="store_true", help="task, memory and idle on the original, too")
    arguments = parsed(parser)
    result = begun("growth", arguments, parts={})
    step_aside()
    runs = [
        (name, whose)
        for name in arguments.part or PARTS
        for whose in ("ours", "original")
        if whose == "ours" or (arguments.original and name in BESIDE)
    ]
    for number, (name, whose) in enumerate(runs, 1):
        print(f"{number}/{len(runs)} {name}, {whose}", flush=True)
        part = BESIDE[name](arguments.quick, whose) if name in BESIDE else PARTS[name](arguments.quick)
        result["parts"].setdefault(name, {})[whose] = part
    for name, found in result["parts"].items():
        for whose, part in found.items():
            for cost, value in part.get("ratio", {}).items():
                print(f"{name:10}{whose:9} {cost:13} last/first {value:.2f}")
    kept(result)


if __name__ == "__main__":
    main()
