"""One proxy a node under Ray: actors that own proxies, one on each node, and their addresses.

    import ray
    from areal_fast.integrations.ray import start_proxies

    ray.init()
    proxies = start_proxies(["--backend-addr", "http://localhost:30000", "--tokenizer-path", "…"])
    for proxy in proxies:
        print(proxy.node_id, proxy.address)
    …
    for proxy in proxies:
        proxy.stop()

Theory. An actor is pinned to its node (NodeAffinity, hard) and owns the proxy's process (integrations/
owner.py). Its name holds the node's id, so Ray itself refuses a second one of that name on the node. However
the actor ends (`ray.kill`, SIGKILL of its worker, its node, its driver), the proxy ends with it: no process,
port or file is left. `stop()` is the orderly end: drain, dumps, exit status. A worker that is killed from
outside leaves the proxy the time for its dumps; Ray itself (`ray.kill`, the driver's end) kills a worker's
children with it, so live sessions are then lost: call `stop()` first. What a proxy logs goes to its actor's
stderr, that is to Ray's worker log on that node, and from there to the driver unless log_to_driver is off.

A proxy that dies alone is started again by its actor on the same address, without its sessions; `status()`
counts it. An actor that dies is started again only if `actor_options` has `max_restarts`, as everywhere in
Ray.

Shards. A shard of a proxy on another node can come through Ray's object store: the actor fetches it from its
proxy (a mapping, on its node), puts it there once, and Ray carries it to each node once, however many
processes of that node read it. `NodeProxy.get_shards` does that, and `enable_rtensor(through_ray=proxies)`
for RTensors. It is for nodes where several processes read the same large shards; for one reader it is
a step more than raw bytes over HTTP. Small shards come with the actor's answer. What the actor keeps in Ray's
store is bounded (SHARED_BYTES, the least recently used go first), so a shard may be read there for a while
after its deletion by somebody else; a backend's own `delete` tells the actor.

Actors take no CPU from Ray's books unless told (`num_cpus`), so that they fit beside AReaL's placement
groups; the proxy's own `--workers` says what it uses. areal_fast has to be installed on every node, or be in
`runtime_env`.

Ray is imported by calls, never by importing this module. Source: the design page, "Shards".
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from areal_fast import config
from areal_fast.client import HOST_WAYS, Client, ClientError, Shard
from areal_fast.integrations.owner import MAX_RESTARTS, START_S, STOP_S, OwnedProxy, ProxyFailed, Status

NAME: Final = "areal_fast"
CONCURRENCY: Final = 4
"""Calls of an actor at once, so that `status` is answered while `stop` waits."""
SLACK_S: Final = 60.0
"""What Ray itself may take to start an actor's process, or to answer."""


SHARED_BYTES: Final = 256 << 20
"""What an actor keeps in Ray's object store."""
SHARED_FROM_BYTES: Final = 64 << 10
"""Smaller shards are not worth an object of their own: Ray itself carries up to 100 KiB in an answer."""


class Node(NamedTuple):
    """A node of the cluster. id: Ray's, hex; ip: as Ray knows it; resources: what it has in all."""

    id: str
    ip: str
    resources: dict[str, float]


Argv = Sequence[str] | Callable[[Node], Sequence[str]]


