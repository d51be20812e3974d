"""A running proxy for tests: started as a user starts it, asked over real sockets, killed by pid.

`Proxy` runs `python -m areal_fast` with the embedded engine on a free loopback port. What it writes is read
by a thread and kept in `lines`. Leaving the context ends it and checks that no process of its tree is left.
`wait_until` is the only waiting there is: on a condition, with a watchdog that says what did not come.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ADMIN = "test-admin-key"
WATCHDOG_S = 90.0
ROOT = Path(__file__).resolve().parents[2]


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = WATCHDOG_S) -> T:
    """The condition's first true value. The watchdog's failure names what was waited for."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what} (last: {value!r})")
        threading.Event().wait(0.02)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Pids of the process's living children, grandchildren and so on."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return [child for child in found if alive(child)]


@dataclass
class Answer:
    """An HTTP reply."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Proxy:
    """See the top of the file. `flags` are added to the command line."""

    def __init__(
        self,
        *flags: str,
        workers: int = 2,
        environment: dict[str, str] | None = None,
        log_level: str = "info",
        hard_descriptors: int = 0,
    ) -> None:
        command = [
            sys.executable, "-m", "areal_fast",
            "--host", "127.0.0.1", "--port", "0", "--admin-api-key", ADMIN, "--backend-addr", "embedded",
            "--workers", str(workers), "--arena-max-bytes", "256M", "--log-level", log_level,
            "--hang-timeout-seconds", "60",  # nobody is taken for hung who only waits for a core
            *flags,
        ]  # fmt: skip
        # not a preexec_fn, which is unsafe with threads
        prefix = ["prlimit", f"--nofile={hard_descriptors}"] if hard_descriptors else []
        self.process = subprocess.Popen(
            [*prefix, *command],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.pid = self.process.pid
        self.lines: list[str] = []
        self.port = 0
        self._pids: set[int] = set()
        self._deaf = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        fd, rest = self.process.stderr.fileno(), b""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not self._deaf.is_set():
            if not poll.poll(50):
                continue
            chunk = os.read(fd, 65536)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            self.lines += [line.decode(errors="replace") for line in lines]
        self.process.stderr.close()

    def __enter__(self) -> Proxy:
        try:
            self.ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def ready(self) -> Proxy:
        """Wait for the line that says so."""
        found = wait_until(
            lambda: self.process.poll() is not None or self.log(r" ready address=\S+:(\d+)"),
            "the proxy is ready",
        )
        assert not isinstance(found, bool), f"exited {self.process.returncode}:\n" + "\n".join(self.lines)
        self.port = int(found[0].group(1))
        self._pids.update(descendants(self.pid))
        return self

    def deafen(self) -> None:
        """Stop reading what it writes: from now on its stderr is a broken pipe."""
        self._deaf.set()
        self._reader.join(WATCHDOG_S)

    def logged(self, pattern: str) -> list[re.Match[str]]:
        """Matches of a pattern in the log's lines, waited for: reading takes a moment."""
        return wait_until(lambda: self.log(pattern), f"{pattern!r} is logged")

    def log(self, pattern: str) -> list[re.Match[str]]:
        """Matches of a pattern in the log's lines so far."""
        return [match for line in list(self.lines) if (match := re.search(pattern, line))]

    def end(self) -> None:
        """Kill what is left of it, and check that nothing outlives it."""
        self._pids.update(descendants(self.pid))
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WATCHDOG_S)
        try:
            wait_until(lambda: not list(filter(alive, self._pids)), "the whole tree is gone")
        finally:
            for pid in filter(alive, self._pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.deafen()

    def terminate(self) -> None:
        self._pids.update(descendants(self.pid))
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = WATCHDOG_S) -> int:
        """Its exit status, once it and all it started have ended and the last line they wrote was read."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    # -- asking ----------------------------------------------------------------------------------------
    def connection(self, timeout_s: float = WATCHDOG_S) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        over: http.client.HTTPConnection | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request, over a connection of its own unless one is given. `headers` instead of JSON's."""
        connection = over or self.connection()
        headers = {"Content-Type": "application/json"} if headers is None else dict(headers)
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers)
            reply = connection.getresponse()
            return Answer(reply.status, reply.read(), {k.lower(): v for k, v in reply.getheaders()})
        finally:
            if over is None:
                connection.close()

    def health(self) -> dict[str, Any]:
        answer = self.ask("GET", "/health")
        assert answer.status == 200
        found: dict[str, Any] = answer.json
        return found

    def start(self, task: str, **fields: Any) -> tuple[str, str]:
        answer = self.ask("POST", "/rl/start_session", {"task_id": task, **fields}, key=ADMIN)
        assert answer.status == 201, answer.body
        return answer.json["session_id"], answer.json["api_key"]

    def chat(self, key: str | None, text: str = "hi", **fields: Any) -> Answer:
        over = fields.pop("over", None)
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 16, **fields}
        return self.ask("POST", "/chat/completions", body, key=key, over=over)

    def reward(self, key: str, value: float = 1.0) -> Answer:
        return self.ask("POST", "/rl/set_reward", {"reward": value}, key=key)

    def export(self, session_id: str) -> Answer:
        return self.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)

    # -- processes -------------------------------------------------------------------------------------
    def worker_pids(self) -> list[int]:
        return [row["pid"] for row in self.health()["workers"] if row["pid"] and row["state"] == "ready"]

    def kill(self, *pids: int) -> None:
        """SIGKILL, and wait until they are dead: a request made after this cannot reach them any more."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, pids)), f"{pids} are dead")

    def cleaner_pid(self) -> int:
        def living() -> int:
            pid = self.health()["cleaner"]["pid"]
            return pid if pid and alive(pid) else 0

        return wait_until(living, "there is a cleaner")

    @contextlib.contextmanager
    def cleaner_held(self) -> Iterator[None]:
        """Nothing goes stale in here, however slow the machine is: the cleaner is stopped. What has not been
        touched for the session timeout when it goes on is stale at once. (Shorter than the hang timeout.)"""
        pid = self.cleaner_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def each_worker(self) -> Iterator[dict[int, http.client.HTTPConnection]]:
        """One kept connection to every worker, by pid."""
        wanted = set(wait_until(self.worker_pids, "workers are ready"))
        found: dict[int, http.client.HTTPConnection] = {}
        spare: list[http.client.HTTPConnection] = []

        def complete() -> bool:
            connection = self.connection()
            pid = self.ask("GET", "/health", over=connection).json["pid"]
            if pid in found:
                spare.append(connection)  # kept open: the kernel may then prefer another worker
            else:
                found[pid] = connection
            return wanted <= set(found)

        try:
            wait_until(complete, "every worker has answered")
            yield found
        finally:
            for connection in [*found.values(), *spare]:
                connection.close()

    def engine(self, **switches: Any) -> None:
        """Set switches of the embedded engine (latency, failures)."""
        address = self.health()["backend"].removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=WATCHDOG_S)
        connection.request("POST", "/embedded/configure", json.dumps(switches).encode())
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
        connection.close()

    def engine_stats(self) -> dict[str, Any]:
        """Counters of the embedded engine: requests, in_flight, …"""
        address = self.health()["backend"].removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=WATCHDOG_S)
        connection.request("GET", "/embedded/stats")
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return found
