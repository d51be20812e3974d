"""The safetensors layout: written so that the safetensors library reads it, read so that no lie gets in."""

from __future__ import annotations

import json
import random
import struct

import pytest

from areal_fast.errors import ShardRejected
from areal_fast.protocol.wire import TORCH_ITEMSIZE
from areal_fast.shards import raw
from areal_fast.shards.description import Description, describe, own_form

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (3,), (2, 0, 5), (2, 3))


def written(tensors: list[tuple[str, Description, bytes]]) -> bytes:
    layout = raw.lay_out([(name, what) for name, what, _ in tensors])
    return layout.header + b"".join(tensors[i][2] for i in layout.order)


def every_kind() -> list[tuple[str, Description, bytes]]:
    rng = random.Random(1)
    kinds = [describe(dtype, shape) for dtype in TORCH_ITEMSIZE for shape in SHAPES]
    kinds += [describe("float8_e5m2", shape, "wide") for shape in SHAPES]
    kinds += [describe(dtype, shape, "ndarray") for dtype in ("<f4", "<U5", "|S3", "|b1") for shape in SHAPES]
    kinds += [describe("float32", shape, "meta") for shape in SHAPES]
    return [(f"t{i}", what, rng.randbytes(what.nbytes)) for i, what in enumerate(kinds)]


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_every_kind_comes_back_as_it_went() -> None:
    tensors = every_kind()
    entries, data = raw.parse(written(tensors))
    found = {entry.name: (entry.what, bytes(data[entry.start : entry.stop])) for entry in entries}
    assert found == {name: (what, content) for name, what, content in tensors}


def test_each_tensor_is_aligned_to_its_elements() -> None:
    file = written(every_kind())
    entries, data = raw.parse(file)
    assert (len(file) - len(data)) % 8 == 0
    for entry in entries:
        if entry.what.itemsize in (2, 4, 8) and entry.what.form != "meta":
            assert entry.start % entry.what.itemsize == 0, entry


def test_the_safetensors_library_opens_every_file() -> None:
    safetensors = pytest.importorskip("safetensors")
    tensors = every_kind()
    content = {name: data for name, _, data in tensors}
    found = safetensors.deserialize(written(tensors))
    assert {name: bytes(entry["data"]) for name, entry in found} == content
    shapes = {name: tuple(entry["shape"]) for name, entry in found}
    for name, what, _ in tensors:
        if what.form == own_form(what.dtype) and what.dtype in raw.NAMES:
            assert shapes[name] == what.shape


def test_a_file_of_the_safetensors_library_is_read() -> None:
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.ones(2, dtype=torch.float8_e8m0fnu),
        "d": torch.ones(2, dtype=torch.complex64),
        "e": torch.tensor(True),
    }
    entries, data = raw.parse(save(tensors, {"format": "pt"}))
    assert {entry.name for entry in entries} == set(tensors)
    for name, what, start, stop in entries:
        tensor = tensors[name]
        assert what == describe(str(tensor.dtype), tuple(tensor.shape))
        assert bytes(data[start:stop]) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
