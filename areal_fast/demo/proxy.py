"""The proxy under test, as a process: starting it, looking at it from outside, killing one of its workers,
stopping it.

Everything known about it comes from its HTTP interface and from /proc. Only processes that descend from
the one started here are ever signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

START_S = 60.0
STOP_S = 60.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ProxyFailed(Exception):
    """The proxy did not do what a process must. The text is for the user."""


@dataclass(slots=True)
class Usage:
    """What the process tree used. Shared pages count once: Pss is a page's size divided by its users."""

    peak_bytes: int = 0
    cpu_s: dict[int, float] = field(default_factory=dict)
    engine_pid: int = 0

    @property
    def proxy_cpu_s(self) -> float:
        return sum(seconds for pid, seconds in self.cpu_s.items() if pid != self.engine_pid)


class Proxy:
    """A running proxy. `folder` gets its log and its dumps."""

    def __init__(self, folder: Path, *, workers: int, timeout_s: float, interval_s: float) -> None:
        self.folder = folder
        self.dumps = folder / "dumps"
        self.log_path = folder / "proxy.log"
        self.admin_key = secrets.token_urlsafe(24)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.engine_url = ""
        """The embedded engine's, once it runs."""
        self.usage = Usage()
        self.seen_pids: set[int] = set()
        self.command = [
            *(sys.executable, "-m", "areal_fast", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-addr", "embedded", "--tokenizer-path", "builtin:bytes"),
            *("--workers", str(workers), "--session-timeout-seconds", f"{timeout_s:g}"),
            *("--stale-session-cleanup-interval-seconds", f"{interval_s:g}"),
            *("--stale-session-dump-path", str(self.dumps), "--log-level", "info"),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> float:
        """Start it and wait until it is healthy. Returns the seconds this took. Raises ProxyFailed."""
        began = time.monotonic()
        try:
            self.dumps.mkdir(parents=True)
            self._log = self.log_path.open("wb")
        except OSError as error:
            raise ProxyFailed(f"cannot write to {self.folder}: {error.strerror}") from None
        self._process = subprocess.Popen(
            [*self.command, f"--admin-api-key={self.admin_key}"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # a Ctrl-C here must reach the demo, which then stops it in order
        )
        while time.monotonic() - began < START_S:
            if self._process.poll() is not None:
                raise ProxyFailed(f"the proxy exited with {self._process.returncode}: {self._last_line()}")
            with contextlib.suppress(OSError):
                health = self.health()
                self.engine_url = health["backend"]
                if all(worker.get("state") == "ready" for worker in health["workers"]):
                    self.call("GET", f"{self.engine_url}/health")
                    self.observe()
                    return time.monotonic() - began
            time.sleep(0.05)
        raise ProxyFailed(f"the proxy was not healthy after {START_S:g} s: {self._last_line()}")

    def _last_line(self) -> str:
        """The last error in its log, or its last line."""
        lines = self.log_path.read_text("utf-8", "replace").strip().splitlines()
        errors = [line for line in lines if " ERROR " in line]
        return (errors or lines or ["its log is empty"])[-1]

    def call(self, method: str, url: str, body: Any = None) -> Any:
        """One request on a connection of its own, as an operator's curl would. Raises OSError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url if "://" in url else self.url + url, data, method=method)
        request.add_header("Authorization", f"Bearer {self.admin_key}")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = self.call("GET", "/health")
        return health

    def worker_pids(self) -> list[int]:
        """The workers that are up, as /health says."""
        return [
            row["pid"] for row in self.health()["workers"] if row.get("pid") and row.get("state") == "ready"
        ]

    def kill_worker(self, pid: int) -> None:
        """SIGKILL one worker. Refuses anything that is not this proxy's child."""
        if pid not in descendants(self.pid):
            raise ProxyFailed(f"/health names {pid} as a worker, but it is no child of {self.pid}")
        os.kill(pid, signal.SIGKILL)

    def observe(self) -> None:
        """Take a look at memory and CPU of the whole tree."""
        pids = [self.pid, *descendants(self.pid)]
        self.seen_pids.update(pids)
        total = 0
        for pid in pids:
            with contextlib.suppress(OSError, ValueError, IndexError):
                total += _pss_bytes(pid)
                self.usage.cpu_s[pid] = _cpu_s(pid)
                if (
                    not self.usage.engine_pid
                    and b"areal_fast.embedded" in Path(f"/proc/{pid}/cmdline").read_bytes()
                ):
                    self.usage.engine_pid = pid
        self.usage.peak_bytes = max(self.usage.peak_bytes, total)

    def stop(self) -> int:
        """SIGTERM, as at the end of a run; waits. Returns the exit status. Raises ProxyFailed if it stays."""
        assert self._process is not None
        self.observe()
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise ProxyFailed(f"the proxy was still there {STOP_S:g} s after SIGTERM") from None

    def leftovers(self) -> list[int]:
        """Its processes that still run although it has stopped."""
        until = time.monotonic() + 5
        while (left := [pid for pid in self.seen_pids if _is_ours(pid)]) and time.monotonic() < until:
            time.sleep(0.02)
        return left

    def close(self) -> None:
        """Leave nothing running, whatever happened."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._log is not None:
            self._log.close()


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, children first."""
    found: list[int] = []
    front = [pid]
    while front:
        parent = front.pop()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                children = [int(child) for child in (task / "children").read_text().split()]
                found += children
                front += children
    return found


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _is_ours(pid: int) -> bool:
    """Whether that process still exists and is one of areal_fast's (its number may have gone to another)."""
    try:
        return b"areal_fast" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
