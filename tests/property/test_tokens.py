"""Prompt ids and reply texts equal transformers', whatever the conversation holds and however the cache is.

The rival is transformers' own `apply_chat_template` and `decode`, on a folder with the real Qwen vocabulary
and on small tokenizers of other families. "However the cache is": warm (one cache for all examples), cold
(new each time), tiny (a few entries, so that generations rotate within one prompt), off.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_fast.engine.detokenize import ContentStream, OutputRejected, visible_output
from areal_fast.engine.folder import load_folder
from areal_fast.engine.tokenizer import HfTokenizer
from tests import token_folders

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FOLDERS = {
    "qwen": token_folders.qwen,
    "llama3": token_folders.llama3,
    "metaspace-first": functools.partial(token_folders.metaspace, "first"),
    "metaspace-always": functools.partial(token_folders.metaspace, "always"),
    "stripping": token_folders.stripping,
    "wordpiece": token_folders.wordpiece,
}

TOKENS = [
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<|image_pad|>",
    "<|im_", "|>",
    "<", "<|eot_id|>", "<|start_header_id|>", "<s>", "</s>", "[INST]", " [/INST] ",
    "<|end|>  ", " <mask>", "<0x0A>",
]  # fmt: skip
HARD = [
    "e\u0301", "\u0301", "👩\u200d👩\u200d👧", "🇩🇪", "שלום", "مرحبا \u200f",
    "\ufeff", "\u2028", "\x00", "\x1c", "ﬁ", "가", "①",
    "   \n\n\t ", "\r\n", " " * 40, "\n" * 9, "12345678901234567890", "3.14159e-10",
    "'s", "don't", "▁", "Ġ", "你好，世界",
]  # fmt: skip
text = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(TOKENS),
        st.sampled_from(HARD),
        st.sampled_from(token_folders.CORPUS),
        st.text(" \n\t\r", max_size=20),
    ),
    max_size=6,
).map("".join)
json_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
tool = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": text, "description": text, "parameters": st.dictionaries(text, json_value, max_size=3)}
        ),
    }
)
call = st.fixed_dictionaries(
    {
        "id": st.just("call_1"),
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": text, "arguments": text | st.dictionaries(text, json_value)}
        ),
    }
)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}), max_size=3)
message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": text}),
    st.fixed_dictionaries({"role": st.just("user"), "content": parts}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": text, "tool_calls": st.lists(call, min_size=1, max_size=3)}
    ),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": text, "reasoning": text}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": text}),
)
conversation = st.lists(message, min_size=1, max_size=6)
plain_conversation = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": text}),
    min_size=1,
    max_size=5,
)


@functools.cache
def rival(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@functools.cache
def ours(folder: Path, cache_bytes: int) -> HfTokenizer:
    return HfTokenizer(load_folder(folder), cache_bytes=cache_bytes)


def _expected(folder: Path, messages: Any, tools: Any = None) -> tuple[list[int] | None, str]:
    """transformers' ids, or None and how it failed."""
    try:
        result = rival(folder).apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=True
        )
    except Exception as error:
        return None, type(error).__name__
    return list(result if isinstance(result, list) else result["input_ids"]), ""


def _check(folder: Path, messages: Any, tools: Any = None) -> None:
    expected, failure = _expected(folder, messages, tools)
    for cache_bytes in (64 << 20, 4096, 0):
        tokenizer = ours(folder, cache_bytes)
        try:
            found = tokenizer.encode_chat(messages, tools, {})
        except ValueError as error:
            assert expected is None, f"transformers renders what we refuse: {error}"
            assert failure in ("ValueError", str(error).split(":")[0]), f"{failure} against {error}"
            continue
        assert expected is not None, f"transformers refuses ({failure}) what we render"
        assert found.ids().tolist() == expected, f"cache of {cache_bytes} bytes: {tokenizer.segments.why_off}"


@SETTINGS
@given(conversation, st.none() | st.lists(tool, max_size=3))
def test_qwen_prompts(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
    _check(token_folders.qwen(), messages, tools)


@pytest.mark.parametrize(
    "family", ["llama3", "metaspace-first", "metaspace-always", "stripping", "wordpiece"]
)
@settings(SETTINGS, max_examples=40)
@given(messages=plain_conversation)
def test_other_families_prompts(family: str, messages: list[dict[str, Any]]) -> None:
    _check(FOLDERS[family](), messages)


@SETTINGS
@given(st.lists(plain_conversation, min_size=2, max_size=4))
def test_a_growing_conversation_through_a_cold_cache(turns: list[list[dict[str, Any]]]) -> None:
    folder = token_folders.qwen()
    tokenizer = ours(folder, 1 << 20)
    tokenizer.segments.clear()
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages = messages + turn
        expected, _ = _expected(folder, messages)
        assert tokenizer.encode_chat(messages, None, {}).ids().tolist() == expected


def test_the_self_test_decides_about_the_cache() -> None:
    used = {name: not ours(folder(), 1 << 20).segments.why_off for name, folder in FOLDERS.items()}
    assert used["qwen"] and used["llama3"] and used["stripping"]
    native = {name: not ours(folder(), 1 << 20).segments.why_no_pairs for name, folder in FOLDERS.items()}
    assert native == {name: name in ("qwen", "llama3") for name in FOLDERS}
    # only the first piece gets a space before it: a piece's ids depend on where it stands
    assert not used["metaspace-first"]
    assert "differ" in ours(FOLDERS["metaspace-first"](), 1 << 20).segments.why_off


@pytest.mark.parametrize("family", list(FOLDERS))
@settings(SETTINGS, max_examples=40)
@given(data=st.data())
def test_decoding_whole_and_in_pieces(family: str, data: st.DataObject) -> None:
    folder = FOLDERS[family]()
    tokenizer, theirs = ours(folder, 1 << 20), rival(folder)
    ids = data.draw(
        st.one_of(
            st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30),
            text.map(lambda t: tokenizer.encode(t).ids().tolist()),
            st.lists(st.sampled_from([*tokenizer.stop_ids, 5, 9, 300]), max_size=8),
        )
    )
    stop_reason = data.draw(st.sampled_from(["stop", "length"]))
    stop_strings = data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8).map(sorted))
    assert tokenizer.decode(ids) == theirs.decode(ids)

    stream = ContentStream(tokenizer.incremental(), tokenizer.stop_ids, stop_strings=stop_strings)
    shown = "".join(stream.add(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True))
    try:
        visible = visible_output(ids, stop_reason, tokenizer.stop_ids, stop_strings=stop_strings)
    except OutputRejected as rejected:
        with pytest.raises(OutputRejected) as raised:
            stream.finish(stop_reason)
        assert str(raised.value) == str(rejected)
        return
    assert shown + stream.finish(stop_reason) == tokenizer.decode(visible)
    if family in ("qwen", "llama3"):
        assert "\ufffd" not in shown or "\ufffd" in tokenizer.decode(visible)
