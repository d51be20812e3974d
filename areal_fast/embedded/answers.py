"""What the embedded engine answers: deterministic tokens with log-probs, at the cost of a few slices.

Theory: a book of phrases is made once, from a fixed seed. Each phrase keeps its tokens in several forms
that are already JSON ("columns"), with the place where each token ends. An answer is a chain of phrases
that a hash of the prompt (and of the seed, if one was sent) picks; any form of its first k tokens is then
whole phrases joined, one cut. So 64 tokens cost no more than a handful of byte operations, and benchmarks
measure the proxy, not this.

With `words` the tokens are the bytes of short English sentences (ids of the tokenizer builtin:bytes);
with a range `low-high` they are arbitrary ids of anybody's vocabulary, and there is no text.

Invariants: the same prompt ids, seed, salt and options give the same answer in every process and on every
machine; a prefix of an answer is the answer that a smaller budget gives; log-probs are in [-9.4, 0).
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random

import msgspec

PHRASES = 512
_MASK = (1 << 64) - 1

_OPENERS = ("The", "A", "Every", "One", "Another", "This")
_ADJECTIVES = (
    "quiet", "patient", "small", "curious", "distant", "careful", "bright", "slow", "honest", "naïve",
    "narrow", "gentle", "early", "steady", "plain", "warm",
)  # fmt: skip
_NOUNS = (
    "agent", "river", "teacher", "engine", "garden", "letter", "traveller", "signal", "harbour", "café",
    "reward", "lantern", "compass", "student", "window", "clock", "bridge", "answer", "question", "machine",
)  # fmt: skip
_VERBS = (
    "finds", "follows", "counts", "remembers", "opens", "explains", "crosses", "repairs", "measures",
    "watches", "carries", "draws", "keeps", "weighs", "answers", "reads",
)  # fmt: skip
_TAILS = (
    "today", "again", "without haste", "before noon", "in the end", "near Zürich", "at last", "once more",
    "by the sea", "with care", "after the rain", "step by step",
)  # fmt: skip


class TokenRange(msgspec.Struct, frozen=True):
    """Which ids answers are made of: `words` (low = high = 0) or every id in [low, high)."""

    low: int = 0
    high: int = 0

    @property
    def words(self) -> bool:
        return self.high == 0

    @staticmethod
    def parse(text: str) -> TokenRange:
        """From the command line's `words`, `LOW-HIGH` or `HIGH`. Raises ValueError with a text."""
        if text == "words":
            return TokenRange()
        match = re.fullmatch(r"(?:([0-9]{1,10})-)?([0-9]{1,10})", text)
        if match is None:
            raise ValueError(f"tokens must be 'words' or LOW-HIGH, not {text!r}")
        made = TokenRange(int(match[1] or 0), int(match[2]))
        if not made.low < made.high <= 1 << 31:
            raise ValueError(f"tokens {text!r}: LOW must be below HIGH, both in 0 to 2147483648")
        return made


class Column:
    """One form of a phrase's tokens: `joined` is all of them, `ends[i]` where token i ends in it."""

    __slots__ = ("ends", "joined")

    def __init__(self, fragments: list[bytes], separator: bytes) -> None:
        self.joined = separator.join(fragments)
        ends = array("I")
        at = 0
        for fragment in fragments:
            at += len(fragment)
            ends.append(at)
            at += len(separator)
        self.ends = ends

    def head(self, count: int) -> bytes:
        """The first `count` ≥ 1 tokens."""
        return self.joined[: self.ends[count - 1]]


class Phrase:
    """A run of tokens in every form an answer may need; see Answer's methods of the same names."""

    __slots__ = (
        "count",
        "ids",
        "ids_json",
        "sglang_json",
        "text",
        "vllm_logprobs",
        "vllm_tokens",
        "vllm_top",
    )

    def __init__(self, ids: list[int], logprobs: list[str], text: list[bytes]) -> None:
        pairs = list(zip(ids, logprobs, strict=True))
        self.count = len(ids)
        self.ids = ids
        self.ids_json = Column([b"%d" % i for i in ids], b",")
        self.sglang_json = Column([b"[%s,%d,null]" % (lp.encode(), i) for i, lp in pairs], b",")
        self.vllm_tokens = Column([b'"token:%d"' % i for i in ids], b",")
        self.vllm_logprobs = Column([lp.encode() for lp in logprobs], b",")
        self.vllm_top = Column([b'{"token:%d":%s}' % (i, lp.encode()) for i, lp in pairs], b",")
        self.text = Column(text, b"")


