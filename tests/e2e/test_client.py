"""The client against a real tree: whole lives, killed workers, repeats. Blocking and for asyncio alike."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from areal_fast.client import (
    AsyncClient,
    Client,
    InvalidRequest,
    KeyBound,
    NotFound,
    NotReady,
    ShardsNotFound,
    Unauthorized,
)
from tests.e2e.running import ADMIN, Proxy, wait_until

torch = pytest.importorskip("torch")
pytest.importorskip("openai")


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as running:
        yield running


@pytest.fixture
def client(proxy: Proxy) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{proxy.port}", ADMIN) as made:
        yield made


def say(chat: Any, text: str = "hi") -> Any:
    return chat.chat.completions.create(
        model="default", messages=[{"role": "user", "content": text}], max_tokens=16
    )


def test_a_life_ends_as_a_batch_of_tensors(client: Client) -> None:
    with client.start_session("life") as session:
        chat = session.openai()
        replies = [say(chat, f"turn {number}") for number in range(3)]
        reward = session.set_reward(0.5)
    assert (reward.interaction_count, reward.trajectory_ready, reward.ready_transition) == (3, True, True)
    batch = client.export(session, discount=0.5)
    assert batch and batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape[0] == 3
    assert batch["rewards"].tolist() == [0.125, 0.25, 0.5]
    lengths = [reply.usage.prompt_tokens + reply.usage.completion_tokens for reply in replies]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["versions"][batch["loss_mask"] == 0].unique().tolist() == [-1]
    assert sum(batch.ways.values()) == len(batch.batch) == len(batch.references)
    with pytest.raises(ShardsNotFound):  # what was fetched is freed
        client.get(batch.references["input_ids"])
    with pytest.raises(Unauthorized, match="exported and removed"):
        session.set_reward(1.0)
    assert not client.export(session)


def test_interactions_one_by_one(client: Client) -> None:
    session = client.start_session("single")
    with pytest.raises(NotReady, match="reward first"):
        client.export(session, form="interactions")
    with pytest.raises(InvalidRequest, match="No interactions"):
        session.set_reward(1.0)
    chat = session.openai()
    ids = [say(chat, f"turn {number}").id for number in range(2)]
    session.set_reward(0.25, ids[0])
    found = client.export(session, form="interactions", fetch=False)
    session.close()
    assert list(found.interactions) == ids and not found.batch
    one = found.interactions[ids[0]]
    assert one.reward == 0.25 and not one.tensors
    shapes = {name: list(reference.shape or ()) for name, reference in one.references.items()}
    shards = client.get_many(list(one.references.values()))
    assert {name: list(shard.tensor.shape) for name, shard in zip(shapes, shards, strict=True)} == shapes
    assert client.delete(found.all_references()) == 12
    with pytest.raises(NotFound, match="Check the id"):
        client.export(session, form="interactions")


def test_groups_start_together_and_merge(client: Client) -> None:
    sessions = client.start_group("group", 3)
    assert len({session.group_id for session in sessions}) == 1
    for number, session in enumerate(sessions):
        with session:
            say(session.openai())
            session.set_reward(number)
    batch = client.export(sessions, group_id=sessions[0].group_id)
    assert batch["rewards"].tolist() == [0.0, 1.0, 2.0]


def test_refusals_say_what_to_do(client: Client, proxy: Proxy) -> None:
    client.start_session("mine", api_key="a-key")
    with pytest.raises(KeyBound, match="Reward and export that session first"):
        client.start_session("yours", api_key="a-key")
    with Client(f"http://127.0.0.1:{proxy.port}", "wrong") as stranger:
        with pytest.raises(Unauthorized, match="--admin-api-key"):
            stranger.start_session("x")
    with pytest.raises(InvalidRequest, match=r"body\.style"):
        client.export("x", style="concat")


def test_versions_pause_and_health(client: Client) -> None:
    client.set_version(7)
    assert client.get_version() == 7
    client.pause()
    assert client.health()["paused"] is True
    client.resume()
    assert client.health()["paused"] is False


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12.0).reshape(3, 4),
        torch.tensor(5, dtype=torch.int64),
        torch.empty((0, 3), dtype=torch.float16),
        torch.tensor([True, False]),
        torch.randn(300, 400).to(torch.bfloat16).t(),
        torch.randn(7, 5).to(torch.float8_e4m3fn),
        torch.randn(4, dtype=torch.complex64).conj(),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}",
)
def test_tensors_travel_exactly(client: Client, value: Any) -> None:
    shard = client.get(client.put(value))
    assert shard.tensor.dtype == value.dtype and shard.tensor.shape == value.shape
    as_bytes = value.contiguous().resolve_conj().view(-1).view(torch.uint8)
    assert torch.equal(shard.tensor.contiguous().view(-1).view(torch.uint8), as_bytes)
    assert shard.way in client.ways
    assert client.delete([shard.id]) == 1


def test_arrays_travel_too(client: Client) -> None:
    for value in (np.arange(6, dtype=">i4").reshape(2, 3), np.array("é"), np.zeros((0, 2)), np.array(1.5)):
        shard = client.get(client.put(value, "array"))
        assert np.array_equal(shard.array, value) and shard.array.shape == value.shape
    with pytest.raises(TypeError):
        client.put([1, 2])


def test_missing_shards_are_named(client: Client) -> None:
    here = client.put(torch.zeros(1), "here")
    with pytest.raises(ShardsNotFound) as caught:
        client.get_many([here, "gone", "also gone"])
    assert caught.value.shard_ids == ["gone", "also gone"]
    with pytest.raises(ShardsNotFound) as caught:
        client.get("odd/ id?#%")
    assert caught.value.shard_ids == ["odd/ id?#%"]


def test_the_same_from_asyncio(proxy: Proxy) -> None:
    async def life() -> None:
        async with AsyncClient(f"http://127.0.0.1:{proxy.port}", ADMIN) as client:
            sessions = await client.start_group("async", 2)

            async def episode(session: Any) -> None:
                async with session:
                    chat = session.openai()
                    await chat.chat.completions.create(
                        model="x", messages=[{"role": "user", "content": "hi"}], max_tokens=8
                    )
                    await session.set_reward(1.0)

            await asyncio.gather(*map(episode, sessions))
            batch = await client.export(sessions)
            assert batch["rewards"].tolist() == [1.0, 1.0]
            big = torch.randn(1 << 20)
            shard = await client.get(await client.put(big))
            assert torch.equal(shard.tensor, big)
            shard.tensor.zero_()  # ours to write
            assert not torch.equal((await client.get(shard.id)).tensor, shard.tensor)
            assert await client.delete([shard.id]) == 1
            with pytest.raises(ShardsNotFound):
                await client.get(shard.id)

    asyncio.run(life())


def test_a_killed_worker_is_bridged() -> None:
    """Every worker is killed in turn while a client works; only a start may say that it does not know."""
    with Proxy() as proxy, Client(f"http://127.0.0.1:{proxy.port}", ADMIN) as client:
        for round_ in range(2):
            session = client.start_session("bridged")
            chat = session.openai()
            say(chat)
            reference = client.put(torch.arange(1000), f"kept {round_}")
            before = set(proxy.worker_pids())
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            assert torch.equal(client.get(reference).tensor, torch.arange(1000))
            say(chat, "again")
            assert session.set_reward(1.0).interaction_count == 2
            batch = client.export(session)
            assert batch["input_ids"].shape[0] == 2
            session.close()
            wait_until(lambda: len(set(proxy.worker_pids()) - before) == 2, "successors are up")  # noqa: B023
