"""Getting shards from the nodes that keep them, and putting them there, by the cheapest way both ends can do.

    gpu    same host, on a GPU that this process uses: device to device, out of and into the keeper's pool
    map    same host: memory files by descriptor, mapped; nothing is copied
    raw    anywhere: the bytes as they are, in the safetensors layout
    json   anywhere, AReaL's own nodes too: base64

A node is asked once what it offers (GET /data/ways); one that does not know the question is AReaL's own. The
ways are tried in this order; one that does not serve now leaves its shards to the next, and says why. What is
in host memory never goes the gpu way, and what comes the gpu way stays on the GPU. Raw bytes are asked
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
from areal_fast.client.errors import (
    ArenaFull,
    BadReply,
    NotFound,
    ProxyError,
    ShardsNotFound,
    TimedOut,
    error_of,
)
from areal_fast.client.gpu import Gpus, on_device, take
from areal_fast.client.nodes import Node, NotHere, Offer
from areal_fast.client.references import Reference
from areal_fast.client.shards import WAYS, Shard, Way, decode_json, decode_json_list, decode_raw
from areal_fast.client.steps import JSON, Ask, Steps, ask, bearer, decoded, together, work
from areal_fast.client.tensors import bytes_of
from areal_fast.protocol.gpu import Malformed
from areal_fast.shards import raw
from areal_fast.shards.description import Description, own_form
from areal_fast.shards.devices import CudaError, DeviceArray, uuid_of
from areal_fast.shards.gpu import GpuPoolFull, GpuShardError, KeeperGone
from areal_fast.shards.local import Mapped, OnGpu
from areal_fast.shards.outgoing import Part

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

T = TypeVar("T")

BATCH_BYTES: Final = 64 << 20
BATCH_UNKNOWN: Final = 32
"""As many as AReaL's own client asks for at once."""
BATCH_MOST: Final = 512
NO_KEEPER: Final = (400, 404, 405, 503)
"""Answers to POST /data/gpu of a node that has none for this GPU, or does not know the question."""
LARGE_BYTES: Final = 1 << 20
"""From here on a reply is decoded off the event loop."""
_encode = msgspec.json.Encoder().encode


