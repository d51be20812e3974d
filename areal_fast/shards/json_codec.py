"""Tensors from JSON bodies into shared memory: each byte is decoded once and in place.

What the body says is checked first: dtype, shape, and how many bytes its base64 stands for,
which its length tells. Then the shard is reserved in the arena, the base64 is decoded by the core straight
into it (bfloat16 narrowed on the way), and it is published; whatever fails before that abandons it. Two
things are done only where they must be: a JSON parser reads a body of many kilobytes only around its data,
whose end is found by the string's closing quote (see `_without_data` for why that is safe); and base64 with
escapes or white space in it, which the canonical decoder refuses, is cleaned in the heap and judged there.

What is accepted, and every error, is as in protocol/wire.py. Nothing here knows sessions or bundles.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from areal_fast.core import base64_decode_into, base64_decoded_size
from areal_fast.errors import ShardRejected
from areal_fast.protocol import wire
from areal_fast.protocol.wire import Described, Kept

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

    from areal_fast.core._core import Arena

WORTH_SPLITTING = 16384
"""Below this size one pass of the JSON parser costs less than looking for the data."""

_AROUND = 4096
_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*"')


def store(arena: Arena, name: bytes, body: bytes, meta: Callable[[Kept], bytes]) -> Kept:
    """Put the tensor or array in `body` under `name`; `meta` makes the shard's meta. ShardRejected,
    ArenaFull, IndexBusy: nothing has changed."""
    described, text = _look(body)
    expected = _expected(described, text)
    if expected is not None:
        slot, view = arena.shard_reserve(name, meta(expected), expected.nbytes)
        try:
            with view:
                whole = base64_decode_into(text, view, bf16=expected.form == "bf16")
            if whole:
                arena.shard_publish(slot)
        except BaseException:
            arena.shard_abandon(slot)
            raise
        if whole:
            return expected
        arena.shard_abandon(slot)
    kept, data = decode(body)
    arena.shard_put(name, meta(kept), (data,))
    return kept


def decode(body: Buffer) -> tuple[Kept, bytearray]:
    """The tensor or array in `body` in the heap, whichever way its base64 is spelled. ShardRejected."""
    described = wire.describe(body)
    if described.meta:
        return described.fit(0), bytearray()
    text: Buffer = wire.plain_text(described.data)
    data = _decoded(text)
    if data is None:
        text = wire.loose_text(described.data)
        data = _decoded(text)
    if data is None:
        raise ShardRejected(wire.NOT_BASE64)
    kept = described.fit(len(data))
    if kept.form == "bf16":
        data = bytearray(kept.nbytes)
        base64_decode_into(text, data, bf16=True)
    return kept, data


def _look(body: bytes) -> tuple[Described, memoryview]:
    """What the body says, and its base64 as it stands there."""
    if len(body) >= WORTH_SPLITTING and (split := _without_data(body)) is not None:
        return split
    described = wire.describe(body)
    return described, memoryview(b"") if described.meta else wire.plain_text(described.data)


def _without_data(body: bytes) -> tuple[Described, memoryview] | None:
    """The same without parsing the data, or None.

    The text taken is what follows the first `"data":"` up to the first quote in the body's last _AROUND
    bytes. That it is the value of the body's own `data` follows: with that value emptied, the rest is parsed
    and says that `data` is `""`; there is only one `"data"` in it and no backslash, so no other key or string
    can be meant. That the text is a JSON string's content, and no quote is in it, follows from its being
    base64, which the decoder checks; if it is not, the body is looked at again as a whole."""
    found = _DATA.search(body, 0, _AROUND)
    if found is None:
        return None
    start = found.end()
    end = body.find(b'"', max(start, len(body) - _AROUND))
    if end < 0:
        return None
    around = body[:start] + body[end:]
    if b"\\" in around or around.count(b'"data"') != 1:
        return None
    try:
        described = wire.describe(around)
    except ShardRejected:
        return None
    if bytes(described.data) != b'""':
        return None
    return described, memoryview(body)[start:end]


def _expected(described: Described, text: memoryview) -> Kept | None:
    """What is kept if the text is canonical base64, judged by its length; None if it cannot be, or does not
    fit."""
    size = base64_decoded_size(text)
    if size < 0:
        return None
    try:
        return described.fit(size)
    except ShardRejected:
        return None


def _decoded(text: Buffer) -> bytearray | None:
    size = base64_decoded_size(text)
    if size < 0:
        return None
    data = bytearray(size)
    return data if base64_decode_into(text, data) else None
