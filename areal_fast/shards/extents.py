"""Which bytes of a pool are free: a best-fit allocator over sorted extents, pure and small.

Invariants (checked by the property tests against a byte map): free extents are disjoint, sorted, never
empty and never touch each other, so a freed neighbour is always merged; every offset and length is a
multiple of ALIGNMENT. Taking is O(free extents), which fragmentation keeps in the hundreds; giving back is
O(log) and a list insert.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

ALIGNMENT: Final = 512
"""Device copies are fastest from and to multiples of this, and no kernel asks for more."""


class Extents:
    """All of [0, nbytes) is free at first. What does not fill a whole ALIGNMENT at the end is never used."""

    def __init__(self, nbytes: int) -> None:
        size = nbytes // ALIGNMENT * ALIGNMENT
        self.size = size
        self._at: list[int] = [0] if size else []
        self._len: list[int] = [size] if size else []
        self.free_bytes = size

    @staticmethod
    def length(nbytes: int) -> int:
        """What `nbytes` take up: rounded up, never nothing."""
        return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT

    @property
    def largest(self) -> int:
        """Bytes of the longest free extent."""
        return max(self._len, default=0)

    def take(self, nbytes: int) -> int | None:
        """Offset of `length(nbytes)` bytes out of the smallest extent that holds them, or None."""
        need = self.length(nbytes)
        best = -1
        for i, size in enumerate(self._len):
            if size >= need and (best < 0 or size < self._len[best]):
                best = i
                if size == need:
                    break
        if best < 0:
            return None
        offset = self._at[best]
        self._cut(best, offset, need)
        return offset

    def occupy(self, offset: int, nbytes: int) -> bool:
        """Take exactly these bytes; False (and nothing taken) if they are not all free."""
        need = self.length(nbytes)
        i = bisect_right(self._at, offset) - 1
        if i < 0 or offset % ALIGNMENT or offset + need > self._at[i] + self._len[i]:
            return False
        self._cut(i, offset, need)
        return True

    def give(self, offset: int, nbytes: int) -> None:
        """Free what `take` or `occupy` took. ValueError if any of it is free already or outside."""
        size = self.length(nbytes)
        i = bisect_right(self._at, offset)
        after = self._at[i] if i < len(self._at) else self.size
        before = self._at[i - 1] + self._len[i - 1] if i else 0
        if offset % ALIGNMENT or offset < before or offset + size > after:
            raise ValueError(f"{size} bytes at {offset} are not taken")
        self.free_bytes += size
        if i and before == offset:
            i -= 1
            offset, size = self._at[i], self._len[i] + size
            del self._at[i], self._len[i]
        if i < len(self._at) and offset + size == self._at[i]:
            size += self._len[i]
            del self._at[i], self._len[i]
        self._at.insert(i, offset)
        self._len.insert(i, size)

    def _cut(self, i: int, offset: int, need: int) -> None:
        """Take [offset, offset + need) out of the free extent i, which holds it."""
        start, size = self._at[i], self._len[i]
        del self._at[i], self._len[i]
        end = offset + need
        if end < start + size:
            self._at.insert(i, end)
            self._len.insert(i, start + size - end)
        if offset > start:
            self._at.insert(i, start)
            self._len.insert(i, offset - start)
        self.free_bytes -= need
