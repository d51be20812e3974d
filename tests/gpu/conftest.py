"""The GPU suite's drivers: each test runs on the fake one, and on the real one where there is a GPU.

The real driver is libcuda.so.1, or AREAL_FAST_LIBCUDA. Without it, or without a device, its half is skipped
with the driver's own reason. The fake lets tests look at device memory through its pointers; `Board` does
that by copies instead, so that the same test runs on both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_fast.core._cuda import CudaError, Driver
from tests import fakecuda


def real_driver() -> str:
    return os.environ.get("AREAL_FAST_LIBCUDA", fakecuda.REAL)


def why_no_gpu() -> str:
    """Why the real driver cannot be used here, or ""."""
    try:
        return "" if Driver(real_driver()).count else "the driver finds no device"
    except CudaError as error:
        return str(error)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fakecuda.State:
    """The fake driver's counters. Ask for it before anything loads the fake."""
    made = fakecuda.State(tmp_path / "fakecuda")
    monkeypatch.setenv("FAKECUDA_STATE", str(made.path))
    return made


@pytest.fixture(params=["fake", "real"])
def driver_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Path of a driver to load."""
    if request.param == "fake":
        yield fakecuda.library()
        return
    if why := why_no_gpu():
        pytest.skip(f"no GPU here: {why}")
    yield real_driver()
