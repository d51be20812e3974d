"""The command and the terminal: alternate screen, keys, resizing, and what is done where there is none.

The screen is drawn whole, in one write, each line cleared before it is written, so nothing flickers and
nothing is left of an earlier, longer one. On any way out (q, Ctrl-C, SIGTERM, an error) the terminal is as it
was before. Asking blocks for TIMEOUT_S at most; keys wait that long at worst.

Not a terminal: a line an interval (`--once`: the picture once, without colours).
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Final

from areal_fast.config import wants_color
from areal_fast.top.picture import Line, picture, short, text
from areal_fast.top.samples import Source, Unreachable, address
from areal_fast.top.view import View

STYLES: Final = {"": "0", "title": "0;1", "dim": "0;2", "good": "0;32", "warn": "0;33", "bad": "0;1;31"}
PLAIN: Final = {"": "0", "title": "0;1", "dim": "0", "good": "0", "warn": "0;1", "bad": "0;7"}
"""Without colours: what is wrong is shown in reverse."""
ENTER: Final = "\x1b[?1049h\x1b[?25l\x1b[?7l"
LEAVE: Final = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
SHORTEST_S: Final = 0.2
ONCE_S: Final = 1.0
SIZE: Final = (80, 24)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `areal-fast top …`; the exit status is 1 if the proxy never answered."""
    parser = argparse.ArgumentParser(
        prog="areal-fast top", description="What a running proxy does, as it does it. q quits."
    )
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8082", help="its address (%(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="(1)")
    parser.add_argument("--once", action="store_true", help="one picture of one second, then end")
    args = parser.parse_args(argv)
    try:
        source = Source(address(args.url))
    except ValueError as error:
        parser.error(str(error))
    if not args.interval >= SHORTEST_S:
        parser.error(f"--interval is at least {SHORTEST_S:g}")
    view = View()
    try:
        if args.once:
            _once(source, view)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            _live(source, view, args.interval)
        else:
            _lines(source, view, args.interval)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        source.close()
    return 1 if view.empty else 0


def _ask(source: Source, view: View) -> None:
    try:
        view.add(source.ask())
    except Unreachable as error:
        view.lost(str(error))


def _once(source: Source, view: View) -> None:
    _ask(source, view)
    if not view.empty:
        time.sleep(ONCE_S)
        _ask(source, view)
    columns, _ = shutil.get_terminal_size(SIZE)
    print(text(picture(view, source.url, columns, 1000, time.time())), flush=True)


def _lines(source: Source, view: View, interval_s: float) -> None:
    while True:
        _ask(source, view)
        print(short(view, time.time()), flush=True)
        time.sleep(interval_s)


def _live(source: Source, view: View, interval_s: float) -> None:
    styles = STYLES if wants_color() else PLAIN
    with Screen() as screen:
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                _ask(source, view)
                due = max(due + interval_s, time.monotonic() + SHORTEST_S)
            screen.draw(source.url, view, styles)
            if screen.wait(due - time.monotonic()):
                return


class Screen:
    """The terminal while it is ours."""

    def __init__(self) -> None:
        self._in = sys.stdin.fileno()
        self._out = sys.stdout.fileno()
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._ended = False

    def __enter__(self) -> Screen:
        self._mode = termios.tcgetattr(self._in)
        self._handlers = {n: signal.getsignal(n) for n in (signal.SIGWINCH, signal.SIGTERM, signal.SIGCONT)}
        for number in self._handlers:
            signal.signal(number, self._signalled)
        self._own()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._write(LEAVE)
        termios.tcsetattr(self._in, termios.TCSAFLUSH, self._mode)
        os.close(self._wake)
        os.close(self._waker)

    def _own(self) -> None:
        tty.setcbreak(self._in)
        self._write(ENTER)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._ended = True
        elif number == signal.SIGCONT:  # back from Ctrl-Z: the shell has changed the terminal
            self._own()
        try:
            os.write(self._waker, b"!")
        except BlockingIOError:
            pass  # it is awake already

    def draw(self, url: str, view: View, styles: dict[str, str]) -> None:
        try:
            width, height = os.get_terminal_size(self._out)
        except OSError:
            width, height = SIZE
        lines = picture(view, url, max(width, 20), max(height, 2), time.time())
        # A line is cleared before it is written: after it, the cursor may stand on its last column.
        rows = ["\x1b[0m\x1b[2K" + _row(line, styles) for line in lines]
        rest = "\x1b[0m\r\n\x1b[J" if len(lines) < height else ""
        self._write("\x1b[H" + "\r\n".join(rows) + rest)

    def wait(self, seconds: float) -> bool:
        """Until `seconds` have passed, a key or a new size. True: end."""
        ready, _, _ = select.select([self._in, self._wake], [], [], max(0.0, seconds))
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._in in ready:
            keys = os.read(self._in, 64)
            return not keys or b"q" in keys or b"Q" in keys or b"\x04" in keys
        return self._ended

    def _write(self, data: str) -> None:
        left = data.encode("utf-8", "replace")
        while left:
            left = left[os.write(self._out, left) :]


def _row(line: Line, styles: dict[str, str]) -> str:
    return "".join(f"\x1b[{styles[style]}m{part}" for part, style in line if part)
