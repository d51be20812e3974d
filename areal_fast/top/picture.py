"""A View as lines of a given width and height. No terminal here: a line is a list of (text, style).

What matters most comes first, so that a small terminal loses the end: title, what is wrong, sessions and
turns, latency by route, engine, memory, cleanup, processes. Styles: "" plain, title, dim, good, warn, bad.
Text from outside (addresses, reasons) is made printable before it is cut to the width.
"""

from __future__ import annotations

import textwrap
import time
import unicodedata
from collections.abc import Iterable
from typing import Final

from areal_fast.top.view import Process, View, amount, duration, size

Span = tuple[str, str]
Line = list[Span]

NAMES: Final = {"start_session": "start session", "set_reward": "set reward"}
SPARKS: Final = " ▁▂▃▄▅▆▇█"
TITLE: Final = 10
EACH: Final = 38
"""Columns of one process."""
MAX_CHART: Final = 12
"""Lines of the chart of turns where there is room."""
MAX_WRONG: Final = 4
WRONG_LINES: Final = 2
"""Lines of one thing that is wrong: its reason is what one looks for."""


def picture(view: View, url: str, width: int, height: int, clock: float) -> list[Line]:
    """At most `height` lines of at most `width` columns. `clock`: Unix time, for the title."""
    lines = [*_head(view, url, width, clock)]
    if view.empty:
        lines += _wrong(view, width) if view.error else []
    else:
        processes = view.processes()
        blocks = [
            [*lines, *_wrong(view, width)],
            list(_traffic(view, width)),
            list(_routes(view, every=True)),
            [*_engine(view), *_memory(view, width), *_cleanup(view, clock)],
        ]
        needed = sum(map(len, blocks)) + 1 + _rows(processes, width)
        spare = height - needed - len(blocks)
        if spare > 0:
            blocks[1] = list(_traffic(view, width, min(1 + spare, MAX_CHART)))
            needed += len(blocks[1]) - 3
        if needed > height:
            needed -= len(blocks[2])
            blocks[2] = list(_routes(view, every=False))
            needed += len(blocks[2])
        lines = []
        for i, block in enumerate(blocks):
            lines += [*block, []] if i < height - needed else block
        lines += _processes(processes, width, height - len(lines))
    return [_cut(line, width) for line in lines[: max(height, 1)]]


def text(lines: Iterable[Line]) -> str:
    """The picture without styles."""
    return "\n".join("".join(part for part, _ in line).rstrip() for line in lines)


def short(view: View, clock: float) -> str:
    """One line for where there is no terminal."""
    if view.error or view.empty:
        return f"{_time(clock)} {printable(view.error or 'no answer yet')}"
    chat = next((route for route in view.routes() if route.name == "chat"), None)
    latency = f" p50={duration(chat.p50)} p99={duration(chat.p99)}".replace(" µ", "µ") if chat else ""
    latency = latency.replace(" ms", "ms").replace(" s", "s").replace("> ", ">")
    used, limit = view.room()
    fields = [
        f"{_time(clock)} sessions={int(view.now.get('sessions', state='active'))}",
        f"turns/s={amount(view.rate('turns_total'))}",
        f"tokens/s={amount(view.rate('output_tokens_total'))}{latency}",
        f"arena={used / limit if limit else 0:.0%}",
        f"shards={int(view.now.get('shards'))}",
        f"dumped={int(view.now.get('dump_files_total'))}",
    ]
    wrong = "; ".join(printable(each.text) for each in view.wrong())
    return " ".join(fields) + (f" WRONG: {wrong}" if wrong else "")


# -- parts -------------------------------------------------------------------------------------------------
def _head(view: View, url: str, width: int, clock: float) -> Iterable[Line]:
    left: Line = [("areal_fast", "title")]
    if not view.empty:
        version = next(iter(view.now.by("info", "version")), "")
        left += [(f" {printable(version)}", "title")]
    left += [("  " + printable(url), "dim")]
    if not view.empty:
        paused = bool(view.now.get("paused"))
        left += [("  weights ", "dim"), (f"v{view.now.get('weight_version'):.0f}", "")]
        left += [("  paused", "warn") if paused else ("  running", "good")]
    used = sum(columns(part) for part, _ in left)
    right = _time(clock)
    yield [*left, (" " * max(1, width - used - len(right)) + right, "dim")]
    yield [("─" * width, "dim")]


