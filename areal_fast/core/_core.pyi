"""The arena as Python sees it. Every call is one C call: no policy, no retries, no state but pin counts.

A `slot` is a small int, valid while the caller holds a pin on it (or owns it, as the cleaner does a DETACHED
one). Pins nest: the handle counts them, the shared mask has one bit a process. A `head` is an opaque 64-bit
word naming one state of a slot's log. Calls belong to the loop's thread, but for `record_data` and
`shard_view`. A closed handle raises BadArgument; it never touches memory that is gone. So does a handle in a
forked child: attach anew there, under another process number. Names are bytes, at most 1 KiB.
"""

from collections.abc import Sequence
from typing import Never, final

from _typeshed import ReadableBuffer, WriteableBuffer

from areal_fast.core.codes import Record, SlotInfo

LAYOUT_VERSION: int
CRASH_POINTS: bool
"""Whether this build has crash points and faults; never in a release."""

@final
class Arena:
    def __init__(self, *args: Never, **kwargs: Never) -> None:
        """TypeError: create or attach makes one."""

    @property
    def proc(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def session_slots(self) -> int:
        """Sessions are the slots below this number, shards those from it on."""

    @property
    def shard_slots(self) -> int: ...
    @staticmethod
    def create(max_bytes: int, *, session_slots: int = 0, shard_slots: int = 0, proc: int = 31) -> Arena:
        """A new arena in its own memfd. Slot counts of 0 are derived from `max_bytes`."""

    @staticmethod
    def attach(fd: int, proc: int) -> Arena:
        """Map the arena behind `fd` (which is dup()ed). LayoutMismatch if it is not one of this build's."""

    def fileno(self) -> int:
        """The memfd: close-on-exec; pass it on with pass_fds or os.set_inheritable."""

    def close(self) -> None:
        """Unmap, once the last shard view is gone. Pins and reservations still held stay until swept."""

    def __enter__(self) -> Arena: ...
    def __exit__(self, *exc: object) -> None: ...

    # -- processes -------------------------------------------------------------------------------------
    def proc_enter(self, pid: int) -> int:
        """Write this process into its slot of the process table; returns its incarnation."""

    def proc_leave(self) -> None: ...
    def heartbeat(self) -> None: ...
    def proc_info(self, proc: int) -> tuple[int, int, int]:
        """(pid, incarnation, ticks); pid 0 if nobody is there."""

    def lock_owner(self) -> int:
        """Process number holding the index mutex, or -1."""

    def sweep(self, proc: int) -> dict[str, int]:
        """Undo or finish what a process held. Only after its death is certain. Idempotent.

        Counts: pins, freed, committed (granules, runs), inits, txns_aborted, txns_finished, reaped, detached
        (left for the successor). IndexBusy after a second's wait for the index lock: call again."""

    def owned_slots(self, state: int, proc: int) -> list[int]:
        """Session slots in `state` (INIT, DETACHED or DUMPED) owned by `proc`."""

    # -- words and counters ----------------------------------------------------------------------------
    def word(self, i: int) -> int: ...
    def set_word(self, i: int, v: int) -> None: ...
    def add_word(self, i: int, v: int) -> int:
        """Atomic add; returns the new value."""

    def cas_word(self, i: int, old: int, new: int) -> bool: ...
    def count(self, counter: int, delta: int = 1) -> None: ...
    def histogram(self, first: int, bounds: Sequence[int]) -> Histogram:
        """Counters in a row, from `first`: one for each of `bounds` (rising, at most 32) and one for what is
        above them all, the sum of what was observed, and any number of others. BadArgument."""

    def counters(self) -> list[int]:
        """All counters summed over the processes, dead ones included."""

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC_COARSE, the clock of every time in the arena."""

    # -- sessions --------------------------------------------------------------------------------------
    def start(self, task: bytes, key: bytes, *, txn: int = 0, rebind_from: int = -1) -> tuple[int, bytes]:
        """New ACTIVE session `task-n` bound to `key` -> (slot, session id), not pinned.

        Exists: the key is bound to a live slot other than `rebind_from`. IndexBusy, ArenaFull."""

    def open_named(self, session_id: bytes) -> int:
        """Find or create the session of exactly this id, without a key; returns it pinned."""

    def pin_id(self, session_id: bytes) -> int:
        """The ACTIVE session's slot, pinned, or -1. A member of an uncommitted group is absent."""

    def pin_key(self, key: bytes) -> int: ...
    def pin_slot(self, slot: int) -> bool:
        """Pin if ACTIVE."""

    def unpin(self, slot: int) -> None:
        """Give back one pin. The last one of a CLOSING slot frees it."""

    def touch(self, slot: int) -> None:
        """Last access := now. Under a pin."""

    def slot_info(self, slot: int) -> SlotInfo: ...
    def slot_id(self, slot: int) -> bytes:
        """`slot_info(slot).id` alone: a request asks for it once or twice."""

    def slot_created_ns(self, slot: int) -> int:
        """As slot_info's created_ns."""
    def next_ordinal(self, slot: int) -> int:
        """0, 1, 2, … of this session. Under a pin."""

    def deadline(self, slot: int) -> int: ...
    def set_deadline(self, slot: int, ns: int) -> None: ...
    def close_session(self, slot: int) -> None:
        """ACTIVE -> CLOSING, under a pin. Lookups and appends fail from here; the last unpin frees it."""

    # -- log -------------------------------------------------------------------------------------------
    @staticmethod
    def record_of(head: int) -> int:
        """The offset of the newest record of the log that has this head word."""

    def head(self, slot: int) -> int: ...
    def append(
        self,
        slot: int,
        type: int,
        meta: ReadableBuffer,
        data: Sequence[ReadableBuffer] = (),
        *,
        expect: int = ...,
        aux: int = 0,
        flags: int = 0,
        critical: bool = False,
        reservation: int = 0,
    ) -> int:
        """Link one record (its data is the concatenation of `data`); returns the new head word.

        HeadMoved if `expect` is not the head any more; Gone if the session was removed; ArenaFull.
        A reservation is consumed by success and kept by failure."""

    def read(self, slot: int, since: int = 0) -> tuple[int, bool, list[Record]]:
        """(head, cut, records after head word `since`, oldest first). `cut`: the log was compacted after
        `since`, the list is complete and begins with its CHECKPOINT. since=0: all there is, cut False."""

    def record_data(self, slot: int, head: int, offset: int, start: int = 0, length: int = -1) -> bytes:
        """A record's data, or a part of it. Trimmed if the log `head` belongs to was compacted away."""

    def record_outcome(self, slot: int, head: int, offset: int) -> int:
        """OUTCOME_* of an EXPORTING record, resolved through its txn word."""

    def compact(self, slot: int, expect: int, checkpoint: ReadableBuffer, keep: Sequence[int]) -> int:
        """Replace the log by a CHECKPOINT record and copies of the records at offsets `keep` (oldest first).
        Returns the new head word. HeadMoved if the head is not `expect`."""

    def verify(self, slot: int) -> None:
        """Check every record's checksum; CoreError if one fails. O(bytes)."""

    def reserve(self, slot: int, nbytes: int) -> int:
        """Set room for one record of `nbytes` (meta and data) of this slot aside. ArenaFull. Never 0."""

    def release(self, reservation: int) -> None: ...

    # -- transactions ----------------------------------------------------------------------------------
    def txn_begin(self) -> int: ...
    def txn_commit(self, ref: int) -> None:
        """COMMIT POINT of a group start or an export."""

    def txn_finish(self, ref: int, slots: Sequence[int]) -> None:
        """After commit: write the outcome into the slots' EXPORTING records, close those flagged REMOVE,
        make group members plain, give the word back. `slots` must name every slot involved."""

    def txn_abort(self, ref: int, slots: Sequence[int]) -> None:
        """Before commit: group members are removed, EXPORTING records become ABORTED."""

    def txn_state(self, ref: int) -> int:
        """TXN_GONE (moved on), TXN_OPEN or TXN_COMMITTED."""

    # -- cleaner ---------------------------------------------------------------------------------------
    def detach_next(self, cutoff_ns: int, cursor: int) -> tuple[int, int]:
        """Detach the next ACTIVE, unpinned session not touched since `cutoff_ns`, from `cursor` on
        -> (slot or -1, next cursor); next cursor 0: the scan reached the end. Reaps CLOSING leftovers."""

    def detach(self, slot: int, cutoff_ns: int) -> bool: ...
    def set_dumped(self, slot: int) -> None:
        """DETACHED(me) -> DUMPED(me): what must be kept of it is durable elsewhere."""

    def reap(self, slot: int) -> None:
        """DUMPED(me) -> FREE."""

    def punch_idle(self, max_granules: int, *, idle_ns: int = 60_000_000_000) -> int:
        """Return memory that was free for `idle_ns` to the system; how many granules."""

    def prefault(self, nbytes: int) -> int:
        """Have the system back memory ahead of its use; granules backed. About 0.3 ms a MiB, GIL released."""

    def outside_take(self, nbytes: int) -> None:
        """Count memory beside the arena against its budget. ArenaFull: only the reserve kept for rewards,
        exports and cleanup would be left. One process's, which gives back what it took."""

    def outside_give(self, nbytes: int) -> None: ...

    # -- shards ----------------------------------------------------------------------------------------
    def shard_put(
        self,
        shard_id: bytes,
        meta: ReadableBuffer,
        data: Sequence[ReadableBuffer],
        *,
        bits: int = 0,
        critical: bool = False,
    ) -> int:
        """Store a shard, replacing one of the same id atomically. `bits` parts, all present at first."""

    def shard_reserve(
        self, shard_id: bytes, meta: ReadableBuffer, size: int, *, bits: int = 0, critical: bool = False
    ) -> tuple[int, memoryview]:
        """An unpublished shard and a writable view of its `size` bytes, to be filled and published."""

    def shard_publish(self, slot: int) -> None:
        """BadArgument until the view and all arrays over it are released: a published shard never changes."""

    def shard_succeed(self, slot: int, old: int) -> None:
        """Publish it in the place of the shard in the pinned slot `old`, and as old as that. Gone: that is
        not the shard of this id any more; to be abandoned. IndexBusy."""

    def shard_abandon(self, slot: int) -> None:
        """Free it; put off until the view is released."""

    def pin_shard(self, shard_id: bytes) -> int: ...
    def shard_view(self, slot: int) -> tuple[bytes, memoryview]:
        """(meta, read-only zero-copy view). Under a pin; the view holds a pin of its own until released."""

    def shard_clear_bit(self, slot: int, bit: int) -> tuple[bool, bool]:
        """(was still set, all parts are cleared now)."""

    def shard_bit(self, slot: int, bit: int) -> bool: ...
    def shard_close(self, slot: int) -> None:
        """Remove, under a pin; freed by the last unpin."""

    def expired_shards(self, created_before_ns: int, cursor: int, max: int) -> tuple[list[int], int]:
        """Up to `max` ACTIVE shards created before, and the next cursor (0: the end)."""

    # -- observation -----------------------------------------------------------------------------------
    def stats(self) -> dict[str, int]:
        """granules, granules_used, granules_ready, granules_keep, granules_outside, bytes_max,
        sessions_active, …_closing, …_detached, shards_active, shard_bytes, txns_open, …: the fields of
        af_stats_result."""

    def sessions_active(self) -> int:
        """Live sessions: stats()["sessions_active"] alone, by a scan of all slots that were ever used."""

    def sessions(self, cursor: int, max: int) -> tuple[list[int], int]:
        """Up to `max` ACTIVE session slots from `cursor` on, and the next cursor (0: the end)."""

    def consistency(self) -> str:
        """What is wrong with a quiet arena, in a line; empty if nothing is. For tests."""

@final
class Histogram:
    """What `Arena.histogram` counts with."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def observe(self, value: int, beside: int) -> None:
        """Count `value` (≥ 0) under the first bound that it is not above, add it to the sum, and count one
        more in the other with the number `beside`."""

def base64_encode(
    data: ReadableBuffer, before: bytes = b"", after: bytes = b"", *, bf16: bool = False
) -> bytes:
    """`before`, the base64 of `data`, `after`, in one new object. bf16: `data` is bfloat16 (2 bytes an
    element, else BadArgument), which is written as float32. The GIL is released for large data, here and
    below."""

def base64_decoded_size(text: ReadableBuffer) -> int:
    """Bytes that base64 of this length and padding stands for; −1 if no base64 has them."""

def base64_decode_into(text: ReadableBuffer, out: WriteableBuffer, *, bf16: bool = False) -> bool:
    """Decode into `out`, which has exactly the size (half of it with bf16: float32 in the text, rounded to
    nearest even; a NaN that was widened as it was, any other 0x7fc0), else BadArgument. False if the text is
    not canonical base64, white space included, or with bf16 no whole number of float32; `out` then holds
    anything."""

def base64_level() -> str:
    """Instructions in use: scalar, avx2 or vbmi."""

def base64_set_level(name: str | None = None) -> None:
    """Use those of this name, or the best there are. BadArgument if the processor has not got them. For
    tests."""

def fault_arm(nth: int) -> None:
    """Fail the nth request for memory from the system from now on; 0: none. BadArgument in a plain build."""

def common_prefix(a: bytes, b: bytes) -> int:
    """How many bytes the two have in common from their start."""

def crash_points() -> list[str]:
    """Names of all crash points; empty unless built with them."""

def crash_arm(name: str, nth: int) -> None:
    """Die with SIGKILL at the nth passing of a crash point. BadArgument unless built with them."""
