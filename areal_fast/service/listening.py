"""The sockets that the supervisor binds and every worker inherits, and the descriptors they will need."""

from __future__ import annotations

import errno
import resource
import secrets
import socket
from typing import Final

from areal_fast import config

BACKLOG: Final = 4096
MAX_FILES: Final = 1 << 18


class StartError(Exception):
    """The proxy cannot start here. str() is the one line for the user; exit status 1."""


def allow_many_files() -> None:
    """Every connection is a descriptor: let this process and its children have as many as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen_locally() -> socket.socket:
    """The socket of clients on this host (service/local.py): no file, and a name that nobody can guess."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(b"\0areal_fast-" + secrets.token_hex(16).encode())
    sock.listen(BACKLOG)
    return sock


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen; IPv4 first where a name has both, a wildcard :: takes both. StartError in one line."""
    where = config.hostport(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"cannot listen on {where}: {error.strerror or error}") from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        why = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise StartError(f"cannot listen on {where}: {why}") from None
    sock.setblocking(False)
    return sock
