"""Encoding by word: new text, of which most words were seen before.

A byte-level BPE tokenizer (GPT-2, Qwen, Llama 3) cuts text into words by a regular expression and encodes
each word by itself, so a word's ids depend on the word alone. The encoder takes about 1 µs a token to do
that again and again; here the ids come from a dictionary: 35 µs instead of 150 for 138 tokens of prose (2
vCPU Ice Lake, Qwen vocabulary).

What is ASCII is cut by Python's `re`: there, what a pattern's Unicode classes contain can be written down
(`\\p{L}` is A-Za-z, `\\p{N}` 0-9, `\\s` what re.ASCII says), and Unicode normal forms change nothing. What
is not ASCII is not cut into words here, since two libraries' Unicode tables need not agree. It is taken in
chunks: text is divided before each space that follows a non-space. No word of these patterns holds a
non-space and then a space, whether a word ends there does not depend on what follows, and no normal form
composes across a space; so a chunk's ids, too, depend on the chunk alone, and the plain encoder is asked
for each new one.

A tokenizer that is built in another way, or has added tokens that are matched inside text, is refused; so
is one that fails `self_test`, which compares with the plain encoder on all of ASCII and on samples of
Unicode in many surroundings.

Invariant: `encode(text)` is None or the plain encoder's ids. One thread (the loop's) owns the dictionary,
which is bounded by two generations of at most `limit` entries.
"""

from __future__ import annotations

import random
import re
from itertools import chain, groupby
from typing import Any

import msgspec
from tokenizers import Tokenizer

# what the byte-level pre-tokenizer cuts by if it does so itself (tokenizers' ByteLevel with use_regex)
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ASCII_CLASSES = {
    "L": "A-Za-z",
    "Lu": "A-Z",
    "Ll": "a-z",
    "Lt": "",
    "Lm": "",
    "Lo": "",
    "M": "",
    "N": "0-9",
    "Nd": "0-9",
}
_LONGEST_KEPT = 64
# from one space after a non-space to the next
_CHUNK = re.compile(r"(?s:.)[^ ]*(?:(?<!\S) [^ ]*)*")


class Unsupported(Exception):
    """Why this tokenizer's text is not encoded by word."""


class WordEncoder:
    """Text → ids by a dictionary of words and chunks."""

    def __init__(self, tokenizer: Tokenizer, *, limit: int = 16384) -> None:
        """Raises Unsupported. Runs the self-test: about 0.1 s."""
        self._tokenizer = tokenizer
        self._limit = limit
        self._words = _words_pattern(tokenizer).findall
        self._young: dict[str, list[int]] = {}
        self._old: dict[str, list[int]] = {}
        differing = self.self_test()
        if differing is not None:
            raise Unsupported(f"ids by word differ from the plain encoder's on {differing!r}")
        self._young, self._old = {}, {}

    def encode(self, text: str) -> list[int] | None:
        """The ids of `text` (no added token in it), or None if the plain encoder must be asked."""
        if text.isascii():
            units = self._words(text)
            # a gap in the pattern's matches is a word too, for the tokenizer: leave such text to it
            return self._ids(units) if "".join(units) == text else None
        chunks = _CHUNK.findall(text)
        if len(chunks) == 1:
            return None
        units = []
        for is_ascii, group in groupby(chunks, str.isascii):
            if is_ascii:
                part = "".join(group)
                words = self._words(part)
                if "".join(words) != part:
                    return None
                units += words
            else:
                units += group
        return self._ids(units)

    def _ids(self, units: list[str]) -> list[int] | None:
        young = self._young
        try:
            return list(chain.from_iterable(map(young.__getitem__, units)))
        except KeyError:
            found = list(map(young.get, units))
        new = self._new([unit for unit, ids in zip(units, found, strict=True) if ids is None])
        if new is None:
            return None
        return [
            id for unit, ids in zip(units, found, strict=True) for id in (new[unit] if ids is None else ids)
        ]

    def _new(self, units: list[str]) -> dict[str, list[int]] | None:
        """The ids of units that are not in the young generation; they are, afterwards. None: ask for the
        whole."""
        known: dict[str, list[int]] = {}
        fresh: dict[str, None] = {}
        for unit in units:
            ids = self._old.get(unit)
            if ids is not None:
                known[unit] = ids
            elif unit.isascii() and self._words(unit) != [unit]:
                return None  # by itself this word would be cut otherwise
            else:
                fresh[unit] = None
        if fresh:
            asked = list(fresh)
            encodings = self._tokenizer.encode_batch_fast(asked, add_special_tokens=False)
            known.update((unit, encoding.ids) for unit, encoding in zip(asked, encodings, strict=True))
        if len(self._young) + len(known) > self._limit:
            self._old, self._young = self._young, {}
        self._young.update((unit, ids) for unit, ids in known.items() if len(unit) <= _LONGEST_KEPT)
        return known

    def self_test(self) -> str | None:
        """A text whose ids differ from the plain encoder's, or None."""
        for text in _probes():
            ids = self.encode(text)
            if ids is not None and ids != self._tokenizer.encode(text, add_special_tokens=False).ids:
                return text
        return None


