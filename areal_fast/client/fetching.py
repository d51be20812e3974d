"""Getting shards from the nodes that keep them, and putting them there, by the cheapest way both ends can do.

    map    same host: memory files by descriptor, mapped; nothing is copied
    raw    anywhere: the bytes as they are, in the safetensors layout
    json   anywhere, AReaL's own nodes too: base64

A node is asked once what it offers (GET /data/ways); one that does not know the question is AReaL's own. The
ways are tried in this order; one that does not serve now leaves its shards to the next. Raw bytes are asked
for by content negotiation, so that a node that does not have them answers in JSON.

Requests are bounded: a batch has at most BATCH_BYTES, where references tell sizes, and BATCH_UNKNOWN shards
where they do not. Nodes are asked at once. Nothing that was fetched is kept here. Tensors of one batch share
its memory, which goes with the last of them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np

from areal_fast import errors
from areal_fast.client.errors import BadReply, NotFound, ProxyError, ShardsNotFound
from areal_fast.client.nodes import Node, NotHere, Offer
from areal_fast.client.references import Reference
from areal_fast.client.shards import WAYS, Shard, Way, decode_json, decode_json_list, decode_raw
from areal_fast.client.steps import JSON, Ask, Steps, ask, bearer, together, work
from areal_fast.client.tensors import bytes_of
from areal_fast.shards import raw
from areal_fast.shards.description import Description, own_form
from areal_fast.shards.outgoing import Part

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

T = TypeVar("T")

BATCH_BYTES: Final = 64 << 20
BATCH_UNKNOWN: Final = 32
"""As many as AReaL's own client asks for at once."""
BATCH_MOST: Final = 512
LARGE_BYTES: Final = 1 << 20
"""From here on a reply is decoded off the event loop."""
_encode = msgspec.json.Encoder().encode


