"""Real processes on one arena, killed with SIGKILL: what they held comes back, what they committed stays."""

from __future__ import annotations

import random

import pytest

from areal_fast.core import (
    OUTCOME_ABORTED,
    PROC_CLEANER,
    REC_EXPORTING,
    STATE_CLOSING,
    STATE_DETACHED,
    STATE_FREE,
    TXN_GONE,
    Arena,
    IndexBusy,
)
from tests.children import ChildDied, ChildError

NEVER = 2**62


def test_another_process_sees_what_this_one_does(core, child):
    other = child(core, 1)
    slot, _ = core.start(b"task", b"key")
    assert other.call("pin_key", b"key") == slot
    head = core.append(slot, 2, b"hello", [b"data"])
    assert other.call("read", slot) == (head, False, core.read(slot)[2])
    head = other.call("append", slot, 2, b"and back", expect=head)
    assert core.head(slot) == head and core.slot_info(slot).pins == 2
    with pytest.raises(ChildError) as moved:
        other.call("append", slot, 2, b"", expect=head - 1)
    assert moved.value.kind == "HeadMoved"
    other.call("unpin", slot)


def test_the_pins_of_the_dead_are_swept(core, child):
    other = child(core, 1)
    slot, name = core.start(b"task", b"key")
    closing, closing_name = core.start(b"task", b"")
    assert other.call("pin_id", name) == other.call("pin_key", b"key") == slot
    assert core.pin_id(closing_name) == other.call("pin_id", closing_name) == closing
    core.close_session(closing)
    core.unpin(closing)
    other.kill()
    assert not core.detach(slot, NEVER) and core.slot_info(closing).state == STATE_CLOSING
    done = core.sweep(1)
    assert (done["pins"], done["reaped"]) == (2, 1)
    assert core.slot_info(slot).pins == 0 and core.slot_info(closing).state == STATE_FREE
    assert core.pin_id(name) == slot
    core.unpin(slot)
    assert core.sweep(1)["pins"] == 0


def test_what_the_dead_had_not_published_is_freed(core, child):
    other = child(core, 1)
    slot, name = core.start(b"task", b"key")
    used = core.stats()["granules_used"]
    other.call("pin_id", name)
    other.call("reserve", slot, 100_000)
    ref = other.call("txn_begin")
    member, _ = other.call("start", b"group", b"", txn=ref)
    export = other.call("txn_begin")
    other.call("append", slot, REC_EXPORTING, b"", aux=export, flags=1)
    other.kill()
    done = core.sweep(1)
    assert done["txns_aborted"] == 2 and done["freed"] >= 25
    assert core.txn_state(ref) == core.txn_state(export) == TXN_GONE
    assert core.slot_info(member).state == STATE_FREE
    assert core.read(slot)[2][-1][4] == OUTCOME_ABORTED
    assert core.stats()["granules_used"] <= used + 1
    assert core.pin_id(name) == slot
    core.unpin(slot)


def test_the_successor_of_a_cleaner_resumes(core, child):
    slots = {core.start(b"task", b"")[0] for _ in range(3)}
    first = child(core, PROC_CLEANER)
    cursor = 0
    for _ in slots:
        slot, cursor = first.call("detach_next", NEVER, cursor)
        assert slot in slots
    first.call("set_dumped", min(slots))
    first.kill()
    done = core.sweep(PROC_CLEANER)
    assert (done["detached"], done["reaped"]) == (2, 1)
    second = child(core, PROC_CLEANER)
    left = second.call("owned_slots", STATE_DETACHED, PROC_CLEANER)
    assert set(left) == slots - {min(slots)}
    for slot in left:
        second.call("append", slot, 6, b"name", critical=True)
        second.call("set_dumped", slot)
        second.call("reap", slot)
    assert core.stats()["granules_used"] == 0


def test_a_process_number_is_taken_until_swept(core, child):
    first = child(core, 3)
    assert first.call("proc_enter", first.pid) == 1
    first.call("count", 7, 5)
    first.call("heartbeat")
    assert core.proc_info(3) == (first.pid, 1, 1)
    first.kill()
    second = child(core, 3)
    with pytest.raises(ChildError) as busy:
        second.call("proc_enter", second.pid)
    assert busy.value.kind == IndexBusy.__name__
    core.sweep(3)
    assert second.call("proc_enter", second.pid) == 2
    second.call("count", 7, 1)
    assert core.counters()[7] == 6


def churn(rng: random.Random, n: int) -> list[tuple[str, tuple, dict]]:
    """Calls that a worker might make, in an order that works whatever the slot numbers are: see `play`."""
    return [
        rng.choice(
            [
                ("start",),
                ("append", rng.choice([0, 50, 3000, 9000, 60_000])),
                ("append", rng.choice([0, 50, 3000])),
                ("reserve", rng.choice([100, 20_000])),
                ("compact",),
                ("shard_put", rng.choice([0, 5000])),
                ("close",),
                ("group",),
                ("export", rng.random() < 0.5),
            ]
        )
        for _ in range(n)
    ]


