"""Template concat: which interaction a chat goes on from, and the prompt that continues its tokens.

A conversation is a chain of hashes, one a message: h[i] = BLAKE2b-192(h[i-1] ‖ canonical JSON of message i).
An interaction is recorded with the hash of its messages and its answer; a chat's parent is the earlier
interaction with the longest such prefix of its messages, found by looking its own hashes up from the longest
down: O(messages of the request), whatever the session holds.

The hash is all that is kept of a message, 24 bytes an interaction, and no second look at the messages
confirms it. A false parent would need two conversations of one session with the same 192-bit cryptographic
hash, which nobody can make (2^96 tries); keeping the messages would cost more memory than the tokens.

Canonical: equal as JSON values means equal bytes. Members are sorted, numbers without a fraction are
integers (1.0 is 1, but true is not), strings are escaped one way; the caller has dropped null members.

The prompt (wire page, "Template concat"): the parent's prompt ids and output without its trailing stop
tokens, the eos id, and what follows the k-th eos in the templated whole conversation, k being how many eos
there are so far. Source: areal.experimental.openai.client.concat_prompt_token_ids_with_parent and cache.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from areal_fast.protocol.chat import BadChat
from areal_fast.protocol.wire import IntArray

HASH_BYTES = 24
ROOT = bytes(HASH_BYTES)
INT64_LIMIT = 2.0**63

_encode = msgspec.json.Encoder(order="sorted").encode


def canonical(value: Any) -> bytes:
    """The one JSON text of all values equal to this one."""
    return _encode(_plain(value))


def _plain(value: Any) -> Any:
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is float and value.is_integer() and abs(value) < INT64_LIMIT:
        return int(value)
    return value


def follow(prefix: bytes, message: Any) -> bytes:
    """The hash of a conversation that goes on with `message`."""
    return hashlib.blake2b(prefix + canonical(message), digest_size=HASH_BYTES).digest()


def prefix_hashes(messages: Sequence[dict[str, Any]], images: Sequence[str] | None = None) -> list[bytes]:
    """The hash after each message. `images`: what was taken out of the messages, in order; it counts."""
    found: list[bytes] = []
    left = iter(images or ())
    at = ROOT
    for message in messages:
        at = follow(at, _with_images(message, left) if images else message)
        found.append(at)
    return found


def _with_images(message: dict[str, Any], images: Iterator[str]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [
        {**part, "image": next(images, None)}
        if isinstance(part, dict) and part.get("type") == "image"
        else part
        for part in content
    ]
    return {**message, "content": parts}


def answer_message(content: str | None, calls: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """The assistant's message as a client echoes it: content, (id, name, arguments) of each tool call."""
    message: dict[str, Any] = {"role": "assistant"}
    if content is not None:
        message["content"] = content
    if calls:
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in calls
        ]
    return message


def continued(
    parent: IntArray, prompt_len: int, stop_reason: str, whole: IntArray, eos_id: int, stop_ids: Sequence[int]
) -> IntArray:
    """Prompt ids int32 [P] of a chat that goes on from `parent`, its ids [T] of which the first `prompt_len`
    are its prompt. `whole`: the templated whole conversation. BadChat (400) if the two cannot be aligned."""
    end = len(parent)
    if stop_reason != "length":
        while end > prompt_len and int(parent[end - 1]) in stop_ids:
            end -= 1
    before = int(np.count_nonzero(parent[:end] == eos_id)) + 1
    found = np.flatnonzero(whole == eos_id)
    at = int(found[before - 1]) if len(found) >= before else -1
    if at == -1 or at + 1 >= len(whole):
        raise BadChat(
            "RuntimeError: Failed to align child tokens with parent tokens in concat prompt."
            f"Find child_truncate_idx at {at}, parent_eos_num: {before}, "
            f"all_tokens eos count: {len(found)}"
        )
    return np.concatenate((parent[:end], np.array([eos_id], np.int32), whole[at + 1 :]))
