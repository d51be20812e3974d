"""A fetched shard: its bytes, how they came, and the tensor or array over them.

The bytes are memory that may be written and is nobody else's: a reply's, or a private mapping. `decode_json`
reads the wire's JSON form; exact for every dtype, bfloat16 (float32 bytes) and the small floats included. No
type tag but "tensor" and "ndarray" is looked at.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import msgspec
import numpy as np
import numpy.typing as npt

from areal_fast.client.errors import BadReply
from areal_fast.client.tensors import tensor_over
from areal_fast.errors import ShardRejected
from areal_fast.shards import json_codec, raw

if TYPE_CHECKING:
    import torch
    from _typeshed import ReadableBuffer as Buffer

    from areal_fast.protocol.wire import Form
    from areal_fast.shards.devices import DeviceArray

Way = Literal["gpu", "map", "raw", "json"]
WAYS: Final[tuple[Way, ...]] = ("gpu", "map", "raw", "json")
"""Cheapest first."""
HOST_WAYS: Final[tuple[Way, ...]] = WAYS[1:]
"""Those that leave a shard in host memory."""


class Shard:
    """An immutable tensor or array that was fetched.

    id, node (HOST:PORT, "" for the client's own proxy), dtype ("float32"; "<f4" of an array), shape,
    data (its bytes, in host memory), way (how they came), why (what kept cheaper ways from serving, "" if
    nothing did), device (where the bytes are, if that is a GPU).
    """

    device: DeviceArray | None = None

    def __init__(
        self,
        shard_id: str,
        node: str,
        way: Way,
        dtype: str,
        shape: tuple[int, ...],
        data: Buffer,
        form: Form = "own",
    ) -> None:
        self.id = shard_id
        self.node = node
        self.way = way
        self.dtype = dtype
        self.shape = shape
        self.why = ""
        self._data = data
        self._form = form

    def __repr__(self) -> str:
        return f"<Shard {self.id} {self.dtype}{list(self.shape)} by {self.way}>"

    @property
    def data(self) -> Buffer:
        return self._data

    def over(self, data: Buffer) -> Shard:
        """The same shard over a copy of its bytes in host memory."""
        return Shard(self.id, self.node, self.way, self.dtype, self.shape, data, self._form)

    def release(self) -> bool:
        """Give back what `hold` holds, after everything that reads it is done: whether the bytes were this
        shard's all the time. True, and nothing happens, where they are one's own."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    @cached_property
    def tensor(self) -> torch.Tensor:
        """As a torch tensor over the bytes, without a copy (float8 that came as float32 apart). TypeError if
        torch has no such dtype."""
        if self._form == "ndarray":
            import torch

            return torch.from_numpy(self.array)
        return tensor_over(self.data, self.dtype, self.shape, self._form)

    @cached_property
    def array(self) -> npt.NDArray[Any]:
        """As a numpy array over the bytes. TypeError for what numpy does not have (bfloat16, float8)."""
        if self._form in ("wide", "meta"):
            raise TypeError(f"numpy has no {self.dtype}, or there are no data; take .tensor")
        name = self.dtype
        if self._form != "ndarray" and not hasattr(np, name.replace("bool", "bool_")):
            raise TypeError(f"numpy has no dtype {name}; take .tensor")
        flat: npt.NDArray[Any] = np.frombuffer(memoryview(self.data), np.dtype(name))
        return flat.reshape(self.shape)


def decode_json(shard_id: str, node: str, body: Buffer) -> Shard:
    """One shard from its JSON. BadReply."""
    try:
        kept, data = json_codec.decode(body)
    except ShardRejected as error:
        raise BadReply(f"{node or 'the proxy'}: shard {shard_id} came as no tensor: {error}") from None
    return Shard(shard_id, node, "json", kept.dtype, kept.shape, data, kept.form)


_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def decode_json_list(shard_ids: list[str], node: str, body: Buffer) -> list[Shard]:
    """The shards of a batch, in order. BadReply."""
    try:
        rows = _list_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadReply(f"{node or 'the proxy'}: a batch of shards is no JSON list: {error}") from None
    if len(rows) != len(shard_ids):
        raise BadReply(f"{node or 'the proxy'}: {len(rows)} shards came for {len(shard_ids)}")
    return [decode_json(shard_id, node, row) for shard_id, row in zip(shard_ids, rows, strict=True)]


def decode_raw(shard_ids: list[str], node: str, body: memoryview) -> list[Shard]:
    """The shards of a reply in the safetensors layout, in order; over the reply's memory. BadReply."""
    try:
        entries, data = raw.parse(body)
    except ShardRejected as error:
        raise BadReply(f"{node or 'the proxy'}: raw shards came in no such form: {error}") from None
    found = {entry.name: entry for entry in entries}
    if not found.keys() >= set(shard_ids):
        raise BadReply(f"{node or 'the proxy'}: {len(found)} shards came for {len(shard_ids)}")
    shards = []
    for shard_id in shard_ids:
        what, start, stop = found[shard_id][1:]
        piece = data[start:stop]
        shards.append(Shard(shard_id, node, "raw", what.dtype, what.shape, piece, what.form))
    return shards
