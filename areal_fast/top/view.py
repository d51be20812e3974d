"""What a row of samples means: rates, quantiles, and what is wrong, in words.

Pure: samples in, values out; no clock, no terminal. Rates and quantiles are over the last WINDOW_S seconds.
A counter that is lower than before is another proxy's (it was started anew): the row begins again.
Quantiles are read from the histogram's buckets as Prometheus' histogram_quantile does, so that terminal and
board agree.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Final, NamedTuple

from areal_fast.top.samples import Sample

WINDOW_S: Final = 10.0
HISTORY: Final = 240
RESTART_NEWS_S: Final = 60.0
FULL: Final = 0.9
LONG_POOL_WAIT_S: Final = 0.05


class Wrong(NamedTuple):
    """One thing to know. bad: red, else yellow."""

    text: str
    bad: bool = True


class Route(NamedTuple):
    """One route over the window. Quantiles in seconds: None without requests, inf above the last bucket."""

    name: str
    total: float
    rate: float
    refused: float
    failed: float
    p50: float | None
    p99: float | None


class Process(NamedTuple):
    """One process. cpu: 1.0 is one core; None if not known."""

    role: str
    up: bool
    restarts: int
    cpu: float | None
    memory: float


class View:
    """The samples so far. `add` each new one, `lost` when there is none."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()
        self.turns: deque[float] = deque(maxlen=HISTORY)
        """Turns a second, one value a sample."""
        self.error = ""
        self._restarted: dict[str, float] = {}

    @property
    def now(self) -> Sample:
        return self._samples[-1]

    @property
    def empty(self) -> bool:
        return not self._samples

    def add(self, sample: Sample) -> None:
        self.error = ""
        if self._samples:
            last = self._samples[-1]
            if sample.get("cleanups_total") < last.get("cleanups_total") or sample.get(
                "http_connections_total"
            ) < last.get("http_connections_total"):
                self._samples.clear()
                self.turns.clear()
                self._restarted.clear()
            else:
                passed = max(sample.at - last.at, 1e-6)
                self.turns.append((sample.get("turns_total") - last.get("turns_total")) / passed)
                before = last.by("process_restarts_total", "role")
                for role, n in sample.by("process_restarts_total", "role").items():
                    if n > before.get(role, n):
                        self._restarted[role] = sample.at
        self._samples.append(sample)
        while len(self._samples) > 2 and sample.at - self._samples[1].at >= WINDOW_S:
            self._samples.popleft()

    def lost(self, why: str) -> None:
        """No new sample."""
        self.error = why

    # -- over the window -------------------------------------------------------------------------------
    def grown(self, name: str, **labels: str) -> float:
        """By how much a counter grew in the window."""
        return max(0.0, self.now.get(name, **labels) - self._samples[0].get(name, **labels))

    def rate(self, name: str, **labels: str) -> float:
        """The same a second; 0 with one sample only."""
        return self.grown(name, **labels) / self.seconds if self.seconds else 0.0

    @property
    def seconds(self) -> float:
        return self.now.at - self._samples[0].at

    def mean(self, total: str, count: str) -> float | None:
        """Seconds a call in the window; None without calls."""
        calls = self.grown(count)
        return self.grown(total) / calls if calls else None

    def routes(self) -> list[Route]:
        names = dict.fromkeys(route for route in self.now.by("request_seconds_count", "route"))
        return [self._route(name) for name in names]

    def _route(self, name: str) -> Route:
        old = dict(self._samples[0].buckets(name)) if len(self._samples) > 1 else {}
        grown = [(bound, n - old.get(bound, 0.0)) for bound, n in self.now.buckets(name)]
        if len(self._samples) < 2:
            grown = []
        return Route(
            name,
            self.now.get("request_seconds_count", route=name),
            self.rate("request_seconds_count", route=name),
            self.rate("requests_total", route=name, **{"class": "4xx"}),
            self.rate("requests_total", route=name, **{"class": "5xx"}),
            quantile(0.5, grown),
            quantile(0.99, grown),
        )

    def processes(self) -> list[Process]:
        now = self.now
        cpu = now.by("process_cpu_seconds_total", "role")
        before = self._samples[0].by("process_cpu_seconds_total", "role")
        restarts = now.by("process_restarts_total", "role")
        memory = now.by("process_resident_bytes", "role")
        rows = []
        for role, up in now.by("process_up", "role").items():
            used = None
            if self.seconds and role in cpu and role in before and cpu[role] >= before[role]:
                used = (cpu[role] - before[role]) / self.seconds
            rows.append(Process(role, bool(up), int(restarts.get(role, 0)), used, memory.get(role, 0.0)))
        return rows

    # -- what is wrong ---------------------------------------------------------------------------------
    def wrong(self) -> list[Wrong]:
        """Worst first; empty if all is well."""
        if self.error:
            below = "" if self.empty else "; below is what it last said"
            return [Wrong(self.error + below)]
        found = [*self._wrong_processes(), *self._wrong_requests(), *self._wrong_room(), *self._wrong_dumps()]
        if self.now.get("paused"):
            found.append(Wrong("generation is paused", bad=False))
        return sorted(found, key=lambda wrong: not wrong.bad)

    def _wrong_processes(self) -> list[Wrong]:
        found = []
        for process in self.processes():
            at = self._restarted.get(process.role)
            if not process.up:
                found.append(Wrong(f"{process.role} is not running, it is being started again"))
            elif at is not None and self.now.at - at < RESTART_NEWS_S:
                found.append(Wrong(f"{process.role} died and was started again {self.now.at - at:.0f} s ago"))
        if stuck := int(self.now.get("processes_stuck")):
            found.append(Wrong(f"{stuck} killed {_plural(stuck, 'process does', 'processes do')} not die"))
        return found

    def _wrong_requests(self) -> list[Wrong]:
        found = []
        for route in self.routes():
            failed = round(route.failed * self.seconds)
            if failed:
                requests = round(route.rate * self.seconds)
                found.append(Wrong(f"{route.name}: {failed} of the last {requests} requests failed (5xx)"))
        if failures := round(self.grown("engine_failures_total")):
            said = f"{failures} of the last {round(self.grown('engine_requests_total'))} calls"
            found.append(Wrong(f"engine {self.now.health.get('backend') or ''}: {said} got no answer"))
        waited = self.mean("pool_wait_seconds_total", "engine_requests_total")
        if waited is not None and waited > LONG_POOL_WAIT_S:
            found.append(Wrong(f"engine calls wait {duration(waited)} for a connection", bad=False))
        return found

    def _wrong_room(self) -> list[Wrong]:
        used, limit = self.room()
        if limit and used >= limit:
            return [Wrong("the arena is full: new turns are answered with 507")]
        if limit and used / limit >= FULL:
            return [Wrong(f"the arena is {used / limit:.0%} full: at 100 % new turns are answered with 507")]
        return []

    def room(self) -> tuple[float, float]:
        """(bytes used, bytes usable): what is kept back is not for turns."""
        kinds = self.now.by("arena_bytes", "kind")
        return kinds.get("used", 0.0), kinds.get("max", 0.0) - kinds.get("kept_back", 0.0)

    def _wrong_dumps(self) -> list[Wrong]:
        found = []
        cleanup = self.cleanup()
        if failing := int(self.now.get("dumps_failing")):
            failures = cleanup.get("failures")
            first = failures[0] if isinstance(failures, list) and failures else None
            why = f": {first.get('reason')}" if isinstance(first, dict) else ""
            found.append(Wrong(f"{failing} {_plural(failing, 'session', 'sessions')} cannot be dumped{why}"))
        elif cleanup.get("dump_path_error"):
            found.append(Wrong(f"the dump folder cannot be written to: {cleanup['dump_path_error']}"))
        if cleanup.get("error"):
            found.append(Wrong(f"the cleaner's last run failed: {cleanup['error']}"))
        if kept := int(self.now.get("sessions_kept")):
            said = f"{kept} stale {_plural(kept, 'session is', 'sessions are')} kept: there is no dump path"
            found.append(Wrong(said, bad=False))
        return found

    def cleanup(self) -> dict[str, Any]:
        found = self.now.health.get("cleanup")
        return found if isinstance(found, dict) else {}


