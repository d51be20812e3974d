"""Routed experts of a turn: received into the arena, and kept there until nobody refers to them.

Receiving. The base64 of an engine's answer is decoded as it comes, a socket's read at a time, straight into a
shard that is still INIT and this process's own: a kill leaves what the sweep frees. Room comes from the
answer's length, or doubles. Copies between rooms go in slices that leave the loop to others. A resubmitted
generation's answer covers the whole sequence again; rows that an earlier attempt brought are the ones that
sampled those tokens and replace the newer. The tensor is int32 [T, width], T prompt and output tokens; the
last token was not routed any more, and its row is zeros.

Life. `publish` comes directly before the append of the turn's record, which names the shard. From then on
it lives as long as something refers to it: a record in its session's log, or an export's bundle. Who drops
the last reference drops the shard where that is certain (a part that is cleared, a session that was
dumped); for all else, a worker killed in between included, `Garbage` looks from time to time. The name says
which session it is of:

  NUL "R" ‖ slot u32 ‖ the session's creation, ns u64 ‖ 12 random bytes

A name of an ACTIVE shard is garbage if its session is gone or its log does not name it, and no bundle does,
in two looks in a row: the gap between publish and append is far shorter than that between two looks.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from areal_fast.core import (
    SESSION,
    STATE_ACTIVE,
    STATE_FREE,
    Gone,
    base64_decode_into,
    base64_decoded_size,
)
from areal_fast.protocol.records import Routed

if TYPE_CHECKING:
    from areal_fast.core._core import Arena

WORD_ROUTED = 61
"""Not 0: there may be such shards. Moves before and after every publish; back to 0 by a look that saw it,
found none, and finds it unmoved."""
PREFIX = b"\0R"
SLICE_BYTES = 1 << 20
FIRST_BYTES = 1 << 20
BACKED_BYTES = 2 << 20
"""The system backs the arena by so much at a time: about 1 ms."""
MAX_ROW_BYTES = 1 << 16
PAGE = 256
_NAME = struct.Struct("<2sIQ")
_NAME_BYTES = _NAME.size + 12


class RoutedMeta(msgspec.Struct, array_like=True, tag_field="form", tag="routed"):
    """Meta of such a shard; its shape stands with the reference to it."""


_META = msgspec.msgpack.encode(RoutedMeta())


def is_routed(name: bytes) -> bool:
    return len(name) == _NAME_BYTES and name.startswith(PREFIX)


def owner(name: bytes) -> tuple[int, int]:
    """(slot, creation ns) of the session a name belongs to."""
    _, slot, created_ns = _NAME.unpack_from(name)
    return slot, created_ns


def view_of(arena: Arena, routed: Routed, tokens: int) -> memoryview | None:
    """Its int32 [tokens, width] as bytes, pinned until released; None if it is gone."""
    slot = arena.pin_shard(routed.name)
    if slot < 0:
        return None
    try:
        _, view = arena.shard_view(slot)
    finally:
        arena.unpin(slot)
    return view[: 4 * routed.width * tokens]


def drop(arena: Arena, names: Iterable[bytes]) -> None:
    """Close these shards; what is pinned stays until it is not."""
    for name in names:
        slot = arena.pin_shard(name)
        if slot < 0:
            continue
        try:
            arena.shard_close(slot)
        except Gone:
            pass
        finally:
            arena.unpin(slot)


class _Room:
    """A shard being filled."""

    def __init__(self, arena: Arena, name: bytes, size: int) -> None:
        self.size = size
        self._arena = arena
        self.slot, self.view = arena.shard_reserve(name, _META, size)

    def abandon(self) -> None:
        self.view.release()
        self._arena.shard_abandon(self.slot)


class RoutedIntake:
    """The routed experts of one turn of a pinned session: the engine's Receiver. `abandon` it, unless it was
    published and its record appended. ArenaFull."""

    def __init__(self, arena: Arena, slot: int) -> None:
        self._arena = arena
        created_ns = arena.slot_info(slot).created_ns
        self.name = _NAME.pack(PREFIX, slot, created_ns) + os.urandom(12)
        self._kept: _Room | None = None  # whole rows of the attempts so far
        self._rows = 0
        self._row_bytes = 0
        self._room: _Room | None = None  # of the attempt that is arriving
        self._filled = 0
        self._carry = b""
        self._padded = False
        self._published = False
        self.result: Routed | None = None

    async def attempt(self, at_most: int) -> None:
        self._drop_room()
        self._room = await self._made(at_most // 4 * 3 + MAX_ROW_BYTES if at_most else FIRST_BYTES)

    async def _made(self, size: int) -> _Room:
        """A room whose memory was backed in steps that leave the loop to others."""
        for stock in range(BACKED_BYTES, size + BACKED_BYTES, BACKED_BYTES):
            if self._arena.prefault(stock):
                await asyncio.sleep(0)
        return _Room(self._arena, self.name, size)

    async def add(self, text: memoryview) -> None:
        if self._padded:
            raise ValueError("base64 goes on after its padding")
        if self._carry:
            take = min(4 - len(self._carry), len(text))
            self._carry += text[:take]
            text = text[take:]
            if len(self._carry) < 4:
                return
            group, self._carry = self._carry, b""
            await self._decode(memoryview(group))
        whole = len(text) // 4 * 4
        self._carry = bytes(text[whole:])
        for at in range(0, whole, SLICE_BYTES):
            if at:
                await asyncio.sleep(0)
            await self._decode(text[at : min(at + SLICE_BYTES, whole)])

    async def _decode(self, text: memoryview) -> None:
        if self._padded:
            raise ValueError("base64 goes on after its padding")
        size = base64_decoded_size(text)
        assert self._room is not None
        if self._filled + size > self._room.size:
            self._room = await self._moved(self._room, self._filled, 2 * self._room.size + size)
        if not base64_decode_into(text, self._room.view[self._filled : self._filled + size]):
            raise ValueError("no base64")
        self._filled += size
        self._padded = size < len(text) // 4 * 3

    async def end(self, prompt_tokens: int, completion_tokens: int) -> None:
        rows = prompt_tokens + completion_tokens - 1
        if self._carry or rows < 1 or not self._filled or self._filled % (4 * rows):
            raise ValueError(f"{self._filled} bytes are not int32 in {rows} rows")
        row_bytes = self._filled // rows
        if row_bytes > MAX_ROW_BYTES or self._row_bytes not in (0, row_bytes) or rows < self._rows:
            raise ValueError(f"rows of {row_bytes} bytes, {rows} of them, after {self._rows}")
        room, self._room = self._room, None
        assert room is not None
        kept, self._kept = self._kept, room
        if kept is not None:
            try:
                await _copy(kept, room, self._rows * row_bytes)
            finally:
                kept.abandon()
        self._rows, self._row_bytes = rows, row_bytes

    async def finish(self, tokens: int) -> Routed | None:
        """Make it whole for a sequence of `tokens`; None if the attempts did not bring that many rows."""
        self._drop_room()
        if self._kept is None or self._rows != tokens - 1:
            return None
        size = tokens * self._row_bytes
        if not size <= self._kept.size <= size + size // 4 + MAX_ROW_BYTES:
            kept, self._kept = self._kept, None
            self._kept = await self._moved(kept, size - self._row_bytes, size)
        self._kept.view[size - self._row_bytes : size] = bytes(self._row_bytes)
        self.result = Routed(self.name, self._row_bytes // 4)
        return self.result

    def publish(self) -> None:
        """After `finish`, directly before the record's append. IndexBusy: nothing happened, again."""
        assert self._kept is not None
        self._kept.view.release()
        self._arena.add_word(WORD_ROUTED, 1)
        self._arena.shard_publish(self._kept.slot)
        self._arena.add_word(WORD_ROUTED, 1)
        self._kept, self._published = None, True

    def abandon(self) -> None:
        """Free all there is."""
        self._drop_room()
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.abandon()
        if self._published:
            self._published = False
            drop(self._arena, (self.name,))

    def kept(self) -> None:
        """The record was appended: the shard is its."""
        self._published = False

    async def _moved(self, old: _Room, filled: int, size: int) -> _Room:
        """A larger room, or an exact one, with the same content; the old one is freed, whatever happens."""
        try:
            new = await self._made(size)
            try:
                await _copy(old, new, filled)
            except BaseException:
                new.abandon()
                raise
            return new
        finally:
            if self._room is old:
                self._room = None
            old.abandon()

    def _drop_room(self) -> None:
        room, self._room = self._room, None
        self._filled, self._carry, self._padded = 0, b"", False
        if room is not None:
            room.abandon()


