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

Actors take no CPU from Ray's books unless told (`num_cpus`), so that they fit beside AReaL's placement
groups; the proxy's own `--workers` says what it uses. areal_fast has to be installed on every node, or be in
`runtime_env`.

Ray is imported by calls, never by importing this module. Source: the design page, "Shards".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from areal_fast import config
from areal_fast.integrations.owner import MAX_RESTARTS, START_S, STOP_S, OwnedProxy, ProxyFailed, Status

NAME: Final = "areal_fast"
CONCURRENCY: Final = 4
"""Calls of an actor at once, so that `status` is answered while `stop` waits."""
SLACK_S: Final = 60.0
"""What Ray itself may take to start an actor's process, or to answer."""


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
        self._proxy.start()

    def wait_ready(self, timeout_s: float) -> Status:
        return self._proxy.wait_ready(timeout_s)

    def status(self) -> Status:
        return self._proxy.status()

    def tail(self) -> list[str]:
        return self._proxy.tail()

    def stop(self, timeout_s: float) -> int:
        return self._proxy.stop(timeout_s)


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
