"""What is to be reached, and whether a result reached it: every figure of the project's goals, a row each.

A judge takes the result of the program of its name and yields rows: `met`, `missed`, or `not shown` with the
reason, where the machine or the run cannot tell. Limits are those of a quiet 2 vCPU Ice Lake; judged is the
median. A limit's text and its arithmetic stand side by side here, and nowhere else. No I/O: verdicts.py reads
results and shows the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
# scenario of per_request → CPU milliseconds a request
COST_MS = {
    "health": 0.025,
    "start_session": 0.04,
    "chat_short": 0.2,
    "chat_short_fresh": 0.5,
    "chat_long": 0.5,
    "set_reward": 0.04,
    "export": 0.6,
    "whole_life": 4.0,
    "put_1mib": 0.8,
    "get_1mib": 0.6,
    "batch_32mib": 20.0,
}
BEYOND_ENCODER_MS = 0.4
NGINX = 3.0
FLAT = 1.1
"""A cost counts as flat whose last point is within this of its first: equal runs differ by as much."""
MEMORY_MIB = 30.0
IDLE = 0.005
FIRST_START = 1.05
WORKERS = 1.08
FIVE_WORKERS = 4.6
DUMP_MB_S = 400.0
OF_THE_DISK = 0.8
OF_THE_SOCKET = 0.6
MAP_US = 60.0
ROUTED_MS = {"warm": 70.0, "cold": 140.0}
DELAY_MS = 5.0
CLEANUP = {
    "free": {"p50_ms": 1.1, "p99_ms": 1.1, "p999_ms": 1.5},
    "shared": dict.fromkeys(("p50_ms", "p99_ms", "p999_ms"), 2.0),
}
CLEANUPS, CLEANUP_RATE = 20, 2000.0
GPU_OF_COPY, GPU_SMALL_US = 0.85, 40.0
SOAK_S = 1800.0


@dataclass
class Row:
    """`met` is None where it was not shown; `note` then says why."""

    what: str
    goal: str
    measured: str
    met: bool | None
    original: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        said = "not shown" if self.met is None else "met" if self.met else "missed"
        return f"{said}: {self.note}" if self.note else said


def per_request(result: Result) -> Iterator[Row]:
    for name, by_target in result["scenarios"].items():
        mine = by_target.get("ours")
        limit, goal = COST_MS.get(name), ""
        if name == "chat_long_fresh" and "encoder_ms" in result:
            limit = result["encoder_ms"] + BEYOND_ENCODER_MS
            goal = f" (the plain encoder's {result['encoder_ms']:.2f} + {BEYOND_ENCODER_MS:g})"
        if mine is None or limit is None:
            continue
        original, found = "", result["ratios"][name].get("original")
        if found and found["cpu"]:
            theirs = by_target["original"]["cpu_ms"]
            original = f"{theirs:.3g}: {found['cpu']:.1f}× [{found['cpu_min']:.1f}, {found['cpu_max']:.1f}]"
        measured = f"{mine['cpu_ms']:.3f} [{mine['cpu_ms_min']:.3f}, {mine['cpu_ms_max']:.3f}]"
        yield Row(f"{name}, CPU ms", f"≤ {limit:.3g}{goal}", measured, mine["cpu_ms"] <= limit, original)
    floor = result["ratios"].get("chat_short", {}).get("nginx")
    if floor and floor["cpu"]:
        least, most = 1 / floor["cpu_max"], 1 / floor["cpu_min"]
        measured = f"{1 / floor['cpu']:.1f}× [{least:.1f}, {most:.1f}]"
        yield Row("chat_short over nginx, CPU", f"≤ {NGINX:g}×", measured, 1 / floor["cpu"] <= NGINX)
    else:
        yield Row("chat_short over nginx, CPU", f"≤ {NGINX:g}×", "", None, note="nginx was not measured")


def conversation_length(result: Result) -> Iterator[Row]:
    mine, theirs = (result["growth"].get(name) for name in ("ours", "original"))
    if mine:
        lengths = sorted(map(int, result["targets"]["ours"]))
        measured, original = (
            f"{one['last_over_first']:.1f}×, {one['us_a_message']:.2f} µs a further message" if one else ""
            for one in (mine, theirs)
        )
        what = f"turn with {lengths[-1]} known messages over one with {lengths[0]}"
        yield Row(what, "flat", measured, mine["last_over_first"] <= FLAT, original)


def growth(result: Result) -> Iterator[Row]:
    parts = result["parts"]
    for part, key, unit, costs in (
        ("sessions", "live", "live sessions", ("turn_beside_few", "start_beside_few", "health_beside_few")),
        ("turns", "turns", "turns in a session", ("beside_young",)),
        ("shards", "shards", "shards", ("put_us", "get_us")),
    ):
        if part in parts:
            one = parts[part]["ours"]
            first, last = (int(one["points"][i][key]) for i in (0, -1))
            for cost in costs:
                what = {"beside_young": "turn"}.get(cost, cost.partition("_")[0])
                ratio = one["ratio"][cost]
                yield Row(f"{what} at {last:,} {unit} over {first:,}", "flat", f"{ratio:.2f}×", ratio <= FLAT)
    if "task" in parts:
        ratios = {who: one["ratio"]["start_ms"] for who, one in parts["task"].items()}
        count = int(parts["task"]["ours"]["points"][-1]["sessions"])
        original = f"{ratios['original']:.2f}×" if "original" in ratios else ""
        what = f"{count:,}th start of one task_id over the first"
        yield Row(what, "1.0×", f"{ratios['ours']:.2f}×", ratios["ours"] <= FIRST_START, original)
    if "memory" in parts:
        full = {who: one["points"][-1] for who, one in parts["memory"].items()}
        mib = {who: 1000 * one["resident_mib"] / one["sessions"] for who, one in full.items()}
        original = f"{mib['original']:.0f}" if "original" in mib else ""
        what = "memory of 1,000 sessions of 8 turns, ~2k tokens, MiB"
        yield Row(what, f"≤ {MEMORY_MIB:g}", f"{mib['ours']:.1f}", mib["ours"] <= MEMORY_MIB, original)
    if "idle" in parts:
        idle = parts["idle"]
        mine = idle["ours"]["share_of_a_core"]
        original = ""
        if "original" in idle:
            other = idle["original"]
            original = f"{100 * other['share_of_a_core']:.2f} % with {other['sessions']:,}"
        what = f"idle with {idle['ours']['sessions']:,} empty sessions, of a core"
        yield Row(what, f"< {100 * IDLE:g} %", f"{100 * mine:.2f} %", mine < IDLE, original)


def scaling(result: Result) -> Iterator[Row]:
    for name, by_number in result["scenarios"].items():
        most = max(by_number, key=int)
        ratio = by_number[most]["cpu_ratio"]
        note = "workers shared a CPU: an upper bound" if result["shared_cpus"] else ""
        met = True if ratio <= WORKERS else None if result["shared_cpus"] else False
        yield Row(
            f"{name} with {most} workers over one, CPU", f"≤ {WORKERS:g}×", f"{ratio:.2f}×", met, note=note
        )
    what, goal = "throughput of 5 workers over one", f"≥ {FIVE_WORKERS:g}×"
    chats = result["scenarios"].get("chat_short", {})
    if result["shared_cpus"] or "5" not in chats:
        yield Row(what, goal, "", None, note=f"wants 16 CPUs, there were {result['machine']['cpus_usable']}")
    else:
        times = chats["5"]["per_second"] / chats["1"]["per_second"]
        yield Row(what, goal, f"{times:.1f}×", times >= FIVE_WORKERS)


def cleanup_latency(result: Result) -> Iterator[Row]:
    for placing, limits in CLEANUP.items():
        goal = f"p50, p99, p99.9 within {', '.join(f'{limit:g}×' for limit in limits.values())}"
        what = f"/health during cleanup, {'a free core for the cleaner' if placing == 'free' else 'one core'}"
        found = result["placings"].get(placing)
        if found is None:
            yield Row(what, goal, "", None, note="not measured with this placing")
            continue
        ratio, number = found["ratio"], len(found["cleanup_runs"])
        met: bool | None = all(ratio[name] <= limit for name, limit in limits.items())
        notes = []
        if number < CLEANUPS or result["rate"] < CLEANUP_RATE:
            notes.append(f"{number} cleanups at {result['rate']:g}/s")
        if placing == "free" and result["cpus"] < 3:
            notes.append("the generator shared the cleaner's CPU")
            met = met or None
        yield Row(what, goal, ", ".join(f"{ratio[name]:.2f}×" for name in limits), met, note="; ".join(notes))


def dump_rate(result: Result) -> Iterator[Row]:
    rate = {name: one["median"] for name, one in result["mb_s"].items()}
    reached = rate["core"] >= DUMP_MB_S and rate["wall"] >= DUMP_MB_S
    at_the_disk = rate["wall_of_disk"] >= OF_THE_DISK
    measured = f"{rate['core']:.0f} a core, {rate['wall']:.0f} on the disk, which does {rate['disk']:.0f}"
    yield Row("dumps, MB/s", f"≥ {DUMP_MB_S:g} a core or the disk's limit", measured, reached or at_the_disk)


def shard_ways(result: Result) -> Iterator[Row]:
    ways = result["ways"]
    for name in ("get raw", "put raw"):
        share = ways[name]["of_socket"]
        measured = f"{100 * share['median']:.0f} % [{100 * share['min']:.0f}, {100 * share['max']:.0f}]"
        goal = f"≥ {100 * OF_THE_SOCKET:g} % of the socket"
        yield Row(f"{name} of {result['count']} × 1 MiB", goal, measured, share["median"] >= OF_THE_SOCKET)
    for name, one in ways.items():
        if name.startswith("map files"):
            both = one["proxy_us_a_shard"]["median"] + one["client_us_a_shard"]["median"]
            measured = f"{both:.0f} CPU of both sides, {one['us_a_shard']['median']:.0f} wall"
            yield Row(f"{name}, µs a shard", f"≤ {MAP_US:g}", measured, both <= MAP_US)


def routed_experts(result: Result) -> Iterator[Row]:
    for name, limit in ROUTED_MS.items():
        one = result["cpu_ms"][name]
        measured = f"{one['median']:.0f} [{one['min']:.0f}, {one['max']:.0f}]"
        what = f"turn with {result['base64_mib']:.0f} MiB of routed experts, {name}, CPU ms"
        yield Row(what, f"≤ {limit:g}", measured, one["median"] <= limit)
    for kind in ("chat", "health"):
        delay = result["delay_ms"][kind]
        noise = max(result["quiet"][kind]["max_ms"], result["busy"]["engine"]["max_ms"])
        measured = f"p50 {delay['p50_ms']:.1f}, p99 {delay['p99_ms']:.1f}, max {delay['max_ms']:.1f}"
        met: bool | None = delay["max_ms"] <= DELAY_MS
        note = ""
        if not met and noise > DELAY_MS:
            met, note = None, f"what has no part in it took up to {noise:.1f}"
        yield Row(f"{kind} delayed by it on its worker, ms", f"≤ {DELAY_MS:g}", measured, met, note=note)


def gpu(result: Result) -> Iterator[Row]:
    by_size = {row["bytes"]: row for row in result["rows"]}
    big, small = by_size.get(64 << 20), by_size.get(4 << 10)
    for way in ("put", "get"):
        if big:
            share = big["of_copy"][way]
            goal = f"≥ {100 * GPU_OF_COPY:g} % of the copy"
            yield Row(f"GPU {way} of 64 MiB", goal, f"{100 * share:.0f} %", share >= GPU_OF_COPY)
        if small:
            us = small["us"][way][1]
            yield Row(f"GPU {way} of 4 KiB, µs", f"≤ {GPU_SMALL_US:g}", f"{us:.0f}", us <= GPU_SMALL_US)


def soak(result: Result) -> Iterator[Row]:
    grew, long = result["grew"], result["seconds"] >= SOAK_S
    met: bool | None = False if grew else True if long else None
    what = f"{result['seconds'] / 60:g} min soak at 80 %"
    note = "" if long else "not the 30 minutes"
    yield Row(what, "30 min, nothing grows", ", ".join(grew) or "nothing grew", met, note=note)


JUDGES: dict[str, Callable[[Result], Iterator[Row]]] = {
    judge.__name__: judge
    for judge in (
        per_request, conversation_length, growth, scaling, cleanup_latency, dump_rate, shard_ways,
        routed_experts, gpu, soak,
    )
}  # fmt: skip
