"""csrc/cuda.c against a driver: pools, exports, copies, and every one of its calls failing once."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_fast.core import BadArgument
from areal_fast.core._cuda import KIND_FD, KIND_HANDLE, OWN_STREAM, CudaError, Device, Driver, Pool, is_loaded
from tests import fakecuda
from tests.gpu.keeping import GIVING_BACK

MIB = 1 << 20
PATTERN = bytes(range(251)) * 997


@pytest.fixture
def device(driver_path: str) -> Iterator[Device]:
    yield Driver(driver_path).open(0)


def kinds(device: Device) -> list[int]:
    return [KIND_FD, KIND_HANDLE] if device.exports_fds() else [KIND_HANDLE]


def read(pool: Pool, offset: int, nbytes: int) -> bytes:
    out = bytearray(nbytes)
    pool.to_host(offset, out)
    return bytes(out)


@contextlib.contextmanager
def allocated(device: Device, nbytes: int) -> Iterator[int]:
    address = device.alloc(nbytes)
    try:
        yield address
    finally:
        device.free(address)


def test_a_missing_driver_is_said_by_name() -> None:
    with pytest.raises(CudaError, match=r"libcuda-of-nobody\.so"):
        Driver("libcuda-of-nobody.so")


def test_a_library_that_is_no_driver() -> None:
    with pytest.raises(CudaError, match="has no cuInit"):
        Driver("libm.so.6")


def test_what_is_loaded(tmp_path: Path) -> None:
    """By its path or by its name, with a version or without; and never by asking."""
    assert not is_loaded("libcuda-of-nobody.so.1") and not is_loaded("") and not is_loaded("libfake")
    whole = shutil.copy(fakecuda.library(), tmp_path / "libwhole.so.1")
    bare = shutil.copy(fakecuda.library(), tmp_path / "libbare.so")
    assert not is_loaded(str(whole)) and not is_loaded("libwhole.so.1")
    keep = [Driver(str(whole)), Driver(str(bare))]
    assert is_loaded(str(whole)) and is_loaded("libwhole.so.1") and not is_loaded("libwhole.so.2")
    assert is_loaded("libbare.so") and is_loaded("libbare.so.1") and not is_loaded("libbare.sox")
    assert len(keep) == 2


def test_whose_context_counts(driver_path: str) -> None:
    """A device is active while somebody in this process has its context, and to ask makes none."""
    driver = Driver(driver_path)
    before = driver.is_active(0)
    device = driver.open(0)
    assert driver.is_active(0)
    with allocated(device, 5) as address:
        window = device.create_pool(5, KIND_HANDLE)
        window.from_host(0, b"12345")
        window.copy_out(0, address, 5)
        out = bytearray(5)
        device.read(address, out)
        assert out == b"12345"
        device.read(address, bytearray())
    del device, window
    gc.collect()
    assert driver.is_active(0) == before
    with pytest.raises(CudaError):
        driver.is_active(driver.count)


def test_several_devices_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fake says of several: UUIDs stay with the devices, numbers follow CUDA_VISIBLE_DEVICES, and no
    device touches another's memory."""
    monkeypatch.setenv("FAKECUDA_DEVICES", "3")
    driver = Driver(fakecuda.library())
    uuids = [driver.uuid(n) for n in range(driver.count)]
    assert len(set(uuids)) == 3
    for visible, expected in {"2,0": [2, 0], "1": [1], "1,7,0": [1], "": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [driver.uuid(n) for n in range(driver.count)] == [uuids[n] for n in expected]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    first, second = driver.open(0), driver.open(1)
    for kind in (KIND_FD, KIND_HANDLE):
        pool = first.create_pool(MIB, kind)
        with allocated(second, 16) as address, pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            pool.copy_in(0, address, 16)
    fd = first.create_pool(MIB, KIND_FD).export_fd()
    with pytest.raises(CudaError, match="cuMemSetAccess"):
        second.import_fd(fd, 2 * MIB)
    os.close(fd)


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKECUDA_DEVICES", "0")
    with pytest.raises(CudaError, match="cuInit"):
        Driver(fakecuda.library())


def test_what_a_device_says_of_itself(driver_path: str) -> None:
    driver = Driver(driver_path)
    assert driver.version >= 11000
    assert len(driver.uuid(0)) == 16 and driver.name(0)
    device = driver.open(0)
    free, total = device.memory()
    assert 0 < free <= total
    assert device.uuid == driver.uuid(0)
    with pytest.raises(CudaError):
        driver.open(driver.count)


def test_a_pool_keeps_bytes_of_host_and_device(device: Device) -> None:
    for kind in kinds(device):
        pool = device.create_pool(3 * MIB, kind)
        assert pool.nbytes >= 3 * MIB
        pool.from_host(4096, PATTERN)
        with allocated(device, len(PATTERN)) as address:
            pool.copy_out(4096, address, len(PATTERN))
            pool.copy_in(MIB, address, len(PATTERN), OWN_STREAM)
        assert read(pool, MIB, len(PATTERN)) == PATTERN
        assert read(pool, MIB, 0) == b""
        pool.close()
        pool.close()
        assert pool.closed
        with pytest.raises(BadArgument):
            pool.from_host(0, b"x")


def test_nothing_reaches_beyond_the_pool(device: Device) -> None:
    pool = device.create_pool(MIB, kinds(device)[0])
    end = pool.nbytes
    pool.from_host(end - 1, b"x")
    for offset, nbytes in ((end, 1), (end - 1, 2), (2**64 - 1, 1), (1, 2**64 - 1)):
        with pytest.raises(BadArgument):
            pool.copy_in(offset, pool.address, nbytes)
    with pytest.raises(BadArgument):
        pool.to_host(end - 1, bytearray(2))


def _import_and_copy(path: str, way: socket.socket, kind: int, nbytes: int) -> None:
    """Another process: map the pool, check the pattern, write it elsewhere, say so."""
    message, fds, _, _ = socket.recv_fds(way, 64, 1)
    device = Driver(path).open(0)
    pool = device.import_fd(fds[0], nbytes) if kind == KIND_FD else device.import_handle(message, nbytes)
    out = bytearray(len(PATTERN))
    pool.to_host(4096, out)
    assert out == PATTERN
    pool.from_host(2 * MIB, PATTERN[::-1])
    way.send(b"done")
    way.recv(1)
    os._exit(0)


def test_another_process_maps_the_pool(device: Device, driver_path: str) -> None:
    context = multiprocessing.get_context("spawn")
    for kind in kinds(device):
        pool = device.create_pool(4 * MIB, kind)
        pool.from_host(4096, PATTERN)
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        child = context.Process(target=_import_and_copy, args=(driver_path, theirs, kind, pool.nbytes))
        child.start()
        theirs.close()
        if kind == KIND_FD:
            fd = pool.export_fd()
            socket.send_fds(ours, [b"fd"], [fd])
            os.close(fd)
        else:
            ours.send(pool.export_handle())
        assert ours.recv(8) == b"done"
        assert read(pool, 2 * MIB, len(PATTERN)) == PATTERN[::-1]
        ours.send(b"x")
        child.join(60)
        assert child.exitcode == 0
        ours.close()


def test_a_descriptor_keeps_the_memory_of_a_dead_maker(device: Device, driver_path: str) -> None:
    """What a successor of a killed keeper relies on."""
    if not device.exports_fds():
        pytest.skip("this device exports no descriptors")
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    program = (
        "import os, signal, socket, sys\n"
        "from areal_fast.core._cuda import Driver, KIND_FD\n"
        "pool = Driver(sys.argv[1]).open(0).create_pool(4 << 20, KIND_FD)\n"
        f"pool.from_host(4096, bytes(range(251)) * {len(PATTERN) // 251})\n"
        "way = socket.socket(fileno=int(sys.argv[2]))\n"
        "socket.send_fds(way, [str(pool.nbytes).encode()], [pool.export_fd()])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", program, driver_path, str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    message, fds, _, _ = socket.recv_fds(ours, 64, 1)
    maker.wait(60)
    pool = device.import_fd(fds[0], int(message))
    os.close(fds[0])
    assert read(pool, 4096, len(PATTERN)) == PATTERN
    again = pool.export_fd()
    twin = device.import_fd(again, pool.nbytes)
    os.close(again)
    assert read(twin, 4096, 251) == PATTERN[:251]
    ours.close()


def test_what_a_pool_of_each_kind_refuses(device: Device) -> None:
    pool = device.create_pool(MIB, KIND_HANDLE)
    with pytest.raises(BadArgument):
        pool.export_fd()
    with pytest.raises(BadArgument):
        device.import_handle(b"short", MIB)
    with pytest.raises(CudaError):
        device.import_fd(os.dup(0), MIB)
    if device.exports_fds():
        with pytest.raises(BadArgument):
            device.create_pool(MIB, KIND_FD).export_handle()


def test_a_pool_larger_than_the_device(device: Device) -> None:
    for kind in kinds(device):
        with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
            device.create_pool(device.memory()[1] * 64, kind)


def test_the_caller_keeps_its_context(driver_path: str) -> None:
    """A second device's pool works whatever device was used last, in the same thread."""
    driver = Driver(driver_path)
    first, second = driver.open(0), driver.open(0)
    a, b = first.create_pool(MIB, KIND_HANDLE), second.create_pool(MIB, KIND_HANDLE)
    a.from_host(0, b"one")
    b.from_host(0, b"two")
    assert read(a, 0, 3) == b"one" and read(b, 0, 3) == b"two"


# -- every call failing once ---------------------------------------------------------------------------------


def _whole_life(kind: int) -> None:
    """Everything a keeper and a client do in one process; raises what the driver says."""
    device = Driver(fakecuda.library()).open(0)
    device.exports_fds()
    device.memory()
    pool = device.create_pool(4 * MIB, kind)
    pool.from_host(0, PATTERN)
    address = device.alloc(len(PATTERN))
    try:
        pool.copy_out(0, address, len(PATTERN))
        pool.copy_in(2 * MIB, address, len(PATTERN))
        assert read(pool, 2 * MIB, len(PATTERN)) == PATTERN
        if kind == KIND_FD:
            fd = pool.export_fd()
            try:
                other = device.import_fd(fd, pool.nbytes)
            finally:
                os.close(fd)
            assert read(other, 0, 251) == PATTERN[:251]
            other.close()
        else:
            pool.export_handle()
    finally:
        device.free(address)
    pool.close()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", [KIND_FD, KIND_HANDLE])
def test_every_call_may_fail(kind: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a process of its own, so that the fake maps this test's state. Nothing leaks but what a failing
    call of giving back could not give back."""
    state = fakecuda.State(tmp_path_factory.mktemp("fake") / "state")
    program = f"from tests.gpu import test_driver as t; t.fail_each({kind}, {str(state.path)!r})"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FAKECUDA_STATE": str(state.path)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20


def fail_each(kind: int, path: str) -> None:
    """For every n: the n-th call of a whole life fails. Prints how many there are."""
    state = fakecuda.State(Path(path))
    _whole_life(kind)
    gc.collect()
    total = state.calls
    assert state.live == 0
    descriptors = _descriptors()
    for nth in range(1, total + 1):
        state.fail(nth)
        live = state.live
        try:
            _whole_life(kind)
            told = ""
        except CudaError as error:
            told = str(error)
            del error
        gc.collect()
        name = state.failed
        assert name, f"call {nth} of {total} was not reached"
        if name in GIVING_BACK:
            assert told == "" or name == "cuCtxPushCurrent_v2", f"{name} at {nth}: {told}"
        else:
            entry = name.removesuffix("_v2")
            assert told.startswith(entry) and "CUDA_ERROR_UNKNOWN" in told, f"{name} at {nth}: {told!r}"
            assert state.live == live, f"{name} at {nth} leaks {state.live - live}"
            assert _descriptors() == descriptors, f"{name} at {nth} leaks descriptors"
        descriptors = _descriptors()
        state.disarm()
    _whole_life(kind)
    print(total)
