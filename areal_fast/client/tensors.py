"""The torch edge: tensors over the bytes that came, and the bytes of tensors that go. No copies.

A tensor is made over a numpy array of bytes, which holds what it was made over (a reply's memory, a mapping);
torch holds the array through the tensor's storage. So a mapping lives as long as any tensor, view or slice of
it, and ends with the last. torch.frombuffer would not do: it lets the buffer go. DLPack would not either: its
read-only flag is ignored.

The memory must be writable and nobody else's: a reply's own, or a private mapping, where a write makes a page
of one's own. torch is imported when the first tensor is made, never before.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from areal_fast.protocol.wire import TORCH_ITEMSIZE

if TYPE_CHECKING:
    import torch
    from _typeshed import ReadableBuffer as Buffer

    from areal_fast.protocol.wire import Form


def tensor_over(data: Buffer, dtype: str, shape: tuple[int, ...], form: Form = "own") -> torch.Tensor:
    """A tensor of this torch dtype and shape over `data`: its elements, little-endian, in C order.

    form: as protocol/wire.py keeps it. "wide": float32 that are to become a small float; "meta": no data.
    ValueError if the data do not fit; TypeError for a dtype that the installed torch does not have.
    """
    import torch

    kind = torch_dtype(dtype)
    if form == "meta":
        return torch.empty(shape, dtype=kind, device="meta")
    if form == "wide":
        return tensor_over(data, "float32", shape).to(kind)
    nbytes = memoryview(data).nbytes
    if nbytes != prod(shape) * TORCH_ITEMSIZE[dtype]:
        raise ValueError(f"{nbytes} bytes are no {dtype} of shape {list(shape)}")
    if not nbytes:  # torch cannot look at numpy's empty arrays as another dtype
        return torch.empty(0, dtype=torch.uint8).view(kind).view(shape)
    array = np.frombuffer(memoryview(data), np.uint8)
    if not array.flags.writeable or array.ctypes.data % TORCH_ITEMSIZE[dtype]:
        array = array.copy()
    flat = torch.from_numpy(array)
    return flat.view(kind).view(shape)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype "float32" names. TypeError if the installed torch has none of that name."""
    import torch

    found = getattr(torch, name, None) if name in TORCH_ITEMSIZE else None
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch {torch.__version__} has no dtype {name}; .array gives the bytes")
    return found


def bytes_of(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], memoryview]:
    """(dtype, shape, bytes) of a tensor; over its own memory where it lies in C order on the CPU.

    TypeError for what has no such bytes: sparse, quantized, nested and meta tensors.
    """
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in TORCH_ITEMSIZE or tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(f"a shard is a dense tensor with data, not {tensor.layout} of {tensor.dtype}")
    shape = tuple(tensor.shape)
    if not tensor.numel():
        return dtype, shape, memoryview(b"")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    array: Any = plain.view(-1).view(torch.uint8).numpy()
    return dtype, shape, array.data
