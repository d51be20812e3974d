"""AReaL's RTensor over the cheap ways: a backend for `areal.infra.rpc.rtensor.set_backend`, and a bounded
buffer.

    from areal_fast.integrations.rtensor import enable_rtensor
    enable_rtensor()                                     # in every process that localizes RTensors

What a shard's id is says where it lives. A Ray ObjectRef is in Ray's object store. A text is looked for in
this process's own storage first (an AReaL worker is a node itself), then asked of the node the RTensor names,
by the cheapest way that node knows; AReaL's own nodes know JSON, and get what they always got.

Under Ray, with proxies that integrations/ray.py has started, `through_ray` makes shards of a proxy on another
node come through Ray's object store, which carries a shard to each node once.

Storing. AReaL stores where the process is: in Ray's object store when Ray is up, else in the process's own
storage, which the worker's own server hands out under the node address that `RTensor.remotize` is given. So
does this backend; with `node` it puts shards into that areal_fast proxy instead, and `remotize` is to be
given the same address.

Memory. RTensor keeps every tensor it has fetched in a buffer, to be drained by calls that a crash or a new
code path forgets. `enable_rtensor` puts a FetchBuffer in its place, which forgets what was used least
recently beyond `buffer_bytes`. The backend itself keeps nothing.

AReaL, Ray and torch are imported by calls, never by importing this module. Written against AReaL 1.0.4; what
it differs in: a Ray without `ray.internal.free` (2.60, say) frees by counting references, where the original
fails.
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from areal_fast.client import HOST_WAYS, Client, ClientError, Reference, Way

if TYPE_CHECKING:
    import torch

    from areal_fast.integrations.ray import NodeProxy

TIMEOUT_S: Final = 3600.0
"""AReaL's own limit for a request between nodes."""
BUFFER_BYTES: Final = 256 << 20


class ShardInfo(Protocol):
    """areal.infra.rpc.rtensor.TensorShardInfo. shard_id: text, or a Ray ObjectRef (node_addr "" then)."""

    shard_id: Any
    node_addr: str


class AReaLFastBackend:
    """An RTensorBackend. node: HOST:PORT of an areal_fast proxy that `store` puts shards into; None: as AReaL
    does. admin_api_key: only for proxies that run with --data-auth. ways: as Client takes them; with "gpu"
    among them tensors may come on a GPU, where AReaL's own are always in host memory."""

    def __init__(
        self,
        node: str | None = None,
        *,
        through_ray: Sequence[NodeProxy] = (),
        admin_api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        ways: Sequence[Way] = HOST_WAYS,
    ) -> None:
        """through_ray: proxies whose shards other nodes get through Ray's object store."""
        url = f"http://{node}" if node else None
        self.client = Client(url, admin_api_key, timeout_s=timeout_s, ways=ways)
        self._stores_here = node is not None
        self._elsewhere = {proxy.address: proxy for proxy in through_ray if not proxy.is_here}

    def fetch(self, shards: Sequence[ShardInfo]) -> list[torch.Tensor]:
        """The tensors, in order. RuntimeError, as the original, if one cannot be had."""
        found: dict[int, torch.Tensor] = {}
        in_ray = [i for i, shard in enumerate(shards) if not isinstance(shard.shard_id, str)]
        if in_ray:
            import ray

            found.update(zip(in_ray, ray.get([shards[i].shard_id for i in in_ray]), strict=True))
        asked: dict[int, Reference] = {}
        for i, shard in enumerate(shards):
            if i in found:
                continue
            mine = _own(shard.shard_id)
            if mine is None:
                asked[i] = Reference(shard.shard_id, shard.node_addr)
            else:
                found[i] = mine
        found.update(self._through_ray(asked))
        asked = {i: one for i, one in asked.items() if i not in found}
        if asked:
            try:
                fetched = self.client.get_many(list(asked.values()))
            except ClientError as error:
                raise RuntimeError(f"Failed to fetch shards: {error}") from error
            found.update(zip(asked, (shard.tensor for shard in fetched), strict=True))
        return [found[i] for i in range(len(shards))]

    def _through_ray(self, asked: dict[int, Reference]) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for address, proxy in self._elsewhere.items():
            here = [i for i, one in asked.items() if one.node == address]
            shards = proxy.get_shards([asked[i].shard_id for i in here]) if here else None
            found.update((i, shard.tensor) for i, shard in zip(here, shards or (), strict=False))
        return found

    def store(self, tensor: torch.Tensor) -> Any:
        """Store a tensor; its id: a text, or an ObjectRef where Ray is up and no `node` was given."""
        if self._stores_here:
            return self.client.put(tensor).shard_id
        if (ray := _ray()) is not None:
            return ray.put(tensor)
        import uuid

        shard_id = str(uuid.uuid4())
        _rtensor().store(shard_id, tensor)
        return shard_id

    async def delete(self, node_addr: str, shard_ids: Sequence[Any]) -> None:
        """Delete shards; unknown ids are no error. Unreachable if the node is."""
        refs = [shard_id for shard_id in shard_ids if not isinstance(shard_id, str)]
        if refs and (ray := _ray()) is not None and (free := getattr(ray.internal, "free", None)):
            free(refs)
        rtensor = _rtensor()
        elsewhere = [
            Reference(shard_id, node_addr)
            for shard_id in shard_ids
            if isinstance(shard_id, str) and not rtensor.remove(shard_id)
        ]
        if elsewhere:
            if (proxy := self._elsewhere.get(node_addr)) is not None:
                proxy.actor.forget.remote([one.shard_id for one in elsewhere])
            await asyncio.to_thread(self.client.delete, elsewhere)


class FetchBuffer:
    """What RTensor uses of the dict that it buffers fetched tensors in, bounded: beyond `max_bytes` the least
    recently used go, and a tensor that is larger by itself is not kept. Used under RTensor's own lock."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: OrderedDict[Any, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, shard_id: Any, default: Any = None) -> Any:
        if shard_id not in self._kept:
            return default
        self._kept.move_to_end(shard_id)
        return self._kept[shard_id]

    def __setitem__(self, shard_id: Any, tensor: torch.Tensor) -> None:
        self.pop(shard_id, None)
        if tensor.nbytes > self.max_bytes:
            return
        self._kept[shard_id] = tensor
        self.nbytes += tensor.nbytes
        while self.nbytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def pop(self, shard_id: Any, default: Any = None) -> Any:
        tensor = self._kept.pop(shard_id, None)
        if tensor is None:
            return default
        self.nbytes -= tensor.nbytes
        return tensor

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0


def enable_rtensor(
    node: str | None = None, *, buffer_bytes: int = BUFFER_BYTES, **options: Any
) -> AReaLFastBackend:
    """Make this process's RTensor use an AReaLFastBackend (options: as it takes) and a bounded buffer.

    buffer_bytes: 0 keeps nothing. To undo: `rtensor.set_backend(None)`; the buffer stays bounded.
    """
    rtensor = _rtensor()
    backend = AReaLFastBackend(node, **options)
    with rtensor._fetch_buffer_lock:
        rtensor._fetch_buffer = FetchBuffer(buffer_bytes)
    rtensor.set_backend(backend)
    return backend


def _rtensor() -> Any:
    from areal.infra.rpc import rtensor

    return rtensor


def _own(shard_id: str) -> torch.Tensor | None:
    """A copy of a tensor in this process's own storage. Its ids are random: none is another node's."""
    try:
        mine: torch.Tensor = _rtensor().fetch(shard_id)
    except KeyError:
        return None
    return mine.clone()


def _ray() -> Any:
    """Ray, if it is up in this process."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None
