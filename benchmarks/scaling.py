"""Does a request cost the same with many workers as with one? CPU a request and throughput by workers.

    python -m benchmarks scaling [--workers 1 --workers 2 …] [--rounds 3] [--quick]

A proxy for every number of workers is up for the whole run; each round measures a scenario on all of them in
turn, by CPU milliseconds a request of the process tree, with as many connections a worker. Workers run on as
many CPUs as there are of them, where the machine has those and two more for engine and generator. On a
smaller one all workers share the last CPU (`shared_cpus` in the result), engine and generator have the
others: throughput then says nothing, and a request costs more with more workers, because they push each other
out of the caches and find less to do each time they wake: an upper bound.
"""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

from benchmarks import load, meter
from benchmarks.command import Progress, begun, flags, kept, parsed
from benchmarks.scenarios import SCENARIOS
from benchmarks.targets import USABLE, Target, engine, place, proxy, step_aside

NAMES = ("health", "start_session", "chat_short", "set_reward", "export")
CONNECTIONS = 32
"""A worker."""


def run(numbers: list[int], rounds: int, quick: bool) -> dict[str, Any]:
    shared = len(USABLE) < max(numbers) + 2
    measured: dict[str, dict[int, list[dict[str, float]]]] = {name: {} for name in NAMES}
    step_aside(1 if shared else max(numbers))
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(engine())
        targets: dict[int, Target] = {}
        for number in numbers:
            one = proxy("ours", backend, "--arena-max-bytes", "512M", workers=number, seed=number)
            targets[number] = stack.enter_context(one)
            place(meter.tree(targets[number].pid), USABLE[-1:] if shared else USABLE[-number:])
        said = Progress(rounds * len(NAMES) * len(numbers))
        for turn in range(rounds):
            for name in NAMES:
                for number in numbers if turn % 2 == 0 else numbers[::-1]:
                    prepare, count, _ = SCENARIOS[name]
                    target = targets[number]
                    connections = CONNECTIONS * number
                    count = max(connections, count // (10 if quick else 2))
                    prepared = prepare(target, count)
                    assert not callable(prepared)
                    before = target.cpu_s()
                    outcome = target.run(prepared, connections=connections)
                    point = {
                        "cpu_ms": 1000 * (target.cpu_s() - before) / count,
                        "per_second": count / outcome.seconds,
                        "p99_ms": 1000 * load.quantile(outcome.latencies, 0.99),
                    }
                    measured[name].setdefault(number, []).append(point)
                    said(
                        f"{name:14} {number} workers {point['cpu_ms']:7.3f} ms CPU "
                        f"{point['per_second']:8.0f}/s"
                    )
    first = numbers[0]
    return {
        "shared_cpus": shared,
        "scenarios": {
            name: {
                str(number): {
                    "cpu_ms": statistics.median(one["cpu_ms"] for one in points),
                    "per_second": statistics.median(one["per_second"] for one in points),
                    "cpu_ratio": statistics.median(
                        one["cpu_ms"] / base["cpu_ms"] if base["cpu_ms"] else 1.0
                        for one, base in zip(points, by_number[first], strict=True)
                    ),
                    "rounds": points,
                }
                for number, points in by_number.items()
            }
            for name, by_number in measured.items()
        },
    }


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parsed(parser)
    most = max(2, min(8, len(USABLE) - 2))
    numbers = arguments.workers or sorted({1, 2, *(n for n in (4, 5, 8) if n <= most)})
    result = begun("scaling", arguments) | run(numbers, arguments.rounds, arguments.quick)
    print(f"{'CPU ms a request':16}" + "".join(f"{n:>4} workers     " for n in numbers))
    for name, by_number in result["scenarios"].items():
        cells = [f"{one['cpu_ms']:8.3f} ({one['cpu_ratio']:.2f}x)" for one in by_number.values()]
        print(f"{name:16}" + " ".join(cells))
    if result["shared_cpus"]:
        print("all workers shared a CPU: throughput by workers means nothing here")
    kept(result)


if __name__ == "__main__":
    main()
