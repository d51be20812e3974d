"""GET /metrics: what the arena's counters and the supervisor's board say, as Prometheus text.

Any worker answers for all of them: counters are sums over every process, dead ones included (meters.py);
gauges are read from the arena and from the board, the supervisor's last word on its children. An answer costs
some tens of microseconds of arithmetic and two files of /proc for each process.

Labels are bounded: route, class, state, role and kind are fixed lists. No session id, task or address is ever
a label. Names end in their unit; a family that only goes up ends in _total. A family is there from the
first scrape on, with zeros, so that rates and alerts need no special case.

Source: Prometheus, "Text-based format" (exposition format 0.0.4).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from areal_fast import __version__
from areal_fast.service import meters, words
from areal_fast.shards.store import FILE_BYTES, FILE_COUNT

if TYPE_CHECKING:
    from areal_fast.core import Arena
    from areal_fast.http import Exchange
    from areal_fast.service.words import SharedState

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
PREFIX: Final = "areal_fast_"
_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

Sample = tuple[str, Mapping[str, str], float]
"""(what follows the family's name, labels, value)."""


class Family(NamedTuple):
    """One metric: its samples share name, type and meaning."""

    name: str
    kind: str
    help: str
    samples: list[Sample]


class Metrics:
    """Serves /metrics. `board` gives the supervisor's last word; `carry` brings late sums into the arena."""

    def __init__(
        self,
        arena: Arena,
        state: SharedState,
        board: Callable[[], dict[str, Any]],
        started: float,
        carry: Callable[[], None] = lambda: None,
    ) -> None:
        self._arena = arena
        self._state = state
        self._board = board
        self._started = started
        self._carry = carry

    def serve(self, exchange: Exchange) -> None:
        exchange.respond(200, render(self.families()), CONTENT_TYPE)

    def families(self) -> list[Family]:
        self._carry()
        counters = self._arena.counters()
        board = self._board()
        return [
            *_requests(counters),
            *_events(counters),
            *self._arena_families(),
            *_cleanup(counters, board.get("cleanup") or {}),
            *_processes(board),
            _gauge("paused", "1 while generation is paused", self._state.paused()),
            _gauge("weight_version", "Weight version in force", self._state.version()),
            _gauge("start_time_seconds", "When the answering worker began, Unix time", self._started),
            Family("info", "gauge", "What is running", [("", {"version": __version__}, 1)]),
        ]

    def _arena_families(self) -> list[Family]:
        stats = self._arena.stats()
        granule = stats["bytes_max"] / stats["granules"]
        states = ("active", "closing", "detached")
        kinds = {
            "max": stats["bytes_max"],
            "used": stats["granules_used"] * granule,
            "backed": stats["granules_ready"] * granule,
            "kept_back": stats.get("granules_keep", 0) * granule,
            "files": stats["granules_outside"] * granule,
        }
        return [
            Family(
                "sessions",
                "gauge",
                "Sessions: active, closing (removed, but a request uses it), detached (stale, being dumped)",
                [("", {"state": state}, stats[f"sessions_{state}"]) for state in states],
            ),
            Family(
                "arena_bytes",
                "gauge",
                "Shared memory: its limit, what is in use, what the system has backed so far, what is kept"
                " back for rewards, exports and cleanup, and what shard files take of the limit",
                [("", {"kind": kind}, value) for kind, value in kinds.items()],
            ),
            _gauge("shards", "Shards that can be fetched", stats["shards_active"]),
            _gauge("shard_bytes", "Bytes of shards", stats["shard_bytes"]),
            _gauge("shard_files", "Shards that are files", self._arena.word(FILE_COUNT)),
            _gauge("shard_file_bytes", "Bytes of shards that are files", self._arena.word(FILE_BYTES)),
            _gauge("exports_open", "Exports whose reply is not yet out", stats["txns_open"]),
        ]


def _counter(name: str, help: str, value: float) -> Family:
    return Family(f"{name}_total", "counter", help, [("", {}, value)])


def _gauge(name: str, help: str, value: float) -> Family:
    return Family(name, "gauge", help, [("", {}, value)])


def _requests(counters: list[int]) -> list[Family]:
    requests: list[Sample] = []
    seconds: list[Sample] = []
    for route in meters.ROUTES:
        first = meters.base(route)
        for i, name in enumerate(meters.CLASSES):
            value = counters[first + meters.SUM + 1 + i]
            requests.append(("", {"route": route, "class": name}, value))
        total = 0
        for i, bound in enumerate([*map(_number, meters.BOUNDS_S), "+Inf"]):
            total += counters[first + i]
            seconds.append(("_bucket", {"route": route, "le": bound}, total))
        seconds.append(("_sum", {"route": route}, counters[first + meters.SUM] / 1e9))
        seconds.append(("_count", {"route": route}, total))
    return [
        Family("requests_total", "counter", "Requests by route and class of status", requests),
        Family("request_seconds", "histogram", "From the whole request to its reply's end", seconds),
        _counter("http_connections", "Connections accepted", counters[meters.CONNECTIONS]),
        _counter("http_refusals", "Requests refused before any route", counters[meters.REFUSED]),
    ]


_EVENTS: Final = (
    ("sessions_started", meters.SESSIONS_STARTED, "Sessions started"),
    ("turns", meters.TURNS, "Interactions recorded"),
    ("standalone_chats", meters.STANDALONE_CHATS, "Chats answered but not recorded"),
    ("orphaned_chats", meters.ORPHANED_CHATS, "Answers whose session was removed meanwhile"),
    ("prompt_tokens", meters.PROMPT_TOKENS, "Tokens of prompts, each turn's whole prompt"),
    ("output_tokens", meters.OUTPUT_TOKENS, "Tokens generated"),
    ("resubmits", meters.RESUBMITS, "Generations sent to the engine again after it aborted them"),
    ("shards_mapped", meters.SHARDS_MAPPED, "Shards given to readers on this host as files to be mapped"),
    ("exports_delivered", meters.EXPORTS_DELIVERED, "Exports whose reply was sent"),
    ("exports_undelivered", meters.EXPORTS_UNDELIVERED, "Exports undone, the client was gone"),
    ("engine_requests", meters.ENGINE_REQUESTS, "Calls to the engine"),
    ("engine_failures", meters.ENGINE_FAILURES, "Calls to the engine that failed, no reply or not in time"),
    ("engine_retries", meters.ENGINE_RETRIES, "Calls repeated, a kept connection had been closed"),
    ("engine_connects", meters.ENGINE_CONNECTS, "Connections opened to the engine"),
)


def _events(counters: list[int]) -> Iterable[Family]:
    yield from (_counter(name, help, counters[index]) for name, index, help in _EVENTS)
    wait = "Seconds engine calls waited for a connection of this proxy's pool"
    yield _counter("pool_wait_seconds", wait, counters[meters.POOL_WAIT_NS] / 1e9)
    wait = "Seconds from sending engine calls to the end of their answers"
    yield _counter("engine_wait_seconds", wait, counters[meters.ENGINE_WAIT_NS] / 1e9)


_CLEANUP: Final = (
    ("cleanups", words.CLEANUPS, "Runs of the cleaner over the sessions"),
    ("sessions_cleaned", words.SESSIONS_CLEANED, "Stale sessions freed"),
    ("sessions_dropped", words.SESSIONS_DROPPED, "Of those, freed without a file though they held something"),
    ("dump_files", words.DUMP_FILES, "Dump files written"),
    ("dump_bytes", words.DUMP_BYTES, "Bytes of dump files written"),
    ("dump_failures", words.DUMP_FAILURES, "Tries to dump a session that failed; they are repeated"),
    ("shards_expired", words.SHARDS_EXPIRED, "Shards removed because nobody fetched them in time"),
)


def _cleanup(counters: list[int], status: dict[str, Any]) -> Iterable[Family]:
    yield from (_counter(name, help, counters[index]) for name, index, help in _CLEANUP)
    failing = "Sessions that cannot be dumped now; /health says why"
    yield _gauge("dumps_failing", failing, status.get("failing") or 0)
    kept = "Stale sessions kept because there is no dump path"
    yield _gauge("sessions_kept", kept, status.get("kept_for_want_of_a_dump_path") or 0)
    last = "When the cleaner last began a run, Unix time"
    yield _gauge("cleanup_start_time_seconds", last, status.get("last_run") or 0)
    took = "How long the cleaner's last run took"
    yield _gauge("cleanup_run_seconds", took, status.get("last_run_s") or 0)


def _processes(board: dict[str, Any]) -> list[Family]:
    rows: list[tuple[str, dict[str, Any]]] = [
        (f"worker-{i}", row) for i, row in enumerate(board.get("workers") or [])
    ]
    rows += [(role, row) for role in ("cleaner", "engine") if (row := board.get(role))]
    up: list[Sample] = []
    restarts: list[Sample] = []
    cpu: list[Sample] = []
    memory: list[Sample] = []
    for role, row in rows:
        labels = {"role": role}
        up.append(("", labels, row.get("state") == "ready"))
        restarts.append(("", labels, row.get("restarts") or 0))
        used = _usage(row.get("pid"))
        if used is not None:
            cpu.append(("", labels, used[0]))
            memory.append(("", labels, used[1]))
    return [
        Family("process_up", "gauge", "1 while the process serves", up),
        Family("process_restarts_total", "counter", "Times the process was started again", restarts),
        Family("process_cpu_seconds_total", "counter", "CPU time of the process now there", cpu),
        Family("process_resident_bytes", "gauge", "Its memory, shared pages included", memory),
        _gauge("processes_stuck", "Killed processes that do not die", len(board.get("stuck") or [])),
    ]


def _usage(pid: int | None) -> tuple[float, int] | None:
    """(CPU seconds, resident bytes) of a process; None if it is not there."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND, int(fields[21]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


def render(families: Iterable[Family]) -> bytes:
    """The exposition text."""
    lines: list[str] = []
    for family in families:
        name = PREFIX + family.name
        lines.append(f"# HELP {name} {_escape(family.help)}")
        lines.append(f"# TYPE {name} {family.kind}")
        for tail, labels, value in family.samples:
            inner = ",".join(f'{k}="{_escape(v, quotes=True)}"' for k, v in labels.items())
            lines.append(
                f"{name}{tail}{{{inner}}} {_number(value)}" if inner else f"{name}{tail} {_number(value)}"
            )
    lines.append("")
    return "\n".join(lines).encode()


def _escape(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    """Integers whole, whatever their size; others as short as they are exact."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)
