"""Puts two results of one program side by side: every figure of both, and the second over the first.

    python -m benchmarks compare A.json B.json

Only figures that both have, by their place in the result; single rounds are left out. Two runs on one machine
differ by its mood: what is to be believed was measured in one run, in turns. `*` marks what differs by more
than a tenth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEFT_OUT = {"machine", "rounds", "cleanup_runs", "windows", "cpus", "seed", "answers"}


def figures(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """(place, number) of every number in a result."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in LEFT_OUT:
                yield from figures(one, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from figures(one, f"{place}[{number}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield place, float(value)


def side_by_side(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(place, first, second, second over first) of what both have; over zero is not a number."""
    before, after = dict(figures(first)), dict(figures(second))
    return [
        (place, before[place], after[place], after[place] / before[place] if before[place] else float("nan"))
        for place in before
        if place in after
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    first, second = (json.loads(path.read_text()) for path in (arguments.first, arguments.second))
    if first.get("benchmark") != second.get("benchmark"):
        raise SystemExit(f"results of {first.get('benchmark')} and of {second.get('benchmark')}")
    for name, one in (("first", first), ("second", second)):
        its = one["machine"]
        quick = ", quick" if one.get("quick") else ""
        print(f"{name:7}{its['cpu']}, {its['cpus_usable']} CPUs, {its['commit']}, {its['date']}{quick}")
    rows = side_by_side(first, second)
    width = max((len(place) for place, *_ in rows), default=0)
    for place, before, after, ratio in rows:
        mark = "*" if not 1 / 1.1 <= ratio <= 1.1 and before != after else ""
        print(f"{place:{width}} {before:12.4g} {after:12.4g} {ratio:8.2f} {mark}")


if __name__ == "__main__":
    main()
