"""GET /health: the original's fields, then ours.

Recorded first: status, backend, sessions, paused, version; read from the arena at each request. Then what an
operator asks next: which worker answered, workers and cleaner (from the supervisor's board), the arena, the
last clean-up and what went wrong in it. That second part is made at most once a heartbeat, and an answer that
would say the same as the last is not made again, so that probing costs next to nothing. Counting sessions
reads a word of each; where there have been thousands, a count stands for a hundred times as long as it takes.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import msgspec

from areal_fast.shards.store import FILE_BYTES

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.service.control import Engines
    from areal_fast.service.words import SharedState
    from areal_fast.store import SessionStore

_encode = msgspec.json.Encoder().encode

MANY_SESSIONS = 4096
COUNT_STANDS_NS = 70
"""A session: a hundred times what counting it takes, so 7 ms of 100,000."""


class Health:
    """`board` is the supervisor's last word on processes and clean-up."""

    def __init__(self, store: SessionStore, state: SharedState, engines: Engines, started: float) -> None:
        self._store = store
        self._state = state
        self._engines = engines
        self._started = started
        self.board: dict[str, Any] = {}
        self._rest = b""
        self._answer = b""  # the last one, which said
        self._said: tuple[object, ...] = ()
        self._sessions = self._most_sessions = 0
        self._count_at_ns = 0

    def serve(self, exchange: Exchange) -> None:
        state = self._state
        now = self._engines.address, self._count(), state.paused(), state.version()
        if now != self._said or not self._answer:
            backend, sessions, paused, version = self._said = now
            head = _encode(
                {
                    "status": "ok",
                    "backend": backend,
                    "sessions": sessions,
                    "paused": paused,
                    "version": version,
                }
            )
            self._answer = head[:-1] + b"," + (self._rest or self.refresh())[1:]
        exchange.respond(200, self._answer)

    def _count(self) -> int:
        """Live sessions, exact while there have been few."""
        now = time.monotonic_ns()
        if self._most_sessions < MANY_SESSIONS or now >= self._count_at_ns:
            self._sessions = self._store.sessions_count()
            self._most_sessions = max(self._most_sessions, self._sessions)
            self._count_at_ns = now + COUNT_STANDS_NS * self._most_sessions
        return self._sessions

    def expire(self) -> None:
        """The second part is out of date: make it anew when somebody asks."""
        self._rest = self._answer = b""

    def refresh(self) -> bytes:
        board = self.board
        self._rest = _encode(
            {
                "pid": os.getpid(),
                "uptime_s": round(time.time() - self._started, 3),
                "workers": board.get("workers", []),
                "cleaner": board.get("cleaner"),
                "engine": board.get("engine"),
                **{name: row for name, row in board.items() if name.startswith("keeper-")},
                "stuck": board.get("stuck", []),
                "arena": self._store.arena.stats(),
                "shard_file_bytes": self._store.arena.word(FILE_BYTES),
                "cleanup": board.get("cleanup", {}),
            }
        )
        return self._rest
