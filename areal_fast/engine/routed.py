"""Routed experts taken out of an engine's answer as it arrives: tens of MiB of base64 that no parser sees.

A `RoutedFilter` gets the answer's bytes, however they are cut, and gives back what stands outside the value
of `"routed_experts"` (JSON or events, to be parsed as ever; the value then reads `""`) and what stands
inside, apart. A quote that is not escaped and begins `"routed_experts":"` is a member's name: within a
string it would be escaped. Base64 has no quotes and no escapes, so the next quote is the value's end. Only
what may be the beginning of the name is held back at a cut; a streamed event passes at once.

`Receiver` is where the inside goes: the service gives one that decodes into shared memory (shards/routed.py).
Several answers of one generation (abort, resubmission) are several attempts; each covers the whole sequence
so far, prompt + completion − 1 rows, of which the receiver keeps those of the attempt that sampled the
token. Source: areal.experimental.inference_service.sglang.bridge (form); shapes as SGLang documents them.
"""

from __future__ import annotations

import re
from typing import Protocol

NAME = b'"routed_experts"'
_BEGIN = re.compile(rb'(?<!\\)"routed_experts"[ \t]{0,4}:[ \t]{0,4}"')
_LOOK_BACK = len(NAME) + 12


class Receiver(Protocol):
    """Takes one generation's routed experts. Raises ValueError for what cannot be, ArenaFull."""

    async def attempt(self, at_most: int) -> None:
        """Another answer begins; its value has `at_most` characters (0: not known). What an attempt before
        has left without `end` is dropped."""

    async def add(self, text: memoryview) -> None:
        """More of the value, in order. Others may run meanwhile."""

    async def end(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The attempt's value was whole: int32 [prompt + completion − 1, width]."""


class RoutedFilter:
    """State of one answer. `inside`: the value's end has not come; `found`: how many characters it has so
    far."""

    def __init__(self) -> None:
        self.inside = False
        self.found = 0
        self._held = b""

    def feed(self, chunk: bytes) -> list[tuple[bool, memoryview]]:
        """(inside, bytes) in order; bytes of a value are never empty."""
        out: list[tuple[bool, memoryview]] = []
        if self._held:
            chunk, self._held = self._held + chunk, b""
        view, at = memoryview(chunk), 0
        while at < len(chunk):
            if self.inside:
                end = chunk.find(b'"', at)
                stop = len(chunk) if end < 0 else end
                if stop > at:
                    self.found += stop - at
                    out.append((True, view[at:stop]))
                at = stop
                self.inside = end < 0
                continue
            begin = _BEGIN.search(chunk, at)
            if begin is None:
                stop = len(chunk) - _may_begin(chunk, at)
                self._held = chunk[stop:]
                if stop > at:
                    out.append((False, view[at:stop]))
                break
            out.append((False, view[at : begin.end()]))
            at = begin.end()
            self.inside = True
        return out

    def rest(self) -> bytes:
        """What was held back, once the answer has ended."""
        held, self._held = self._held, b""
        return held


def _may_begin(chunk: bytes, at: int) -> int:
    """How many bytes at the end may be the beginning of the name and its value (0: none), the byte before its
    quote included, which tells whether that is escaped."""
    first = max(at, len(chunk) - _LOOK_BACK)
    quote = chunk.find(b'"', first)
    while quote >= 0:
        tail = chunk[quote:]
        named, after = tail[: len(NAME)], tail[len(NAME) :]
        if NAME.startswith(named) and after.strip(b" \t") in (b"", b":"):
            return len(tail) + (quote > at)
        quote = chunk.find(b'"', quote + 1)
    return int(chunk.endswith(b"\\"))
