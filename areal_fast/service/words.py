"""The arena's global words as the service uses them: which number means what, and who writes it.

A word is a signed 64-bit integer, read and written whole, visible in every process at once: that is how
/set_version and /pause_generation are in force in every worker before their reply is sent.

PAUSED holds `generation << 1 | flag`. The generation makes each change unique, so that a pause which failed
can take back exactly its own mark (a CAS) and not one that another request has made since.
"""

from __future__ import annotations

from typing import Final, Protocol

VERSION: Final = 0
"""Weight version. Written by /set_version."""

PAUSED: Final = 1
"""See above. Written by /pause_generation and /continue_generation."""

TREE_SIGNALLED: Final = 3
"""Counts SIGTERM and SIGINT that reached children: somebody signals the whole tree and will soon kill it."""


class Words(Protocol):
    def word(self, i: int) -> int: ...
    def set_word(self, i: int, v: int) -> None: ...
    def cas_word(self, i: int, old: int, new: int) -> bool: ...


class SharedState:
    """Pause flag and weight version: what the engine adapter asks before each attempt."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def paused(self) -> bool:
        return bool(self._words.word(PAUSED) & 1)

    def version(self) -> int:
        return self._words.word(VERSION)

    def set_version(self, version: int) -> None:
        self._words.set_word(VERSION, version)

    def mark(self, paused: bool) -> tuple[int, int]:
        """Set the flag in every process; returns (word before, word after) for `take_back`."""
        while True:
            before = self._words.word(PAUSED)
            after = ((before >> 1) + 1) << 1 | int(paused)
            if self._words.cas_word(PAUSED, before, after):
                return before, after

    def take_back(self, change: tuple[int, int]) -> None:
        """Undo `mark` unless somebody changed the flag since."""
        before, after = change
        self._words.cas_word(PAUSED, after, ((after >> 1) + 1) << 1 | (before & 1))


# Counters: monotonic sums over all processes, dead ones included. One writer each: the process that counts.
SESSIONS_CLEANED: Final = 0
SESSIONS_DROPPED: Final = 1
DUMP_FILES: Final = 2
DUMP_BYTES: Final = 3
DUMP_FAILURES: Final = 4
SHARDS_EXPIRED: Final = 5
CLEANUPS: Final = 6

CLEANUP_COUNTERS: Final = {
    "runs": CLEANUPS,
    "sessions": SESSIONS_CLEANED,
    "dropped": SESSIONS_DROPPED,
    "files": DUMP_FILES,
    "bytes": DUMP_BYTES,
    "failed_tries": DUMP_FAILURES,
    "expired_shards": SHARDS_EXPIRED,
}
