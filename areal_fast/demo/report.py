"""The end of the day in words and figures: what was done, what the accident cost, which checks hold.

Figures are of this run on this machine, with agents, trainer, engine and proxy sharing its cores: they
say that things work, not how fast the proxy can be (benchmarks/ does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from areal_fast.demo.agents import Failure
from areal_fast.demo.ledger import Check, Ledger
from areal_fast.demo.proxy import Usage
from areal_fast.demo.trainer import Dumps, Learned

SHOWN_WRONG = 5


@dataclass(slots=True)
class Accident:
    """The killed worker."""

    pid: int = 0
    at: float = 0.0
    recovered_at: float = 0.0


@dataclass(slots=True)
class Day:
    """Everything the report is made of."""

    ledger: Ledger
    learned: Learned
    dumps: Dumps
    usage: Usage
    folder: Path
    began: float
    ended: float = 0.0
    token_latency_s: float = 0.0
    request_latency_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    call_latency_s: dict[str, list[float]] = field(default_factory=dict)
    accident: Accident = field(default_factory=Accident)
    evening_sessions: int = 0
    checks: list[Check] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def report(day: Day) -> list[str]:
    """The report's lines."""
    lines = ["", "A day in the life of areal_fast", ""]
    for name, text in (
        ("served", _served(day)),
        ("exported", _exported(day)),
        ("dumped", _dumped(day)),
        ("weights", _weights(day)),
        ("accident", _accident(day)),
        ("latency", _latency(day)),
        ("resources", _resources(day)),
    ):
        first, *others = text
        lines.append(f"  {name:<10} {first}")
        lines += [f"  {'':<10} {other}" for other in others]
    lines += ["", "Checked", ""]
    for check in day.checks:
        lines.append(f"  {'ok    ' if check.holds else 'FAILED'}  {check.name} ({check.seen:,})")
        shown = check.wrong[:SHOWN_WRONG] if check.seen else ["there was nothing to check"]
        lines += [f"            {wrong:.150}" for wrong in shown]
        if len(check.wrong) > SHOWN_WRONG:
            lines.append(f"            and {len(check.wrong) - SHOWN_WRONG} more")
    failed = [check for check in day.checks if not check.holds]
    lines.append("")
    if failed:
        lines.append(
            f"{len(failed)} of {len(day.checks)} checks FAILED. The proxy's log: {day.folder}/proxy.log"
        )
    else:
        lines.append(f"All {len(day.checks)} checks hold. Dumps and the proxy's log are in {day.folder}")
    return lines


def _served(day: Day) -> list[str]:
    turns = day.ledger.turns
    streamed = sum(turn.streamed for turn in turns)
    tokens = sum(turn.completion_tokens for turn in turns)
    return [
        f"{len(turns):,} answers ({streamed:,} streamed) in {len(day.ledger.sessions):,} sessions, "
        f"{tokens:,} tokens, in {day.ended - day.began:.0f} s"
    ]


def _exported(day: Day) -> list[str]:
    learned = day.learned
    rewards = [session.reward for session in day.ledger.sessions.values() if session.fate == "exported"]
    mean = sum(reward or 0.0 for reward in rewards) / max(1, len(rewards))
    return [
        f"{learned.trajectories:,} trajectories ({learned.groups:,} groups), {learned.tokens:,} output ids,",
        f"as {learned.tensors:,} torch tensors of {learned.bytes / 2**20:.1f} MiB; mean reward {mean:.2f}",
    ]


def _dumped(day: Day) -> list[str]:
    size = sum(day.dumps.files.values()) / 2**20
    return [
        f"{len(day.dumps.files):,} files of {size:.1f} MiB: sessions that went stale, and at the end "
        f"{day.evening_sessions} live ones",
        f"in {day.dumps.folder}",
    ]


def _weights(day: Day) -> list[str]:
    update, spanning = day.ledger.update, day.ledger.spanning
    went_on = f"{_counted(spanning, 'answer')} under way went on, with tokens of both versions"
    return [
        f"updated after {update.began - day.began:.1f} s, generation paused for "
        f"{update.ended - update.began:.2f} s",
        went_on if spanning else "no answer was in the middle of its tokens just then",
    ]


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _accident(day: Day) -> list[str]:
    accident, broken = day.accident, len(day.failures)
    lines = [
        f"worker {accident.pid} was killed (SIGKILL) after {accident.at - day.began:.1f} s; "
        f"another took its place in {accident.recovered_at - accident.at:.2f} s",
        f"{_counted(broken, 'request')} broke; what broke was sent again and answered",
    ]
    lost = sum(not turn.found for turn in day.ledger.turns)
    unheard = day.ledger.extra
    kept = f"; {unheard} answers were recorded that never reached their agent" if unheard else ""
    lines.append(("nothing was lost" if not lost else f"{lost} ANSWERS WERE LOST") + kept)
    return lines


def _latency(day: Day) -> list[str]:
    calm = [
        turn
        for turn in day.ledger.turns
        if len(turn.found) == 1 and not _disturbed(day, turn.began, turn.ended)
    ]
    whole = [turn.latency_s for turn in calm]
    own = [
        turn.latency_s - day.request_latency_s - turn.completion_tokens * day.token_latency_s for turn in calm
    ]
    calls = [
        f"{name} {percentile(day.call_latency_s.get(path, []), 0.5) * 1e3:.1f} / "
        f"{percentile(day.call_latency_s.get(path, []), 0.99) * 1e3:.1f}"
        for name, path in (
            ("start", "/rl/start_session"),
            ("reward", "/rl/set_reward"),
            ("export", "/export_trajectories"),
            ("fetch", "/data/batch"),
        )
    ]
    return [
        f"a turn p50 / p99: {percentile(whole, 0.5) * 1e3:.0f} / {percentile(whole, 0.99) * 1e3:.0f} ms; "
        f"beyond what the engine pretends to need: {percentile(own, 0.5) * 1e3:.1f} / "
        f"{percentile(own, 0.99) * 1e3:.1f} ms",
        f"{', '.join(calls)} ms",
        "(all with the clients' own time, and everything on one machine)",
    ]


def _disturbed(day: Day, began: float, ended: float) -> bool:
    """Whether the weight update or the accident fell into that time."""
    update, accident = day.ledger.update, day.accident
    return (began < update.ended and ended > update.began) or (
        began < accident.recovered_at and ended > accident.at
    )


def _resources(day: Day) -> list[str]:
    cpu = day.usage.proxy_cpu_s
    return [
        f"memory at most {day.usage.peak_bytes / 2**20:.0f} MiB, all processes with the engine; "
        f"CPU {cpu:.1f} s ({cpu / max(1, len(day.ledger.turns)) * 1e3:.1f} ms an answer), without the engine"
    ]
