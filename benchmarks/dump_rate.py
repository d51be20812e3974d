"""How fast do dumps reach the disk? The cleaner's megabytes a second, beside the disk's own.

    python -m benchmarks dump_rate [--rounds 3] [--sessions 500] [--dump-dir FOLDER]

Each round fills a proxy with sessions of 8 turns that grow to about 4,000 tokens, leaves them alone until
they are stale, and measures, while nobody asks for anything but /health 50 times a second:

  wall     bytes of all dumps over the time from the first session's end to the last dump, fsync included
  core     the same bytes over the CPU time that the cleaner took: its own clock, not waiting for the disk
  disk     what this disk does with files of the same number and size, in the same round: written from
           memory one after the other, each with fsync, rename and fsync of the folder; disk_core is that by
           CPU time: what the kernel alone takes
  bulk     the same bytes as one file with one fsync at its end: no smaller file can be faster

The goal is 400 MB/s a core or the disk's limit.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks import load, machine, meter
from benchmarks.cleanup_latency import emptied, fill, first_and_last, with_dumps
from benchmarks.command import Progress, begun, flags, kept, parsed, spread
from benchmarks.targets import USABLE, place, step_aside


def written(folder: Path, size: int, count: int) -> tuple[float, float]:
    """Seconds, and those of CPU, for `count` files of `size` bytes, each on disk under its name before the
    next is begun."""
    block = os.urandom(size)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    began, before = time.perf_counter(), time.thread_time()
    for number in range(count):
        file = os.open(folder / f"{number}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        left = memoryview(block)
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
        os.close(file)
        os.rename(folder / f"{number}.tmp", folder / f"{number}.json")
        os.fsync(directory)
    took = time.perf_counter() - began, time.thread_time() - before
    os.close(directory)
    emptied(folder)
    return took


def run(sessions: int, rounds: int, where: str | None) -> dict[str, Any]:
    step_aside()
    found: dict[str, list[float]] = {
        name: [] for name in ("wall", "core", "disk", "disk_core", "bulk", "wall_of_disk")
    }
    with with_dumps(4.0, 1, where) as (target, dumps):
        cleaner = target.health()["cleaner"]["pid"]
        place([cleaner], USABLE[-1:])
        said = Progress(rounds)
        for _ in range(rounds):
            fill(target, sessions)
            before = meter.process_cpu_s(cleaner)
            first, last = load.run(first_and_last(target, dumps, sessions))
            used = meter.process_cpu_s(cleaner) - before
            nbytes = emptied(dumps)
            size = nbytes // sessions
            found["wall"].append(nbytes / (last - first) / 1e6)
            found["core"].append(nbytes / used / 1e6)
            wall, cpu = written(dumps, size, sessions)
            found["disk"].append(size * sessions / wall / 1e6)
            found["disk_core"].append(size * sessions / cpu / 1e6)
            found["bulk"].append(nbytes / written(dumps, nbytes, 1)[0] / 1e6)
            found["wall_of_disk"].append(found["wall"][-1] / found["disk"][-1])
            latest = ", ".join(f"{name} {values[-1]:.0f}" for name, values in list(found.items())[:5])
            said(f"{nbytes / 1e6:.0f} MB in {sessions} dumps; MB/s: {latest}")
        kind = machine.filesystem(dumps)
    return {
        "filesystem": kind,
        "bytes": nbytes,
        "mb_s": {name: spread(values) for name, values in found.items()},
    }


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument(
        "--dump-dir", default=None, help="where dumps go; default: the temporary folder's disk"
    )
    arguments = parsed(parser)
    sessions = min(arguments.sessions, 100) if arguments.quick else arguments.sessions
    result = begun("dump_rate", arguments, sessions=sessions) | run(
        sessions, arguments.rounds, arguments.dump_dir
    )
    for name, one in result["mb_s"].items():
        print(f"{name:13}{one['median']:8.2f} [{one['min']:.2f}, {one['max']:.2f}]")
    kept(result)


if __name__ == "__main__":
    main()
