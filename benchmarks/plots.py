"""Draws the newest results: benchmarks/results/*.json → SVG beside them.

    python benchmarks/plots.py [--into FOLDER]

  cost_by_scenario.svg    CPU a request, ours beside the original and the goal
  growth.svg              cost by sessions, turns and shards
  memory_by_sessions.svg  resident memory by sessions of 8 turns
  cleanup_latency.svg     /health latency with and without a running cleanup
  scaling.svg             CPU a request by workers

Each names machine, commit and date. A result that is not there leaves its figure out. Wants matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import machine  # noqa: E402
from scenarios import GOALS_MS  # noqa: E402

OURS, ORIGINAL, GOAL = "#1b6ca8", "#b0b0b0", "#d1495b"


def newest(name: str, *, connections: int | None = None) -> dict[str, Any] | None:
    """The last result of a benchmark, `quick` ones only if there is no other."""
    found = [json.loads(path.read_text()) for path in machine.RESULTS.glob(f"{name}-*.json")]
    if connections is not None:
        found = [one for one in found if one.get("connections", 8) == connections]
    found.sort(key=lambda one: (not one.get("quick", False), one["machine"]["date"]))
    return found[-1] if found else None


def source(result: dict[str, Any]) -> str:
    its = result["machine"]
    return f"{its['cpu']}, {its['cpus_usable']} CPUs · commit {its['commit']} · {its['date'][:10]}"


def cost_by_scenario(plt: Any, result: dict[str, Any]) -> Any:
    names = list(result["scenarios"])
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(names) + 1.6))
    for i, name in enumerate(names):
        for who, colour, shift in (("ours", OURS, 0.2), ("original", ORIGINAL, -0.2)):
            one = result["scenarios"][name].get(who)
            if one:
                axes.barh(i - shift, one["cpu_ms"], 0.38, color=colour)
                spread = [[one["cpu_ms"] - one["cpu_ms_min"]], [one["cpu_ms_max"] - one["cpu_ms"]]]
                axes.errorbar(one["cpu_ms"], i - shift, xerr=spread, color="black", linewidth=0.8)
        found = result["ratios"][name].get("original")
        if found and found["cpu"]:
            widest = result["scenarios"][name]["original"]["cpu_ms_max"]
            axes.text(widest * 1.15, i + 0.2, f"{found['cpu']:.1f}×", va="center", fontsize=8)
        if name in GOALS_MS:
            axes.plot([GOALS_MS[name]] * 2, [i - 0.42, i + 0.42], color=GOAL, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(right=3 * axes.get_xlim()[1])  # for the ratios' text
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(
        "CPU ms a request of the whole process tree (log): blue ours, grey AReaL 1.0.4, red the goal"
    )
    return figure


def growth(plt: Any, result: dict[str, Any]) -> Any:
    wanted = [
        ("sessions", "live", ("turn_ms", "start_ms"), "live sessions", 1),
        ("turns", "turns", ("turn_ms",), "turns in one session", 1),
        ("shards", "shards", ("put_us", "get_us"), "shards", 1),
    ]
    there = [one for one in wanted if one[0] in result["parts"]]
    if not there:
        return None
    figure, grid = plt.subplots(1, len(there), figsize=(3.6 * len(there), 3), squeeze=False)
    for axes, (part, x, costs, label, _) in zip(grid[0], there, strict=True):
        points = result["parts"][part]["ours"]["points"]
        for cost in costs:
            unit = "µs" if cost.endswith("_us") else "ms"
            values = [point[cost] for point in points]
            axes.plot([p[x] for p in points], values, "o-", label=f"{cost.rpartition('_')[0]}, {unit} CPU")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.legend(fontsize=8)
    return figure


def memory_by_sessions(plt: Any, result: dict[str, Any]) -> Any:
    by_target = result["parts"].get("memory")
    if not by_target:
        return None
    figure, axes = plt.subplots(figsize=(5, 3))
    for who, colour in (("ours", OURS), ("original", ORIGINAL)):
        if who in by_target:
            points = [{"sessions": 0, "resident_mib": 0.0}, *by_target[who]["points"]]
            xs = [point["sessions"] for point in points]
            axes.plot(xs, [point["resident_mib"] for point in points], "o-", color=colour, label=who)
    axes.set_xlabel("sessions of 8 turns, ~2k tokens")
    axes.set_ylabel("memory beyond the empty proxy, MiB")
    axes.legend()
    return figure


def cleanup_latency(plt: Any, result: dict[str, Any]) -> Any:
    names = ["p50_ms", "p99_ms", "p999_ms"]
    figure, axes = plt.subplots(figsize=(5, 3))
    for which, colour, shift in (("without_cleanup", ORIGINAL, -0.2), ("during_cleanup", OURS, 0.2)):
        axes.bar(
            [i + shift for i in range(3)],
            [result[which][name] for name in names],
            0.38,
            color=colour,
            label=which.replace("_", " "),
        )
    axes.set_xticks(range(3), ["p50", "p99", "p99.9"])
    axes.set_yscale("log")
    axes.set_ylabel(f"/health latency, ms, at {result['rate']:g}/s")
    axes.legend()
    return figure


def scaling(plt: Any, result: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(5, 3))
    for name, by_number in result["scenarios"].items():
        axes.plot(
            [int(n) for n in by_number], [one["cpu_ratio"] for one in by_number.values()], "o-", label=name
        )
    axes.axhline(1.08, color=GOAL, linewidth=1)
    axes.set_ylim(0, 1.5)
    axes.set_xlabel("workers")
    axes.set_ylabel("CPU a request, one worker = 1")
    axes.legend(fontsize=8)
    return figure


FIGURES = {
    "cost_by_scenario": ("per_request", 8, cost_by_scenario),
    "growth": ("growth", None, growth),
    "memory_by_sessions": ("growth", None, memory_by_sessions),
    "cleanup_latency": ("cleanup_latency", None, cleanup_latency),
    "scaling": ("scaling", None, scaling),
}


def draw(into: Path) -> list[Path]:
    """All figures there are results for. Returns the files written."""
    import matplotlib

    matplotlib.use("svg")
    # the same results make the same bytes
    matplotlib.rcParams |= {"svg.hashsalt": "areal_fast", "font.size": 9}
    import matplotlib.pyplot as plt

    written = []
    for name, (benchmark, connections, paint) in FIGURES.items():
        result = newest(benchmark, connections=connections)
        figure = paint(plt, result) if result is not None else None
        if result is None or figure is None:
            print(f"{name}: no result to draw", flush=True)
            continue
        figure.text(0.01, 0.005, source(result), fontsize=6, color="#606060")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        path = into / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        written.append(path)
        print(f"{name}: {path}", flush=True)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--into", type=Path, default=machine.RESULTS)
    draw(parser.parse_args().into)


if __name__ == "__main__":
    main()
