"""GPU shards as torch tensors: the thin edge between GpuClient and torch, which is imported when first used.

Tensors must be contiguous and on the pool's device. Copies run on torch's current stream of that device, so
they come after what the caller has queued there; they are finished when these functions return.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from areal_fast.shards.gpu import GpuClient, Lease


def put_tensor(client: GpuClient, shard_id: str, tensor: torch.Tensor) -> None:
    """Publish a CUDA tensor. ValueError if it is on another device; errors as GpuClient.put."""
    import torch

    if tensor.device.type != "cuda" or tensor.device.index != client.ordinal:
        raise ValueError(f"a tensor on cuda:{client.ordinal} is needed, not on {tensor.device}")
    source = tensor.detach().contiguous()
    stream = torch.cuda.current_stream(source.device).cuda_stream
    dtype = str(source.dtype).removeprefix("torch.")
    client.put(shard_id, source.data_ptr(), dtype, tuple(source.shape), stream)


def get_tensor(client: GpuClient, shard_id: str) -> torch.Tensor:
    """A new CUDA tensor with the shard's bytes. Errors as GpuClient.get_into."""
    import torch

    device = torch.device("cuda", client.ordinal)
    stream = torch.cuda.current_stream(device).cuda_stream
    with client.map(shard_id) as lease:
        out = torch.empty(lease.shape, dtype=getattr(torch, lease.dtype), device=device)
    client.get_into(shard_id, out.data_ptr(), out.numel() * out.element_size(), stream)
    return out


def map_tensor(client: GpuClient, shard_id: str) -> tuple[torch.Tensor, Lease]:
    """(tensor over the pool's own memory, its lease): no copy. Never write into it. Synchronize what reads
    it, then release the lease: True says that the bytes were the shard's all the time."""
    import torch

    lease = client.map(shard_id)
    device, dtype = torch.device("cuda", lease.ordinal), getattr(torch, lease.dtype)
    if lease.nbytes == 0:
        return torch.empty(lease.shape, dtype=dtype, device=device), lease
    flat = torch.as_tensor(_Bytes(lease), device=device)
    return flat.view(dtype).view(lease.shape), lease


class _Bytes:
    """The leased bytes as an object that torch wraps without copying; torch keeps it, so it keeps the
    lease."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self._lease.nbytes,),
            "typestr": "|u1",
            "data": (self._lease.pointer, False),  # torch takes no read-only arrays
            "version": 3,
            "stream": None,  # published before it was leased: nothing to wait for
        }
