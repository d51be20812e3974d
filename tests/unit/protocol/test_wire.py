"""Tensors on the wire: every dtype, every lie about a shape, and nothing but tensors and arrays."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.errors import ShardRejected
from areal_fast.protocol import wire

F32_2X2 = "AADAPwAAAMAAAAAAAACAfw=="


def tensor(data: Any, shape: Any, dtype: Any = "torch.float32", **extra: Any) -> bytes:
    return json.dumps({"type": "tensor", "data": data, "shape": shape, "dtype": dtype} | extra).encode()


def round_trip(body: bytes) -> bytes:
    return wire.encode(*wire.decode(body))


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
    got = wire.decode(body)
    assert (got.dtype, got.shape, len(got.data)) == (name, (2, 3), 6 * size)
    assert json.loads(wire.encode(*got)) == json.loads(body)
    assert wire.decode(tensor("", [0, 4], f"torch.{name}")).shape == (0, 4)
    one = base64.b64encode(bytes(width)).decode()
    assert wire.decode(tensor(one, [], f"torch.{name}")).shape == ()


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
    got = np.frombuffer(wire.narrow_bfloat16(data), "<u2")
    bits = want.view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(np.frombuffer(data, "<f4"))
    assert (got[~nan] == bits[~nan]).all()
    assert np.isnan(np.frombuffer(wire.widen_bfloat16(got.tobytes()), "<f4")[nan]).all()


def test_dtype_names_without_prefix_and_aliases() -> None:
    assert wire.decode(tensor("AACAPwAAgD8=", [2], "float32")).dtype == "float32"
    assert wire.decode(tensor("AACAPwAAgD8=", [2], "torch.float")).dtype == "float32"
    assert wire.decode(tensor("AACAPwAAgD8=", [1], "torch.long")).dtype == "int64"


def test_shapes_are_read_as_laxly_as_the_original_does() -> None:
    assert wire.decode(tensor(F32_2X2, [-1])).shape == (4,)
    assert wire.decode(tensor(F32_2X2, [2, -1])).shape == (2, 2)
    assert wire.decode(tensor(F32_2X2, [2.0, "2"])).shape == (2, 2)
    assert wire.decode(tensor(F32_2X2, [2, 2], zz=1)).shape == (2, 2)
    assert wire.decode(tensor("AADA\nPwAAAMAAAAAAAACAfw==", [2, 2])).shape == (2, 2)
    assert wire.decode(tensor("AADA/wAAAMAAAAAAAACAfw==", [2, 2]).replace(b"/", b"\\/")).shape == (2, 2)


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
        wire.decode(body)


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
        wire.decode(body)


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
        kept = wire.decode(body)
    except ShardRejected:
        return
    assert wire.decode(wire.encode(*kept)) == kept


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_in_words(body: bytes) -> None:
    with pytest.raises(ShardRejected, match=r"."):
        wire.decode(body)


def test_zero_dimensional_array() -> None:
    body = b'{"type":"ndarray","data":"AAAAAAAAFEA=","shape":[],"dtype":"<f8"}'
    assert round_trip(body) == body
