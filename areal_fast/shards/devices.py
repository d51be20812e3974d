"""What this process has of GPUs: the devices it uses already, and tensors' bytes in their memory. No torch.

A GPU counts here only if this process has a context on it (torch, CuPy or whoever made one): opening another
would cost half a gigabyte of its memory, for a process that may never have wanted it. Nothing here loads the
driver; who has a context has loaded it. So to ask costs a few microseconds where there is no CUDA.

Devices are known by UUID; an ordinal is this process's number for one, torch's too, in whatever order
CUDA_VISIBLE_DEVICES has them. A child made by fork has no GPUs: the driver does not survive a fork.
"""

from __future__ import annotations

import os
import threading
from math import prod
from typing import Any, Final

import numpy as np

from areal_fast.config import cuda_library
from areal_fast.core._cuda import CudaError, Device, Driver, is_loaded
from areal_fast.protocol.gpu import uuid_text
from areal_fast.protocol.wire import TORCH_ITEMSIZE

__all__ = ["CudaError", "DeviceArray", "Memory", "active_gpus", "device", "interface", "library", "uuid_of"]

CONTIGUOUS: Final = None
"""The strides of __cuda_array_interface__ for memory in C order."""

_drivers: dict[tuple[int, str], Driver] = {}
_devices: dict[tuple[int, str, int], Device] = {}
_lock = threading.Lock()


def library() -> str:
    """The driver that this process's part in GPU shards uses."""
    return cuda_library()


def _driver() -> Driver | None:
    """This process's driver; None if nobody here has loaded it. CudaError if it came by a fork."""
    path = library()
    if not is_loaded(path):
        return None
    known = (os.getpid(), path)
    with _lock:
        if known not in _drivers:
            _drivers[known] = Driver(path)
        return _drivers[known]


def active_gpus() -> dict[str, int]:
    """The GPUs that this process has a context on: UUID → ordinal. CudaError if the driver cannot say."""
    driver = _driver()
    if driver is None:
        return {}
    return {uuid_text(driver.uuid(n)): n for n in range(driver.count) if driver.is_active(n)}


def uuid_of(ordinal: int) -> str:
    """CudaError if this process has no such device."""
    driver = _driver()
    if driver is None:
        raise CudaError("no CUDA driver is loaded in this process", -1)
    return uuid_text(driver.uuid(ordinal))


def device(ordinal: int) -> Device:
    """The device, its context retained for this process's life. CudaError."""
    driver = _driver()
    if driver is None:
        raise CudaError("no CUDA driver is loaded in this process", -1)
    with _lock:
        known = (os.getpid(), driver.path, ordinal)
        if known not in _devices:
            _devices[known] = driver.open(ordinal)
        return _devices[known]


class Memory:
    """Device memory that is freed with the last who has this."""

    def __init__(self, ordinal: int, nbytes: int) -> None:
        self._pid = os.getpid()
        self._device = device(ordinal)
        self.pointer = self._device.alloc(nbytes) if nbytes else 0

    def __del__(self) -> None:
        pointer, self.pointer = getattr(self, "pointer", 0), 0
        if pointer and self._pid == os.getpid():
            self._device.free(pointer)


class DeviceArray:
    """A tensor's bytes in device memory, in C order: `nbytes` at `pointer` on the device `ordinal`.

    dtype: as torch names it ("bfloat16"). owner: what keeps the memory; it is kept as long as this. stream:
    what is queued there (a CUstream as an integer) comes before the bytes are read. Libraries that know
    __cuda_array_interface__ (CuPy, Numba, torch) take it as it is, where numpy has the dtype.
    """

    def __init__(
        self,
        pointer: int,
        dtype: str,
        shape: tuple[int, ...],
        ordinal: int = 0,
        *,
        owner: object = None,
        stream: int = 0,
    ) -> None:
        self.pointer = pointer
        self.dtype = dtype
        self.shape = tuple(shape)
        self.ordinal = ordinal
        self.nbytes = prod(self.shape) * TORCH_ITEMSIZE[dtype]
        self.owner = owner
        self.stream = stream

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype}{list(self.shape)} on GPU {self.ordinal}>"

    def to_host(self) -> memoryview:
        """Its bytes, copied. After what is queued on `stream`. CudaError."""
        target = np.empty(self.nbytes, np.uint8)
        if self.nbytes:
            device(self.ordinal).read(self.pointer, target.data, self.stream)
        return target.data

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        kind = np.dtype(getattr(np, self.dtype.replace("bool", "bool_"), "V0"))
        if not kind.itemsize:
            raise AttributeError(f"__cuda_array_interface__: numpy has no {self.dtype}")
        return interface(self.pointer, self.shape, kind.str)


def interface(pointer: int, shape: tuple[int, ...], typestr: str) -> dict[str, Any]:
    """The fields of __cuda_array_interface__, version 3. Writable: torch takes no read-only arrays."""
    return {
        "shape": shape,
        "typestr": typestr,
        "data": (pointer, False),
        "version": 3,
        "strides": CONTIGUOUS,
        "stream": None,  # finished before it is shown: nothing to wait for
    }
