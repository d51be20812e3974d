"""Exports and shards as they come: both forms, every dtype, and nothing that names code."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from areal_fast.client import BadReply, Reference  # noqa: E402
from areal_fast.client.references import reference, trajectory  # noqa: E402
from areal_fast.client.shards import decode_json, decode_json_list  # noqa: E402
from areal_fast.client.tensors import bytes_of, tensor_over  # noqa: E402
from areal_fast.protocol import wire  # noqa: E402
from areal_fast.shards.outgoing import Part  # noqa: E402
from areal_fast.shards.small_floats import SMALL_FLOATS, table  # noqa: E402

SHAPES = [(2, 3), (), (0, 4), (1,)]


def json_of(dtype: str, shape: tuple[int, ...], data: bytes, form: wire.Form) -> bytes:
    return b"".join(Part(dtype, shape, form, len(data), data).pieces(1 << 20))


def rtensor(shard_id: str = "s", dtype: str = "torch.int64", shape: Any = (1, 3)) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        wire.rtensor_json(shard_id, '"h:1"', json.dumps(shape), dtype.removeprefix("torch."))
    )
    return found


@pytest.mark.parametrize("dtype", sorted(wire.TORCH_ITEMSIZE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_comes_bit_by_bit(dtype: str, shape: tuple[int, ...], seed: int) -> None:
    if not hasattr(torch, dtype):
        pytest.skip(f"torch {torch.__version__} has no {dtype}")
    size = wire.TORCH_ITEMSIZE[dtype] * int(np.prod(shape))
    data = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, size, np.uint8)
    if dtype in SMALL_FLOATS:
        data[np.isnan(table(dtype))[data]] = 0  # JSON keeps that it is a NaN, not which
    tensor = tensor_over(data.tobytes(), dtype, shape)
    assert str(tensor.dtype) == f"torch.{dtype}" and tuple(tensor.shape) == shape
    assert bytes_of(tensor)[:2] == (dtype, shape) and bytes(bytes_of(tensor)[2]) == data.tobytes()
    form = "bf16" if dtype == "bfloat16" else "own"
    shard = decode_json("s", "", json_of(dtype, shape, data.tobytes(), form))  # type: ignore[arg-type]
    assert shard.way == "json" and bytes(bytes_of(shard.tensor)[2]) == data.tobytes()


@pytest.mark.parametrize(
    "dtype", [name for name in sorted(wire.TORCH_ITEMSIZE) if name.startswith("float8_")]
)
def test_small_floats_may_come_as_float32(dtype: str) -> None:
    small = torch.tensor([0.5, 2.0, 16.0]).to(getattr(torch, dtype))
    body = json_of(dtype, (3,), small.to(torch.float32).numpy().tobytes(), "wide")
    shard = decode_json("s", "", body)
    assert torch.equal(shard.tensor.view(torch.uint8), small.view(torch.uint8))
    with pytest.raises(TypeError, match="tensor"):
        _ = shard.array


def test_tensors_are_over_what_came_and_may_be_written() -> None:
    data = bytearray(np.arange(4, dtype="<f4").tobytes())
    tensor = tensor_over(data, "float32", (4,))
    tensor[0] = 9
    assert np.frombuffer(data, "<f4")[0] == 9
    frozen = bytes(data)
    copied = tensor_over(frozen, "float32", (4,))
    copied[0] = 1
    assert np.frombuffer(frozen, "<f4")[0] == 9, "bytes are nobody's to write"
    askew = memoryview(bytearray(17))[1:]
    assert tensor_over(askew, "float64", (2,)).data_ptr() % 8 == 0


def test_a_mapping_lives_as_long_as_its_tensors(tmp_path: Path) -> None:
    class Mapping(mmap.mmap):
        """One that can be watched."""

    path = tmp_path / "shard"
    path.write_bytes(np.arange(4096, dtype="<i8").tobytes())
    fd = os.open(path, os.O_RDONLY)
    mapping = Mapping(fd, 4096 * 8, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
    watched = weakref.ref(mapping)
    part = tensor_over(mapping, "int64", (64, 64))[3]
    del mapping
    path.unlink()
    assert watched() is not None and part.tolist() == list(range(192, 256))
    part.fill_(-1)
    assert part.sum() == -64
    del part
    assert watched() is None


@pytest.mark.parametrize(
    ("dtype", "shape", "data"), [("float32", (2,), b"1234"), ("int8", (), b""), ("int8", (3,), b"1234")]
)
def test_a_size_that_lies_is_refused(dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    with pytest.raises(ValueError, match="bytes are no"):
        tensor_over(data, dtype, shape)


def test_what_cannot_be_a_shard_is_refused() -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(TypeError, match="dense"):
            bytes_of(tensor)
    with pytest.raises(TypeError, match="no dtype"):
        tensor_over(b"", "load", (0,))


@pytest.mark.parametrize(
    "body",
    [
        b'{"type":"dataclass","class_path":"os.system","data":{}}',
        b'{"type":"pickle","data":"gASVAAAAAAAAAAAu"}',
        b'{"type":"tensor","data":"AAAA","shape":[1],"dtype":"torch.load"}',
        b'{"type":"tensor","data":"AAAA","shape":[1],"dtype":"torch.float32"}',
        b"[]",
        b"",
        b"\xff\xfe",
    ],
)
def test_only_tensors_and_arrays_are_read(body: bytes) -> None:
    with pytest.raises(BadReply):
        decode_json("s", "h:1", body)
    with pytest.raises(BadReply):
        decode_json_list(["s"], "h:1", b"[" + body + b"]")


def test_a_batch_of_another_length_is_refused() -> None:
    one = json_of("int8", (1,), b"a", "own")
    with pytest.raises(BadReply, match="1 shards came for 2"):
        decode_json_list(["a", "b"], "", b"[" + one + b"]")
    with pytest.raises(BadReply):
        decode_json_list(["a"], "", b"{}")


def test_arrays_come_as_arrays() -> None:
    value = np.arange(6, dtype="<u2").reshape(2, 3)
    shard = decode_json("s", "", json_of("<u2", (2, 3), value.tobytes(), "ndarray"))
    assert np.array_equal(shard.array, value) and shard.array.flags.writeable
    assert "json" in repr(shard)


def test_the_batch_form() -> None:
    found = trajectory(
        {"traj": {"input_ids": rtensor("a"), "rewards": rtensor("b", "torch.float32", [1])}}, ["s"]
    )
    assert found and found.all_references() == [
        Reference("a", "h:1", "int64", (1, 3)),
        Reference("b", "h:1", "float32", (1,)),
    ]
    assert [one.size_bytes for one in found.all_references()] == [24, 4]
    texts = trajectory({"traj": {"interactions": [{"request": [1], "response": "r", "reward": 0.5}]}}, ["s"])
    assert texts and not texts.all_references()
    assert (texts.interactions["0"].messages, texts.interactions["0"].output) == ([1], "r")
    assert not trajectory({"traj": {}}, ["s"])


def test_the_interactions_form() -> None:
    entries = {
        "one": {"tensor_dict": {"input_ids": rtensor("a")}, "reward": 1.0, "interaction_id": "one"},
        "two": {"messages": [2], "output_message_list": [3], "reward": None, "interaction_id": "two"},
    }
    found = trajectory({"interactions": entries}, ["s"])
    assert list(found.interactions) == ["one", "two"] and len(found.all_references()) == 1
    found.fill({found.all_references()[0]: torch.ones(1, 3)})
    assert found.interactions["one"].tensors["input_ids"].sum() == 3
    assert found.interactions["two"].output == [3] and not found.interactions["two"].tensors


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"traj": {"x": {"type": "dataclass", "class_path": "os.system", "data": {}}}},
        {"traj": {"x": 1}},
        {"interactions": {"a": {"reward": 1}}},
        {"interactions": []},
    ],
)
def test_what_is_no_export_is_refused(reply: Any) -> None:
    with pytest.raises(BadReply):
        trajectory(reply, ["s"])


def test_a_reference_is_checked() -> None:
    for change in ({"shard_id": 1}, {"node_addr": None}):
        wrong = rtensor()
        wrong["data"]["shard"]["data"] |= change
        with pytest.raises(BadReply):
            reference(wrong)
