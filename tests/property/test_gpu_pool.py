"""The pool's allocator against a byte map, and the ledger against a model, with keepers that die at any
moment."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.core import Arena
from areal_fast.protocol.gpu import Malformed
from areal_fast.shards import ShardStore
from areal_fast.shards.extents import ALIGNMENT, Extents
from areal_fast.shards.gpu_records import Holder
from areal_fast.shards.ledger import Ledger, NotHeld, PoolFull

GPU, POOL = b"G" * 16, b"P" * 16
A, B = Holder(100, 1, 7), Holder(200, 2, 7)
KIB = 1024


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40 * ALIGNMENT)), max_size=60), st.integers(0, 64))
def test_extents_never_overlap_and_always_merge(steps: list[tuple[bool, int]], units: int) -> None:
    pool = Extents(units * ALIGNMENT + ALIGNMENT - 1)
    taken: dict[int, int] = {}
    for take, number in steps:
        if take:
            at = pool.take(number)
            need = -(-max(number, 1) // ALIGNMENT)
            if at is None:
                assert pool.largest < need * ALIGNMENT
                continue
            taken[at] = number
        elif taken:
            at = sorted(taken)[number % len(taken)]
            pool.give(at, taken.pop(at))
        free = [True] * units
        for at, number in taken.items():
            for unit in range(at // ALIGNMENT, (at + Extents.length(number)) // ALIGNMENT):
                assert free[unit], "overlap"
                free[unit] = False
        assert pool.free_bytes == sum(free) * ALIGNMENT
        runs = "".join("f" if f else "-" for f in free).split("-")
        assert pool.largest == max(map(len, runs), default=0) * ALIGNMENT
    twin = Extents(units * ALIGNMENT)
    assert all(twin.occupy(at, number) for at, number in taken.items())
    assert (twin.free_bytes, twin.largest) == (pool.free_bytes, pool.largest)
    for at, number in taken.items():
        assert not twin.occupy(at, number)
        pool.give(at, number)
        with pytest.raises(ValueError):
            pool.give(at, number)
    assert pool.largest == pool.free_bytes == units * ALIGNMENT


class Keepers:
    """A ledger, and its successors over the same arena."""

    def __init__(self, arena: Arena, nbytes: int = 64 * KIB) -> None:
        self.store = ShardStore(arena)
        self.nbytes = nbytes
        self.lives = 0
        self.start()

    def start(self, pool: bytes = POOL) -> None:
        self.lives += 1
        self.now = Ledger(self.store, GPU, pool, self.nbytes, self.lives)
        self.adopted = self.now.adopt()

    def put(self, shard_id: str, nbytes: int = 4 * KIB, holder: Holder = A) -> int:
        generation = self.now.reserve(nbytes, holder)
        self.now.commit(generation, holder, shard_id, "uint8", (nbytes,))
        return generation


@pytest.fixture
def keepers(core: Arena) -> Iterator[Keepers]:
    yield Keepers(core)


def test_a_life_of_a_shard(keepers: Keepers) -> None:
    ledger = keepers.now
    generation = keepers.put("s")
    meta = ledger.find("s")
    assert meta is not None and (meta.generation, meta.nbytes, meta.shape) == (generation, 4096, [4096])
    assert keepers.store.totals() == (1, 4096)
    lease = ledger.lease(meta, B)
    assert keepers.store.clear(["s"])[0] == 1
    assert ledger.find("s") is None
    assert ledger.reclaim() == 0 and ledger.extents.free_bytes == 60 * KIB, "leased bytes were given away"
    assert not ledger.release(lease, generation, A), "another's lease"
    assert ledger.release(lease, generation, B)
    assert not ledger.release(lease, generation, B)
    assert ledger.extents.free_bytes == 64 * KIB
    assert keepers.store.totals() == (0, 0)


def test_a_full_pool_says_so_and_finds_what_was_cleared(keepers: Keepers) -> None:
    for i in range(16):
        keepers.put(f"s{i}")
    with pytest.raises(PoolFull, match="0 of 65536 are free"):
        keepers.now.reserve(1, A)
    keepers.store.clear(["s3", "s4"])
    keepers.put("larger", 8 * KIB)


def test_replacing_frees_the_old_bytes(keepers: Keepers) -> None:
    for _ in range(100):
        keepers.put("same", 16 * KIB)
    assert keepers.store.totals() == (1, 16 * KIB)
    keepers.store.put_json("same", b'{"type":"tensor","data":"AAAAAA==","shape":[1],"dtype":"torch.float32"}')
    assert keepers.now.find("same") is None
    keepers.now.reclaim()
    assert keepers.now.extents.free_bytes == 64 * KIB


def test_what_a_commit_refuses(keepers: Keepers) -> None:
    ledger = keepers.now
    generation = ledger.reserve(4096, A)
    for shape, dtype, error in (
        ((4095,), "uint8", ValueError),
        ((1 << 60,), "uint8", Malformed),
        ((4096,), "float99", Malformed),
    ):
        with pytest.raises(error):
            ledger.commit(generation, A, "s", dtype, shape)
    with pytest.raises(NotHeld):
        ledger.commit(generation, B, "s", "uint8", (4096,))
    ledger.abort(generation, A)
    with pytest.raises(NotHeld):
        ledger.commit(generation, A, "s", "uint8", (4096,))
    assert ledger.extents.free_bytes == 64 * KIB


def test_a_successor_knows_everything(keepers: Keepers) -> None:
    first = keepers.put("kept")
    going = keepers.put("cleared while leased")
    meta, other = keepers.now.find("kept"), keepers.now.find("cleared while leased")
    assert meta is not None and other is not None
    lease, last = keepers.now.lease(meta, B), keepers.now.lease(other, B)
    reserved = keepers.now.reserve(4096, A)
    keepers.store.clear(["cleared while leased"])
    keepers.start()
    assert (keepers.adopted.shards, keepers.adopted.holds, keepers.adopted.lost) == (1, 3, 0)
    assert keepers.now.extents.free_bytes == 52 * KIB
    assert keepers.now.holders() == {A, B}
    fresh = keepers.put("new")
    assert fresh not in (first, going, reserved)
    keepers.now.commit(reserved, A, "late", "uint8", (4096,))
    assert keepers.now.release(lease, first, B) and keepers.now.release(last, going, B)
    assert keepers.now.extents.free_bytes == 52 * KIB
    keepers.start()
    assert (keepers.adopted.shards, keepers.adopted.holds) == (3, 0)
    assert keepers.now.drop_holder(A) == keepers.now.drop_holder(B) == 0


def test_a_new_pool_knows_what_is_lost(keepers: Keepers) -> None:
    keepers.put("s")
    meta = keepers.now.find("s")
    assert meta is not None
    lease = keepers.now.lease(meta, B)
    keepers.now.reserve(512, A)
    keepers.start(pool=b"Q" * 16)
    assert (keepers.adopted.shards, keepers.adopted.holds, keepers.adopted.lost) == (0, 0, 1)
    assert keepers.now.find("s") is None
    assert not keepers.now.release(lease, meta.generation, B)
    assert keepers.store.totals() == (0, 0)
    assert keepers.now.extents.free_bytes == 64 * KIB


def test_expiry_takes_shards_but_no_holds(keepers: Keepers, core: Arena) -> None:
    keepers.put("s")
    generation = keepers.now.reserve(512, A)
    assert keepers.store.sweep_expired(core.now_ns() + 10**12) == 1
    keepers.start()
    assert set(keepers.now.reservations) == {generation} and keepers.adopted.shards == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "commit", "abort", "lease", "release", "clear", "die", "holder"]),
        st.integers(0, 1 << 16),
        st.sampled_from([A, B]),
    ),
    max_size=50,
)


@given(STEPS)
def test_no_byte_has_two_owners(steps: list[tuple[str, int, Holder]]) -> None:
    """Whatever is done, and whenever the keeper dies: what may still be read or written is never given away,
    and in the end everything is free again."""
    with Arena.create(8 << 20) as watcher, Arena.attach(watcher.fileno(), 0) as arena:
        _run(Keepers(arena), steps)


def _run(keepers: Keepers, steps: list[tuple[str, int, Holder]]) -> None:
    reserved: dict[int, Holder] = {}
    leased: dict[int, tuple[int, Holder]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    shards: dict[str, int] = {}

    def pick(of: dict, number: int) -> object:  # type: ignore[type-arg]
        return sorted(of)[number % len(of)]

    for what, number, holder in steps:
        ledger = keepers.now
        if what == "reserve":
            try:
                generation = ledger.reserve(number % 20000, holder)
            except PoolFull:
                continue
            assert generation not in sizes
            sizes[generation] = ledger.blocks[generation].offset, number % 20000
            reserved[generation] = holder
        elif what in ("commit", "abort") and reserved:
            generation = pick(reserved, number)
            who = reserved.pop(generation)
            if what == "abort":
                ledger.abort(generation, who)
                continue
            ledger.commit(generation, who, f"s{number % 5}", "uint8", (sizes[generation][1],))
            shards[f"s{number % 5}"] = generation
        elif what == "lease" and shards:
            name = pick(shards, number)
            meta = ledger.find(name)
            assert meta is not None and meta.generation == shards[name]
            leased[ledger.lease(meta, holder)] = meta.generation, holder
        elif what == "release" and leased:
            lease = pick(leased, number)
            assert ledger.release(lease, *leased.pop(lease))
        elif what == "clear" and shards:
            name = pick(shards, number)
            del shards[name]
            assert keepers.store.clear([name])[0] == 1
        elif what == "die":
            keepers.start()
            assert keepers.adopted.clashing == keepers.adopted.lost == 0
        elif what == "holder":
            ledger.drop_holder(holder)
            reserved = {g: who for g, who in reserved.items() if who != holder}
            leased = {lease: held for lease, held in leased.items() if held[1] != holder}
        keepers.now.reclaim()
        owned = {*reserved, *shards.values(), *(generation for generation, _ in leased.values())}
        assert set(keepers.now.blocks) == owned
        spans = sorted((sizes[g][0], sizes[g][0] + Extents.length(sizes[g][1])) for g in owned)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "bytes with two owners"
        used = sum(end - start for start, end in spans)
        assert keepers.now.extents.free_bytes == keepers.now.extents.size - used
