"""Token ids between an engine's JSON, int32 and text. Native byte order; nothing here knows the arena."""

from collections.abc import Callable
from typing import final

from _typeshed import ReadableBuffer as Buffer

def parse_rows(text: bytes, start: int) -> tuple[bytes, bytes, int] | None:
    """The rows `[[log-probability, id, …], …]` that begin at `start` of a JSON text: ids int32 [n],
    log-probabilities float32 [n] (each the nearest double, rounded), and where they end.

    None is no verdict, but: ask a general reader. It is said of what is no JSON, and of rows that hold
    anything but numbers, null and plain ASCII strings, an id outside [0, 2**31), or an unusual number."""

def ids_text(ids: Buffer) -> bytes:
    """int32 ids as decimal text, each followed by a comma. BadArgument: not a multiple of four bytes."""

@final
class TokenBytes:
    """What each id of a byte-level vocabulary stands for, in one block of memory that is filled as ids
    come."""

    def __new__(cls, tokens: int, spell: Callable[[int], bytes]) -> TokenBytes:
        """`spell` gives the bytes of an id; of those in [0, tokens) it is asked once each."""
    def join(self, ids: Buffer) -> bytes:
        """The bytes of int32 ids, one after the other. BadArgument: not a multiple of four bytes."""
    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
