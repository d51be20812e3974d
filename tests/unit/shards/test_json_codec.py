"""Tensors on the wire: every dtype, every lie about a shape, and nothing but tensors and arrays.

Every body goes into the arena and, in the heap, the thorough way, with and without its data being cut out
before the JSON parser sees it: all must agree, refusals included."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.core import Arena, base64_decode_into, base64_encode
from areal_fast.errors import ShardRejected
from areal_fast.protocol import wire
from areal_fast.protocol.wire import Kept
from areal_fast.shards import json_codec
from areal_fast.shards.outgoing import STEP_BYTES, Outgoing, Part
from areal_fast.shards.small_floats import SMALL_FLOATS, table

F32_2X2 = "AADAPwAAAMAAAAAAAACAfw=="


def tensor(data: Any, shape: Any, dtype: Any = "torch.float32", **extra: Any) -> bytes:
    return json.dumps({"type": "tensor", "data": data, "shape": shape, "dtype": dtype} | extra).encode()


@pytest.fixture(scope="module", autouse=True)
def small_arena() -> Iterator[None]:
    global _arena
    with Arena.create(1 << 22) as _arena:
        yield


_arena: Arena


def stored(body: bytes) -> tuple[Kept, bytes] | str:
    """What the arena holds after a put of `body`; or the refusal, after which it holds nothing."""
    try:
        kept = json_codec.store(_arena, b"x", body, lambda k: b"m")
    except ShardRejected as error:
        stats = _arena.stats()
        assert (stats["shards_init"], stats["shards_active"]) == (0, 0)
        return str(error)
    slot = _arena.pin_shard(b"x")
    meta, view = _arena.shard_view(slot)
    data = bytes(view)
    view.release()
    _arena.shard_close(slot)
    _arena.unpin(slot)
    assert (meta, len(data)) == (b"m", kept.nbytes)
    return kept, data


def decode(body: bytes) -> tuple[Kept, bytes]:
    """The tensor in a body; ShardRejected as every way says it."""
    ways = [stored(body)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_codec, "WORTH_SPLITTING", 0)
        ways.append(stored(body))
    try:
        kept, data = json_codec.decode(body)
    except ShardRejected as error:
        assert ways == [str(error)] * 2
        raise
    assert ways == [(kept, data)] * 2
    return kept, bytes(data)


def encode(kept: Kept, data: bytes) -> bytes:
    found = Outgoing([Part(kept.dtype, kept.shape, kept.form, kept.nbytes, data)], listed=False)
    size, body = found.size, found.whole()
    assert len(body) == size
    return body


def round_trip(body: bytes) -> bytes:
    return encode(*decode(body))


@pytest.mark.parametrize(
    ("data", "shape", "dtype"),
    [
        (F32_2X2, [2, 2], "torch.float32"),
        ("WfP4wh9upQEAAAAAAAAAQA==", [2], "torch.float64"),
        ("ADz/ew==", [2], "torch.float16"),
        ("AACAPwAASUAAAErx", [3], "torch.bfloat16"),
        ("AQAAAAAAAAD+/////////wAAAAAAAQAA", [1, 3], "torch.int64"),
        ("BwAAAPn///8=", [2], "torch.int32"),
        ("BwD5/w==", [2], "torch.int16"),
        ("gH8=", [2], "torch.int8"),
        ("AP8=", [2], "torch.uint8"),
        ("AQAB", [3], "torch.bool"),
        ("AABQQA==", [], "torch.float32"),
        ("", [0], "torch.float32"),
        ("", [2, 0, 3], "torch.int64"),
        ("AADAfwAAAIA=", [2], "torch.float32"),
        ("AAAAAAAAAAAAAAAAAAAAAA==", [2], "torch.complex64"),
        ("AQACAA==", [2], "torch.uint16"),
        ("AACAPwAAAEA=", [2], "torch.float8_e4m3fn"),
    ],
)
def test_recorded_tensors_come_back_byte_for_byte(data: str, shape: list[int], dtype: str) -> None:
    compact = json.dumps(
        {"type": "tensor", "data": data, "shape": shape, "dtype": dtype}, separators=(",", ":")
    ).encode()
    assert round_trip(tensor(data, shape, dtype)) == compact


@pytest.mark.parametrize("name", sorted(wire.TORCH_ITEMSIZE))
def test_every_fixed_size_dtype(name: str) -> None:
    size = wire.TORCH_ITEMSIZE[name]
    width = 4 if name == "bfloat16" else size
    raw = np.arange(6, dtype="<f4").tobytes() if name == "bfloat16" else bytes(range(6 * width))
    body = tensor(base64.b64encode(raw).decode(), [2, 3], f"torch.{name}")
    kept, data = decode(body)
    assert (kept.dtype, kept.shape, kept.nbytes, len(data)) == (name, (2, 3), 6 * size, 6 * size)
    sent = table(name)[np.frombuffer(raw, np.uint8)].tobytes() if name in SMALL_FLOATS else raw
    expected = {**json.loads(body), "data": base64.b64encode(sent).decode()}
    assert json.loads(encode(kept, data)) == expected
    assert decode(tensor("", [0, 4], f"torch.{name}"))[0].shape == (0, 4)
    one = base64.b64encode(bytes(width)).decode()
    assert decode(tensor(one, [], f"torch.{name}"))[0].shape == ()


def test_torch_knows_every_dtype_named_here() -> None:
    torch = pytest.importorskip("torch")
    for name, size in wire.TORCH_ITEMSIZE.items():
        dtype = getattr(torch, name, None)
        if dtype is not None:
            assert dtype.itemsize == size, name
    known = {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)}
    assert {n for n in known if not n.startswith(("q", "quint"))} <= set(wire.TORCH_ITEMSIZE)


@given(st.binary(min_size=4, max_size=64).map(lambda b: b[: len(b) // 4 * 4]))
def test_bfloat16_rounds_as_torch_does(data: bytes) -> None:
    torch = pytest.importorskip("torch")
    want = torch.frombuffer(bytearray(data), dtype=torch.float32).to(torch.bfloat16)
    kept = bytearray(len(data) // 2)
    assert base64_decode_into(base64.b64encode(data), kept, bf16=True)
    got = np.frombuffer(kept, "<u2")
    bits = want.view(torch.int16).numpy().view(np.uint16)
    wide = np.frombuffer(data, "<u4")
    nan = np.isnan(np.frombuffer(data, "<f4"))
    assert (got[~nan] == bits[~nan]).all()
    assert (got[nan] == np.where(wide[nan] & 0xFFFF, 0x7FC0, wide[nan] >> 16)).all()
    again = np.frombuffer(base64.b64decode(base64_encode(kept, bf16=True)), "<f4")
    assert np.isnan(again[nan]).all()
    assert (again[~nan] == want.to(torch.float32).numpy()[~nan]).all()


def test_dtype_names_without_prefix_and_aliases() -> None:
    assert decode(tensor("AACAPwAAgD8=", [2], "float32"))[0].dtype == "float32"
    assert decode(tensor("AACAPwAAgD8=", [2], "torch.float"))[0].dtype == "float32"
    assert decode(tensor("AACAPwAAgD8=", [1], "torch.long"))[0].dtype == "int64"


def test_shapes_are_read_as_laxly_as_the_original_does() -> None:
    assert decode(tensor(F32_2X2, [-1]))[0].shape == (4,)
    assert decode(tensor(F32_2X2, [2, -1]))[0].shape == (2, 2)
    assert decode(tensor(F32_2X2, [2.0, "2"]))[0].shape == (2, 2)
    assert decode(tensor(F32_2X2, [2, 2], zz=1))[0].shape == (2, 2)
    assert decode(tensor("AADA\nPwAAAMAAAAAAAACAfw==", [2, 2]))[0].shape == (2, 2)
    assert decode(tensor("AADA/wAAAMAAAAAAAACAfw==", [2, 2]).replace(b"/", b"\\/"))[0].shape == (2, 2)


def test_a_tensor_without_data_is_a_meta_tensor() -> None:
    body = tensor(None, [2, 2])
    assert json.loads(round_trip(body)) == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [
        tensor(F32_2X2, [3, 3]),
        tensor(F32_2X2, [-2, -2]),
        tensor(F32_2X2, [-1, -1]),
        tensor(F32_2X2, [0, -1]),
        tensor(F32_2X2, [1 << 40, 1 << 40]),
        tensor(F32_2X2, [1 << 70]),
        tensor(F32_2X2, [1] * 65),
        tensor(F32_2X2, [2, 2.5]),
        tensor(F32_2X2, [2, None]),
        tensor(F32_2X2, "22"),
        tensor(F32_2X2, None),
        tensor(F32_2X2, {"0": 2}),
        tensor("", [1 << 62]),
        tensor(None, [-1]),
        tensor("!!!!", [2, 2]),
        tensor("AADAPwAAAMAAAAAAAACA", [2, 2]),
        tensor("AAA", [1]),
        tensor(5, [1]),
        tensor(F32_2X2, [2, 2], "torch.nope"),
        tensor(F32_2X2, [2, 2], "torch.nn"),
        tensor(F32_2X2, [2, 2], "torch.qint8"),
        tensor(F32_2X2, [2, 2], 5),
        tensor(F32_2X2, [2, 2], None),
        b'{"type":"tensor","data":"AADAPw==","shape":[1]}',
        b'{"type":"tensor","data":"AADAPw==","dtype":"torch.float32"}',
        b'{"type":"tensor","shape":[1],"dtype":"torch.float32"}',
        b'{"type":"tensor","data":"AADAPw==","shape":[NaN],"dtype":"torch.float32"}',
        b'"hello"',
        b"5",
        b"NaN",
        b"null",
        b"",
        b"{bad",
        b"[1, 2]",
        b'{"a": 1}',
        b"[" * 50_000,
        b'[{"type":"tensor","data":"AADAPw==","shape":[1],"dtype":"torch.float32"}]',
        b'{"type": "torch_dtype", "value": "torch.float32"}',
        b'{"type": "enum", "class_path": "areal.experimental.openai.types.ApiType", "value": "completion"}',
        b'{"type": "pil_image", "data": "aGk=", "mode": "RGB"}',
        b'{"type": "ray_object_ref", "data": "aGk="}',
        b'{"type": "dataclass", "class_path": "subprocess.Popen", "data": {"args": ["true"]}}',
    ],
)
def test_all_else_is_refused(body: bytes) -> None:
    with pytest.raises(ShardRejected):
        decode(body)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("<i4", "<i4"), (">f4", ">f4"), ("f4", "<f4"), ("float64", "<f8"), ("|b1", "|b1"), ("<c8", "<c8")]
    + [("<U2", "<U2"), ("S3", "|S3"), ("<M8[ns]", "<M8[ns]"), ("=u2", "<u2")]
    + [("?", "|b1"), ("bool_", "|b1")],
)
def test_arrays(dtype: str, kept: str) -> None:
    raw = bytes(2 * np.dtype(dtype).itemsize)
    body = json.dumps(
        {"type": "ndarray", "data": base64.b64encode(raw).decode(), "shape": [2], "dtype": dtype}
    ).encode()
    got = json.loads(round_trip(body))
    assert got == json.loads(body) | {"dtype": kept}


@pytest.mark.parametrize(
    "dtype", ["O", "|O", "V8", "i4,i4", "(2,)f4", "{}", "", "S0", "U", "<f9", "x" * 99, "[('a','i4')]"]
)
def test_arrays_of_objects_or_nothing_are_refused(dtype: str) -> None:
    body = json.dumps({"type": "ndarray", "data": "AAAAAAAAAAA=", "shape": [1], "dtype": dtype}).encode()
    with pytest.raises(ShardRejected):
        decode(body)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["tensor", "ndarray", "dataclass", 1, None]),
            "data": st.none()
            | st.binary(max_size=12).map(lambda b: base64.b64encode(b).decode())
            | st.text(),
            "shape": st.lists(st.integers(-3, 9) | st.floats() | st.text(max_size=2), max_size=3) | st.none(),
            "dtype": st.sampled_from(["torch.float32", "torch.int8", "<f4", "|u1", "O"])
            | st.text(max_size=9),
        },
    )
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda v: st.lists(v, max_size=3))
)
def test_any_json_is_stored_faithfully_or_refused(value: Any) -> None:
    body = json.dumps(value).encode()
    try:
        kept = decode(body)
    except ShardRejected:
        return
    assert decode(encode(*kept)) == kept


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_in_words(body: bytes) -> None:
    with pytest.raises(ShardRejected, match=r"."):
        decode(body)


def test_zero_dimensional_array() -> None:
    body = b'{"type":"ndarray","data":"AAAAAAAAFEA=","shape":[],"dtype":"<f8"}'
    assert round_trip(body) == body


# -- large bodies -------------------------------------------------------------------------------------------

BIG = base64.b64encode(bytes(range(256)) * 64).decode()
B = BIG.encode()
ONE = b'"type":"tensor","shape":[1],"dtype":"float32"}'
ALL = b'"type":"tensor","shape":[4096],"dtype":"float32"}'


def test_the_data_of_a_large_body_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    describe = wire.describe

    def watched(body: bytes) -> wire.Described:
        seen.append(len(body))
        return describe(body)

    monkeypatch.setattr(wire, "describe", watched)
    body = tensor(BIG, [4096])
    for spelled in (body, body.replace(b": ", b":"), body.replace(b": ", b" :\n\t")):
        kept, data = stored(spelled)
        assert data == bytes(range(256)) * 64
        assert kept == Kept("float32", (4096,), "own", 16384)
    assert max(seen) < 200
    assert len(seen) == 3


@pytest.mark.parametrize(
    "body",
    [
        tensor(BIG, [4096])[:-1] + b',"data":"AAAA"}',
        b'{"data":"AAAA",' + tensor(BIG, [4096])[1:],
        b'{"data":"' + B + b'","d\\u0061ta":"AADAPw==",' + ONE,
        b'{"zz":{"data":"' + B + b'"},"data":"AADAPw==",' + ONE,
        b'{"zz":{"data":"' + B + b'"},' + ALL,
        b'{"x\\"data":"' + B + b'",' + ALL,
        b'{"zz":"x\\"data\\":","data":"' + B + b'",' + ALL,
        b'{"data":"' + B + b'","zz":"data",' + ALL,
        tensor("AADAPw==", [1], zz=BIG),
        tensor(BIG, [1], zz='"data":"AAAA"'),
        tensor(BIG, [4095]),
        tensor(BIG, [4096], "torch.nope"),
        tensor(BIG[:-4] + "!!!!", [-1]),
        tensor(BIG[:8000] + "\n" + BIG[8000:], [-1]),
        tensor(BIG[:8000] + "    " + BIG[8000:], [4096]),
        tensor(BIG[:8000] + "\0" + BIG[8000:], [-1]),
        tensor(BIG, [-1]).replace(b"/", b"\\/"),
        tensor(BIG, [-1])[:-40],
        tensor(BIG, [-1])[:9000],
        tensor(BIG, [-1]).replace(b"AAEC", b"A\xff\xfeC"),
        tensor(BIG, [-1]).replace(b"AAEC", b"A\x01EC"),
        b'{"data":"' + B[:8000] + b'","zz":"' + B[8000:] + b'",' + ALL,
        b'{"data":"' + B[:8000] + b'","zz":"' + B[8000:] + b'",' + ALL.replace(b"4096", b"-1"),
        b'{"data":"' + B[:8000] + b'","zz":["' + B[8000:] + b'"],"data":"AADAPw==",' + ONE,
        tensor(BIG, [-1]) + b" ",
        tensor(BIG, [-1]) + b"x",
        tensor(BIG, [-1])[1:],
    ],
)
def test_odd_large_bodies_are_what_the_parser_says(body: bytes) -> None:
    try:
        value = json.loads(body)
        raw = base64.b64decode("".join(value["data"].split()), validate=True)
        want = "torch.nope" not in value["dtype"] and value["shape"] in ([-1], [len(raw) // 4])
    except (ValueError, KeyError):
        want = False
    if not want:
        with pytest.raises(ShardRejected):
            decode(body)
        return
    assert decode(body)[1] == raw


def test_every_bfloat16_goes_out_and_comes_back_bit_for_bit() -> None:
    """Each NaN payload, too, in the vector loops and behind them."""
    for count in (1 << 16, (1 << 16) - 1, 7):
        data = np.arange(1 << 16, dtype="<u2")[-count:].tobytes()
        kept = bytearray(len(data))
        assert base64_decode_into(base64_encode(data, bf16=True), kept, bf16=True)
        assert bytes(kept) == data


@pytest.mark.parametrize("dtype", sorted(SMALL_FLOATS))
def test_small_floats_have_the_values_that_torch_gives_them(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch, dtype):
        pytest.skip(f"torch {torch.__version__} has no {dtype}")
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    want = every.to(torch.float32).numpy()
    assert (np.isnan(table(dtype)) == np.isnan(want)).all()
    plain = ~np.isnan(want)
    assert (table(dtype)[plain].view("<u4") == want[plain].view("<u4")).all()


@pytest.mark.parametrize("count", [0, 1, 5, 49_152, 49_153, 200_000])
def test_a_small_float_goes_out_as_float32(count: int) -> None:
    data = np.random.default_rng(1).integers(0, 256, count, np.uint8)
    part = Part("float8_e5m2", (count,), "own", count, memoryview(data.tobytes()))
    for step in (STEP_BYTES, 1 << 40):
        text = b"".join(part.pieces(step))
        assert len(text) == part.size
        assert base64.b64decode(json.loads(text)["data"]) == table("float8_e5m2")[data].tobytes()
