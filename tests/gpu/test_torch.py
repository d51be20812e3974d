"""GPU shards as torch tensors, on a real GPU with a torch that can use it; skipped with the reason
elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from areal_fast.protocol import gpu as wire
from areal_fast.shards.gpu_torch import get_tensor, map_tensor, put_tensor
from tests.gpu.conftest import real_driver, why_no_gpu
from tests.gpu.keeping import Keeping

DTYPES = ("float32", "bfloat16", "float16", "int64", "bool", "float8_e4m3fn")


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    if why := why_no_gpu():
        pytest.skip(f"no GPU here: {why}")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch cannot use the GPU")
    with Keeping(real_driver()) as made:
        made.start()
        made.gpu = wire.uuid_bytes(made.hear("keeper")["gpu"])
        yield made


@pytest.mark.parametrize("name", DTYPES)
def test_round_trip(keeping: Keeping, name: str) -> None:
    import torch

    with keeping.client() as client:
        device = torch.device("cuda", client.ordinal)
        for shape in ((3, 5), (), (0, 4), (1 << 18,)):
            source = torch.randint(0, 2, shape, device=device).to(getattr(torch, name))
            put_tensor(client, "t", source)
            same = source.view(torch.uint8) if shape else source
            got = get_tensor(client, "t")
            assert got.dtype == source.dtype and got.shape == source.shape
            assert torch.equal(got.view(torch.uint8) if shape else got, same)
            mapped, lease = map_tensor(client, "t")
            assert torch.equal(mapped.view(torch.uint8) if shape else mapped, same)
            torch.cuda.synchronize()
            del mapped
            assert lease.release()


def test_a_copy_comes_after_queued_work(keeping: Keeping) -> None:
    """The producer's kernels on a stream of its own are still running when put is called."""
    import torch

    with keeping.client() as client, torch.cuda.stream(torch.cuda.Stream(client.ordinal)):
        x = torch.ones(1024, 1024, device=torch.device("cuda", client.ordinal))
        for _ in range(200):
            x = x @ x / 1024
        put_tensor(client, "t", x[:64].contiguous())
        torch.cuda.synchronize()
        assert torch.equal(get_tensor(client, "t"), x[:64])


def test_a_tensor_of_another_device_is_refused(keeping: Keeping) -> None:
    import torch

    with keeping.client() as client, pytest.raises(ValueError, match="on cpu"):
        put_tensor(client, "t", torch.ones(2))
