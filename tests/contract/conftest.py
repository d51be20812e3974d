"""One proxy for all; every test runs once a way, or once a pair of ways (in, out). Its GPU is the fake
driver's; test_real_gpu.py puts a real one in its place."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests import fakecuda
from tests.contract.ways import WAYS, Way
from tests.e2e.running import Proxy

FLAGS = ("--arena-max-bytes", "256M", "--gpu-pool-bytes", "256M")


@pytest.fixture(scope="package")
def fake_proxy() -> Iterator[Proxy]:
    with Proxy(*FLAGS, workers=2, environment={"AREAL_FAST_LIBCUDA": fakecuda.library()}) as running:
        yield running


@pytest.fixture
def proxy(fake_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setenv("AREAL_FAST_LIBCUDA", fakecuda.library())
    return fake_proxy


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
