"""AReaL 1.0.4 as released in front of this proxy: its gateway, router, workflow, openai agents and RTensor
client.

The same rollouts run twice, before areal_fast and before AReaL's own data proxy, on the same deterministic
engine: every tensor that reaches the trainer must be equal in dtype, shape and value. AReaL runs in
processes of `.venv-areal` (tests/wire/areal_env.py builds it once); where that cannot be built the test is
skipped and says why.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WIRE = Path(__file__).resolve().parents[1] / "wire"
sys.path[:0] = [str(WIRE), str(WIRE.parent)]

import qwen_folder  # noqa: E402
from areal_env import ArealUnavailable, areal_python  # noqa: E402
from proxy import Server, free_port, original, ours  # noqa: E402
from standin import StandIn  # noqa: E402

pytestmark = [pytest.mark.areal, pytest.mark.timeout(600)]
SERVICE = "areal.experimental.inference_service"
ROLLOUT_TIMEOUT_S = 180
TURNS, GROUP = 3, 3


@pytest.fixture(scope="module")
def areal() -> Path:
    try:
        return areal_python()
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder.build(tmp_path_factory.getbasetemp() / "qwen")


@contextlib.contextmanager
def fronted(areal: Path, proxy: Server) -> Iterator[tuple[str, str]]:
    """AReaL's router and gateway before `proxy`: (gateway URL, router URL)."""
    router_port, gateway_port = free_port(), free_port()
    base: list[str | Path] = [areal, "-W", "ignore", "-m"]
    listen = ["--host", "127.0.0.1", "--port"]
    router = Server([*base, f"{SERVICE}.router", *listen, str(router_port)], router_port)
    try:
        gateway = Server(
            [*base, f"{SERVICE}.gateway", *listen, str(gateway_port), "--router-addr", router.url],
            gateway_port,
        )
        try:
            yield gateway.url, router.url
        finally:
            gateway.stop()
    finally:
        router.stop()


def rolled_out(areal: Path, proxy: Server) -> dict[str, Any]:
    with fronted(areal, proxy) as (gateway, router):
        done = subprocess.run(
            [areal, WIRE / "areal_rollout.py", gateway, router, proxy.url],
            capture_output=True, text=True, timeout=ROLLOUT_TIMEOUT_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + proxy.output()
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def reports(areal: Path, tokenizer: Path) -> dict[str, dict[str, Any]]:
    """What the rollouts gave, by whose proxy was behind them."""
    with StandIn() as engine:
        with original(areal, engine.url, tokenizer) as proxy:
            theirs = rolled_out(areal, proxy)
        with ours(engine.url, tokenizer) as proxy:
            mine = rolled_out(areal, proxy)
    return {"original": theirs, "ours": mine}


@pytest.mark.parametrize("episode", ["single", "group", "after_update"])
def test_the_trainer_gets_the_same_tensors(reports: dict[str, dict[str, Any]], episode: str) -> None:
    theirs, mine = reports["original"][episode], reports["ours"][episode]
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert mine[name] == theirs[name], f"{episode}: {name} differs"


def test_a_group_is_one_batch_of_all_turns(reports: dict[str, dict[str, Any]]) -> None:
    batch = reports["ours"]["group"]
    assert batch["input_ids"]["shape"][0] == GROUP * TURNS
    last_rewards = batch["rewards"]["values"][TURNS - 1 :: TURNS]
    assert last_rewards == [0.25, 0.5, 0.75]


def test_a_weight_update_reaches_the_versions(reports: dict[str, dict[str, Any]]) -> None:
    mine = reports["ours"]
    assert mine["version"] == {"version": 5}
    batch = mine["after_update"]
    outputs = [
        version
        for version, is_output in zip(batch["versions"]["values"], batch["loss_mask"]["values"], strict=True)
        if is_output
    ]
    assert outputs and set(outputs) == {5}


def test_nothing_is_left_behind(reports: dict[str, dict[str, Any]]) -> None:
    mine = reports["ours"]
    assert mine["single_left_after_clear"] == mine["group_left_after_clear"] == 0
    assert mine["sessions_left"] == reports["original"]["sessions_left"] == 0
    assert [mine[verb] for verb in ("pause_generation", "set_version", "continue_generation")] == [[200]] * 3
