"""How a child process starts, and the line that ties it to its supervisor.

The supervisor passes three descriptors: the arena's memfd, the listening socket (workers only), and one end
of a SEQPACKET socket pair, the control line. A fourth, a memfd with JSON (`Boot`), says which is which.

The control line carries one JSON message a packet. Its EOF means that the supervisor is gone: the child
exits at once. PR_SET_PDEATHSIG does the same from the kernel's side, also for a child that is stopped or
busy in C. SIGTERM and SIGINT are ignored but counted in the arena: a guard that signals the whole tree will
kill it within seconds, and the supervisor hurries when it sees that count. Children obey the line alone.

To a worker: {"do": "drain", "seconds": s} · {"do": "board", "board": {…}}. To the cleaner: {"do": "dump",
"seconds": s, "final": bool} · {"do": "retire"}. From a child: {"is": "ready"} · {"is": "fatal", "why": …} ·
from a worker {"is": "drained", "unfinished": n} · from the cleaner {"is": "status", "status": {…}} and
{"is": "dumped", "dumped": n, "left": n}.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from typing import Any, Final, NoReturn

import msgspec

from areal_fast.config import Settings
from areal_fast.core import Arena
from areal_fast.service.log import Log
from areal_fast.service.words import TREE_SIGNALLED

HEARTBEAT_S: Final = 0.25
MAX_MESSAGE_BYTES: Final = 64 << 10
PR_SET_PDEATHSIG: Final = 1


class Boot(msgspec.Struct, kw_only=True):
    """What a child must know to begin."""

    role: str
    index: int
    proc: int
    """Its number in the arena's process table."""
    arena_fd: int
    control_fd: int
    listen_fd: int = -1
    local_fd: int = -1
    pocket_fds: tuple[int, ...] = ()
    """A keeper's: where it puts its pool's descriptor, and where a successor finds it."""
    gpu: str = ""
    """A keeper's GPU as a UUID; "": the first there is."""
    supervisor_pid: int
    settings: Settings


class Child:
    """A started child: its settings, its arena, its log and its control line."""

    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.settings = boot.settings
        self.log = Log(
            f"{boot.role}-{boot.index}" if boot.role == "worker" else boot.role, self.settings.log_level
        )
        self.control = socket.socket(fileno=boot.control_fd)
        self.control.setblocking(False)
        self.arena = Arena.attach(boot.arena_fd, boot.proc)
        os.close(boot.arena_fd)
        self.arena.proc_enter(os.getpid())

    def note_signal(self) -> None:
        """SIGTERM or SIGINT came: count it where the supervisor looks, do nothing else."""
        self.arena.add_word(TREE_SIGNALLED, 1)

    def send(self, message: dict[str, Any], fd: int = -1) -> bool:
        """Tell the supervisor, with a descriptor if given. Never blocks; False if the line is full or
        gone."""
        packet = msgspec.json.encode(message)
        try:
            if len(packet) > MAX_MESSAGE_BYTES:
                return False
            if fd >= 0:
                return socket.send_fds(self.control, [packet], [fd]) == len(packet)
            return self.control.send(packet) == len(packet)
        except OSError:
            return False

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None if there is none now. Exits the process if the supervisor is gone."""
        try:
            packet = self.control.recv(MAX_MESSAGE_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            packet = b""
        if not packet:
            os._exit(0)
        message: dict[str, Any] = msgspec.json.decode(packet)
        return message

    def fatal(self, why: str) -> NoReturn:
        """This child cannot work with these settings; the supervisor tells the user why."""
        self.send({"is": "fatal", "why": why})
        os._exit(1)


def start() -> Child:
    """Become a child: read `--boot-fd N`, tie this process's life to the supervisor's, attach the arena."""
    try:
        fd = int(sys.argv[sys.argv.index("--boot-fd") + 1])
    except (ValueError, IndexError):
        sys.exit("this module is started by the supervisor: python -m areal_fast")
    with open(fd, "rb") as file:
        boot = msgspec.json.decode(file.read(), type=Boot)
    die_with_parent(boot.supervisor_pid)
    child = Child(boot)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.note_signal())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return child


_libc = ctypes.CDLL(None)


def ask_for_death_signal() -> None:
    """SIGKILL from the kernel when the parent dies, stopped or not. Between fork and exec, which keeps it."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def die_with_parent(parent_pid: int) -> None:
    """Leave at once if the parent died before the death signal was asked for."""
    ask_for_death_signal()
    if os.getppid() != parent_pid:
        os._exit(0)
