"""The supervisor's table of shard files: it holds their descriptors, so no worker's death loses a shard.

Theory. A shard that is a file has an arena record without data (FileMeta: the supervisor's descriptor number
and the file's inode). The record is the only truth. A descriptor is kept as long as the record that names it
is there, and closed by `reconcile` when it is not, so nobody has to tell of a removal and a kill anywhere
leaks nothing: the word FILES_CHANGED, which whoever removes one counts up, only says that looking is worth
while.

    hold      a worker sends the file; it is checked, counted and kept, not yet anybody's ("in flight")
    placed    the worker has published the record in slot N
    dropped   it could not
    death     of a worker: what it had in flight is searched for in the arena (placed, or closed)

This process's end closes every descriptor: nothing is left but what readers have mapped.

Invariants: `nbytes`, the arena's word FILE_BYTES, is the sum over the table, one writer; a file is taken only
if it, the others and the arena's granules in use fit the budget (--arena-max-bytes).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from areal_fast.errors import ShardRejected
from areal_fast.shards import sealed
from areal_fast.shards.store import FILE_BYTES, FILES_CHANGED, GRANULE_BYTES, ShardStore

if TYPE_CHECKING:
    from areal_fast.core._core import Arena
    from areal_fast.service.processes import Process

IDLE_PAGE: Final = 64
"""Files looked at a tick when nobody says that there is something to see."""


class Held:
    """One file. slot: of its record, -1 while in flight; owner: the worker that brought it, until then."""

    __slots__ = ("inode", "nbytes", "owner", "slot")

    def __init__(self, inode: int, nbytes: int, owner: Process | None) -> None:
        self.inode = inode
        self.nbytes = nbytes
        self.owner = owner
        self.slot = -1


class Holder:
    """See the top of the file. `max_bytes`: the budget of the arena and the files together."""

    def __init__(self, arena: Arena, max_bytes: int) -> None:
        self._arena = arena
        self._store = ShardStore(arena)
        self._max_bytes = max_bytes
        self._files: dict[int, Held] = {}
        self._next = 0
        self._seen = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._files)

    def heard(self, process: Process, message: dict[str, Any]) -> None:
        """{"is": "hold", "token"} with a descriptor, {"is": "placed", "fd", "slot"}, {"is": "dropped",
        "fd"}."""
        if message["is"] == "hold":
            answer = self._hold(process, message.get("fd", -1))
            process.send({"do": "held", "token": message["token"], **answer})
            return
        held = self._files.get(int(message["fd"]))
        if held is None or held.owner is not process:
            return
        if message["is"] == "placed":
            held.slot, held.owner = int(message["slot"]), None
        else:
            self._close(int(message["fd"]))

    def _hold(self, process: Process, fd: int) -> dict[str, Any]:
        if fd < 0:
            return {"why": "full"}
        try:
            found = sealed.check(fd)
        except ShardRejected as error:
            os.close(fd)
            return {"why": str(error)}
        used = self._arena.stats()["granules_used"] * GRANULE_BYTES
        if used + self.nbytes + found.st_size > self._max_bytes:
            os.close(fd)
            return {"why": "full"}
        self._files[fd] = Held(found.st_ino, found.st_size, process)
        self._count(found.st_size)
        return {"fd": fd, "inode": found.st_ino, "nbytes": found.st_size}

    def died(self, process: Process) -> None:
        """A worker is dead and swept: what it had in flight is found in the arena, or nobody's."""
        orphans = {fd: held for fd, held in self._files.items() if held.owner is process}
        if not orphans:
            return
        for slot, meta in self._store.file_records():
            held = orphans.get(meta.fd)
            if held is not None and held.inode == meta.inode:
                held.slot, held.owner = slot, None
                del orphans[meta.fd]
        for fd in orphans:
            self._close(fd)

    def reconcile(self) -> None:
        """One tick: close what no record names any more."""
        changed = self._arena.word(FILES_CHANGED)
        fds = sorted(self._files)
        if changed == self._seen:
            start = self._next if self._next < len(fds) else 0
            self._next = start + IDLE_PAGE
            fds = fds[start : self._next]
        self._seen = changed
        for fd in fds:
            held = self._files[fd]
            if held.slot < 0:
                continue
            meta = self._store.file_at(held.slot)
            if meta is None or (meta.fd, meta.inode) != (fd, held.inode):
                self._close(fd)

    def _close(self, fd: int) -> None:
        held = self._files.pop(fd)
        os.close(fd)
        self._count(-held.nbytes)

    def _count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self._arena.set_word(FILE_BYTES, self.nbytes)

    def close(self) -> None:
        for fd in list(self._files):
            self._close(fd)