def _make_phrase(random: Random, tokens: TokenRange) -> Phrase:
    if tokens.words:
        sentence = (
            f"{random.choice(_OPENERS)} {random.choice(_ADJECTIVES)} {random.choice(_NOUNS)} "
            f"{random.choice(_VERBS)} the {random.choice(_NOUNS)} {random.choice(_TAILS)}. "
        ).encode()
        ids = list(sentence)
        text = [sentence[i : i + 1] for i in range(len(sentence))]
    else:
        ids = [random.randrange(tokens.low, tokens.high) for _ in range(random.randrange(24, 57))]
        text = [b""] * len(ids)
    logprobs = [f"{-0.0001 - random.random() ** 4 * 9.375:.4f}" for _ in ids]
    return Phrase(ids, logprobs, text)


@dataclass(slots=True)
class Wanted:
    """What bounds an answer, all of it from the request or the switches."""

    max_tokens: int
    seed: int | None = None
    stop_ids: Sequence[int] = ()
    stop_texts: Collection[bytes] = ()
    ignore_eos: bool = False
    fixed_tokens: int = 0


class Answer:
    """The tokens of one answer. Methods with `count` speak of the first `count` tokens.

    `matched` is the token id or the stop text that ended it, or None if the budget did ("length").
    """

    __slots__ = ("_eos", "_phrases", "body_count", "count", "matched", "text_count")

    def __init__(self, phrases: list[Phrase], body_count: int, eos: Phrase | None, matched: int | str | None):
        self._phrases = phrases
        self._eos = eos
        self.body_count = body_count
        self.count = body_count + (1 if eos is not None else 0)
        self.text_count = body_count
        self.matched = matched

    def _column(self, name: str, count: int, separator: bytes) -> bytes:
        parts: list[bytes] = []
        left = min(count, self.body_count)
        for phrase in self._phrases:
            if left <= 0:
                break
            column: Column = getattr(phrase, name)
            parts.append(column.joined if left >= phrase.count else column.head(left))
            left -= phrase.count
        if count > self.body_count and self._eos is not None:
            parts.append(getattr(self._eos, name).joined)
        return separator.join(parts)

    def ids(self, count: int) -> list[int]:
        """Token ids as integers."""
        ids: list[int] = []
        for phrase in self._phrases:
            ids += phrase.ids
        del ids[min(count, self.body_count) :]
        if count > self.body_count and self._eos is not None:
            ids += self._eos.ids
        return ids

    def ids_json(self, count: int) -> bytes:
        """`1,2,3`"""
        return self._column("ids_json", count, b",")

    def sglang_json(self, count: int) -> bytes:
        """`[logprob,id,null],…`: SGLang's output_token_logprobs without the outer brackets."""
        return self._column("sglang_json", count, b",")

    def vllm_tokens(self, count: int) -> bytes:
        """`"token:1",…`"""
        return self._column("vllm_tokens", count, b",")

    def vllm_logprobs(self, count: int) -> bytes:
        """`-0.5,…`"""
        return self._column("vllm_logprobs", count, b",")

    def vllm_top(self, count: int) -> bytes:
        """`{"token:1":-0.5},…`"""
        return self._column("vllm_top", count, b",")

    def text(self, count: int) -> bytes:
        """UTF-8 text, JSON-safe, without an incomplete last character; empty for arbitrary ids."""
        raw = self._column("text", min(count, self.text_count), b"")
        return raw if raw.isascii() else raw.decode("utf-8", "ignore").encode()

    def text_starts(self, count: int) -> list[int]:
        """Where each token's text begins (vLLM's text_offset), in bytes."""
        length = len(self._column("text", self.text_count, b""))
        step = 1 if length else 0
        return [min(i * step, length) for i in range(count)]


