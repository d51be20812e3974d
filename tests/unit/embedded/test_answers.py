"""What the embedded engine answers: the same prompt, the same answer; budgets, stops and lengths are kept."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.embedded import tokenizer
from areal_fast.embedded.answers import Answer, Book, TokenRange, Wanted

WORDS = Book(TokenRange(), tokenizer.EOS_ID)
IDS = Book(TokenRange(1000, 151_643), None)

prompts = st.lists(st.integers(0, 151_643), min_size=1, max_size=20).map(
    lambda ids: json.dumps(ids, separators=(",", ":")).encode()
)


def rows(answer: Answer) -> list[list[object]]:
    made: list[list[object]] = json.loads(b"[" + answer.sglang_json(answer.count) + b"]")
    return made


@given(prompts, st.integers(0, 300), st.none() | st.integers(-(2**63), 2**64))
def test_every_form_tells_the_same(prompt: bytes, budget: int, seed: int | None) -> None:
    answer = WORDS.answer(prompt, Wanted(budget, seed))
    count = answer.count
    ids = answer.ids(count)
    logprobs = [row[0] for row in rows(answer)]
    assert len(ids) == count <= budget
    assert [row[1] for row in rows(answer)] == ids
    assert json.loads(b"[" + answer.ids_json(count) + b"]") == ids
    assert json.loads(b"[" + answer.vllm_tokens(count) + b"]") == [f"token:{i}" for i in ids]
    assert json.loads(b"[" + answer.vllm_logprobs(count) + b"]") == logprobs
    assert json.loads(b"[" + answer.vllm_top(count) + b"]") == [
        {f"token:{i}": lp} for i, lp in zip(ids, logprobs, strict=True)
    ]
    assert all(isinstance(lp, float) and -9.4 <= lp < 0 for lp in logprobs)
    body = ids[:-1] if answer.matched is not None else ids
    assert answer.text(count).decode() == bytes(body).decode("utf-8", "ignore")
    assert json.loads(b'"' + answer.text(count) + b'"') == answer.text(count).decode()
    assert len(answer.text_starts(count)) == count


@given(prompts, st.integers(0, 300), st.integers(0, 300), st.booleans(), st.sampled_from([0, 40]))
def test_a_smaller_budget_gives_a_prefix(prompt: bytes, one: int, two: int, ignore: bool, fixed: int) -> None:
    small, large = sorted((one, two))
    less = WORDS.answer(prompt, Wanted(small, ignore_eos=ignore, fixed_tokens=fixed))
    more = WORDS.answer(prompt, Wanted(large, ignore_eos=ignore, fixed_tokens=fixed))
    assert more.ids(less.count) == less.ids(less.count)
    if less.matched is None:
        assert less.count == small
    else:
        assert (more.count, more.matched) == (less.count, less.matched)


def test_it_is_the_same_in_another_process() -> None:
    script = (
        "from areal_fast.embedded.answers import Book, TokenRange, Wanted;"
        "print(Book(TokenRange(), 258).answer(b'[1,2]', Wanted(99, 7)).sglang_json(99).decode())"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip().encode() == WORDS.answer(b"[1,2]", Wanted(99, 7)).sglang_json(99)


def test_prompt_seed_and_salt_change_the_answer() -> None:
    def ids(prompt: bytes, seed: int | None = None, salt: int = 0) -> tuple[int, ...]:
        return tuple(WORDS.answer(prompt, Wanted(64, seed, ignore_eos=True), salt).ids(64))

    made = [ids(b"[1]"), ids(b"[2]"), ids(b"[1]", 5), ids(b"[1]", 6), ids(b"[1]", None, 9)]
    assert len(set(made)) == len(made)


def test_it_ends_with_eos_where_the_budget_allows() -> None:
    answer = WORDS.answer(b"[5]", Wanted(10_000))
    assert answer.matched == tokenizer.EOS_ID == answer.ids(answer.count)[-1]
    assert answer.text(answer.count).endswith(b".")
    cut = WORDS.answer(b"[5]", Wanted(answer.count - 1))
    assert (cut.matched, cut.count) == (None, answer.count - 1)
    exact = WORDS.answer(b"[5]", Wanted(answer.count))
    assert (exact.matched, exact.count) == (tokenizer.EOS_ID, answer.count)


@pytest.mark.parametrize(
    ("fixed", "budget", "count", "stops"), [(64, 64, 64, True), (64, 63, 63, False), (1, 9, 1, True)]
)
def test_a_fixed_length_counts_the_eos(fixed: int, budget: int, count: int, stops: bool) -> None:
    answer = WORDS.answer(b"[5]", Wanted(budget, fixed_tokens=fixed))
    assert (answer.count, answer.matched is not None) == (count, stops)


def test_other_vocabularies_end_with_the_last_stop_token_asked_for() -> None:
    answer = IDS.answer(b"[5]", Wanted(10_000, stop_ids=(151_643, 151_645)))
    ids = answer.ids(answer.count)
    assert ids[-1] == answer.matched == 151_645
    assert all(1000 <= i < 151_643 for i in ids[:-1])
    assert answer.text(answer.count) == b""
    assert IDS.answer(b"[5]", Wanted(50)).matched is None


def test_a_stop_id_inside_ends_the_answer_there() -> None:
    dot = ord(".")
    answer = WORDS.answer(b"[5]", Wanted(500, stop_ids=(dot, tokenizer.EOS_ID), ignore_eos=False))
    ids = answer.ids(answer.count)
    assert ids[-1] == answer.matched == dot
    assert ids.count(dot) == 1
    assert not answer.text(answer.count).endswith(b".")
    ignoring = WORDS.answer(b"[5]", Wanted(500, stop_ids=(dot,), ignore_eos=True))
    assert (ignoring.count, ignoring.matched) == (500, None)


def test_a_stop_text_ends_the_answer_and_is_left_out() -> None:
    whole = WORDS.answer(b"[5]", Wanted(10_000)).text(10_000)
    answer = WORDS.answer(b"[5]", Wanted(10_000, stop_texts=(b"absent", b" the ", whole[-8:-3])))
    assert answer.matched == " the "
    assert answer.text(answer.count) == whole[: whole.index(b" the ")]
    assert bytes(answer.ids(answer.count)) == whole[: whole.index(b" the ") + 5]


@pytest.mark.parametrize("text", ["", "word", "5-4", "-1", "0-9999999999", "0", "4-4"])
def test_a_bad_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tokens"):
        TokenRange.parse(text)


def test_ranges() -> None:
    assert TokenRange.parse("words").words
    assert TokenRange.parse("7-9") == TokenRange(7, 9)
    assert TokenRange.parse("100") == TokenRange(0, 100)
