"""Server-sent events, split from a byte stream: the data of each event, as it completes. Pure state, no I/O.

Only what engines send: `data:` lines (several in one event are joined by a newline), comments and other
fields ignored, events ended by an empty line, lines ended by LF or CRLF. Source: WHATWG HTML, "Server-sent
events".
"""

from __future__ import annotations

MAX_EVENT_BYTES = 1 << 30


class EventTooLong(ValueError):
    """One event passed MAX_EVENT_BYTES."""


class EventSplitter:
    """Feed chunks, get the data of completed events. How the bytes are chunked makes no difference."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Raises EventTooLong."""
        self._parts.append(chunk)
        self._size += len(chunk)
        if b"\n" not in chunk:
            # an event ends in a LF: without one there is nothing to look for, and long events are joined once
            if self._size > MAX_EVENT_BYTES:
                raise EventTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")
            return []
        buffer = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        if b"\r" in buffer:
            buffer = buffer.replace(b"\r\n", b"\n")
        *complete, rest = buffer.split(b"\n\n")
        self._parts = [rest] if rest else []
        self._size = len(rest)
        return [data for data in map(_data_of, complete) if data is not None]

    def finish(self) -> list[bytes]:
        """The event that the stream's end completes, if there is one with data. (Engines may leave out the
        last LF.)"""
        data = _data_of(b"".join(self._parts).replace(b"\r\n", b"\n").rstrip(b"\r\n"))
        self._parts, self._size = [], 0
        return [] if data is None else [data]


def _data_of(event: bytes) -> bytes | None:
    if event.startswith(b"data:") and b"\n" not in event:
        return event[6:] if event[5:6] == b" " else event[5:]
    lines = []
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line[5:6] == b" " else line[5:])
    return b"\n".join(lines) if lines else None
