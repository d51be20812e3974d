"""What is counted while serving, and where: the hot half of GET /metrics (metrics.py is the other).

Theory. Every process has 128 counters of its own in the arena, written by it alone with relaxed stores. A
reader sums them over all processes, dead ones included: any worker can answer for all, nothing is lost or
begins anew when a worker dies, and counting takes no lock. What is counted only goes up; gauges are read from
the arena when somebody asks.

Numbers 0 to 6 are the cleaner's (words.py), 7 to 29 events, 30 to 127 seven routes of 14: nine buckets and
the rest (each request in exactly one; the exposition adds them up), the sum of nanoseconds, three classes of
status. Routes are a fixed list, so no client can make the counters more.

The cost of a request is two clock readings and one call, which counts three: half a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from areal_fast.core import NUM_COUNTERS

if TYPE_CHECKING:
    from areal_fast.core import Arena
    from areal_fast.engine.generate import Generation
    from areal_fast.http import Client, Exchange, Server

# Events. One writer a process, as all counters.
SESSIONS_STARTED: Final = 7
TURNS: Final = 8
"""Interactions recorded."""
STANDALONE_CHATS: Final = 9
"""Chats answered and not recorded: no session key, an unknown one, or `store: false`."""
PROMPT_TOKENS: Final = 10
OUTPUT_TOKENS: Final = 11
RESUBMITS: Final = 12
"""Engine calls that went on with a generation which the engine had aborted."""
ORPHANED_CHATS: Final = 13
"""Answers whose session was removed while the engine worked."""
EXPORTS_DELIVERED: Final = 14
EXPORTS_UNDELIVERED: Final = 15
"""Exports whose reply did not reach the client: their trajectories are ready again."""
ENGINE_REQUESTS: Final = 16
ENGINE_FAILURES: Final = 17
ENGINE_RETRIES: Final = 18
ENGINE_CONNECTS: Final = 19
POOL_WAIT_NS: Final = 20
ENGINE_WAIT_NS: Final = 21
CONNECTIONS: Final = 22
REFUSED: Final = 23
"""Requests that the HTTP layer refused before any route saw them."""
SHARDS_MAPPED: Final = 24
"""Shards that went to readers as descriptors."""

BOUNDS_S: Final = (0.0005, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 60.0)
"""Upper bounds of the buckets; the tenth is everything above."""
_BOUNDS_NS: Final = tuple(round(bound * 1e9) for bound in BOUNDS_S)
CLASSES: Final = ("2xx", "4xx", "5xx")

ROUTES: Final = ("start_session", "chat", "set_reward", "export", "data", "control", "other")
FIRST: Final = 30
SIZE: Final = len(BOUNDS_S) + 1 + 1 + len(CLASSES)
SUM: Final = len(BOUNDS_S) + 1
assert FIRST + SIZE * len(ROUTES) <= NUM_COUNTERS

PATHS: Final = {
    "/rl/start_session": "start_session",
    "/chat/completions": "chat",
    "/v1/chat/completions": "chat",
    "/responses": "chat",
    "/v1/responses": "chat",
    "/messages": "chat",
    "/v1/messages": "chat",
    "/rl/set_reward": "set_reward",
    "/export_trajectories": "export",
    "/configure": "control",
    "/pause_generation": "control",
    "/continue_generation": "control",
    "/release_memory_occupation": "control",
    "/resume_memory_occupation": "control",
    "/set_version": "control",
    "/get_version": "control",
    "/configure_backend": "control",
    "/register_model": "control",
}
"""The route of a path. Under /data/ it is "data", anything else "other"."""


def base(route: str) -> int:
    """The number of a route's first counter."""
    return FIRST + SIZE * ROUTES.index(route)


_CLASS: Final = (2, 0, 0, 0, 1, 2)
"""Of CLASSES, by a status's hundreds. No status: the handler failed, and the HTTP layer says 500."""

Handler = Callable[["Exchange"], Awaitable[None] | None]


class Counters(Protocol):
    """The arena, as far as this file needs it."""

    def count(self, counter: int, delta: int = 1) -> None: ...


class Metered:
    """An HTTP handler that counts what another one answers: route, class of status, time.

    Time runs from the whole request being there until its reply is handed to the connection; for a stream
    until its end."""

    def __init__(
        self, handler: Handler, arena: Arena, clock: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self._handler = handler
        self._clock = clock
        by_route = {route: arena.histogram(base(route), _BOUNDS_NS).observe for route in ROUTES}
        self._of_path = {path: by_route[route] for path, route in PATHS.items()}
        self._data, self._other = by_route["data"], by_route["other"]

    def __call__(self, exchange: Exchange) -> Awaitable[None] | None:
        begun = self._clock()
        pending = self._handler(exchange)
        if pending is not None:
            return self._later(exchange, pending, begun)
        if exchange.finished:
            self._note(exchange, begun)
        else:
            exchange.on_done(partial(self._note, exchange, begun))
        return None

    async def _later(self, exchange: Exchange, pending: Awaitable[None], begun: int) -> None:
        try:
            await pending
        finally:
            self._note(exchange, begun)

    def _note(self, exchange: Exchange, begun: int) -> None:
        took = self._clock() - begun
        path = exchange.path
        observe = self._of_path.get(path)
        if observe is None:
            observe = self._data if path.startswith("/data/") else self._other
        observe(took, _CLASS[exchange.status // 100])


def count_generation(arena: Counters, prompt_tokens: int, generation: Generation) -> None:
    """What the engine answered."""
    arena.count(PROMPT_TOKENS, prompt_tokens)
    arena.count(OUTPUT_TOKENS, len(generation.output_ids))
    if generation.attempts > 1:
        arena.count(RESUBMITS, generation.attempts - 1)


class Sums:
    """Sums kept by the HTTP layers, brought over to the arena: what was added since the last time.

    `carry` is called once a heartbeat and before an answer to /metrics; a killed worker loses at most what
    came since its last beat."""

    def __init__(self, arena: Counters) -> None:
        self._arena = arena
        self._server_said = [0, 0]
        self._clients: list[tuple[Client, list[int]]] = []

    def watch(self, client: Client) -> None:
        """Count this engine client's calls. Those watched before are let go once they are idle."""
        self._clients.append((client, [0] * len(_CLIENT_SUMS)))

    def carry(self, server: Server) -> None:
        self._add((CONNECTIONS, REFUSED), (server.accepted, server.refused), self._server_said)
        for client, said in self._clients:
            stats = client.stats
            waited_ns, engine_ns = int(stats.waited_s * 1e9), int(stats.engine_s * 1e9)
            values = (
                stats.requests,
                stats.failed,
                stats.retries,
                stats.connects,
                waited_ns,
                engine_ns,
            )
            self._add(_CLIENT_SUMS, values, said)
        if len(self._clients) > 1:
            newest = self._clients.pop()
            self._clients = [entry for entry in self._clients if entry[0].connections]
            self._clients.append(newest)

    def _add(self, counters: Sequence[int], values: Sequence[int], said: list[int]) -> None:
        for i, (counter, value) in enumerate(zip(counters, values, strict=True)):
            if value > said[i]:
                self._arena.count(counter, value - said[i])
                said[i] = value


_CLIENT_SUMS: Final = (
    ENGINE_REQUESTS,
    ENGINE_FAILURES,
    ENGINE_RETRIES,
    ENGINE_CONNECTS,
    POOL_WAIT_NS,
    ENGINE_WAIT_NS,
)
