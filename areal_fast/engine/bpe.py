"""Which tokenizers core/_bpe.pyx can be, and what it is built from.

A byte-level BPE tokenizer (GPT-2, Qwen, Llama 3, o200k, DeepSeek) cuts text into words by regular expressions
and merges the bytes of each word. Whether a tokenizer is one is decided by its parts, never by its name: a
BPE model over an alphabet of bytes, a pre-tokenizer of splits and ByteLevel, no normalizer but a Unicode
normal form, no added token that is matched inside text.

Patterns are read as far as these tokenizers need it: alternatives of characters and sets with `?`, `*`, `+`,
`{m,n}`, a choice of spellings `(?i:'s|'t)` and `(?!…)` at the end. What a set contains is not looked up in
Unicode's tables, of which every library has its own version: the tokenizer's own library is asked, by cutting
a text of all code points by that set. Code points are then divided into classes that the pattern cannot tell
apart. Nobody asks about rare scripts; text with such characters is left to the library.

Normal forms: text is handed to the library's normalizer unless all its characters are "quiet": ASCII, or for
NFC ranges of which Unicode's stability policy guarantees that no text of them is ever changed
(https://www.unicode.org/policies/stability_policy.html; UAX #15, quick check).

What is built is compared with the library on all of ASCII, on samples of Unicode in many surroundings and on
mixtures; `byte_pairs` refuses a tokenizer that differs anywhere.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import Split

from areal_fast.core._bpe import BytePairs
from areal_fast.core.codes import BadArgument
from areal_fast.engine.detokenize import byte_alphabet

# what ByteLevel cuts by if it does so itself (tokenizers, pre_tokenizers/byte_level.rs)
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MOST_CLASSES = 60

# code points that are asked about one by one: the first plane but for the runs below and surrogates,
# mathematical letters, emoji and their neighbours, tags, variation selectors
_ASKED = (
    (0, 0x3400), (0x4DC0, 0x4E00), (0xA000, 0xAC00), (0xD7A4, 0xD800), (0xF900, 0x10000),
    (0x1D400, 0x1D800), (0x1F000, 0x1FC00), (0xE0000, 0xE01F0),
)  # fmt: skip
# ideographs, Hangul syllables, private use: no property that a pattern can name tells those of one run apart;
# the first and last of each are asked about
_UNIFORM = (
    (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900), (0x20000, 0x2A6D7),
)  # fmt: skip
_ENDS = 16
# no character here has another normal form NFC, can be composed with what is before it, or moves
_QUIET_IN_NFC = (
    (0, 0x300), (0x400, 0x483), (0x48A, 0x530), (0x5D0, 0x5EB), (0x200B, 0x200E), (0x2010, 0x205F),
    (0x20A0, 0x20C0), (0x2190, 0x2300), (0x2460, 0x2800), (0x3001, 0x3021), (0x3041, 0x3097),
    (0x30A0, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900),
    (0xFE0E, 0xFE10), (0xFF01, 0xFF61), (0x1F300, 0x1F650), (0x1F680, 0x1F700), (0x1F900, 0x1FA00),
    (0x20000, 0x2A6D7),
)  # fmt: skip


class Unsupported(Exception):
    """Why this tokenizer's text is left to the library."""


class _Model(msgspec.Struct):
    """A BPE model as the library writes it."""

    vocab: msgspec.Raw
    merges: msgspec.Raw
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    ignore_merges: bool = False


def byte_pairs(tokenizer: Tokenizer) -> BytePairs:
    """The encoder of this tokenizer's text without added tokens in it. Raises Unsupported. Takes tenths of a
    second."""
    if type(tokenizer.model).__name__ != "BPE":
        raise Unsupported("no BPE model")
    normal_form = type(tokenizer.normalizer).__name__
    if tokenizer.normalizer is not None and normal_form not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise Unsupported("a normalizer that may change ASCII")
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.normalized or token.lstrip or token.rstrip or token.single_word:
            raise Unsupported("added tokens that are matched inside text")
    if tokenizer.pre_tokenizer is None:
        raise Unsupported("no pre-tokenizer")
    patterns = _patterns(msgspec.json.decode(tokenizer.pre_tokenizer.__getstate__()))
    splits = [_read(pattern) for pattern in patterns]
    quiet = {"NFC": _QUIET_IN_NFC, "NoneType": _ASKED + _UNIFORM}.get(normal_form, ((0, 0x80),))
    classes, sets = _classes(splits, quiet)
    model = _model(tokenizer)
    alphabet = byte_alphabet()
    try:
        made = BytePairs(
            "".join(sorted(alphabet, key=alphabet.__getitem__)),
            bytes(model.vocab),
            bytes(model.merges),
            model.ignore_merges,
            classes,
            [[way.numbered(sets) for way in ways] for ways in splits],
            None if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str,
        )
    except BadArgument as error:
        raise Unsupported(str(error)) from error
    differing = differs(made, tokenizer)
    if differing is not None:
        raise Unsupported(f"ids differ from the library's on {differing!r}")
    return made


