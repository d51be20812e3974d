"""What a request costs beside the original: the same requests, the same engine, the same load, in turns.

    python -m benchmarks per_request [--rounds 3] [--scenario NAME…] [--quick] [--only ours] [--workers 1]
        [--connections 8] [--seed 0] [--conversations FILE]

All proxies run at once; in every round each scenario is measured on one and then on the others, so that what
the machine does meanwhile hits all. Measured are the CPU time of the whole proxy process tree (meter.py)
divided by the requests answered, requests a second and latencies, closed loop, and the tree's memory (PSS)
when the round's requests were answered; preparation (starting sessions, filling them) is not measured. A
ratio is taken within a round: its median and extremes are those of the rounds. The engine is the embedded
one, in a process of its own that counts for nobody. With two CPUs or more the proxies are pinned to the last
and everything else to the others. A reply that is no 2xx fails the run.

The original is AReaL 1.0.4 (tests/wire/areal_env.py). It answers an export with one batch of 6 shards, ours
in the same form for the same request; figures of pr1268 (48 shards) are therefore not reproduced here. The
floor of a chat is nginx before the same engine, that of a tensor is memcpy, and that of a prompt which nobody
has seen is the tokenizer's plain encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import load, meter
from benchmarks.command import Progress, begun, flags, kept, parsed
from benchmarks.goals import COST_MS
from benchmarks.scenarios import SCENARIOS, Scenario, engine_call, recorded
from benchmarks.targets import (
    CONNECTIONS,
    USABLE,
    Target,
    Text,
    engine,
    memcpy_mb_s,
    nginx,
    proxy,
    step_aside,
    tokenizer_folder,
)

ARENA = ("--arena-max-bytes", "1G")
NGINX_REQUESTS = 4000
FLOOR = "chat_short"
"""The scenario that nginx is measured beside."""
FIGURES = ("cpu_ms", "per_second", "p50_ms", "p99_ms", "p999_ms", "memory_mib")


def measure(target: Target, scenario: Scenario, quick: bool, connections: int) -> dict[str, float]:
    """One scenario on one proxy, once."""
    prepare, mine, theirs = scenario
    if target.name == "nginx":
        prepare, mine = engine_call, NGINX_REQUESTS
    count = (theirs if target.name == "original" else mine) // (10 if quick else 1)
    count = max(count, connections, 3 if quick else 8)
    prepared = prepare(target, count)
    before = target.cpu_s()
    outcome = prepared() if callable(prepared) else target.run(prepared, connections=connections)
    used = target.cpu_s() - before
    done = len(outcome.latencies)
    return {
        "requests": done,
        "cpu_ms": 1000 * used / done,
        "per_second": done / outcome.seconds,
        "p50_ms": 1000 * load.quantile(outcome.latencies, 0.5),
        "p99_ms": 1000 * load.quantile(outcome.latencies, 0.99),
        "p999_ms": 1000 * load.quantile(outcome.latencies, 0.999),
        "memory_mib": meter.tree_rss_bytes(target.pid) / 2**20,
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    cpu = [one["cpu_ms"] for one in rounds]
    medians = {name: statistics.median(one[name] for one in rounds) for name in FIGURES}
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
        "per_second_min": min(rate),
        "per_second_max": max(rate),
    }


def encoder_ms(count: int = 20) -> float:
    """CPU ms of the tokenizers library for a prompt like chat_long_fresh's, on one thread: median."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer_folder() / "tokenizer.json"))
    text, costs = Text(77), []
    for _ in range(count):
        words = "\n".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in text.messages(30, 4000)
        )
        before = time.thread_time()
        encoder.encode(words)
        costs.append(1000 * (time.thread_time() - before))
    return statistics.median(costs)


