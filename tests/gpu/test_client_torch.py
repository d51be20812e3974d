"""The client with CUDA tensors of torch, on a real GPU; skipped with the reason elsewhere. What of it needs
no GPU is in tests/unit/shards/test_gpu_torch.py, on a stand-in, and in tests/e2e/test_client_gpu.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from areal_fast.client import AsyncClient, Client
from areal_fast.protocol.wire import TORCH_ITEMSIZE
from tests.e2e.running import ADMIN, Proxy
from tests.gpu.conftest import real_driver, why_no_gpu


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if why := why_no_gpu():
        pytest.skip(f"no GPU here: {why}")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch cannot use the GPU")
    torch.cuda.init()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AREAL_FAST_LIBCUDA", real_driver())
        with Proxy("--gpu-pool-bytes", "256M", workers=1) as running:
            yield f"http://127.0.0.1:{running.port}"


def test_every_dtype(url: str) -> None:
    import torch

    with Client(url, ADMIN) as client:
        for name in TORCH_ITEMSIZE:
            kind = getattr(torch, name, None)
            if kind is None:
                continue
            for shape in ((), (0, 3), (3, 5), (1 << 16,)):
                raw = torch.randint(0, 2, (*shape, TORCH_ITEMSIZE[name]), dtype=torch.uint8, device="cuda")
                source = raw.flatten().view(kind).view(shape)
                reference = client.put(source)
                assert (reference.way, reference.why) == ("gpu", ""), name
                for hold in (False, True):
                    with client.get(reference, hold=hold) as shard:
                        tensor = shard.tensor
                        assert shard.way == "gpu" and tensor.is_cuda
                        assert (tensor.dtype, tensor.shape) == (kind, source.shape)
                        assert torch.equal(tensor.flatten().view(torch.uint8), raw.flatten())
                        torch.cuda.synchronize()
                    assert shard.release()
                client.delete([reference])


def test_on_the_callers_stream(url: str) -> None:
    """A put comes after kernels that are still queued on the caller's stream, a get before those that follow;
    also where another thread carries the call out."""
    import torch

    def queued() -> torch.Tensor:
        x = torch.ones(2048, 2048, device="cuda")
        for _ in range(200):
            x = x @ x / 2048
        return x

    async def awaited() -> None:
        async with AsyncClient(url, ADMIN) as client:
            with torch.cuda.stream(torch.cuda.Stream()):
                x = queued()
                shard = await client.get(await client.put(x))
                assert torch.equal(shard.tensor + 1, x + 1)

    with Client(url, ADMIN) as client, torch.cuda.stream(torch.cuda.Stream()):
        x = queued()
        shard = client.get(client.put(x))
        assert torch.equal(shard.tensor + 1, x + 1)
    asyncio.run(awaited())


def test_what_lies_otherwise(url: str) -> None:
    """A tensor that is not contiguous is copied first; one in host memory is none of the GPU's."""
    import torch

    with Client(url, ADMIN) as client:
        source = torch.arange(12, device="cuda").view(3, 4).t()
        assert torch.equal(client.get(client.put(source)).tensor, source)
        here = client.put(torch.arange(12))
        assert here.way == "map" and not client.get(here).tensor.is_cuda


def test_a_full_pool_is_passed_over(url: str) -> None:
    import torch

    with Client(url, ADMIN) as client:
        source = torch.zeros(300 << 20, dtype=torch.uint8, device="cuda")
        reference = client.put(source)
        assert reference.way == "map" and "no room" in reference.why
        assert not client.get(reference).tensor.is_cuda
        client.delete([reference])
