"""GET /admin/sessions: the live sessions, a page at a time, for people.

`?limit=100&cursor=…` → `{"sessions": [{id, state, age_s, idle_s, requests, interactions, bytes, ready,
in_use}…], "cursor": next or null}`. Admin key. A page costs a bounded time: it ends at `limit` rows, or when
PAGE_S is spent; the cursor says where to go on. Between the pages anything may happen: a session that lives
through all of them is listed exactly once, others once or not at all.

state: active, or detached (stale, and being dumped; clients do not see it any more; only its id, age and
size are told, because the cleaner owns it). idle_s: since the last access; looking here is none. requests:
chats begun; interactions: recorded and not yet exported; ready: trajectories that wait for their export.

A slot is read under a pin, so that it cannot become another session meanwhile; its fold comes from the log
and is not kept, or a look at everything would drive the sessions in use out of the worker's cache.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

from areal_fast.core import PROC_CLEANER, STATE_DETACHED, Trimmed
from areal_fast.protocol.sessions import SessionState
from areal_fast.service.answers import refuse, respond_json

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.service.auth import Keys
    from areal_fast.store import SessionStore

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000
PAGE_S: Final = 0.02
"""A worker serves others, too: no page takes its loop for longer."""
BATCH: Final = 64
MAX_DETACHED: Final = 100
"""Detached sessions told at most, on the first page."""


class Admin:
    """The handlers under /admin."""

    def __init__(self, store: SessionStore, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    def sessions(self, exchange: Exchange) -> None:
        self._keys.require_admin(exchange.headers.get(b"authorization"))
        query = parse_qs(exchange.query, keep_blank_values=True)
        limit = _integer(query, "limit", DEFAULT_LIMIT)
        cursor = _integer(query, "cursor", 0)
        if limit is None or not 1 <= limit <= MAX_LIMIT:
            refuse(exchange, 400, f"'limit' must be an integer from 1 to {MAX_LIMIT}")
            return
        if cursor is None or not 0 <= cursor < self._store.arena.session_slots:
            refuse(exchange, 400, "'cursor' must be one that a page ended with")
            return
        rows, following = self._page(cursor, limit)
        respond_json(exchange, {"sessions": rows, "cursor": following or None})

    def _page(self, cursor: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Rows, and the slot where the next page begins (0: there is none)."""
        until = time.monotonic() + PAGE_S
        rows = self._detached(limit) if cursor == 0 else []
        arena = self._store.arena
        while len(rows) < limit:
            slots, following = arena.sessions(cursor, min(BATCH, limit - len(rows)))
            for slot in slots:
                row = self._row(slot)
                if row is not None:
                    rows.append(row)
                if time.monotonic() >= until and slot + 1 < arena.session_slots:
                    return rows, slot + 1
            if following == 0:
                return rows, 0
            cursor = following
        return rows, cursor

    def _row(self, slot: int) -> dict[str, Any] | None:
        arena = self._store.arena
        pins = arena.slot_info(slot).pins
        if not arena.pin_slot(slot):
            return None
        try:
            info = arena.slot_info(slot)
            state = SessionState()
            state.head, _, records = arena.read(slot)
            state.apply(records)
            head = state.head
            if state.pending:
                try:
                    state.resolve(lambda offset: arena.record_outcome(slot, head, offset))
                except Trimmed:
                    pass  # cut between the two: the counts are of a moment ago
        finally:
            arena.unpin(slot)
        return {
            **_common(info.id, "active", info.created_ns, info.touched_ns, info.nbytes, self._store.now_ns()),
            "requests": info.ordinal,
            "interactions": state.interaction_count(),
            "ready": state.ready_count,
            "in_use": bool(pins),
        }

    def _detached(self, limit: int) -> list[dict[str, Any]]:
        arena, now_ns = self._store.arena, self._store.now_ns()
        rows = []
        for slot in arena.owned_slots(STATE_DETACHED, PROC_CLEANER)[: min(limit, MAX_DETACHED)]:
            info = arena.slot_info(slot)
            if info.state == STATE_DETACHED:
                rows.append(
                    _common(info.id, "detached", info.created_ns, info.touched_ns, info.nbytes, now_ns)
                )
        return rows


def _common(
    session_id: bytes, state: str, created_ns: int, touched_ns: int, nbytes: int, now_ns: int
) -> dict[str, Any]:
    return {
        "id": session_id.decode("utf-8", "replace"),
        "state": state,
        "age_s": round(max(0, now_ns - created_ns) / 1e9, 3),
        "idle_s": round(max(0, now_ns - touched_ns) / 1e9, 3),
        "bytes": nbytes,
    }


def _integer(query: dict[str, list[str]], name: str, default: int) -> int | None:
    """The query's number, the default if it is not there, None if it is none."""
    text = query.get(name, [str(default)])[-1]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
