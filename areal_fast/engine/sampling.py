"""From a chat request to what the engine is asked for: sampling parameters and the token budget.

The budget (wire page, "Chat"): `max_total_tokens`, capped by --engine-max-tokens, minus the prompt; at most
`max_completion_tokens` (or its old name `max_tokens`); 512 if neither is given; and never more than 32768
(v2: --engine-max-tokens or 32768) minus the prompt. A prompt that leaves nothing is a 400 with the original's
text.

Pure: no I/O. Source: areal.experimental.openai.client (create), areal.api.cli_args.GenerationHyperparameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from areal_fast.protocol.chat import BadChat, ChatRequest

DEFAULT_NEW_TOKENS = 512
MAX_TOTAL_TOKENS = 32768
TOP_K_ALL = 100_000_000


class Sampling(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one generation is asked for, in the proxy's terms; the adapters spell it for their engine."""

    max_new_tokens: int
    """> 0; over all attempts together."""
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    images: tuple[str, ...] | None = None
    """Base64 or URL of each image."""
    vision_messages: Sequence[Mapping[str, Any]] | None = None
    """With images: the messages as they came, for engines that template them on their own."""
    return_routed_experts: bool = False


def new_tokens_budget(
    chat: ChatRequest,
    prompt_tokens: int,
    *,
    engine_max_tokens: int | None = None,
    max_total_tokens: int = MAX_TOTAL_TOKENS,
) -> int:
    """How many tokens the answer may have, > 0. Raises BadChat (400) with the original's texts.

    `engine_max_tokens` is the flag; `max_total_tokens` the ceiling for prompt and answer that holds without
    it.
    """
    total = None if chat.max_total_tokens is None else int(chat.max_total_tokens)
    if engine_max_tokens is not None:
        total = engine_max_tokens if total is None else min(total, engine_max_tokens)
    budget: int | None = None
    if total is not None:
        budget = total - prompt_tokens
        if budget <= 0:
            raise BadChat(f"len of prompt tokens {prompt_tokens} exceeds max_total_tokens {total}")
    asked = chat.max_completion_tokens if chat.max_tokens is None else chat.max_tokens
    if asked is not None:
        budget = int(asked) if budget is None else min(budget, int(asked))
    if budget is None:
        budget = DEFAULT_NEW_TOKENS
    effective = min(max_total_tokens - prompt_tokens, budget)
    if effective <= 0:
        raise BadChat(
            f"max_new_tokens must be > 0, got {effective} (max_tokens={max_total_tokens}, "
            f"input_len={prompt_tokens}, max_new_tokens={budget})"
        )
    return effective


def stable_seed(identity: str, index: int) -> int:
    """The seed of the `index`-th request (from 0) of a session's identity, in [0, 2**31): the first 31 bits
    of sha256 of `identity:index`, which every engine takes."""
    digest = hashlib.sha256(f"{identity}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def sampling_from_chat(
    chat: ChatRequest,
    prompt_tokens: int,
    stop_token_ids: Sequence[int],
    *,
    engine_max_tokens: int | None = None,
    max_total_tokens: int = MAX_TOTAL_TOKENS,
    seed: int | None = None,
) -> Sampling:
    """The request's Sampling: the same object as the last one that was made of it, if that is equal. `seed`
    is used where the request has none. Raises BadChat (400)."""
    max_new_tokens = new_tokens_budget(
        chat, prompt_tokens, engine_max_tokens=engine_max_tokens, max_total_tokens=max_total_tokens
    )
    stops = tuple(stop_token_ids)
    if chat.seed is not None:
        seed = chat.seed
    last: Sampling | None = chat.sampled
    if (
        last is not None
        and last.max_new_tokens == max_new_tokens
        and last.seed == seed
        and last.stop_token_ids == stops
    ):
        return last
    made = Sampling(
        max_new_tokens=max_new_tokens,
        stop_token_ids=stops,
        temperature=1.0 if chat.temperature is None else chat.temperature,
        top_p=chat.top_p or 1.0,  # 0 means the default too, as in the original
        frequency_penalty=chat.frequency_penalty or 0.0,
        stop=tuple(chat.stop_strings),
        seed=seed,
        images=tuple(chat.images) if chat.images else None,
        vision_messages=chat.vision_messages,
        return_routed_experts=bool(chat.metadata and chat.metadata.get("return_routed_experts")),
    )
    chat.sampled = made
    return made
