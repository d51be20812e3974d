"""What the benchmarks say of their results: goals, growth, comparisons, and runs of all programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as running
from benchmarks import compare, conversation_length, goals, machine, scenarios, verdicts

MACHINE = {
    "cpu": "X",
    "cpus_usable": 2,
    "python": "3.11",
    "commit": "abc",
    "date": "2026-01-02T00:00:00+00:00",
}
SHARES = ("p50_ms", "p99_ms", "p999_ms")


def result(**fields: Any) -> dict[str, Any]:
    return {"machine": MACHINE, "quick": False} | fields


def per_request(cpu_ms: float, encoder_ms: float = 8.0, **ratios: Any) -> dict[str, Any]:
    mine = {"cpu_ms": cpu_ms, "cpu_ms_min": cpu_ms, "cpu_ms_max": cpu_ms}
    names = ("health", "chat_short", "chat_long_fresh")
    return result(
        scenarios={name: {"ours": mine} for name in names},
        ratios=dict.fromkeys(names, ratios),
        encoder_ms=encoder_ms,
    )


def by_what(rows: list[goals.Row]) -> dict[str, bool | None]:
    return {row.what: row.met for row in rows}


def test_costs_are_held_against_their_limits() -> None:
    nginx = {"nginx": {"cpu": 0.25, "cpu_min": 0.2, "cpu_max": 0.5}}
    found = by_what(list(goals.per_request(per_request(0.1, **nginx))))
    assert found == {
        "health, CPU ms": False,
        "chat_short, CPU ms": True,
        "chat_long_fresh, CPU ms": True,
        "chat_short over nginx, CPU": False,
    }
    without = by_what(list(goals.per_request(per_request(8.5))))
    assert without["chat_long_fresh, CPU ms"] is False, "8.5 is more than the encoder's 8 and 0.4"
    assert without["chat_short over nginx, CPU"] is None, "nginx was not there"


def cleanup(ratio: float, cpus: int, rate: float = 2000.0, number: int = 20) -> list[goals.Row]:
    one = {"ratio": dict.fromkeys(SHARES, ratio), "cleanup_runs": [{}] * number}
    return list(goals.cleanup_latency(result(placings={"free": one, "shared": one}, rate=rate, cpus=cpus)))


def test_a_cleanup_is_judged_by_where_the_cleaner_ran() -> None:
    assert [row.met for row in cleanup(1.05, 8)] == [True, True]
    assert [row.met for row in cleanup(1.3, 8)] == [False, True], "1.1 with a free core, 2 on one"
    assert [row.met for row in cleanup(2.5, 8)] == [False, False]
    free, shared = cleanup(1.3, 2, rate=500.0, number=3)
    assert free.met is None and "generator" in free.verdict, "two CPUs cannot tell"
    assert shared.met and "3 cleanups at 500/s" in shared.verdict


def routed(delay: float, noise: float) -> list[goals.Row]:
    cost = {name: {"median": 100.0, "min": 90.0, "max": 120.0} for name in ("warm", "cold")}
    window = {"max_ms": noise}
    return list(
        goals.routed_experts(
            result(
                base64_mib=100.0,
                cpu_ms=cost,
                quiet={"chat": window, "health": window},
                busy={"engine": window},
                delay_ms={
                    kind: {"p50_ms": 0.1, "p99_ms": delay, "max_ms": delay} for kind in ("chat", "health")
                },
            )
        )
    )


def test_a_delay_counts_unless_what_has_no_part_in_it_was_as_slow() -> None:
    assert [row.met for row in routed(4.0, 1.0)] == [False, True, True, True]
    assert [row.met for row in routed(6.0, 1.0)][2:] == [False, False]
    assert [row.met for row in routed(6.0, 9.0)][2:] == [None, None]


def test_dumps_may_be_as_slow_as_the_disk() -> None:
    def judge(core: float, wall: float, disk: float) -> bool | None:
        rates = {"core": core, "wall": wall, "disk": disk, "wall_of_disk": wall / disk}
        found = result(mb_s={name: {"median": value} for name, value in rates.items()})
        (row,) = goals.dump_rate(found)
        return row.met

    assert judge(600, 500, 2000)
    assert judge(600, 90, 100), "the disk does no more"
    assert judge(600, 90, 500) is False
    assert judge(300, 450, 2000) is False


def test_workers_that_share_cpus_show_no_failure() -> None:
    def judge(ratio: float, shared: bool) -> bool | None:
        by_number = {"1": {"cpu_ratio": 1.0, "per_second": 1.0}, "2": {"cpu_ratio": ratio, "per_second": 2.0}}
        row, _ = goals.scaling(result(scenarios={"health": by_number}, shared_cpus=shared))
        return row.met

    assert judge(1.05, True) and judge(1.05, False)
    assert judge(1.3, True) is None and judge(1.3, False) is False


def test_a_goal_without_a_result_is_not_shown_and_an_older_result_says_when() -> None:
    old = result(grew=[], seconds=1800.0) | {"machine": MACHINE | {"commit": "older", "date": "2026-01-01"}}
    results = {"per_request": per_request(0.01), "soak": old}
    rows = verdicts.judged(results)
    soak = next(row for row in rows if "soak" in row.what)
    assert soak.met and "older" in soak.verdict
    assert next(row for row in rows if row.what == "scaling").verdict == "not shown: no result of scaling"
    table = verdicts.table(rows, "head")
    assert table.startswith("head\n") and table.count("\n|") == len(rows) + 2
    assert f"{sum(row.met is True for row in rows)} met" in table


def test_a_further_message_is_priced_between_the_extremes() -> None:
    found = conversation_length.steps({"2": {"cpu_ms": 0.2}, "200": {"cpu_ms": 0.398}, "20": {"cpu_ms": 9.0}})
    assert found["last_over_first"] == pytest.approx(1.99)
    assert found["us_a_message"] == pytest.approx(1.0)


def test_a_comparison_has_what_both_results_have() -> None:
    first = result(a={"b": 2.0, "rounds": [1]}, c=[4, {"d": 0}], e=True)
    second = result(a={"b": 3.0, "rounds": [2]}, c=[1, {"d": 5}], f=1)
    rows = compare.side_by_side(first, second)
    assert [(place, ratio) for place, _, _, ratio in rows[:2]] == [("a.b", 1.5), ("c[0]", 0.25)]
    assert rows[2][:3] == ("c[1].d", 0.0, 5.0) and len(rows) == 3


def test_quick_results_stay_apart_and_the_newest_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for day, connections in (("01", 8), ("03", 64), ("02", 8)):
        its = MACHINE | {"date": f"2026-01-{day}T00:00:00+00:00"}
        machine.keep("per_request", result(connections=connections) | {"machine": its})
    machine.keep("per_request", result(quick=True, connections=8))
    found = machine.newest("per_request", connections=8)
    assert found is not None and found["machine"]["date"].startswith("2026-01-02") and not found["quick"]
    quick = machine.newest("per_request", quick=True)
    assert quick is not None and quick["quick"]
    assert machine.newest("per_request_", connections=8) is None


def test_conversations_of_a_file_become_chats(tmp_path: Path) -> None:
    system, question, answer = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    file = tmp_path / "talk.jsonl"
    lines = [[system, question, answer, question], {"messages": [question, answer]}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    first, second = map(scenarios.turns_of, scenarios.read_conversations(file))
    assert first == [[system, question], [system, question, answer, question]]
    assert second == [[question]]
    file.write_text('[{"role": "user"}]\n{"messages": []}\n')
    with pytest.raises(SystemExit, match=r"talk\.jsonl:2"):
        scenarios.read_conversations(file)


def test_a_program_that_fails_leaves_the_others_their_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def started(name: str, flags: Sequence[str]) -> int:
        ran.append([name, *flags])
        return name == "growth"

    monkeypatch.setattr(running, "started", started)
    flags = {
        "quick": True,
        "seed": 7,
        "conversations": Path("mine.jsonl"),
        "start": None,
        "skip": ["scaling"],
    }
    assert running.whole(argparse.Namespace(**flags)) == 1
    assert [one[0] for one in ran] == [name for name, *_ in running.QUICK if name != "scaling"]
    assert all(one[-3:] == ["--quick", "--seed", "7"] or "--conversations" in one for one in ran)
    assert sum("--conversations" in one for one in ran) == 1
    assert "failed: growth" in capsys.readouterr().out
    ran.clear()
    assert running.whole(argparse.Namespace(**flags | {"start": "plots"})) == 0
    assert [one[0] for one in ran] == ["plots", "verdicts"]