class Book:
    """The phrases of one kind of tokens, and the choice of them for a prompt."""

    def __init__(self, tokens: TokenRange, eos_id: int | None) -> None:
        self.tokens = tokens
        self.eos_id = eos_id
        random = Random(f"areal_fast embedded {tokens.low} {tokens.high}")
        self._phrases = [_make_phrase(random, tokens) for _ in range(PHRASES)]
        self._ends: dict[tuple[int, int], Phrase] = {}
        self._body_ids = frozenset(i for phrase in self._phrases for i in phrase.ids)

    def answer(self, prompt: bytes, wanted: Wanted, salt: int = 0) -> Answer:
        """The answer to a prompt given as canonical JSON (`[1,2,3]`, no blanks)."""
        key = zlib.crc32(prompt) | len(prompt) << 32
        key ^= (wanted.seed or 0) * 0x9E3779B97F4A7C15 ^ salt * 0xD1B54A32D192ED03
        key = _step(_step(key & _MASK))
        eos_id = None if wanted.ignore_eos else self._eos_for(wanted.stop_ids)
        budget = max(0, wanted.max_tokens)
        ends = eos_id is not None
        if not ends:
            phrases, body = self._chain(key, budget), budget
        elif wanted.fixed_tokens:
            body = wanted.fixed_tokens - 1
            phrases = self._chain(key, min(body, budget))
        else:
            phrases = self._chain(key, budget + 1, 1 + (key >> 20) % 4)
            body = max(0, sum(phrase.count for phrase in phrases) - 1)
        if body >= budget:
            body, ends = budget, False
        eos = self._end(eos_id, key & 15) if ends and eos_id is not None else None
        answer = Answer(phrases, body, eos, eos_id if ends else None)
        if not wanted.ignore_eos and not self._body_ids.isdisjoint(wanted.stop_ids):
            _stop_at_id(answer, frozenset(wanted.stop_ids))
        if wanted.stop_texts and self.tokens.words:
            _stop_at_text(answer, wanted.stop_texts)
        return answer

    def _chain(self, key: int, least: int, most_phrases: int = 1 << 31) -> list[Phrase]:
        """Phrases in the order that `key` gives, until they hold `least` tokens or are `most_phrases`."""
        phrases: list[Phrase] = []
        made = 0
        while made < least and len(phrases) < most_phrases:
            key = _step(key)
            phrase = self._phrases[key >> 55]
            phrases.append(phrase)
            made += phrase.count
        return phrases

    def _eos_for(self, stop_ids: Sequence[int]) -> int | None:
        if self.eos_id is not None:
            return self.eos_id
        return next(reversed(stop_ids), None)  # callers list pad before eos

    def _end(self, eos_id: int, variant: int) -> Phrase:
        """The closing token as a phrase of its own; kept, since nearly every answer ends in the same."""
        phrase = self._ends.get((eos_id, variant))
        if phrase is None:
            if len(self._ends) > 4096:
                self._ends.clear()
            phrase = Phrase([eos_id], [f"{-0.001 - variant / 100:.4f}"], [b""])
            self._ends[eos_id, variant] = phrase
        return phrase


def _step(key: int) -> int:
    """One step of a 64-bit linear congruential generator (Knuth's MMIX constants); its high bits are good."""
    return (key * 6364136223846793005 + 1442695040888963407) & _MASK


def _cut(answer: Answer, count: int, matched: int | str) -> None:
    answer._eos = None
    answer.body_count = answer.count = answer.text_count = count
    answer.matched = matched


def _stop_at_id(answer: Answer, stop_ids: frozenset[int]) -> None:
    for i, token in enumerate(answer.ids(answer.body_count)):
        if token in stop_ids:
            _cut(answer, i + 1, token)
            answer.text_count = i
            return


def _stop_at_text(answer: Answer, stop_texts: Collection[bytes]) -> None:
    """Ends the answer at the token that completes the first stop text; the text leaves the stop text out."""
    text = answer._column("text", answer.body_count, b"")
    found = [(text.find(stop), stop) for stop in stop_texts if stop]
    found = [(at + len(stop), stop) for at, stop in found if at >= 0]
    if found:
        end, stop = min(found)
        _cut(answer, end, stop.decode("utf-8", "replace"))
        answer.text_count = end - len(stop)
