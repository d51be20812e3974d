"""Encoding by segment: a prompt's token ids, where only text never seen before is encoded.

A conversation is sent again and again with a little more at its end, and its encoding costs the library
about 1 µs a token. But a tokenizer first cuts the text at its added tokens (`<|im_start|>`…), and each piece
between two of them is normalized, split and merged by itself: its ids depend on its text alone. So the text
is cut in the same way here, by one compiled pattern, and the pieces' ids come from a dictionary, as int32, so
a prompt of any length is put together by a join. New pieces are encoded by core/_bpe.pyx where it can be this
tokenizer (bpe.py), in a small part of the library's time, and by the library elsewhere.

Which tokens may cut: those matched on the raw text (not `normalized`) that take nothing from their
neighbours (no `lstrip`, `rstrip`, `single_word`), and that no token of the other kind can overlap. The
pattern takes the leftmost, then the longest token, as tokenizers does. Text from users that spells such a
token is cut just like the real one, because tokenizers itself makes no difference.

Not every tokenizer keeps the promise (Metaspace with prepend_scheme "first" treats the first piece alone
differently), so it is checked at start: `self_test` compares with the plain encoder on texts made from the
tokenizer's own tokens. Where they differ the cache is off and `why_off` says so; ids are then those of the
plain encoder.

Memory is bounded in bytes by two generations: hits in the old one move to the young one; when that is half
the limit, it becomes the old one. One thread (the loop's) owns the cache; encoding new text may happen on any
thread.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Tokenizer

from areal_fast.core._bpe import BytePairs
from areal_fast.engine.bpe import Unsupported, byte_pairs

# what an entry costs beside its two buffers: str, bytes object, dictionary slot
_ENTRY_OVERHEAD_BYTES = 200
# how many times faster byte pairs are than the library's encoder, at their worst: on words never met before
_PAIRS_FASTER = 4


class Prompt:
    """Token ids ready for the record. Immutable."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data
        """int32 ids in native byte order: what the arena stores."""

    @classmethod
    def of(cls, ids: Iterable[int]) -> Prompt:
        """From any iterable of ids; int32 buffers (array('i'), numpy) are copied whole."""
        if hasattr(ids, "tobytes"):
            view = memoryview(ids)  # type: ignore[arg-type]
            values = array("i")
            if view.itemsize == 4 and view.contiguous:
                values.frombytes(view.cast("B"))
            else:
                values.extend(view.tolist())
        else:
            values = array("i", ids)
        return cls(values.tobytes())

    def __len__(self) -> int:
        return len(self.data) // 4

    def ids(self) -> array[int]:
        """The ids as array('i'), a fresh one."""
        values = array("i")
        values.frombytes(self.data)
        return values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompt) and other.data == self.data

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return f"Prompt({len(self)} tokens)"


def literals_pattern(literals: Iterable[str]) -> str:
    """A regular expression that matches the longest of `literals` at a place; prefixes are shared, as in a
    trie.

    Python's engine tries alternatives one by one, so a plain alternation of a thousand tokens costs a
    thousand comparisons at each `<`; this costs one a character.
    """
    trie: dict[str, dict] = {}  # type: ignore[type-arg]
    for literal in literals:
        node = trie
        for character in literal:
            node = node.setdefault(character, {})
        node[""] = {}

    def write(node: dict[str, dict]) -> str:  # type: ignore[type-arg]
        branches = [
            re.escape(character) + write(child) for character, child in sorted(node.items()) if character
        ]
        if not branches:
            return ""
        if len(branches) == 1 and "" not in node:
            return branches[0]
        return f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")

    return write(trie)


def cutting_tokens(added: Iterable[AddedToken]) -> list[str]:
    """The added tokens at which text may be cut (see above), longest first."""
    raw = [token for token in added if not token.normalized and token.content]
    plain = [t.content for t in raw if not (t.lstrip or t.rstrip or t.single_word)]
    others = [t.content for t in raw if t.lstrip or t.rstrip or t.single_word]
    safe = [token for token in plain if not any(_could_hide(other, token) for other in others)]
    # a plain token that is left out hides others in the same way
    left_out = [token for token in plain if token not in set(safe)]
    if any(_could_hide(other, token) for other in left_out for token in safe):
        return []
    return sorted(safe, key=len, reverse=True)


def _could_hide(other: str, token: str) -> bool:
    """Could `other`, matched first, cover the beginning of an occurrence of `token`?"""
    if token in other and token != other:
        return True
    return any(other.endswith(token[:n]) for n in range(1, min(len(other), len(token))))


