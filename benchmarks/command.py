"""What the benchmark programs have in common: flags, progress, and what becomes of a result."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.targets import Text


def flags(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every program takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small numbers: shows that it works")
    parser.add_argument("--seed", type=int, default=0, help="another one makes all text another")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags; from now on text is of that seed."""
    arguments = parser.parse_args()
    Text.run_seed = arguments.seed
    return arguments


def begun(name: str, arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """A result's head: which program, where and when, and how much of it."""
    head = {"benchmark": name, "machine": machine.described()}
    return head | {"quick": arguments.quick, "seed": arguments.seed} | more


def kept(result: dict[str, Any]) -> None:
    """Writes a result down and says where."""
    path = machine.keep(result["benchmark"], result)
    print("kept in", path.relative_to(machine.RESULTS.parents[1]), flush=True)


class Progress:
    """One line a step done, with the share done and the time the rest will take if it goes on like this."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * max(0, self._steps - self._done)
        print(f"  {self._done:3}/{self._steps} {left / 60:5.1f} min left  {line}", flush=True)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and extremes. Raises ValueError of none."""
    found = sorted(values)
    return {"median": median(found), "min": found[0], "max": found[-1]}
