"""The edge between Python and the C core: lifetimes, arguments, forks, descriptors, a full arena."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from areal_fast.core import (
    PROC_SUPERVISOR,
    STATE_CLOSING,
    STATE_FREE,
    Arena,
    ArenaFull,
    BadArgument,
    CoreError,
    LayoutMismatch,
    codes,
)
from areal_fast.core._core import common_prefix

ROOT = Path(__file__).resolve().parents[3]

CALLS = {
    "append": (0, 2, b""),
    "add_word": (0, 1),
    "cas_word": (0, 0, 1),
    "close_session": (0,),
    "compact": (0, 0, b"", []),
    "consistency": (),
    "count": (0,),
    "counters": (),
    "deadline": (0,),
    "detach": (0, 0),
    "detach_next": (0, 0),
    "expired_shards": (0, 0, 1),
    "fileno": (),
    "head": (0,),
    "heartbeat": (),
    "histogram": (0, (1,)),
    "lock_owner": (),
    "next_ordinal": (0,),
    "open_named": (b"x",),
    "outside_give": (0,),
    "outside_take": (1,),
    "owned_slots": (4, 0),
    "pin_id": (b"x",),
    "pin_key": (b"x",),
    "pin_shard": (b"x",),
    "pin_slot": (0,),
    "prefault": (1,),
    "proc_enter": (1,),
    "proc_info": (0,),
    "proc_leave": (),
    "punch_idle": (1,),
    "read": (0,),
    "reap": (0,),
    "record_data": (0, 0, 0),
    "record_outcome": (0, 0, 0),
    "release": (1,),
    "reserve": (0, 1),
    "sessions": (0, 1),
    "sessions_active": (),
    "set_deadline": (0, 1),
    "set_dumped": (0,),
    "set_word": (0, 1),
    "shard_abandon": (0,),
    "shard_bit": (0, 0),
    "shard_clear_bit": (0, 0),
    "shard_close": (0,),
    "shard_publish": (0,),
    "shard_put": (b"x", b"", []),
    "shard_reserve": (b"x", b"", 1),
    "shard_succeed": (0, 0),
    "shard_view": (0,),
    "slot_id": (0,),
    "slot_created_ns": (0,),
    "slot_info": (0,),
    "start": (b"t", b"k"),
    "stats": (),
    "sweep": (1,),
    "touch": (0,),
    "txn_abort": (1, []),
    "txn_begin": (),
    "txn_commit": (1,),
    "txn_finish": (1, []),
    "txn_state": (1,),
    "unpin": (0,),
    "verify": (0,),
    "word": (0,),
}
HARMLESS = {
    "close",
    "closed",
    "create",
    "attach",
    "proc",
    "now_ns",
    "record_of",
    "session_slots",
    "shard_slots",
}


def test_the_table_of_calls_is_complete():
    assert {name for name in dir(Arena) if not name.startswith("_")} == CALLS.keys() | HARMLESS


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_closed_arena_refuses(name):
    arena = Arena.create(1 << 20)
    arena.close()
    arena.close()
    assert arena.closed
    with pytest.raises(BadArgument, match="closed"):
        getattr(arena, name)(*CALLS[name])


@pytest.mark.parametrize("name", sorted(n for n, a in CALLS.items() if any(isinstance(x, int) for x in a)))
def test_slots_and_numbers_out_of_range_are_refused(core, name):
    """Garbage numbers end in an exception or in nothing, never in memory that is not the arena's."""
    for bad in (2**31, 2**32 - 1, core.session_slots + core.shard_slots):
        args = [bad if isinstance(a, int) else a for a in CALLS[name]]
        if name in ("sessions", "expired_shards"):
            args[-1] = 1
        try:
            getattr(core, name)(*args)
        except (CoreError, OverflowError):
            pass


def test_wrong_types_are_type_errors(core):
    slot, _ = core.start(b"t", b"")
    with pytest.raises(TypeError):
        core.pin_key("text")
    with pytest.raises(TypeError):
        core.start(b"t", None)
    with pytest.raises(TypeError):
        core.append(slot, 2, "text")
    part = bytearray(b"part")
    with pytest.raises(TypeError):
        core.append(slot, 2, b"", [part, 5])
    part.append(0)  # not borrowed any more
    with pytest.raises(OverflowError):
        core.touch(-1)
    with pytest.raises(TypeError):
        Arena()


