"""Draws the newest results as pictures beside them, each naming machine, commit and date.

    python -m benchmarks plots [--quick] [--png] [--into FOLDER]

  cost_by_scenario.svg         CPU a request, ours beside the original and the goal
  throughput_by_length.svg     requests a second and CPU by messages in a conversation, ours and the original
  cleanup_latency.svg          /health latency with and without a running cleanup
  memory_by_sessions.svg       resident memory by sessions of 8 turns, ours and the original
  scaling.svg                  CPU a request and throughput by workers
  growth.svg                   cost by sessions, turns and shards: lines must be flat

A result that is not there leaves its picture out. The ground is white, so that they can be read on a dark
page. Wants matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.command import flags, parsed
from benchmarks.goals import COST_MS, FLAT, WORKERS

OURS, ORIGINAL, GOAL = "#1b6ca8", "#8c8c8c", "#d1495b"
COLOURS = {"ours": OURS, "original": ORIGINAL}
LABELS = {"ours": "areal_fast", "original": "AReaL 1.0.4"}
Result = dict[str, Any]


def source(result: Result) -> str:
    its = result["machine"]
    quick = " · few requests, to show that it works" if result.get("quick") else ""
    return f"{its['cpu']}, {its['cpus_usable']} CPUs · commit {its['commit']} · {its['date'][:10]}{quick}"


def cost_by_scenario(plt: Any, result: Result) -> Any:
    names = list(result["scenarios"])
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1.4))
    for i, name in enumerate(names):
        for who, shift in (("ours", -0.2), ("original", 0.2)):
            one = result["scenarios"][name].get(who)
            if one:
                label = LABELS[who] if i == 0 else None
                axes.barh(i + shift, one["cpu_ms"], 0.38, color=COLOURS[who], label=label)
                spread = [[one["cpu_ms"] - one["cpu_ms_min"]], [one["cpu_ms_max"] - one["cpu_ms"]]]
                axes.errorbar(one["cpu_ms"], i + shift, xerr=spread, color="black", linewidth=0.8)
        found = result["ratios"][name].get("original")
        if found and found["cpu"]:
            widest = result["scenarios"][name]["original"]["cpu_ms_max"]
            axes.text(widest * 1.15, i + 0.2, f"{found['cpu']:.1f}×", va="center", fontsize=8)
        if name in COST_MS:
            goal = "goal" if name == next(iter(COST_MS)) else None
            axes.plot([COST_MS[name]] * 2, [i - 0.42, i + 0.02], color=GOAL, linewidth=2, label=goal)
    axes.set_xscale("log")
    axes.set_xlim(right=3 * axes.get_xlim()[1])  # for the ratios' text
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("CPU ms a request, whole process tree (log)")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def throughput_by_length(plt: Any, result: Result) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    for who, by_length in result["targets"].items():
        xs = [int(length) for length in by_length]
        for axes, name in ((left, "per_second"), (right, "cpu_ms")):
            rounds = [[one[name] for one in found["rounds"]] for found in by_length.values()]
            axes.fill_between(
                xs, list(map(min, rounds)), list(map(max, rounds)), color=COLOURS[who], alpha=0.2
            )
            ys = [found[name] for found in by_length.values()]
            axes.plot(xs, ys, "o-", markersize=4, color=COLOURS[who], label=LABELS[who])
    for axes, label in ((left, "chats a second (log)"), (right, "CPU ms a chat (log)")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.minorticks_off()
        axes.set_xlabel(f"messages, all but {result['fresh']} tokens known")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    left.legend(fontsize=8)
    return figure


def cleanup_latency(plt: Any, result: Result) -> Any:
    names = ["p50_ms", "p99_ms", "p999_ms"]
    titles = {"shared": "workers and cleaner on one core", "free": "the cleaner on another core"}
    placings = result["placings"]
    figure, grid = plt.subplots(1, len(placings), figsize=(4 * len(placings), 3), squeeze=False, sharey=True)
    for axes, (placing, found) in zip(grid[0], placings.items(), strict=True):
        for which, colour, shift in (("without_cleanup", ORIGINAL, -0.2), ("during_cleanup", OURS, 0.2)):
            bars = [found[which][name] for name in names]
            drawn = axes.bar(
                [i + shift for i in range(3)], bars, 0.38, color=colour, label=which.replace("_", " ")
            )
            axes.bar_label(drawn, fmt="%.2f", fontsize=7)
        axes.set_xticks(
            range(3),
            [f"{x}\n{found['ratio'][n]:.2f}×" for x, n in zip(("p50", "p99", "p99.9"), names, strict=True)],
        )
        axes.set_title(f"{titles[placing]}, {len(found['cleanup_runs'])} cleanups", fontsize=9)
        axes.margins(y=0.15)
    grid[0][0].set_ylabel(f"/health, ms, at {result['rate']:g} a second")
    grid[0][0].legend(fontsize=8, loc="upper left")
    return figure


def memory_by_sessions(plt: Any, result: Result) -> Any:
    by_target = result["parts"].get("memory")
    if not by_target:
        return None
    figure, axes = plt.subplots(figsize=(5, 3))
    for who, part in by_target.items():
        points = [{"sessions": 0, "resident_mib": 0.0}, *part["points"]]
        xs, ys = [one["sessions"] for one in points], [one["resident_mib"] for one in points]
        axes.plot(xs, ys, "o-", color=COLOURS[who], label=LABELS[who])
        axes.annotate(
            f"{ys[-1]:.0f} MiB", (xs[-1], ys[-1]), (-4, 5), textcoords="offset points", ha="right", fontsize=8
        )
    axes.set_xlabel("live sessions of 8 turns, ~2k tokens")
    axes.set_ylabel("MiB beyond the empty proxy")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return figure


def scaling(plt: Any, result: Result) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    for name, by_number in result["scenarios"].items():
        xs, points = [int(n) for n in by_number], list(by_number.values())
        left.plot(xs, [one["cpu_ratio"] for one in points], "o-", markersize=4, label=name)
        right.plot(xs, [one["per_second"] / points[0]["per_second"] for one in points], "o-", markersize=4)
    left.axhline(WORKERS, color=GOAL, linewidth=1, linestyle="--")
    left.set_ylim(0, max(1.5, 1.1 * left.get_ylim()[1]))
    left.set_ylabel("CPU a request, one worker = 1")
    right.plot(xs, xs, color=GOAL, linewidth=1, linestyle="--")
    right.set_ylabel("requests a second, one worker = 1")
    for axes in (left, right):
        axes.set_xticks(xs)
        axes.set_xlabel("workers" + (" (all on one CPU)" if result["shared_cpus"] else ""))
        axes.grid(alpha=0.25)
    left.legend(fontsize=8, loc="lower right")
    return figure


def growth(plt: Any, result: Result) -> Any:
    wanted = [
        (
            "sessions",
            "live",
            {"turn_beside_few": "turn", "start_beside_few": "start", "health_beside_few": "/health"},
            "live sessions",
        ),
        ("turns", "turns", {"beside_young": "turn"}, "turns in one session"),
        ("shards", "shards", {"put_us": "put", "get_us": "get"}, "shards"),
    ]
    there = [one for one in wanted if one[0] in result["parts"]]
    if not there:
        return None
    figure, grid = plt.subplots(1, len(there), figsize=(3 * len(there), 2.8), squeeze=False, sharey=True)
    for axes, (part, x, costs, label) in zip(grid[0], there, strict=True):
        points = result["parts"][part]["ours"]["points"]
        for cost, name in costs.items():
            values = [point[cost] / points[0][cost] for point in points]
            axes.plot([p[x] for p in points], values, "o-", markersize=4, label=name)
        axes.axhline(FLAT, color=GOAL, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right")
    grid[0][0].set_ylim(0, max(1.5, grid[0][0].get_ylim()[1]))
    grid[0][0].set_ylabel("CPU, the first point = 1")
    return figure


Paint = Callable[[Any, Result], Any]
FIGURES: dict[str, tuple[str, dict[str, Any], Paint]] = {
    "cost_by_scenario": ("per_request", {"connections": 8}, cost_by_scenario),
    "throughput_by_length": ("conversation_length", {}, throughput_by_length),
    "cleanup_latency": ("cleanup_latency", {}, cleanup_latency),
    "memory_by_sessions": ("growth", {}, memory_by_sessions),
    "scaling": ("scaling", {}, scaling),
    "growth": ("growth", {}, growth),
}


def draw(into: Path, quick: bool = False, png: bool = False) -> list[Path]:
    """All figures there are results for. Returns the files written."""
    import matplotlib

    matplotlib.use("svg")
    # the same results make the same bytes
    matplotlib.rcParams |= {"svg.hashsalt": "areal_fast", "font.size": 9, "savefig.facecolor": "white"}
    import matplotlib.pyplot as plt

    into.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (benchmark, wanted, paint) in FIGURES.items():
        result = machine.newest(benchmark, quick, **wanted)
        figure = paint(plt, result) if result is not None else None
        if result is None or figure is None:
            print(f"{name}: no result to draw", flush=True)
            continue
        figure.text(0.01, 0.005, source(result), fontsize=6, color="#606060")
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        for kind in ("svg", "png") if png else ("svg",):
            path = into / f"{name}.{kind}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
            written.append(path)
            print(f"{name}: {path}", flush=True)
        plt.close(figure)
    return written


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--into", type=Path, help="default: where the results are")
    parser.add_argument("--png", action="store_true", help="PNG as well as SVG")
    arguments = parsed(parser)
    draw(arguments.into or machine.folder(arguments.quick), arguments.quick, arguments.png)


if __name__ == "__main__":
    main()
