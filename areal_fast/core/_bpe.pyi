"""Text to token ids by a byte-level byte-pair encoder, whose parts are given as data. Nothing here knows
tokenizer files or Unicode."""

from collections.abc import Callable, Sequence
from typing import final

# A set: bits over classes of characters, 0 to 60. A step: a set, or spellings of up to four sets each, of
# which one may stand there, in this order; how often at least and at most (None: any number; of spellings 0
# or 1).
_Step = tuple[int | Sequence[Sequence[int]], int, int | None]
# A way: what may not follow it (0: anything may), and its steps.
_Way = tuple[int, Sequence[_Step]]

@final
class BytePairs:
    """The tables of one tokenizer: about 15 bytes a merge, and 0.9 MB. Any thread may encode: the GIL is held
    for texts below 32 KiB, and longer ones share nothing."""

    def __new__(
        cls,
        alphabet: str,
        vocabulary: bytes,
        merges: bytes,
        whole_words: bool,
        classes: list[tuple[int, bool, list[tuple[int, int]]]],
        splits: list[Sequence[_Way]],
        normalize: Callable[[str], str] | None,
    ) -> BytePairs:
        """`alphabet`: the character by which tokens spell each of the 256 bytes. `vocabulary`: valid JSON,
        {"spelled": id, …} with ascending ids, in which are all bytes, both parts of every merge and what
        they make. `merges`: valid JSON, [["left", "right"], …] by rank. `whole_words`: a word
        that is in the vocabulary is that token, whatever the merges say. `classes`: each one's number,
        whether it is quiet (`normalize` changes no text of such classes; it must change no ASCII either),
        and its code points as [start, stop); ASCII must be covered. `splits` are applied one after another.
        BadArgument: more than the tables hold (csrc/bpe.h), or what makes no sense."""

    def encode(self, text: str) -> bytes | None:
        """The ids as int32. None: this text is not for here, since it has a character of no class, a lone
        surrogate or a word of more than 1 MiB, or is long and has to be normalized."""
    def take_spelled(self) -> tuple[bytes, bytes] | None:
        """What core._tokens.TokenBytes takes: where each id's bytes begin, uint32 [ids + 1], and all bytes;
        an id whose spelling is no bytes has none. None the second time: it is given away."""

    @property
    def size_bytes(self) -> int:
        """Memory of the tables."""
