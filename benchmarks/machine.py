"""What a result must say about where it was taken: machine, versions, commit, date. And where results are
kept.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, timeout=10, check=False
    )
    return done.stdout.strip()


def described() -> dict[str, Any]:
    """Of this run: the machine, its load when it began, versions, commit (with + if the tree had changes),
    date.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": _cpu_model(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
        "packages": {
            name: metadata.version(name)
            for name in ("uvloop", "httptools", "msgspec", "tokenizers")
            if _installed(name)
        },
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def folder(quick: bool = False) -> Path:
    """Where results are kept; made if need be."""
    place = RESULTS / "quick" if quick else RESULTS
    place.mkdir(parents=True, exist_ok=True)
    return place


def keep(name: str, result: dict[str, Any]) -> Path:
    """Write a result as benchmarks/results/NAME-DATE-COMMIT.json; a quick one in results/quick/, which git
    ignores."""
    machine = result["machine"]
    stamp = machine["date"].replace(":", "").replace("+0000", "Z")
    path = folder(bool(result.get("quick"))) / f"{name}-{stamp}-{machine['commit'].rstrip('+')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def newest(name: str, quick: bool = False, **wanted: Any) -> dict[str, Any] | None:
    """The last result of that program of whose fields these are as `wanted`, or None."""
    found = [json.loads(path.read_text()) for path in folder(quick).glob(f"{name}-2*.json")]
    found = [one for one in found if all(one.get(key) == value for key, value in wanted.items())]
    return max(found, key=lambda one: str(one["machine"]["date"]), default=None)


def filesystem(path: Path) -> str:
    """The type of the filesystem that holds it, as the kernel names it."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, its, *_ = line.split()
        if path.resolve().is_relative_to(where) and len(where) >= len(best):
            best, kind = where, its
    return kind
