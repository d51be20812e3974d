"""Getting shards from the nodes that keep them, and putting them there, by the cheapest way both ends can do.

Each node is asked once what it can do; a server that does not know the question is one of AReaL's own and
speaks JSON. Ways are tried from the cheapest; each says which shards it takes, and what it does not deliver
goes to the next. A way that fails here (no such socket, another host) is not tried again for that node.

Requests are bounded: a batch has at most BATCH_BYTES, where references tell sizes, and BATCH_UNKNOWN shards
where they do not. Nodes are asked at once. Nothing that was fetched is kept here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import quote

import msgspec
import numpy as np

from areal_fast.client.errors import NotFound, ShardsNotFound
from areal_fast.client.references import Reference
from areal_fast.client.shards import WAYS, Shard, Way, decode_json, decode_json_list
from areal_fast.client.steps import JSON, Ask, Steps, ask, together, work
from areal_fast.client.tensors import bytes_of
from areal_fast.protocol import wire

BATCH_BYTES: Final = 64 << 20
BATCH_UNKNOWN: Final = 32
"""As many as AReaL's own client asks for at once."""
BATCH_MOST: Final = 512
LARGE_BYTES: Final = 1 << 20
"""From here on a reply is decoded off the event loop."""
_encode = msgspec.json.Encoder().encode


class Fetcher:
    """The ways to shards. `counts`: how many shards came or went which way."""

    def __init__(
        self, url: str, headers: tuple[tuple[str, str], ...], retries: int, ways: Sequence[Way]
    ) -> None:
        unknown = set(ways) - set(WAYS)
        if unknown or not ways:
            raise ValueError(f"ways are some of {', '.join(WAYS)}; not {sorted(unknown) or 'none'}")
        self.url = url
        self._headers = headers
        self._retries = retries
        self._ways = tuple(way for way in WAYS if way in ways)
        self.counts: Counter[Way] = Counter()

    def url_of(self, node: str) -> str:
        """The base URL of a node HOST:PORT; the client's own proxy for ""."""
        if not node:
            return self.url
        return node.rstrip("/") if "://" in node else f"http://{node}"

    # -- get -----------------------------------------------------------------------------------------------
    def get_many(self, references: Sequence[Reference]) -> Steps[list[Shard]]:
        """The shards in order. ShardsNotFound names all that one node does not have."""
        by_node: dict[str, list[Reference]] = {}
        for one in dict.fromkeys(references):
            by_node.setdefault(self.url_of(one.node), []).append(one)
        found: dict[Reference, Shard] = {}
        calls = [self._from_node(url, wanted) for url, wanted in by_node.items()]
        if calls:
            for shards in (yield from together(calls)):
                found.update(shards)
        self.counts.update(shard.way for shard in found.values())
        return [found[one] for one in references]

    def _from_node(self, url: str, wanted: list[Reference]) -> Steps[dict[Reference, Shard]]:
        found: dict[Reference, Shard] = {}
        for batch in batches(wanted):
            shards = yield from self._json(url, batch)
            found.update(zip(batch, shards, strict=True))
        return found

    def _json(self, url: str, wanted: list[Reference]) -> Steps[list[Shard]]:
        ids, node = [one.shard_id for one in wanted], wanted[0].node
        if len(ids) == 1:
            request = Ask(url, "GET", shard_path(ids[0]), headers=self._headers, safe=True)
            try:
                answer = yield from ask(request, self._retries)
            except NotFound as error:
                raise ShardsNotFound(request.what, error.status, error.detail, ids) from None
            body = answer.body
            return [
                (yield from work(lambda: decode_json(ids[0], node, body), brief=body.nbytes < LARGE_BYTES))
            ]
        content = _encode({"shard_ids": ids})
        request = Ask(url, "POST", "/data/batch", (content,), (*self._headers, JSON), safe=True)
        answer = yield from ask(request, self._retries)
        body = answer.body
        return (yield from work(lambda: decode_json_list(ids, node, body), brief=body.nbytes < LARGE_BYTES))

    # -- put -----------------------------------------------------------------------------------------------
    def put(self, url: str, shard_id: str, value: Any) -> Steps[Reference]:
        """Store a torch tensor or a numpy array under `shard_id`, replacing any other. TypeError for
        anything else."""
        dtype, shape, data, form = _taken_apart(value)
        pieces = yield from work(
            lambda: wire.encode_parts(dtype, shape, data, form), brief=data.nbytes < LARGE_BYTES
        )
        request = Ask(url, "PUT", shard_path(shard_id), pieces, (*self._headers, JSON), safe=True)
        yield from ask(request, self._retries)
        self.counts["json"] += 1
        return Reference(shard_id, "", dtype, shape)


def shard_path(shard_id: str) -> str:
    """The path of a shard: its id with what a path cannot hold percent-encoded."""
    return "/data/" + quote(shard_id, safe="")


def _taken_apart(value: Any) -> tuple[str, tuple[int, ...], memoryview, wire.Form]:
    """(dtype, shape, bytes, form) of what is to be put."""
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        dtype, shape, data = bytes_of(value)
        return dtype, shape, data, "bf16" if dtype == "bfloat16" else "own"
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a shard is a torch tensor or a numpy array, not {type(value).__name__}")
    if value.dtype.kind not in "biufcSUmM":
        raise TypeError(f"arrays of dtype {value.dtype} cannot be shards")
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1)
    return little.dtype.str, value.shape, little.view(np.uint8).data, "ndarray"


def batches(references: Sequence[Reference]) -> Iterator[list[Reference]]:
    """In portions that one request may ask for."""
    batch: list[Reference] = []
    nbytes = 0
    for one in references:
        size = one.size_bytes
        size = BATCH_BYTES // BATCH_UNKNOWN if size is None else size
        if batch and (nbytes + size > BATCH_BYTES or len(batch) == BATCH_MOST):
            yield batch
            batch, nbytes = [], 0
        batch.append(one)
        nbytes += size
    if batch:
        yield batch
