"""Runs inside `.venv-areal`: rollouts with AReaL's own workflow, client and tensors, and a report of what
came out.

    python areal_rollout.py GATEWAY_URL ROUTER_URL PROXY_URL

The code that AReaL's trainer runs is used as it is: InferenceServiceWorkflow talks to the gateway, agents
are given an openai client, the exported trajectory is localized by RTensor and its shards are cleared by
RTensor. What comes back is printed as one JSON object: every tensor's dtype, shape and values, so that two
proxies can be compared.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")

import httpx  # noqa: E402
from areal.experimental.inference_service.controller.workflow import InferenceServiceWorkflow  # noqa: E402
from areal.infra import workflow_context  # noqa: E402
from areal.infra.rpc.rtensor import RTensor, clear_fetch_buffer  # noqa: E402
from openai import AsyncOpenAI  # noqa: E402

ADMIN = {"Authorization": "Bearer areal-admin-key"}
TURNS = 3


class Agent:
    """Holds a conversation of three turns, the second one streamed; each run has its own question and
    reward.
    """

    def __init__(self) -> None:
        self.runs = 0

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
            if turn == 1:
                stream = await client.chat.completions.create(
                    model="default", messages=messages, max_tokens=40, stream=True
                )
                said = "".join(
                    [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
                )
            else:
                reply = await client.chat.completions.create(
                    model="default", messages=messages, max_tokens=40, temperature=0.5
                )
                said = reply.choices[0].message.content or ""
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"more {turn}"}]
        return number / 4


def described(trajectory: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "values": tensor.flatten().tolist()}
        for name, tensor in sorted(trajectory.items())
    }


async def rollout(gateway: str, task: int, group_size: int, discount: float) -> Any:
    workflow_context.set(workflow_context.WorkflowContext(task_id=task))
    workflow = InferenceServiceWorkflow(
        controller=None, agent=Agent(), gateway_addr=gateway, group_size=group_size, discount=discount
    )
    return await workflow.arun_episode(None, {"question": f"task {task}: how many?"})


def main(gateway: str, router: str, proxy: str) -> dict[str, Any]:
    report: dict[str, Any] = {}
    with httpx.Client(timeout=60) as client:
        worker = client.post(f"{router}/register", json={"worker_addr": proxy}, headers=ADMIN).json()[
            "worker_id"
        ]
        for name, task, group_size, discount in (("single", 7, 1, 1.0), ("group", 8, 3, 0.5)):
            trajectory = asyncio.run(rollout(gateway, task, group_size, discount))
            shards = RTensor.collect_shards(trajectory)
            report[name] = described(RTensor.localize(trajectory))
            clear_fetch_buffer()
            for node, ids in shards.items():
                asyncio.run(RTensor.clear_node(node, ids))
                report[f"{name}_left_after_clear"] = sum(
                    client.get(f"http://{node}/data/{shard}").status_code != 404 for shard in ids
                )
        for verb, body in (
            ("pause_generation", {}),
            ("set_version", {"version": 5}),
            ("continue_generation", {}),
        ):
            reply = client.post(f"{gateway}/{verb}/{worker}", json=body, headers=ADMIN)
            report[verb] = [reply.status_code]
        trajectory = asyncio.run(rollout(gateway, 9, 1, 1.0))
        report["after_update"] = described(RTensor.localize(trajectory))
        report["version"] = client.get(f"{proxy}/get_version").json()
        report["sessions_left"] = client.get(f"{proxy}/health").json()["sessions"]
    return report


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4])))
