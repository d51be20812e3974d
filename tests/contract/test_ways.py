"""What holds for a shard by whatever way it comes and goes: the same bits, or a no that changes nothing."""

from __future__ import annotations

import json
import random
import struct

import pytest

from areal_fast.protocol.wire import TORCH_ITEMSIZE
from areal_fast.shards import raw
from areal_fast.shards.description import Description, describe
from tests.contract.ways import WAYS, Raw, Refused, Shard, Way
from tests.e2e.running import Proxy
from tests.e2e.test_life import shard_ids
from tests.unit.shards.test_raw import LIES

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (2, 0, 5), (2, 3), (70_001,))
KINDS: list[Description] = [
    *(describe(dtype, shape) for dtype in TORCH_ITEMSIZE for shape in SHAPES),
    *(describe("float8_e4m3fn", shape, "wide") for shape in SHAPES[3:]),
    *(describe(dtype, shape, "ndarray") for dtype in ("<f4", ">i2", "|b1", "<U3") for shape in SHAPES),
    *(describe("float32", shape, "meta") for shape in SHAPES),
]


def filled(what: Description, seed: int = 1) -> Shard:
    """Any bits, NaNs with a payload among them."""
    return Shard(what, random.Random(seed).randbytes(what.nbytes))


def test_every_dtype_and_shape_is_the_same_bit_for_bit(way_in: Way, way_out: Way, fresh: str) -> None:
    shards = {f"{fresh}-{i}": filled(what, i) for i, what in enumerate(KINDS) if way_in.takes(what)}
    assert {shard.what.dtype for shard in shards.values()} >= set(TORCH_ITEMSIZE)
    for shard_id, shard in shards.items():
        way_in.put(shard_id, shard)
    found = dict(zip(shards, way_out.get(list(shards)), strict=True))
    for shard_id, shard in shards.items():
        assert found[shard_id] == way_out.shown(shard), shard.what


@pytest.mark.parametrize("size", [(1 << 18) - 1, 1 << 18, 3 << 20])
def test_large_ones_too(way_in: Way, way_out: Way, fresh: str, size: int) -> None:
    shard = filled(describe("uint8", (size,)))
    way_in.put(fresh, shard)
    assert way_out.get([fresh]) == [shard]
    assert way_out.get([fresh, fresh]) == [shard, shard]


@pytest.mark.parametrize("shard_id", ["a b", "你", "..", "batch", "clear", "x" * 1024, "1%2F2"])
def test_ids_are_any_text(way_in: Way, way_out: Way, shard_id: str) -> None:
    if shard_id == "batch" and isinstance(way_in, Raw):
        pytest.skip("PUT /data/batch of a file stores what it holds under the names there")
    shard = filled(describe("int64", (2,)), random.randrange(1 << 30))
    way_in.put(shard_id, shard)
    assert way_out.get([shard_id]) == [shard]


def test_a_replacement_is_seen_by_all(way_in: Way, way_out: Way, fresh: str) -> None:
    for size in (5, 400_000, 3, 400_001):
        shard = filled(describe("int16", (size,)), size)
        way_in.put(fresh, shard)
        assert way_out.get([fresh]) == [shard]


def test_what_is_missing_is_named(way_in: Way, way_out: Way, fresh: str) -> None:
    way_in.put(fresh, filled(describe("bool", (1,))))
    with pytest.raises(Refused) as refusal:
        way_out.get([fresh, fresh + "-missing"])
    assert refusal.value.status == 400
    assert fresh + "-missing" in str(refusal.value)


def test_cleared_is_cleared_and_counted(proxy: Proxy, way_in: Way, way_out: Way, fresh: str) -> None:
    before = proxy.ask("DELETE", "/data/clear", {"shard_ids": []}).json
    shard_ids = [f"{fresh}-{i}" for i in range(3)]
    for shard_id, size in zip(shard_ids, (0, 10, 300_000), strict=True):
        way_in.put(shard_id, filled(describe("int32", (size,))))
    counted = proxy.ask("DELETE", "/data/clear", {"shard_ids": []}).json
    assert counted["num_tensors"] - before["num_tensors"] == 3
    assert counted["total_bytes"] - before["total_bytes"] == 4 * 300_010
    assert proxy.ask("DELETE", "/data/clear", {"shard_ids": shard_ids}).json == {**before, "cleared_count": 3}
    for shard_id in shard_ids:
        with pytest.raises(Refused):
            way_out.get([shard_id])


# -- raw over HTTP ---------------------------------------------------------------------------------------
FILE = {"content-type": raw.MEDIA_TYPE}
BYTE = {"type": "tensor", "data": "AA==", "shape": [1], "dtype": "torch.int8"}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_changes_nothing(proxy: Proxy, way_out: Way, lie: str) -> None:
    proxy.ask("DELETE", "/data/clear", {"shard_ids": ["a", "b"]})
    good = filled(describe("float32", (1,)))
    Raw(proxy).put("a", good)
    before = proxy.ask("DELETE", "/data/clear", {"shard_ids": []}).json
    for path in ("/data/a", "/data/b", "/data/batch"):
        answer = proxy.ask("PUT", path, LIES[lie], headers=FILE)
        assert answer.status == 400, (path, answer.body)
        assert answer.json["status"] == "error"
        assert answer.json["message"]
    assert proxy.ask("DELETE", "/data/clear", {"shard_ids": []}).json == before
    assert way_out.get(["a"]) == [good]


