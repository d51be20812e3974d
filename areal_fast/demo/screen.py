"""What a person sees while the demo runs: a line an event, and how things stand.

On a terminal the state is one line that is rewritten in place; elsewhere it is a plain line every few
seconds. A reader that went away stops nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from typing import TextIO

PLAIN_EVERY_S = 3.0


class Screen:
    """`event` for what happened, `status` (as often as one likes) for how things stand."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._tty = self._stream.isatty()
        self._began = time.monotonic()
        self._last_plain = 0.0
        self._shown = False

    def line(self, text: str = "") -> None:
        self._wipe()
        self._write(text + "\n")

    def event(self, text: str) -> None:
        self.line(f"[{self._time()}] {text}")

    def status(self, text: str) -> None:
        now = time.monotonic()
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r\x1b[2K" + f"[{self._time()}] {text}"[:width])
            self._shown = True
        elif now - self._last_plain >= PLAIN_EVERY_S:
            self._last_plain = now
            self.event(text)

    def _time(self) -> str:
        return f"{time.monotonic() - self._began:5.1f} s"

    def _wipe(self) -> None:
        if self._shown:
            self._write("\r\x1b[2K")
            self._shown = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
