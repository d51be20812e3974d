"""One line an event on stderr: `time LEVEL who[pid] event key=value …`.

Rules:
* A reader that went away or stopped reading harms nobody: a line is written only if it fits without blocking,
  else it is counted and the count is told with the next line that does fit. Errors are dropped.
* NOTICE ranks with WARNING, so that start, stop, restart and the address are seen at the default level.
* A line is at most PIPE_BUF bytes and one write, so lines of several processes never mix.
* Values that are not plain words are quoted; line breaks never get through.
"""

from __future__ import annotations

import json
import os
import select
import time
from typing import Final

RANKS: Final = {
    "trace": 5,
    "debug": 10,
    "info": 20,
    "notice": 30,
    "warning": 30,
    "error": 40,
    "critical": 50,
}
PIPE_BUF: Final = 4096


class Log:
    """A process's own log. Cheap when the level is off: callers need not ask first."""

    def __init__(self, who: str, level: str = "warning", fd: int = 2) -> None:
        self.who = who
        self.threshold = RANKS[level]
        self.dropped = 0
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    @property
    def tells(self) -> bool:
        """Whether `info` writes anything: for who would only make its fields for it."""
        return self.threshold <= RANKS["info"]

    def debug(self, event: str, /, **fields: object) -> None:
        self.emit("debug", event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        self.emit("info", event, fields)

    def notice(self, event: str, /, **fields: object) -> None:
        self.emit("notice", event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        self.emit("warning", event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        self.emit("error", event, fields)

    def emit(self, level: str, event: str, fields: dict[str, object]) -> None:
        if RANKS[level] < self.threshold:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        parts = [f"{stamp}.{int(now % 1 * 1000):03d}Z", level.upper(), f"{self.who}[{os.getpid()}]", event]
        parts += [f"{name}={_value(value)}" for name, value in fields.items() if value is not None]
        if self.dropped:
            parts.append(f"log_lines_dropped={self.dropped}")
        line = " ".join(parts).encode("utf-8", "backslashreplace")[: PIPE_BUF - 1] + b"\n"
        self.dropped = 0 if self._write(line) else self.dropped + 1

    def _write(self, line: bytes) -> bool:
        # A pipe that polls writable takes PIPE_BUF bytes without blocking; a terminal or file always does.
        try:
            if not any(mask & select.POLLOUT for _, mask in self._poll.poll(0)):
                return False
            return os.write(self._fd, line) == len(line)
        except OSError:
            return False


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, default=str)
    text = str(value)
    plain = text and text.isprintable() and not any(c in ' "=' for c in text)
    return text if plain else json.dumps(text, ensure_ascii=False)
