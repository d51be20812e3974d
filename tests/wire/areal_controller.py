"""Runs beside AReaL (areal_env.beside): rollouts under AReaL's own controller, and a report of what came out.

    AREAL_FAST=1 python areal_controller.py FOLDER TOKENIZER REPORT.json

Two controllers live from start to end: "ours", for which nothing is done here, because the variable is set
and areal_fast.pth is installed; then, after areal.disable(), "original". Controller, scheduler, guard,
router, gateway, workflow executor, workflow, the agents' openai client and RTensor are the released ones.
Only the inference server is a stand-in, told to the controller as one that runs already; so what launches
the data proxy here is what launches it in an experiment. What a trainer would get is written to REPORT: every
tensor's dtype, shape and values, and what ran.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parent))

import httpx  # noqa: E402
from areal.api.cli_args import AgentConfig, InferenceEngineConfig, SchedulingSpec  # noqa: E402
from areal.api.io_struct import LocalInfServerInfo  # noqa: E402
from areal.experimental.inference_service.controller.controller import RolloutControllerV2  # noqa: E402
from areal.infra.rpc.rtensor import RTensor, clear_fetch_buffer, get_backend, set_backend  # noqa: E402
from areal.infra.scheduler.local import LocalScheduler  # noqa: E402
from openai import AsyncOpenAI, OpenAI  # noqa: E402
from standin import EXTERNAL, GENERATE, WORDS, Answer, StandIn  # noqa: E402

ADMIN = "an-admin-key-of-its-own"
TURNS = 3
START_S = 500.0
WATCHDOG_S = 200.0
MOST_SESSIONS = 10


class Agent:
    """Holds a conversation of three turns, the second streamed. Each run of one agent asks its own question
    and has its own reward."""

    def __init__(self, temperature: float = 0.5) -> None:
        self.runs = 0
        self.temperature = temperature

    async def run(self, data: dict[str, Any], **given: Any) -> float:
        self.runs += 1
        number = self.runs
        client = AsyncOpenAI(
            base_url=given["base_url"],
            api_key=given["api_key"],
            http_client=given["http_client"],
            max_retries=0,
        )
        messages: list[Any] = [{"role": "user", "content": f"{data['question']} {number} ünï 你好"}]
        for turn in range(TURNS):
            asked = {"model": "default", "messages": messages, "max_tokens": 40}
            if turn == 1:
                stream = await client.chat.completions.create(**asked, stream=True)
                said = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
            else:
                reply = await client.chat.completions.create(**asked, temperature=self.temperature)
                said = reply.choices[0].message.content or ""
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"more {turn}"}]
        return number / 4


def described(value: Any) -> Any:
    """JSON of anything a trajectory holds; a tensor as its dtype, shape and values."""
    if hasattr(value, "dtype"):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "values": value.flatten().tolist()}
    if isinstance(value, dict):
        return {str(name): described(part) for name, part in sorted(value.items())}
    return [described(part) for part in value] if isinstance(value, list | tuple) else value


def services() -> list[str]:
    """The modules that run below this process, by `-m`."""
    parents, arguments = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                arguments[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
    found: list[str] = []
    frontier = [os.getpid()]
    while frontier:
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
        argvs = [arguments[pid] for pid in frontier]
        found += [argv[argv.index("-m") + 1] for argv in argvs if "-m" in argv and "python" in argv[0]]
    return sorted(set(found))


def rolled(controller: Any, question: str, *, group_size: int = 1) -> dict[str, Any]:
    """One rollout as the trainer gets it, its shards cleared afterwards, as the trainer does."""
    (trajectory,) = controller.rollout_batch([{"question": question}], Agent(), group_size=group_size)
    shards = RTensor.collect_shards(trajectory)
    report = described(RTensor.localize(trajectory))
    clear_fetch_buffer()
    for node, ids in shards.items():
        asyncio.run(RTensor.clear_node(node, ids))
        left = sum(httpx.get(f"http://{node}/data/{shard}").status_code != 404 for shard in ids)
        assert left == 0, f"{left} of {len(ids)} shards are left after the trainer cleared them"
    return report


def update(controller: Any, version: int) -> None:
    """A weight update as the trainer does it."""
    controller.pause_generation()
    controller.set_version(version)
    controller.continue_generation()


def updated_in_flight(controller: Any, engine: StandIn, version: int) -> dict[str, Any]:
    """A weight update while an answer is being made: the engine gives up after ten tokens, while paused."""
    given_up = threading.Event()
    engine.answer_next(Answer(WORDS[:10], "abort", hold=given_up))
    after, report = len(engine.received), {}
    rollout = threading.Thread(target=lambda: report.update(rolled(controller, "and meanwhile?")))
    rollout.start()
    engine.wait_for_call(GENERATE, after)
    controller.pause_generation()
    given_up.set()
    controller.set_version(version)
    controller.continue_generation()
    rollout.join(WATCHDOG_S)
    assert not rollout.is_alive() and report, "the rollout did not go on"
    return report


def online(controller: Any, model: str) -> dict[str, Any]:
    """A user's session over the gateway, and what it brought to the controller that waits for it."""
    gateway = controller.proxy_gateway_addr

    def user() -> None:
        with httpx.Client(base_url=gateway, timeout=60) as http:
            admin = {"Authorization": f"Bearer {ADMIN}"}
            started = http.post("/rl/start_session", json={"task_id": f"user-of-{model}"}, headers=admin)
            key = started.raise_for_status().json()["sessions"][0]["session_api_key"]
            client = OpenAI(base_url=gateway, api_key=key, max_retries=0)
            messages: list[Any] = [{"role": "user", "content": "somebody asks"}]
            for turn in range(2):
                reply = client.chat.completions.create(model=model, messages=messages, max_tokens=20)
                said = reply.choices[0].message.content or ""
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"{turn}?"}]
            mine = {"Authorization": f"Bearer {key}"}
            http.post("/rl/set_reward", json={"reward": 0.75}, headers=mine).raise_for_status()

    talk = threading.Thread(target=user)
    talk.start()
    # the original also calls back for the agents' sessions, which are gone by then
    for _ in range(MOST_SESSIONS):
        batch = controller.rollout_batch(None, None, batch_size=1)
        if batch:
            break
    talk.join(WATCHDOG_S)
    (trajectory,) = batch
    return described(RTensor.localize(trajectory))


