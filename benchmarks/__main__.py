"""`python -m benchmarks [NAME [flags…]]`: one benchmark by name, or all of them.

    python -m benchmarks [--quick] [--seed N] [--conversations FILE] [--from NAME] [--skip NAME…]
    python -m benchmarks NAME --help

Without a name everything runs beside the original, in about half an hour on two CPUs; at the end the results
are drawn and judged. `--quick` is the same with small numbers, in a few minutes: it shows that everything
works, not how fast it is. A program that fails does not take the others' results with it: each keeps its own
as it ends, the run goes on, says at its end what failed, and exits 1. `--from` goes on from where a run was
stopped; a single program is run again by its name, and `verdicts` and `plots` after it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT, machine

LOADED = ("health", "start_session", "chat_short", "chat_long", "set_reward")
# program, flags, minutes it takes on two CPUs
WHOLE: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("per_request", (), 5),
    ("per_request", ("--connections", "64", *(f for name in LOADED for f in ("--scenario", name))), 2),
    ("conversation_length", (), 3),
    ("cleanup_latency", (), 8),
    ("dump_rate", (), 1),
    ("shard_ways", ("--original",), 1.5),
    ("routed_experts", (), 1),
    ("growth", ("--original",), 8),
    ("scaling", (), 2),
    ("micro", (), 1),
    ("gpu", (), 0.1),
    ("plots", (), 0.1),
    ("verdicts", (), 0.1),
)
QUICK: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("per_request", ("--rounds", "1"), 1),
    ("conversation_length", ("--rounds", "1"), 0.5),
    ("cleanup_latency", ("--cleanups", "1"), 0.5),
    ("dump_rate", ("--rounds", "1"), 0.3),
    ("shard_ways", (), 0.3),
    ("routed_experts", (), 0.5),
    ("growth", (), 1),
    ("scaling", ("--rounds", "1"), 0.3),
    ("micro", (), 0.3),
    ("plots", (), 0.1),
    ("verdicts", (), 0.1),
)
ALONE = ("soak", "compare")
PROGRAMS = {name for name, _, _ in WHOLE} | set(ALONE)


def started(name: str, flags: Sequence[str]) -> int:
    """Runs it to its end; its exit status."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=ROOT, check=False
    ).returncode


def whole(arguments: argparse.Namespace) -> int:
    common = [*(["--quick"] if arguments.quick else []), "--seed", str(arguments.seed)]
    steps = list(QUICK if arguments.quick else WHOLE)
    if arguments.start:
        steps = steps[[name for name, _, _ in steps].index(arguments.start) :]
    steps = [one for one in steps if one[0] not in arguments.skip]
    began, failed = time.monotonic(), []
    for number, (name, flags, _) in enumerate(steps, 1):
        took = (time.monotonic() - began) / 60
        done, left = (sum(one[2] for one in part) for part in (steps[: number - 1], steps[number - 1 :]))
        left *= took / done if done else 1.0  # this machine's pace
        print(
            f"\n[{number}/{len(steps)}, {took:.1f} min, about {left:.0f} to go] {' '.join([name, *flags])}",
            flush=True,
        )
        more = [] if name == "gpu" else common
        if name == "per_request" and arguments.conversations and "--connections" not in flags:
            more = [*more, "--conversations", str(arguments.conversations.resolve())]
        if started(name, [*flags, *more]):
            failed.append(name)
            print(f"{name} failed; the others go on", flush=True)
    where = machine.folder(arguments.quick).relative_to(ROOT)
    print(f"\n{(time.monotonic() - began) / 60:.1f} min; results, plots (*.svg) and goals.md are in {where}/")
    if failed:
        print(f"failed: {', '.join(failed)}; again by: python -m benchmarks NAME")
    return 1 if failed else 0


def main() -> int:
    words = sys.argv[1:]
    if words and words[0] in PROGRAMS:
        return started(words[0], words[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=f"NAME: {', '.join(sorted(PROGRAMS))}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small numbers, in a few minutes")
    parser.add_argument("--seed", type=int, default=0, help="another one makes all text another")
    parser.add_argument(
        "--conversations", type=Path, help="JSON lines of messages, as a scenario of your own"
    )
    parser.add_argument(
        "--from", dest="start", choices=sorted(PROGRAMS - set(ALONE)), help="begin with that program"
    )
    parser.add_argument("--skip", action="append", default=[], choices=sorted(PROGRAMS), help="leave one out")
    return whole(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
