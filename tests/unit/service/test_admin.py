"""GET /admin/sessions: paging, keys, what a row says, and that looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from areal_fast.core import PROC_CLEANER
from areal_fast.service import admin as module
from areal_fast.service.admin import Admin
from areal_fast.service.auth import Forbidden, Keys, Unauthorized
from areal_fast.store import SessionStore
from tests.model_arena import ModelArena
from tests.unit.service.conftest import ADMIN, Service
from tests.unit.service.fakes import FakeExchange


def page(service: Service, query: str = "", key: str | None = ADMIN) -> Any:
    exchange = FakeExchange("GET", "/admin/sessions", key=key)
    exchange.query = query
    Admin(service.store, Keys(ADMIN)).sessions(exchange)  # type: ignore[arg-type]
    return exchange.json | {"status": exchange.status}


def test_a_row_says_what_a_session_holds(service: Service) -> None:
    session_id, key = service.start("maze")
    service.chat(key)
    service.ask("POST", "/rl/set_reward", {"reward": 1}, key=key)
    service.chat(key)
    service.chat(key)
    (row,) = page(service)["sessions"]
    assert row.pop("bytes") > 0 and 0 <= row.pop("idle_s") <= row.pop("age_s") < 3600
    assert row == {
        "id": session_id,
        "state": "active",
        "requests": 3,
        "interactions": 3,
        "ready": 1,
        "in_use": False,
    }
    with service.store.by_key(key):
        assert page(service)["sessions"][0]["in_use"]


def test_what_was_exported_is_not_counted(service: Service) -> None:
    session_id, key = service.start("maze")
    service.chat(key)
    service.ask("POST", "/rl/set_reward", {"reward": 1}, key=key)
    body = {"session_ids": [session_id], "remove_session": False}
    export = service.ask("POST", "/export_trajectories", body, key=ADMIN)
    export.sent(True)
    (row,) = page(service)["sessions"]
    assert (row["requests"], row["interactions"], row["ready"]) == (1, 0, 0)


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_pages_hold_every_session_once(service: Service, limit: int) -> None:
    started = {service.start("t")[0] for _ in range(7)}
    found: list[str] = []
    cursor = 0
    while cursor is not None:
        answer = page(service, f"limit={limit}&cursor={cursor}")
        assert len(answer["sessions"]) <= limit
        found += [row["id"] for row in answer["sessions"]]
        cursor = answer["cursor"]
    assert len(found) == len(set(found)) == 7 and set(found) == started


def test_a_page_ends_when_its_time_is_spent(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        service.start("t")
    monkeypatch.setattr(module, "PAGE_S", -1.0)
    first = page(service)
    assert len(first["sessions"]) == 1
    monkeypatch.undo()
    assert len(page(service, f"cursor={first['cursor']}")["sessions"]) == 4


def test_detached_sessions_are_told_on_the_first_page() -> None:
    cleaner = ModelArena.create(64 << 20, proc=PROC_CLEANER)
    cleaner.proc_enter(1)
    store = SessionStore(cleaner)
    for _ in range(2):
        store.start("t")
    slot = next(iter(cleaner.sessions(0, 1)[0]))
    cleaner.detach(slot, 1 << 62)
    rows, _ = Admin(store, Keys(ADMIN))._page(0, 100)
    assert [(row["id"], row["state"]) for row in rows] == [("t-0", "detached"), ("t-1", "active")]
    assert "requests" not in rows[0]


def test_looking_is_no_access_and_leaves_no_pin(service: Service) -> None:
    service.start("t")
    arena = service.store.arena
    slot = arena.sessions(0, 1)[0][0]
    before = arena.slot_info(slot)
    held = service.store.folds.fold_count, service.store.folds.fold_bytes
    page(service)
    after = arena.slot_info(slot)
    assert (after.touched_ns, after.pins, after.head) == (before.touched_ns, 0, before.head)
    assert (service.store.folds.fold_count, service.store.folds.fold_bytes) == held


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=-1",
        "limit=",
        "cursor=-1",
        "cursor=x",
        "cursor=999999999",
        "limit=٣",
    ],
)
def test_a_bad_query_is_400(service: Service, query: str) -> None:
    answer = page(service, query)
    assert answer["status"] == 400 and query.split("=")[0] in answer["detail"]


def test_only_for_the_admin(service: Service) -> None:
    with pytest.raises(Unauthorized):
        page(service, key=None)
    with pytest.raises(Forbidden):
        page(service, key=service.start("t")[1])
