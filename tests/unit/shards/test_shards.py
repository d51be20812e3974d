"""WIRE "Shards": put, get, batch, clear; bundles; counts; expiry. Answers byte for byte as recorded."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from areal_fast.core import ArenaFull
from areal_fast.errors import ShardRejected, ShardsNotFound
from areal_fast.protocol.export import NAMES, Row
from areal_fast.shards import BundleMeta, ShardStore, new_bundle_id
from areal_fast.shards.bundles import part_id, split_id

F32 = b'{"type":"tensor","data":"AADAPwAAAMAAAAAAAACAfw==","shape":[2,2],"dtype":"torch.float32"}'
ONE = b'{"type":"tensor","data":"AACAPw==","shape":[1],"dtype":"torch.float32"}'
I8 = b'{"type":"tensor","data":"gH8=","shape":[2],"dtype":"torch.int8"}'
BF16 = b'{"type":"tensor","data":"AACAPwAASUAAAErx","shape":[3],"dtype":"torch.bfloat16"}'


@pytest.mark.parametrize("shard_id", ["f32", "batch", "clear", "a b", "你", "a/b", "x" * 1024])
def test_what_is_put_can_be_got(shards: ShardStore, shard_id: str) -> None:
    assert shards.get_json(shard_id) is None
    shards.put_json(shard_id, F32)
    assert shards.get_json(shard_id) == F32
    assert shards.totals() == (1, 16)


def test_putting_again_replaces(shards: ShardStore) -> None:
    shards.put_json("f32", F32)
    shards.put_json("f32", ONE)
    assert shards.get_json("f32") == ONE
    assert shards.totals() == (1, 4)


@pytest.mark.parametrize("shard_id", ["", "\0x", "x" * 1025, "ä" * 513])
def test_ids_have_limits(shards: ShardStore, shard_id: str) -> None:
    with pytest.raises(ShardRejected):
        shards.put_json(shard_id, F32)
    assert shards.get_json(shard_id) is None
    assert shards.clear([shard_id]) == (0, 0, 0)


def test_what_is_refused_stores_nothing_and_replaces_nothing(shards: ShardStore) -> None:
    shards.put_json("x", ONE)
    for body in (b'"hello"', b"{bad", F32.replace(b"[2,2]", b"[3,3]"), b'{"type":"dataclass"}'):
        with pytest.raises(ShardRejected):
            shards.put_json("x", body)
        with pytest.raises(ShardRejected):
            shards.put_json("y", body)
    assert shards.get_json("x") == ONE
    assert shards.get_json("y") is None


def test_no_type_tag_runs_code(shards: ShardStore, tmp_path: Any) -> None:
    proof = tmp_path / "proof"
    body = {"type": "dataclass", "class_path": "subprocess.Popen", "data": {"args": ["touch", str(proof)]}}
    for value in (body, [body], {"type": "tensor", "data": body, "shape": [1], "dtype": "torch.float32"}):
        with pytest.raises(ShardRejected):
            shards.put_json("rce", json.dumps(value).encode())
    assert not proof.exists()


def test_batch_is_in_order_with_repeats(shards: ShardStore) -> None:
    shards.put_json("a", ONE)
    shards.put_json("b", I8)
    shards.put_json("c", BF16)
    assert shards.batch_json(["b", "a", "b", "c"]) == b"[" + b",".join((I8, ONE, I8, BF16)) + b"]"
    assert shards.batch_json([]) == b"[]"
    with pytest.raises(ShardsNotFound, match="One or more requested shards were not found") as caught:
        shards.batch_json(["a", "nope1", "b", "nope2"])
    assert caught.value.shard_ids == ["nope1", "nope2"]


def test_clear_counts_what_it_removed_and_what_is_left(shards: ShardStore) -> None:
    for name, body in (("a", ONE), ("b", I8), ("c", F32), ("d", BF16)):
        shards.put_json(name, body)
    assert shards.totals() == (4, 4 + 2 + 16 + 6)
    assert shards.clear(["a", "nope"]) == (1, 3, 24)
    assert shards.clear(["a"]) == (0, 3, 24)
    assert shards.clear(["b", "b"]) == (1, 2, 22)
    assert shards.clear([]) == (0, 2, 22)
    assert shards.clear(["c", "d"]) == (2, 0, 0)
    assert shards.get_json("c") is None


def test_large(shards: ShardStore) -> None:
    raw = np.random.default_rng(1).integers(0, 255, 3 << 20, np.uint8)
    body = b'{"type":"tensor","data":"%b","shape":[3,1024,1024],"dtype":"torch.uint8"}' % base64.b64encode(
        raw.tobytes()
    )
    shards.put_json("big", body)
    assert shards.get_json("big") == body
    with pytest.raises(ArenaFull):
        for k in range(10):
            shards.put_json(f"big{k}", body)
    assert shards.get_json("big") == body


def test_expired_shards_go(shards: ShardStore) -> None:
    shards.put_json("a", ONE)
    prefix, _ = put_bundle(shards)
    assert shards.sweep_expired(1) == 0
    assert shards.sweep_expired(2**62) == 2
    assert shards.totals() == (0, 0)
    assert shards.get_json(part_id(prefix, 0)) is None


# -- bundles ------------------------------------------------------------------------------------------------


def put_bundle(shards: ShardStore, kind: Any = "each") -> tuple[str, BundleMeta]:
    rows = [Row(2, 1, -1, 0, [(5, 1)], 0.5), Row(3, 2, 0, 3, [(6, 2)], 1.5)]
    data = [
        np.array([1, 2, 3], "<i4").tobytes() + np.array([-1.0], "<f4").tobytes(),
        np.array([4, 5], "<i4").tobytes() + np.array([-2.0, -3.0], "<f4").tobytes(),
    ]
    prefix, meta = new_bundle_id(), BundleMeta(kind, rows)
    shards.put_bundle(prefix, meta, data)
    return prefix, meta


def test_ids_of_a_bundle_are_uuid_shaped_and_random(shards: ShardStore) -> None:
    import uuid

    a, b = new_bundle_id(), new_bundle_id()
    assert a != b
    uuid.UUID(part_id(a, 7))
    assert split_id(part_id(a, 0x1234)) is not None
    assert split_id(part_id(a, 0x1234))[1] == 0x1234  # type: ignore[index]
    for odd in (
        "",
        "x" * 36,
        part_id(a, 1).upper(),
        part_id(a, 1).replace("-", "_"),
        part_id(a, 1)[:-1] + "é",
    ):
        assert split_id(odd) is None or odd == part_id(a, 1)


def test_parts_of_a_bundle_are_tensors(shards: ShardStore) -> None:
    prefix, meta = put_bundle(shards)
    ids = [part_id(prefix, i) for i in range(meta.parts)]
    assert meta.parts == 12
    got = json.loads(shards.batch_json(ids))
    assert got == [json.loads(shards.get_json(i) or b"") for i in ids]
    assert [t["shape"] for t in got] == [[1, 3]] * 5 + [[1]] + [[1, 5]] * 5 + [[1]]
    assert got[6]["data"] == "AQAAAAAAAAACAAAAAAAAAAMAAAAAAAAABAAAAAAAAAAFAAAAAAAAAA=="
    assert shards.get_json(part_id(prefix, 12)) is None
    assert shards.totals() == (12, 8 * 29 + 8)


def test_a_bundle_goes_with_its_last_part(shards: ShardStore) -> None:
    prefix, meta = put_bundle(shards)
    ids = [part_id(prefix, i) for i in range(meta.parts)]
    assert shards.clear([ids[0], ids[0]])[0] == 1
    assert shards.get_json(ids[0]) is None
    with pytest.raises(ShardsNotFound) as caught:
        shards.batch_json(ids)
    assert caught.value.shard_ids == [ids[0]]
    assert shards.clear(ids) == (11, 0, 0)
    assert shards._arena.stats()["shards_active"] == 0


def test_a_batch_bundle_has_one_part_a_name(shards: ShardStore) -> None:
    prefix, meta = put_bundle(shards, "batch")
    assert meta.parts == len(NAMES)
    assert shards.totals() == (6, meta.total_bytes())
    shapes = [json.loads(shards.get_json(part_id(prefix, i)) or b"")["shape"] for i in range(6)]
    assert shapes == [[2, 5]] * 5 + [[2]]
    shards.clear([part_id(prefix, i) for i in range(6)])
    assert shards.totals() == (0, 0)


def test_a_put_takes_the_place_of_a_part(shards: ShardStore) -> None:
    prefix, _ = put_bundle(shards)
    shard_id = part_id(prefix, 0)
    before = shards.totals()[0]
    shards.put_json(shard_id, ONE)
    assert shards.get_json(shard_id) == ONE
    assert shards.totals()[0] == before
    assert shards.clear([shard_id])[0] == 1
    assert shards.get_json(shard_id) is None


def test_a_bundle_is_not_reachable_by_its_own_name(shards: ShardStore) -> None:
    from areal_fast.shards.bundles import arena_name

    prefix, _ = put_bundle(shards)
    for shard_id in (prefix, arena_name(prefix).decode("latin-1"), "\0"):
        assert shards.get_json(shard_id) is None
        assert shards.clear([shard_id])[0] == 0
    shards.drop_bundle(prefix)
    shards.drop_bundle(prefix)
    assert shards.totals() == (0, 0)


def test_nothing_stays_pinned(shards: ShardStore) -> None:
    prefix, meta = put_bundle(shards)
    ids = [part_id(prefix, i) for i in range(meta.parts)]
    shards.put_json("a", ONE)
    shards.batch_json([*ids, "a"])
    shards.get_json(ids[3])
    with pytest.raises(ShardsNotFound):
        shards.batch_json([*ids, "zz"])
    shards.clear([*ids, "a"])
    assert shards._arena.stats()["shards_active"] == 0
    assert shards._arena.stats()["shard_bytes"] == 0
