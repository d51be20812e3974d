"""One proxy a node under Ray (integrations/ray.py), on a local cluster of two nodes: start, find, end in
every way an actor can end. Ray and torch in this interpreter; skipped where Ray is not installed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_fast import config
from areal_fast.client import Client
from areal_fast.integrations.owner import ProxyFailed
from areal_fast.integrations.ray import NodeProxy, find_proxies, start_proxies
from tests.e2e.running import ADMIN, ROOT, alive, descendants, wait_until

pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
pytestmark = [
    pytest.mark.areal,
    pytest.mark.timeout(600),
    # Ray's own: sockets and log files that it leaves to the collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FLAGS = [
    "--backend-addr", "embedded", "--workers", "1", "--arena-max-bytes", "64M", "--admin-api-key", ADMIN,
    "--hang-timeout-seconds", "60",
]  # fmt: skip
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
# Ray would otherwise write a key into the home of whoever runs the tests, and ask the network who it is
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        running = Cluster(initialize_head=True, head_node_args=NODE)
        try:
            running.add_node(**NODE)
            ray.init(address=running.address, namespace="tests", log_to_driver=False)
            running.wait_for_nodes()
            yield running
        finally:
            ray.shutdown()
            running.shutdown()


def tree(proxy: NodeProxy) -> list[int]:
    pid = proxy.status().pid
    assert pid
    return [pid, *descendants(pid)]


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def gone(pids: list[int], *addresses: str) -> None:
    wait_until(lambda: not list(filter(alive, pids)), "no process of the proxy is left")
    assert not any(map(listens, addresses))
    assert not [name for name in os.listdir("/dev/shm") if "areal" in name]


def actor_pid(proxy: NodeProxy) -> int:
    """The process of the actor: the parent of the proxy's."""
    stat = Path(f"/proc/{proxy.status().pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def chatted(proxy: NodeProxy, task: str) -> None:
    """A session with one turn and no reward."""
    with Client(proxy.url, ADMIN) as client:
        key = client.start_session(task).api_key
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    request = urllib.request.Request(f"{proxy.url}/chat/completions", json.dumps(chat).encode())
    request.add_header("Authorization", f"Bearer {key}")
    urllib.request.urlopen(request, timeout=120).close()


@contextlib.contextmanager
def running(*flags: str, **options: Any) -> Iterator[list[NodeProxy]]:
    proxies = start_proxies([*FLAGS, *flags], **options)
    try:
        yield proxies
    finally:
        import ray

        for proxy in proxies:
            with contextlib.suppress(ray.exceptions.RayActorError):
                proxy.stop()


def test_one_on_each_node_and_found_again(cluster: Any, tmp_path: Path) -> None:
    import ray

    with running("--stale-session-dump-path", str(tmp_path)) as proxies:
        assert [p.node_id for p in proxies] == sorted(row["NodeID"] for row in ray.nodes() if row["Alive"])
        assert len({p.address for p in proxies}) == 2
        assert find_proxies() == proxies
        for proxy in proxies:
            with Client(proxy.url, ADMIN) as client:
                assert client.health()["status"] == "ok"
            assert ray.get(ray.remote(lambda p: p.status().state).remote(proxy)) == "ready"
            assert any(" ready address=" in line for line in proxy.tail())

        with pytest.raises(ProxyFailed, match="already"):
            start_proxies(FLAGS)
        assert find_proxies() == proxies, "those that were there were left alone"

        trees = [pid for proxy in proxies for pid in tree(proxy)]
        chatted(proxies[0], "kept")
        assert [proxy.stop() for proxy in proxies] == [0, 0]
        gone(trees, *(proxy.address for proxy in proxies))
        assert [dump.name for dump in tmp_path.iterdir()] == ["kept-0-active.json"]
        wait_until(lambda: find_proxies() == [], "nothing is found any more")


@pytest.mark.parametrize("how", ["ray.kill", "SIGKILL"])
def test_the_proxy_ends_with_its_actor(cluster: Any, how: str, tmp_path: Path) -> None:
    """Without a word before. Dumps are written where Ray leaves the proxy the time: `ray.kill` kills children
    of the worker too."""
    import ray

    flags = ["--stale-session-dump-path", str(tmp_path)]
    with running(*flags, name="doomed", nodes=[ray.get_runtime_context().get_node_id()]) as (proxy,):
        pids = tree(proxy)
        chatted(proxy, "kept")
        if how == "ray.kill":
            ray.kill(proxy.actor)
        else:
            os.kill(actor_pid(proxy), signal.SIGKILL)
        gone(pids, proxy.address)
        with pytest.raises(ray.exceptions.RayActorError):
            proxy.status()
    dumps = [dump.name for dump in tmp_path.iterdir()]
    assert dumps == ([] if how == "ray.kill" else ["kept-0-active.json"])


def test_the_proxy_ends_with_its_driver(cluster: Any) -> None:
    program = (
        "import ray, sys\n"
        "from areal_fast.integrations.ray import start_proxies\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "for proxy in start_proxies(sys.argv[2:]):\n"
        "    print(proxy.address, proxy.status().pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, cluster.address, *FLAGS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with driver:
        try:
            assert driver.stdout is not None
            told = [driver.stdout.readline().decode().split() for _ in range(2)]
            pids = [pid for _, text in told for pid in (int(text), *descendants(int(text)))]
            assert len(pids) == 8 and all(map(alive, pids))
        finally:
            driver.kill()
    gone(pids, *(address for address, _ in told))


def test_shards_come_through_rays_store_once(cluster: Any) -> None:
    """A reader on the other node gets them; later ones get the large ones from Ray, the proxy not being
    asked."""
    import ray
    import torch
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    made = [
        torch.arange(1 << 18, dtype=torch.int32).reshape(512, 512),
        torch.full((1 << 16,), -2.5).to(torch.bfloat16),
        torch.tensor([[True, False]]),
        torch.tensor(7.25, dtype=torch.float64),
        torch.empty(0, 3),
    ]
    with running(name="shards") as proxies:
        home, away = sorted(proxies, key=lambda proxy: not proxy.is_here)
        assert home.is_here and not away.is_here

        def read(owner: NodeProxy, ids: list[str]) -> list[Any] | None:
            shards = owner.get_shards(ids)
            return shards and [(str(shard.tensor.dtype), shard.tensor) for shard in shards]

        on_node = NodeAffinitySchedulingStrategy(away.node_id, soft=False)
        reader = ray.remote(read).options(scheduling_strategy=on_node, num_cpus=0)
        with Client(home.url, ADMIN) as client:
            ids = [client.put(tensor).shard_id for tensor in made]
            for order in (ids, ids[::-1], ids[:1]):
                got = ray.get(reader.remote(home, order), timeout=120)
                assert got is not None
                for one, (dtype, tensor) in zip(order, got, strict=True):
                    true = made[ids.index(one)]
                    assert dtype == str(true.dtype) and torch.equal(tensor, true)
            shard = (home.get_shards(ids[:1]) or [None])[0]
            assert shard is not None
            shard.tensor.add_(1)  # a copy of its own: what others read stays
            client.delete(ids)
        large, small = ids[:2], ids[2:]
        (_, first), _ = ray.get(reader.remote(home, large), timeout=120)
        assert torch.equal(first, made[0]), "kept by Ray"
        assert ray.get(reader.remote(home, small), timeout=120) is None
        assert ray.get(home.actor.forget.remote(ids)) == 2
        assert home.get_shards(large) is None


def test_a_proxy_that_died_is_told_and_started_again(cluster: Any) -> None:
    import ray

    with running(name="restarted", nodes=[ray.get_runtime_context().get_node_id()]) as (proxy,):
        os.kill(proxy.status().pid, signal.SIGKILL)
        wait_until(lambda: proxy.status().restarts == 1, "it is started again")
        wait_until(lambda: proxy.status().state == "ready", "it answers again")
        assert proxy.status().last_death == f"the proxy at {proxy.address} was killed by SIGKILL"
        with Client(proxy.url, ADMIN) as client:
            assert client.health()["sessions"] == 0
        (found,) = find_proxies("restarted")
        assert found.address == proxy.address


def test_where_one_cannot_start_none_is_left(cluster: Any) -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ProxyFailed, match=f"node {here} .*: the port is in use"):
            start_proxies(lambda node: [*FLAGS, *(["--port", str(port)] if node.id == here else [])])
    wait_until(lambda: find_proxies() == [], "the other was stopped")
    with pytest.raises(config.UsageError, match="--workers"):
        start_proxies([*FLAGS, "--workers", "none"])
    with pytest.raises(ProxyFailed, match="no living nodes of this cluster: nowhere"):
        start_proxies(FLAGS, nodes=["nowhere"])


def test_the_proxy_ends_with_its_node(cluster: Any) -> None:
    import ray

    before = {row["NodeID"] for row in ray.nodes() if row["Alive"]}
    extra = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    (new,) = {row["NodeID"] for row in ray.nodes() if row["Alive"]} - before
    with running(name="drained", nodes=[new]) as (proxy,):
        pids = tree(proxy)
        cluster.remove_node(extra, allow_graceful=False)
        gone(pids, proxy.address)
    wait_until(lambda: new not in {row["NodeID"] for row in ray.nodes() if row["Alive"]}, "Ray knows it")
