"""A tokenizer that only transformers can load, in a process of its own: `python -m
areal_fast.engine.tokenizer_helper`.

Some folders hold no tokenizer.json, or a tokenizer that is Python code. Loading those needs transformers,
hundreds of MiB and seconds, and with --trust-remote-code somebody else's program; neither belongs into a
worker. So the worker starts this process (remote.py) and asks it over two pipes.

Frames both ways: 4 bytes length, little-endian, then MessagePack. First frame out: `{ok: facts}` or
`{error: text}`. Then one answer a question, in order: `[operation, arguments…]` → `{ok: result}` or
`{refused: text}` (the template's own errors, worded as the original words them) or `{error: text}`. EOF on
stdin ends the process.

stdout is for frames alone: whatever the folder's code prints goes to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec

MAX_FRAME_BYTES = 1 << 30


def write_frame(stream: BinaryIO, value: Any) -> None:
    data = msgspec.msgpack.encode(value)
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()


def read_frame(stream: BinaryIO) -> Any:
    """The next frame's value. Raises EOFError where the stream ends, also inside a frame."""
    head = _exactly(stream, 4)
    size = int.from_bytes(head, "little")
    if size > MAX_FRAME_BYTES:
        raise EOFError(f"a frame of {size} bytes")
    return msgspec.msgpack.decode(_exactly(stream, size))


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the other side is gone")
    return data


def _load(path: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def _encode_chat(tokenizer: Any, messages: Any, tools: Any, kwargs: dict[str, Any]) -> list[int]:
    result = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, **kwargs
    )
    # a list before transformers 5, a mapping since
    return list(result if isinstance(result, list) else result["input_ids"])


def serve(path: str, questions: BinaryIO, answers: BinaryIO, *, trust_remote_code: bool) -> None:
    """Load the folder, then answer until the questions end."""
    try:
        tokenizer = _load(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the folder's code raises is the answer
        write_frame(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    write_frame(
        answers,
        {"ok": {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id, "size": len(tokenizer)}},
    )
    operations: dict[str, Callable[..., Any]] = {
        "encode_chat": lambda messages, tools, kwargs: _encode_chat(tokenizer, messages, tools, kwargs),
        "decode": lambda ids: tokenizer.decode(ids),
    }
    while True:
        try:
            operation, *arguments = read_frame(questions)
        except EOFError:
            return
        try:
            answer = {"ok": operations[operation](*arguments)}
        except ValueError as error:
            answer = {"refused": str(error)}
        except Exception as error:
            answer = {"refused": f"{type(error).__name__}: {error}"}
        write_frame(answers, answer)


def main() -> None:
    path, trust = sys.argv[1], "--trust-remote-code" in sys.argv[2:]
    # frames get a descriptor of their own, then stdout becomes stderr for anything that prints
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(path, sys.stdin.buffer, answers, trust_remote_code=trust)


if __name__ == "__main__":
    main()
