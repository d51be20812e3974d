from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.unit.http.serving import LOOPS, run_on


@pytest.fixture(params=sorted(LOOPS))
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine to its end, on asyncio's loop and on uvloop, under a watchdog."""
    return lambda work: run_on(LOOPS[request.param], work)
