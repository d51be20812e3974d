"""Names shared by all who talk to the arena: constants, error classes, the shape of a slot and a record.

Plain Python, no native code, so that the model in tests/model_arena.py and the pure layers can use them
without a built extension. The extension compares every number here with the C header when it is imported
and refuses to load if one differs; nothing else keeps the two in step.

Errors: the C core answers with a negative code; `raise_code` is the only place that turns one into an
exception. None of these classes knows about HTTP; the store maps them to answers.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn, TypeAlias

MAX_PROCS = 32
PROC_SUPERVISOR = 31
PROC_CLEANER = 30
PROC_KEEPER = 29

STATE_FREE = 0
STATE_INIT = 1
STATE_ACTIVE = 2
STATE_CLOSING = 3
STATE_DETACHED = 4
STATE_DUMPED = 5

SESSION = 0
SHARD = 1

REC_CHECKPOINT = 1
REC_EXPORTING = 5
REC_FLAG_REMOVE = 1

OUTCOME_PENDING = 0
OUTCOME_COMMITTED = 1
OUTCOME_ABORTED = 2

TXN_GONE = 0
TXN_OPEN = 1
TXN_COMMITTED = 2

LOG_ANY = (1 << 64) - 1
"""As `expect` of an append: link the record whatever the head is by then."""

NUM_WORDS = 64
NUM_COUNTERS = 128
MAX_NAME_BYTES = 1024

E_NOSPC = -1
E_BUSY = -2
E_EXISTS = -3
E_MOVED = -4
E_GONE = -5
E_TRIMMED = -6
E_LAYOUT = -7
E_INVAL = -8
E_NOENT = -9
E_CORRUPT = -10
E_SYS = -11


class CoreError(Exception):
    """Any refusal of the core. `code` is the C core's AF_E* number."""

    code: int = 0

    def __init__(self, message: str = "", *, code: int = 0) -> None:
        super().__init__(message or (type(self).__doc__ or "").splitlines()[0])
        if code:
            self.code = code


class ArenaFull(CoreError):
    """The arena has no room for this; what is kept back is for rewards, exports and clean-up."""

    code = E_NOSPC


class IndexBusy(CoreError):
    """Something is in the way for a moment: nothing changed, back off on the loop and try again.

    Mostly the index mutex, held by another process; for a compaction also a writer or an export under way."""

    code = E_BUSY


class Exists(CoreError):
    """The key is bound to another live session; `slot` says which."""

    code = E_EXISTS

    def __init__(self, message: str = "", *, code: int = 0, slot: int = -1) -> None:
        super().__init__(message, code=code)
        self.slot = slot


class HeadMoved(CoreError):
    """The log has a newer record than the caller's decision was based on; fold again and decide again."""

    code = E_MOVED


class Gone(CoreError):
    """The slot no longer takes this: it was removed, or is not in the state the call needs."""

    code = E_GONE


class Trimmed(CoreError):
    """The record was cut out of the log by a compaction; read the log again."""

    code = E_TRIMMED


class LayoutMismatch(CoreError):
    """The mapping is not an arena of this layout version and size."""

    code = E_LAYOUT


class BadArgument(CoreError, ValueError):
    """A name too long, a number out of range, a slot of the wrong kind."""

    code = E_INVAL


_BY_CODE: dict[int, type[CoreError]] = {
    c.code: c for c in (ArenaFull, IndexBusy, Exists, HeadMoved, Gone, Trimmed, LayoutMismatch, BadArgument)
}


def raise_code(code: int, what: str = "", *, slot: int = -1) -> NoReturn:
    """Raise the exception of a negative C code. `what` names the operation, `slot` the holder for Exists."""
    cls = _BY_CODE.get(code, CoreError)
    message = f"{what}: {(cls.__doc__ or '').splitlines()[0]}" if what else ""
    if cls is Exists:
        raise Exists(message, code=code, slot=slot)
    if cls is CoreError:
        message = f"{what}: core error {code}"
    raise cls(message, code=code)


class SlotInfo(NamedTuple):
    """One slot as it was a moment ago. Words are read one by one: only `state`, `owner`, `seq` and `pins`
    are from the same instant. `pins` is the mask of processes, not a count. Times are CLOCK_MONOTONIC ns."""

    state: int
    owner: int
    seq: int
    pins: int
    kind: int
    id: bytes
    key: bytes
    created_ns: int
    touched_ns: int
    nbytes: int
    ordinal: int
    head: int
    txn: int
    deadline_ns: int


Record: TypeAlias = tuple[int, int, int, int, int, bytes, int]
"""(offset, type, flags, aux, outcome, meta, data_len). `outcome` is resolved through the txn word for
REC_EXPORTING as of the moment of reading; PENDING may change later (record_outcome), the others never do."""
