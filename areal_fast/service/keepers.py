"""The supervisor's part in GPU shards: a keeper a GPU, started when a worker says that one is wanted.

A worker asks {"is": "keeper", "token": n, "gpu": UUID or ""} over its control line and hears {"do": "keeper",
"token": n, "gpu": …, "socket": …, "pool_bytes": …, "why": …}: a socket name, or why there is none. All
workers are told of every keeper ({"do": "keepers", "keepers": {gpu: socket}}), so that they can read its
shards.

A Post is what outlives a keeper: the listening socket that its clients know by name, and the pocket, a
socket pair with the pool's descriptor in flight, which nobody takes out (see keeper.py). Keepers start one
after another, so two names of one GPU never get two. One that cannot start (no driver, no such GPU, no
memory) is no reason to stop the proxy: it is one log line, and the answer until RETRY_S later somebody asks
again.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from areal_fast.core import PROC_KEEPER
from areal_fast.service.processes import Process, Role, spawn

if TYPE_CHECKING:
    from areal_fast.config import Settings
    from areal_fast.service.log import Log

PREFIX: Final = "keeper"
RETRY_S: Final = 10.0
MAX_WAITING: Final = 1024
MAX_REASONS: Final = 64
BACKLOG: Final = 128
MODULE: Final = "areal_fast.service.keeper"
OFF: Final = "GPU shards are off (--gpu-pool-bytes 0)"


class Ask(NamedTuple):
    """A worker that waits for an answer."""

    process: Process
    token: int
    gpu: str


class Refused(NamedTuple):
    """Why a GPU has no keeper, and since when (monotonic s)."""

    why: str
    at: float


class Post:
    """One GPU's place in this proxy. gpu: "" until its first keeper has said which one it is."""

    def __init__(self, number: int, asked: str, proc: int) -> None:
        self.asked = asked
        self.gpu = ""
        self.pool_bytes = 0
        self.name = f"areal_fast-{secrets.token_hex(8)}-{number}"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(f"\0{self.name}")
        self.listener.listen(BACKLOG)
        self.pocket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.role = Role(f"{PREFIX}-{number}", MODULE, proc, number)

    def close(self) -> None:
        for sock in (self.listener, *self.pocket):
            sock.close()


class Keepers:
    """See the top of the file. `roles`: the supervisor's own list, in which keepers stand before its last."""

    def __init__(self, roles: list[Role], log: Log, spare_numbers: Callable[[], Iterator[int]]) -> None:
        self._roles = roles
        self._log = log
        self._spare_numbers = spare_numbers
        self.posts: list[Post] = []
        self._asks: deque[Ask] = deque()
        self._refused: dict[str, Refused] = {}

    @staticmethod
    def is_keeper(role: Role) -> bool:
        return role.name.startswith(PREFIX)

    # -- asking ------------------------------------------------------------------------------------------
    def ask(self, process: Process, token: int, gpu: str, settings: Settings) -> None:
        """A worker wants a keeper for this GPU ("": any)."""
        ask = Ask(process, token, gpu)
        if settings.gpu_pool_bytes == 0:
            self._answer(ask, None, OFF)
        elif len(self._asks) >= MAX_WAITING:
            self._answer(ask, None, "too many are asking")
        else:
            self._asks.append(ask)
            self._serve()

    def _serve(self) -> None:
        """Answer the asks that can be answered; start a keeper for the first that cannot, one at a time."""
        while self._asks and not any(post.role.process and not post.gpu for post in self.posts):
            ask = self._asks[0]
            post = next((post for post in self.posts if ask.gpu in ("", post.gpu)), None)
            if post is not None and not post.gpu:
                return  # its first keeper is about to be started
            refused = self._refused.get(ask.gpu)
            if post is not None:
                self._answer(self._asks.popleft(), post, "")
            elif refused is not None and time.monotonic() - refused.at < RETRY_S:
                self._answer(self._asks.popleft(), None, refused.why)
            elif not self._open(ask.gpu):
                self._answer(self._asks.popleft(), None, "there are no process numbers left for a keeper")
            else:
                return

    def _open(self, gpu: str) -> bool:
        taken = {number for role in self._roles for number in (role.proc, role.home_proc)}
        proc = next((n for n in (PROC_KEEPER, *self._spare_numbers()) if n not in taken), -1)
        if proc < 0:
            return False
        number = 1 + max((post.role.index for post in self.posts), default=-1)
        post = Post(number, gpu, proc)
        self.posts.append(post)
        self._roles.insert(len(self._roles) - 1, post.role)
        return True

    @staticmethod
    def _answer(ask: Ask, post: Post | None, why: str) -> None:
        found: dict[str, Any] = {"gpu": ask.gpu, "socket": "", "pool_bytes": 0, "why": why}
        if post is not None:
            found |= {"gpu": post.gpu, "socket": post.name, "pool_bytes": post.pool_bytes}
        ask.process.send({"do": "keeper", "token": ask.token, **found})

    # -- keepers' lives ----------------------------------------------------------------------------------
    def spawn(self, role: Role, settings: Settings, tick: int, arena_fd: int) -> Process:
        post = self._post(role)
        return spawn(
            role,
            settings,
            tick,
            arena_fd=arena_fd,
            listen_fd=post.listener.fileno(),
            pocket_fds=(post.pocket[0].fileno(), post.pocket[1].fileno()),
            gpu=post.gpu or post.asked,
        )

    def heard(self, process: Process, message: dict[str, Any]) -> None:
        """{"is": "keeper", "gpu": …, "pool_bytes": n}: it has its pool. Tells every worker."""
        post = self._post(process.role)
        post.gpu, post.pool_bytes = str(message["gpu"]), int(message["pool_bytes"])
        self._refused.clear()
        self._log.notice("keeper", gpu=post.gpu, pool_bytes=post.pool_bytes)
        for role in self._roles:
            if role.process is not None:
                self.tell(role.process)
        self._serve()

    def tell(self, process: Process) -> None:
        """What a worker must know to read GPU shards."""
        known = {post.gpu: post.name for post in self.posts if post.gpu}
        if known and process.role.name.startswith("worker"):
            process.send({"do": "keepers", "keepers": known})

    def forget_asker(self, process: Process) -> None:
        self._asks = deque(ask for ask in self._asks if ask.process is not process)

    def gave_up(self, role: Role, why: str) -> bool:
        """A keeper died that had never been ready or cannot stay up. True: it is not to be started again
        now."""
        post = self._post(role)
        if post.gpu:
            role.restarts.bad_runs = 0  # shards may be in its pool: go on trying, at the longest interval
            self._log.error("keeper_cannot_stay_up", gpu=post.gpu, why=why)
            return False
        self._log.warning("no_keeper", gpu=post.asked or "any", why=why)
        if len(self._refused) >= MAX_REASONS:
            self._refused.clear()
        self._refused[post.asked] = Refused(why, time.monotonic())
        self.posts.remove(post)
        self._roles.remove(role)
        post.close()
        self._serve()
        return True

    def close(self) -> None:
        for post in self.posts:
            post.close()

    def _post(self, role: Role) -> Post:
        return next(post for post in self.posts if post.role is role)
