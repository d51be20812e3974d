"""areal_fast under AReaL 1.0.4 as released: its controller launches it, its agents and trainer use it.

One process of AReaL's runs two controllers, before this proxy and before AReaL's own, on the same
deterministic engine (tests/wire/areal_controller.py): agents that use the openai client, alone and in groups,
a weight update between answers and in the middle of one, users' sessions with the call-back, a provider's
model. Every tensor that reaches the trainer must be equal in dtype, shape and value. AReaL runs in
`.venv-areal` (tests/wire/areal_env.py builds it once); where that cannot be built, this is skipped and says
why.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WIRE = Path(__file__).resolve().parents[1] / "wire"
sys.path[:0] = [str(WIRE), str(WIRE.parent)]

import qwen_folder  # noqa: E402
from areal_env import CHECKOUT, ArealUnavailable, areal_python, beside, environment  # noqa: E402

pytestmark = [pytest.mark.areal, pytest.mark.timeout(1500)]
RUN_TIMEOUT_S = 1400
TURNS, GROUP = 3, 3
SERVICE = "areal.experimental.inference_service"
EPISODES = ["single", "group", "after_update", "in_flight", "online"]

Reports = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with AReaL and areal_fast, and the latter's .pth file."""
    try:
        areal = areal_python()
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")
    pth = CHECKOUT / "areal_fast" / "integrations" / "areal_fast.pth"
    return beside(areal, tmp_path_factory.mktemp("beside"), pth)


@pytest.fixture(scope="module")
def output() -> list[str]:
    """What the run of `reports` wrote."""
    return []


@pytest.fixture(scope="module")
def reports(python: Path, output: list[str], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What the rollouts gave, by whose proxy was behind them."""
    folder = tmp_path_factory.mktemp("controllers")
    tokenizer = qwen_folder.build(tmp_path_factory.getbasetemp() / "qwen")
    done = subprocess.run(
        [python, "-W", "ignore", WIRE / "areal_controller.py", folder, tokenizer, folder / "report.json"],
        env=environment(AREAL_FAST="1", AREAL_FAST_ARGS="--workers 2"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_TIMEOUT_S, check=False,
    )  # fmt: skip
    output += done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(output[-60:])
    found: Reports = json.loads((folder / "report.json").read_text())
    return found


def test_each_controller_launched_the_proxy_it_should(reports: Reports, output: list[str]) -> None:
    common = {f"{SERVICE}.{name}" for name in ("guard", "router", "gateway")}
    ours, theirs = set(reports["ours"]["services"]), set(reports["original"]["services"])
    assert theirs == common | {f"{SERVICE}.data_proxy"}
    assert ours == common | {"areal_fast", "areal_fast.service.worker", "areal_fast.service.cleaner"}
    told = [line for line in output if line.startswith("areal_fast: ")]
    flags = "--drain-seconds 0.5 --areal-dialect 1.0 --workers 2"
    assert told == [f"areal_fast: AReaL 1.0: its data proxies are launched as areal_fast, with {flags}"]


def test_the_variable_gives_the_trainer_the_cheap_ways_too(reports: Reports) -> None:
    assert reports["ours"]["backend"] == "AReaLFastBackend"
    assert reports["original"]["backend"] == "HttpRTensorBackend"


@pytest.mark.parametrize("episode", EPISODES)
def test_the_trainer_gets_the_same_tensors(reports: Reports, episode: str) -> None:
    theirs, mine = reports["original"][episode], reports["ours"][episode]
    assert mine.keys() == theirs.keys() >= {"input_ids", "logprobs", "loss_mask", "versions", "rewards"}
    for name in theirs:
        assert mine[name] == theirs[name], f"{episode}: {name} differs"


def test_a_group_is_one_batch_of_all_turns(reports: Reports) -> None:
    batch = reports["ours"]["group"]
    assert batch["input_ids"]["shape"][0] == GROUP * TURNS
    assert batch["rewards"]["values"][TURNS - 1 :: TURNS] == [0.25, 0.5, 0.75]
    assert batch["rewards"]["values"][0] == 0.25 * 0.25, "two turns before the last, discounted by a half"


def versions(batch: dict[str, Any]) -> list[int]:
    """Of the tokens that the engine made, in order."""
    pairs = zip(batch["versions"]["values"], batch["loss_mask"]["values"], strict=True)
    return [version for version, is_output in pairs if is_output]


def test_a_weight_update_reaches_the_versions(reports: Reports) -> None:
    mine = reports["ours"]
    assert mine["versions"] == [7]
    assert set(versions(mine["after_update"])) == {5}
    in_flight = versions(mine["in_flight"])
    assert in_flight[:10] == [5] * 10 and set(in_flight[10:]) == {7}, "the first ten were made before it"


def test_a_providers_model_is_recorded_as_text(reports: Reports) -> None:
    mine = reports["ours"]
    assert mine["external"] == reports["original"]["external"]
    assert [turn["reward"] for turn in mine["external"]["interactions"]] == [0.75, 0.75]
    assert mine["provider_saw"] == [["elsewhere", "Bearer a-providers-key"]] * 2


def test_the_gateway_pauses_a_proxy_by_its_id(reports: Reports) -> None:
    mine = reports["ours"]["gateway"]
    assert mine == [["pause_generation", 200, True], ["continue_generation", 200, True]]
    assert mine == reports["original"]["gateway"]


def test_nothing_is_left_behind(reports: Reports) -> None:
    mine = reports["ours"]
    assert mine["sessions_left"] == [0]
    assert mine["services_left"] == mine["still_answering"] == []


def test_enable_by_call_and_disable_on_the_released_controller(python: Path) -> None:
    program = f"""
from areal_fast.integrations import areal
assert areal.enable(workers=2)
from {SERVICE}.controller.controller import RolloutControllerV2 as Controller
names = ("_fork_on_guard", "_async_fork_on_guard")
ours = [getattr(Controller, name) for name in names]
areal.disable()
assert [getattr(Controller, name) for name in names] == [one.__wrapped__ for one in ours]
assert areal.enable() and Controller._fork_on_guard.__wrapped__ is ours[0].__wrapped__
"""
    done = subprocess.run(
        [python, "-W", "ignore", "-c", program],
        env=environment(), capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
