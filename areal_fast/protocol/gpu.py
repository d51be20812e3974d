"""What the keeper and its clients say to each other: fixed binary structs, never pickle, never class names.

One packet of a SEQPACKET socket is one message. A client sends a Request and gets exactly one answer with its
tag: a PoolInfo to HELLO, a Region to everything else. Descriptors travel beside them (SCM_RIGHTS): the pool's
with PoolInfo, a memfd of the bytes with the answer to READ, one from the client with WRITE.

  HELLO    generation: client's number    the pool: where, how large, how it is imported
  RESERVE  nbytes                         room, the caller's alone: offset, generation
  COMMIT   generation, id, dtype, shape   what was copied there is the shard `id` now
  ABORT    generation                     never mind
  LEASE    id                             where the shard is; not reused before RELEASE
  RELEASE  lease, generation              OK: it was valid until now. STALE: what was read may be anything
  READ     id                             its bytes, copied to the host
  WRITE    id, dtype, shape, nbytes       a shard out of host memory, for who cannot map the pool
  CLEAR    id                             remove it
  BYE      -                              release what this client holds (no answer)
  KEEP     generation, lease              after a new connection: this is still in use
  SETTLE   -                              after the KEEPs: everything else of this client is not

A client chooses a random number and says it in HELLO. What it holds is (process, number)'s: a new
connection with the same number goes on where a broken one ended.

Numbers are little-endian and unsigned. `version` is that of this page; a peer with another one is refused.
Pure: no I/O, no clock.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

from areal_fast.protocol.wire import TORCH_ITEMSIZE

MAGIC: Final = 0x4B474641  # "AFGK"
VERSION: Final = 1
MAX_DIMS: Final = 16
MAX_ID_BYTES: Final = 1024
MAX_TEXT_BYTES: Final = 512
UUID_BYTES: Final = 16
HANDLE_BYTES: Final = 64

HELLO: Final = 1
RESERVE: Final = 2
COMMIT: Final = 3
ABORT: Final = 4
LEASE: Final = 5
RELEASE: Final = 6
READ: Final = 7
WRITE: Final = 8
CLEAR: Final = 9
BYE: Final = 10
KEEP: Final = 11
SETTLE: Final = 12
ANSWER: Final = 0x8000
"""Set in the `kind` of an answer."""

OK: Final = 0
FULL: Final = 1
"""No room in the pool or the arena (what HTTP would call 507)."""
NOT_FOUND: Final = 2
STALE: Final = 3
BAD: Final = 4
"""The request makes no sense; the text says why."""
DRIVER: Final = 5
"""The driver refused; the text names the call."""
BUSY: Final = 6
"""Nothing changed; ask again a moment later."""

DTYPES: Final = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool", "complex32", "complex64", "complex128",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "int1", "int2", "int3", "int4", "int5", "int6", "int7",
    "uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7",
    "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16",
)  # fmt: skip
"""All of TORCH_ITEMSIZE. A dtype's code is its place here plus one: never reorder, only append. 0 is none."""

_CODES = {name: code for code, name in enumerate(DTYPES, 1)}
_REQUEST = struct.Struct(f"<IHHQ QQQ HHHH {MAX_DIMS}Q")
_REGION = struct.Struct(f"<IHHQ IHH 16s16s QQQQ HHI {MAX_DIMS}Q")
_POOL = struct.Struct("<IHHQ IHH 16s16s Q 64s")
_TAG = struct.Struct("<Q")
_TAG_AT: Final = struct.calcsize("<IHH")
MAX_PACKET_BYTES: Final = max(_REQUEST.size + MAX_ID_BYTES, _REGION.size + MAX_TEXT_BYTES)


class Malformed(ValueError):
    """Not a message of this version. str() says what is wrong with it."""


class Request(NamedTuple):
    kind: int
    tag: int
    generation: int = 0
    lease: int = 0
    nbytes: int = 0
    dtype: str = ""
    shape: tuple[int, ...] = ()
    shard_id: bytes = b""


class Region(NamedTuple):
    """Where a shard's bytes lie, in which pool, under which generation and lease; or why not (status, text).

    A generation names one use of one piece of a pool and is never given twice."""

    kind: int
    tag: int
    status: int = OK
    text: str = ""
    gpu: bytes = bytes(16)
    pool: bytes = bytes(16)
    offset: int = 0
    nbytes: int = 0
    generation: int = 0
    lease: int = 0
    dtype: str = ""
    shape: tuple[int, ...] = ()


class PoolInfo(NamedTuple):
    """`way`: 1, import the descriptor that came along; 2, open the handle. gpu: the device's UUID. pool:
    this pool's own random id, another one if it had to be made anew."""

    tag: int
    status: int
    text: str
    way: int
    gpu: bytes
    pool: bytes
    nbytes: int
    handle: bytes = bytes(HANDLE_BYTES)


def dtype_code(name: str) -> int:
    """Malformed for a dtype that no GPU shard has."""
    code = _CODES.get(name)
    if code is None:
        raise Malformed(f"no GPU shard has the dtype {name[:40]!r}")
    return code


