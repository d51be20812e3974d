"""The client's ways against a real tree: each gives the same bits, says its name, and steps aside for the
next."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_fast.client import HOST_WAYS, AsyncClient, BadReply, Client, Reference, ShardsNotFound, Way
from areal_fast.protocol.wire import TORCH_ITEMSIZE
from areal_fast.shards.local import LocalShards
from tests.e2e.running import ADMIN, Proxy, wait_until

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
LARGE = 1 << 18
"""Elements: 1 MiB of float32, a file of its own."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as running:
        yield running


def url_of(proxy: Proxy) -> str:
    return f"http://127.0.0.1:{proxy.port}"


@pytest.fixture(params=HOST_WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


def values(seed: int) -> list[Any]:
    """Of every dtype, small; some of awkward shape; one large."""
    made: list[Any] = []
    draw = np.random.default_rng(seed)
    for name, size in TORCH_ITEMSIZE.items():
        if hasattr(torch, name):
            raw = draw.integers(0, 2 if name == "bool" else 64, 6 * size, np.uint8)  # no NaN among them
            made.append(torch.from_numpy(raw).view(getattr(torch, name)).view(2, 3))
    made += [torch.tensor(2.5), torch.empty(0, 3), torch.randn(LARGE), torch.randn(64, 3).t()]
    return [*made, np.arange(6, dtype=">i4").reshape(2, 3), np.array("é")]


def same(shard: Any, value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return np.array_equal(shard.array, value) and shard.array.shape == value.shape
    mine, plain = shard.tensor, value.contiguous()
    if mine.dtype != value.dtype or mine.shape != value.shape:
        return False
    return not value.numel() or torch.equal(mine.view(-1).view(torch.uint8), plain.view(-1).view(torch.uint8))


def test_every_way_gives_the_same(proxy: Proxy, way: Way, seed: int) -> None:
    given = values(seed)
    with Client(url_of(proxy), ADMIN, ways=(way,)) as client:
        references = [client.put(value) for value in given]
        shards = client.get_many(references)
        assert {shard.way for shard in shards} == {way}
        assert client.ways == {way: 2 * len(given)}
        pairs = zip(shards, given, strict=True)
        assert [shard for shard, value in pairs if not same(shard, value)] == []
        assert same(client.get(references[0]), given[0])
        assert client.delete(references) == len(given)
        # what was fetched stays, and is ours to write
        large = next(shard for shard in shards if shard.shape == (LARGE,))
        large.tensor.add_(1)
        assert torch.equal(large.tensor, given[shards.index(large)] + 1)
        with pytest.raises(ShardsNotFound) as caught:
            client.get_many(references[:3])
        assert caught.value.shard_ids == [one.shard_id for one in references[:3]]
        with pytest.raises(ShardsNotFound):
            client.get(references[0])


def test_a_write_is_private(proxy: Proxy, way: Way) -> None:
    with Client(url_of(proxy), ADMIN, ways=(way,)) as client:
        reference = client.put(torch.zeros(LARGE))
        client.get(reference).tensor.fill_(7)
        assert not client.get(reference).tensor.any()
        client.delete([reference])


def test_the_cheapest_is_taken_unasked(proxy: Proxy) -> None:
    with Client(url_of(proxy), ADMIN) as client:
        assert client.get(client.put(torch.zeros(3), "small")).way == "map"
        client.delete(["small"])

    async def the_same() -> Way:
        async with AsyncClient(url_of(proxy), ADMIN) as client:
            found = (await client.get(await client.put(torch.zeros(3), "small"))).way
            await client.delete(["small"])
            return found

    assert asyncio.run(the_same()) == "map"


def test_a_node_elsewhere_is_asked_over_http(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host's abstract sockets are not ours: the name leads nowhere."""
    plain = LocalShards.__init__

    def elsewhere(self: LocalShards, info: Any, *arguments: Any) -> None:
        tried.append(info["socket"])
        plain(self, {"socket": "nobody listens here"}, *arguments)

    tried: list[str] = []
    monkeypatch.setattr(LocalShards, "__init__", elsewhere)
    with Client(url_of(proxy), ADMIN) as client:
        assert [client.get(client.put(torch.zeros(3), "far")).way for _ in range(3)] == ["raw"] * 3
        assert len(tried) == 1, "tried once, not at every call"
        client.delete(["far"])
    with (
        Client(url_of(proxy), ADMIN, ways=("map",)) as client,
        pytest.raises(BadReply, match="take them: map"),
    ):
        client.put(torch.zeros(3))


def test_two_nodes_at_once(proxy: Proxy, way: Way) -> None:
    with Proxy(workers=1) as other, Client(None, ADMIN, ways=(way,)) as reader:
        with Client(url_of(proxy), ADMIN) as one, Client(url_of(other), ADMIN) as two:
            here, there = one.put(torch.tensor([1])).shard_id, two.put(torch.tensor([2])).shard_id
        asked = [Reference(there, f"127.0.0.1:{other.port}"), Reference(here, f"127.0.0.1:{proxy.port}")]
        assert [shard.tensor.item() for shard in reader.get_many(asked * 2)] == [2, 1, 2, 1]
        assert reader.delete(asked) == 2


def test_killed_workers_and_a_new_proxy(way: Way) -> None:
    """Workers die under a client and are bridged; the whole proxy comes back and is found again."""
    with Proxy() as first, Client(url_of(first), ADMIN, ways=(way,)) as client:
        reference = client.put(torch.arange(LARGE))
        before = set(first.worker_pids())
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert torch.equal(client.get(reference).tensor, torch.arange(LARGE))
        wait_until(lambda: len(set(first.worker_pids()) - before) == 2, "successors are up")
        port = first.port
        first.end()
        with Proxy("--port", str(port)):
            client.put(torch.tensor([3]), "anew")
            assert client.get("anew").tensor.tolist() == [3] and client.get("anew").way == way


def test_data_auth_is_shown_everywhere(way: Way) -> None:
    with Proxy("--data-auth", workers=1) as proxy:
        with Client(url_of(proxy), ADMIN, ways=(way,)) as client:
            assert client.get(client.put(torch.tensor([4]))).tensor.tolist() == [4]


def test_mappings_and_descriptors_end_with_their_tensors(proxy: Proxy) -> None:
    def held() -> int:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("areal_fast-shard")
        return maps + len(os.listdir("/proc/self/fd"))

    with Client(url_of(proxy), ADMIN, ways=("map",)) as client:
        references = [client.put(torch.randn(LARGE)) for _ in range(3)]
        client.get_many(references)
        before = held()
        for _ in range(20):
            tensors = [shard.tensor[5:9] for shard in client.get_many(references)]
        assert held() > before
        del tensors
        assert held() == before
        client.delete(references)
