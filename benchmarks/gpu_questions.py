"""What the GPU's driver does where its documentation is silent or we rely on it, each tried once on the
device at hand. `answered` gives {question: answer}; an answer is a figure, a word, or the refusal.

What is asked, and what the design takes for granted until it is known:

    context_mib            device memory of one more process's context            (0.3 to 0.5 GB)
    pool_outlives_maker    a pool's bytes, read by its descriptor after SIGKILL   (they are there: keeper.py)
    legacy_after_death     what an importer reads of a dead maker's allocation    (anything: called stale)
    copy_after_death_ms    how long a killed process's queued copies went on      (over with the process)
    memfd_register         host memory in a memfd, registered for fast copies     (not used)
    tensor_over_pool       torch takes the pool's memory without a copy           (gpu_torch.py)

Programs that die are children of this one and are waited for. On the fake driver the answers say how the fake
behaves, which is what the tests rely on there.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from areal_fast.core._cuda import KIND_FD, KIND_HANDLE, CudaError, Device
from areal_fast.shards import passing

MIB: Final = 1 << 20
PATTERN: Final = bytes(range(256)) * 4096
ROOT: Final = Path(__file__).resolve().parents[1]
QUEUED: Final = 400
QUIET_S: Final = 2.0
CHILD_S: Final = 120


def answered(library: str, device: Device) -> dict[str, Any]:
    questions: dict[str, Callable[[str, Device], Any]] = {
        "context_mib": context_mib,
        "pool_outlives_maker": pool_outlives_maker,
        "legacy_after_death": legacy_after_death,
        "copy_after_death_ms": copy_after_death_ms,
        "memfd_register": memfd_register,
        "tensor_over_pool": tensor_over_pool,
    }
    answers: dict[str, Any] = {}
    for name, ask in questions.items():
        try:
            answers[name] = ask(library, device)
        except CudaError as error:
            answers[name] = f"refused: {error}"
    return answers


class Child:
    """Another process with the device open, running `program`; it has `way`, a socket to this one."""

    def __init__(self, library: str, program: str) -> None:
        self.way, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.way.settimeout(CHILD_S)
        start = (
            "import os, signal, socket, sys\n"
            "from areal_fast.core._cuda import *\n"
            "from areal_fast.core._cuda import Driver, KIND_FD, KIND_HANDLE\n"
            "from areal_fast.shards import passing\n"
            "from benchmarks.gpu_questions import MIB, PATTERN, QUEUED\n"
            "way = socket.socket(fileno=int(sys.argv[2]))\n"
            "device = Driver(sys.argv[1]).open(0)\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start + program, library, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
        )
        theirs.close()

    def hear(self) -> tuple[bytes, list[int]]:
        """Its next message and the descriptor that came along."""
        packet, fds, _ = passing.receive(self.way, 4096)
        if not packet:
            raise CudaError(f"the child ended with {self.process.wait(CHILD_S)}", -1)
        return packet, fds

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(CHILD_S)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self.way.close()


def context_mib(library: str, device: Device) -> float:
    """By how much the device's free memory falls when one more process opens it."""
    before = device.memory()[0]
    with Child(library, "way.send(b'open'); way.recv(1)") as child:
        child.hear()
        return round((before - device.memory()[0]) / MIB, 1)


def pool_outlives_maker(library: str, device: Device) -> str:
    if not device.exports_fds():
        return "this device exports no descriptors"
    program = (
        "pool = device.create_pool(4 * MIB, KIND_FD)\n"
        "pool.from_host(0, PATTERN)\n"
        "passing.send(way, str(pool.nbytes).encode(), [pool.export_fd()])\n"
        "way.recv(1)\n"
    )
    with Child(library, program) as child:
        size, fds = child.hear()
        child.kill()
        try:
            pool = device.import_fd(fds[0], int(size))
        finally:
            os.close(fds[0])
        return "yes" if first_bytes(pool) == PATTERN else "the memory is there, its bytes are not"


def first_bytes(pool: Any) -> bytes:
    out = bytearray(len(PATTERN))
    pool.to_host(0, out)
    return bytes(out)


def legacy_after_death(library: str, device: Device) -> str:
    """Mapped before the maker's death, read after it."""
    program = (
        "pool = device.create_pool(4 * MIB, KIND_HANDLE)\n"
        "pool.from_host(0, PATTERN)\n"
        "way.send(pool.export_handle()); way.recv(1)\n"
    )
    with Child(library, program) as child:
        handle, _ = child.hear()
        pool = device.import_handle(handle, 4 * MIB)
        if first_bytes(pool) != PATTERN:
            return "not even the living maker's bytes"
        child.kill()
        time.sleep(QUIET_S)
        return "the same bytes" if first_bytes(pool) == PATTERN else "other bytes"


