"""Agents through their own clients: openai, anthropic and openai-agents against a running proxy.

The engine is a stand-in that reads the prompt and answers as a model with Qwen's tool calls would. The same
episode (a question, two calls at once, their results, an answer) is played through each API, whole and
streamed: the engine must be given the same token ids every time, and the exports must hold them.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, RunConfig, Runner, function_tool
from tokenizers import Tokenizer

from tests import token_folders
from tests.e2e.running import ADMIN, Proxy
from tests.wire.standin import EOS, Answer, Call, StandIn

SYSTEM = "Be brief."
QUESTION = "Weather in Zürich and Rome?"
CITIES = ["Zürich", "Rome"]
CALLS = "Let me see.\n" + "\n".join(
    f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    for city in CITIES
)
FINAL = "Rain in Zürich, sun in Rome — 21 °C."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
DESCRIPTION = "The weather in a city."


def weather(city: str) -> str:
    return f"{city}: {'rain' if city == 'Zürich' else 'sun'}"


@pytest.fixture(scope="module")
def engine() -> Iterator[StandIn]:
    tokenizer = Tokenizer.from_file(str(token_folders.qwen() / "tokenizer.json"))

    def answer(call: Call) -> Answer:
        prompt = tokenizer.decode(call.body["input_ids"], skip_special_tokens=False)
        text = FINAL
        if "<tools>" in prompt and "<tool_response>" not in prompt:
            text = CALLS
        budget = call.body["sampling_params"]["max_new_tokens"]
        tokens = [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]
        if "break off" in prompt:
            return Answer(tokens, breaks_after=3)
        return Answer(tokens[:budget], "stop" if len(tokens) <= budget else "length")

    with StandIn() as standin:
        standin.answer_always(answer)
        yield standin


@pytest.fixture(scope="module")
def proxy(engine: StandIn) -> Iterator[Proxy]:
    flags = ("--backend-addr", engine.url, "--tokenizer-path", str(token_folders.qwen()))
    with Proxy(*flags, "--request-timeout", "20") as running:
        yield running


class Openai:
    """The openai client. Used in a with statement, as it is."""

    def __init__(self, proxy: Proxy, key: str) -> None:
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key=key, max_retries=0, timeout=90
        )

    def __enter__(self) -> openai.OpenAI:
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()


def anthropic_client(proxy: Proxy, **key: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"http://127.0.0.1:{proxy.port}", max_retries=0, timeout=90, **key)


# -- one episode, in each API
# ------------------------------------------------------------------------------------------------


def chat_episode(proxy: Proxy, key: str, stream: bool) -> str:
    function = {"name": "get_weather", "description": DESCRIPTION, "parameters": SCHEMA}
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    with Openai(proxy, key) as client:
        while True:
            asked: Any = {
                "model": "m",
                "messages": messages,
                "tools": [{"type": "function", "function": function}],
                "max_tokens": 200,
            }
            if stream:
                with client.chat.completions.stream(**asked) as events:
                    for _ in events:
                        pass
                    message = events.get_final_completion().choices[0].message
            else:
                message = client.chat.completions.create(**asked).choices[0].message
            if not message.tool_calls:
                return message.content
            calls = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in message.tool_calls
            ]
            messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
            for call in message.tool_calls:
                result = weather(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def responses_episode(proxy: Proxy, key: str, stream: bool) -> str:
    tool = {"type": "function", "name": "get_weather", "description": DESCRIPTION, "parameters": SCHEMA}
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    with Openai(proxy, key) as client:
        while True:
            asked: Any = {
                "model": "m",
                "instructions": SYSTEM,
                "input": items,
                "tools": [tool],
                "max_output_tokens": 200,
            }
            if stream:
                with client.responses.stream(**asked) as events:
                    for _ in events:
                        pass
                    response = events.get_final_response()
            else:
                response = client.responses.create(**asked)
            assert response.status == "completed" and response.usage.output_tokens > 0
            items += [item.model_dump(exclude_none=True) for item in response.output]
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                return response.output_text
            for call in calls:
                result = weather(**json.loads(call.arguments))
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})


def messages_episode(proxy: Proxy, key: str, stream: bool) -> str:
    tool = {"name": "get_weather", "description": DESCRIPTION, "input_schema": SCHEMA}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with anthropic_client(proxy, api_key=key) as client:
        while True:
            asked: Any = {
                "model": "m",
                "system": SYSTEM,
                "messages": messages,
                "tools": [tool],
                "max_tokens": 200,
            }
            if stream:
                with client.messages.stream(**asked) as events:
                    assert "".join(events.text_stream) in (FINAL, "Let me see.")
                    message = events.get_final_message()
            else:
                message = client.messages.create(**asked)
            assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0
            messages.append({"role": "assistant", "content": message.content})
            uses = [block for block in message.content if block.type == "tool_use"]
            assert message.stop_reason == ("tool_use" if uses else "end_turn")
            if not uses:
                return message.content[0].text
            results = [
                {"type": "tool_result", "tool_use_id": use.id, "content": weather(**use.input)}
                for use in uses
            ]
            messages.append({"role": "user", "content": results})


def asked_of(engine: StandIn, since: int) -> list[list[int]]:
    return [call.body["input_ids"] for call in engine.received[since:] if call.path == "/generate"]


@pytest.fixture(scope="module")
def expected(engine: StandIn, proxy: Proxy) -> list[list[int]]:
    """The prompts of the episode as an OpenAI chat."""
    since = len(engine.received)
    assert chat_episode(proxy, "nobody", stream=False) == FINAL
    prompts = asked_of(engine, since)
    assert len(prompts) == 2 and prompts[1][: len(prompts[0])] == prompts[0]
    return prompts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("episode", [chat_episode, responses_episode, messages_episode])
def test_the_same_episode_is_the_same_prompts_in_every_api(
    proxy: Proxy,
    engine: StandIn,
    expected: list[list[int]],
    episode: Callable[[Proxy, str, bool], str],
    stream: bool,
) -> None:
    session_id, key = proxy.start(f"{episode.__name__}-{stream}")
    since = len(engine.received)
    assert episode(proxy, key, stream) == FINAL
    assert asked_of(engine, since) == expected
    exported(proxy, session_id, key, [len(prompt) for prompt in expected])


def exported(proxy: Proxy, session_id: str, key: str, prompt_lengths: list[int]) -> None:
    """Reward, export, and check what each interaction's tensors say of its prompt's length."""
    assert proxy.reward(key, 0.5).json["interaction_count"] == len(prompt_lengths)
    interactions = list(proxy.export(session_id).json["interactions"].values())
    assert len(interactions) == len(prompt_lengths)
    for interaction, length in zip(interactions, prompt_lengths, strict=True):
        shard = interaction["tensor_dict"]["loss_mask"]["data"]["shard"]["data"]["shard_id"]
        found = proxy.ask("GET", f"/data/{shard}").body
        raw = base64.b64decode(json.loads(found)["data"])
        mask = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
        assert mask.index(1) == length and all(mask[length:])


# -- a framework
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [OpenAIResponsesModel, OpenAIChatCompletionsModel])
def test_an_agent_of_openai_agents(proxy: Proxy, engine: StandIn, kind: Any, stream: bool) -> None:
    session_id, key = proxy.start(f"agents-{kind.__name__}-{stream}")
    asked: list[str] = []

    @function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return weather(city)

    async def episode() -> str:
        url = f"http://127.0.0.1:{proxy.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
            agent = Agent(
                name="weather",
                instructions=SYSTEM,
                tools=[get_weather],
                model=kind(model="m", openai_client=client),
            )
            config = RunConfig(tracing_disabled=True)
            if not stream:
                return str((await Runner.run(agent, QUESTION, run_config=config)).final_output)
            result = Runner.run_streamed(agent, QUESTION, run_config=config)
            async for _ in result.stream_events():
                pass
            return str(result.final_output)

    since = len(engine.received)
    assert asyncio.run(episode()) == FINAL
    assert sorted(asked) == sorted(CITIES)
    prompts = asked_of(engine, since)
    assert len(prompts) == 2
    exported(proxy, session_id, key, [len(prompt) for prompt in prompts])


# -- what goes wrong, and lists
# ------------------------------------------------------------------------------------------------


def test_clients_understand_refusals(proxy: Proxy) -> None:
    with Openai(proxy, "k") as client, pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="m", input="hi", previous_response_id="r")
    with anthropic_client(proxy, auth_token="k") as client:
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(model="m", max_tokens=5, messages=[])
        body: Any = caught.value.body
        assert body["error"] == {"type": "invalid_request_error", "message": "messages cannot be empty"}


def test_a_stream_that_breaks_off_raises_and_leaves_nothing(proxy: Proxy) -> None:
    session_id, key = proxy.start("breaks")
    said: Any = "break off"
    with Openai(proxy, key) as client, pytest.raises(openai.APIError):
        for _ in client.responses.create(model="m", input=said, stream=True):
            pass
    with anthropic_client(proxy, auth_token=key) as client, pytest.raises(anthropic.APIError):
        messages: Any = [{"role": "user", "content": said}]
        for _ in client.messages.create(model="m", max_tokens=50, messages=messages, stream=True):
            pass
    assert proxy.reward(key).status == 400, session_id


def test_a_cut_answer(proxy: Proxy) -> None:
    with anthropic_client(proxy, api_key="k") as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        message = client.messages.create(model="m", max_tokens=3, messages=messages)
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)
        counted = client.messages.count_tokens(model="m", messages=messages)
        assert counted.input_tokens == message.usage.input_tokens
    with Openai(proxy, "k") as client:
        response = client.responses.create(model="m", input="hi", max_output_tokens=3)
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"


def test_models_are_listed_with_external_ones(proxy: Proxy) -> None:
    body = {"name": "ext", "url": "http://127.0.0.1:9", "model": "m"}
    assert proxy.ask("POST", "/register_model", body, key=ADMIN).status == 200
    with Openai(proxy, "k") as client:
        assert {"qwen", "ext"} == {model.id for model in client.models.list()}
    with anthropic_client(proxy, api_key="k") as client:
        assert {"qwen", "ext"} == {model.id for model in client.models.list()}
