"""Deadlines of all connections behind one timer.

Theory. Time is counted in ticks. An item sits in one bucket, the tick at which it is looked at next; its
`due` may move later for free (one store), and the bucket, when its tick comes, files it again. Only a
deadline that comes closer files the item anew; its old entry is then recognised by `filed` and dropped. So a
request on a kept connection costs one store, not a timer. Nothing is filed further ahead than _AHEAD ticks,
so that what is over and forgotten is not kept by a bucket for all of its deadline.

Invariants: an item expires at or after its deadline, at most two ticks late while the loop keeps up. Ticks
are those the loop has run, not wall time: after a stopped process or a stalled loop every client still has
its full time, and what it sent meanwhile is read first. With no item filed the timer does not run. What
`expired` raises goes to the loop, and the others expire.
"""

from __future__ import annotations

import asyncio
from math import ceil
from typing import Protocol

_AHEAD = 64


class Timed(Protocol):
    """What can be filed. Both fields belong to the wheel, and start at 0."""

    due: int
    filed: int

    def expired(self) -> None: ...


class Wheel:
    def __init__(self, tick_s: float) -> None:
        self.tick_s = tick_s
        self.now = 1
        self._buckets: dict[int, list[Timed]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def ticks(self, seconds: float) -> int:
        """Ticks that cover `seconds` at least."""
        return max(1, ceil(seconds / self.tick_s)) + 1

    def set(self, item: Timed, ticks: int) -> None:
        """Let `item` expire in `ticks` from now instead of whenever it would have."""
        item.due = due = self.now + ticks
        if not 0 < item.filed <= due:
            self._file(item, due)

    def _file(self, item: Timed, due: int) -> None:
        item.filed = tick = min(due, self.now + _AHEAD)
        bucket = self._buckets.get(tick)
        if bucket is None:
            self._buckets[tick] = [item]
        else:
            bucket.append(item)
        if self._timer is None:
            self._loop = self._loop or asyncio.get_running_loop()
            self._timer = self._loop.call_later(self.tick_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self.advance()
        if self._buckets and self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(self.tick_s, self._fire)

    def advance(self) -> None:
        """One tick."""
        self.now += 1
        for item in self._buckets.pop(self.now, ()):
            if item.filed != self.now:
                continue
            item.filed = 0
            if item.due > self.now:
                self._file(item, item.due)
            elif item.due:
                item.due = 0
                try:
                    item.expired()
                except Exception as error:  # its own fault, and not that of the others in here
                    self._report(error)

    def _report(self, error: Exception) -> None:
        assert self._loop is not None
        self._loop.call_exception_handler({"message": "at a deadline", "exception": error})

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._buckets.clear()
