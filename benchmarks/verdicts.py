"""Which goals the newest results meet: a table with a verdict for each, printed and kept as results/goals.md.

    python -m benchmarks verdicts [--quick]

A row names the commit and date of its result where they are not those of the newest one. What a row is judged
by stands in goals.py.
"""

from __future__ import annotations

from benchmarks import machine
from benchmarks.command import flags, parsed
from benchmarks.goals import JUDGES, Result, Row

WITHOUT = {"gpu": "no GPU on this machine", "soak": "make soak-churn takes 30 minutes"}


def judged(results: dict[str, Result | None]) -> list[Row]:
    """A row a goal; one that has no result says so."""
    rows: list[Row] = []
    latest = max((one["machine"]["date"] for one in results.values() if one), default="")
    for name, judge in JUDGES.items():
        result = results.get(name)
        if result is None:
            rows.append(Row(name, "", "", None, note=WITHOUT.get(name, f"no result of {name}")))
            continue
        try:
            found = list(judge(result))
        except LookupError:
            found = [Row(name, "", "", None, note="its newest result is of an older form")]
        for row in found:
            if result["machine"]["date"][:10] != latest[:10]:
                row.note = "; ".join(
                    filter(
                        None, (row.note, f"{result['machine']['commit']}, {result['machine']['date'][:10]}")
                    )
                )
            rows.append(row)
    return rows


def table(rows: list[Row], head: str) -> str:
    """Markdown that also reads well on a terminal: columns are padded."""
    cells = [("", "goal", "areal_fast", "AReaL 1.0.4", "verdict")]
    cells += [(row.what, row.goal, row.measured, row.original, row.verdict) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    counts = {
        said: sum(row.verdict.startswith(said) for row in rows) for said in ("met", "missed", "not shown")
    }
    return "\n".join(
        [head, "", *lines, "", ", ".join(f"{number} {said}" for said, number in counts.items()), ""]
    )


def newest(quick: bool) -> dict[str, Result | None]:
    """The newest result of each program; of per_request that with the usual number of connections."""
    wanted = {"per_request": {"connections": 8}}
    return {name: machine.newest(name, quick, **wanted.get(name, {})) for name in JUDGES}


def main() -> None:
    arguments = parsed(flags(__doc__))
    results = newest(arguments.quick)
    found = [one["machine"] for one in results.values() if one]
    if not found:
        raise SystemExit("no results yet: make bench")
    its = max(found, key=lambda one: str(one["date"]))
    head = (
        f"{its['cpu']}, {its['cpus_usable']} CPUs, Python {its['python']}, commit {its['commit']}, "
        f"{its['date'][:10]}"
    )
    if arguments.quick:
        head += " (quick: shows that it works, not how fast it is)"
    text = table(judged(results), head)
    print(text)
    path = machine.folder(arguments.quick) / "goals.md"
    path.write_text(text)
    print("kept in", path.relative_to(machine.RESULTS.parents[1]))


if __name__ == "__main__":
    main()
