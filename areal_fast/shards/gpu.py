"""A client of the keeper: puts tensors of device memory into its pool, takes them out, or reads them in
place.

For processes of the same host that have the GPU: the keeper's socket name comes from POST /data/gpu. The
pool is mapped once a process, whatever number of clients it has. The device is found by UUID, so
CUDA_VISIBLE_DEVICES may order it as it likes. Pointers and streams are integers; torch is not imported
(gpu_torch.py does that).

    with GpuClient.connect(name) as client:
        client.put("id", tensor.data_ptr(), "bfloat16", (2, 3), stream)
        client.get_into("id", other.data_ptr(), nbytes, stream)
        with client.map("id") as lease:
            use(lease.pointer, lease.dtype, lease.shape)
        assert lease.valid

Copies are finished when put and get_into return: put tells the keeper only then, and get_into releases its
lease only then. A lease says at its release whether what was read was valid all the time.

A keeper that dies is replaced within seconds. The client then connects anew and says what it still holds;
where the pool survived, nothing else happens. Where it did not, reservations and leases are stale: put and
get_into start again by themselves, a mapped lease turns out invalid.

Any thread; one request at a time, copies side by side. Not after a fork: make a new client there.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import socket
import struct
import threading
import time
import weakref
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from areal_fast.config import CUDA_LIBRARY
from areal_fast.core._cuda import KIND_FD, CudaError, Driver, Pool
from areal_fast.protocol import gpu as wire
from areal_fast.protocol.gpu import PoolInfo, Region, Request
from areal_fast.shards import passing

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PATIENCE_S: Final = 20.0
"""How long a request waits for a keeper's successor."""
RETRY_S: Final = 0.05
TRIES: Final = 5
BRINGS_FD: Final = (wire.HELLO, wire.READ)
"""Requests whose answers come with a descriptor."""


class GpuShardError(Exception):
    """A GPU shard could not be put or had. str() says why."""


class GpuPoolFull(GpuShardError):
    """There is no room (HTTP's 507): clear shards, or give the proxy a larger --gpu-pool-bytes."""


class GpuShardNotFound(GpuShardError):
    """No such shard in this pool. It may be in host memory: ask over HTTP."""


class GpuShardStale(GpuShardError):
    """The pool went away with its keeper while it was used."""


class KeeperGone(GpuShardError):
    """Nobody answers at the keeper's socket, or the answer makes no sense."""


class Mapped:
    """A pool mapped into this process; unmapped when nobody has this any more."""

    def __init__(self, pool: Pool, ordinal: int) -> None:
        self.pool = pool
        self.ordinal = ordinal


_mapped: weakref.WeakValueDictionary[tuple[int, bytes], Mapped] = weakref.WeakValueDictionary()
_mapping = threading.Lock()


def _map(info: PoolInfo, fd: int, library: str) -> Mapped:
    """The pool of `info`, mapped now or before. CudaError."""
    with _mapping:
        known = _mapped.get((os.getpid(), info.pool))
        if known is not None:
            return known
        driver = Driver(library)
        ordinal = next((n for n in range(driver.count) if driver.uuid(n) == info.gpu), -1)
        if ordinal < 0:
            raise CudaError(f"GPU {wire.uuid_text(info.gpu)} is not among this process's devices", -1)
        device = driver.open(ordinal)
        if info.way == KIND_FD:
            pool = device.import_fd(fd, info.nbytes)
        else:
            pool = device.import_handle(info.handle, info.nbytes)
        made = _mapped[os.getpid(), info.pool] = Mapped(pool, ordinal)
        return made


class Shard(NamedTuple):
    """What a shard is: dtype as torch names it, without "torch."."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Lease:
    """A shard in place: `nbytes` at `pointer`, read-only by agreement, until `release`.

    `valid` is None before the release; then whether the bytes were this shard's all the time."""

    def __init__(self, client: GpuClient, mapped: Mapped, region: Region) -> None:
        self._client = client
        self._mapped = mapped
        self._region = region
        self.pointer = mapped.pool.address + region.offset
        self.ordinal = mapped.ordinal
        self.dtype = region.dtype
        self.shape = region.shape
        self.nbytes = region.nbytes
        self.valid: bool | None = None

    def copy_out(self, pointer: int, stream: int = 0) -> None:
        """Copy its bytes to device memory of one's own, after what is queued on `stream`; done when it
        returns. CudaError."""
        self._mapped.pool.copy_out(self._region.offset, pointer, self.nbytes, stream)

    def release(self) -> bool:
        """Give it back, after everything that reads it is done; `valid`. A second call changes nothing."""
        if self.valid is None:
            self.valid = self._client._release(self._region)
        return self.valid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __del__(self) -> None:
        if self.valid is None:
            self._client._drop(self._region)


