"""--deterministic-sampling: seeds of nothing but the session's identity and the request's index."""

from __future__ import annotations

import pytest

from areal_fast.engine.sampling import stable_seed
from tests.unit.service.conftest import ADMIN, Service


@pytest.fixture
def seeded(service: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(service.chats, "deterministic", True)
    monkeypatch.setattr(service.store, "note_members", True)
    return service


def seeds(service: Service) -> list[int | None]:
    found = [sampling.seed for _, sampling in service.engine.asked]
    service.engine.asked.clear()
    return found


def test_the_seed_is_of_task_and_place(seeded: Service) -> None:
    for _ in range(2):  # the second session is "my-task-1", and the same episode again
        _, key = seeded.start("my-task")
        for stream in (False, True):
            assert seeded.chat(key, stream=stream).status == 200
        assert seeds(seeded) == [stable_seed("my-task", 0), stable_seed("my-task", 1)]


def test_members_of_a_group_differ(seeded: Service) -> None:
    body = {"task_id": "t", "group_size": 3}
    started = seeded.ask("POST", "/rl/start_session", body, key=ADMIN).json
    for member in started["sessions"]:
        seeded.chat(member["session_api_key"])
    assert seeds(seeded) == [stable_seed(f"t:{i}", 0) for i in range(3)]


def test_a_seed_of_the_request_wins_and_still_counts(seeded: Service) -> None:
    _, key = seeded.start("t")
    for fields in ({"seed": 7}, {"seed": 0}, {"seed": None}):
        seeded.chat(key, **fields)
    assert seeds(seeded) == [7, 0, stable_seed("t", 2)]


def test_what_has_no_session_has_no_seed(seeded: Service) -> None:
    _, key = seeded.start("t")
    seeded.chat(None)
    seeded.chat(key, store=False)
    assert seeds(seeded) == [None, None]
    seeded.chat(ADMIN)
    assert seeds(seeded) == [stable_seed("__hitl__", 0)]


def test_off_by_default(service: Service) -> None:
    _, key = service.start("t")
    service.chat(key)
    assert seeds(service) == [None]


def test_seeds_never_change() -> None:
    """Runs that are to be compared may lie years apart."""
    assert [stable_seed("t", 0), stable_seed("t:1", 0), stable_seed("é", 1)] == [
        935616571,
        1450137571,
        815497069,
    ]
    assert all(0 <= stable_seed("x", i) < 2**31 for i in range(1000))