@contextlib.contextmanager
def proxies(arguments: argparse.Namespace) -> Iterator[list[Target]]:
    """Those that are asked for, up and pinned."""
    step_aside()
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(engine())
        targets = []
        for whose in ("ours", "original"):
            if arguments.only in (None, whose):
                one = proxy(whose, backend, *ARENA, workers=arguments.workers, seed=1)
                targets.append(stack.enter_context(one))
        if arguments.only is None:
            floor = stack.enter_context(nginx(backend))
            if floor is None:
                print(
                    "nginx is not installed (apt-get install nginx-light): no floor in this run", flush=True
                )
            else:
                targets.append(floor)
        yield targets


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    scenarios = {name: SCENARIOS[name] for name in arguments.scenario or SCENARIOS}
    if arguments.conversations:
        scenarios["conversations"] = (recorded(arguments.conversations), 1_000, 160)
    result = begun(
        "per_request",
        arguments,
        workers=arguments.workers,
        connections=arguments.connections,
        cpus=USABLE,
        memcpy_mb_s=round(memcpy_mb_s()),
    )
    if "chat_long_fresh" in scenarios:
        result["encoder_ms"] = encoder_ms()
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    with proxies(arguments) as targets:
        turns = [
            (name, target)
            for number in range(arguments.rounds)
            for name in scenarios
            for target in (targets if number % 2 == 0 else targets[::-1])
            if target.name != "nginx" or name == FLOOR
        ]
        said = Progress(len(turns))
        for name, target in turns:
            one = measure(target, scenarios[name], arguments.quick, arguments.connections)
            measured.setdefault(name, {}).setdefault(target.name, []).append(one)
            said(
                f"{name:17} {target.name:9}{one['cpu_ms']:9.3f} ms CPU {one['per_second']:7.0f}/s "
                f"p99 {one['p99_ms']:7.2f} ms"
            )
        result["memory_mib"] = {t.name: round(meter.tree_rss_bytes(t.pid) / 2**20, 1) for t in targets}
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
    """For a terminal: a line a scenario and proxy, then the floors."""
    lines = [
        f"{'':18}{'':9} {'CPU ms a request':>26} {'/s':>7} {'p50':>8} {'p99':>8} {'p99.9 ms':>8} "
        f"{'MiB':>6}  CPU, times ours      requests/s, ours over it"
    ]
    for name, by_target in result["scenarios"].items():
        for who, one in by_target.items():
            cpu = f"{one['cpu_ms']:.3f} [{one['cpu_ms_min']:.3f}, {one['cpu_ms_max']:.3f}]"
            tail = f"goal ≤ {COST_MS[name]:g}" if who == "ours" and name in COST_MS else ""
            found = result["ratios"][name].get(who)
            if found and found["cpu"]:
                tail = f"{found['cpu']:.1f}× [{found['cpu_min']:.1f}, {found['cpu_max']:.1f}]"
                speed = [found[key] for key in ("per_second", "per_second_min", "per_second_max")]
                tail = f"{tail:21}{speed[0]:.1f}× [{speed[1]:.1f}, {speed[2]:.1f}]"
            lines.append(
                f"{name:18}{who:9} {cpu:>26} {one['per_second']:7.0f} {one['p50_ms']:8.2f} "
                f"{one['p99_ms']:8.2f} {one['p999_ms']:8.2f} {one['memory_mib']:6.0f}  {tail}"
            )
    lines.append(f"memory of the trees at the end (PSS), MiB: {json.dumps(result['memory_mib'])}")
    lines.append(f"memcpy {result['memcpy_mb_s']} MB/s a core")
    if "encoder_ms" in result:
        lines.append(f"the plain encoder for a prompt of chat_long_fresh: {result['encoder_ms']:.2f} ms CPU")
    return "\n".join(lines)


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", choices=("ours", "original"), help="one proxy alone")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help="requests under way at a time")
    parser.add_argument("--conversations", type=Path, help="JSON lines of messages: a scenario of your own")
    result = compare(parsed(parser))
    print(table(result))
    kept(result)


if __name__ == "__main__":
    main()
