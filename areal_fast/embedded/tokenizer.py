"""The byte tokenizer `builtin:bytes`: one token per UTF-8 byte, plus the special tokens of ChatML.

Theory: ids 0 to 255 are bytes, the ids after them are the names in SPECIAL_TOKENS, in order. A name that
stands in any text, also in a user's, becomes its one id, as Hugging Face tokenizers do; every other
character is its bytes. The chat template is ChatML as Qwen's tokenizers render it (roles between
<|im_start|> and <|im_end|>, tool calls as JSON between <tool_call> tags, tool results inside a user
turn), written in Python because it must cost nothing and never fail.

Invariants:
- decode(encode(text)) == text for every text without lone surrogates (those become "?").
- decode accepts any integers: what is not UTF-8, or not in the vocabulary, decodes to U+FFFD. It never
  raises.
- The pieces that an incremental decoder returns join to what decode returns for the whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

NAME = "builtin:bytes"

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
CONTROL_TOKENS = frozenset(SPECIAL_TOKENS[:3])
"""What decode(skip_special_tokens=True) leaves out; the tags of tools and thoughts are text."""

EOS_ID = 256 + SPECIAL_TOKENS.index(TURN_END)
PAD_ID = 256 + SPECIAL_TOKENS.index(END_OF_TEXT)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_SPECIAL_IDS = {name.encode(): 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
_SPLIT = re.compile(b"(" + b"|".join(re.escape(name) for name in _SPECIAL_IDS) + b")")
_PIECES = [bytes([i]) for i in range(256)] + [name.encode() for name in SPECIAL_TOKENS]
_SHOWN = [b"" if name in CONTROL_TOKENS else name.encode() for name in SPECIAL_TOKENS]
_PIECES_SHOWN = _PIECES[:256] + _SHOWN
_UNKNOWN = "\ufffd".encode()

TokenIds = npt.NDArray[np.int32]


def encode(text: str) -> TokenIds:
    """The ids of `text`: int32, one per UTF-8 byte or special token."""
    data = text.encode("utf-8", "replace")
    if b"<" not in data:
        return np.frombuffer(data, np.uint8).astype(np.int32)
    pieces = _SPLIT.split(data)
    if len(pieces) == 1:
        return np.frombuffer(data, np.uint8).astype(np.int32)
    ids = np.empty(sum(map(len, pieces[::2])) + len(pieces) // 2, np.int32)
    at = 0
    for i, piece in enumerate(pieces):
        if i % 2:
            ids[at] = _SPECIAL_IDS[piece]
            at += 1
        elif piece:
            ids[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
    return ids


def decode_bytes(ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
    """The bytes of `ids`: what each stands for, U+FFFD in UTF-8 for ids outside the vocabulary."""
    ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    try:
        return bytes(ids)
    except ValueError:
        pieces = _PIECES_SHOWN if skip_special_tokens else _PIECES
        return b"".join([pieces[i] if 0 <= i < VOCAB_SIZE else _UNKNOWN for i in ids])


def decode(ids: Iterable[int], skip_special_tokens: bool = False) -> str:
    """The text of `ids`. Bytes that are not UTF-8 become U+FFFD. Never raises."""
    return decode_bytes(ids, skip_special_tokens).decode("utf-8", "replace")


class ByteDetokenizer:
    """Decodes a growing list of ids piece by piece; the bytes of an incomplete character are held back."""

    def __init__(self, skip_special_tokens: bool = False) -> None:
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text that `ids`, following all ids added before, make certain."""
        return self._decoder.decode(decode_bytes(ids, self._skip))

    def finish(self) -> str:
        """The text of what is still held back; the decoder can then be used anew."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


class ByteTokenizer:
    """`builtin:bytes` in the form areal_fast.engine's tokenizer asks for."""

    name = NAME
    eos_id = EOS_ID
    pad_id = PAD_ID
    vocab_size = VOCAB_SIZE
    special_tokens: Mapping[str, int] = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str) -> TokenIds:
        return encode(text)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> TokenIds:
        """The ids of the rendered conversation; see render_chat."""
        return encode(render_chat(messages, tools, kwargs))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return decode(ids, skip_special_tokens)

    def incremental(self) -> ByteDetokenizer:
        return ByteDetokenizer()


def load_tokenizer() -> ByteTokenizer:
    """The tokenizer named `builtin:bytes`."""
    return ByteTokenizer()


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as ChatML text.

    kwargs are the template's: `add_generation_prompt` (default true) opens an assistant turn at the end,
    `enable_thinking: false` puts an empty thought into it; others are ignored, as Jinja templates do.
    Members of a message that are missing or of an unexpected type are rendered as nothing or as JSON: no
    conversation makes this raise.
    """
    kwargs = kwargs or {}
    parts: list[str] = []
    start = 0
    if tools:
        system = ""
        if messages and messages[0].get("role") == "system":
            system = _text(messages[0].get("content")) + "\n\n"
            start = 1
        parts.append(f"{TURN_START}system\n{system}{_describe(tools)}{TURN_END}\n")
    after_tool = False
    for message in messages[start:]:
        role = message.get("role")
        if role == "tool":
            parts.append("\n" if after_tool else f"{TURN_START}user\n")
            parts.append(f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>")
            after_tool = True
            continue
        if after_tool:
            parts.append(f"{TURN_END}\n")
            after_tool = False
        parts.append(f"{TURN_START}{role}\n{_text(message.get('content'))}{_calls(message)}{TURN_END}\n")
    if after_tool:
        parts.append(f"{TURN_END}\n")
    if kwargs.get("add_generation_prompt", True):
        parts.append(f"{TURN_START}assistant\n")
        if kwargs.get("enable_thinking") is False:
            parts.append("<think>\n\n</think>\n\n")
    return "".join(parts)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system prompt's part that names the tools and says how to call one."""
    listed = "\n".join(_json(tool) for tool in tools)
    return (
        "# Tools\n\nThese functions may be called; each line is one signature.\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        'To call one, write {"name": ..., "arguments": {...}} between <tool_call> and </tool_call>.'
    )


def _text(content: Any) -> str:
    """A message's content: a string as it is, the text parts of a list, null as nothing, the rest as JSON."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    return _json(content)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        text = part.get("text")
        return text if isinstance(text, str) else ""
    return _json(part)


def _calls(message: Mapping[str, Any]) -> str:
    """The tool calls of a message, each between its tags; arguments may be an object or JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return ""
    parts = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict):
            continue
        arguments = function.get("arguments")
        shown = arguments if isinstance(arguments, str) else _json(arguments)
        name = _json(function.get("name"))
        parts.append(f'\n<tool_call>\n{{"name": {name}, "arguments": {shown}}}\n</tool_call>')
    return "".join(parts)