def _model(tokenizer: Tokenizer) -> _Model:
    """Raises Unsupported."""
    model = msgspec.json.decode(tokenizer.model.__getstate__(), type=_Model)
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise Unsupported("a BPE model with dropout, or with marks of where words begin or end")
    return model


def _patterns(state: dict[str, Any]) -> list[str]:
    """The regular expressions by which a byte-level pre-tokenizer cuts, one after another. Raises
    Unsupported."""
    steps = state["pretokenizers"] if state.get("type") == "Sequence" else [state]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise Unsupported("not byte-level, or with a prefix space")
    patterns = []
    for step in steps[:-1]:
        source = step.get("pattern", {}).get("Regex") if step.get("type") == "Split" else None
        if not isinstance(source, str) or step.get("behavior") != "Isolated" or step.get("invert"):
            raise Unsupported("a pre-tokenizer of another shape")
        patterns.append(source)
    if last.get("use_regex"):
        patterns.append(_GPT2_PATTERN)
    if not patterns:
        raise Unsupported("text that is not cut into words")
    return patterns


# -- patterns
# ----------------------------------------------------------------------------------------------------------


class _Step(msgspec.Struct):
    """So many characters of a set; or one of some spellings, each a list of sets. Sets as the pattern writes
    them."""

    members: str | list[list[str]]
    least: int = 1
    most: int | None = 1

    def sets(self) -> Iterator[str]:
        if isinstance(self.members, str):
            yield self.members
        else:
            for spelling in self.members:
                yield from spelling

    def numbered(self, sets: dict[str, int]) -> tuple[Any, int, int | None]:
        members: Any = (
            sets[self.members]
            if isinstance(self.members, str)
            else [[sets[source] for source in spelling] for spelling in self.members]
        )
        return members, self.least, self.most


class _Way(msgspec.Struct):
    """One alternative of a pattern."""

    steps: list[_Step]
    barred: str | None = None

    def sets(self) -> Iterator[str]:
        for step in self.steps:
            yield from step.sets()
        if self.barred is not None:
            yield self.barred

    def numbered(self, sets: dict[str, int]) -> tuple[int, list[tuple[Any, int, int | None]]]:
        return (0 if self.barred is None else sets[self.barred]), [step.numbered(sets) for step in self.steps]


# one character or set, in which no set is nested
_ESCAPED = r"\\[pP]\{\^?\w+\}|\\[^\w]|\\[rntsSdDwW]"
_SET = rf"{_ESCAPED}|\[\^?(?:{_ESCAPED}|[^\]\[\\])+\]|[^\\\[\](){{}}|?*+.^$]"
_TOKEN = re.compile(
    rf"(?P<barred>\(\?!(?P<what>{_SET})\))"
    rf"|\((?P<fold>\?i:|\?:)(?P<choice>(?:{_SET})+(?:\|(?:{_SET})+)*)\)(?P<optional>\??)(?![*+?{{])"
    rf"|(?P<set>{_SET})(?P<times>[?*+]|\{{\d+(?:,\d*)?\}})?(?![*+?{{])"
    r"|(?P<bar>\|)",
    re.DOTALL,
)
_TIMES: dict[str | None, tuple[int, int | None]] = {None: (1, 1), "?": (0, 1), "*": (0, None), "+": (1, None)}


def _read(pattern: str) -> list[_Way]:
    """The alternatives of a pattern. Raises Unsupported."""
    ways = [_Way([])]
    at = 0
    while at < len(pattern):
        found = _TOKEN.match(pattern, at)
        if found is None or (ways[-1].barred is not None and not found["bar"]):
            raise Unsupported(f"a pattern with {pattern[at : at + 12]}")
        at = found.end()
        if found["bar"]:
            ways.append(_Way([]))
        elif found["barred"]:
            ways[-1].barred = found["what"]
        elif found["choice"]:
            fold = "(?i:{})" if found["fold"] == "?i:" else "{}"
            spellings = [[fold.format(one) for one in _sets(each)] for each in _choices(found["choice"])]
            ways[-1].steps.append(_Step(spellings, 0 if found["optional"] else 1))
        else:
            ways[-1].steps.append(_Step(found["set"], *_times(found["times"])))
    for way in ways:
        if not any(step.least for step in way.steps):
            raise Unsupported("a pattern that matches nothing")
    return ways


