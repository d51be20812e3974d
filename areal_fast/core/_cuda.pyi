"""The CUDA driver as the keeper and its clients see it: a device by number, one pool on it, finished copies.

Importing opens nothing. Every failure of the driver is a CudaError with the driver's own name for it; sizes
and offsets outside the pool are BadArgument. Addresses are device addresses as integers, streams are CUDA's
stream handles as integers (0: the legacy default stream), sizes and offsets are bytes.
"""

from typing import Never, final

from _typeshed import ReadableBuffer, WriteableBuffer

KIND_FD: int
"""The pool's memory is handed on as a file descriptor, and outlives who made it."""
KIND_HANDLE: int
"""By a 64-byte IPC handle; it dies with its maker."""
OWN_STREAM: int
"""As `stream`: one of ours, which waits for nothing that the caller has queued."""

class CudaError(Exception):
    """A call of the driver failed, or there is none. str() says which and why; `code` is its CUresult, or
    negative."""

    code: int
    def __init__(self, message: str, code: int) -> None: ...

def is_loaded(path: str) -> bool:
    """Whether something in this process has loaded this library. Loads nothing."""

@final
class Driver:
    def __init__(self, path: str) -> None:
        """dlopen and initialise; CudaError if there is no driver, an old one, or no device."""

    path: str
    @property
    def version(self) -> int:
        """12040 is 12.4."""

    @property
    def count(self) -> int:
        """Devices that this process may use."""

    def uuid(self, ordinal: int) -> bytes:
        """16 bytes."""

    def name(self, ordinal: int) -> str: ...
    def is_active(self, ordinal: int) -> bool:
        """Whether this process has a context on that device, whoever made it. Makes none."""

    def open(self, ordinal: int) -> Device:
        """Retain the device's primary context (about 0.3 to 0.5 GB of device memory if this process has
        none)."""

@final
class Device:
    def __init__(self, *args: Never, **kwargs: Never) -> None:
        """TypeError: Driver.open makes one."""

    driver: Driver
    uuid: bytes
    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""

    def exports_fds(self) -> bool:
        """Whether pools of KIND_FD can be had."""

    def alloc(self, nbytes: int) -> int:
        """Plain device memory. Free it."""

    def free(self, address: int) -> None: ...
    def read(self, address: int, target: WriteableBuffer, stream: int = 0) -> None:
        """Device memory of this process to the host, after what is queued on `stream`."""

    def create_pool(self, nbytes: int, kind: int) -> Pool:
        """A new pool of at least `nbytes`."""

    def import_fd(self, fd: int, nbytes: int) -> Pool:
        """Map a pool of KIND_FD; `fd` stays the caller's."""

    def import_handle(self, handle: bytes, nbytes: int) -> Pool:
        """Map a pool of KIND_HANDLE, once a process."""

@final
class Pool:
    def __init__(self, *args: Never, **kwargs: Never) -> None:
        """TypeError: a Device makes one."""

    device: Device
    kind: int
    @property
    def closed(self) -> bool: ...
    @property
    def address(self) -> int:
        """Where the pool begins in this process."""

    @property
    def nbytes(self) -> int: ...
    def close(self) -> None:
        """Unmap, after copies under way in other threads. Twice is once."""

    def export_fd(self) -> int:
        """A new close-on-exec descriptor, the caller's."""

    def export_handle(self) -> bytes: ...
    def copy_in(self, offset: int, source: int, nbytes: int, stream: int = 0) -> None:
        """Device memory at `source` into the pool, after what is queued on `stream`; done when it returns."""

    def copy_out(self, offset: int, target: int, nbytes: int, stream: int = 0) -> None: ...
    def from_host(self, offset: int, source: ReadableBuffer) -> None: ...
    def to_host(self, offset: int, target: WriteableBuffer) -> None: ...