class ProxyActor:
    """Runs on a node, inside Ray. Its methods are called by `NodeProxy`."""

    def __init__(self, argv: list[str], max_restarts: int, environment: dict[str, str]) -> None:
        import os

        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            # Ray hides GPUs from actors that reserve none; the keeper copies from those that others reserved
            del os.environ["CUDA_VISIBLE_DEVICES"]
        self._proxy = OwnedProxy(argv, max_restarts=max_restarts, environment=environment)
        self._admin_key = config.parse(argv)[0].admin_api_key
        self._sharing = threading.Lock()
        # guarded by `_sharing`: (Ray's reference, bytes) by shard id, the least recently used first
        self._shared: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._shared_bytes = 0
        self._client: Client | None = None
        self._proxy.start()

    def wait_ready(self, timeout_s: float) -> Status:
        return self._proxy.wait_ready(timeout_s)

    def status(self) -> Status:
        return self._proxy.status()

    def tail(self) -> list[str]:
        return self._proxy.tail()

    def stop(self, timeout_s: float) -> int:
        return self._proxy.stop(timeout_s)

    def share(self, shard_ids: list[str]) -> list[Any]:
        """For each shard Ray's reference to it, or the shard itself if it is small; [] if not all can be
        had."""
        with self._sharing:
            if self._client is None:
                url = f"http://{self._proxy.status().address}"
                self._client = Client(url, self._admin_key, ways=HOST_WAYS)
            missing = [one for one in dict.fromkeys(shard_ids) if one not in self._shared]
            try:
                fetched = self._client.get_many(missing) if missing else []
            except ClientError:
                return []  # who asks goes to the proxy, which says what is wrong
            found = {shard.id: self._put(shard) for shard in fetched}
            for one in shard_ids:
                if one not in found:
                    self._shared.move_to_end(one)
                    found[one] = self._shared[one][0]
            self._drop_oldest()
            return [found[one] for one in shard_ids]

    def _put(self, shard: Shard) -> Any:
        import ray

        # as an array its bytes travel beside the pickle, and are mapped, not copied, by who gets them
        array: Any = np.frombuffer(memoryview(shard.data), np.uint8)
        shared = shard.over(array)
        if array.nbytes < SHARED_FROM_BYTES:
            return shared
        reference = ray.put(shared)
        self._shared[shard.id] = reference, array.nbytes
        self._shared_bytes += array.nbytes
        return reference

    def _drop_oldest(self) -> None:
        while self._shared_bytes > SHARED_BYTES:
            _, (_, nbytes) = self._shared.popitem(last=False)
            self._shared_bytes -= nbytes

    def forget(self, shard_ids: list[str]) -> int:
        """Drop what is kept of these; how many there were. Ray frees them when no reader has them."""
        with self._sharing:
            gone = [self._shared.pop(one)[1] for one in shard_ids if one in self._shared]
            self._shared_bytes -= sum(gone)
            return len(gone)


@dataclass(frozen=True)
class NodeProxy:
    """A proxy on a node. Can be given to tasks and other actors. Calls raise Ray's RayActorError once the
    actor is gone."""

    node_id: str
    address: str
    """HOST:PORT, as agents dial it and as it stands in shards."""
    actor: Any
    """Ray's handle. Where no handle is left the actor ends, and the proxy with it (but see
    `actor_options`)."""

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def status(self, timeout_s: float = SLACK_S) -> Status:
        """How it is, without asking the proxy itself (that is its /health)."""
        import ray

        found: Status = ray.get(self.actor.status.remote(), timeout=timeout_s)
        return found

    def tail(self, timeout_s: float = SLACK_S) -> list[str]:
        """The last 50 lines that it logged."""
        import ray

        lines: list[str] = ray.get(self.actor.tail.remote(), timeout=timeout_s)
        return lines

    @property
    def is_here(self) -> bool:
        """Whether it runs on the node of the calling process."""
        import ray

        return bool(ray.get_runtime_context().get_node_id() == self.node_id)

    def get_shards(self, shard_ids: Sequence[str]) -> list[Shard] | None:
        """Its shards, in order, through Ray's object store. None if not all can be had that way (gone, or
        never there, or the actor is): the client's ways then say why. A shard's bytes are read-only; its
        `tensor` is a copy of the reader's own."""
        import ray

        try:
            rows = ray.get(self.actor.share.remote(list(shard_ids)))
            large = {i: row for i, row in enumerate(rows) if isinstance(row, ray.ObjectRef)}
            shards = dict(zip(large, ray.get(list(large.values())), strict=True))
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
            return None
        return [shards.get(i, row) for i, row in enumerate(rows)] if rows else None

    def stop(self, timeout_s: float = STOP_S) -> int:
        """Drain, dump, end, and end the actor. The proxy's exit status: 0 where all went well."""
        import ray

        try:
            status: int = ray.get(self.actor.stop.remote(timeout_s), timeout=timeout_s + SLACK_S)
        finally:
            ray.kill(self.actor)
        return status