class Player:
    """Plays churn in a child and keeps what the child acknowledged."""

    def __init__(self, process, tag):
        self.process, self.tag = process, tag
        self.serial = 0
        self.logs: dict[int, list[bytes]] = {}
        self.names: dict[int, bytes] = {}
        self.doubt: set[int] = set()  # slots of the call that was not answered

    def play(self, step) -> None:
        call, kind = self.process.call, step[0]
        slot = min(self.logs, default=None)
        self.doubt = {slot} if slot is not None else set()
        if kind == "start" or slot is None:
            slot, name = call("start", b"task-%d" % self.tag, b"")
            self.logs[slot], self.names[slot] = [], name
            call("pin_slot", slot)
        elif kind == "append":
            self.serial += 1
            meta = b"%d" % self.serial
            call("append", slot, 2, meta, [bytes(step[1])])
            self.logs[slot].append(meta)
        elif kind == "reserve":
            reservation = call("reserve", slot, step[1])
            self.serial += 1
            meta = b"%d" % self.serial
            call("append", slot, 2, meta, [bytes(50)], reservation=reservation)
            self.logs[slot].append(meta)
        elif kind == "compact":
            head, _, records = call("read", slot)
            call("compact", slot, head, b"", [r[0] for r in records if r[1] == 2])
        elif kind == "shard_put":
            call("shard_put", b"shard-%d" % self.tag, b"", [bytes(step[1])])
        elif kind == "close":
            self.doubt = set()
            del self.logs[slot], self.names[slot]  # from here on it may be there or not
            call("close_session", slot)
            call("unpin", slot)
        elif kind == "group":
            ref = call("txn_begin")
            made = [call("start", b"group-%d" % self.tag, b"", txn=ref) for _ in range(3)]
            call("txn_commit", ref)
            for slot, name in made:
                self.logs[slot], self.names[slot] = [], name
            call("txn_finish", ref, [slot for slot, _ in made])
            for slot, _ in made:
                call("pin_slot", slot)
        elif kind == "export":
            ref = call("txn_begin")
            call("append", slot, REC_EXPORTING, b"", aux=ref, critical=True)
            if step[1]:
                call("txn_commit", ref)
                call("txn_finish", ref, [slot])
            else:
                call("txn_abort", ref, [slot])

    def check(self, arena: Arena) -> None:
        """Everything acknowledged is there, in order, nothing doubled; only the unanswered call is open."""
        for slot, expected in self.logs.items():
            assert arena.pin_id(self.names[slot]) == slot
            arena.verify(slot)
            found = [r[5] for r in arena.read(slot)[2] if r[1] == 2]
            if slot in self.doubt:
                assert found in (expected, [*expected, b"%d" % self.serial])
            else:
                assert found == expected
            arena.close_session(slot)
            arena.unpin(slot)


def empty(arena: Arena) -> None:
    """Remove all that is left, and see that nothing leaked."""
    for slot in arena.sessions(0, 1000)[0]:
        arena.pin_slot(slot)
        arena.close_session(slot)
        arena.unpin(slot)
    for slot in arena.expired_shards(NEVER, 0, 1000)[0]:
        if arena.pin_slot(slot):
            arena.shard_close(slot)
            arena.unpin(slot)
    assert arena.consistency() == ""
    assert arena.stats()["granules_used"] == 0


@pytest.mark.parametrize("round", range(6))
def test_killed_in_the_middle_of_anything(core, child, seed, round):
    """The kill comes while a call is on its way: after `send`, at a time the scheduler chooses."""
    rng = random.Random(f"{seed}/{round}")
    player = Player(child(core, 1), round)
    for step in churn(rng, rng.randrange(5, 60)):
        player.play(step)
    slot = min(player.logs, default=-1)
    if slot >= 0:
        player.serial += 1
        player.doubt = {slot}
        player.process.send("append", slot, 2, b"%d" % player.serial, [bytes(rng.choice([10, 50_000]))])
    player.process.kill()
    core.sweep(1)
    core.sweep(1)
    player.check(core)
    empty(core)


def crash_point_names() -> list[str]:
    from areal_fast.core import _core

    return _core.crash_points()


@pytest.mark.crashpoints
@pytest.mark.parametrize("point", crash_point_names())
def test_every_crash_point(core, child, seed, point):
    """Die at that very instruction in the middle of ordinary work; once swept, nothing is lost or leaked."""
    rng = random.Random(f"{seed}/{point}")
    process = child(core, 1)
    player = Player(process, 0)
    process.call("crash_arm", point, rng.randrange(1, 4))
    try:
        for step in churn(rng, 80):
            player.play(step)
    except ChildDied as died:
        assert died.status == -9
    process.kill()
    core.sweep(1)
    player.check(core)
    empty(core)


@pytest.mark.crashpoints
@pytest.mark.parametrize("nth", range(1, 25))
def test_the_nth_request_for_memory_fails(child, seed, nth):
    """Whatever asks the system for memory, it is an error of the call, and nothing is lost."""
    with Arena.create(8 << 20, proc=0) as core:
        process = child(core, 1)
        player = Player(process, 0)
        process.call("fault_arm", nth)
        for step in churn(random.Random(f"{seed}/{nth}"), 40):
            try:
                player.play(step)
            except ChildError as refused:
                assert refused.kind in ("ArenaFull", "CoreError")
                break
        process.kill()
        core.sweep(1)
        player.check(core)
        empty(core)