class SegmentEncoder:
    """text → Prompt for one `tokenizers.Tokenizer`, with the cache described above."""

    def __init__(self, tokenizer: Tokenizer, *, limit_bytes: int = 32 << 20) -> None:
        """`limit_bytes` 0 switches the cache off. Runs the self-tests and builds the tables of byte pairs:
        some tenths of a second."""
        self._tokenizer = tokenizer
        self._half_bytes = limit_bytes // 2
        self._young: dict[str, bytes] = {}
        self._old: dict[str, bytes] = {}
        self._young_bytes = 0
        self._specials: dict[str, bytes] = {}
        self._cut: re.Pattern[str] | None = None
        self.why_off = ""
        """Why the cache is not used; empty if it is."""
        self.hits = 0
        self.misses = 0
        self._pairs: BytePairs | None = None
        self.why_no_pairs = "the segment cache is off"
        """Why all new text is left to the library (bpe.py); empty if it is not."""
        self._prepare()

    def take_spelled(self) -> tuple[bytes, bytes] | None:
        """The vocabulary's bytes, once, where new text is encoded from them (core._bpe)."""
        return None if self._pairs is None else self._pairs.take_spelled()

    # -- encoding
    # ---------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> Prompt:
        """The ids of `text`, special tokens recognised in it, none added around it. Blocks while it
        encodes."""
        prompt = self.encode_within(text, sys.maxsize)
        assert prompt is not None
        return prompt

    def encode_within(self, text: str, work: int) -> Prompt | None:
        """As `encode`, or None if that would be more `work` than this: characters that the library encodes
        (about 4 a µs)."""
        if self._cut is None:
            return _prompt_of([self._plain(text)]) if len(text) <= work else None
        segments = self._cut.split(text)
        young = self._young
        found: list[bytes | None]
        try:
            found = list(map(young.__getitem__, segments))
        except KeyError:
            found = list(map(young.get, segments))
            missing = self._promote(segments, found)
            if missing:
                least = sum(map(len, missing))
                if (least if self._pairs is None else least // _PAIRS_FASTER) > work:
                    return None  # nothing is begun in vain
                new: dict[str, bytes] = {}
                for segment in missing:
                    encoded = self._encode_new(segment, work)
                    if encoded is None:
                        return None
                    new[segment], cost = encoded
                    work -= cost
                self.misses += len(missing)
                self._store(new)
                found = [new[segments[i]] if entry is None else entry for i, entry in enumerate(found)]
            self._rotate()
        self.hits += len(found)
        return _prompt_of(found)  # type: ignore[arg-type]

    def missing(self, text: str) -> list[str]:
        """The distinct segments of `text` that would have to be encoded, in order."""
        if self._cut is None:
            return [text]
        young, old = self._young, self._old
        return list(dict.fromkeys(s for s in self._cut.split(text) if s not in young and s not in old))

    def encode_segments(self, segments: Sequence[str]) -> list[bytes]:
        """Encode segments; any thread may do it. The GIL is released while long ones are encoded."""
        found = [None if self._pairs is None else self._pairs.encode(segment) for segment in segments]
        left = [segment for segment, ids in zip(segments, found, strict=True) if ids is None]
        if not left:
            return found  # type: ignore[return-value]
        encodings = iter(self._tokenizer.encode_batch_fast(left, add_special_tokens=False))
        return [_entry(next(encodings).ids) if ids is None else ids for ids in found]

    def segment_within(self, segment: str, work: int) -> tuple[bytes, int] | None:
        """The int32 ids of text in which no token cuts, and how much work that was; None if it would be more
        than `work`. Nothing is kept of it. The cache must be on."""
        entry = self._young.get(segment) or self._old.get(segment)
        return (entry, 0) if entry else self._encode_new(segment, work)

    def _encode_new(self, segment: str, work: int) -> tuple[bytes, int] | None:
        cost = len(segment)
        if self._pairs is not None and cost // _PAIRS_FASTER <= work:
            ids = self._pairs.encode(segment)
            if ids is not None:
                return ids, cost // _PAIRS_FASTER
        return (self.encode_segments([segment])[0], cost) if cost <= work else None

    def assemble(self, text: str, segments: Sequence[str], entries: Sequence[bytes]) -> Prompt:
        """`text`'s Prompt once its `missing()` segments were encoded elsewhere. Loop thread only."""
        if self._cut is None:
            return _prompt_of(entries)
        self._store(dict(zip(segments, entries, strict=True)))
        return self.encode(text)

    def clear(self) -> None:
        """Forget every segment and start counting anew."""
        self._young, self._old, self._young_bytes = dict(self._specials), {}, 0
        self.hits = self.misses = 0

    @property
    def size_bytes(self) -> int:
        """What the young generation holds; the old one holds at most `limit_bytes` / 2 and one prompt
        more."""
        return self._young_bytes

    @property
    def cut(self) -> re.Pattern[str] | None:
        """Splits text into segments and, between them, the tokens at which it is cut; None: the cache is
        off."""
        return self._cut

    @property
    def tokens(self) -> list[str]:
        """The tokens at which text is cut."""
        return [token for token in self._specials if token]

    # -- inside
    # -----------------------------------------------------------------------------------------------------

    def _promote(self, segments: Sequence[str], found: list[bytes | None]) -> list[str]:
        """Fill gaps of `found` from the old generation; the distinct segments that are in neither."""
        missing: dict[str, None] = {}
        for i, entry in enumerate(found):
            if entry is None:
                segment = segments[i]
                entry = self._old.get(segment)
                if entry is None:
                    missing[segment] = None
                else:
                    found[i] = entry
                    self._store({segment: entry})
        return list(missing)

    def _store(self, entries: Mapping[str, bytes]) -> None:
        for segment, entry in entries.items():
            if segment not in self._young:
                self._young[segment] = entry
                self._young_bytes += _cost(segment, entry)

    def _rotate(self) -> None:
        if self._young_bytes > self._half_bytes:
            self._old = self._young
            self._young = dict(self._specials)
            self._young_bytes = 0

    def _plain(self, text: str) -> bytes:
        return _entry(self._tokenizer.encode(text, add_special_tokens=False).ids)

    # -- start
    # ------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._half_bytes <= 0:
            self.why_off = "no memory granted"
            return
        if self._tokenizer.encode_special_tokens:
            self.why_off = "the tokenizer splits special tokens"
            return
        tokens = cutting_tokens(self._tokenizer.get_added_tokens_decoder().values())
        if not tokens:
            self.why_off = "no added token at which text can be cut"
            return
        self._cut = re.compile(f"({literals_pattern(tokens)})")
        self._specials = {token: self._plain(token) for token in tokens}
        self._specials[""] = b""
        self._young = dict(self._specials)
        differing = self.self_test(tokens)
        if differing is not None:
            self._cut = None
            self.why_off = f"ids by segment differ from the plain encoder's on {differing!r}"
        self.clear()
        if self._cut is not None:
            try:
                self._pairs, self.why_no_pairs = byte_pairs(self._tokenizer), ""
            except Unsupported as reason:
                self.why_no_pairs = str(reason)

    def self_test(self, tokens: Sequence[str]) -> str | None:
        """A text on which encoding by segment differs from encoding as a whole, or None."""
        for text in probes(tokens):
            whole = self._tokenizer.encode(text, add_special_tokens=False).ids
            if self.encode(text).ids().tolist() != whole:
                return text
        return None


# what may stand next to a token: letters, digits, whitespace of every kind, marks that combine or join with
# what is before them, text that normalizers change, halves of tokens
_NEIGHBOURS = (
    "", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\ufeff", "\x00", "\x1c",
    "a", " a", "a ", "A", "1", " 1", "12345", ".", " .", "'s", "▁", " ▁", "_", "##", "<", "<|", "|>",
    "\u0301", "e\u0301", "é", "ﬁ", "Å", "ß", "İ", "ǆ", "①", "\u200d", "\ufe0f", "👩\u200d👩\u200d👧",
    "你好", "가", "한국", "שלום", "مرحبا",
    "user\n", "assistant\n", " system", "Hello, world!\n  indented\n\n\n", "<0x0A>",
)  # fmt: skip


def probes(tokens: Sequence[str]) -> Iterable[str]:
    """Texts that would show a tokenizer whose pieces depend on their neighbours, made from its own tokens."""
    few = list(tokens[:4]) + list(tokens[-4:])
    for token in dict.fromkeys(few):
        yield token
        yield token + token
        for neighbour in _NEIGHBOURS:
            yield neighbour + token
            yield token + neighbour
            yield f"x{neighbour}{token}{neighbour}y"
    for left, right in zip(_NEIGHBOURS, reversed(_NEIGHBOURS), strict=True):
        yield left + "".join(token + right for token in few)
    # every token at least once, with halves of itself around it
    for token in tokens:
        yield f"a {token[:-1]}{token}{token[1:]} b"
    # growing first segments: position-dependent pieces (a prefix for the first word only) show here
    yield from (few[0].join(_NEIGHBOURS[:n]) for n in range(2, len(_NEIGHBOURS), 7))


def _entry(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _cost(segment: str, entry: bytes) -> int:
    return len(segment) * 2 + len(entry) + _ENTRY_OVERHEAD_BYTES


def _prompt_of(entries: Sequence[bytes]) -> Prompt:
    return Prompt(b"".join(entries))
