"""Messages with file descriptors over a Unix socket (SCM_RIGHTS), flags included.

socket.send_fds and recv_fds of the standard library take flags and drop them (CPython 3.11, 3.12): a
MSG_PEEK would take the message, a MSG_DONTWAIT would wait. Received descriptors are close-on-exec and the
caller's to close.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from typing import Final

_FD_BYTES: Final = array.array("i").itemsize


def send(sock: socket.socket, packet: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """One packet; the descriptors stay open here. OSError."""
    if not fds:
        sock.send(packet, flags | socket.MSG_NOSIGNAL)
        return
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    sock.sendmsg([packet], rights, flags | socket.MSG_NOSIGNAL)


def receive(
    sock: socket.socket, max_bytes: int, flags: int = 0, *, plain: bool = False
) -> tuple[bytes, list[int], int]:
    """One packet, at most one descriptor, and the flags it came with (MSG_TRUNC, MSG_CTRUNC). OSError.

    plain: none is expected; what comes all the same the kernel closes. Less than half the cost."""
    if plain:
        return sock.recv(max_bytes, flags), [], 0
    packet, rights, how, _ = sock.recvmsg(
        max_bytes, socket.CMSG_SPACE(_FD_BYTES), flags | socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    while len(fds) > 1:  # CMSG_SPACE may be padded to room for a second
        os.close(fds.pop())
    return packet, list(fds), how