class Fetcher:
    """The ways to shards. key: shown to nodes that ask for one. `counts`: how many shards came or went which
    way."""

    def __init__(
        self, url: str, key: str | None, retries: int, ways: Sequence[Way], timeout_s: float = 60.0
    ) -> None:
        unknown = set(ways) - set(WAYS)
        if unknown or not ways:
            raise ValueError(f"ways are some of {', '.join(WAYS)}; not {sorted(unknown) or 'none'}")
        self.url = url
        self._key = key or ""
        self._headers = bearer(key)
        self._retries = retries
        self._ways = frozenset(ways)
        self._timeout_s = timeout_s
        self._nodes: dict[str, Node] = {}
        self.counts: Counter[Way] = Counter()

    def url_of(self, node: str) -> str:
        """The base URL of a node HOST:PORT; the client's own proxy for ""."""
        if not node:
            return self.url
        return node.rstrip("/") if "://" in node else f"http://{node}"

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()

    def _node(self, url: str) -> Steps[Node]:
        """What is known of a node; it is asked if nothing is."""
        known = self._nodes.get(url)
        if known is not None and not known.broken:
            return known
        request = Ask(url, "GET", "/data/ways", headers=self._headers, safe=True)
        try:
            answer = yield from ask(request, self._retries)
            offer = msgspec.json.decode(answer.body, type=Offer)
        except (ProxyError, msgspec.DecodeError, UnicodeDecodeError):
            offer = Offer()
        found = self._nodes[url] = Node(offer, self._key, self._timeout_s)
        return found

    # -- get -----------------------------------------------------------------------------------------------
    def get_many(self, references: Sequence[Reference]) -> Steps[list[Shard]]:
        """The shards in order. ShardsNotFound names all that one request missed."""
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
        if "map" in self._ways:
            mapped = yield from self._by_map(url, wanted)
            if mapped is not None:
                return dict(zip(wanted, mapped, strict=True))
        for batch in batches(wanted):
            shards = yield from self._by_http(url, batch)
            found.update(zip(batch, shards, strict=True))
        return found

    def _by_map(self, url: str, wanted: list[Reference]) -> Steps[list[Shard] | None]:
        ids = [one.shard_id for one in wanted]
        try:
            mapped = yield from self._over_the_line(url, lambda node: node.map(ids))
        except errors.ShardsNotFound as error:
            raise ShardsNotFound(f"map {url}", 404, str(error), error.shard_ids) from None
        if mapped is None:
            return None
        return [
            Shard(one.shard_id, one.node, "map", what.dtype, what.shape, data, what.form)
            for one, (what, data) in zip(wanted, mapped, strict=True)
        ]

    def _over_the_line(self, url: str, call: Callable[[Node], T]) -> Steps[T | None]:
        """`call` of a node on this host; None: another way, this time. A line that broke is made anew,
        once."""
        for _ in range(2):
            node = yield from self._node(url)
            if not node.may_be_here:
                return None
            try:
                return (yield from work(partial(call, node)))
            except NotHere:
                if not node.broken:
                    return None
        return None

    def _by_http(self, url: str, wanted: list[Reference]) -> Steps[list[Shard]]:
        """One batch, raw if it may be and the node can, else JSON."""
        ids, node = [one.shard_id for one in wanted], wanted[0].node
        headers = (*self._headers, ("Accept", raw.MEDIA_TYPE)) if "raw" in self._ways else self._headers
        if len(ids) == 1:
            request = Ask(url, "GET", shard_path(ids[0]), headers=headers, safe=True)
        else:
            content = _encode({"shard_ids": ids})
            request = Ask(url, "POST", "/data/batch", (content,), (*headers, JSON), safe=True)
        try:
            answer = yield from ask(request, self._retries)
        except ShardsNotFound:
            raise
        except NotFound as error:
            raise ShardsNotFound(request.what, error.status, error.detail, ids) from None
        body, brief = answer.body, answer.body.nbytes < LARGE_BYTES
        if answer.headers.get("content-type", "").lower().startswith(raw.MEDIA_TYPE):
            return (yield from work(lambda: decode_raw(ids, node, body), brief=True))
        self._json_only(url)
        if len(ids) == 1:
            return [(yield from work(lambda: decode_json(ids[0], node, body), brief=brief))]
        return (yield from work(lambda: decode_json_list(ids, node, body), brief=brief))

    # -- put -----------------------------------------------------------------------------------------------
    def put(self, url: str, shard_id: str, value: Any) -> Steps[Reference]:
        """Store a torch tensor or a numpy array under `shard_id`, replacing any other. TypeError for
        anything else."""
        what, data = _taken_apart(value)
        way = yield from self._put(url, shard_id, what, data)
        self.counts[way] += 1
        return Reference(shard_id, "", what.dtype, what.shape)

    def _put(self, url: str, shard_id: str, what: Description, data: memoryview) -> Steps[Way]:
        if "map" in self._ways:
            done = yield from self._over_the_line(url, lambda node: node.put(shard_id, what, data))
            if done:
                return "map"
        way: Way = "json"
        pieces: tuple[Buffer, ...]
        if "raw" in self._ways and (yield from self._node(url)).offers_raw:
            way, kind = "raw", ("Content-Type", raw.MEDIA_TYPE)
            pieces = (raw.lay_out([("tensor", what)]).header, data)
        else:
            self._json_only(url)
            kind = JSON
            part = Part(*what, data.nbytes, data)
            brief = data.nbytes < LARGE_BYTES
            pieces = tuple((yield from work(lambda: list(part.pieces(sys.maxsize)), brief=brief)))
        request = Ask(url, "PUT", shard_path(shard_id), pieces, (*self._headers, kind), safe=True)
        yield from ask(request, self._retries)
        return way

    def _json_only(self, url: str) -> None:
        if "json" not in self._ways:
            ways = ", ".join(way for way in WAYS if way in self._ways)
            raise BadReply(f"{url}: shards do not travel there as this client was told to take them: {ways}")


def shard_path(shard_id: str) -> str:
    """The path of a shard: its id with what a path cannot hold percent-encoded."""
    return "/data/" + quote(shard_id, safe="")


def _taken_apart(value: Any) -> tuple[Description, memoryview]:
    """(what it is, its bytes) of what is to be put."""
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        dtype, shape, data = bytes_of(value)
        return Description(dtype, shape, own_form(dtype)), data
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a shard is a torch tensor or a numpy array, not {type(value).__name__}")
    if value.dtype.kind not in "biufcSUmM":
        raise TypeError(f"arrays of dtype {value.dtype} cannot be shards")
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1)
    return Description(little.dtype.str, value.shape, "ndarray"), little.view(np.uint8).data


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
