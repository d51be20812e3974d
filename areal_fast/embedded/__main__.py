"""`python -m areal_fast.embedded` (also `areal-fast embedded`): the embedded engine as a process.

Alone it listens on --host and --port, says so in one line on stdout, and stops on SIGTERM or SIGINT.

As a supervisor's child (`--inherit-fd N`, a listening socket) it says nothing, ignores SIGTERM and
SIGINT, because a guard signals a whole tree at once and the workers still need their engine while they
drain, and goes at the end of its standard input, which the supervisor holds, or at the latest when its
parent dies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import typing
from collections.abc import Sequence

import msgspec
import uvloop

from areal_fast.embedded import tokenizer
from areal_fast.embedded.answers import TokenRange
from areal_fast.embedded.engine import EmbeddedEngine, Switches
from areal_fast.embedded.server import NOTICE, EmbeddedServer
from areal_fast.http import Limits, Server

MAX_BODY_BYTES = 256 << 20


def parser() -> argparse.ArgumentParser:
    """The command line; every switch is a flag."""
    made = argparse.ArgumentParser(
        prog="areal-fast embedded",
        description=f"{NOTICE}. Speaks SGLang's and vLLM's HTTP API. A prompt always gets the same answer.",
        epilog="The switches can be changed while it runs: POST /embedded/configure with a JSON object.",
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    made.add_argument("--port", type=int, default=30000, help="port, 0 for a free one (30000)")
    made.add_argument(
        "--inherit-fd", type=int, help="a supervisor's listening socket, instead of host and port"
    )
    made.add_argument(
        "--tokens",
        default="words",
        help="what answers are made of: 'words' for the tokenizer builtin:bytes (default), or LOW-HIGH: any "
        "token ids from LOW to below HIGH, for another tokenizer",
    )
    made.add_argument("--vocab-size", type=int, help="short for --tokens 0-SIZE")
    made.add_argument(
        "--eos-id",
        type=int,
        help="the token id that ends an answer (builtin:bytes' own; else the request's last stop token id)",
    )
    switches = made.add_argument_group("switches")
    for field in msgspec.structs.fields(Switches):
        flag = "--" + field.name.replace("_", "-")
        annotated = typing.get_args(field.type)
        about = f"{annotated[1].description} ({field.default or 'off'})"
        if isinstance(field.default, bool):
            switches.add_argument(flag, action="store_true", help=about)
        elif typing.get_origin(annotated[0]) is typing.Literal:
            switches.add_argument(
                flag, choices=typing.get_args(annotated[0]), default=field.default, help=about
            )
        else:
            switches.add_argument(
                flag, type=type(field.default), default=field.default, metavar="X", help=about
            )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop. Returns the exit status: 0, 1 if it cannot listen, 2 for a bad command line."""
    made = parser()
    args = made.parse_args(arguments)
    try:
        tokens = TokenRange.parse(f"0-{args.vocab_size}" if args.vocab_size is not None else args.tokens)
        names = [field.name for field in msgspec.structs.fields(Switches)]
        switches = msgspec.convert({name: getattr(args, name) for name in names}, Switches)
    except (ValueError, msgspec.ValidationError) as error:
        print(f"{made.prog}: error: {error}", file=sys.stderr)
        return 2
    eos_id = tokenizer.EOS_ID if args.eos_id is None and tokens.words else args.eos_id
    is_child = args.inherit_fd is not None
    try:
        sock = socket.socket(fileno=args.inherit_fd) if is_child else _listen(args.host, args.port)
    except (OSError, OverflowError) as error:
        print(f"{made.prog}: error: cannot listen: {error}", file=sys.stderr)
        return 1
    if is_child:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    engine = EmbeddedEngine(tokens, eos_id, switches)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(engine, sock, is_child=is_child))
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


async def serve(engine: EmbeddedEngine, sock: socket.socket, *, is_child: bool) -> None:
    """Serve `engine` on a listening socket until the parent or a signal ends it."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    if is_child:
        _watch_parent(loop)
    else:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        with contextlib.suppress(OSError):
            print(f"{NOTICE}. Listening on http://{shown}:{port}", flush=True)
    server = Server(EmbeddedServer(engine).handle, Limits(max_body_bytes=MAX_BODY_BYTES))
    await server.serve(sock)
    await stop.wait()
    engine.abort_requests("", every=True)
    await server.drain(1.0)
    sock.close()


def _watch_parent(loop: asyncio.AbstractEventLoop) -> None:
    """Leave at once when standard input ends: it is the line that the supervisor holds."""

    def readable() -> None:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            if not os.read(0, 4096):
                os._exit(0)

    os.set_blocking(0, False)
    loop.add_reader(0, readable)


if __name__ == "__main__":
    sys.exit(main())
