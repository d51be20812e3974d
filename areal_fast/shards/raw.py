"""Shards as raw bytes: the safetensors layout, read strictly and written so that every reader can open it.

A file is 8 bytes (little-endian length N), N bytes of JSON, and the tensors' bytes. The JSON maps a name to
`{"dtype", "shape", "data_offsets": [start, end)}`, offsets counting from the end of the JSON; `__metadata__`
maps strings to strings. Source: https://huggingface.co/docs/safetensors (format).

Read strictly: the header is small and one JSON object without a key twice; ranges are in range, of the size
that dtype and shape make, and tile the data without gap or overlap. So no byte is in two tensors or in none,
and nothing is allocated for what a header claims but does not bring.

What safetensors has no name for travels as flat U8 (or, an 8-bit float in float32 bytes, as F32) with its
true nature under the metadata key "areal_fast": JSON `{name: {"dtype", "shape", "form"}}`. Who does not know
that key still opens the file and finds the bytes. Written files hold tensors by falling element size, so that
each is aligned to its own; the header is padded with spaces to 8 bytes.

Pure: no I/O, no torch. The names of dtypes are description.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from areal_fast.errors import ShardRejected
from areal_fast.shards.description import Description, describe

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

MEDIA_TYPE: Final = "application/vnd.safetensors"
MAX_HEADER_BYTES: Final = 16 << 20
LENGTH_BYTES: Final = 8
METADATA: Final = "__metadata__"
OURS: Final = "areal_fast"

NAMES: Final[dict[str, str]] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""torch dtype -> safetensors dtype, of those that every version of safetensors reads."""

_DTYPES: Final = {name: dtype for dtype, name in NAMES.items()} | {
    "F8_E8M0": "float8_e8m0fnu",  # newer versions write these
    "C64": "complex64",
}


class Entry(NamedTuple):
    """One tensor of a file. Its bytes are data[start:stop], counted from the end of the header."""

    name: str
    what: Description
    start: int
    stop: int


class Layout(NamedTuple):
    """A file to be written: its header, and the order in which the tensors' bytes follow it."""

    header: bytes
    order: list[int]
    data_bytes: int

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


# -- writing -------------------------------------------------------------------------------------------
def lay_out(tensors: Sequence[tuple[str, Description]]) -> Layout:
    """The file of these tensors (name, description). Send `header`, then the bytes of tensors[i] for i in
    `order`. ShardRejected if a name stands there twice or cannot be one in such a file."""
    order = sorted(range(len(tensors)), key=lambda i: -_alignment(tensors[i][1]))
    entries: dict[str, Any] = {}
    hidden: dict[str, Any] = {}
    at = 0
    for i in order:
        name, what = tensors[i]
        if name in entries or not _may_be_named(name):
            raise ShardRejected(f"{name[:80]!r} cannot be a name in a safetensors file")
        dtype, shape, plain = _as_written(what)
        if not plain:
            hidden[name] = {"dtype": what.dtype, "shape": what.shape, "form": what.form}
        end = at + what.nbytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, end)}
        at = end
    if hidden:
        entries = {METADATA: {OURS: _json(hidden)}, **entries}
    text = _json(entries).encode()
    text += b" " * (-len(text) % 8)
    return Layout(len(text).to_bytes(LENGTH_BYTES, "little") + text, order, at)


def _may_be_named(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name != METADATA


def _as_written(what: Description) -> tuple[str, Sequence[int], bool]:
    """(dtype, shape, whether these two say all) in the file."""
    if what.form == "wide":
        return "F32", what.shape, False
    if what.form in ("own", "bf16") and what.dtype in NAMES:
        return NAMES[what.dtype], what.shape, True
    return "U8", (what.nbytes,), False


def _alignment(what: Description) -> int:
    size = what.itemsize
    return size if size in (2, 4, 8, 16) and what.form != "meta" else 1


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


# -- reading -------------------------------------------------------------------------------------------
def header_bytes(start: Buffer, file_bytes: int, limit: int = MAX_HEADER_BYTES) -> int:
    """Where the data begin, from a file's first 8 bytes and its length. ShardRejected."""
    view = memoryview(start)
    if len(view) < LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise ShardRejected("Not a safetensors file: shorter than its length field")
    size = int.from_bytes(view[:LENGTH_BYTES], "little")
    if size > limit:
        raise ShardRejected(f"The header of a safetensors file may have {limit} bytes, not {size}")
    if size > file_bytes - LENGTH_BYTES:
        raise ShardRejected("Not a safetensors file: its header is longer than the file")
    return LENGTH_BYTES + size


def read_header(header: Buffer, data_bytes: int) -> list[Entry]:
    """The tensors of a file, by their place in it, from its header (without the length field) and the number
    of bytes behind it. ShardRejected."""
    try:
        fields = json.loads(bytes(header).decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as exc:
        raise ShardRejected(f"Not a safetensors header: {str(exc)[:200]}") from None
    if not isinstance(fields, dict):
        raise ShardRejected("Not a safetensors header: not an object")
    hidden = _hidden(fields.pop(METADATA, None))
    entries = [_entry(name, value, hidden.pop(name, None)) for name, value in fields.items()]
    if hidden:
        raise ShardRejected("The metadata describe a tensor that is not there")
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    at = 0
    for entry in entries:
        if entry.start != at:
            raise ShardRejected("Tensors must follow each other without gap or overlap")
        at = entry.stop
    if at != data_bytes:
        raise ShardRejected(f"The tensors have {at} bytes, the file has {data_bytes}")
    return entries


def parse(file: Buffer, limit: int = MAX_HEADER_BYTES) -> tuple[list[Entry], memoryview]:
    """A whole file in memory -> (its tensors, its data). No byte is copied. ShardRejected."""
    view = memoryview(file).cast("B")
    at = header_bytes(view, len(view), limit)
    return read_header(view[LENGTH_BYTES:at], len(view) - at), view[at:]


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands there twice")
    return fields


def _hidden(metadata: Any) -> dict[str, Any]:
    """What the metadata say of tensors whose dtype safetensors has no name for."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ShardRejected("'__metadata__' must map strings to strings")
    if OURS not in metadata:
        return {}
    try:
        found = json.loads(metadata[OURS], object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise ShardRejected(f"'__metadata__': {OURS!r} is no object of objects")
    return found


def _entry(name: str, value: Any, hidden: dict[str, Any] | None) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ShardRejected("A tensor has 'dtype', 'shape' and 'data_offsets', and nothing else")
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise ShardRejected("'data_offsets' must be two integers")
    if not isinstance(value["dtype"], str) or value["dtype"] not in _DTYPES:
        raise ShardRejected(f"Unknown safetensors dtype {str(value['dtype'])[:80]!r}")
    start, stop = offsets
    what = describe(_DTYPES[value["dtype"]], value["shape"])
    if not 0 <= start <= stop or stop - start != what.nbytes:
        raise ShardRejected("'data_offsets' do not fit dtype and shape")
    if hidden is not None:
        written, shape = value["dtype"], tuple(value["shape"])
        what = describe(hidden.get("dtype"), hidden.get("shape"), hidden.get("form"))
        if what.nbytes != stop - start or (written, shape) != (
            _as_written(what)[0],
            tuple(_as_written(what)[1]),
        ):
            raise ShardRejected("The metadata do not fit the tensor that they describe")
    return Entry(name, what, start, stop)
