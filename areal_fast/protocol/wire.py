"""Tensors on the wire: JSON with base64, byte for byte as the original writes it.

A tensor travels as `{"type":"tensor","data":base64,"shape":[…],"dtype":"torch.…"}`, an array as
`{"type":"ndarray",…,"dtype":"<f4"}`: little-endian, C order. `describe` takes exactly these two. No other
type tag, class path or pickle is looked at: what is not one of them is refused, and nothing of it is stored.

bfloat16 travels as float32 bytes under dtype torch.bfloat16; it is kept in 2 bytes an element, rounded to
nearest even as torch does, and widened when sent. The 8-bit floats are read in two forms, their own bytes or
float32 bytes; whichever came is kept, and JSON sends float32, which is what the original's reader expects.

Here are the words around the data: what they may say, and how many bytes they announce. The base64 itself is
decoded and encoded between the body and shared memory by shards/json_codec.py.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from areal_fast.errors import ShardRejected
from areal_fast.protocol.validation import Invalid, integer

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

TORCH_ITEMSIZE: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
    **dict.fromkeys(("bits1x8", "bits2x4", "bits4x2", "bits8"), 1),
    "bits16": 2,
}
"""Every torch dtype whose elements have a fixed size and need no more than their bytes (quantized ones
do)."""

_ALIASES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "chalf": "complex32",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "short": "int16",
    "int": "int32",
    "long": "int64",
}
_WIDE_TOO = frozenset(name for name in TORCH_ITEMSIZE if name.startswith("float8_"))

MAX_DIMS = 64
NOT_BASE64 = "'data' is not valid base64"
_NUMPY_DTYPE = re.compile(r"[<>=|]?[A-Za-z?][A-Za-z0-9_]{0,15}(?:\[[0-9A-Za-z]{1,16}\])?")

Form = Literal["own", "bf16", "wide", "ndarray", "meta"]


class Kept(NamedTuple):
    """A tensor or array as it is stored. dtype: "float32" for a tensor, "<f4" for an array. nbytes: of the
    data to keep."""

    dtype: str
    shape: tuple[int, ...]
    form: Form
    nbytes: int


class Described(NamedTuple):
    """What a body says of its tensor, checked; its data are still JSON, in `data`.

    widths: bytes an element may have in the data, in the order to try them. forms: of each width. meta: there
    are no data to come."""

    dtype: str
    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    forms: tuple[Form, ...]
    data: bytes | msgspec.Raw

    @property
    def meta(self) -> bool:
        return not self.widths

    def fit(self, nbytes: int) -> Kept:
        """How it is kept if its base64 stands for this many bytes. ShardRejected: the shape says another."""
        if self.meta:
            return Kept(self.dtype, self.sizes, "meta", 0)
        shape, width = _fit(self.sizes, nbytes, self.widths)
        form = self.forms[self.widths.index(width)]
        return Kept(self.dtype, shape, form, nbytes // 2 if form == "bf16" else nbytes)


class _Body(msgspec.Struct):
    type: Any = None
    data: msgspec.Raw = msgspec.Raw(b"")
    shape: Any = None
    dtype: Any = None


_decoder = msgspec.json.Decoder(_Body)
_str_decoder = msgspec.json.Decoder(str)


def describe(body: Buffer) -> Described:
    """All but the data of one tensor or array from its JSON. ShardRejected says what is wrong with it."""
    try:
        m = _decoder.decode(body)
    except msgspec.ValidationError:
        raise ShardRejected("Expected a JSON object of a tensor or an array") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ShardRejected(f"Invalid JSON: {exc}") from None
    if m.type not in ("tensor", "ndarray"):
        raise ShardRejected("Only tensors and arrays are stored: 'type' must be 'tensor' or 'ndarray'")
    if not isinstance(m.dtype, str):
        raise ShardRejected("'dtype' must be a string")
    sizes = _shape(m.shape)
    if m.type == "ndarray":
        dtype = numpy_dtype(m.dtype)
        return Described(dtype.str, sizes, (dtype.itemsize,), ("ndarray",), m.data)
    name = m.dtype.replace("torch.", "")
    name = _ALIASES.get(name, name)
    size = TORCH_ITEMSIZE.get(name)
    if size is None:
        raise ShardRejected(f"Unknown dtype {m.dtype[:80]!r}")
    if bytes(memoryview(m.data)[:5]) == b"null":
        if any(s < 0 for s in sizes):
            raise ShardRejected("a shape without data must not have negative sizes")
        return Described(name, sizes, (), (), m.data)
    if name == "bfloat16":
        return Described(name, sizes, (4,), ("bf16",), m.data)
    if name in _WIDE_TOO:
        return Described(name, sizes, (1, 4), ("own", "wide"), m.data)
    return Described(name, sizes, (size,), ("own",), m.data)


def plain_text(data: bytes | msgspec.Raw) -> memoryview:
    """What stands between the quotes of a JSON string, escapes as they are. ShardRejected if it is none."""
    view = memoryview(data)
    if len(view) < 2 or view[0] != 0x22:
        raise ShardRejected("'data' must be a base64 string")
    return view[1:-1]


def loose_text(data: bytes | msgspec.Raw) -> bytes:
    """The base64 in a JSON string that has escapes or white space, without them. ShardRejected."""
    try:
        return "".join(_str_decoder.decode(data).split()).encode("ascii")
    except (ValueError, msgspec.DecodeError):
        raise ShardRejected(NOT_BASE64) from None


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise ShardRejected(f"'shape' must be a list of at most {MAX_DIMS} integers")
    try:
        sizes = tuple(integer(v, ()) for v in value)
    except Invalid:
        raise ShardRejected("'shape' must be a list of integers") from None
    if any(not -1 <= s < 1 << 62 for s in sizes) or sizes.count(-1) > 1:
        raise ShardRejected("'shape' has a size that no tensor has")
    return sizes


def _fit(sizes: tuple[int, ...], nbytes: int, widths: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The shape with its -1 filled in, and the element width, of `widths`, that accounts for all bytes."""
    known = 1
    for s in sizes:
        if s != -1:
            known *= s
    for width in widths:
        count, rest = divmod(nbytes, width)
        if rest:
            continue
        if -1 in sizes:
            if known and count % known == 0:
                return tuple(count // known if s == -1 else s for s in sizes), width
        elif known == count:
            return sizes, width
    raise ShardRejected(f"shape {list(sizes)[:8]} does not fit {nbytes} bytes of data")


def numpy_dtype(text: str) -> np.dtype[Any]:
    if not _NUMPY_DTYPE.fullmatch(text):
        raise ShardRejected(f"Unknown array dtype {text[:80]!r}")
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, SyntaxError):
        raise ShardRejected(f"Unknown array dtype {text[:80]!r}") from None
    if dtype.kind not in "biufcSUmM" or dtype.itemsize == 0:
        raise ShardRejected(f"Arrays of dtype {text[:80]!r} are not stored")
    return dtype


