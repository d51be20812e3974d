"""The gpu way: shards between this process's GPU and the keeper's pool on it, device to device.

A process that has a context on a GPU (torch on CUDA, CuPy…), on the host of the node, puts its device
tensors into that GPU's pool and has such shards copied out of it, or mapped and held. Another process has no
GPU here (shards/devices.py), and nothing of this runs.

get    lease, copy into memory of one's own, release: the release says whether the bytes were the shard's all
       the time. If not, once more; if the shard is gone, the next way says so.
hold   lease; the memory is the pool's own, and stays until `Shard.release` or the end of this process.
put    reserve, copy, commit, on the stream the tensor was made on. A full pool, or no keeper: the next way.

Streams. torch's current stream is a thread's own, and calls may be carried out in other threads: `Gpus` notes
the streams when a call begins, and memory is made for, and copied on, the caller's.

Torch is used, not imported: who wants tensors on a GPU has imported it.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

from areal_fast.client.shards import Shard
from areal_fast.shards.description import own_form
from areal_fast.shards.devices import CudaError, DeviceArray, Memory, active_gpus
from areal_fast.shards.gpu import TRIES, GpuClient, GpuShardError, GpuShardStale, Lease
from areal_fast.shards.gpu_torch import device_array, new_array, tensor_of

if TYPE_CHECKING:
    import torch
    from _typeshed import ReadableBuffer as Buffer


class Gpus:
    """The GPUs of this process when a call begins, in its caller's thread. ordinals: by UUID. why: if the
    driver does not say which they are."""

    def __init__(self) -> None:
        self.ordinals: dict[str, int] = {}
        self.why = ""
        try:
            self.ordinals = active_gpus()
        except CudaError as error:
            self.why = f"gpu: {error}"
        self._streams: dict[int, Any] = {}
        torch = _torch_on_cuda() if self.ordinals else None
        if torch is not None:
            self._streams = {n: torch.cuda.current_stream(n) for n in self.ordinals.values()}

    def room(self, dtype: str, shape: tuple[int, ...], ordinal: int) -> DeviceArray:
        """Memory for a tensor: torch's, where torch uses the GPU, else the driver's. CudaError."""
        stream = self._streams.get(ordinal)
        if stream is not None:
            return new_array(dtype, shape, ordinal, stream)
        array = DeviceArray(0, dtype, shape, ordinal)
        array.owner = memory = Memory(ordinal, array.nbytes)
        array.pointer = memory.pointer
        return array


def _torch_on_cuda() -> Any:
    """torch, if this process uses it on a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def on_device(value: Any) -> DeviceArray | None:
    """What is to be put, if it is in device memory. TypeError for a CUDA tensor that is no dense one."""
    if isinstance(value, DeviceArray):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor) and value.is_cuda:
        return device_array(value)
    return None


class GpuShard(Shard):
    """A shard on a GPU. `device`: where; `tensor`: a CUDA tensor over that memory, no copy; `data` and
    `array`: its bytes copied to the host."""

    device: DeviceArray

    def __init__(self, shard_id: str, node: str, device: DeviceArray, lease: Lease | None = None) -> None:
        super().__init__(shard_id, node, "gpu", device.dtype, device.shape, b"", own_form(device.dtype))
        self.device = device
        self._lease = lease

    @property
    def data(self) -> Buffer:
        return self._on_host

    @cached_property
    def _on_host(self) -> Buffer:
        return self.device.to_host()

    @cached_property
    def tensor(self) -> torch.Tensor:
        return tensor_of(self.device)

    def release(self) -> bool:
        if self._lease is None:
            return True
        try:
            return self._lease.release()
        except GpuShardError:
            return False  # nobody is left who could say so


def take(keeper: GpuClient, shard_id: str, node: str, gpus: Gpus, *, hold: bool) -> GpuShard:
    """A shard out of the pool, copied, or held where it is. GpuShardError, CudaError."""
    for _ in range(TRIES):
        lease = keeper.map(shard_id)
        if hold:
            where = DeviceArray(lease.pointer, lease.dtype, lease.shape, lease.ordinal, owner=lease)
            return GpuShard(shard_id, node, where, lease)
        try:
            target = gpus.room(lease.dtype, lease.shape, lease.ordinal)
            lease.copy_out(target.pointer, target.stream)
        finally:
            valid = lease.release()
        if valid:
            return GpuShard(shard_id, node, target)
    raise GpuShardStale("the pool goes away again and again")
