"""What single steps of a request cost: benchmarks/micro by pytest-benchmark, its medians kept as a result.

python -m benchmarks micro [--quick] [pytest's flags…]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import ROOT
from benchmarks.command import begun, flags, kept


def main() -> int:
    arguments, others = flags(__doc__).parse_known_args()
    result = begun("micro", arguments)
    with tempfile.TemporaryDirectory(prefix="areal_fast-micro-") as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "pytest", "-q", "benchmarks/micro", f"--benchmark-json={found}"]
        command += ["--benchmark-columns=median,iqr,rounds", *others]
        if arguments.quick:
            command += ["--benchmark-max-time=0.1", "--benchmark-min-rounds=3"]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
        steps = json.loads(found.read_text())["benchmarks"]
    result["steps_us"] = {
        one["name"].removeprefix("test_"): {
            "median": 1e6 * one["stats"]["median"],
            "iqr": 1e6 * one["stats"]["iqr"],
            "rounds": one["stats"]["rounds"],
        }
        for one in steps
    }
    kept(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
