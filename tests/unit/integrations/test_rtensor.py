"""The bounded buffer, and the backend's rules that need no AReaL (the rest: tests/wire/test_rtensor.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from areal_fast.integrations.rtensor import FetchBuffer  # noqa: E402


def test_the_least_recently_used_go_first() -> None:
    buffer = FetchBuffer(max_bytes=8)
    for name in "ab":
        buffer[name] = torch.zeros(1)
    assert buffer.get("a") is not None  # used: now "b" is the oldest
    buffer["c"] = torch.zeros(1)
    assert (len(buffer), buffer.nbytes, buffer.get("b")) == (2, 8, None)
    assert buffer.get("a") is not None and buffer.get("c") is not None


def test_what_is_too_large_is_not_kept_and_replaces_nothing() -> None:
    buffer = FetchBuffer(max_bytes=8)
    buffer["a"] = torch.zeros(1)
    buffer["large"] = torch.zeros(3)
    assert (len(buffer), buffer.get("large")) == (1, None)
    FetchBuffer(0)["a"] = torch.zeros(1)


def test_bytes_are_counted_once() -> None:
    buffer = FetchBuffer(max_bytes=100)
    buffer["a"] = torch.zeros(2)
    buffer["a"] = torch.zeros(1)
    assert buffer.nbytes == 4
    assert buffer.pop("a", None) is not None and buffer.pop("a", None) is None
    assert (buffer.nbytes, len(buffer)) == (0, 0)
    buffer["b"] = torch.zeros(1)
    buffer.clear()
    assert (buffer.nbytes, len(buffer)) == (0, 0)


def test_importing_it_imports_neither_areal_nor_ray_nor_torch() -> None:
    program = (
        "import sys, areal_fast.integrations.rtensor\nprint({'areal', 'ray', 'torch'} & sys.modules.keys())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200
    )
    assert run.stdout.strip() == "set()"