def _wrong(view: View, width: int) -> Iterable[Line]:
    found = view.wrong()
    if not found:
        yield [("● ", "good"), ("all is well", "good")]
    for wrong in found[: MAX_WRONG if len(found) <= MAX_WRONG else MAX_WRONG - 1]:
        style = "bad" if wrong.bad else "warn"
        said = textwrap.wrap(
            printable(wrong.text), max(width - 2, 8), max_lines=WRONG_LINES, placeholder=" …"
        )
        for i, line in enumerate(said):
            yield [("● " if i == 0 else "  ", style), (line, style)]
    if len(found) > MAX_WRONG:
        yield [(f"  and {len(found) - MAX_WRONG + 1} more", "bad")]


def _traffic(view: View, width: int, chart_rows: int = 1) -> Iterable[Line]:
    now = view.now
    states = now.by("sessions", "state")
    said: Line = [_title("sessions")]
    for state, n in states.items():
        said += [(f"{n:,.0f}", "" if n or state == "active" else "dim"), (f" {printable(state)}   ", "dim")]
    yield [*said, *_number(view.rate("sessions_started_total"), "/s started", plus="+")]
    turns: Line = [_title("turns"), (f"{amount(view.rate('turns_total'))}/s", ""), ("   tokens ", "dim")]
    turns += [(f"{amount(view.rate('prompt_tokens_total'))}/s", ""), (" in  ", "dim")]
    turns += [(f"{amount(view.rate('output_tokens_total'))}/s", ""), (" out", "dim")]
    standalone = view.rate("standalone_chats_total")
    if standalone:
        turns += [("   not recorded ", "dim"), (f"{amount(standalone)}/s", "")]
    yield turns
    room = max(0, width - TITLE - 10)
    shown = list(view.turns)[-room:] if room else []
    peak = max(shown, default=0.0)
    for row, bars in enumerate(chart(shown, peak, chart_rows)):
        scale = f" {amount(peak)}/s" if peak and row == 0 else ""
        yield [_title(""), (bars, "good"), (scale, "dim")]


def _routes(view: View, *, every: bool) -> Iterable[Line]:
    """Not `every`: without those that nobody has used yet."""
    yield [(f"{'':<14}{'req/s':>8}{'4xx/s':>8}{'5xx/s':>8}{'p50':>10}{'p99':>10}{'total':>10}", "dim")]
    for route in view.routes():
        if not (every or route.total):
            continue
        quiet = "" if route.rate else "dim"
        yield [
            (f"{NAMES.get(route.name, printable(route.name)):<14}", quiet),
            (f"{amount(route.rate):>8}", quiet),
            (f"{amount(route.refused):>8}", "warn" if route.refused else "dim"),
            (f"{amount(route.failed):>8}", "bad" if route.failed else "dim"),
            (f"{duration(route.p50):>10}{duration(route.p99):>10}", quiet),
            (f"{amount(route.total):>10}", "dim"),
        ]


def _engine(view: View) -> Iterable[Line]:
    wait = duration(view.mean("engine_wait_seconds_total", "engine_requests_total"))
    pool = duration(view.mean("pool_wait_seconds_total", "engine_requests_total"))
    said: Line = [_title("engine"), (f"{amount(view.rate('engine_requests_total'))}/s", "")]
    said += [("  answers in ", "dim"), (wait, ""), ("  waits for a connection ", "dim"), (pool, "")]
    if view.rate("resubmits_total"):
        said += [("  resubmitted ", "dim"), (f"{amount(view.rate('resubmits_total'))}/s", "warn")]
    yield said


