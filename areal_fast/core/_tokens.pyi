"""Token ids between an engine's JSON, int32 and text. Native byte order; nothing here knows the arena."""

from collections.abc import Callable
from typing import final

from _typeshed import ReadableBuffer as Buffer

def cut_rows(text: bytes, name: bytes, stand_in: bytes) -> tuple[bytes, bytes, bytes] | None:
    """The rows `[[log-probability, id, …], …]` behind the only `name:` in a JSON text: ids int32 [n],
    log-probabilities float32 [n] (each the nearest double, rounded), and the text with `stand_in` in their
    place. `name` comes with its quotes.

    None is no verdict, but: ask a general reader. It is said of what is no JSON, of a name that stands there
    twice or behind a backslash, and of rows that hold anything but numbers, null and plain ASCII strings, an
    id outside [0, 2**31), or an unusual number."""

def ids_json(ids: Buffer, before: bytes = b"", after: bytes = b"") -> bytes:
    """int32 ids as decimal text, with commas between them, and what stands around them. BadArgument: not a
    multiple of four bytes."""

@final
class TokenBytes:
    """What each id of a byte-level vocabulary stands for, in one block of memory."""

    def __new__(
        cls, tokens: int, spell: Callable[[int], bytes], spelled: tuple[bytes, bytes] | None = None
    ) -> TokenBytes:
        """`spell` gives the bytes of an id; of those in [0, tokens) it is asked once each, when they come,
        and not for those that `spelled` (core._bpe.BytePairs.take_spelled) has. BadArgument: not of that
        form."""
    def join(self, ids: Buffer) -> bytes:
        """The bytes of int32 ids, one after the other. BadArgument: not a multiple of four bytes."""
    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
