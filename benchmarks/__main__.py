"""`python -m benchmarks [NAME [flags…]]`: one benchmark by name, or all of them with their defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAMES = ("per_request", "cleanup_latency", "gpu")


def main() -> int:
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in NAMES:
        print(f"benchmarks: {', '.join(NAMES)}; each explains itself with --help", file=sys.stderr)
        return 2
    runs = [arguments] if arguments else [[name] for name in NAMES]
    for name, *flags in runs:
        done = subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *flags], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