def quantile(q: float, buckets: list[tuple[float, float]]) -> float | None:
    """The q-quantile of (upper bound, cumulated count) pairs; inf above the last finite bound, None of
    nothing."""
    total = buckets[-1][1] if buckets else 0.0
    if total <= 0:
        return None
    rank, low, below = q * total, 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            if math.isinf(bound):
                return math.inf
            return low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return math.inf


def _plural(n: int, one: str, many: str) -> str:
    return one if n == 1 else many


def duration(seconds: float | None) -> str:
    """In at most 7 characters: 850 µs, 12.3 ms, 4.56 s, > 60 s."""
    if seconds is None:
        return "-"
    if math.isinf(seconds):
        return "> 60 s"
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds / 60:.0f} min"


def amount(value: float) -> str:
    """A count or rate in at most 6 characters: 0, 0.5, 123, 4.5k, 1.2M."""
    if value < 9.95:
        return f"{value:.1f}".removesuffix(".0")
    for unit, scale in (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9)):
        scaled = value / scale
        if scaled < 999.5:
            return f"{scaled:.0f}{unit}" if not unit or scaled >= 99.5 else f"{scaled:.1f}{unit}"
    return f"{value / 1e12:.3g}T"


def size(nbytes: float) -> str:
    """Bytes in at most 9 characters."""
    if nbytes < 999.5:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
    nbytes /= 1024
    return f"{nbytes:.3g} TiB"
