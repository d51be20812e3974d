"""The supervisor's line to whoever started it: the same idea as a child's control line, one level up.

Who owns a proxy (an actor of a cluster, say) may die without a last word. With `--lifeline-fd N` it hands
over one end of a stream socket pair: when its own end is closed, by whatever ended it, the proxy stops as on
a second SIGTERM: in half a second, with its dumps. The other way the supervisor says once, as a line of JSON,
that the proxy answers: {"is": "ready", "address": "HOST:PORT", "pid": n}; so nobody has to look for the port
in a log.

Nothing that arrives is obeyed but the end. The descriptor is never given to a child.
"""

from __future__ import annotations

import os
import socket
import stat

import msgspec

from areal_fast.service.log import Log


class Lifeline:
    """An inherited end. OSError if `fd` is no stream socket."""

    def __init__(self, fd: int) -> None:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError("not a socket")
        self._sock = socket.socket(fileno=fd)
        if self._sock.type != socket.SOCK_STREAM:
            self._sock.detach()
            raise OSError("not a stream socket")
        self._sock.setblocking(False)
        os.set_inheritable(fd, False)

    def fileno(self) -> int:
        return self._sock.fileno()

    def ended(self) -> bool:
        """After poll said that there is something: whether the owner is gone."""
        try:
            return not self._sock.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def say_ready(self, address: str, log: Log) -> None:
        line = msgspec.json.encode({"is": "ready", "address": address, "pid": os.getpid()}) + b"\n"
        try:
            self._sock.send(line, socket.MSG_NOSIGNAL)
        except OSError as error:
            log.warning("lifeline_unheard", why=error.strerror)

    def close(self) -> None:
        self._sock.close()
