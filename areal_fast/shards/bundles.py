"""Bundles: one arena shard that stands for all the shards of an export.

An export of 8 turns answers with 48 shard ids. Making 48 tensors then would cost most of the export's time
and several times the tokens' memory, for tensors that are fetched once. So an export stores what its records
hold, once, as a bundle: rows (protocol/export.py) and their data; a tensor is made when it is fetched, and
the bundle goes when its last part is cleared. Each part has a bit in the arena's shard.

An id is uuid-shaped: 96 random bits, which name the bundle, then the part's number in 8 hex digits. Who knows
one id of an export may count the others; nobody else can guess any. In the arena a bundle's name is NUL and
the 12 random bytes, which no shard that was put can have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from areal_fast.protocol.export import DTYPES, ITEMSIZE, NAMES, NAMES_V2, PER_ROW, Row, Rows
from areal_fast.protocol.records import Routed
from areal_fast.shards import routed
from areal_fast.shards.outgoing import Part

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

    from areal_fast.core._core import Arena


class BundleMeta(msgspec.Struct, array_like=True, tag_field="form", tag="bundle"):
    """kind "each": part = row · names + name, tensors [1, T]. "batch": part = name, tensors [B, T]. v2: there
    are eight names, else six."""

    kind: Literal["each", "batch"]
    rows: list[Row]
    v2: bool = False
    routed: list[tuple[int, bytes, int]] = []
    """(row, shard, width) of rows with routed experts (routed.py), of one width in a batch. Their parts come
    after all others: in a batch one, else one each."""

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES_V2 if self.v2 else NAMES

    @property
    def own_parts(self) -> int:
        """Parts whose tensors are made from the bundle's data."""
        return len(self.names) * (len(self.rows) if self.kind == "each" else 1)

    @property
    def parts(self) -> int:
        return self.own_parts + (len(self.routed) if self.kind == "each" else bool(self.routed))

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max((r.length for r in self.rows), default=0)

    def routed_of(self, part: int) -> list[tuple[int, bytes, int]]:
        """What of `routed` a part stands for."""
        at = part - self.own_parts
        return [] if at < 0 else self.routed if self.kind == "batch" else [self.routed[at]]

    def part_bytes(self, part: int) -> int:
        """Size of a part's tensor in memory, as the original counts it."""
        if found := self.routed_of(part):
            row, _, width = found[0]
            tokens = self.rows[row].length if self.kind == "each" else len(self.rows) * self.width
            return 4 * width * tokens
        row, at = divmod(part, len(self.names))
        name = self.names[at]
        size = ITEMSIZE[DTYPES[name]]
        if self.kind == "each":
            return size * (1 if name in PER_ROW else self.rows[row].length)
        if name in PER_ROW:
            return size * len(self.rows)
        return size * len(self.rows) * self.width

    def total_bytes(self) -> int:
        if self.kind == "batch":
            return sum(self.part_bytes(i) for i in range(self.parts))
        per_token = sum(ITEMSIZE[DTYPES[name]] for name in self.names if name not in PER_ROW)
        per_row = sum(ITEMSIZE[DTYPES[name]] for name in self.names if name in PER_ROW)
        experts = sum(self.part_bytes(part) for part in range(self.own_parts, self.parts))
        return sum(per_token * r.length + per_row for r in self.rows) + experts


def new_bundle_id() -> str:
    """First 28 characters of the ids of a new bundle's parts."""
    h = os.urandom(12).hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def part_id(prefix: str, part: int) -> str:
    return f"{prefix}{part:08x}"


def arena_name(prefix: str) -> bytes:
    """The bundle's own name in the arena."""
    return b"\0" + bytes.fromhex(prefix.replace("-", ""))


_ID = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{4})([0-9a-f]{8})")
_ID_CHARS = 36


def split_id(shard_id: str) -> tuple[bytes, int] | None:
    """(arena name, part) if this could be a bundle's id."""
    match = _ID.fullmatch(shard_id) if len(shard_id) == _ID_CHARS else None
    if match is None:
        return None
    *random, part = match.groups()
    return b"\0" + bytes.fromhex("".join(random)), int(part, 16)


class Bundle:
    """A bundle being read: finds its parts, remembering what several of them need."""

    def __init__(self, meta: BundleMeta, data: Buffer, arena: Arena) -> None:
        self.meta = meta
        self._arena = arena
        self._rows = Rows(meta.rows, data)

    def part(self, part: int) -> Part | None:
        """One part, its tensor to be made when it is sent. None if its routed experts are gone."""
        if part >= self.meta.own_parts:
            return self._routed(part)
        row, at = divmod(part, len(self.meta.names))
        name = self.meta.names[at]
        rows = self.meta.rows
        make: Callable[[], Any]
        if self.meta.kind == "batch":
            make = partial(self._rows.batch, name)
            shape = (len(rows),) if name in PER_ROW else (len(rows), self.meta.width)
        else:
            make = partial(self._rows.array, row, name)
            shape = (1,) if name in PER_ROW else (1, rows[row].length)
        return Part(DTYPES[name], shape, "own", self.meta.part_bytes(part), make)

    def _routed(self, part: int) -> Part | None:
        meta, found = self.meta, self.meta.routed_of(part)
        views: dict[int, memoryview] = {}
        for row, name, width in found:
            view = routed.view_of(self._arena, Routed(name, width), meta.rows[row].length)
            if view is None:
                return None
            views[row] = view
        width = found[0][2]
        if meta.kind == "each":
            row = found[0][0]
            shape: tuple[int, ...] = (1, meta.rows[row].length, width)
            return Part("int32", shape, "own", meta.part_bytes(part), views[row])
        shape = (len(meta.rows), meta.width, width)
        zeros = memoryview(bytes(4 * width * meta.width))
        data: list[memoryview] = []
        for i, row_meta in enumerate(meta.rows):
            kept = row_meta.length if i in views else 0
            if i in views:
                data.append(views[i])
            data.append(zeros[: 4 * width * (meta.width - kept)])
        return Part("int32", shape, "own", meta.part_bytes(part), data)
