"""Runs inside `.venv-areal`: many episodes at once with AReaL's own workflow through its gateway.

    python areal_load.py GATEWAY_URL ROUTER_URL TOKENIZER SESSIONS TURNS PROXY_URL...

For each proxy in turn, which is the router's only one then: every episode is a session of its own: an openai
client, TURNS turns (the second one streamed), a reward, the export, RTensor. An agent repeats a turn whose
connection broke, as agents do; the openai client repeats by itself what is not streamed. "half" is printed
when half of the turns are done, so that whoever started this can do harm then; at the end one JSON object:
for each session every tensor's dtype, shape and digest, what its agent was told and what stands in its
tensors; and how many turns had to be repeated, the proxy's health, and which sessions it still has.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")

import httpx  # noqa: E402
import openai  # noqa: E402
from areal.experimental.inference_service.controller.workflow import InferenceServiceWorkflow  # noqa: E402
from areal.infra import workflow_context  # noqa: E402
from areal.infra.rpc.rtensor import RTensor  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

ADMIN = {"Authorization": "Bearer areal-admin-key"}
TRIES = 6


class Progress:
    """Turns done by all agents, and repeated by them."""

    def __init__(self, of: int) -> None:
        self.of = of
        self.done = 0
        self.repeated = 0

    def one_more(self) -> None:
        self.done += 1
        if self.done == self.of // 2:
            print("half", flush=True)


class Agent:
    """A conversation that is no other session's from its first word on."""

    def __init__(self, number: int, turns: int, progress: Progress) -> None:
        self.number = number
        self.turns = turns
        self.progress = progress
        self.said: list[str] = []

    def marker(self, turn: int) -> str:
        return f"<{self.number}:{turn}>"

    async def run(self, data: dict[str, Any], **given: Any) -> float:
        client = openai.AsyncOpenAI(
            base_url=given["base_url"], api_key=given["api_key"], http_client=given["http_client"]
        )
        messages: list[Any] = []
        for turn in range(self.turns):
            messages.append({"role": "user", "content": f"{self.marker(turn)} and now? ünï 你好"})
            said = await self.turn(client, messages, stream=turn == 1)
            self.said.append(said)
            messages.append({"role": "assistant", "content": said})
            self.progress.one_more()
        return self.number / 64

    async def turn(self, client: openai.AsyncOpenAI, messages: list[Any], *, stream: bool) -> str:
        for _ in range(TRIES):
            try:
                if not stream:
                    reply = await client.chat.completions.create(
                        model="default", messages=messages, max_tokens=40
                    )
                    return reply.choices[0].message.content or ""
                said, finished = "", False
                async for chunk in await client.chat.completions.create(
                    model="default", messages=messages, max_tokens=40, stream=True
                ):
                    if chunk.choices:
                        said += chunk.choices[0].delta.content or ""
                        finished = finished or chunk.choices[0].finish_reason is not None
                if finished:
                    return said
            except openai.APIError:
                pass
            self.progress.repeated += 1
        raise RuntimeError(f"turn {len(self.said)} of session {self.number}: {TRIES} tries failed")


async def episode(gateway: str, agent: Agent) -> Any:
    workflow_context.set(workflow_context.WorkflowContext(task_id=agent.number))
    workflow = InferenceServiceWorkflow(
        controller=None, agent=agent, gateway_addr=gateway, group_size=1, discount=0.5
    )
    return await workflow.arun_episode(None, {})


async def all_episodes(gateway: str, agents: list[Agent]) -> list[Any]:
    return await asyncio.gather(*[asyncio.create_task(episode(gateway, agent)) for agent in agents])


def described(agent: Agent, trajectory: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The tensors, and the turns as they stand in them: (markers of its own turn's prompt, output text)."""
    tensors = {
        name: {
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest(),
        }
        for name, tensor in sorted(trajectory.items())
    }
    turns = []
    for ids, is_output, is_there in zip(
        trajectory["input_ids"].tolist(),
        trajectory["loss_mask"].tolist(),
        trajectory["attention_mask"].tolist(),
        strict=True,
    ):
        rows = list(zip(ids, is_output, is_there, strict=True))
        prompt = tokenizer.decode([i for i, out, there in rows if there and not out])
        output = tokenizer.decode([i for i, out, there in rows if there and out])
        markers = [word for word in prompt.replace("\n", " ").split() if word.startswith("<") and ":" in word]
        turns.append({"markers": markers, "output": output})
    told = [
        {"markers": [agent.marker(t) for t in range(turn + 1)], "output": said}
        for turn, said in enumerate(agent.said)
    ]
    return {"tensors": tensors, "turns": turns, "told": told}


def before_one(client: httpx.Client, gateway: str, router: str, proxy: str, size: list[int]) -> Any:
    """The agents, what their episodes gave, and what the proxy says of itself afterwards."""
    sessions, turns = size
    progress = Progress(sessions * turns)
    agents = [Agent(number, turns, progress) for number in range(sessions)]
    place = {"worker_addr": proxy}
    client.post(f"{router}/register", json=place, headers=ADMIN).raise_for_status()
    trajectories = asyncio.run(all_episodes(gateway, agents))
    client.post(f"{router}/unregister", json=place, headers=ADMIN).raise_for_status()
    local = [(a, RTensor.localize(t)) for a, t in zip(agents, trajectories, strict=True) if t is not None]
    state = client.get(f"{proxy}/health").json()
    left = client.get(f"{proxy}/admin/sessions", headers=ADMIN)  # the original has no such page
    return local, {
        "repeated": progress.repeated,
        "health": state,
        "left": left.json()["sessions"] if left.status_code == 200 else None,
    }


def main(gateway: str, router: str, folder: str, sessions: str, turns: str, *proxies: str) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    report: dict[str, Any] = {}
    with httpx.Client(timeout=60) as client:
        for proxy in proxies:
            local, state = before_one(client, gateway, router, proxy, [int(sessions), int(turns)])
            rows = {str(agent.number): described(agent, tensors, tokenizer) for agent, tensors in local}
            report[proxy] = {"sessions": rows, **state}
    return report


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