def test_a_file_stores_every_name_or_none(proxy: Proxy, way_out: Way, fresh: str) -> None:
    names = [f"{fresh}-{i}" for i in range(len(KINDS))]
    shards = [filled(what, i) for i, what in enumerate(KINDS)]
    layout = raw.lay_out(list(zip(names, KINDS, strict=True)))
    file = layout.header + b"".join(shards[i].data for i in layout.order)
    answer = proxy.ask("PUT", "/data/batch", file, headers=FILE)
    assert (answer.status, sorted(answer.json["shard_ids"])) == (200, sorted(names))
    assert way_out.get(names) == [way_out.shown(shard) for shard in shards]
    bad = raw.lay_out([("ok", describe("bool", (1,))), ("x" * 1025, describe("bool", (1,)))])
    assert proxy.ask("PUT", "/data/batch", bad.header + b"\0\0", headers=FILE).status == 400
    assert proxy.ask("GET", "/data/ok").status == 404


@pytest.mark.parametrize("count", [0, 2])
def test_under_one_id_goes_one_tensor(proxy: Proxy, fresh: str, count: int) -> None:
    layout = raw.lay_out([(f"t{i}", describe("bool", (1,))) for i in range(count)])
    answer = proxy.ask("PUT", f"/data/{fresh}", layout.header + b"\1" * count, headers=FILE)
    assert answer.status == 400
    assert f"{count} tensors" in answer.json["message"]


@pytest.mark.parametrize(
    ("accept", "is_raw"),
    [
        (raw.MEDIA_TYPE, True),
        (raw.MEDIA_TYPE.upper(), True),
        (f"{raw.MEDIA_TYPE}, application/json;q=0.5", True),
        (f"text/html, {raw.MEDIA_TYPE};q=0.2, */*;q=0.9", True),
        (f"application/json, {raw.MEDIA_TYPE};q=0.9", False),
        (f"{raw.MEDIA_TYPE};q=0", False),
        (f"{raw.MEDIA_TYPE};q=banana", False),
        (f"{raw.MEDIA_TYPE}+json", False),
        ("*/*", False),
        ("application/*", False),
        ("", False),
        (None, False),
    ],
)
def test_json_is_the_default(proxy: Proxy, fresh: str, accept: str | None, is_raw: bool) -> None:
    proxy.ask(
        "PUT", f"/data/{fresh}", {"type": "tensor", "data": "AA==", "shape": [1], "dtype": "torch.int8"}
    )
    headers = {} if accept is None else {"accept": accept}
    body = json.dumps({"shard_ids": [fresh]}).encode()
    for answer in (
        proxy.ask("GET", f"/data/{fresh}", headers=headers),
        proxy.ask("POST", "/data/batch", body, headers={**headers, "content-type": "application/json"}),
    ):
        assert answer.headers["content-type"] == (raw.MEDIA_TYPE if is_raw else "application/octet-stream")
        assert (answer.body[:1] in (b"{", b"[")) == (not is_raw)


def test_a_missing_shard_is_404_in_json(proxy: Proxy, fresh: str) -> None:
    answer = proxy.ask("GET", f"/data/{fresh}", headers={"accept": raw.MEDIA_TYPE})
    assert (answer.status, answer.json) == (404, {"status": "error", "message": f"Shard {fresh} not found"})


def test_an_id_that_cannot_be_a_name_goes_out_as_json_only(proxy: Proxy) -> None:
    shard_id = "__metadata__"
    proxy.ask(
        "PUT", f"/data/{shard_id}", {"type": "tensor", "data": "AA==", "shape": [1], "dtype": "torch.int8"}
    )
    assert proxy.ask("GET", f"/data/{shard_id}").status == 200
    assert proxy.ask("GET", f"/data/{shard_id}", headers={"accept": raw.MEDIA_TYPE}).status == 400


def test_no_room_says_so(proxy: Proxy, way_out: Way, fresh: str) -> None:
    what = describe("uint8", (300 << 20,))
    answer = proxy.ask(
        "PUT", f"/data/{fresh}", raw.lay_out([("t", what)]).header + bytes(300 << 20), headers=FILE
    )
    assert answer.status == 507
    assert "memory is full" in answer.json["message"]
    with pytest.raises(Refused):
        way_out.get([fresh])


def test_a_header_over_the_limit_is_refused(proxy: Proxy, fresh: str) -> None:
    size = (2 << 20) + 1
    body = struct.pack("<Q", size) + b" " * size
    assert proxy.ask("PUT", f"/data/{fresh}", body, headers=FILE).status == 400


# -- exports ---------------------------------------------------------------------------------------------
def test_the_shards_of_an_export_are_the_same_by_all_ways(proxy: Proxy) -> None:
    session_id, key = proxy.start("ways")
    for turn in range(3):
        assert proxy.chat(key, f"turn {turn}").status == 200
    assert proxy.reward(key).status == 200
    interactions = proxy.export(session_id).json["interactions"]
    ids = [shard for interaction in interactions.values() for shard in shard_ids(interaction)]
    assert len(ids) >= 18
    ways = [make(proxy) for make in WAYS.values()]
    found = [way.get(ids) for way in ways]
    for way in ways:
        way.close()
    assert all(len(shard.data) == shard.what.nbytes for shard in found[0])
    assert found == [found[0]] * len(ways)
    answer = proxy.ask("DELETE", "/data/clear", {"shard_ids": ids})
    assert answer.json["cleared_count"] == len(ids)
