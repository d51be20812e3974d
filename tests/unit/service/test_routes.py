"""Paths, methods, the order of the checks, and the texts and forms of the answers."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import pytest

from areal_fast.core import ArenaFull, IndexBusy
from areal_fast.engine.errors import EngineError
from areal_fast.service import auth, health
from tests.unit.service.conftest import ADMIN, Service
from tests.unit.service.fakes import FakeExchange, run

MISSING = "Missing or malformed Authorization header. Expected 'Bearer <token>'."
ADMIN_ONLY = [("/rl/start_session", {"task_id": "t"}), ("/export_trajectories", {"session_id": "t-0"})]
TENSOR = {
    "type": "tensor",
    "data": base64.b64encode(struct.pack("<2f", 1.0, -2.0)).decode(),
    "shape": [2],
    "dtype": "torch.float32",
}


# -- paths and methods -------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/", "/nothing", "/health/", "/data", "/data/", "/data/a/b", "/rl"])
def test_an_unknown_path_is_404(service: Service, path: str) -> None:
    answer = service.ask("GET", path)
    assert (answer.status, answer.json) == (404, {"detail": "Not Found"})


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/health", b"GET, HEAD"),
        ("GET", "/rl/start_session", b"POST"),
        ("DELETE", "/chat/completions", b"POST"),
        ("GET", "/pause_generation", b"POST"),
        ("POST", "/data/x", b"GET, HEAD, OPTIONS, PUT"),
        ("DELETE", "/data/batch", b"GET, HEAD, OPTIONS, POST, PUT"),
        ("POST", "/data/clear", b"DELETE, GET, HEAD, OPTIONS, PUT"),
    ],
)
def test_a_wrong_method_is_405_with_allow(service: Service, method: str, path: str, allow: bytes) -> None:
    answer = service.ask(method, path)
    assert answer.status == 405
    assert answer.answer_headers[b"allow"] == allow
    assert answer.json == {"detail": "Method Not Allowed"}


def test_configure_says_ok_to_anything(service: Service) -> None:
    assert service.ask("POST", "/configure", b"{bad").json == {"status": "ok"}


# -- authorization -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("path", "body"), ADMIN_ONLY)
def test_no_key_is_401_a_wrong_one_403(service: Service, path: str, body: Any) -> None:
    assert (a := service.ask("POST", path, body)).status == 401 and a.json == {"detail": MISSING}
    for key in ("nope", "", ADMIN + "x", "é"):
        answer = service.ask("POST", path, body, key=key)
        assert (answer.status, answer.json) == (403, {"detail": "Invalid admin API key."})


@pytest.mark.parametrize(("path", "body"), ADMIN_ONLY)
def test_the_body_is_checked_before_the_key(service: Service, path: str, body: Any) -> None:
    assert service.ask("POST", path, {}, key="nope").status == 422
    assert service.ask("POST", path, b"{bad").status == 422
    answer = service.ask("POST", path, b'{"x": "\xff"}', key="nope")
    assert (answer.status, answer.json) == (400, {"detail": "There was an error parsing the body"})


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (b"Bearer k", b"k"),
        (b"bearer k", b"k"),
        (b"BEARER   k  ", b"k"),
        (b"Bearer ", b""),
        (b"Bearer", None),
        (b"Bearer\tk", None),
        (b"Basic k", None),
        (b"k", None),
        (b"", None),
        (None, None),
    ],
)
def test_reading_a_bearer_token(header: bytes | None, token: bytes | None) -> None:
    assert auth.bearer(header) == token


def test_a_key_is_the_same_in_utf8_and_latin1() -> None:
    assert auth.as_text("café".encode()) == auth.as_text("café".encode("latin-1")) == "café"


# -- sessions ----------------------------------------------------------------------------------------------
def test_start_session_answers_in_both_forms(service: Service) -> None:
    answer = service.ask("POST", "/rl/start_session", {"task_id": "ä/1", "group_size": 3}, key=ADMIN)
    assert answer.status == 201
    body = answer.json
    assert list(body) == ["session_id", "api_key", "group_id", "sessions"]
    assert [s["session_id"] for s in body["sessions"]] == ["ä/1-0", "ä/1-1", "ä/1-2"]
    assert body["session_id"] == "ä/1-0" and body["api_key"] == body["sessions"][0]["session_api_key"]
    assert body["group_id"].startswith("grp-") and len(body["group_id"]) == 40
    assert len({s["session_api_key"] for s in body["sessions"]}) == 3


def test_a_bound_key_is_409(service: Service) -> None:
    service.start("k", api_key="mine")
    answer = service.ask("POST", "/rl/start_session", {"task_id": "k", "api_key": "mine"}, key=ADMIN)
    assert (answer.status, answer.json["detail"]) == (409, "API key is already bound to active session k-0.")


def test_the_admin_key_cannot_be_a_sessions(service: Service) -> None:
    answer = service.ask("POST", "/rl/start_session", {"task_id": "k", "api_key": ADMIN}, key=ADMIN)
    assert answer.status == 400
    assert service.store.sessions_count() == 0


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 201),
        ("application/json; charset=utf-8", 201),
        ("application/vnd.x+json", 201),
        ("text/plain", 422),
        (None, 422),
    ],
)
def test_start_session_wants_json(service: Service, content_type: str | None, status: int) -> None:
    answer = service.ask("POST", "/rl/start_session", {"task_id": "t"}, key=ADMIN, content_type=content_type)
    assert answer.status == status


def test_a_busy_index_is_tried_again_on_the_loop(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    real, busy = service.store.start, [True] * 5

    def start(*args: Any) -> Any:
        if busy:
            busy.pop()
            raise IndexBusy
        return real(*args)

    monkeypatch.setattr(service.store, "start", start)
    assert service.start()[0] == "t-0"
    assert not busy and service.store.sessions_count() == 1


def test_a_full_arena_is_507(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: Any) -> Any:
        raise ArenaFull

    monkeypatch.setattr(service.store, "start", start)
    answer = service.ask("POST", "/rl/start_session", {"task_id": "t"}, key=ADMIN)
    assert answer.status == 507 and "memory is full" in answer.json["detail"]


# -- rewards -----------------------------------------------------------------------------------------------
def test_a_reward_makes_the_trajectory_ready(service: Service) -> None:
    session_id, key = service.start()
    assert service.chat(key).status == 200
    answer = service.ask("POST", "/rl/set_reward", {"reward": "0.5"}, key=key)
    assert (answer.status, answer.json) == (
        200,
        {
            "message": "success",
            "interaction_count": 1,
            "session_id": session_id,
            "trajectory_id": 0,
            "trajectory_ready": True,
            "ready_transition": True,
        },
    )
    assert service.ask("POST", "/rl/set_reward", {"reward": 1}, key=key).json["ready_transition"] is False


def test_rewards_refused(service: Service) -> None:
    _, key = service.start()
    assert service.ask("POST", "/rl/set_reward", {"reward": 1}).json["detail"] == MISSING
    unknown = service.ask("POST", "/rl/set_reward", {"reward": 1}, key="zz")
    assert (unknown.status, unknown.json["detail"]) == (401, "Invalid or expired session API key.")
    nothing = service.ask("POST", "/rl/set_reward", {"reward": 1}, key=key)
    assert (nothing.status, nothing.json["detail"]) == (400, "No interactions in session")
    service.chat(key)
    other = service.ask("POST", "/rl/set_reward", {"reward": 1, "interaction_id": "x"}, key=key)
    assert (other.status, other.json["detail"]) == (400, "Interaction x not found")
    assert service.ask("POST", "/rl/set_reward", b'{"reward": NaN}', key=key).status == 422


def test_the_admin_key_rewards_the_persistent_session(service: Service) -> None:
    assert service.chat(ADMIN).status == 200
    answer = service.ask("POST", "/rl/set_reward", {"reward": 1}, key=ADMIN)
    assert answer.json["session_id"] == "__hitl__"


# -- export ------------------------------------------------------------------------------------------------
def test_an_export_is_gone_only_if_it_arrived(service: Service) -> None:
    session_id, key = service.start()
    service.chat(key)
    service.ask("POST", "/rl/set_reward", {"reward": 1}, key=key)
    first = service.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)
    assert first.status == 200 and len(first.json["interactions"]) == 1
    first.sent(False)
    second = service.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)
    assert list(second.json["interactions"]) == list(first.json["interactions"])
    second.sent(True)
    third = service.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)
    assert (third.status, third.json["detail"]) == (409, f"'No ready trajectories for session {session_id}'")


def test_an_export_waits_for_one_that_is_on_its_way(service: Service) -> None:
    session_id, key = service.start()
    service.chat(key)
    service.ask("POST", "/rl/set_reward", {"reward": 1}, key=key)
    first = service.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)

    async def both() -> FakeExchange:
        second = FakeExchange("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)
        task = asyncio.ensure_future(service.routes(second))
        await asyncio.sleep(0.005)
        assert second.status == 0, "answered while the first was on its way"
        first.sent(False)
        await asyncio.wait_for(task, 10)
        return second

    second = asyncio.run(both())
    assert second.status == 200 and len(second.json["interactions"]) == 1


def test_exports_refused(service: Service) -> None:
    unknown = service.ask("POST", "/export_trajectories", {"session_id": "zzz"}, key=ADMIN)
    assert (unknown.status, unknown.json["detail"]) == (404, "Session zzz not found")
    assert service.ask("POST", "/export_trajectories", {"session_ids": []}, key=ADMIN).status == 400
    assert service.ask("POST", "/export_trajectories", {"session_ids": ["zzz"]}, key=ADMIN).json == {
        "traj": {}
    }


# -- shards ------------------------------------------------------------------------------------------------
def test_shards_come_back_as_they_were_put(service: Service) -> None:
    put = service.ask("PUT", "/data/ä b", TENSOR, content_type=None)
    assert (put.status, put.json) == (200, {"shard_id": "ä b", "status": "ok"})
    got = service.ask("GET", "/data/ä b")
    assert (got.status, got.json) == (200, TENSOR)
    assert got.answer_headers[b"content-type"] == b"application/octet-stream"
    batch = service.ask("POST", "/data/batch", {"shard_ids": ["ä b", "ä b"]})
    assert batch.json == [TENSOR, TENSOR]
    cleared = service.ask("DELETE", "/data/clear", {"shard_ids": ["ä b", "no", 5]})
    assert cleared.json == {"status": "ok", "cleared_count": 1, "num_tensors": 0, "total_bytes": 0}


def test_large_shards_are_sent_as_they_are_encoded(service: Service) -> None:
    raw = bytes(range(256)) * 8192
    large = {
        "type": "tensor",
        "data": base64.b64encode(raw).decode(),
        "shape": [1 << 21],
        "dtype": "torch.uint8",
    }
    assert service.ask("PUT", "/data/x", large).status == 200
    for got, want in (
        (service.ask("GET", "/data/x"), large),
        (service.ask("POST", "/data/batch", {"shard_ids": ["x"] * 3}), [large] * 3),
    ):
        assert (got.status, got.ended, got.json) == (200, True, want)
        assert got.size == len(got.answer)
        assert got.answer_headers[b"content-type"] == b"application/octet-stream"


def test_shards_refused(service: Service) -> None:
    missing = service.ask("GET", "/data/nope")
    assert (missing.status, missing.json) == (404, {"status": "error", "message": "Shard nope not found"})
    assert service.ask("GET", "/data/\0x").status == 404
    bad = service.ask("PUT", "/data/x", ["no tensor"])
    assert bad.status == 400 and bad.json["status"] == "error"
    some = service.ask("POST", "/data/batch", {"shard_ids": ["a", "b"]})
    assert (some.status, some.json["missing_shard_ids"]) == (400, ["a", "b"])


@pytest.mark.parametrize("body", [b"{bad", [], "x", 5, None, {}, {"shard_ids": "a"}, {"shard_ids": None}])
def test_a_body_that_is_no_list_of_shards(service: Service, body: Any) -> None:
    batch = service.ask("POST", "/data/batch", body)
    assert (batch.status, batch.json["message"]) == (
        400,
        "Expected JSON body with string list field 'shard_ids'",
    )
    clear = service.ask("DELETE", "/data/clear", body)
    assert (clear.status, clear.json["message"]) == (400, "'shard_ids' must be a list")


def test_batches_want_strings_and_a_json_content_type(service: Service) -> None:
    assert service.ask("POST", "/data/batch", {"shard_ids": [1]}).status == 400
    assert service.ask("POST", "/data/batch", {"shard_ids": []}, content_type=None).status == 400
    assert service.ask("POST", "/data/batch", {"shard_ids": []}).json == []


# -- control -----------------------------------------------------------------------------------------------
def test_pause_and_continue(service: Service) -> None:
    assert service.ask("POST", "/pause_generation").json == {"status": "ok", "paused": True}
    assert service.state.paused() and service.engine.paused
    assert service.ask("GET", "/health").json["paused"] is True
    assert service.ask("POST", "/continue_generation").json == {"status": "ok", "paused": False}
    assert not service.state.paused() and not service.engine.paused


@pytest.mark.parametrize("before", [False, True])
def test_a_failed_pause_or_continue_leaves_the_flag_as_before(service: Service, before: bool) -> None:
    service.state.mark(before)
    service.engine.error = EngineError("unwell")
    for path in ("/pause_generation", "/continue_generation"):
        answer = service.ask("POST", path)
        assert (answer.status, answer.json) == (502, {"detail": "unwell"})
        assert service.state.paused() is before


@pytest.mark.parametrize(
    "path",
    ["/pause_generation", "/continue_generation", "/release_memory_occupation", "/resume_memory_occupation"],
)
def test_without_an_engine_control_is_503(service: Service, path: str) -> None:
    service.engines.current = None
    answer = service.ask("POST", path)
    assert (answer.status, answer.json["detail"]) == (
        503,
        "No inference backend configured (external model mode).",
    )


@pytest.mark.parametrize("version", [0, 7, -1, 2**63 - 1, -(2**63)])
def test_versions(service: Service, version: int) -> None:
    assert service.ask("POST", "/set_version", {"version": version}).json == {
        "status": "ok",
        "version": version,
    }
    assert service.ask("GET", "/get_version").json == {"version": version}


@pytest.mark.parametrize(
    "body", [{}, [], b"", b"{bad", {"version": None}, {"version": "1"}, {"version": True}, {"version": 2**63}]
)
def test_what_is_no_version(service: Service, body: Any) -> None:
    answer = service.ask("POST", "/set_version", body)
    assert (answer.status, answer.json) == (400, {"detail": "'version' (int) is required"})


def test_configure_backend_is_the_supervisors_change(service: Service) -> None:
    answer = service.ask("POST", "/configure_backend", {"backend_addr": "http://h:1/"}, key=ADMIN)
    assert answer.json == {"status": "ok", "backend_addr": "http://h:1/"}
    assert service.changes == [{"backend_addr": "http://h:1"}]
    service.shared.confirmed = False
    assert service.ask("POST", "/configure_backend", {"backend_addr": "http://h:2"}, key=ADMIN).status == 503


@pytest.mark.parametrize(
    "body", [{}, [], b"{", {"backend_addr": ""}, {"backend_addr": 5}, {"backend_addr": "h:1"}]
)
def test_what_is_no_backend(service: Service, body: Any) -> None:
    assert service.ask("POST", "/configure_backend", body, key=ADMIN).status == 400
    assert service.changes == []


def test_configure_backend_asks_for_the_admin_key(service: Service) -> None:
    body = {"backend_addr": "http://h:1"}
    assert service.ask("POST", "/configure_backend", body).status == 401
    assert service.ask("POST", "/configure_backend", body, key="no").status == 403


def test_a_model_of_the_engine_is_registered_by_doing_nothing(service: Service) -> None:
    body = {"name": "m", "url": "", "model": "m", "api_key": None}
    for key in (None, ADMIN):
        assert service.ask("POST", "/register_model", body, key=key).json == {"status": "ok", "name": "m"}
    assert service.ask("POST", "/register_model", body, key="no").status == 403
    assert service.ask("POST", "/register_model", {"url": ""}).json == {"detail": "model name is required"}
    assert service.ask("POST", "/register_model", b"[]").status == 400
    assert service.changes == []


def test_registering_from_afar_needs_the_admin_key(service: Service) -> None:
    exchange = FakeExchange("POST", "/register_model", {"name": "m"})
    exchange.peer = ("10.0.0.9", 1)
    run(service.routes(exchange))  # type: ignore[arg-type]
    assert exchange.status == 401


# -- health and faults -------------------------------------------------------------------------------------
def test_a_count_of_many_sessions_stands_for_a_while(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0]
    counts = iter([health.MANY_SESSIONS - 1, health.MANY_SESSIONS, 100_000, 3, 4])
    monkeypatch.setattr(health.time, "monotonic_ns", lambda: clock[0])
    monkeypatch.setattr(service.store, "sessions_count", lambda: next(counts))

    def sessions(after_ns: int) -> int:
        clock[0] += after_ns
        found: int = service.ask("GET", "/health").json["sessions"]
        return found

    many = health.MANY_SESSIONS
    assert [sessions(0), sessions(0)] == [many - 1, many], "few are counted each time"
    stands = health.COUNT_STANDS_NS * many
    assert [sessions(stands - 1), sessions(1)] == [many, 100_000]
    stands = health.COUNT_STANDS_NS * 100_000
    assert [sessions(stands - 1), sessions(1), sessions(stands)] == [100_000, 3, 4], (
        "slots have become no fewer"
    )


def test_health_begins_with_the_recorded_fields(service: Service) -> None:
    service.start()
    service.ask("POST", "/set_version", {"version": 4})
    service.health.board = {"workers": [{"pid": 1}], "cleanup": {"failing": 2}}
    service.health.expire()
    body = service.ask("GET", "/health").json
    assert list(body)[:5] == ["status", "backend", "sessions", "paused", "version"]
    assert list(body.values())[:5] == ["ok", "http://engine", 1, False, 4]
    assert body["workers"] == [{"pid": 1}] and body["cleanup"] == {"failing": 2}
    assert body["arena"]["sessions_active"] == 1


def test_a_fault_of_ours_is_500_and_no_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(service.store, "start", start)
    answer = service.ask("POST", "/rl/start_session", {"task_id": "t"}, key=ADMIN)
    assert (answer.status, answer.json) == (500, {"detail": "Internal error"})


def test_data_auth_asks_for_the_admin_key(service: Service) -> None:
    service.routes._data_auth = True
    assert service.ask("GET", "/data/x").status == 401
    assert service.ask("GET", "/data/x", key="no").status == 403
    assert service.ask("GET", "/data/x", key=ADMIN).status == 404
    exchange = FakeExchange("GET", "/health")
    run(service.routes(exchange))  # type: ignore[arg-type]
    assert exchange.status == 200
