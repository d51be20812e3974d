"""What a shard is, apart from its bytes: dtype, shape, form; and how many bytes that makes.

Every way in and out says these three things in its own words (JSON members, a safetensors header, a message
on the local socket, the arena's meta). They are checked here, so that all ways refuse a lying size alike.

Forms say what the bytes are (protocol/wire.py): "own", the dtype's own bytes; "bf16", bfloat16 in 2 bytes,
which JSON widens; "wide", an 8-bit float as float32 bytes; "ndarray", a numpy array of dtype "<f4"; "meta",
shape and dtype without bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast, get_args

from areal_fast.errors import ShardRejected
from areal_fast.protocol.wire import MAX_DIMS, TORCH_ITEMSIZE, Form, numpy_dtype

FORMS: tuple[str, ...] = get_args(Form)
MAX_SIZE = 1 << 62


class Description(NamedTuple):
    """dtype: "float32" (torch, without its prefix) or, of an array, "<f4". shape: sizes ≥ 0."""

    dtype: str
    shape: tuple[int, ...]
    form: Form

    @property
    def itemsize(self) -> int:
        """Bytes an element has here."""
        if self.form == "ndarray":
            return numpy_dtype(self.dtype).itemsize
        return 4 if self.form == "wide" else TORCH_ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements; 0 for "meta"."""
        if self.form == "meta":
            return 0
        count = self.itemsize
        for size in self.shape:
            count *= size
        return count


def own_form(dtype: str) -> Form:
    """The form in which a tensor's bytes as torch holds them are kept."""
    return "bf16" if dtype == "bfloat16" else "own"


def describe(dtype: object, shape: object, form: object = None) -> Description:
    """A description from what somebody sent. form None: the dtype's own bytes. ShardRejected if no tensor or
    array is like that."""
    if not isinstance(dtype, str):
        raise ShardRejected("'dtype' must be a string")
    if not isinstance(shape, Sequence) or isinstance(shape, (str, bytes)) or len(shape) > MAX_DIMS:
        raise ShardRejected(f"'shape' must be a list of at most {MAX_DIMS} integers")
    if any(type(size) is not int or not 0 <= size < MAX_SIZE for size in shape):
        raise ShardRejected("'shape' must be a list of integers ≥ 0")
    if form == "ndarray":
        found = Description(numpy_dtype(dtype).str, tuple(shape), "ndarray")
    else:
        name = dtype.removeprefix("torch.")
        if name not in TORCH_ITEMSIZE:
            raise ShardRejected(f"Unknown dtype {dtype[:80]!r}")
        form = own_form(name) if form is None else form
        if form not in FORMS or (form == "wide") > name.startswith("float8_"):
            raise ShardRejected("'form' is none that this dtype has")
        if form in ("own", "bf16") and form != own_form(name):
            raise ShardRejected("'form' is none that this dtype has")
        found = Description(name, tuple(shape), cast("Form", form))
    if found.nbytes >= MAX_SIZE:
        raise ShardRejected("'shape' has more elements than any tensor")
    return found
