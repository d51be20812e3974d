"""GPU shards as torch tensors: the thin edge between device memory and torch, which is imported when first
used.

Copies run on torch's current stream of the device, so they come after what the caller has queued there; they
are finished when these functions return. Memory for a shard comes from torch's own allocator, on the stream
it is then used on.
"""

from __future__ import annotations

from contextlib import nullcontext
from math import prod
from typing import TYPE_CHECKING, Any

from areal_fast.core._cuda import CudaError
from areal_fast.protocol.wire import TORCH_ITEMSIZE
from areal_fast.shards.devices import DeviceArray, interface
from areal_fast.shards.gpu import TRIES, GpuShardStale

if TYPE_CHECKING:
    import torch

    from areal_fast.shards.gpu import GpuClient, Lease

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""


def device_array(tensor: torch.Tensor) -> DeviceArray:
    """A CUDA tensor's bytes; it is made contiguous where it is not. TypeError for what has no such bytes:
    sparse, quantized and nested tensors."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in TORCH_ITEMSIZE or tensor.layout is not torch.strided:
        raise TypeError(f"a shard is a dense tensor with data, not {tensor.layout} of {tensor.dtype}")
    source = tensor.detach().resolve_conj().resolve_neg().contiguous()
    stream = torch.cuda.current_stream(source.device).cuda_stream
    ordinal = source.device.index or 0
    shape = tuple(source.shape)
    return DeviceArray(source.data_ptr(), dtype, shape, ordinal, owner=source, stream=stream)


def new_array(dtype: str, shape: tuple[int, ...], ordinal: int, stream: Any = None) -> DeviceArray:
    """Room for a tensor, out of torch's allocator. stream: a torch stream that it is to be used on, the
    current one if none is given. CudaError if there is no memory."""
    import torch

    on = nullcontext() if stream is None else torch.cuda.stream(stream)
    device = torch.device("cuda", ordinal)
    try:
        with on:
            made = torch.empty(prod(shape) * TORCH_ITEMSIZE[dtype], dtype=torch.uint8, device=device)
            queue = torch.cuda.current_stream(device).cuda_stream
    except torch.OutOfMemoryError as error:
        raise CudaError(str(error), OUT_OF_MEMORY) from None
    return DeviceArray(made.data_ptr(), dtype, shape, ordinal, owner=made, stream=queue)


def tensor_of(array: DeviceArray) -> torch.Tensor:
    """The same bytes as a CUDA tensor, which keeps them; no copy. TypeError for a dtype that the installed
    torch does not have."""
    import torch

    kind = getattr(torch, array.dtype, None)
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"torch {torch.__version__} has no dtype {array.dtype}")
    device = torch.device("cuda", array.ordinal)
    if isinstance(array.owner, torch.Tensor):
        flat = array.owner
        if (flat.dtype, tuple(flat.shape)) == (kind, array.shape):
            return flat
    elif array.nbytes:
        flat = torch.as_tensor(_Bytes(array), device=device)
    else:
        flat = torch.empty(0, dtype=torch.uint8, device=device)
    return flat.view(kind).view(array.shape)


def put_tensor(client: GpuClient, shard_id: str, tensor: torch.Tensor) -> None:
    """Publish a CUDA tensor. ValueError if it is on another device; errors as GpuClient.put."""
    if tensor.device.type != "cuda" or tensor.device.index != client.ordinal:
        raise ValueError(f"a tensor on cuda:{client.ordinal} is needed, not on {tensor.device}")
    source = device_array(tensor)
    client.put(shard_id, source.pointer, source.dtype, source.shape, source.stream)


def get_tensor(client: GpuClient, shard_id: str) -> torch.Tensor:
    """A new CUDA tensor with the shard's bytes. GpuShardNotFound, GpuShardStale, CudaError."""
    for _ in range(TRIES):
        with client.map(shard_id) as lease:
            target = new_array(lease.dtype, lease.shape, lease.ordinal)
            lease.copy_out(target.pointer, target.stream)
        if lease.valid:
            return tensor_of(target)
    raise GpuShardStale("the pool goes away again and again")


def map_tensor(client: GpuClient, shard_id: str) -> tuple[torch.Tensor, Lease]:
    """(tensor over the pool's own memory, its lease): no copy. Never write into it. Synchronize what reads
    it, then release the lease: True says that the bytes were the shard's all the time."""
    lease = client.map(shard_id)
    array = DeviceArray(lease.pointer, lease.dtype, lease.shape, lease.ordinal, owner=lease)
    return tensor_of(array), lease


class _Bytes:
    """The bytes of an array as an object that torch wraps without copying; torch keeps it, so it keeps their
    owner."""

    def __init__(self, array: DeviceArray) -> None:
        self._array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return interface(self._array.pointer, (self._array.nbytes,), "|u1")
