"""A session's fold in memory. SessionState (sessions.py) is this and the rules.

Ordinals, trajectories, lengths and refs are as in records.InteractionMeta. Metas are records' (records.py);
one that is cut short raises ValueError and changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import final

from typing_extensions import disjoint_base

from areal_fast.protocol.records import DumpNames, InteractionMeta
from areal_fast.protocol.sessions import PendingExport, Record

@final
class Interaction:
    """One recorded request and answer, as of when it was asked for. `reward` is None until one is set. String
    interactions have no tokens: `meta` is None and `messages_size` tells their data apart. `offset`: of the
    record; `nbytes`: all of it. `seq`: in which order the records came."""

    @property
    def ordinal(self) -> int: ...
    @property
    def trajectory(self) -> int: ...
    @property
    def interaction_id(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def meta(self) -> InteractionMeta | None: ...
    @property
    def messages_size(self) -> int: ...
    @property
    def seq(self) -> int: ...
    @property
    def reward(self) -> float | None: ...
    @property
    def fate(self) -> int: ...

@disjoint_base
class Folded:
    head: int
    """The log's head word this state belongs to; 0: nothing was read yet."""
    live_bytes: int
    dead_bytes: int
    member: int
    """Which of its group the session is, or −1 (known only where members are noted, see SessionStore)."""
    pending: Sequence[PendingExport]
    exports: Sequence[int]
    lost: dict[bytes, tuple[int, int]] | None
    dump_names: DumpNames | None
    by_prefix: dict[bytes, int] | None
    """Of the active trajectory's messages hashes the first ordinals, once `parent_of` was asked."""

    def __init__(self) -> None: ...
    @property
    def active_index(self) -> int: ...
    @property
    def active_count(self) -> int: ...
    @property
    def newest(self) -> int:
        """The highest ordinal of the active trajectory, −1 if it is empty."""

    @property
    def reward_ordinal(self) -> int:
        """Where the active trajectory's last reward fell, or −1."""

    @property
    def deadline_ns(self) -> int:
        """When that reward becomes final; 0: nothing is waiting."""

    @property
    def seq(self) -> int:
        """How many interactions came by now."""

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, nearly."""

    def begin_anew(
        self,
        active: int = 0,
        reward_ordinal: int = -1,
        deadline_ns: int = 0,
        ready: Sequence[tuple[int, int, int]] = (),
        rewards: dict[int, float] | None = None,
        fates: dict[int, int] | None = None,
    ) -> None:
        """No interactions; the trajectories as said: (index, reward_ordinal, courier) of ready ones.
        `rewards` and `fates`, by ordinal, are those of interactions to come, and are emptied by them."""

    def apply(self, taken: list[Record]) -> None:
        """Fold on. Records in log order. What no turn or reward appends goes to `apply_rare`."""

    def apply_rare(self, record: Record) -> None:
        """SessionState's."""

    def append_reward(self, head: int, meta: bytes) -> None:
        """Fold on over the one REWARD that this process appended right behind the state's head, without
        reading it again. `head` is the log's word now."""

    def set_courier(self, index: int, courier: int) -> None:
        """Of a ready trajectory, if there is this one."""

    def exported(self, index: int, before: int) -> None:
        """A ready trajectory is gone, with those of its interactions whose seq is below `before`; the others
        are late."""

    @property
    def ready_count(self) -> int: ...
    def interaction_count(self) -> int: ...
    @property
    def has_ready(self) -> bool: ...
    @property
    def has_untold(self) -> bool:
        """There are ready trajectories that the callback server has not been told of."""

    @property
    def is_empty(self) -> bool:
        """Nothing is kept: no active, ready or late interaction."""

    def is_due(self, now_ns: int) -> bool:
        """The finish timeout of the last reward has passed: a READY record is to be appended."""

    def ready_all(self) -> list[tuple[int, int, int]]:
        """(index, reward_ordinal, courier) of the ready trajectories, in the order they became ready."""

    def ordinals(self, index: int) -> list[int]:
        """Of the interactions of an active or ready trajectory, rising."""

    def offsets(self) -> list[int]:
        """Of all interactions' records, in log order."""

    def named(self, interaction_id: str) -> int:
        """The ordinal of the active trajectory's interaction with this id, or −1."""

    def twin_of(self, body: bytes, key: bytes, lives: Callable[[int], bool]) -> int:
        """The ordinal of the active trajectory's interaction whose reply a request is after that has these
        fingerprints (key: b"" if none was given), or −1. `lives` tells of a process. See retries.py."""

    def parent_of(self, index: int, prefixes: Sequence[bytes]) -> int:
        """The ordinal of the trajectory's first interaction with the longest of these prefixes, which are
        given from the shortest on; or −1."""

    def routed(self) -> set[bytes]:
        """The shards of routed experts that the log names."""

    def interaction(self, ordinal: int) -> Interaction | None: ...
    def interactions(self, index: int) -> dict[int, Interaction]:
        """Those of an active or ready trajectory by ordinal, in the order their records came."""

    def all_interactions(self) -> list[Interaction]:
        """In the order their records came, late ones included."""

    @property
    def late(self) -> dict[int, Interaction]:
        """Those that came when their trajectory was gone, by ordinal."""
