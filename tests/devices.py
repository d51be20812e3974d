"""Device memory for tests, on the fake driver or a real one: tensors' bytes as DeviceArrays, without torch.

`Gpus(library)` makes this process one that uses every GPU of that driver, as far as the package can tell (it
has a context on each), until it is closed.
"""

from __future__ import annotations

import numpy as np
import pytest

from areal_fast.core._cuda import KIND_HANDLE, Driver
from areal_fast.shards.devices import DeviceArray, Memory, device


class Gpus:
    """See the top of the file."""

    def __init__(self, library: str, count: int = 1) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setenv("AREAL_FAST_LIBCUDA", library)
        driver = Driver(library)
        self.library = library
        self.devices = [driver.open(n) for n in range(count)]

    def array(self, dtype: str, shape: tuple[int, ...], data: bytes, ordinal: int = 0) -> DeviceArray:
        """`data`, in new memory of this device."""
        memory = Memory(ordinal, len(data))
        if data:
            window = self.devices[ordinal].create_pool(len(data), KIND_HANDLE)
            window.from_host(0, data)
            window.copy_out(0, memory.pointer, len(data))
            window.close()
        return DeviceArray(memory.pointer, dtype, shape, ordinal, owner=memory)

    def close(self) -> None:
        self._patch.undo()

    def __enter__(self) -> Gpus:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def held_bytes(array: DeviceArray) -> bytes:
    """What is at a DeviceArray now."""
    out = np.empty(array.nbytes, np.uint8)
    if array.nbytes:
        device(array.ordinal).read(array.pointer, out.data)
    return out.tobytes()