class GpuClient:
    """See the top of the file. Made by `connect`."""

    def __init__(self, name: str, library: str, patience_s: float) -> None:
        self._address = f"\0{name}"
        self._library = library
        self._patience_s = patience_s
        self._pid = os.getpid()
        self._number = secrets.randbits(63)
        self._lock = threading.Lock()
        """Of everything below; held from a question to its answer. `_held` and `_dropped` may be touched
        without it, by single operations."""
        self._sock: socket.socket | None = None
        self._tag = 0
        self._held: set[tuple[int, int]] = set()
        """(generation, lease) of what is being written or read by this client."""
        self._dropped: deque[tuple[int, int]] = deque()
        """Leases that were garbage before they were released."""
        self._info: PoolInfo | None = None
        self._pool: Mapped | None = None
        self._closed = False

    @classmethod
    def connect(
        cls, name: str, library: str = CUDA_LIBRARY, *, patience_s: float = PATIENCE_S, device: bool = True
    ) -> Self:
        """A client of the keeper at the socket `name`. With `device` the pool is mapped now: CudaError if
        this process cannot (then only `read`, `write` and `clear` are of use: say device=False).
        KeeperGone."""
        client = cls(name, library, patience_s)
        try:
            if device:
                client._mapped_pool()
            else:
                with client._lock:
                    client._until_connected(time.monotonic() + patience_s)
        except BaseException:
            client.close()
            raise
        return client

    def close(self) -> None:
        """Give everything back that is still held; the client is of no use afterwards."""
        with self._lock:
            self._closed = True
            if self._sock is not None and self._pid == os.getpid():
                with contextlib.suppress(OSError):
                    self._sock.send(wire.pack_request(Request(wire.BYE, 0)))
            self._hang_up()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    @property
    def is_inherited(self) -> bool:
        """Whether this process got it by a fork: it is of no use here."""
        return self._pid != os.getpid()

    @property
    def gpu(self) -> str:
        """UUID of the pool's device."""
        return wire.uuid_text(self._info.gpu) if self._info is not None else ""

    @property
    def ordinal(self) -> int:
        """The device's number in this process, torch's too."""
        return self._mapped_pool().ordinal

    @property
    def pool_bytes(self) -> int:
        return self._info.nbytes if self._info is not None else 0

    # -- shards ----------------------------------------------------------------------------------------
    def put(self, shard_id: str, pointer: int, dtype: str, shape: tuple[int, ...], stream: int = 0) -> None:
        """Publish the contiguous tensor at `pointer`, after what is queued on `stream`; replaces any shard
        of this id. GpuPoolFull, GpuShardError, CudaError."""
        nbytes = wire.tensor_bytes(dtype, shape)
        for _ in range(TRIES):
            region = self._ask(Request(wire.RESERVE, 0, nbytes=nbytes), hold=True)
            held = (region.generation, 0)
            try:
                self._pool_of(region).pool.copy_in(region.offset, pointer, nbytes, stream)
                name = shard_id.encode("utf-8", "surrogatepass")
                self._ask(Request(wire.COMMIT, 0, region.generation, 0, 0, dtype, shape, name))
            except GpuShardStale:
                if self._is_published(shard_id, region.generation):
                    return
                continue
            except BaseException:
                with contextlib.suppress(GpuShardError):
                    self._ask(Request(wire.ABORT, 0, region.generation))
                raise
            finally:
                self._held.discard(held)
            return
        raise GpuShardStale("the pool goes away again and again")

    def get_into(self, shard_id: str, pointer: int, nbytes: int, stream: int = 0) -> Shard:
        """Copy the shard to `pointer`, where there is room for `nbytes`. GpuShardNotFound; GpuShardError if
        it is larger; CudaError."""
        for _ in range(TRIES):
            lease = self.map(shard_id)
            try:
                if lease.nbytes > nbytes:
                    raise GpuShardError(f"a shard of {lease.nbytes} bytes does not fit into {nbytes}")
                lease.copy_out(pointer, stream)
            finally:
                valid = lease.release()
            if valid:
                return Shard(lease.dtype, lease.shape, lease.nbytes)
        raise GpuShardStale("the pool goes away again and again")

    def map(self, shard_id: str) -> Lease:
        """A lease on the shard where it is: no copy. GpuShardNotFound."""
        region = self._ask(_about(wire.LEASE, shard_id), hold=True)
        try:
            return Lease(self, self._pool_of(region), region)
        except BaseException:
            self._release(region)
            raise

    def read(self, shard_id: str) -> tuple[Shard, bytes | mmap.mmap]:
        """The shard's bytes in host memory, copied by the keeper: for processes that cannot map the pool."""
        region, fd = self._ask_for_fd(_about(wire.READ, shard_id))
        try:
            data = mmap.mmap(fd, region.nbytes, prot=mmap.PROT_READ) if region.nbytes else b""
        finally:
            os.close(fd)
        return Shard(region.dtype, region.shape, region.nbytes), data

    def write(self, shard_id: str, dtype: str, shape: tuple[int, ...], data: ReadableBuffer) -> None:
        """Publish a tensor out of host memory, copied by the keeper. GpuPoolFull, GpuShardError."""
        name = shard_id.encode("utf-8", "surrogatepass")
        fd = os.memfd_create("areal_fast-gpu", os.MFD_CLOEXEC)
        try:
            with memoryview(data).cast("B") as view:
                nbytes = view.nbytes
                with open(fd, "wb", buffering=0, closefd=False) as file:
                    done = 0
                    while done < nbytes:
                        done += file.write(view[done:])
            self._ask(Request(wire.WRITE, 0, 0, 0, nbytes, dtype, shape, name), fds=[fd])
        finally:
            os.close(fd)

    def clear(self, shard_id: str) -> None:
        """GpuShardNotFound."""
        self._ask(_about(wire.CLEAR, shard_id))

    def _release(self, region: Region) -> bool:
        held = (region.generation, region.lease)
        self._held.discard(held)
        if self._closed:
            return False
        try:
            self._ask(Request(wire.RELEASE, 0, *held))
        except GpuShardStale:
            return False
        return True

    def _drop(self, region: Region) -> None:
        """The end of a lease that nobody has any more. The garbage collector may say so in the middle of a
        question, in any thread: nothing is waited for here, least of all the lock."""
        held = (region.generation, region.lease)
        self._held.discard(held)
        self._dropped.append(held)
        self._give_back()

    def _give_back(self) -> None:
        """Release what was dropped, unless somebody asks something: he does it then. Without a connection
        the next one settles it."""
        if not self._dropped or self._pid != os.getpid() or not self._lock.acquire(blocking=False):
            return
        try:
            if self._sock is not None:
                self._release_dropped()
        except (OSError, wire.Malformed):
            self._hang_up()
        finally:
            self._lock.release()

    def _release_dropped(self) -> None:
        while self._dropped:
            self._once(Request(wire.RELEASE, 0, *self._dropped.pop()), [])

    def _is_published(self, shard_id: str, generation: int) -> bool:
        """Whether a COMMIT whose answer was lost had been obeyed."""
        try:
            region = self._ask(_about(wire.LEASE, shard_id), hold=True)
        except GpuShardNotFound:
            return False
        self._release(region)
        return region.generation == generation

    # -- the pool --------------------------------------------------------------------------------------
    def _map_pool(self) -> None:
        self._info, fds = self._introduce()
        try:
            self._pool = _map(self._info, fds[0] if fds else -1, self._library)
        finally:
            for fd in fds:
                os.close(fd)

    def _mapped_pool(self) -> Mapped:
        until = time.monotonic() + self._patience_s
        with self._lock:
            while self._pool is None:
                self._until_connected(until)
                try:
                    self._map_pool()
                except OSError:
                    self._hang_up()
            return self._pool

    def _pool_of(self, region: Region) -> Mapped:
        """The mapping that a region's offset is of. GpuShardStale if the pool changed since."""
        mapped = self._mapped_pool()
        if self._info is None or region.pool != self._info.pool:
            raise GpuShardStale("the pool was made anew meanwhile")
        return mapped

    # -- asking ----------------------------------------------------------------------------------------
    def _ask(self, request: Request, *, hold: bool = False, fds: list[int] | None = None) -> Region:
        """One request and its answer. `hold`: what it gives is held from now on. GpuShardError of the
        answer's kind; KeeperGone after the client's patience."""
        region, got = self._exchange(request, fds or [], hold)
        for fd in got:
            os.close(fd)
        return region

    def _ask_for_fd(self, request: Request) -> tuple[Region, int]:
        region, fds = self._exchange(request, [], False)
        if not fds:
            raise KeeperGone("an answer without its descriptor")
        return region, fds[0]

    def _exchange(self, request: Request, fds: list[int], hold: bool) -> tuple[Region, list[int]]:
        try:
            with self._lock:
                return self._exchange_locked(request, fds, hold)
        finally:
            self._give_back()

    def _exchange_locked(self, request: Request, fds: list[int], hold: bool) -> tuple[Region, list[int]]:
        until = time.monotonic() + self._patience_s
        while True:
            self._until_connected(until)
            try:
                self._release_dropped()
                packet, got = self._once(request, fds)
                region = wire.unpack_region(packet)
            except (OSError, wire.Malformed) as error:
                self._hang_up()
                if isinstance(error, wire.Malformed) or time.monotonic() > until:
                    raise KeeperGone(str(error)) from None
                continue
            if region.status == wire.OK:
                if hold:
                    self._held.add((region.generation, region.lease))
                return region, got
            if region.status != wire.BUSY or time.monotonic() + RETRY_S > until:
                raise _error_of(region)
            time.sleep(RETRY_S)

    def _once(self, request: Request, fds: list[int]) -> tuple[bytes, list[int]]:
        """One question, and the answer that has its tag. OSError, and the connection is to be given up;
        Malformed."""
        assert self._sock is not None
        self._tag += 1
        tag = self._tag
        message = wire.pack_request(request._replace(tag=tag))
        try:
            passing.send(self._sock, message, fds)
            plain = request.kind not in BRINGS_FD
            packet, got, _ = passing.receive(self._sock, wire.MAX_PACKET_BYTES, plain=plain)
        except BaseException:  # an interrupt, too: the answer would be taken for the next question's
            self._hang_up()
            raise
        if not packet:
            raise ConnectionResetError(errno.ECONNRESET, "the keeper is gone")
        if (answered := wire.tag_of(packet)) not in (tag, 0):
            for fd in got:
                os.close(fd)
            raise ConnectionResetError(errno.ECONNRESET, f"an answer to another question ({answered})")
        return packet, got

    def _until_connected(self, until: float) -> None:
        if self._pid != os.getpid():
            raise KeeperGone("this client was made by the process that this one was forked from")
        if self._closed:
            raise KeeperGone("the client is closed")
        while self._sock is None:
            try:
                self._connect()
            except OSError as error:
                self._hang_up()
                if isinstance(error, ConnectionRefusedError) or time.monotonic() + RETRY_S > until:
                    raise KeeperGone(f"no keeper answers: {error.strerror or error}") from None
                time.sleep(RETRY_S)
            except wire.Malformed as error:
                self._hang_up()
                raise KeeperGone(str(error)) from None

    def _connect(self) -> None:
        """A connection over which the keeper knows us and what we hold."""
        sock = self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        patience = struct.pack("ll", max(1, int(self._patience_s)), 0)
        for side in (
            socket.SO_RCVTIMEO,
            socket.SO_SNDTIMEO,
        ):  # the kernel's: a settimeout costs a poll a call
            sock.setsockopt(socket.SOL_SOCKET, side, patience)
        sock.connect(self._address)
        info, fds = self._introduce()
        for fd in fds:
            os.close(fd)
        if self._pool is not None and self._info is not None and info.pool != self._info.pool:
            self._pool = None  # mapped anew when it is needed; leases keep the old one
        self._info = info
        for generation, lease in list(self._held):
            self._once(Request(wire.KEEP, 0, generation, lease), [])
        self._once(Request(wire.SETTLE, 0), [])

    def _introduce(self) -> tuple[PoolInfo, list[int]]:
        packet, fds = self._once(Request(wire.HELLO, 0, self._number), [])
        info = wire.unpack_pool(packet)
        if info.status != wire.OK:
            for fd in fds:
                os.close(fd)
            raise KeeperGone(f"the keeper cannot export its pool: {info.text}")
        return info, fds

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _about(kind: int, shard_id: str) -> Request:
    return Request(kind, 0, shard_id=shard_id.encode("utf-8", "surrogatepass"))


def _error_of(region: Region) -> GpuShardError:
    kinds = {wire.FULL: GpuPoolFull, wire.NOT_FOUND: GpuShardNotFound, wire.STALE: GpuShardStale}
    return kinds.get(region.status, GpuShardError)(region.text)