def dtype_name(code: int) -> str:
    if not 0 <= code <= len(DTYPES):
        raise Malformed(f"unknown dtype code {code}")
    return DTYPES[code - 1] if code else ""


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a contiguous tensor. Malformed if there can be none."""
    dtype_code(dtype)
    if len(shape) > MAX_DIMS:
        raise Malformed(f"{len(shape)} dimensions; at most {MAX_DIMS}")
    size = TORCH_ITEMSIZE[dtype]
    for n in shape:
        if not 0 <= n < 1 << 48:
            raise Malformed(f"a dimension of {n}")
        size *= n
    return size


def pack_request(r: Request) -> bytes:
    if len(r.shard_id) > MAX_ID_BYTES:
        raise Malformed("a shard id is at most 1024 bytes")
    dims = _dims(r.shape)
    code = dtype_code(r.dtype) if r.dtype else 0
    fixed = (r.generation, r.lease, r.nbytes, code, len(r.shape), len(r.shard_id), 0)
    return _REQUEST.pack(MAGIC, VERSION, r.kind, r.tag, *fixed, *dims) + r.shard_id


def unpack_request(packet: bytes) -> Request:
    if len(packet) < _REQUEST.size:
        raise Malformed("shorter than a request")
    fields = _REQUEST.unpack_from(packet)
    kind, tag, generation, lease, nbytes, code, ndim, id_len, _ = _checked(fields)[:9]
    if kind not in range(HELLO, SETTLE + 1) or ndim > MAX_DIMS or len(packet) != _REQUEST.size + id_len:
        raise Malformed("fields that do not fit each other")
    shape = fields[11 : 11 + ndim]
    return Request(kind, tag, generation, lease, nbytes, dtype_name(code), shape, packet[_REQUEST.size :])


def pack_region(r: Region) -> bytes:
    text = r.text.encode("utf-8", "replace")[:MAX_TEXT_BYTES]
    code = dtype_code(r.dtype) if r.dtype else 0
    head = (MAGIC, VERSION, r.kind | ANSWER, r.tag, r.status, len(text), 0, r.gpu, r.pool)
    place = (r.offset, r.nbytes, r.generation, r.lease, code, len(r.shape), 0)
    return _REGION.pack(*head, *place, *_dims(r.shape)) + text


def unpack_region(packet: bytes) -> Region:
    if len(packet) < _REGION.size:
        raise Malformed("shorter than a region")
    fields = _REGION.unpack_from(packet)
    kind, tag, status, text_len, _, gpu, pool, offset, nbytes, generation, lease, code, ndim, _ = _checked(
        fields
    )[:14]
    if not kind & ANSWER or ndim > MAX_DIMS or len(packet) != _REGION.size + text_len:
        raise Malformed("fields that do not fit each other")
    text = packet[_REGION.size :].decode("utf-8", "replace")
    where = (gpu, pool, offset, nbytes, generation, lease)
    return Region(kind & ~ANSWER, tag, status, text, *where, dtype_name(code), fields[16 : 16 + ndim])


def tag_of(answer: bytes) -> int:
    """Of any message; -1 if it has none. An answer to what was no request has 0."""
    return _TAG.unpack_from(answer, _TAG_AT)[0] if len(answer) >= _TAG_AT + _TAG.size else -1


def pack_pool(p: PoolInfo) -> bytes:
    text = p.text.encode("utf-8", "replace")[:MAX_TEXT_BYTES]
    head = (MAGIC, VERSION, HELLO | ANSWER, p.tag, p.status, len(text), p.way)
    return _POOL.pack(*head, p.gpu, p.pool, p.nbytes, p.handle) + text


def unpack_pool(packet: bytes) -> PoolInfo:
    if len(packet) < _POOL.size:
        raise Malformed("shorter than a pool's description")
    kind, tag, status, text_len, way, gpu, pool, nbytes, handle = _checked(_POOL.unpack_from(packet))
    if kind != HELLO | ANSWER or len(packet) != _POOL.size + text_len:
        raise Malformed("fields that do not fit each other")
    text = packet[_POOL.size :].decode("utf-8", "replace")
    return PoolInfo(tag, status, text, way, gpu, pool, nbytes, handle)


def _checked(fields: tuple[Any, ...]) -> tuple[Any, ...]:
    """The fields behind magic and version."""
    if fields[0] != MAGIC:
        raise Malformed("no message of the keeper's protocol")
    if fields[1] != VERSION:
        raise Malformed(f"version {fields[1]} of the keeper's protocol; this is version {VERSION}")
    return fields[2:]


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) > MAX_DIMS:
        raise Malformed(f"{len(shape)} dimensions; at most {MAX_DIMS}")
    return shape + (0,) * (MAX_DIMS - len(shape))


def uuid_text(uuid: bytes) -> str:
    """As nvidia-smi and torch print it, without their "GPU-" in front: 8-4-4-4-12 hex digits."""
    h = uuid.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def uuid_bytes(text: str) -> bytes:
    """Inverse; takes "GPU-" and "MIG-" in front, too. Malformed."""
    try:
        found = bytes.fromhex(text.removeprefix("GPU-").removeprefix("MIG-").replace("-", ""))
    except ValueError:
        found = b""
    if len(found) != UUID_BYTES:
        raise Malformed(f"{text[:60]!r} is no GPU's UUID")
    return found
