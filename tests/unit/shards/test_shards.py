"""WIRE "Shards": put, get, batch, clear; bundles; counts; expiry. Answers byte for byte as recorded."""

import base64
import json
from collections.abc import Sequence
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


def got(shards: ShardStore, shard_id: str) -> bytes | None:
    found = shards.get_json(shard_id)
    if found is None:
        return None
    size, body = found.size, found.whole()
    assert len(body) == size
    return body


def got_all(shards: ShardStore, shard_ids: Sequence[str]) -> bytes:
    found = shards.batch_json(shard_ids)
    size, body = found.size, found.whole()
    assert len(body) == size
    return body


@pytest.mark.parametrize("shard_id", ["f32", "batch", "clear", "a b", "你", "a/b", "x" * 1024])
def test_what_is_put_can_be_got(shards: ShardStore, shard_id: str) -> None:
    assert got(shards, shard_id) is None
    shards.put_json(shard_id, F32)
    assert got(shards, shard_id) == F32
    assert shards.totals() == (1, 16)


def test_putting_again_replaces(shards: ShardStore) -> None:
    shards.put_json("f32", F32)
    shards.put_json("f32", ONE)
    assert got(shards, "f32") == ONE
    assert shards.totals() == (1, 4)


@pytest.mark.parametrize("shard_id", ["", "\0x", "x" * 1025, "ä" * 513])
def test_ids_have_limits(shards: ShardStore, shard_id: str) -> None:
    with pytest.raises(ShardRejected):
        shards.put_json(shard_id, F32)
    assert got(shards, shard_id) is None
    assert shards.clear([shard_id]) == (0, 0, 0)


def test_what_is_refused_stores_nothing_and_replaces_nothing(shards: ShardStore) -> None:
    shards.put_json("x", ONE)
    for body in (b'"hello"', b"{bad", F32.replace(b"[2,2]", b"[3,3]"), b'{"type":"dataclass"}'):
        with pytest.raises(ShardRejected):
            shards.put_json("x", body)
        with pytest.raises(ShardRejected):
            shards.put_json("y", body)
    assert got(shards, "x") == ONE
    assert got(shards, "y") is None


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
    assert got_all(shards, ["b", "a", "b", "c"]) == b"[" + b",".join((I8, ONE, I8, BF16)) + b"]"
    assert got_all(shards, []) == b"[]"
    with pytest.raises(ShardsNotFound, match="One or more requested shards were not found") as caught:
        got_all(shards, ["a", "nope1", "b", "nope2"])
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
    assert got(shards, "c") is None


def test_large(shards: ShardStore) -> None:
    raw = np.random.default_rng(1).integers(0, 255, 3 << 20, np.uint8)
    body = b'{"type":"tensor","data":"%b","shape":[3,1024,1024],"dtype":"torch.uint8"}' % base64.b64encode(
        raw.tobytes()
    )
    shards.put_json("big", body)
    assert got(shards, "big") == body
    assert got_all(shards, ["big"] * 3) == b"[" + b",".join([body] * 3) + b"]"
    with pytest.raises(ArenaFull):
        for k in range(10):
            shards.put_json(f"big{k}", body)
    assert got(shards, "big") == body


def test_expired_shards_go(shards: ShardStore) -> None:
    shards.put_json("a", ONE)
    prefix, _ = put_bundle(shards)
    assert shards.sweep_expired(1) == 0
    assert shards.sweep_expired(2**62) == 2
    assert shards.totals() == (0, 0)
    assert got(shards, part_id(prefix, 0)) is None


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
    listed = json.loads(got_all(shards, ids))
    assert listed == [json.loads(got(shards, i) or b"") for i in ids]
    assert [t["shape"] for t in listed] == [[1, 3]] * 5 + [[1]] + [[1, 5]] * 5 + [[1]]
    assert listed[6]["data"] == "AQAAAAAAAAACAAAAAAAAAAMAAAAAAAAABAAAAAAAAAAFAAAAAAAAAA=="
    assert got(shards, part_id(prefix, 12)) is None
    assert shards.totals() == (12, 8 * 29 + 8)


