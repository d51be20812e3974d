"""The byte tokenizer: text survives the round trip, any ids decode, and the template is ChatML."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.embedded import tokenizer
from areal_fast.embedded.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, ByteTokenizer, render_chat

plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
mixed_text = st.lists(plain_text | st.sampled_from(SPECIAL_TOKENS), max_size=6).map("".join)
contents = st.one_of(
    st.none(), mixed_text, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": mixed_text}))
)


@given(mixed_text)
def test_text_survives_the_round_trip(text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text


@given(plain_text, st.sampled_from(SPECIAL_TOKENS), plain_text)
def test_a_special_name_is_one_id_wherever_it_stands(before: str, name: str, after: str) -> None:
    ids = tokenizer.encode(before + name + after).tolist()
    assert ids.count(ByteTokenizer.special_tokens[name]) >= 1
    assert (
        len(ids) == len(before.encode()) + 1 + len(after.encode()) or name in before + after or "<" in before
    )


@given(st.lists(st.integers(-5, VOCAB_SIZE + 5) | st.integers(-(2**70), 2**70)))
def test_any_ids_decode(ids: list[int]) -> None:
    text = tokenizer.decode(ids)
    text.encode()
    tokenizer.decode(ids, skip_special_tokens=True).encode()


@given(st.lists(st.lists(st.integers(-1, VOCAB_SIZE), max_size=4), max_size=12))
def test_pieces_join_to_the_whole(chunks: list[list[int]]) -> None:
    detokenizer = ByteTokenizer().incremental()
    pieces = [detokenizer.add(chunk) for chunk in chunks] + [detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode([i for chunk in chunks for i in chunk])


def test_a_character_leaves_only_when_it_is_complete() -> None:
    detokenizer = ByteTokenizer().incremental()
    first, second, third = "€".encode()
    assert [detokenizer.add([i]) for i in (first, second, third)] == ["", "", "€"]
    assert detokenizer.add([first]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_lone_surrogates_do_not_break_it() -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_control_tokens_can_be_left_out() -> None:
    ids = tokenizer.encode("<|im_start|>hi<tool_call><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi<tool_call>"


def test_the_template_is_chatml() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
    ]
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
    assert render_chat(messages) == turns + "<|im_start|>assistant\n"
    assert render_chat(messages[:1], None, {"add_generation_prompt": False}).endswith("<|im_end|>\n")
    assert render_chat(messages, None, {"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")


def test_the_template_shows_tools_calls_and_results() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    text = render_chat(
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "two"},
            {"role": "assistant", "content": "2"},
        ],
        [tool],
    )
    assert text.startswith("<|im_start|>system\n# Tools")
    assert json.dumps(tool) in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    results = "<tool_response>\n2\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>\n" in text


@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool", 3, None])},
            optional={
                "content": contents | st.integers() | st.lists(st.integers() | st.none()),
                "tool_calls": st.none()
                | st.lists(st.integers() | st.fixed_dictionaries({"function": contents})),
            },
        ),
        max_size=5,
    ),
    st.none() | st.lists(st.fixed_dictionaries({"name": mixed_text})),
)
def test_no_conversation_breaks_the_template(
    messages: list[dict[str, object]], tools: list[dict[str, str]] | None
) -> None:
    text = render_chat(messages, tools)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_ids_follow_the_bytes(name: str) -> None:
    assert 256 <= ByteTokenizer.special_tokens[name] < ByteTokenizer.vocab_size
    assert tokenizer.decode([ByteTokenizer.special_tokens[name]]) == name