@lru_cache(maxsize=256)
def frame(dtype: str, shape: tuple[int, ...], form: Form) -> tuple[bytes, bytes]:
    """What stands before and behind the base64 in the JSON of a kept shard; of a meta tensor, which has none,
    the two together are all of it."""
    sizes = b",".join(b"%d" % s for s in shape)
    if form == "ndarray":
        return b'{"type":"ndarray","data":"', b'","shape":[%b],"dtype":"%b"}' % (sizes, dtype.encode())
    if form == "meta":
        return b'{"type":"tensor","data":null', b',"shape":[%b],"dtype":"torch.%b"}' % (sizes, dtype.encode())
    return b'{"type":"tensor","data":"', b'","shape":[%b],"dtype":"torch.%b"}' % (sizes, dtype.encode())


def rtensor_json(shard_id: str, node_addr_json: str, shape: str, dtype: str) -> str:
    """Reference to a shard: an RTensor whose tensor is a meta tensor of this shape ("[1,24]") and dtype."""
    return (
        '{"type":"dataclass","class_path":"areal.infra.rpc.rtensor.RTensor","data":{"shard":'
        '{"type":"dataclass","class_path":"areal.infra.rpc.rtensor.TensorShardInfo","data":{"shard_id":"'
        f'{shard_id}","node_addr":{node_addr_json}}}}},"data":{{"type":"tensor","data":null,"shape":{shape},'
        f'"dtype":"torch.{dtype}"}}}}}}'
    )


IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