def _memory(view: View, width: int) -> Iterable[Line]:
    used, limit = view.room()
    share = min(1.0, used / limit) if limit else 0.0
    style = "bad" if share >= 0.9 else "warn" if share >= 0.7 else "good"
    bar = min(30, max(8, width - 50))
    filled = round(share * bar)
    yield [
        _title("arena"),
        ("█" * filled, style),
        ("░" * (bar - filled), "dim"),
        (f" {share:4.0%}", style),
        (f"  {size(used)} of {size(limit)}", "dim"),
    ]
    exports = int(view.now.get("exports_open"))
    yield [
        _title("shards"),
        (f"{view.now.get('shards'):,.0f}", ""),
        (f"  {size(view.now.get('shard_bytes'))}   exports ", "dim"),
        (f"{view.now.get('exports_delivered_total'):,.0f}", ""),
        (f" done, {exports} under way", "dim"),
    ]


def _cleanup(view: View, clock: float) -> Iterable[Line]:
    now = view.now
    last = now.get("cleanup_start_time_seconds")
    failing = int(now.get("dumps_failing"))
    yield [
        _title("cleanup"),
        (f"{now.get('sessions_cleaned_total'):,.0f}", ""),
        (" stale sessions, ", "dim"),
        (f"{now.get('dump_files_total'):,.0f}", ""),
        (f" files, {size(now.get('dump_bytes_total'))}, ", "dim"),
        (f"{failing} failing", "bad" if failing else "dim"),
        (f"; ran {_ago(clock - last)}" if last else "; no run yet", "dim"),
    ]


def _processes(processes: list[Process], width: int, room: int) -> list[Line]:
    """As many processes a line as fit."""
    across = max(1, width // EACH)
    head = f"{'process':<11}{'state':<6}{'cpu':>6}{'memory':>7}{'died':>6}  "
    lines: list[Line] = [[(head * min(across, max(1, len(processes))), "dim")]]
    rows = _rows(processes, width)
    if rows > max(room - 1, 1):
        rows = max(room - 2, 0)
    for i in range(rows):
        line: Line = []
        for process in processes[i * across : (i + 1) * across]:
            line += [*_process(process), ("  ", "")]
        lines.append(line)
    left = len(processes) - rows * across
    if left > 0:
        lines.append([(f"and {left} more", "dim")])
    return lines


def _rows(processes: list[Process], width: int) -> int:
    return -(-len(processes) // max(1, width // EACH))


def _process(process: Process) -> Line:
    cpu = "-" if process.cpu is None else f"{process.cpu:.0%}"
    state = ("up", "good") if process.up else ("down", "bad")
    return [
        (f"{printable(process.role)[:10]:<11}", ""),
        (f"{state[0]:<6}", state[1]),
        (f"{cpu:>6}", "warn" if process.cpu is not None and process.cpu > 0.9 else ""),
        (f"{size(process.memory).replace('iB', '').replace(' ', '') if process.memory else '-':>7}", ""),
        (f"{process.restarts:>6}", "bad" if process.restarts else "dim"),
    ]


# -- pieces ------------------------------------------------------------------------------------------------
def chart(values: list[float], peak: float, rows: int) -> list[str]:
    """Values as bars, one column each and `rows` lines high, the top line first."""
    if peak <= 0:
        return [""] * rows
    steps = len(SPARKS) - 1
    heights = [min(rows * steps, -int(-rows * steps * max(value, 0.0) // peak)) for value in values]
    return [
        "".join(SPARKS[min(steps, max(0, height - row * steps))] for height in heights)
        for row in reversed(range(rows))
    ]


def _title(name: str) -> Span:
    return f"{name:<{TITLE}}", "dim"


def _number(value: float, unit: str, plus: str = "") -> Line:
    return [(f"{plus}{amount(value)}", "" if value else "dim"), (unit, "dim")]


def _time(clock: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(clock))


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"


def printable(words: object) -> str:
    """Text from outside, harmless on a terminal."""
    return "".join(c if c.isprintable() else "·" for c in str(words))


def columns(words: str) -> int:
    """How wide it is on a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in words
    )


def fit(words: str, width: int) -> str:
    """Cut to `width` columns, with … where something is missing."""
    if columns(words) <= width:
        return words
    kept = ""
    for c in words:
        if columns(kept + c) > width - 1:
            break
        kept += c
    return kept + "…" if width > 0 else ""


def _cut(line: Line, width: int) -> Line:
    out: Line = []
    left = width
    for part, style in line:
        if left <= 0:
            break
        kept = fit(part, left)
        out.append((kept, style))
        left -= columns(kept)
    return out
