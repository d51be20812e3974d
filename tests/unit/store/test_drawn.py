"""Keys and group ids drawn from a stock: their form, that none comes twice, and whose a stock is."""

from __future__ import annotations

import os
import re
import uuid

from areal_fast.store.drawn import STOCK_BYTES, Drawn

MANY = STOCK_BYTES // 8
"""More than several stocks have."""


def test_no_key_comes_twice_and_all_are_of_its_form() -> None:
    drawn = Drawn()
    keys = [drawn.key() for _ in range(MANY)]
    assert len(set(keys)) == MANY
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{43}", key) for key in keys)
    for place in range(43):
        assert len({key[place] for key in keys}) > 48, "all characters are drawn, each place by itself"


def test_group_ids_are_random_uuids() -> None:
    drawn = Drawn()
    ids = [drawn.group_id() for _ in range(MANY)]
    assert len(set(ids)) == MANY
    for name in ids:
        read = uuid.UUID(name.removeprefix("grp-"))
        assert name == f"grp-{read}" and read.version == 4 and read.variant == uuid.RFC_4122
    digits = [name.removeprefix("grp-").replace("-", "") for name in ids]
    for place in range(32):
        assert len({name[place] for name in digits}) == {12: 1, 16: 4}.get(place, 16)


def test_keys_and_ids_may_be_asked_for_in_any_order() -> None:
    drawn = Drawn()
    found = [drawn.key() if i % 3 else drawn.group_id() for i in range(MANY)]
    assert len(set(found)) == MANY
    assert {len(name) for name in found} == {40, 43}


def test_a_forked_child_draws_its_own() -> None:
    drawn = Drawn()
    drawn.key(), drawn.group_id()
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writes, f"{drawn.key()} {drawn.group_id()}".encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as line:
        theirs = line.read().split()
    assert os.waitpid(pid, 0)[1] == 0
    assert len(theirs) == 2
    assert not {drawn.key(), drawn.group_id()} & {*theirs}
