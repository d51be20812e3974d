"""A reply of shards, as JSON encoded while it is sent, or as raw bytes sent from where they lie.

Theory. A batch of 32 MiB is 44 MB of JSON. Made as a whole it costs fresh pages, which are dearer than the
encoding and the socket together, and another request waits for all of it. So a reply first finds everything
it needs (all shards exist, their sizes are known, hence Content-Length), and then makes pieces of half a
MiB, each in memory that the last one has just left, still in the cache. Measured: 32 × 1 MiB in 17 ms of CPU
with HTTP and the socket, 42 if made as a buffer a shard, 83 if as one.

Invariants: what was found stays as it is until `close`, whatever is cleared or replaced meanwhile: every part
holds its shard's view, and so a pin. The pieces' sizes add up to `size`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from areal_fast.core import base64_encode
from areal_fast.protocol import wire
from areal_fast.protocol.wire import Form
from areal_fast.shards import raw
from areal_fast.shards.description import Description
from areal_fast.shards.small_floats import SMALL_FLOATS, widened

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

RAW_STEP_BYTES = 8 << 20
"""Raw bytes given to the kernel at a time. They are views and cost no memory however many there are; what
counts is how often the loop comes back for more: 1 MiB at a time took 1.2 times the CPU."""
STEP_BYTES = 196608
"""Shard bytes encoded at a time: whole groups of three, of bfloat16's elements and of a quarter, too."""
SENT_STEP_BYTES = 2 * STEP_BYTES
"""The same where they are sent: half the turns of the loop and of its writes, and still in the cache."""


class Part(NamedTuple):
    """One shard of a reply. data: its `nbytes` bytes as kept, or what makes them when their turn has come, or
    several buffers that follow each other. slot: the arena's, if `data` is its memory and it is all of it."""

    dtype: str
    shape: tuple[int, ...]
    form: Form
    nbytes: int
    data: Buffer | Callable[[], Any] | list[memoryview]
    slot: int = -1

    @property
    def size(self) -> int:
        """Of its JSON."""
        if self.form == "meta":
            return sum(map(len, self.frame()))
        wide = self.nbytes * (2 if self.form == "bf16" else 4 if self.is_small else 1)
        return sum(map(len, self.frame())) + (wide + 2) // 3 * 4

    @property
    def is_small(self) -> bool:
        """An 8-bit float as its own bytes, which JSON widens (small_floats.py)."""
        return self.form == "own" and self.dtype in SMALL_FLOATS

    @property
    def what(self) -> Description:
        return Description(self.dtype, self.shape, self.form)

    def content(self) -> memoryview:
        """Its bytes as kept."""
        if self.form == "meta":
            return memoryview(b"")
        if isinstance(self.data, list):
            return memoryview(b"".join(self.data))
        data = memoryview(self.data() if callable(self.data) else self.data)
        return data.cast("B") if data.nbytes else memoryview(b"")

    def frame(self) -> tuple[bytes, bytes]:
        return wire.frame(self.dtype, self.shape, self.form)

    def pieces(self, step: int) -> Iterator[bytes]:
        before, after = self.frame()
        if self.form == "meta":
            yield before + after
            return
        if isinstance(self.data, list):
            yield before
            yield from _joined(self.data, min(step, STEP_BYTES))
            yield after
            return
        data = self.content()
        at, bf16, small = 0, self.form == "bf16", self.is_small
        if small:
            step = min(step, STEP_BYTES) // 4
        elif bf16:
            step //= 2
        while len(data) - at > step:
            piece = data[at : at + step]
            yield base64_encode(widened(piece, self.dtype) if small else piece, before, bf16=bf16)
            at, before = at + step, b""
        piece = data[at:]
        yield base64_encode(widened(piece, self.dtype) if small else piece, before, after, bf16=bf16)


def _joined(buffers: Sequence[memoryview], step: int) -> Iterator[bytes]:
    """Base64 of the buffers as one."""
    carry = b""
    for data in buffers:
        if carry:
            first = min(3 - len(carry), len(data))
            carry += data[:first]
            data = data[first:]
            if len(carry) < 3:
                continue
            yield base64_encode(carry)
        whole = len(data) // 3 * 3
        for at in range(0, whole, step):
            yield base64_encode(data[at : min(at + step, whole)])
        carry = bytes(data[whole:])
    yield base64_encode(carry)


class Outgoing:
    """Shards found for one reply: one alone, or a list. Close it when it is sent or not wanted any more."""

    def __init__(self, parts: Sequence[Part], *, listed: bool) -> None:
        self._parts = list(parts)
        self._listed = listed
        commas = max(0, len(self._parts) - 1) + 2 if listed else 0
        self.size = sum(part.size for part in self._parts) + commas

    def pieces(self, step: int = SENT_STEP_BYTES) -> Iterator[bytes]:
        """The JSON, to be joined; each piece is of at most `step` (a multiple of 12) bytes of shards,
        half of that if they are widened."""
        lead = b"["
        for part in self._parts:
            if self._listed:
                yield lead
                lead = b","
            yield from part.pieces(step)
        if self._listed:
            yield b"]" if self._parts else b"[]"

    def whole(self) -> bytes:
        """All of it in one object, which of a single shard is made without a copy; closes."""
        try:
            return b"".join(self.pieces(sys.maxsize))
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the shards."""
        self._parts.clear()


class RawOutgoing:
    """The same as one safetensors file (raw.py), each shard under its id, sent from where it lies: a piece is
    a view of the shard's memory and keeps its pin until the kernel has it. ShardRejected if an id cannot be a
    name there."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        layout = raw.lay_out([(name, part.what) for name, part in parts.items()])
        found = list(parts.values())
        self._header = layout.header
        self._parts = [found[i] for i in layout.order]
        self.size = layout.file_bytes

    def pieces(self, step: int = RAW_STEP_BYTES) -> Iterator[list[bytes | memoryview]]:
        """The file, to be joined, in lists of buffers that have together at most `step` bytes, or one more
        than the header."""
        together: list[bytes | memoryview] = [self._header]
        size = len(self._header)
        for part in self._parts:
            data = part.content()
            while len(data):
                if size >= step:
                    yield together
                    together, size = [], 0
                together.append(data[: step - size])
                data = data[len(together[-1]) :]
                size += len(together[-1])
        yield together

    def whole(self) -> bytes:
        """All of it in one object; closes."""
        try:
            return b"".join(piece for together in self.pieces() for piece in together)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the shards."""
        self._parts.clear()
