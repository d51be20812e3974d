"""What a request costs beside the original: the same requests, the same engine, the same load, in turns.

    python benchmarks/per_request.py [--rounds 3] [--scenario NAME…] [--quick] [--only ours] [--workers 1]
        [--connections 8]

All proxies run at once; in every round each scenario is measured on one and then on the others, so that what
the machine does meanwhile hits all. Measured are the CPU time of the whole proxy process tree (load.py)
divided by the requests answered, requests a second and latencies, closed loop; preparation (starting
sessions, filling them) is not measured. A ratio is taken within a round: its median and extremes are those
of the rounds. The engine is the embedded one, in a process of its own that counts for nobody. With two CPUs
or more the proxies are pinned to one and everything else to the others. A reply that is no 2xx fails the
run.

The original is AReaL 1.0.4 (tests/wire/areal_env.py). It answers an export with one batch of 6 shards, ours
in the same form for the same request; figures of pr1268 (48 shards) are therefore not reproduced here. The
floor of a chat is nginx before the same engine, that of a tensor is memcpy.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "wire"), str(HERE.parent / "tests")]

import load  # noqa: E402
import machine  # noqa: E402
from proxy import original, ours  # noqa: E402
from scenarios import (  # noqa: E402
    CONNECTIONS,
    GOALS_MS,
    SCENARIOS,
    Target,
    Text,
    engine,
    engine_call,
    memcpy_mb_s,
    nginx,
    own_cpus,
    pin,
    tokenizer_folder,
)

ARENA = ("--arena-max-bytes", "1G")
NGINX_REQUESTS = 4000
FLOOR = "chat_short"
"""The scenario that nginx is measured beside."""


def measure(target: Target, name: str, quick: bool, connections: int) -> dict[str, float]:
    """One scenario on one proxy, once."""
    prepare, mine, theirs = SCENARIOS[name]
    if target.name == "nginx":
        prepare, mine = engine_call, NGINX_REQUESTS
    count = (theirs if target.name == "original" else mine) // (10 if quick else 1)
    count = max(count, connections, 3 if quick else 8)
    prepared = prepare(target, count)
    before = load.tree_cpu_s(target.pid)
    outcome = prepared() if callable(prepared) else target.run(prepared, connections=connections)
    used = load.tree_cpu_s(target.pid) - before
    return {
        "requests": count,
        "cpu_ms": 1000 * used / count,
        "per_second": count / outcome.seconds,
        "p50_ms": 1000 * load.quantile(outcome.latencies, 0.5),
        "p99_ms": 1000 * load.quantile(outcome.latencies, 0.99),
        "p999_ms": 1000 * load.quantile(outcome.latencies, 0.999),
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    cpu = [one["cpu_ms"] for one in rounds]
    medians = {
        name: statistics.median(one[name] for one in rounds)
        for name in ("cpu_ms", "per_second", "p50_ms", "p99_ms", "p999_ms")
    }
    return {**medians, "cpu_ms_min": min(cpu), "cpu_ms_max": max(cpu), "rounds": rounds}


def ratios(measured: dict[str, list[dict[str, float]]], other: str) -> dict[str, Any]:
    """How many times `other` costs what ours does, in CPU and as throughput: median and extremes of the
    rounds. Empty unless both were measured."""
    if other not in measured or "ours" not in measured:
        return {}
    pairs = list(zip(measured[other], measured["ours"], strict=True))
    cpu = [theirs["cpu_ms"] / mine["cpu_ms"] for theirs, mine in pairs if mine["cpu_ms"]]
    rate = [mine["per_second"] / theirs["per_second"] for theirs, mine in pairs]
    return {
        "cpu": statistics.median(cpu) if cpu else None,
        "cpu_min": min(cpu, default=None),
        "cpu_max": max(cpu, default=None),
        "per_second": statistics.median(rate),
    }


@contextlib.contextmanager
def proxies(arguments: argparse.Namespace, tokenizer: Path) -> Iterator[list[Target]]:
    """Those that are asked for, up and pinned."""
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(engine())
        targets = []
        if arguments.only != "original":
            mine = stack.enter_context(ours(backend, tokenizer, ARENA, workers=arguments.workers))
            targets.append(Target("ours", mine.address, mine.pid, Text(1)))
        if arguments.only != "ours":
            from areal_env import areal_python

            theirs = stack.enter_context(original(areal_python(), backend, tokenizer))
            targets.append(Target("original", theirs.address, theirs.pid, Text(1)))
        if arguments.only is None:
            floor = stack.enter_context(nginx(backend))
            if floor is None:
                print("nginx is not installed: no floor in this run", flush=True)
            else:
                targets.append(floor)
        for target in targets:
            pin(target)
        own_cpus()
        yield targets


def compare(arguments: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    result: dict[str, Any] = {
        "benchmark": "per_request",
        "machine": machine.described(),
        "quick": arguments.quick,
        "workers": arguments.workers,
        "connections": arguments.connections,
        "cpus": sorted(os.sched_getaffinity(0)),
        "memcpy_mb_s": round(memcpy_mb_s()),
    }
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    names = arguments.scenario or list(SCENARIOS)
    with proxies(arguments, tokenizer) as targets:
        for number in range(arguments.rounds):
            for name in names:
                for target in targets if number % 2 == 0 else targets[::-1]:
                    if target.name == "nginx" and name != FLOOR:
                        continue
                    one = measure(target, name, arguments.quick, arguments.connections)
                    measured.setdefault(name, {}).setdefault(target.name, []).append(one)
                    print(
                        f"round {number + 1}/{arguments.rounds}  {name:18} {target.name:9} "
                        f"{one['cpu_ms']:9.3f} ms CPU {one['per_second']:7.0f}/s p99 {one['p99_ms']:7.2f} ms",
                        flush=True,
                    )
        result["memory_mib"] = {t.name: round(load.tree_rss_bytes(t.pid) / 2**20, 1) for t in targets}
    result["scenarios"] = {
        name: {who: summary(rounds) for who, rounds in by_target.items()}
        for name, by_target in measured.items()
    }
    result["ratios"] = {
        name: {who: ratios(by_target, who) for who in ("original", "nginx") if who in by_target}
        for name, by_target in measured.items()
    }
    return result


def table(result: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{'CPU ms a request':18} {'ours':>24} {'original 1.0.4':>26} {'ratio':>22} {'goal':>6}   ours: /s, "
        "p50 p99 p99.9 ms"
    ]
    for name, by_target in result["scenarios"].items():
        cells = [
            f"{one['cpu_ms']:.3f} [{one['cpu_ms_min']:.3f}, {one['cpu_ms_max']:.3f}]" if one else "–"
            for one in (by_target.get("ours"), by_target.get("original"))
        ]
        mine, found = by_target.get("ours"), result["ratios"][name].get("original")
        ratio = ""
        if found and found["cpu"] is not None:
            ratio = f"{found['cpu']:.1f}× [{found['cpu_min']:.1f}, {found['cpu_max']:.1f}]"
        speed = (
            f"{mine['per_second']:.0f}/s, {mine['p50_ms']:.2f} {mine['p99_ms']:.2f} {mine['p999_ms']:.2f}"
            if mine
            else ""
        )
        goal = f"{GOALS_MS[name]:g}" if name in GOALS_MS else ""
        lines.append(f"{name:18} {cells[0]:>24} {cells[1]:>26} {ratio:>22} {goal:>6}   {speed}")
    floor = result["scenarios"].get(FLOOR, {}).get("nginx")
    if floor:
        times = result["ratios"][FLOOR]["nginx"]["cpu"]
        times_text = f"; ours costs {1 / times:.1f}× that" if times else ""
        lines.append(f"nginx before the same engine: {floor['cpu_ms']:.3f} ms CPU{times_text} (goal ≤ 3×)")
    lines.append(
        f"memory of the tree (PSS), MiB: {result['memory_mib']}; memcpy {result['memcpy_mb_s']} MB/s"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--only", choices=("ours", "original"), help="one proxy alone")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help="requests under way at a time")
    arguments = parser.parse_args()
    result = compare(arguments, tokenizer_folder())
    print(table(result))
    print("kept in", machine.keep("per_request", result).relative_to(HERE.parent))


if __name__ == "__main__":
    main()