def asked_of_the_gateway(controller: Any) -> list[list[Any]]:
    """Verb, status and whether the proxies did it, of what operators ask by a proxy's id in the router."""
    admin = {"Authorization": f"Bearer {ADMIN}"}
    found = []
    for worker in controller.worker_ids.values():
        for verb in ("pause_generation", "continue_generation"):
            url = f"{controller.proxy_gateway_addr}/{verb}/{worker}"
            reply = httpx.post(url, json={}, headers=admin, timeout=60)
            found.append([verb, reply.status_code, *(one["ok"] for one in reply.json()["results"])])
    return found


def trained(controller: Any, engine: StandIn) -> dict[str, Any]:
    """What one controller brings, by episode."""
    addresses = controller._data_proxy_addrs
    report: dict[str, Any] = {
        "services": services(),
        "single": rolled(controller, "how many?"),
        "group": rolled(controller, "how much?", group_size=3),
    }
    update(controller, 5)
    report["after_update"] = rolled(controller, "and now?")
    report["in_flight"] = updated_in_flight(controller, engine, 7)
    report["online"] = online(controller, "default")
    url = f"http://{engine.address}{EXTERNAL.removesuffix('/chat/completions')}"
    controller.register_model("elsewhere", url=url, api_key="a-providers-key")
    report["external"] = online(controller, "elsewhere")
    asked = [call for call in engine.received if call.path == EXTERNAL]
    report["provider_saw"] = [[call.body["model"], call.headers["authorization"]] for call in asked]
    report["gateway"] = asked_of_the_gateway(controller)
    report["versions"] = [httpx.get(f"{one}/get_version").json()["version"] for one in addresses]
    report["sessions_left"] = [httpx.get(f"{one}/health").json()["sessions"] for one in addresses]
    report["backend"] = type(get_backend()).__name__
    return report


def config(tokenizer: str) -> InferenceEngineConfig:
    return InferenceEngineConfig(
        backend="sglang:d1",
        tokenizer_path=tokenizer,
        admin_api_key=ADMIN,
        consumer_batch_size=8,
        max_head_offpolicyness=100,
        setup_timeout=START_S,
        request_timeout=60.0,
        scheduling_spec=(SchedulingSpec(gpu=0, cpu=1, mem=1, cmd="python -m areal.infra.rpc.rpc_server"),),
        agent=AgentConfig(agent_cls_path="not.used", turn_discount=0.5),
    )


def lived(folder: Path, tokenizer: str) -> dict[str, Any]:
    """A controller's life, on an engine of its own."""
    (folder / "names").mkdir(parents=True)
    scheduler = LocalScheduler(
        gpu_devices=[0], experiment_name="e2e", trial_name="t", fileroot=str(folder),
        startup_timeout=START_S, nfs_record_root=str(folder / "names"),
    )  # fmt: skip
    controller = RolloutControllerV2(config=config(tokenizer), scheduler=scheduler)
    controller._WORKERS_READY_TIMEOUT = START_S
    with StandIn() as engine:
        host, _, port = engine.address.rpartition(":")
        try:
            known = [LocalInfServerInfo(host=host, port=int(port), process=None)]
            controller.initialize("rollout", server_infos=known, wait=True)
            report = trained(controller, engine)
            addresses = list(controller._data_proxy_addrs)
        finally:
            controller.destroy()
            scheduler.delete_workers()
    report["services_left"] = [name for name in services() if not name.startswith("multiprocessing")]
    report["still_answering"] = [one for one in addresses if answers(one)]
    return report


def answers(address: str) -> bool:
    try:
        return bool(httpx.get(f"{address}/health", timeout=5).status_code)
    except httpx.HTTPError:
        return False


def main(folder: str, tokenizer: str, report: str) -> None:
    reports = {"ours": lived(Path(folder, "ours"), tokenizer)}
    disable_all()
    reports["original"] = lived(Path(folder, "original"), tokenizer)
    Path(report).write_text(json.dumps(reports))


def disable_all() -> None:
    from areal_fast.integrations import areal

    areal.disable()
    set_backend(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
