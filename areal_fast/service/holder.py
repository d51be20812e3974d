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

One budget (--arena-max-bytes) is for the arena and the files together, and the arena's core keeps it: what a
file takes is counted there (`outside_take`) before it is kept, so sessions, shards and files refuse each
other alike, with 507, and none of them touches the reserve for rewards, exports and cleanup. A kill leaves no
wrong sum: this process alone counts, of what its table holds, and its own death ends arena and files at once.

Invariants: `nbytes`, the arena's word FILE_BYTES, is the sum over the table, and what the core counts is the
same in whole granules. FILES_SEEN is the FILES_CHANGED up to which removed files are not counted any more.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from areal_fast.core import ArenaFull
from areal_fast.errors import ShardRejected
from areal_fast.shards import sealed
from areal_fast.shards.store import FILE_BYTES, FILE_COUNT, FILES_CHANGED, FILES_SEEN, ShardStore

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
    """See the top of the file."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._store = ShardStore(arena)
        self._files: dict[int, Held] = {}
        self._next = 0
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
        if not self._counted(found.st_size):
            os.close(fd)
            return {"why": "full"}
        self._files[fd] = Held(found.st_ino, found.st_size, process)
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
        if changed == self._arena.word(FILES_SEEN):
            start = self._next if self._next < len(fds) else 0
            self._next = start + IDLE_PAGE
            fds = fds[start : self._next]
        for fd in fds:
            held = self._files[fd]
            if held.slot < 0:
                continue
            meta = self._store.file_at(held.slot)
            if meta is None or (meta.fd, meta.inode) != (fd, held.inode):
                self._close(fd)
        self._arena.set_word(FILES_SEEN, changed)

    def _counted(self, nbytes: int) -> bool:
        """Whether there is room for so many bytes more; they are counted then."""
        try:
            self._arena.outside_take(nbytes)
        except ArenaFull:
            if self._arena.word(FILES_CHANGED) == self._arena.word(FILES_SEEN):
                return False
            self.reconcile()
            return self._counted(nbytes)
        self._tell(nbytes, 1)
        return True

    def _close(self, fd: int) -> None:
        held = self._files.pop(fd)
        os.close(fd)
        self._arena.outside_give(held.nbytes)
        self._tell(-held.nbytes, -1)

    def _tell(self, nbytes: int, files: int) -> None:
        self.nbytes += nbytes
        self._arena.set_word(FILE_BYTES, self.nbytes)
        self._arena.add_word(FILE_COUNT, files)

    def close(self) -> None:
        for fd in list(self._files):
            self._close(fd)
