"""The example in the package's docstring runs as printed, on a private arena."""

import doctest

import pytest

import areal_fast.store


def test_the_example_runs() -> None:
    pytest.importorskip("areal_fast.core._core")
    result = doctest.testmod(areal_fast.store)
    assert result.attempted > 5
    assert result.failed == 0
