"""Who tells the callback server of a ready trajectory, and whether it still must be told.

Truth is in the session's log. The record that makes a trajectory ready names its courier: the process that
made it so, in this life of it. A CALLBACK record hands it to another, or says that it is delivered. Both are
appended on condition that nothing came since the decision was made, so a trajectory has one courier at any
time; what it has done is remembered if its session's log is.

A courier that died (its process slot is empty, or lives a later life; the sweep that empties it comes only
after its death is certain) left its trajectories to whoever looks: `adopt` finds sessions by their deadline
word, takes over what nobody tells, and so nothing is told by two, and nothing by none. The dead one may have
told it just before it died: at least once, not exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from areal_fast.core import Gone, HeadMoved
from areal_fast.protocol import records as rec
from areal_fast.store.couriers import courier_of, lives
from areal_fast.store.store import SCAN_PAGE, Told

if TYPE_CHECKING:
    from areal_fast.store.store import SessionStore

Verdict = Literal["tell", "wait", "over"]


def look(store: SessionStore, told: Told) -> Verdict:
    """tell: ready, not exported, ours · wait: an export of it is under way · over: exported, removed,
    dumped, delivered, or another's."""
    if not _pin(store, told):
        return "over"
    try:
        state = store.fold(told.slot, told.session_id)
        if dict(state.untold()).get(told.trajectory_id, rec.NO_COURIER) != store.courier:
            store.settle_hint(told.slot)
            return "over"
        return (
            "wait" if any(p.trajectory == told.trajectory_id or p.remove for p in state.pending) else "tell"
        )
    finally:
        store.arena.unpin(told.slot)


def delivered(store: SessionStore, told: Told) -> None:
    """The callback server has taken it: remembered, if the session is still there. ArenaFull: not yet."""
    if not _pin(store, told):
        return
    try:
        meta = rec.pack_callback(told.trajectory_id, rec.NO_COURIER)
        store.arena.append(told.slot, rec.CALLBACK, meta, critical=True)
        store.settle_hint(told.slot)
    except Gone:
        pass
    finally:
        store.arena.unpin(told.slot)


def adopt(store: SessionStore) -> list[Told]:
    """Everything this process is to tell, with what dead couriers left and nobody else took. O(live
    sessions), a word each."""
    found: list[Told] = []
    now_ns, cursor = store.now_ns(), 0
    while True:
        slots, cursor = store.arena.sessions(cursor, SCAN_PAGE)
        for slot in slots:
            if 0 < store.arena.deadline(slot) <= now_ns and store.arena.pin_slot(slot):
                try:
                    found += _adopt_from(store, slot)
                finally:
                    store.arena.unpin(slot)
        if cursor == 0:
            return found


def _adopt_from(store: SessionStore, slot: int) -> list[Told]:
    info = store.arena.slot_info(slot)
    session_id = info.id.decode()
    state = store.fold(slot, session_id)
    found: list[Told] = []
    for index, courier in state.untold():
        if courier != store.courier:
            if lives(store.arena, courier):
                continue
            meta = rec.pack_callback(index, store.courier)
            try:
                store.arena.append(slot, rec.CALLBACK, meta, expect=state.head, critical=True)
            except (HeadMoved, Gone):
                break  # something happened: the next look sees it
            state = store.fold(slot, session_id)
        found.append(Told(session_id, index, slot, info.created_ns))
    store.settle_hint(slot)
    return found


def _pin(store: SessionStore, told: Told) -> bool:
    """Pin the slot if it is still that session's. This is no access."""
    arena = store.arena
    if not arena.pin_slot(told.slot):
        return False
    info = arena.slot_info(told.slot)
    if (info.id.decode(), info.created_ns) == (told.session_id, told.created_ns):
        return True
    arena.unpin(told.slot)
    return False


__all__ = ["adopt", "courier_of", "delivered", "lives", "look"]
