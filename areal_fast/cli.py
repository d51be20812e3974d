"""The command: `areal-fast serve` (also `python -m areal_fast`), and `top`, `dumps`, `demo`, `embedded`.

`serve` is the default, so that the flags of AReaL's data proxy can follow the module's name directly. Exit
status: 0 after an orderly stop, 1 if the proxy cannot start or cannot stay up, 2 for a bad command line; the
last two with one line on stderr and nothing left running.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

COMMANDS = ("serve", "top", "dumps", "demo", "embedded")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = "serve"
    if arguments and not arguments[0].startswith("-"):
        command = arguments.pop(0)
    if command == "serve":
        return serve(arguments)
    if command == "top":
        from areal_fast.top import main as top

        return top(arguments)
    if command == "dumps":
        from areal_fast.dumps import main as dumps

        return dumps(arguments)
    if command == "demo":
        from areal_fast.demo import main as demo

        return demo(arguments)
    if command == "embedded":
        from areal_fast.embedded.__main__ import main as embedded

        return embedded(arguments)
    return complain(f"unknown command {command!r}: one of {', '.join(COMMANDS)}", 2)


def serve(arguments: Sequence[str]) -> int:
    """The proxy itself, until it is told to stop."""
    from areal_fast import config
    from areal_fast.http import parse_base_url

    try:
        settings, unknown = config.parse(arguments)
        if settings.has_engine and not settings.backend_embedded:
            parse_base_url(settings.backend_addr)  # what the workers' client will do with it
    except config.UsageError as error:
        return complain(str(error), 2)
    except ValueError as error:
        return complain(f"argument --backend-addr: {error}", 2)
    from areal_fast.service.listening import StartError
    from areal_fast.service.log import Log
    from areal_fast.service.supervisor import Supervisor

    log = Log("supervisor", settings.log_level)
    if unknown:
        log.warning("flags_ignored", flags=" ".join(unknown))
    try:
        return Supervisor(settings, log).run()
    except StartError as error:
        return complain(str(error), 1)


def complain(why: str, status: int) -> int:
    with contextlib.suppress(OSError):  # perhaps nobody reads it; the status says it too
        print(f"areal-fast: error: {why}", file=sys.stderr, flush=True)
    return status