class _Keeper(msgspec.Struct):
    """The answer of POST /data/gpu."""

    socket: str


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
    def get_many(self, references: Sequence[Reference], *, hold: bool = False) -> Steps[list[Shard]]:
        """The shards in order. ShardsNotFound names all that one request missed."""
        gpus = Gpus() if "gpu" in self._ways else None
        by_node: dict[str, list[Reference]] = {}
        for one in dict.fromkeys(references):
            by_node.setdefault(self.url_of(one.node), []).append(one)
        found: dict[Reference, Shard] = {}
        calls = [self._from_node(url, wanted, gpus, hold) for url, wanted in by_node.items()]
        if calls:
            for shards in (yield from together(calls)):
                found.update(shards)
        self.counts.update(shard.way for shard in found.values())
        return [found[one] for one in references]

    def _from_node(
        self, url: str, wanted: list[Reference], gpus: Gpus | None, hold: bool
    ) -> Steps[dict[Reference, Shard]]:
        found: dict[Reference, Shard] = {}
        failed = [gpus.why] if gpus is not None and gpus.why else []
        why: dict[Reference, list[str]] = {one: [*failed] for one in wanted}
        if gpus is not None and gpus.ordinals:
            found |= yield from self._by_gpu(url, why, gpus, hold)
        left = [one for one in wanted if one not in found]
        if left and "map" in self._ways:
            mapped, passed = yield from self._over_the_line(url, lambda node: node.map(_ids(left)))
            if mapped is not None:
                found |= {one: _mapped(one, what) for one, what in zip(left, mapped, strict=True)}
                left = []
            for one in left:
                why[one].append(f"map: {passed}")
        for batch in batches(left):
            shards = yield from self._by_http(url, batch, why[batch[0]])
            found.update(zip(batch, shards, strict=True))
        for one, shard in found.items():
            shard.why = "; ".join(why[one])
        return found

    def _by_gpu(
        self, url: str, why: dict[Reference, list[str]], gpus: Gpus, hold: bool
    ) -> Steps[dict[Reference, Shard]]:
        """Those of the wanted (`why`'s keys) that are in the pool of one of these GPUs; and those that could
        be mapped, since they were asked for in one go. For one that cannot be had this way `why` says it."""
        wanted = list(why)
        where, passed = yield from self._over_the_line(
            url, lambda node: node.locate(_ids(wanted), tuple(gpus.ordinals))
        )
        if where is None:
            for one in wanted:
                why[one].append(f"gpu: {passed}")
        found: dict[Reference, Shard] = {}
        placed: dict[Reference, OnGpu] = {}
        for one, what in zip(wanted, where or (), strict=where is not None):
            if isinstance(what, OnGpu):
                placed[one] = what
            elif "map" in self._ways:
                found[one] = _mapped(one, what)
        if not placed:
            return found
        node = yield from self._node(url)

        def take_all() -> None:
            for one, on in placed.items():
                try:
                    keeper = node.keeper(on.gpu, on.socket)
                    found[one] = take(keeper, one.shard_id, one.node, gpus, hold=hold)
                except (GpuShardError, CudaError) as error:
                    why[one].append(f"gpu: {error}")

        yield from work(take_all)
        return found

    def _over_the_line(self, url: str, call: Callable[[Node], T]) -> Steps[tuple[T | None, str]]:
        """`call` of a node on this host. None: another way, this time, and why. A line that broke is made
        anew, once."""
        why = ""
        for _ in range(2):
            node = yield from self._node(url)
            if not node.may_be_here:
                return None, node.why_not_here
            try:
                return (yield from work(partial(call, node))), ""
            except errors.ShardsNotFound as error:
                detail = f"{error}: {', '.join(error.shard_ids[:5])}"
                raise ShardsNotFound(f"map {url}", 404, detail, error.shard_ids) from None
            except NotHere as error:
                why = str(error)
                if not node.broken:
                    break
        return None, why

    def _by_http(self, url: str, wanted: list[Reference], why: list[str]) -> Steps[list[Shard]]:
        """One batch, raw if it may be and the node can, else JSON. why: the ways that were tried before."""
        ids, node = _ids(wanted), wanted[0].node
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
        self._json_only(url, why)
        if len(ids) == 1:
            return [(yield from work(lambda: decode_json(ids[0], node, body), brief=brief))]
        return (yield from work(lambda: decode_json_list(ids, node, body), brief=brief))

    # -- put -----------------------------------------------------------------------------------------------
    def put(self, url: str, shard_id: str, value: Any) -> Steps[Reference]:
        """Store a torch tensor, a numpy array or a DeviceArray under `shard_id`, replacing any other.
        TypeError for anything else."""
        array = on_device(value) if "gpu" in self._ways else None
        why: list[str] = []
        way: Way
        if array is not None and (yield from self._put_by_gpu(url, shard_id, array, why)):
            way, dtype, shape = "gpu", array.dtype, array.shape
        else:
            what, data = yield from self._on_host(value, array)
            way = yield from self._put(url, shard_id, what, data, why)
            dtype, shape = what.dtype, what.shape
        self.counts[way] += 1
        return Reference(shard_id, "", dtype, shape, way, "; ".join(why))

    def _on_host(self, value: Any, array: DeviceArray | None) -> Steps[tuple[Description, memoryview]]:
        """What it is, and its bytes; of a device's after what is queued on the stream of the caller, which
        other threads do not know."""
        if array is None:
            return _taken_apart(value)
        try:
            data = yield from work(array.to_host)
        except CudaError:
            return _taken_apart(value)  # torch may do what our driver's edge cannot
        return Description(array.dtype, array.shape, own_form(array.dtype)), data

    def _put_by_gpu(self, url: str, shard_id: str, array: DeviceArray, why: list[str]) -> Steps[bool]:
        """Into the pool of the GPU that it is on. False: another way, and `why` says why."""
        try:
            gpu = uuid_of(array.ordinal)
            socket = (yield from self._node(url)).socket_of(gpu)
            for asked in (False, True):
                if not socket:
                    socket = yield from self._keeper_of(url, gpu)
                node = yield from self._node(url)
                try:
                    yield from work(partial(_put_into, node, gpu, socket, shard_id, array))
                    return True
                except KeeperGone:
                    node.forget_keeper(gpu)
                    socket = ""
                    if asked:
                        raise
        except (NotHere, GpuShardError, CudaError, Malformed, TimedOut) as error:
            if isinstance(error, GpuPoolFull) and self._ways == {"gpu"}:
                advice = "Delete shards on the GPU, or start the proxy with more --gpu-pool-bytes."
                raise ArenaFull(f"put {shard_id} by gpu", 507, str(error), advice) from None
            why.append(f"gpu: {error}")
        return False

    def _keeper_of(self, url: str, gpu: str) -> Steps[str]:
        """Where the node's keeper of this GPU listens; it is started if there is none. NotHere."""
        here, why = yield from self._over_the_line(url, lambda node: node.reach())
        if here is None:
            raise NotHere(why)
        request = Ask(url, "POST", "/data/gpu", (_encode({"gpu": gpu}),), (*self._headers, JSON), safe=True)
        answer = yield from ask(request, self._retries, expect=NO_KEEPER)
        if answer.status in NO_KEEPER:
            refusal = str(error_of("POST /data/gpu", answer.status, bytes(answer.body)).detail)
            (yield from self._node(url)).has_no_keeper(gpu, refusal)
            raise NotHere(refusal)
        return decoded(answer, _Keeper, request.what).socket

    def _put(
        self, url: str, shard_id: str, what: Description, data: memoryview, why: list[str]
    ) -> Steps[Way]:
        if "map" in self._ways:
            done, passed = yield from self._over_the_line(url, lambda node: node.put(shard_id, what, data))
            if done:
                return "map"
            why.append(f"map: {passed}")
        way: Way = "json"
        pieces: tuple[Buffer, ...]
        if "raw" in self._ways and (yield from self._node(url)).offers_raw:
            way, kind = "raw", ("Content-Type", raw.MEDIA_TYPE)
            pieces = (raw.lay_out([("tensor", what)]).header, data)
        else:
            self._json_only(url, why)
            kind = JSON
            part = Part(*what, data.nbytes, data)
            brief = data.nbytes < LARGE_BYTES
            pieces = tuple((yield from work(lambda: list(part.pieces(sys.maxsize)), brief=brief)))
        request = Ask(url, "PUT", shard_path(shard_id), pieces, (*self._headers, kind), safe=True)
        yield from ask(request, self._retries)
        return way

    def _json_only(self, url: str, why: Sequence[str]) -> None:
        if "json" not in self._ways:
            ways = ", ".join(way for way in WAYS if way in self._ways)
            tried = f" ({'; '.join(why)})" if why else ""
            raise BadReply(
                f"{url}: shards do not travel there as this client was told to take them: {ways}{tried}"
            )


def _ids(references: Sequence[Reference]) -> list[str]:
    return [one.shard_id for one in references]


def _mapped(one: Reference, mapped: Mapped) -> Shard:
    what, data = mapped
    return Shard(one.shard_id, one.node, "map", what.dtype, what.shape, data, what.form)


def _put_into(node: Node, gpu: str, socket: str, shard_id: str, array: DeviceArray) -> None:
    """GpuShardError, CudaError."""
    keeper = node.keeper(gpu, socket)
    keeper.put(shard_id, array.pointer, array.dtype, array.shape, array.stream)


def shard_path(shard_id: str) -> str:
    """The path of a shard: its id with what a path cannot hold percent-encoded."""
    return "/data/" + quote(shard_id, safe="")


def _taken_apart(value: Any) -> tuple[Description, memoryview]:
    """(what it is, its bytes) of what is to be put, copied to the host if it is on a GPU."""
    if isinstance(value, DeviceArray):
        return Description(value.dtype, value.shape, own_form(value.dtype)), value.to_host()
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