def test_scattered_buffers(core):
    slot, _ = core.start(b"t", b"")
    ids = np.arange(1000, dtype=np.int32)
    parts = (ids, memoryview(ids)[::1], np.empty(0, np.float32), b"tail")
    head = core.append(slot, 2, np.frombuffer(b"meta", np.uint8), parts)
    [(offset, *_, meta, size)] = core.read(slot)[2]
    assert meta == b"meta" and size == 8004
    assert core.record_data(slot, head, offset) == ids.tobytes() * 2 + b"tail"
    with pytest.raises((BufferError, ValueError)):
        core.append(slot, 2, b"", [ids[::2]])
    assert core.append(slot, 2, b"", [b"%d" % i for i in range(300)]) != head


def test_a_view_is_read_only_and_holds_a_pin(core):
    slot = core.shard_put(b"id", b"m", [b"x" * 100])
    core.pin_shard(b"id")
    _, view = core.shard_view(slot)
    with pytest.raises(TypeError):
        view[0] = 1
    core.shard_close(slot)
    core.unpin(slot)
    part = np.frombuffer(view, np.uint8)[50:]
    view.release()
    assert core.slot_info(slot).state == STATE_CLOSING and bytes(part) == b"x" * 50, "numpy still reads"
    del part
    assert core.slot_info(slot).state == STATE_FREE


def test_a_view_outlives_the_handle():
    arena = Arena.create(1 << 20, proc=0)
    other = Arena.attach(arena.fileno(), 1)
    slot = arena.shard_put(b"id", b"", [b"x" * 5000])
    arena.pin_shard(b"id")
    _, view = arena.shard_view(slot)
    arena.unpin(slot)
    arena.close()
    assert bytes(view) == b"x" * 5000
    assert other.slot_info(slot).pins == 1
    view.release()
    assert other.slot_info(slot).pins == 0
    other.close()


def test_publishing_waits_for_the_writer(core):
    slot, view = core.shard_reserve(b"id", b"", 100)
    array = np.frombuffer(view, np.uint8)
    array[:] = 7
    with pytest.raises(BadArgument, match="release"):
        core.shard_publish(slot)
    del array
    view.release()
    core.shard_publish(slot)
    core.pin_shard(b"id")
    _, view = core.shard_view(slot)
    assert bytes(view) == b"\7" * 100
    view.release()
    core.unpin(slot)


def test_abandoning_waits_for_the_writer(core):
    slot, view = core.shard_reserve(b"id", b"", 100)
    core.shard_abandon(slot)
    view[:] = b"y" * 100
    view.release()
    assert core.slot_info(slot).state == STATE_FREE and core.stats()["granules_used"] == 0


def test_the_gil_is_given_away_while_much_is_copied():
    ticks = 0
    stop = False

    def tick():
        nonlocal ticks
        while not stop:
            ticks += 1
            time.sleep(0)  # gives the GIL back, which otherwise nobody could ask for here

    data = bytes(48 << 20)
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    with Arena.create(64 << 20, proc=0) as arena:
        thread.start()
        try:
            sys.setswitchinterval(60)  # nobody takes the GIL from this thread; it can only give it
            before = ticks
            arena.shard_put(b"id", b"", [data])
            after = ticks
        finally:
            sys.setswitchinterval(interval)
            stop = True
            thread.join()
    assert after > before


# -- descriptors and mappings ------------------------------------------------------------------------------


def test_the_descriptor_is_not_inherited_unasked(core):
    assert not os.get_inheritable(core.fileno())


def test_attach_duplicates(core):
    fd = os.dup(core.fileno())
    other = Arena.attach(fd, 1)
    os.close(fd)
    slot, _ = other.start(b"t", b"k")
    assert core.pin_key(b"k") == slot
    core.unpin(slot)
    other.close()


