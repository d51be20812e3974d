"""The folds of a process's sessions, and the way of a turn through them. To be used as FoldCache (folds.py).

A slot given must be pinned or owned by the caller, a fold be that of the slot. Ids are int32, little-endian.
"""

from collections.abc import Callable, Sequence

from _typeshed import ReadableBuffer as Buffer
from typing_extensions import disjoint_base

from areal_fast.core._core import Arena
from areal_fast.protocol.records import Routed
from areal_fast.protocol.sessions import SessionState

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

    def commit(
        self,
        slot: int,
        ordinal: int,
        trajectory: int,
        parent: int,
        interaction_id: str,
        prompt: bytes,
        output: Buffer,
        logprobs: Buffer,
        version_runs: Sequence[tuple[int, int]],
        stop_reason: str,
        messages_hash: bytes,
        body_hash: bytes,
        extra: bytes,
        routed: Routed | None,
        reservation: int,
    ) -> None:
        """Append an INTERACTION (records.py) and fold on over it. prompt, output: ids [P], [O]; logprobs:
        float32 [O]; version_runs: (weight version, count), which must cover the output (else ValueError, and
        nothing happened). It refers to the best of `parent` (an ordinal, or NO_REF) and the trajectory's last
        two. Gone, ArenaFull: nothing happened, and the reservation is kept."""

    def note_sent(self, slot: int, trajectory: int, ordinal: int, fate: int) -> None:
        """Append a SENT record. Gone, ArenaFull."""
