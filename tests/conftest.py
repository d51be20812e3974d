"""What every test has: a seed that is printed and can be given, the arenas, children that never outlive it.

SEED=n in the environment (or --hypothesis-seed=n) repeats a run; HYPOTHESIS_PROFILE=thorough tries many more
examples.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.children import ArenaChild
from tests.model_arena import ModelArena

if TYPE_CHECKING:  # tests of the pure layers run without a built extension
    from areal_fast.core import Arena

_shared = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("everyday", max_examples=150, stateful_step_count=40, **_shared)
hypothesis.settings.register_profile("thorough", max_examples=2000, stateful_step_count=120, **_shared)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "everyday"))


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = os.environ.get("SEED") or str(random.SystemRandom().randrange(2**32))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that arm crash points make sense only where there are some: `make crash` builds them in.
    A property that fails is given the time to find its smallest example."""
    for item in items:
        if "property" in item.path.parts and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
    marked = [item for item in items if item.get_closest_marker("crashpoints")]
    if marked:
        from areal_fast.core import _core

        if not _core.CRASH_POINTS:
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if item not in marked]


def pytest_sessionstart(session: pytest.Session) -> None:
    """The seed stands in every log, also under -q and where a watchdog ends the run. And SIGINT is what it is
    in a terminal also where the run was started in the background, with SIGINT ignored (children inherit it).
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    writer = session.config.get_terminal_writer()
    writer.line(f"seed: {session.config.option.hypothesis_seed} (SEED=… repeats it)")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed, for tests that draw numbers themselves."""
    return int(request.config.option.hypothesis_seed)


@pytest.fixture(params=["core", "model"])
def arena(request: pytest.FixtureRequest) -> Iterator[Arena | ModelArena]:
    """A small arena of process 0, once the real one and once the model: what holds for one holds for both."""
    if request.param == "core":
        yield request.getfixturevalue("core")
    else:
        with ModelArena.create(8 << 20, proc=0) as made:
            yield made


@pytest.fixture
def core() -> Iterator[Arena]:
    """A small real arena of process 0, which at the end is swept; the arena must be consistent then."""
    from areal_fast.core import Arena

    with Arena.create(8 << 20) as watcher:
        with Arena.attach(watcher.fileno(), 0) as made:
            yield made
        watcher.sweep(0)
        assert watcher.consistency() == ""


@pytest.fixture
def child() -> Iterator[Callable[..., ArenaChild]]:
    """child(arena, proc): another process, the arena attached as that process number; killed at the end."""
    made: list[ArenaChild] = []

    def start(arena: Arena, proc: int) -> ArenaChild:
        made.append(ArenaChild(arena.fileno(), proc))
        return made[-1]

    yield start
    for one in made:
        one.kill()