def test_only_an_arena_of_this_layout_is_attached(tmp_path):
    with Arena.create(1 << 20) as arena:
        size = os.fstat(arena.fileno()).st_size
        image = os.pread(arena.fileno(), 4096, 0)

    def attach(head: bytes, length: int) -> None:
        path = tmp_path / "image"
        path.write_bytes(head)
        os.truncate(path, length)
        with path.open("r+b") as file:
            Arena.attach(file.fileno(), 1).close()

    attach(image, size)
    for head, length in [(b"", 0), (b"", size), (b"x" * 4096, size), (image, 4096), (image, size - 4096)]:
        with pytest.raises(LayoutMismatch):
            attach(head, length)
    refused = 0
    for at in range(0, 64, 8):  # the first words: magic, version and sizes among them
        broken = bytearray(image)
        broken[at] ^= 1
        try:
            attach(bytes(broken), size)
        except LayoutMismatch:
            refused += 1
    assert refused >= 3
    with pytest.raises(CoreError):
        Arena.attach(2**20, 1)
    with pytest.raises(BadArgument), Arena.create(1 << 20) as arena:
        Arena.attach(arena.fileno(), codes.MAX_PROCS)


def test_create_refuses_nonsense():
    for bad in ({"max_bytes": 0}, {"max_bytes": 2**63}, {"max_bytes": 1 << 20, "proc": 32}):
        with pytest.raises((BadArgument, ArenaFull)):
            Arena.create(**bad)
    with Arena.create(1 << 20) as arena:
        assert arena.proc == PROC_SUPERVISOR


FORK = """
import os, sys
from areal_fast.core import Arena, BadArgument
arena = Arena.create(1 << 20, proc=0)
slot = arena.shard_put(b"id", b"", [b"x" * 100])
arena.pin_shard(b"id")
_, view = arena.shard_view(slot)
pid = os.fork()
if pid == 0:
    try:
        arena.touch(slot)
    except BadArgument:
        assert arena.closed and bytes(view) == b"x" * 100
        view.release()
        arena.close()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert arena.slot_info(slot).pins == 1, "the child gave back a pin of its parent"
view.release()
arena.unpin(slot)
assert arena.slot_info(slot).pins == 0
print("fine")
"""


def test_a_forked_child_has_no_handle():
    run = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert (run.stdout, run.stderr, run.returncode) == ("fine\n", "", 0)


# -- a full arena ------------------------------------------------------------------------------------------


def fill(arena: Arena, slot: int, size: int, **options: object) -> int:
    """Append records of `size` bytes until the arena is full; how many went in."""
    for n in range(100_000):
        try:
            arena.append(slot, 2, b"", [bytes(size)], **options)
        except ArenaFull:
            return n
    raise AssertionError("it never gets full")


@pytest.mark.parametrize("size", [100, 5000, 200_000])
def test_a_full_arena_is_an_error_and_can_be_emptied(size):
    with Arena.create(2 << 20, proc=0) as arena:
        slot, name = arena.start(b"task", b"key")
        arena.pin_id(name)
        assert fill(arena, slot, size) > 0
        if size >= 4096:
            with pytest.raises(ArenaFull):
                arena.shard_put(b"id", b"", [bytes(size)])
            with pytest.raises(ArenaFull):
                arena.reserve(slot, size)
        arena.append(slot, 3, b"a reward", critical=True)
        head = arena.compact(slot, arena.head(slot), b"checkpoint", [])
        assert [r[5] for r in arena.read(slot)[2]] == [b"checkpoint"]
        assert arena.append(slot, 2, b"", [bytes(size)]) != head
        arena.close_session(slot)
        arena.unpin(slot)
        assert arena.stats()["granules_used"] == 0
        assert arena.consistency() == ""


def test_what_was_promised_fits_a_full_arena():
    with Arena.create(2 << 20, proc=0) as arena:
        slot, _ = arena.start(b"task", b"key")
        reservations = [arena.reserve(slot, 30_000) for _ in range(8)]
        fill(arena, slot, 3000)
        for reservation in reservations:
            arena.append(slot, 2, b"m" * 100, [bytes(29_000)], reservation=reservation)
        assert arena.consistency() == ""