def test_a_bundle_goes_with_its_last_part(shards: ShardStore) -> None:
    prefix, meta = put_bundle(shards)
    ids = [part_id(prefix, i) for i in range(meta.parts)]
    assert shards.clear([ids[0], ids[0]])[0] == 1
    assert got(shards, ids[0]) is None
    with pytest.raises(ShardsNotFound) as caught:
        got_all(shards, ids)
    assert caught.value.shard_ids == [ids[0]]
    assert shards.clear(ids) == (11, 0, 0)
    assert shards._arena.stats()["shards_active"] == 0


def test_a_batch_bundle_has_one_part_a_name(shards: ShardStore) -> None:
    prefix, meta = put_bundle(shards, "batch")
    assert meta.parts == len(NAMES)
    assert shards.totals() == (6, meta.total_bytes())
    shapes = [json.loads(got(shards, part_id(prefix, i)) or b"")["shape"] for i in range(6)]
    assert shapes == [[2, 5]] * 5 + [[2]]
    shards.clear([part_id(prefix, i) for i in range(6)])
    assert shards.totals() == (0, 0)


def test_a_put_takes_the_place_of_a_part(shards: ShardStore) -> None:
    prefix, _ = put_bundle(shards)
    shard_id = part_id(prefix, 0)
    before = shards.totals()[0]
    shards.put_json(shard_id, ONE)
    assert got(shards, shard_id) == ONE
    assert shards.totals()[0] == before
    assert shards.clear([shard_id])[0] == 1
    assert got(shards, shard_id) is None


def test_a_bundle_is_not_reachable_by_its_own_name(shards: ShardStore) -> None:
    from areal_fast.shards.bundles import arena_name

    prefix, _ = put_bundle(shards)
    for shard_id in (prefix, arena_name(prefix).decode("latin-1"), "\0"):
        assert got(shards, shard_id) is None
        assert shards.clear([shard_id])[0] == 0
    shards.drop_bundle(prefix)
    shards.drop_bundle(prefix)
    assert shards.totals() == (0, 0)


def test_nothing_stays_pinned(shards: ShardStore) -> None:
    prefix, meta = put_bundle(shards)
    ids = [part_id(prefix, i) for i in range(meta.parts)]
    shards.put_json("a", ONE)
    got_all(shards, [*ids, "a"])
    got(shards, ids[3])
    with pytest.raises(ShardsNotFound):
        got_all(shards, [*ids, "zz"])
    shards.clear([*ids, "a"])
    assert shards._arena.stats()["shards_active"] == 0
    assert shards._arena.stats()["shard_bytes"] == 0


def test_what_was_found_stays_until_it_is_closed(shards: ShardStore, arena: Any) -> None:
    shards.put_json("a", F32)
    prefix, meta = put_bundle(shards)
    part = part_id(prefix, 3)
    want = got_all(shards, ["a", part])
    found = shards.batch_json(["a", part])
    shards.put_json("a", ONE)
    shards.clear(["a", *(part_id(prefix, i) for i in range(meta.parts))])
    assert got(shards, "a") is None
    assert b"".join(found.pieces()) == want
    assert arena.stats()["shards_active"] == 0
    found.close()
    assert arena.stats()["granules_used"] == 0


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16"])
def test_pieces_are_of_bounded_size(shards: ShardStore, dtype: str) -> None:
    raw = bytes(1200 * 1024) if dtype == "uint8" else np.arange(300 * 1024, dtype="<f4").tobytes()
    count = len(raw) // (1 if dtype == "uint8" else 4)
    text = base64.b64encode(raw)
    tail = b'","shape":[%d],"dtype":"torch.%b"}' % (count, dtype.encode())
    shards.put_json("x", b'{"type":"tensor","data":"' + text + tail)
    found = shards.get_json("x")
    assert found is not None
    pieces = list(found.pieces())
    assert len(pieces) > 3
    assert max(map(len, pieces)) < 600_000
    whole = np.frombuffer(base64.b64decode(json.loads(b"".join(pieces))["data"]), "<f4")
    kept = np.frombuffer(raw, "<f4")
    assert np.allclose(whole, kept, rtol=2**-8)
    assert got(shards, "x") == b"".join(pieces)