def start_proxies(
    argv: Argv,
    *,
    nodes: Iterable[str] | None = None,
    name: str = NAME,
    num_cpus: float = 0,
    max_restarts: int = MAX_RESTARTS,
    environment: dict[str, str] | None = None,
    start_timeout_s: float = START_S,
    actor_options: dict[str, Any] | None = None,
) -> list[NodeProxy]:
    """One proxy on each node, all answering when this returns; or none, and ProxyFailed says which could not
    start.

    argv: flags of `areal-fast serve`, or a function that gives them for a Node. Without --host a proxy
    listens on its node's own address, without --port on a free port. UsageError for bad flags, before
    anything is started. nodes: ids of some nodes; default every living one. max_restarts: of the proxy by its
    actor; -1: any number. environment: added to what the node's Ray has. actor_options: more for Ray, such as
    {"lifetime": "detached", "namespace": "areal"} for proxies that outlive this driver.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    wanted = [(node, _flags(argv, node)) for node in _choose(nodes)]
    actor = ray.remote(ProxyActor)
    started: list[tuple[Node, Any]] = []
    try:
        for node, flags in wanted:
            options: dict[str, Any] = {
                "name": f"{name}@{node.id}",
                "num_cpus": num_cpus,
                "max_concurrency": CONCURRENCY,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
                **(actor_options or {}),
            }
            try:
                handle = actor.options(**options).remote(flags, max_restarts, environment or {})
            except ValueError as error:  # the name is taken
                raise ProxyFailed(f"node {node.id} ({node.ip}): {error}") from None
            started.append((node, handle))
        waits = [(node, handle, handle.wait_ready.remote(start_timeout_s)) for node, handle in started]
        return [_ready(node, handle, wait, start_timeout_s) for node, handle, wait in waits]
    except BaseException:
        for _, handle in started:
            ray.kill(handle)
        raise


def find_proxies(name: str = NAME) -> list[NodeProxy]:
    """The proxies of that name that run in this driver's or worker's Ray namespace, by node id."""
    import ray
    from ray.util import list_named_actors

    found = []
    for full in sorted(one for one in list_named_actors() if one.startswith(f"{name}@")):
        try:
            actor = ray.get_actor(full)
            status = ray.get(actor.status.remote(), timeout=SLACK_S)
        except (ValueError, ray.exceptions.RayActorError):
            continue  # it ended meanwhile
        if status.state in ("ready", "restarting"):
            found.append(NodeProxy(full.removeprefix(f"{name}@"), status.address, actor))
    return found


def _choose(nodes: Iterable[str] | None) -> list[Node]:
    import ray

    alive = {
        row["NodeID"]: Node(row["NodeID"], row["NodeManagerAddress"], dict(row["Resources"]))
        for row in ray.nodes()
        if row["Alive"]
    }
    if nodes is None:
        return [alive[node] for node in sorted(alive)]
    chosen = list(dict.fromkeys(nodes))
    if missing := [node for node in chosen if node not in alive]:
        raise ProxyFailed(f"no living nodes of this cluster: {', '.join(missing)}")
    return [alive[node] for node in chosen]


def _flags(argv: Argv, node: Node) -> list[str]:
    """The node's flags, checked. UsageError."""
    flags = list(argv(node) if callable(argv) else argv)
    given = {flag.partition("=")[0] for flag in flags}
    flags += [part for flag, value in (("--host", node.ip), ("--port", "0")) if flag not in given
              for part in (flag, value)]  # fmt: skip
    config.parse(flags)
    return flags


def _ready(node: Node, handle: Any, wait: Any, timeout_s: float) -> NodeProxy:
    import ray

    try:
        status: Status = ray.get(wait, timeout=timeout_s + SLACK_S)
    except ProxyFailed as error:  # Ray's own error is one of ours too: this tells ours alone
        raise ProxyFailed(f"node {node.id} ({node.ip}): {getattr(error, 'cause', error)}") from None
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ProxyFailed(f"node {node.id} ({node.ip}): the actor does not run: {error}") from error
    return NodeProxy(node.id, status.address, handle)
