"""A child that does what the control line says and nothing else: stands in for workers and the cleaner."""

from __future__ import annotations

import os
import signal
import socket
import sys

import msgspec


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with open(int(sys.argv[sys.argv.index("--boot-fd") + 1]), "rb") as file:
        boot = msgspec.json.decode(file.read())
    line = socket.socket(fileno=boot["control_fd"])

    def send(**message: object) -> None:
        line.send(msgspec.json.encode(message))

    send(**{"is": "ready"})
    while packet := line.recv(65536):
        message = msgspec.json.decode(packet)
        what = message["do"]
        if what == "drain":
            send(**{"is": "drained", "unfinished": 0})
            os._exit(0)
        elif what == "shared":
            send(**{"is": "applied", "revision": message["revision"]})
        elif what == "retire":
            os._exit(0)
        elif what == "dump":
            send(**{"is": "dumped", "dumped": 1, "left": 0})
            if message["final"]:
                os._exit(0)
        elif what == "board" and message["board"].get("cleanup", {}).get("ask"):
            send(**{"is": "change", "token": 9, "values": {"backend_addr": "http://new"}})


if __name__ == "__main__":
    main()
