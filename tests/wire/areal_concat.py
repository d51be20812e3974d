"""Run by AReaL's interpreter: what the original makes of the conversations on standard input.

In, a list of: {"chats": [{messages, answer, output, stop_reason}…], "rewards": {chat: reward}, "discount",
"eos"}. Out, for each: {"prompts": [ids or null…], "leaves": {chat: {reward, name: values}}}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from areal.api.io_struct import ModelResponse
from areal.experimental.openai.cache import InteractionCache
from areal.experimental.openai.client import concat_prompt_token_ids_with_parent
from areal.experimental.openai.types import InteractionWithTokenLogpReward


class Tokenizer:
    """The template of tests/unit/store/trees.py."""

    def __init__(self, eos: int) -> None:
        self.eos_token_id = self.pad_token_id = eos

    def apply_chat_template(self, messages: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        ids = []
        for message in messages:
            text = f"{message.get('content')}{message.get('n', '')}"
            ids += [*map(ord, text), self.eos_token_id]
        return {"input_ids": [*ids, 7]}


def play(asked: Any) -> Any:
    tokenizer = Tokenizer(asked["eos"])
    cache = InteractionCache()
    prompts: list[Any] = []
    for i, chat in enumerate(asked["chats"]):
        interaction = InteractionWithTokenLogpReward(messages=chat["messages"], chat_template_type="concat")
        interaction.interaction_id = str(i)
        cache[str(i)] = interaction
        try:
            ids = concat_prompt_token_ids_with_parent(
                interaction.remaining_messages, interaction.parent, tokenizer
            )
        except RuntimeError:
            prompts.append(None)
            del cache[str(i)]
            continue
        prompts.append(list(ids))
        n = len(chat["output"])
        interaction.model_response = ModelResponse(
            input_tokens=list(ids),
            output_tokens=chat["output"],
            output_logprobs=[-0.25 * (k + 1) - i for k in range(n)],
            output_versions=[i] * (n - 1) + [i + 1],
            stop_reason=chat["stop_reason"],
            tokenizer=tokenizer,
        )
        interaction.output_message_list = [{"role": "assistant", "content": chat["answer"]}]
    for i, reward in asked["rewards"].items():
        if i in cache:
            cache.set_reward(i, reward)
    leaves = {}
    for i, leaf in cache.export_interactions("concat", reward_discount=asked["discount"]).items():
        tensors = {name: tensor.tolist() for name, tensor in leaf.to_tensor_dict().items()}
        leaves[i] = {"reward": leaf.reward, **tensors}
    return {"prompts": prompts, "leaves": leaves}


json.dump([play(asked) for asked in json.load(sys.stdin)], sys.stdout)