def copy_after_death_ms(library: str, device: Device) -> Any:
    """A child queues copies into a pool that it shares, each of another value, waits for none, and is killed.
    Milliseconds from its certain death to the pool's last change."""
    if not device.exports_fds():
        return "this device exports no descriptors"
    program = (
        "import ctypes\n"
        "size = 64 * MIB\n"
        "pool = device.create_pool(size, KIND_FD)\n"
        "passing.send(way, str(pool.nbytes).encode(), [pool.export_fd()])\n"
        "driver = ctypes.CDLL(sys.argv[1])\n"
        "context = ctypes.c_void_p()\n"
        "assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0\n"
        "assert driver.cuCtxPushCurrent_v2(context) == 0\n"
        "sources = [device.alloc(size) for _ in range(2)]\n"
        "window = device.create_pool(size, KIND_HANDLE)\n"
        "for value, source in enumerate(sources, 1):\n"
        "    window.from_host(0, bytes([value]) * size)\n"
        "    window.copy_out(0, source, size)\n"
        "copy = driver.cuMemcpyDtoDAsync_v2\n"
        "copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]\n"
        "for n in range(QUEUED):\n"
        "    if copy(pool.address, sources[n % 2], size, None): break\n"
        "way.send(b'queued')\n"
        "way.recv(1)\n"
    )
    with Child(library, program) as child:
        size, fds = child.hear()
        pool = device.import_fd(fds[0], int(size))
        os.close(fds[0])
        child.hear()
        child.kill()
        died = last_change = time.monotonic()
        last = b""
        while time.monotonic() - died < QUIET_S:
            out = bytearray(4096)
            pool.to_host(pool.nbytes - len(out), out)
            if bytes(out) != last:
                last, last_change = bytes(out), time.monotonic()
        return round((last_change - died) * 1e3, 2)


def memfd_register(library: str, device: Device) -> Any:
    """GB/s from a memfd's pages to the device, before and after cuMemHostRegister."""
    driver = ctypes.CDLL(library)
    if not hasattr(driver, "cuMemHostRegister_v2"):
        return "this driver has no cuMemHostRegister"
    size = 64 * MIB
    fd = os.memfd_create("areal_fast-question", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, size)
        pages = mmap.mmap(fd, size)
    finally:
        os.close(fd)
    pages[:] = bytes(size)
    pool = device.create_pool(size, KIND_HANDLE)
    speeds = {"plain": _speed(pool, pages)}
    address = ctypes.c_char.from_buffer(pages)
    context = ctypes.c_void_p()
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    driver.cuCtxPushCurrent_v2(context)
    try:
        code = driver.cuMemHostRegister_v2(ctypes.byref(address), ctypes.c_size_t(size), 0)
        if code:
            return {**speeds, "registered": f"refused with {code}"}
        speeds["registered"] = _speed(pool, pages)
        driver.cuMemHostUnregister(ctypes.byref(address))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        driver.cuDevicePrimaryCtxRelease_v2(0)
        del address
        pages.close()
    return speeds


def _speed(pool: Any, pages: mmap.mmap) -> float:
    """GB/s of the best of five copies."""
    best = min(_timed(lambda: pool.from_host(0, pages)) for _ in range(5))
    return round(len(pages) / best / 1e9, 2)


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def tensor_over_pool(library: str, device: Device) -> Any:
    """Whether torch wraps memory of both kinds of pool where it is, and how long that takes."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU"
    from areal_fast.shards.devices import DeviceArray
    from areal_fast.shards.gpu_torch import tensor_of

    found: dict[str, Any] = {"torch": torch.__version__}
    for name, kind in (("fd", KIND_FD), ("handle", KIND_HANDLE)):
        if kind == KIND_FD and not device.exports_fds():
            continue
        pool = device.create_pool(4 * MIB, kind)
        pool.from_host(0, PATTERN)
        array = DeviceArray(pool.address, "bfloat16", (len(PATTERN) // 2,), owner=pool)
        tensor = tensor_of(array)
        same = tensor.data_ptr() == pool.address and bytes(
            tensor.view(torch.uint8).cpu().numpy().data
        ) == bytes(PATTERN)
        microseconds = min(_timed(lambda a=array: tensor_of(a)) for _ in range(50)) * 1e6  # type: ignore[misc]
        found[name] = {"in_place": same, "us": round(microseconds, 1)}
    return json.loads(json.dumps(found))