OURS = "areal_fast"
LIES: dict[str, bytes] = {
    "empty": b"",
    "shorter than its length field": b"\x00" * 7,
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "negative header": struct.pack("<q", -1) + b"{}",
    "no JSON": file_of(b"{"),
    "no object": file_of(b"[]"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "nested too deep": file_of(b"[" * 100_000),
    "huge integer": file_of(b'{"a":{"dtype":"U8","shape":[' + b"9" * 9000 + b'],"data_offsets":[0,0]}}'),
    "trailing data": file_of({"a": F4}, b"12345"),
    "missing data": file_of({"a": F4}, b"123"),
    "data without tensors": file_of({}, b"1"),
    "gap": file_of({"a": F4, "b": {**F4, "data_offsets": [5, 9]}}, b"x" * 9),
    "gap in front": file_of({"a": {**F4, "data_offsets": [4, 8]}}, b"x" * 8),
    "overlap": file_of({"a": F4, "b": {**F4, "data_offsets": [2, 6]}}, b"x" * 6),
    "the same bytes twice": file_of({"a": F4, "b": F4}, b"x" * 4),
    "out of range": file_of({"a": {**F4, "data_offsets": [0, 1 << 40]}}, b"x" * 4),
    "backwards": file_of({"a": {**F4, "data_offsets": [4, 0]}}, b"x" * 4),
    "negative offset": file_of({"a": {**F4, "data_offsets": [-4, 0]}}, b"x" * 4),
    "three offsets": file_of({"a": {**F4, "data_offsets": [0, 4, 8]}}, b"x" * 4),
    "offset of no integer": file_of({"a": {**F4, "data_offsets": [False, 4]}}, b"x" * 4),
    "shape does not fit": file_of({"a": {**F4, "shape": [2]}}, b"x" * 4),
    "negative size": file_of({"a": {**F4, "shape": [-1, -1]}}, b"x" * 4),
    "size of no integer": file_of({"a": {**F4, "shape": [True]}}, b"x" * 4),
    "size that overflows": file_of({"a": {**F4, "shape": [1 << 40, 1 << 40], "data_offsets": [0, 0]}}),
    "too many dimensions": file_of({"a": {**F4, "shape": [1] * 65}}, b"x" * 4),
    "shape of no list": file_of({"a": {**F4, "shape": "1"}}, b"x" * 4),
    "unknown dtype": file_of({"a": {**F4, "dtype": "F31"}}, b"x" * 4),
    "dtype of no text": file_of({"a": {**F4, "dtype": ["F32"]}}, b"x" * 4),
    "unknown member": file_of({"a": {**F4, "x": 1}}, b"x" * 4),
    "a name twice": file_of(
        b'{"a":%b,"a":%b}' % ((json.dumps({**F4, "shape": [0], "data_offsets": [0, 0]}).encode(),) * 2)
    ),
    "tensor of no object": file_of({"a": 1}),
    "metadata of no strings": file_of({"__metadata__": {"a": 1}}),
    "metadata of no object": file_of({"__metadata__": [], "a": F4}, b"x" * 4),
    "ours is no JSON": file_of({"__metadata__": {OURS: "{"}, "a": F4}, b"x" * 4),
    "ours describes nothing": file_of({"__metadata__": {OURS: '{"b":{}}'}, "a": F4}, b"x" * 4),
    "ours does not fit": file_of(
        {
            "__metadata__": {OURS: '{"a":{"dtype":"complex64","shape":[1],"form":"own"}}'},
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        },
        b"x" * 4,
    ),
    "ours says another dtype": file_of(
        {"__metadata__": {OURS: '{"a":{"dtype":"int32","shape":[1],"form":"own"}}'}, "a": F4}, b"x" * 4
    ),
    "ours has a form of its own": file_of(
        {
            "__metadata__": {OURS: '{"a":{"dtype":"float32","shape":[1],"form":"class"}}'},
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        },
        b"x" * 4,
    ),
    "an array of objects": file_of(
        {
            "__metadata__": {OURS: '{"a":{"dtype":"|O","shape":[1],"form":"ndarray"}}'},
            "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        },
        b"x" * 8,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(lie: str) -> None:
    with pytest.raises(ShardRejected):
        raw.parse(LIES[lie])


def test_a_header_over_the_limit_is_refused_by_its_length_alone() -> None:
    with pytest.raises(ShardRejected, match="1000 bytes, not 1001"):
        raw.header_bytes(struct.pack("<Q", 1001), 1 << 40, 1000)
    assert raw.header_bytes(struct.pack("<Q", 1000), 1 << 40, 1000) == 1008


@pytest.mark.parametrize("name", ["__metadata__", "\ud800", "t"])
def test_what_cannot_be_a_name_is_not_written(name: str) -> None:
    what = describe("uint8", (1,))
    with pytest.raises(ShardRejected):
        raw.lay_out([("t", what), (name, what)])


def test_damaged_files_are_refused_or_read_whole() -> None:
    """Any byte may be wrong: the reader says no, or what it gives tiles the data."""
    rng = random.Random(7)
    good = written([t for t in every_kind() if t[1].shape == (2, 3)])
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad) if rng.random() < 0.2 else 600)] = rng.randrange(256)
        try:
            entries, data = raw.parse(bytes(bad))
        except ShardRejected:
            continue
        assert sum(entry.stop - entry.start for entry in entries) == len(data)
