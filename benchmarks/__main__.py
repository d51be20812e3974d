"""`python -m benchmarks [NAME [flags…]]`: one benchmark by name, or all of them.

Without a name everything runs, in about half an hour, and the figures are drawn at the end; `--quick` is the
same with small numbers, in a few minutes: it shows that everything works, not how fast it is.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

NAMES = ("per_request", "cleanup_latency", "growth", "scaling", "soak", "plots", "gpu")
LOADED = ("health", "start_session", "chat_short", "chat_long", "set_reward")
WHOLE: list[list[str]] = [
    ["per_request"],
    ["per_request", "--connections", "64", *(f for name in LOADED for f in ("--scenario", name))],
    ["growth", "--original"],
    ["scaling"],
    ["cleanup_latency", "--cleanups", "8"],
    ["plots"],
    ["gpu"],
]
QUICK: list[list[str]] = [
    ["per_request", "--quick", "--rounds", "1"],
    ["growth", "--quick"],
    ["scaling", "--quick", "--rounds", "1"],
    ["cleanup_latency", "--cleanups", "1", "--sessions", "40", "--rate", "500", "--session-timeout", "8"],
    ["plots"],
]


def main() -> int:
    arguments = sys.argv[1:]
    quick = arguments[:1] == ["--quick"]
    if arguments and arguments[0] not in NAMES and not quick:
        print(f"benchmarks: {', '.join(NAMES)}; each explains itself with --help", file=sys.stderr)
        return 2
    whole = QUICK if quick else WHOLE
    runs = [arguments] if arguments and not quick else whole
    began = time.monotonic()
    for number, (name, *flags) in enumerate(runs, 1):
        took = time.monotonic() - began
        print(f"[{number}/{len(runs)}, {took / 60:.1f} min] {' '.join([name, *flags])}", flush=True)
        done = subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *flags], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
