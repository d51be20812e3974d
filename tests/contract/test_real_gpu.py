"""The contract with a real GPU in the place of the fake driver's: in from device memory and out into it, and
read by everybody else. Skipped with the driver's reason where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.conftest import FLAGS
from tests.contract.test_ways import (
    test_a_replacement_is_seen_by_all,
    test_cleared_is_cleared_and_counted,
    test_every_dtype_and_shape_is_the_same_bit_for_bit,
    test_large_ones_too,
    test_what_is_missing_is_named,
)
from tests.e2e.running import Proxy
from tests.gpu.conftest import real_driver, why_no_gpu

__all__ = [
    "test_a_replacement_is_seen_by_all",
    "test_cleared_is_cleared_and_counted",
    "test_every_dtype_and_shape_is_the_same_bit_for_bit",
    "test_large_ones_too",
    "test_what_is_missing_is_named",
]


@pytest.fixture(scope="module")
def real_proxy() -> Iterator[Proxy]:
    if why := why_no_gpu():
        pytest.skip(f"no GPU here: {why}")
    with Proxy(*FLAGS, workers=2, environment={"AREAL_FAST_LIBCUDA": real_driver()}) as running:
        yield running


@pytest.fixture
def proxy(real_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setenv("AREAL_FAST_LIBCUDA", real_driver())
    return real_proxy
