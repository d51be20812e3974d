"""Raw shards taken as they arrive: PUT of a safetensors file straight into the arena, in constant memory.

Theory. The file's header comes first and says every tensor's name, size and place, so as soon as it is there
the file is judged as a whole and room for all of it is reserved in the arena (shards that nobody can see yet,
this process's). From then on the kernel writes what arrives into those shards. When the last byte is in, they
are published one after another. So a file of 1 GiB costs this process the header and a quarter MiB.

    header        read into a buffer that is as long as the header says, at most MAX_RAW_HEADER_BYTES
    making room   memory is backed in steps that leave the loop to others; meanwhile the client is not read
    filling       large tensors directly; runs of small ones through one buffer, not a system call each
    whole         published by the handler (`store`): all of it, or, if the index stays locked for PATIENCE_S,
                  what came before
    refused       a lie in the header or no room: what comes is thrown away, and `store` raises why

A kill at any step leaves shards in the state INIT of a dead process, which the supervisor's sweep frees; a
client that goes away, or sends less than its length, leaves nothing (`drop`). One that sends slowly is cut
(min_stream_bytes_s): room for all of its file is taken, after all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from areal_fast.core import ArenaFull, CoreError, IndexBusy
from areal_fast.errors import ShardRejected
from areal_fast.service.answers import when_free
from areal_fast.shards import raw
from areal_fast.shards.sealed import MAPPED_FROM_BYTES
from areal_fast.shards.store import Reserved, checked_name

if TYPE_CHECKING:
    from areal_fast.shards import ShardStore

MAX_RAW_HEADER_BYTES: Final = 2 << 20
"""Of a file that is put: its header (some 20,000 tensors) is read in one go, and the loop waits for it."""
WORTH_STREAMING: Final = MAPPED_FROM_BYTES
BOUNCE_BYTES: Final = 1 << 18
AT_ONCE_BYTES: Final = 1 << 20
"""The kernel is asked for so much at a time: the loop belongs to others in between."""
DIRECT_BYTES: Final = 1 << 16
BACKED_BYTES: Final = 2 << 20
RESERVED_AT_ONCE: Final = 64

_HEADER, _WAITING, _FILLING, _WHOLE, _REFUSED, _DROPPED = range(6)


def _nobody() -> None:
    """Nobody waits."""


class RawIntake:
    """A Sink (http/intake.py) of one file of `file_bytes`. shard_id: what its only tensor is stored under;
    None, each is stored under its name."""

    def __init__(self, store: ShardStore, shard_id: str | None, file_bytes: int) -> None:
        self._store = store
        self._shard_id = shard_id
        self._file_bytes = file_bytes
        self._left = file_bytes
        self._header = bytearray()
        self._header_bytes = raw.LENGTH_BYTES
        self._entries: list[raw.Entry] = []
        self._rooms: list[Reserved] = []
        self._room = 0  # being filled
        self._at = 0  # up to here
        self._early = bytearray()
        self._bounce = memoryview(b"")
        self._direct = False
        self._state = _HEADER
        self._why: Exception = ShardRejected("The file is not whole")
        self._work: asyncio.Task[None] | None = None
        self.waiting = False
        self.when_ready: Callable[[], None] = _nobody

    @property
    def shard_ids(self) -> list[str]:
        """Where the tensors go."""
        return [entry.name if self._shard_id is None else self._shard_id for entry in self._entries]

    # -- what the connection calls ---------------------------------------------------------------------
    def feed(self, data: bytes | memoryview) -> None:
        self._left -= len(data)
        self._take(memoryview(data))

    def buffer(self) -> memoryview:
        if self._state == _FILLING:
            view = self._rooms[self._room].view
            if len(view) - self._at >= DIRECT_BYTES:
                self._direct = True
                return view[self._at : self._at + AT_ONCE_BYTES]
        self._direct = False
        if not self._bounce:
            self._bounce = memoryview(bytearray(BOUNCE_BYTES))
        return self._bounce

    def took(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._direct:
            self._at += nbytes
            self._next_room()
        else:
            self._take(self._bounce[:nbytes])

    def drop(self) -> None:
        if self._work is not None:
            self._work.cancel()
        self._abandon()
        self._state = _DROPPED

    # -- what the handler calls ------------------------------------------------------------------------
    async def store(self) -> list[str]:
        """Publish the tensors; their ids. ShardRejected, ArenaFull, IndexBusy."""
        if self._work is not None:
            await self._work
        if self._state != _WHOLE:
            raise self._why
        stored = self.shard_ids
        left = self._rooms
        left.reverse()

        def attempt() -> None:
            while left:
                self._store.publish(left[-1])
                left.pop()

        await when_free(attempt)
        return stored

    # -- the file --------------------------------------------------------------------------------------
    def _take(self, data: memoryview) -> None:
        """The next bytes, wherever they belong. What is copied here was not worth a system call."""
        try:
            if self._state == _HEADER:
                data = self._read_header(data)
        except ShardRejected as error:
            self._refuse(error)
        if self._state == _WAITING:
            self._early += data
        elif self._state == _FILLING:
            self._fill(data)

    def _read_header(self, data: memoryview) -> memoryview:
        """What is left of the data. ShardRejected."""
        while len(data) and self._state == _HEADER:
            more = data[: self._header_bytes - len(self._header)]
            self._header += more
            data = data[len(more) :]
            if len(self._header) < self._header_bytes:
                continue
            if self._header_bytes == raw.LENGTH_BYTES:
                self._header_bytes = raw.header_bytes(self._header, self._file_bytes, MAX_RAW_HEADER_BYTES)
            if len(self._header) == self._header_bytes:
                self._judge()
        return data

    def _judge(self) -> None:
        size = self._file_bytes - self._header_bytes
        header, self._header = self._header, bytearray()
        self._entries = raw.read_header(memoryview(header)[raw.LENGTH_BYTES :], size)
        if self._shard_id is not None and len(self._entries) != 1:
            raise ShardRejected(f"The file holds {len(self._entries)} tensors; one is stored under one id")
        for shard_id in self.shard_ids:
            checked_name(shard_id)
        self._state, self.waiting = _WAITING, True
        self._work = asyncio.get_running_loop().create_task(self._make_room(size))

    async def _make_room(self, size: int) -> None:
        try:
            await when_free(lambda: self._store.check_room(size))
            for stock in range(BACKED_BYTES, size + BACKED_BYTES, BACKED_BYTES):
                if self._store.arena.prefault(stock):
                    await asyncio.sleep(0)
            for i, (entry, shard_id) in enumerate(zip(self._entries, self.shard_ids, strict=True)):
                self._rooms.append(self._store.reserve(shard_id, entry.what))
                if i % RESERVED_AT_ONCE == RESERVED_AT_ONCE - 1:
                    await asyncio.sleep(0)
        except Exception as error:  # told by `store`, to the client and, if it is none of these, to the log
            system = isinstance(error, CoreError) and not isinstance(error, (ArenaFull, IndexBusy))
            self._refuse(ArenaFull() if system else error)  # the system refuses what the budget allows
        else:
            self._state = _FILLING
            early, self._early = self._early, bytearray()
            self._next_room()
            self._fill(memoryview(early))
        self._work = None
        self.waiting = False
        self.when_ready()

    def _fill(self, data: memoryview) -> None:
        while len(data) and self._state == _FILLING:
            view = self._rooms[self._room].view
            more = data[: len(view) - self._at]
            view[self._at : self._at + len(more)] = more
            self._at += len(more)
            data = data[len(more) :]
            self._next_room()

    def _next_room(self) -> None:
        """On to the first tensor that is not full."""
        while self._room < len(self._rooms) and self._at == len(self._rooms[self._room].view):
            self._rooms[self._room].view.release()
            self._room, self._at = self._room + 1, 0
        if self._room == len(self._rooms):
            self._state = _WHOLE

    def _refuse(self, why: Exception) -> None:
        self._why, self._state = why, _REFUSED
        self._abandon()

    def _abandon(self) -> None:
        self._early = self._header = bytearray()
        self._bounce = memoryview(b"")
        while self._rooms:
            room = self._rooms.pop()
            room.view.release()
            self._store.abandon(room)
