"""A keeper for tests: the real process, as the supervisor starts it, over an arena of the test's own.

`Keeping` plays the supervisor's part (post, control line, sweep after death) and lets the test decide when.
Its `producer` and `consumer` are other processes, so that they can be killed at any line.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

from areal_fast.config import Settings
from areal_fast.core import PROC_KEEPER, Arena
from areal_fast.protocol import gpu as wire
from areal_fast.protocol.gpu import Request
from areal_fast.service.keepers import Post
from areal_fast.service.processes import Process, spawn
from areal_fast.shards import ShardStore
from areal_fast.shards.gpu import GpuClient
from areal_fast.shards.gpu_records import GpuHold, GpuMeta, GpuRecords
from tests.e2e.running import wait_until

POOL_BYTES = 8 << 20
GIVING_BACK = (
    "cuMemUnmap", "cuMemAddressFree", "cuMemRelease", "cuMemFree_v2", "cuStreamDestroy_v2",
    "cuDevicePrimaryCtxRelease_v2", "cuIpcCloseMemHandle", "cuCtxPushCurrent_v2",
)  # fmt: skip
"""Calls that give something back (cuCtxPushCurrent_v2 comes before some of them): failures are not told."""
WATCHDOG_S = 60.0


class Keeping:
    """See the top of the file. `library`: the driver that keepers and clients open."""

    def __init__(self, library: str, pool_bytes: int = POOL_BYTES) -> None:
        self.library = library
        self.settings = Settings(cuda_library=library, gpu_pool_bytes=pool_bytes, log_level="info")
        self.arena = Arena.create(16 << 20)
        self.arena.proc_enter(os.getpid())
        self.store = ShardStore(self.arena)
        self.post = Post(0, "", PROC_KEEPER)
        self.process: Process | None = None
        self.said: list[dict[str, Any]] = []
        self.gpu = b""

    def __enter__(self) -> Keeping:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self.post.close()
        self.arena.close()

    def start(self, *, wait: bool = True) -> None:
        """A keeper, the first or a successor; ready when this returns."""
        pocket = (self.post.pocket[0].fileno(), self.post.pocket[1].fileno())
        self.said = []
        self.process = spawn(
            self.post.role,
            self.settings,
            0,
            arena_fd=self.arena.fileno(),
            listen_fd=self.post.listener.fileno(),
            pocket_fds=pocket,
        )
        if wait:
            self.hear("ready")

    def hear(self, *what: str) -> dict[str, Any]:
        """Wait until the keeper says one of these; AssertionError if it ends before."""
        assert self.process is not None
        deadline = time.monotonic() + WATCHDOG_S
        while time.monotonic() < deadline:
            poll = select.poll()
            poll.register(self.process.control, select.POLLIN)
            poll.poll(1000)
            self.said += self.process.receive()
            for message in self.said:
                if message["is"] in what:
                    return message
            if self.process.line_ended:
                break
        raise AssertionError(f"the keeper did not say {what!r}, but {self.said}")

    @property
    def dead(self) -> bool:
        assert self.process is not None
        poll = select.poll()
        poll.register(self.process.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        """SIGKILL, and what the supervisor does when the death is certain."""
        if self.process is not None:
            self.process.kill("test", 0)
            self.bury()

    def bury(self) -> None:
        assert self.process is not None
        poll = select.poll()
        poll.register(self.process.pidfd, select.POLLIN)
        assert poll.poll(int(WATCHDOG_S * 1000)), "the keeper does not die"
        self.process.reap()
        self.process = None
        self.arena.sweep(PROC_KEEPER)

    def client(self, **how: Any) -> GpuClient:
        return GpuClient.connect(self.post.name, self.library, **how)

    def child(self, program: str, *, device: bool = True) -> subprocess.Popen[bytes]:
        """Another process: `program` with `client` made, and `say(text)` to be read from its stdout. Without
        `device` it makes no call of the driver."""
        start = (
            "import os, signal, sys\n"
            "from areal_fast.shards.gpu import *\n"
            "from tests.gpu import keeping\n"
            "def say(text): print(text, flush=True)\n"
            f"client = GpuClient.connect(sys.argv[1], sys.argv[2], device={device})\n"
        )
        command = [sys.executable, "-c", start + program, self.post.name, self.library]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    # -- what the arena says ---------------------------------------------------------------------------
    def records(self) -> list[GpuMeta | GpuHold]:
        return [] if not self.gpu else [meta for _, meta in GpuRecords(self.store).of_gpu(self.gpu)]

    def holds(self) -> list[GpuHold]:
        return [meta for meta in self.records() if isinstance(meta, GpuHold)]

    def wait_no_holds(self) -> None:
        wait_until(lambda: not self.holds(), "nothing is held any more")


def end(child: subprocess.Popen[bytes], *, kill: bool = False) -> int:
    """The child's exit status, after its end."""
    if kill:
        child.send_signal(signal.SIGKILL)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    return child.wait(WATCHDOG_S)


def reserve(nbytes: int) -> Request:
    return Request(wire.RESERVE, 0, nbytes=nbytes)
