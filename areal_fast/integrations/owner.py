"""A proxy's process owned by another process: started, waited for, started again after a death, stopped.

Theory. The owner holds one end of a socket pair, the proxy the other (`--lifeline-fd`, service/lifeline.py).
Whatever ends the owner, SIGKILL included, closes its end, and the proxy stops with all its processes and its
dumps in about half a second of drain; no thread has to live for it, no process group, no signal that some
forked child would get. The other way the end of the line says that the proxy's supervisor is gone.

* One thread reads the line and the proxy's stderr. What the proxy logs goes on to `log` (the owner's own
  stderr), and the last lines are kept for reports.
* A proxy that died takes its sessions with it (they live in its memory), so a death is always told: in the
  log, in `status`, and as ProxyFailed once it may not be started again. The address stays: a free port that
  was chosen at the first start is kept.
* It is started again only when the whole tree of the dead one is gone: its workers hold the port until then.

Knows nothing of Ray; integrations/ray.py runs it inside an actor.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import IO, Any, Final

import msgspec

from areal_fast import config

START_S: Final = 120.0
STOP_S: Final = 90.0
"""Drain (10 s), dumps (up to 60 s) and some slack."""
MAX_RESTARTS: Final = 3
KEPT_LINES: Final = 50
TREE_GONE_S: Final = 15.0
FIRST_BACKOFF_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 5.0


class ProxyFailed(RuntimeError):
    """The proxy cannot start, or has died and may not be started again. str() says why, in its own words."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How a proxy is. state: starting, ready, restarting, failed, stopped. address: HOST:PORT once it was
    ready. pid: its supervisor's, 0 if there is none. restarts: how often it was started again; each lost the
    sessions it had. last_death: how the last one died, "" if none did."""

    state: str
    address: str
    pid: int
    restarts: int
    last_death: str


class OwnedProxy:
    """One proxy and its successors. argv: flags of `areal-fast serve`; UsageError if they are bad.

    max_restarts: in all; -1: any number. environment: added to this process's own.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        max_restarts: int = MAX_RESTARTS,
        environment: dict[str, str] | None = None,
        log: IO[str] | None = None,
    ) -> None:
        config.parse(argv)
        self._argv = list(argv)
        self._max_restarts = max_restarts
        self._environment = environment or {}
        self._log = log or sys.stderr
        self._tail: deque[str] = deque(maxlen=KEPT_LINES)
        self._changed = threading.Condition()
        # what `_changed` guards: written by the watching thread, and by start and stop before and after it
        self._state = "starting"
        self._address = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = 0
        self._last_death = ""
        self._stopping = False
        self._thread = threading.Thread(target=self._watch, name="areal-fast-owner", daemon=True)

    def start(self) -> None:
        """Begin. Does not wait; once only."""
        self._thread.start()

    def wait_ready(self, timeout_s: float = START_S) -> Status:
        """Wait until it answers. ProxyFailed if it cannot, or not in this time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._state not in ("starting", "restarting"), timeout_s):
                raise ProxyFailed(f"not ready after {timeout_s:g} s: {self._last_words()}")
            if self._state != "ready":
                raise ProxyFailed(self._last_death or "stopped before it was ready")
            return self._status()

    def status(self) -> Status:
        with self._changed:
            return self._status()

    def tail(self) -> list[str]:
        """The last lines it wrote."""
        return list(self._tail)

    def stop(self, timeout_s: float = STOP_S) -> int:
        """SIGTERM: it drains, dumps where a dump path is set, and ends. Returns its exit status, 0 where all
        went well; what is still there after `timeout_s` is killed. A second call only waits."""
        with self._changed:
            if not self._stopping:
                self._stopping = True
                if self._process is not None:
                    self._process.terminate()
                self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._thread.is_alive() and self._process is not None:
            self._say(f"still there {timeout_s:g} s after SIGTERM: killed")
            self._process.kill()
            self._thread.join(TREE_GONE_S)
        with self._changed:
            if self._state != "failed":
                self._state = "stopped"
            status = self._process.returncode if self._process is not None else 0
        return 1 if status is None else status

    # -- the watching thread -------------------------------------------------------------------------------
    def _watch(self) -> None:
        failures = 0
        while True:
            was_ready = self._one_life()
            failures = 0 if was_ready else failures + 1
            with self._changed:
                if self._stopping:
                    self._state = "stopped"
                elif not self._address or 0 <= self._max_restarts <= self._restarts:
                    # what never came up has settings that are wrong, and a restart mends none
                    self._state = "failed"
                else:
                    self._state = "restarting"
                    self._restarts += 1
                self._changed.notify_all()
                if self._state != "restarting":
                    if self._state == "failed" and self._address:
                        self._say(f"{self._last_death}; it is not started again")
                    return
                self._say(
                    f"{self._last_death}; its sessions are lost; starting it again"
                    f" ({self._restarts} of {'any number' if self._max_restarts < 0 else self._max_restarts})"
                )
                wait_s = min(FIRST_BACKOFF_S * 2.0**failures, LONGEST_BACKOFF_S)
                if self._changed.wait_for(lambda: self._stopping, wait_s):
                    self._state = "stopped"
                    return

    def _one_life(self) -> bool:
        """Start it and read it until nothing of it is left. Whether it was ever ready."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                try:
                    process = self._spawn(theirs.fileno())
                except OSError as error:
                    with self._changed:
                        self._last_death = f"the proxy cannot be started: {error}"
                    return False
            if process is None:
                return False
            assert process.stderr is not None
            with process.stderr:
                ready = self._read(process, ours)
        with self._changed:
            self._last_death = self._obituary(process, ready)
        return ready

    def _spawn(self, fd: int) -> subprocess.Popen[bytes] | None:
        port = ["--port", self._address.rpartition(":")[2]] if self._address else []
        command = [*config.python_command("areal_fast"), *self._argv, *port, "--lifeline-fd", str(fd)]
        environment = config.child_environment() | self._environment
        with self._changed:
            if self._stopping:
                return None
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(fd,),
                env=environment,
                start_new_session=True,  # a Ctrl-C at whoever owns the owner must not reach it twice
            )
            return self._process

    def _read(self, process: subprocess.Popen[bytes], line: socket.socket) -> bool:
        """Until the supervisor is dead and its children have let its stderr go."""
        assert process.stderr is not None
        stderr = process.stderr.fileno()
        poll = select.poll()
        poll.register(line, select.POLLIN)
        poll.register(stderr, select.POLLIN)
        ready, said, written, deadline = False, b"", b"", None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = poll.poll(None if left is None else int(left * 1000))
            if not events:
                self._say(f"some process of it is still there {TREE_GONE_S:g} s after its end")
                return ready
            for fd, _ in events:
                if fd == stderr:
                    chunk = os.read(stderr, 1 << 16)
                    *lines, written = (written + chunk).split(b"\n")
                    for text in lines:
                        self._heard(text.decode(errors="replace"))
                    if not chunk:
                        process.wait()
                        return ready
                    continue
                chunk = _received(line)
                if not chunk:
                    process.wait()
                    poll.unregister(line)
                    deadline = time.monotonic() + TREE_GONE_S
                    continue
                said += chunk
                if not ready and b"\n" in said:
                    ready = True
                    self._note_ready(json.loads(said.partition(b"\n")[0]))

    def _note_ready(self, message: dict[str, Any]) -> None:
        with self._changed:
            self._address, self._state = message["address"], "ready"
            self._changed.notify_all()

    def _heard(self, line: str) -> None:
        self._tail.append(line)
        self._write(line)

    def _obituary(self, process: subprocess.Popen[bytes], ready: bool) -> str:
        status = process.returncode
        if status is None:
            how = "is neither alive nor dead"
        elif status < 0:
            try:
                how = f"was killed by {signal.Signals(-status).name}"
            except ValueError:
                how = f"was killed by signal {-status}"
        else:
            how = f"exited with status {status}"
        where = f"the proxy at {self._address}" if self._address else "the proxy"
        words = "" if ready and status is not None and status < 0 else f": {self._last_words()}"
        return f"{where} {how}{words}"

    def _last_words(self) -> str:
        """Its last error line, or its last line."""
        lines = [line for line in self._tail if line.strip()]
        errors = [line for line in lines if " ERROR " in line or "error: " in line]
        return (errors or lines or ["it wrote nothing"])[-1]

    def _status(self) -> Status:
        alive = self._state == "ready" and self._process is not None
        return Status(
            state=self._state,
            address=self._address,
            pid=self._process.pid if alive and self._process else 0,
            restarts=self._restarts,
            last_death=self._last_death if self._restarts or self._state == "failed" else "",
        )

    def _say(self, text: str) -> None:
        self._write(f"areal_fast owner[{os.getpid()}]: {text}")

    def _write(self, line: str) -> None:
        try:
            print(line, file=self._log, flush=True)
        except (OSError, ValueError):
            pass  # nobody reads it any more: the kept lines and the status say it too


def _received(line: socket.socket) -> bytes:
    try:
        return line.recv(4096)
    except OSError:  # reset: it died with something of ours unread
        return b""
