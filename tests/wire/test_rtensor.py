"""AReaL 1.0.4's own RTensor module over our backend, in its own environment, against our proxy and its own
nodes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import Proxy

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from areal_env import ArealUnavailable, areal_python  # noqa: E402

pytestmark = [pytest.mark.areal, pytest.mark.timeout(600)]
SCRIPT = HERE / "areal_rtensor.py"
# Ray would otherwise write a key into the home of whoever runs the tests, and ask the network who it is
ENVIRONMENT = {
    "PYTHONPATH": str(HERE.parents[1]),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def areal() -> Path:
    try:
        return areal_python()
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as running:
        yield running


def scenario(areal: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [areal, SCRIPT, *arguments],
        capture_output=True, text=True, timeout=500, check=False, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@contextlib.contextmanager
def their_node(areal: Path) -> Iterator[str]:
    """A process that keeps shards as AReaL's workers do: its address."""
    process = subprocess.Popen(
        [areal, SCRIPT, "node"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{json.loads(process.stdout.readline())['port']}"
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def test_both_backends_give_what_was_stored(areal: Path, proxy: Proxy) -> None:
    with their_node(areal) as node:
        report = scenario(areal, "exact", f"127.0.0.1:{proxy.port}", node)
    assert report["proxy"] == report["node"] == []
    assert report["proxy gone"] is report["node gone"] is True
    assert report["node ways"] == {"json": 12, **report["proxy ways"]}, "AReaL's own nodes speak JSON"


def test_memory_does_not_grow_with_lives(areal: Path, proxy: Proxy) -> None:
    report = scenario(areal, "cycles", f"127.0.0.1:{proxy.port}")
    assert report["wrong"] == 0
    assert report["buffered_bytes"] <= 1 << 20
    grown = report["late"] - report["early"]
    assert grown < 32 << 20, f"{grown >> 20} MiB in 800 lives of a shard of 256 KiB"
    assert report["buffered before clearing"] > 0 == report["buffered at the end"]
    assert proxy.ask("DELETE", "/data/clear", {"shard_ids": []}).json["num_tensors"] == 0


def test_ray_keeps_what_is_rays(areal: Path, proxy: Proxy) -> None:
    report = scenario(areal, "ray", f"127.0.0.1:{proxy.port}")
    assert report["own"] == "str"
    assert report["kinds"] == ["ObjectRef", "ObjectRef", "str", "str"]
    assert report["values"] == [[0, 1, 2, 3], [1.0, 1.0], [9], [5.0, 5.0]]
    assert report["left"] == 0
    assert proxy.ask("DELETE", "/data/clear", {"shard_ids": []}).json["num_tensors"] == 0


def test_shards_of_another_node_come_through_ray(areal: Path) -> None:
    report = scenario(areal, "ray_nodes")
    assert report["equal"] == [True, True, True]
    assert report["by http"] == {}
    assert report["left in ray"] == 0, "the backend's delete told the actor"
    assert report["gone"] is True
    assert report["stopped"] == 0
