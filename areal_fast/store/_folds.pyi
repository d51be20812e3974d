"""The folds of a process's sessions, and the way of a turn through them. To be used as FoldCache (folds.py).

A slot given must be pinned or owned by the caller, a fold be that of the slot. Ids are int32, little-endian.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar, final

from typing_extensions import disjoint_base

from areal_fast.core._core import Arena
from areal_fast.protocol.records import Routed
from areal_fast.protocol.sessions import SessionState
from areal_fast.store.session import Parent
from areal_fast.store.store import SessionStore

@disjoint_base
class Folds:
    max_bytes: int
    """What all folds may take; the one in use may take more."""
    max_ids_bytes: int
    def __init__(
        self, arena: Arena, make: Callable[[], SessionState], max_bytes: int, max_ids_bytes: int
    ) -> None: ...
    @property
    def arena(self) -> Arena: ...
    @property
    def fold_bytes(self) -> int: ...
    @property
    def fold_count(self) -> int: ...
    @property
    def ids_bytes(self) -> int: ...
    @property
    def turns_open(self) -> dict[int, int]:
        """Of each slot the turns in flight, where there are any."""

    def refresh(self, slot: int) -> SessionState:
        """The fold as of now."""

    def resolve(self, slot: int, fold: SessionState) -> None:
        """Called by refresh for a fold with pending exports: see what became of them."""

    def read_on(self, slot: int, fold: SessionState) -> None:
        """Fold on over what came since the fold's head, if it was cut all from the start."""

    def forget(self, slot: int) -> None: ...
    def full_bytes(self, slot: int, fold: SessionState, ordinal: int) -> bytes:
        """Prompt and output ids of an interaction; b"" if it has none. Trimmed if the log was cut since the
        fold. KeyError if it is not there."""

@disjoint_base
class Pinned:
    """A pin on a session, which it owns until `release`. `counts`: this use is an access."""

    def __new__(cls, store: SessionStore, slot: int, session_id: str, counts: bool = True) -> Self: ...
    @property
    def _store(self) -> SessionStore: ...
    @property
    def slot(self) -> int: ...
    @property
    def session_id(self) -> str: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def release(self) -> None:
        """Touch and unpin. Once is enough, more do nothing."""

    def access(self) -> None:
        """From now on this use is an access."""

    def twin_ordinal(self, body: bytes, key: bytes) -> int:
        """As SessionState.twin_of of the state as of now."""

    def lives(self, process: int) -> bool:
        """Whether that process (records.courier_word) lives. Session's."""

    @property
    def state(self) -> SessionState:
        """The folded state as of now (a due deadline is fired first). Read, don't change."""

_P = TypeVar("_P", bound=Pinned)

def open_session(folds: Folds, kind: type[_P], store: SessionStore, key: str) -> _P | None:
    """The live session of this key, pinned and touched. ExportBusy while a live export removes it."""

@final
class Fate:
    """What is to be told what becomes of a reply (Session.fate)."""

    def __init__(self, session: Pinned, place: tuple[int, int]) -> None: ...
    def __call__(self, arrived: bool) -> None: ...

@disjoint_base
class Begun:
    """A turn that has begun: its place is taken, and room for `reserve_tokens` if they are more than 0.
    `store` False: it is not recorded, and ordinal and trajectory are −1. ArenaFull."""

    parent: Parent | None
    interaction_id: str
    reservation: int
    """Of the arena's, 0 if there is none."""

    def __new__(cls, session: Pinned, reserve_tokens: int, store: bool) -> Self: ...
    @property
    def session(self) -> Pinned: ...
    @property
    def session_id(self) -> str: ...
    @property
    def ordinal(self) -> int: ...
    @property
    def trajectory(self) -> int: ...
    @property
    def open(self) -> bool:
        """It has not ended."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def reserve(self, tokens: int) -> None:
        """Set room aside for `tokens` prompt and output tokens, where begin_turn could not know them yet: a
        turn takes its place before its prompt is encoded. ArenaFull: answer 507 before asking the engine."""

    def abandon(self) -> None:
        """Nothing is recorded, the room is given back. After a commit this does nothing."""

    def end(self) -> None:
        """It is over, and what is left of its room is given back. Once is enough."""

    def commit(
        self,
        *,
        prompt_ids: Any,
        output_ids: Any,
        logprobs: Any,
        version_runs: Sequence[tuple[int, int]],
        stop_reason: str,
        messages_hash: bytes = b"",
        body_hash: bytes = b"",
        extra: bytes = b"",
        routed: Routed | None = None,
    ) -> None:
        """Record the interaction: the commit point of a chat, to be passed before its reply leaves.

        prompt_ids, output_ids: int32 [P], [O] (array, list, or bytes of little-endian ones); logprobs:
        float32 [O]; version_runs: (weight version, count) covering the O output tokens, else ValueError. The
        record refers to the best of the parent and the last two interactions. Gone: the session was removed
        meanwhile, and nothing is recorded. ArenaFull cannot happen within what was reserved."""
