"""One proxy for all; every test runs once a way, or once a pair of ways (in, out)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.contract.ways import WAYS, Way
from tests.e2e.running import Proxy


@pytest.fixture(scope="package")
def proxy() -> Iterator[Proxy]:
    with Proxy("--arena-max-bytes", "256M", workers=2) as running:
        yield running


@pytest.fixture(params=list(WAYS))
def way_in(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[Way]:
    way = WAYS[request.param](proxy)
    yield way
    way.close()


@pytest.fixture(params=list(WAYS))
def way_out(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[Way]:
    way = WAYS[request.param](proxy)
    yield way
    way.close()


@pytest.fixture
def fresh() -> str:
    """An id that nobody has."""
    return str(uuid.uuid4())
