"""A store over each of the two arenas."""

from typing import Any

import pytest

from areal_fast.store import SessionStore
from tests.unit.store.turns import Clock


@pytest.fixture
def store(arena: Any) -> SessionStore:
    return SessionStore(arena, serving_addr="127.0.0.1:8082")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def delayed(arena: Any, clock: Clock) -> SessionStore:
    """A store whose rewards become final 2 s after the last one, on a clock of the test's own."""
    return SessionStore(arena, finish_timeout_s=2.0, clock=clock)
