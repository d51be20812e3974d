"""The agents: multi-turn conversations through the `openai` client, as any agent framework would hold them.

An agent knows a base URL and its session's key, nothing else of the proxy. It repeats what fails as its
tools do: the `openai` client and areal_fast's own repeat by themselves what is safe to repeat; a stream that
breaks in the middle is the agent's own to repeat, and so is the start of a session. `World` counts what
really failed, with the time, so that the report can say what a killed worker cost.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

import openai

from areal_fast.client import AsyncClient, Request, Unreachable
from areal_fast.demo.ledger import Ledger, Messages, Session, Turn

ATTEMPTS = 6

TASKS = (
    "Find out which lamp the red switch lights.",
    "Plan a walk through Zürich that crosses the river three times.",
    "Book the earliest train that still has a quiet seat.",
    "Repair the failing test without changing what it checks.",
    "Sort the letters by the distance they have travelled. ✉️",
    "Explain to a patient child why 0.1 + 0.2 isn’t 0.3.",
    "Découvre quel café est ouvert avant huit heures.",
    "Count the windows of the harbour office from the plan.",
)
SYSTEM = "You are an agent in a small world. Think in short sentences, act one step at a time."
OBSERVATIONS = (
    "The tool answers: {}. What next?",
    "Observation: nothing happened after “{}”. Try something else.",
    "You hear: {}. Continue.",
    "Result: 3 matches for {}. Choose one.",
)


@dataclass(slots=True)
class Failure:
    """A request that broke and was sent again, and between which times that happened."""

    path: str
    sent: float
    noticed: float


class World:
    """What agents share: the proxy's address, the HTTP connections, the ledger, and what has been counted."""

    def __init__(self, url: str, admin_key: str, ledger: Ledger, seed: int) -> None:
        self.url = url
        self.ledger = ledger
        self.random = random.Random(seed)
        self.openai = openai.AsyncOpenAI(base_url=url, api_key=admin_key, max_retries=ATTEMPTS, timeout=60)
        self.client = AsyncClient(url, admin_key, observe=self._count)
        self.failures: list[Failure] = []
        self.call_latency_s: dict[str, list[float]] = {}

    def _count(self, request: Request) -> None:
        if request.error is None:
            self.call_latency_s.setdefault(request.path, []).append(request.ended - request.began)
        else:
            self.failures.append(Failure(request.path, request.began, request.ended))

    async def start(self, task_id: str, group_size: int = 1) -> tuple[str, list[Session]]:
        """Start a session or a group: (group id, its sessions). Again if a connection breaks: sessions that
        were started for nobody hold nothing and go stale."""
        for attempt in range(ATTEMPTS):
            try:
                started = await self.client.start_group(task_id, group_size)
                break
            except Unreachable:
                if attempt == ATTEMPTS - 1:
                    raise
        return started[0].group_id, [self.ledger.start(one.id, one.api_key) for one in started]

    async def reward(self, session: Session, reward: float) -> None:
        """Reward the session's last answer, which closes its trajectory."""
        await self.client.session(session.id, session.key).set_reward(reward)
        session.reward = reward

    async def close(self) -> None:
        await self.openai.close()
        await self.client.close()


async def converse(world: World, session: Session, turns: int) -> None:
    """Hold a conversation of `turns` turns; each answer received in full goes into the ledger."""
    choose = world.random
    messages: Messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": choose.choice(TASKS)},
    ]
    for number in range(turns):
        if number:
            await asyncio.sleep(choose.uniform(0.02, 0.25))  # the agent acts; its world takes a moment
        turn = await _ask(world, session, messages)
        session.turns.append(turn)
        quoted = " ".join(turn.content.split()[-3:]).strip(".")
        observation = choose.choice(OBSERVATIONS).format(quoted)
        messages = [
            *messages,
            {"role": "assistant", "content": turn.content},
            {"role": "user", "content": observation},
        ]


async def _ask(world: World, session: Session, messages: Messages) -> Turn:
    """One turn, streamed or not. A stream that breaks is asked for again, as a whole."""
    streamed = world.random.random() < 0.5
    budget = world.random.randrange(40, 200)
    client = world.openai.with_options(api_key=session.key)
    began = time.monotonic()
    for attempt in range(ATTEMPTS):
        sent = time.monotonic()
        try:
            turn, retries = await (_streamed if streamed else _whole)(client, messages, budget)
        except Exception as error:
            if not _broken(error):
                raise
            session.requests_failed += 1
            world.failures.append(Failure("/chat/completions", sent, time.monotonic()))
            if attempt == ATTEMPTS - 1:
                raise
            await asyncio.sleep(0.05 * 2**attempt)
            continue
        turn.began, turn.ended = began, time.monotonic()
        turn.latency_s = turn.ended - sent
        for _ in range(retries):  # the client's own
            session.requests_failed += 1
            world.failures.append(Failure("/chat/completions", sent, turn.ended))
        return turn
    raise AssertionError("unreachable")


def _broken(error: Exception) -> bool:
    """Whether a connection broke. Old clients let their HTTP library's errors through in streams."""
    return isinstance(error, openai.APIConnectionError) or type(error).__module__.startswith("httpx")


async def _whole(client: openai.AsyncOpenAI, messages: Any, budget: int) -> tuple[Turn, int]:
    """The turn, and how often the client had to repeat the request."""
    raw: Any = await client.chat.completions.with_raw_response.create(
        model="served", messages=messages, max_completion_tokens=budget
    )
    reply = raw.parse()
    choice, usage = reply.choices[0], reply.usage
    turn = Turn(reply.id, messages, choice.message.content or "", choice.finish_reason)
    turn.prompt_tokens, turn.completion_tokens = usage.prompt_tokens, usage.completion_tokens
    return turn, raw.retries_taken


async def _streamed(client: openai.AsyncOpenAI, messages: Any, budget: int) -> tuple[Turn, int]:
    """The same, streamed."""
    raw: Any = await client.chat.completions.with_raw_response.create(
        model="served",
        messages=messages,
        max_completion_tokens=budget,
        stream=True,
        stream_options={"include_usage": True},
    )
    turn = Turn("", messages, "", "", streamed=True)
    async for chunk in raw.parse():
        turn.id = chunk.id
        for choice in chunk.choices:
            turn.content += choice.delta.content or ""
            turn.finish_reason = choice.finish_reason or turn.finish_reason
        if chunk.usage is not None:
            turn.prompt_tokens = chunk.usage.prompt_tokens
            turn.completion_tokens = chunk.usage.completion_tokens
    if not turn.finish_reason:
        raise openai.APIConnectionError(message="the stream ended early", request=raw.http_request)
    return turn, raw.retries_taken
