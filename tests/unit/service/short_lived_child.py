"""A child that becomes ready and dies."""

from __future__ import annotations

import socket
import sys

import msgspec


def main() -> None:
    with open(int(sys.argv[sys.argv.index("--boot-fd") + 1]), "rb") as file:
        boot = msgspec.json.decode(file.read())
    socket.socket(fileno=boot["control_fd"]).send(b'{"is": "ready"}')
    sys.exit(7)


if __name__ == "__main__":
    main()
