"""Sealed memory files: shard bytes that nobody can change, shrink or lose while somebody maps them.

A memfd is memory with a descriptor and no name, so nothing is left behind whoever is killed: the kernel frees
it with its last descriptor and mapping. Sealed against writing, growing, shrinking and sealing it is as
immutable as a shard must be, whoever made it; its size is what fstat says, never what a sender says.

Stdlib only: clients on the same host use this too.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable
from typing import Final

from areal_fast.errors import ShardRejected

SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
MAP_NORESERVE: Final = 0x4000
MAPPED_FROM_BYTES: Final = 262144
"""Shards of this size and more are kept as files of their own when they come as one."""


class SealedFile:
    """A descriptor of a sealed file, closed with the object. Calling it gives its bytes, mapped read-only."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes

    def __call__(self) -> memoryview:
        if not self.nbytes:
            return memoryview(b"")
        return memoryview(mmap.mmap(self.fd, self.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ))

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def create(nbytes: int) -> int:
    """A new memory file of `nbytes` zeros, not sealed. OSError: no memory, or no descriptor."""
    fd = os.memfd_create("areal_fast-shard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """From here on nobody can change it. OSError (EBUSY) while a writable shared mapping exists."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def check(fd: int) -> os.stat_result:
    """Its fstat, if it is a fully sealed memory file. ShardRejected."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise ShardRejected("The descriptor is of no memory file") from None
    if sealed & SEALS != SEALS:
        raise ShardRejected("The file is not sealed against writing, shrinking, growing and sealing")
    return os.fstat(fd)


def pack(pieces: Iterable[tuple[int, memoryview]], nbytes: int) -> SealedFile:
    """One sealed file of several pieces, each (offset, its bytes). OSError: no memory."""
    fd = create(nbytes)
    file = SealedFile(fd, nbytes)
    for at, data in pieces:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], at + done)
    seal(fd)
    return file


def map_private(fd: int, nbytes: int) -> memoryview:
    """Its bytes, writable for the caller alone: what is written goes to copies of the pages."""
    if not nbytes:
        return memoryview(bytearray())
    flags = mmap.MAP_PRIVATE | MAP_NORESERVE
    return memoryview(mmap.mmap(fd, nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE))