def _sets(source: str) -> list[str]:
    return re.findall(_SET, source, re.DOTALL)


def _choices(source: str) -> Iterator[str]:
    one = ""
    for part in re.findall(rf"{_SET}|\|", source, re.DOTALL):
        if part == "|":
            yield one
            one = ""
        else:
            one += part
    yield one


def _times(source: str | None) -> tuple[int, int | None]:
    if source in _TIMES:
        return _TIMES[source]
    assert source is not None
    least, comma, most = source[1:-1].partition(",")
    times = int(least), int(most) if most else None if comma else int(least)
    if times[0] > 16 or (times[1] or 1) > 1024 or (times[1] is not None and times[1] < max(times[0], 1)):
        raise Unsupported(f"a pattern with {source}")
    return times


# -- classes of characters
# ----------------------------------------------------------------------------------------------


def _classes(
    splits: Sequence[Sequence[_Way]], quiet: Iterable[tuple[int, int]]
) -> tuple[list[tuple[int, bool, list[tuple[int, int]]]], dict[str, int]]:
    """Code points by class, as BytePairs takes them, and each set of the patterns as the classes it holds.
    Raises Unsupported."""
    sources = list(dict.fromkeys(s for ways in splits for way in ways for s in way.sets()))
    alike = list(_alike(sources))
    asked = [point for start, stop in _ASKED for point in range(start, stop)]
    asked += [
        p for start, stop in alike for p in range(start, stop) if p < start + _ENDS or p >= stop - _ENDS
    ]
    text = "".join(map(chr, asked))
    is_quiet = bytearray(0x110000)
    for start, stop in quiet:
        is_quiet[start:stop] = b"\1" * (stop - start)
    of_sets = [is_quiet[point] << len(sources) for point in asked]  # bits: which sets hold it
    for number, source in enumerate(sources):
        for start, stop in _held(source, text):
            for i in range(start, stop):
                of_sets[i] |= 1 << number
    by_point = dict(zip(asked, of_sets, strict=True))
    runs = [(point, point + 1, bits) for point, bits in by_point.items()]
    for start, stop in alike:
        if len({by_point[p] for p in range(start, stop) if p in by_point}) != 1:
            raise Unsupported(f"a pattern that tells characters from {start:#x} to {stop:#x} apart")
        runs.append((start, stop, by_point[start]))
    kinds = {bits: number for number, bits in enumerate(dict.fromkeys(bits for _, _, bits in runs))}
    if len(kinds) > _MOST_CLASSES:
        raise Unsupported("a pattern that tells too many kinds of characters apart")
    members: dict[int, list[tuple[int, int]]] = {}
    for start, stop, bits in runs:
        members.setdefault(bits, []).append((start, stop))
    classes = [(kinds[bits], bool(bits >> len(sources)), ranges) for bits, ranges in members.items()]
    sets = {
        source: sum(1 << kind for bits, kind in kinds.items() if bits >> number & 1)
        for number, source in enumerate(sources)
    }
    return classes, sets


def _alike(sources: Sequence[str]) -> Iterator[tuple[int, int]]:
    """_UNIFORM, cut at each character that a set writes itself."""
    written = {ord(character) for source in sources for character in source if not character.isascii()}
    for start, stop in _UNIFORM:
        cuts = sorted({start, stop, *(p for each in written for p in (each, each + 1) if start < p < stop)})
        yield from pairwise(cuts)


def _held(source: str, text: str) -> Iterator[tuple[int, int]]:
    """The parts of `text` whose characters the set holds, by the library's own reading of it."""
    try:
        split = Split(Regex(f"(?:{source})+"), "removed")
    except Exception as error:  # the package raises bare Exception
        raise Unsupported(f"a pattern with {source}") from error
    at = 0
    for _, (start, stop) in split.pre_tokenize_str(text):
        if at < start:
            yield at, start
        at = stop
    if at < len(text):
        yield at, len(text)


# -- comparing with the library
# ----------------------------------------------------------------------------------------------


def differs(made: BytePairs, tokenizer: Tokenizer) -> str | None:
    """A text whose ids are not the library's, or None."""
    texts = probes()
    for text, encoding in zip(
        texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        ids = made.encode(text)
        if ids is not None and memoryview(ids).cast("i").tolist() != encoding.ids:
            return text
    return None


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


def probes() -> list[str]:
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
