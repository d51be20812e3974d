"""Two workers on one arena: what one remembers or holds, and what the other then does."""

from collections.abc import Iterator

import pytest

from areal_fast.core import Arena
from areal_fast.errors import ExportBusy
from areal_fast.protocol.messages import ExportRequest
from areal_fast.store import SessionStore
from tests.unit.store.turns import export, lives, started, take, tokens


@pytest.fixture
def workers() -> Iterator[tuple[SessionStore, SessionStore]]:
    """Two workers' stores on one arena."""
    with Arena.create(8 << 20) as watcher:
        arenas = [Arena.attach(watcher.fileno(), proc) for proc in (0, 1)]
        yield SessionStore(arenas[0]), SessionStore(arenas[1])
        for arena in arenas:
            arena.close()


def test_ids_remembered_of_one_session_are_not_taken_for_the_next_in_its_slot(
    workers: tuple[SessionStore, SessionStore],
) -> None:
    a, b = workers
    with started(a, "first") as session:  # the slot's first life: its head is the zero word when a folds it
        slot = session.slot
        take(session, list(range(100, 140)), [1])
        a.arena.close_session(slot)
    with started(b, "second") as session:
        assert session.slot == slot
        first = take(session, list(range(500, 540)), [2])
    found = a.by_id("second-0")
    assert found is not None
    with found as session:
        # Shares much with what a remembers of the slot, and nothing with what is in it.
        second = take(session, [*range(100, 140), 1, 3], [4])
        session.set_reward(1.0)
    interactions = export(b, "second-0")["interactions"]
    assert tokens(b, interactions[first]) == [*range(500, 540), 2]
    assert tokens(b, interactions[second]) == [*range(100, 140), 1, 3, 4]


def test_a_removal_waits_a_while_for_a_worker_that_is_letting_go(
    workers: tuple[SessionStore, SessionStore],
) -> None:
    a, b = workers
    with started(a) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
        request = ExportRequest(["t-0"], dialect="pr1268", trajectory_id=0, remove_session=True)
        with pytest.raises(ExportBusy):
            b.begin_export(request, patient=True)
    b.begin_export(request, patient=True).delivered()
    assert not lives(b, "t-0")


def test_a_session_another_worker_goes_on_holding_stays(workers: tuple[SessionStore, SessionStore]) -> None:
    a, b = workers
    with started(a) as session:
        take(session, [1], [2])
        session.set_reward(1.0)
        request = ExportRequest(["t-0"], dialect="pr1268", trajectory_id=0, remove_session=True)
        b.begin_export(request).delivered()
    assert lives(b, "t-0")


def test_a_fold_of_own_records_is_the_fold_of_what_was_written(
    workers: tuple[SessionStore, SessionStore],
) -> None:
    """A worker does not read back what it appended; whoever reads the log sees the same state."""
    session = started(workers[0], "own")
    for n in range(5):
        take(session, list(range(40 + n)), [n, n + 1])
    mine, read = (s.folds.refresh(session.slot) for s in workers)
    assert mine.head == read.head and mine.seq == read.seq and mine.live_bytes == read.live_bytes
    for a, b in zip(mine.active.in_order(), read.active.in_order(), strict=True):
        assert (a.meta, a.offset, a.nbytes, a.seq) == (b.meta, b.offset, b.nbytes, b.seq)
    session.release()
