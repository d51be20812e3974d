"""The torch edge of GPU shards on a stand-in for torch's CUDA: tensors over the fake driver's memory, which
is the host's. What it cannot show (real streams, real pointers) is in tests/gpu."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from areal_fast.client import gpu as client_gpu
from areal_fast.shards import gpu_torch
from areal_fast.shards.devices import CudaError, DeviceArray, Memory
from tests import fakecuda
from tests.devices import Gpus, held_bytes

torch = pytest.importorskip("torch")


class OnGpu(torch.Tensor):  # type: ignore[misc]
    """A tensor that says that it is on cuda:1."""

    is_cuda = True
    device = torch.device("cuda", 1)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch.cuda as if it were there: the streams that were made current, innermost last. Memory is the fake
    driver's."""
    current = [0]

    class Using:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            current.append(self.stream.cuda_stream)

        def __exit__(self, *exc: object) -> None:
            current.pop()

    def empty(shape: int, *, dtype: Any, device: Any) -> Any:
        if shape > 1 << 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append((device, current[-1]))
        memory = Memory(device.index, shape)
        kept.append(memory)
        return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * shape).from_address(memory.pointer)))

    made: list[Any] = []
    kept: list[Memory] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=current[-1])
    )
    monkeypatch.setattr(torch.cuda, "stream", Using)
    monkeypatch.setattr(torch, "empty", empty)
    yield current
    assert current == [0]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    monkeypatch.setenv("FAKECUDA_DEVICES", "2")
    with Gpus(fakecuda.library(), count=2) as made:
        yield made


def test_what_is_put_of_a_tensor(streams: list[int]) -> None:
    plain = torch.arange(12, dtype=torch.int16).view(3, 4)
    streams.append(7)
    whole = gpu_torch.device_array(plain.as_subclass(OnGpu))
    assert (whole.dtype, whole.shape, whole.ordinal, whole.stream) == ("int16", (3, 4), 1, 7)
    assert whole.pointer == plain.data_ptr()
    turned = gpu_torch.device_array(plain.t().as_subclass(OnGpu))
    assert turned.shape == (4, 3) and turned.pointer != plain.data_ptr()
    at = (ctypes.c_int16 * 12).from_address(turned.pointer)
    assert list(at) == plain.t().flatten().tolist(), "made contiguous, and kept by `owner`"
    with pytest.raises(TypeError, match="dense tensor"):
        gpu_torch.device_array(plain.to_sparse())
    streams.pop()


def test_only_tensors_in_device_memory_count(streams: list[int]) -> None:
    plain = torch.arange(3)
    assert client_gpu.on_device(plain) is None and client_gpu.on_device(np.zeros(3)) is None
    assert client_gpu.on_device(plain.as_subclass(OnGpu)) is not None
    array = DeviceArray(16, "int8", (1,))
    assert client_gpu.on_device(array) is array


def test_memory_is_made_on_the_callers_stream(streams: list[int], gpus: Gpus) -> None:
    """Noted when the call begins, used by whoever carries it out."""
    streams.append(9)
    here = client_gpu.Gpus()
    assert sorted(here.ordinals.values()) == [0, 1]
    streams.pop()
    array = here.room("bfloat16", (2, 3), 1)
    assert (array.ordinal, array.stream, array.nbytes) == (1, 9, 12)
    tensor = gpu_torch.tensor_of(array)
    assert tensor.dtype == torch.bfloat16 and tensor.shape == (2, 3)
    assert tensor.data_ptr() == array.pointer
    tensor.fill_(1.0)
    assert held_bytes(array) == b"\x80\x3f" * 6
    with pytest.raises(CudaError, match="out of memory"):
        here.room("uint8", (1 << 31,), 0)


def test_every_dtype_is_seen_in_place(streams: list[int], gpus: Gpus) -> None:
    from areal_fast.protocol.wire import TORCH_ITEMSIZE

    with pytest.raises(TypeError, match="no dtype float7"):
        strange = gpu_torch.new_array("int8", (1,), 0)
        strange.dtype = "float7"
        gpu_torch.tensor_of(strange)
    for name in TORCH_ITEMSIZE:
        if hasattr(torch, name):
            for shape in ((2, 3), ()):
                array = gpu_torch.new_array(name, shape, 0)
                tensor = gpu_torch.tensor_of(array)
                assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{name}", shape)
                assert tensor.data_ptr() == array.pointer