def test_no_slots_left_is_an_error():
    with Arena.create(1 << 20, session_slots=512, shard_slots=512, proc=0) as arena:
        with pytest.raises(ArenaFull):
            for _ in range(513):
                arena.start(b"task", b"")
        with pytest.raises(ArenaFull):
            for i in range(513):
                arena.shard_put(b"%d" % i, b"", [])
        slot = arena.pin_id(b"task-5")
        arena.close_session(slot)
        arena.unpin(slot)
        assert arena.start(b"task", b"")[1] == b"task-5"


def test_the_twenty_thousandth_session_of_a_task_is_found_as_fast():
    """The smallest free number is found, also after removals; quadratic work would meet the time-out."""
    with Arena.create(256 << 20, proc=0) as arena:
        names = [arena.start(b"task", b"")[1] for _ in range(20_000)]
        assert names[-1] == b"task-19999" and len(set(names)) == 20_000
        for n in (17, 5, 12_000):
            slot = arena.pin_id(b"task-%d" % n)
            arena.close_session(slot)
            arena.unpin(slot)
        assert [arena.start(b"task", b"")[1] for _ in range(4)] == [
            b"task-5",
            b"task-17",
            b"task-12000",
            b"task-20000",
        ]


def leaves_something(arena: Arena, slot: int, shard: int) -> None:
    """Everything that allocates on the Python side, the ways out by exception included."""
    head = arena.append(slot, 2, b"meta", (b"part", bytearray(b"more")))
    _, _, records = arena.read(slot)
    arena.record_data(slot, head, records[-1][0])
    arena.slot_info(slot)
    arena.compact(slot, head, b"", [])
    arena.sessions(0, 10)
    arena.stats()
    arena.counters()
    _, view = arena.shard_view(shard)
    view.release()
    new, view = arena.shard_reserve(b"new", b"", 10)
    view.release()
    arena.shard_abandon(new)
    for call in (
        lambda: arena.append(slot, 2, b"", [b"fine", 5]),
        lambda: arena.append(slot, 2, b"", expect=1),
        lambda: arena.record_data(slot, head, records[-1][0]),
        lambda: arena.compact(slot, head, b"", []),
        lambda: arena.compact(slot, head, b"", ["x"]),
        lambda: arena.start(b"t", b"key"),
        lambda: arena.txn_finish(5, [1]),
        lambda: arena.shard_put(b"id", b"", [b"x" * (20 << 20)]),
    ):
        with pytest.raises((CoreError, TypeError)):
            call()


def test_no_reference_and_no_buffer_is_lost(core):
    slot, _ = core.start(b"t", b"key")
    core.pin_slot(slot)
    shard = core.shard_put(b"id", b"m", [b"x"])
    core.pin_slot(shard)
    for _ in range(20):
        leaves_something(core, slot, shard)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(300):
        leaves_something(core, slot, shard)
    gc.collect()
    assert sys.getallocatedblocks() - before < 150, "less than half a block a round"


def test_the_short_questions_agree_with_the_long_ones(core):
    """slot_id, slot_created_ns, sessions_active and record_of are parts of slot_info, stats and read."""
    slots = [core.start(b"t", b"k%d" % i)[0] for i in range(5)]
    for slot in slots:
        assert core.pin_slot(slot)
        assert core.slot_id(slot) == core.slot_info(slot).id
        assert core.slot_created_ns(slot) == core.slot_info(slot).created_ns
    core.close_session(slots[0])
    assert core.sessions_active() == core.stats()["sessions_active"] == 4
    for n in range(3):
        head = core.append(slots[1], 2, b"meta", (bytes(100 * n),))
        assert core.record_of(head) == core.read(slots[1])[2][-1][0]


@pytest.mark.parametrize("same", [0, 1, 7, 255, 256, 257, 511, 512, 4000])
def test_common_prefix(same):
    a = bytes(range(256)) * 20
    b = a[:same] + bytes([a[same] ^ 1]) + a[same + 1 :]
    assert common_prefix(a, b) == common_prefix(b, a) == same
    assert common_prefix(a, a[:same]) == same and common_prefix(a, a) == len(a)
    with pytest.raises(TypeError):
        common_prefix(a, None)  # type: ignore[arg-type]