def _words_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """The tokenizer's word pattern for ASCII text. Raises Unsupported."""
    if type(tokenizer.model).__name__ != "BPE" or getattr(tokenizer.model, "dropout", None):
        raise Unsupported("no BPE model, or one with dropout")
    if tokenizer.normalizer is not None and type(tokenizer.normalizer).__name__ not in _NORMAL_FORMS:
        raise Unsupported("a normalizer that may change ASCII")
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.normalized or token.lstrip or token.rstrip or token.single_word:
            raise Unsupported("added tokens that are matched inside text")
    if tokenizer.pre_tokenizer is None:
        raise Unsupported("no pre-tokenizer")
    source = _pattern_of(msgspec.json.decode(tokenizer.pre_tokenizer.__getstate__()))
    try:
        pattern = re.compile(ascii_pattern(source), re.ASCII)
    except re.error as error:
        raise Unsupported(f"a pattern that Python cannot read: {error}") from error
    if pattern.groups or pattern.fullmatch(""):
        raise Unsupported("a pattern with groups, or one that matches nothing")
    return pattern


_NORMAL_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})


def _pattern_of(state: dict[str, Any]) -> str:
    """The regular expression by which a byte-level pre-tokenizer cuts. Raises Unsupported."""
    steps = state["pretokenizers"] if state.get("type") == "Sequence" else [state]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise Unsupported("not byte-level, or with a prefix space")
    if len(steps) == 1 and last.get("use_regex"):
        return _GPT2_PATTERN
    first = steps[0]
    if (
        len(steps) == 2
        and not last.get("use_regex")
        and first.get("type") == "Split"
        and first.get("behavior") == "Isolated"
        and not first.get("invert")
        and isinstance(first.get("pattern", {}).get("Regex"), str)
    ):
        return str(first["pattern"]["Regex"])
    raise Unsupported("a pre-tokenizer of another shape")


def ascii_pattern(source: str) -> str:
    """`source` with its Unicode classes written as what they hold of ASCII. Raises Unsupported."""
    out: list[str] = []
    inside = False  # of [...]
    i = 0
    while i < len(source):
        character = source[i]
        if not character.isascii():
            raise Unsupported("a pattern with characters beyond ASCII")
        if character == "\\":
            following = source[i + 1 : i + 2]
            if following == "p" and (name := re.match(r"\{(\w+)\}", source[i + 2 :])):
                if name[1] not in _ASCII_CLASSES:
                    raise Unsupported(f"a pattern with \\p{{{name[1]}}}")
                members = _ASCII_CLASSES[name[1]]
                out.append(members if inside else f"[{members}]" if members else "(?!)")
                i += 2 + name.end()
                continue
            if following not in "rntsSdDwW.[](){}|?*+^$/'\"\\-" or not following:
                raise Unsupported(f"a pattern with \\{following}")
            out.append(source[i : i + 2])
            i += 2
            continue
        if character == "[":
            if inside:
                raise Unsupported("a pattern with nested classes")
            inside = True
        elif character == "]":
            inside = False
        elif character == "&" and inside:
            raise Unsupported("a pattern with class intersections")
        out.append(character)
        i += 1
    return "".join(out)


_PROSE = (
    "It's what we'd expect: they're GOING to say I'LL, you've, I'm; don't 'quote' O'Brien's.",
    "def f(x, *y):\n\treturn {'a': [1, 2.5e-3], \"b\": x}  # comment\n\n\n    if x >= 10_000:\r\n\r\n  pass",
    "$\\frac{1}{2} \\leq x^{2} + 3y - 4z$ \\(a_1\\)  \n  \\[ \\sum_{i=0}^{n} i \\]   ",
    '{"name": "get_weather", "arguments": {"city": "Paris", "n": 1.50}}\n</tool>',
    "2024-01-02T03:04:05Z 0x1F600 1,234,567.89 50% #1 a@b.co https://x.y/z?q=1&r=2",
    "   leading, trailing   \n \n  \t\t tabs\tand  double  spaces\n",
)


# one of each kind: letters, marks, digits, punctuation, symbols, spaces, joiners, what case folding or
# normal forms touch
_KINDS = (
    "a", "Z", "é", "e\u0301", "你", "ا", "ש", "1", "٣", "½", "Ⅷ", ".", "'", "’", "“", "—", "→", "€", "_",
    "😀", "\u0301", "\u200d", "\ufe0f", "\u00a0", "\u3000", "\u2028", "\u0085", "\n", "\t",
    "\x1c", "ſ", "K", "ﬁ", "가",
    "\u0e33", "\u1160", "\ufeff", "\U0001f1e9", "𝒜", "\U000e0041",
)  # fmt: skip


def _probes() -> list[str]:
    """Prose, code; each ASCII character in many places; each two kinds around each kind of space; random
    mixtures."""
    texts = [*_PROSE, *(text.translate(_TYPOGRAPHIC) for text in _PROSE)]
    for code in range(128):
        c = chr(code)
        texts += [
            c,
            f"a{c}b",
            f"1{c}2",
            f" {c} ",
            f".{c}.",
            f"\n{c}\n",
            c * 3,
            f"{c}'s",
            f"a {c}{c} b",
            f"  {c}a",
        ]
    for left in _KINDS:
        texts += [f"{left}{space}{right}" for right in _KINDS for space in (" ", "  ")]
        texts += [f"x{left} \n{left} \u00a0{left}\n {left}'s {left}"]
    chance = random.Random(20260)
    common = "aB1 \n'.s\t-_" * 3 + "".join(map(chr, range(128)))
    texts += ["".join(chance.choices(common, k=40)) for _ in range(700)]
    mixed = [*_KINDS, " ", " ", " ", " ", "\n", "word", "don", "42"]
    texts += ["".join(chance.choices(mixed, k=16)) for _ in range(700)]
    return texts


_TYPOGRAPHIC = {ord("'"): "’", ord('"'): "”", ord("-"): "—", ord("e"): "é"}
