"""The supervisor's children: starting one, judging whether it lives, deciding when to start it again.

Theory. A `Role` is a job that must always be filled (worker 0, worker 1, …, cleaner, engine); a `Process` is
one try at filling it. Only its pidfd says that it is dead, so what it held is swept after certain death.

* Heartbeats are judged by the supervisor's own ticks, not by time: `silent` counts ticks in which the
  child's word in the arena did not move while the supervisor itself ran. A pause of the whole tree (a
  container frozen, a laptop closed) moves no tick and so kills nobody.
* A silent process that holds the index mutex stops everyone who starts or removes sessions, so it gets
  LOCK_TICKS instead of the usual patience.
* `Restarts` is the back-off: 0.1 s doubling to 5 s, begun anew after a run that went well; too many bad runs
  in a row mean that it cannot stay up, and the whole proxy stops with a reason instead of limping.

Source: the design page, "Processes".
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from areal_fast.config import Settings, child_environment, python_command
from areal_fast.service.child import HEARTBEAT_S, MAX_MESSAGE_BYTES, Boot, ask_for_death_signal

TICK_S: Final = HEARTBEAT_S
LOCK_TICKS: Final = 4
"""Silent ticks (1 s) granted to the holder of the index mutex."""
STUCK_TICKS: Final = 20
"""Ticks (5 s) after SIGKILL without death until a process counts as one that cannot be killed."""
CLEANER_PATIENCE: Final = 6
"""The cleaner's silence may last so many times a worker's: one fsync on a slow disk blocks it. Not if it was
stopped: nothing it could be waiting for would then go on, and at the end of service its time is bounded."""


class Restarts:
    """When to start a role again, and when to give up. No clock: the caller says how long the run lasted."""

    FIRST_S: Final = 0.1
    LONGEST_S: Final = 5.0
    GOOD_RUN_S: Final = 2.0
    BAD_RUNS: Final = 10
    """Short runs in a row after which the role cannot stay up."""
    BAD_STARTS: Final = 3
    """The same while the role has never once become ready: nothing suggests that it ever will."""

    def __init__(self) -> None:
        self.total = 0
        self.bad_runs = 0
        self.ever_ready = False

    def after_death(self, ready_for_s: float | None) -> float | None:
        """Seconds until the next start, or None: give up. `ready_for_s` is None if it never became ready."""
        self.total += 1
        if ready_for_s is not None:
            self.ever_ready = True
            if ready_for_s >= self.GOOD_RUN_S:
                self.bad_runs = 0
        self.bad_runs += 1
        if self.bad_runs >= (self.BAD_RUNS if self.ever_ready else self.BAD_STARTS):
            return None
        return min(self.FIRST_S * 2.0 ** (self.bad_runs - 1), self.LONGEST_S)


class Role:
    """A job to be kept filled. `proc` is the process number its next holder gets in the arena."""

    def __init__(self, name: str, module: str, proc: int, index: int = 0) -> None:
        self.name = name
        self.module = module
        self.proc = proc
        self.home_proc = proc
        self.index = index
        self.restarts = Restarts()
        self.process: Process | None = None
        self.start_at: float | None = 0.0
        """Monotonic time of the next start; None while it runs or when it shall not run again."""

    @property
    def beats(self) -> bool:
        """Whether the role has a number in the arena and a heartbeat there (the engine has neither)."""
        return self.proc >= 0


class Process:
    """One child. `tick` arguments are the supervisor's own tick count."""

    def __init__(self, role: Role, popen: subprocess.Popen[bytes], control: socket.socket, tick: int) -> None:
        self.role = role
        self.proc = role.proc
        self.popen = popen
        self.pid = popen.pid
        self.pidfd = os.pidfd_open(popen.pid)
        self.control = control
        self.started_tick = tick
        self.ready_at: float | None = None
        self.ready_since: float | None = None
        """Monotonic seconds, and Unix seconds for people."""
        self.state = "starting"
        self.kill_reason = ""
        self.killed_tick = -1
        self.last_words = ""
        self.retiring = False
        self.line_ended = False
        self.applied = 0
        """Revision of the shared settings that it is known to have."""
        self._unsent: dict[tuple[str, int], dict[str, Any]] = {}
        self._beat = -1
        self._beat_tick = tick
        self._lock_ticks = 0

    def note_ready(self) -> None:
        self.ready_at, self.ready_since, self.state = time.monotonic(), time.time(), "ready"

    # -- life and death --------------------------------------------------------------------------------
    def kill(self, reason: str, tick: int) -> None:
        """SIGKILL. The reason is for the log line when the death is certain."""
        if self.killed_tick < 0:
            self.kill_reason, self.killed_tick, self.state = reason, tick, "killed"
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def stuck(self, tick: int) -> bool:
        """Killed, but not dead after STUCK_TICKS: it sits in the kernel and may do so for ever."""
        return self.killed_tick >= 0 and tick - self.killed_tick >= STUCK_TICKS

    def reap(self) -> str:
        """After the pidfd said so: collect it and say how it died."""
        status = self.popen.wait()
        os.close(self.pidfd)
        self.control.close()
        if self.kill_reason:
            return f"killed: {self.kill_reason}"
        if status < 0:
            try:
                return f"died by {signal.Signals(-status).name}"
            except ValueError:
                return f"died by signal {-status}"
        return f"exited with status {status}" + (f": {self.last_words}" if self.last_words else "")

    def ready_for_s(self, now: float) -> float | None:
        return None if self.ready_at is None else now - self.ready_at

    # -- heartbeat -------------------------------------------------------------------------------------
    def silent(self, beat: int, tick: int) -> int:
        """Ticks since the child's heartbeat word last moved. `beat`: the word now, -1 if not there yet."""
        if beat != self._beat:
            self._beat, self._beat_tick = beat, tick
        return tick - self._beat_tick

    def verdict(self, beat: int, *, holds_lock: bool, tick: int, settings: Settings) -> str:
        """Why this process must be killed now, or "". Call once a tick."""
        silent = self.silent(beat, tick)
        self._lock_ticks = self._lock_ticks + 1 if holds_lock and silent >= LOCK_TICKS else 0
        if self._lock_ticks >= 2:
            return f"held the index lock while silent for {silent * TICK_S:g} s"
        if self.ready_at is None:
            if (tick - self.started_tick) * TICK_S >= settings.start_timeout_s:
                return f"not ready after {settings.start_timeout_s:g} s"
            return ""
        patience = settings.hang_timeout_s
        if self.role.name == "cleaner" and silent * TICK_S >= patience and not self._halted():
            patience *= CLEANER_PATIENCE
        if self.role.beats and silent * TICK_S >= patience:
            return f"no heartbeat for {silent * TICK_S:g} s"
        return ""

    def _halted(self) -> bool:
        """Whether somebody stopped it (SIGSTOP, a debugger). Waiting for a disk is another state."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
        except OSError:
            return False

    # -- control line ----------------------------------------------------------------------------------
    def send(self, message: dict[str, Any]) -> None:
        """Never blocks. What does not fit now is kept, the latest of each kind, and sent by `flush`."""
        self._unsent[message["do"], message.get("token", 0)] = message
        self.flush()

    def flush(self) -> None:
        for kind, message in list(self._unsent.items()):
            try:
                self.control.send(msgspec.json.encode(message))
            except BlockingIOError:
                return
            except OSError:
                pass  # its death is reported by the pidfd
            del self._unsent[kind]

    def receive(self) -> list[dict[str, Any]]:
        """Everything the child has said since; [] at EOF too (its death is reported by the pidfd)."""
        messages: list[dict[str, Any]] = []
        while True:
            try:
                packet, fds, _, _ = socket.recv_fds(self.control, MAX_MESSAGE_BYTES, 1)
            except ConnectionResetError:
                continue  # it died with messages of ours unread; its own last words are still to come
            except OSError:
                return messages
            if not packet:
                self.line_ended = True
                return messages
            try:
                message = msgspec.json.decode(packet)
            except msgspec.DecodeError:
                message = None
            if isinstance(message, dict) and (message.get("is") == "hold") >= bool(fds):
                messages.append(message if not fds else {**message, "fd": fds[0]})
            else:
                for fd in fds:
                    os.close(fd)


def spawn(
    role: Role,
    settings: Settings,
    tick: int,
    *,
    arena_fd: int,
    listen_fd: int,
    local_fd: int = -1,
    pocket_fds: tuple[int, ...] = (),
    gpu: str = "",
) -> Process:
    """fork+exec a worker, the cleaner or a keeper, with exactly the descriptors it needs."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    boot_fd = os.memfd_create("areal_fast-boot", os.MFD_CLOEXEC)
    try:
        boot = Boot(
            role="worker" if role.name.startswith("worker") else role.name,
            index=role.index,
            proc=role.proc,
            arena_fd=arena_fd,
            control_fd=theirs.fileno(),
            listen_fd=listen_fd,
            local_fd=local_fd,
            pocket_fds=pocket_fds,
            gpu=gpu,
            supervisor_pid=os.getpid(),
            settings=settings,
        )
        os.write(boot_fd, msgspec.json.encode(boot))
        os.lseek(boot_fd, 0, os.SEEK_SET)
        fds = [fd for fd in (arena_fd, theirs.fileno(), boot_fd, listen_fd, local_fd, *pocket_fds) if fd >= 0]
        popen = _popen([*python_command(role.module), "--boot-fd", str(boot_fd)], fds)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(boot_fd)
    ours.setblocking(False)
    return Process(role, popen, ours, tick)


def spawn_engine(role: Role, listen_fd: int, arguments: Sequence[str], tick: int) -> Process:
    """fork+exec the embedded engine on an inherited listening socket; the end of its stdin means: go."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        popen = _popen(
            [*python_command(role.module), str(os.getpid()), "--inherit-fd", str(listen_fd), *arguments],
            [listen_fd],
            theirs.fileno(),
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    process = Process(role, popen, ours, tick)
    process.note_ready()
    return process


def _popen(
    command: list[str], fds: Sequence[int], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    # preexec_fn is safe here: the supervisor has one thread
    return subprocess.Popen(
        command,
        pass_fds=tuple(fds),
        stdin=stdin,
        env=child_environment(),
        preexec_fn=ask_for_death_signal,
    )