async def _copy(old: _Room, new: _Room, nbytes: int) -> None:
    for at in range(0, nbytes, SLICE_BYTES):
        stop = min(at + SLICE_BYTES, nbytes)
        new.view[at:stop] = old.view[at:stop]
        await asyncio.sleep(0)


class Garbage:
    """Finds and frees routed experts that nobody refers to. For the cleaner; see the top."""

    def __init__(
        self,
        arena: Arena,
        named_by_log: Callable[[int], set[bytes]],
        named_by_bundle: Callable[[int], set[bytes]],
    ) -> None:
        """`named_by_log`: what a pinned session's log names. `named_by_bundle`: what a pinned shard names
        if it is a bundle, of parts not cleared."""
        self._arena = arena
        self._log = named_by_log
        self._bundle = named_by_bundle
        self._suspects: set[bytes] = set()

    def look(self) -> int:
        """One look; how many shards were freed."""
        arena = self._arena
        seen = arena.word(WORD_ROUTED)
        if not seen:
            return 0
        names: set[bytes] = set()
        others: list[int] = []
        cursor = 0
        while True:
            slots, cursor = arena.expired_shards(arena.now_ns() + 1, cursor, PAGE)
            for slot in slots:
                name = arena.slot_info(slot).id
                if is_routed(name):
                    names.add(name)
                else:
                    others.append(slot)
            if cursor == 0:
                break
        if not names:
            self._suspects.clear()
            arena.cas_word(WORD_ROUTED, seen, 0)
            return 0
        names -= self._of_logs(names)
        for slot in others:
            if names and arena.pin_slot(slot):
                try:
                    names -= self._bundle(slot)
                finally:
                    arena.unpin(slot)
        garbage = names & self._suspects
        self._suspects = names - garbage
        drop(arena, garbage)
        return len(garbage)

    def _of_logs(self, names: set[bytes]) -> set[bytes]:
        """Those whose session keeps them."""
        arena = self._arena
        kept: set[bytes] = set()
        for slot, created_ns in {owner(name) for name in names}:
            info = arena.slot_info(slot)
            if info.kind != SESSION or info.state == STATE_FREE or info.created_ns != created_ns:
                continue
            if info.state != STATE_ACTIVE or not arena.pin_slot(slot):
                kept |= {name for name in names if owner(name) == (slot, created_ns)}
                continue
            try:
                kept |= self._log(slot)
            finally:
                arena.unpin(slot)
        return kept
