"""The keeper: the only process with a CUDA context. It owns one GPU's pool and says who may use which bytes
of it.

Started by the supervisor when the first GPU shard is offered. Producers copy into the pool, consumers copy
out of it or read in place; the keeper itself copies only between the pool and the host, for readers without
a GPU. What the pool holds stands in the arena (shards/ledger.py), so a keeper may be killed between any two
instructions:

* The pool of a device that exports descriptors outlives its keeper: the descriptor waits in the pocket, a
  socket pair that the supervisor keeps and never reads. A successor peeks at it, maps the same memory, and
  adopts every shard, reservation and lease. Otherwise the pool is new, the old shards are gone, and a log
  line says how many.
* Clients find the successor under the same socket name: the listening socket is the supervisor's.
* What a client holds is its process's. It goes when that process is dead for certain (its /proc entry has
  ended, not merely its connection): until then a copy of its may still be running. One in a PID namespace
  that cannot be seen from here gets QUARANTINE_S after its connection has ended.
* A driver error that stays (a context that is lost) ends this process; the next one begins with a new
  context.

One thread: a poll loop over the control line, the listener, and the clients. It answers one request of a
client before it reads the next, so nothing is queued for who does not read. Only the user's own processes
(SO_PEERCRED) are served. It must not touch sessions, and it believes nothing that a client says about
sizes.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from areal_fast.core import ArenaFull, IndexBusy
from areal_fast.core._cuda import KIND_FD, KIND_HANDLE, CudaError, Device, Driver, Pool
from areal_fast.errors import ShardRejected
from areal_fast.protocol import gpu as wire
from areal_fast.protocol.gpu import Malformed, PoolInfo, Region, Request
from areal_fast.service import child
from areal_fast.service.child import HEARTBEAT_S, Child
from areal_fast.shards import ShardStore, passing, sealed
from areal_fast.shards.gpu_records import GpuMeta, Holder
from areal_fast.shards.ledger import Ledger, NotHeld, PoolFull

if TYPE_CHECKING:
    from areal_fast.service.log import Log

T = TypeVar("T")

QUARANTINE_S: Final = 60.0
"""Before what a process holds that cannot be seen in /proc is taken back, counted from its connection's
end."""
RECLAIM_S: Final = 5.0
BUSY_S: Final = 1.0
"""How long a request waits for the arena's index before its client is told to come again."""
CHUNK_BYTES: Final = 128 << 20
"""Host copies are made in pieces of this size, with a heartbeat between."""
MAX_CLIENTS: Final = 1024
DEFAULT_SHARE: Final = 0.02
MIN_POOL_BYTES: Final = 64 << 20
_POCKET = struct.Struct("<8s16s16sQ")
_POCKET_MAGIC: Final = b"AFpool01"
_CREDENTIALS = struct.Struct("3i")


class Opened(NamedTuple):
    """A pool ready for use. kept: it was a predecessor's."""

    pool: Pool
    pool_id: bytes
    kept: bool


def find_device(driver: Driver, gpu: str) -> Device:
    """The device of this UUID ("": the first). CudaError if there is none."""
    count = driver.count
    if not count:
        raise CudaError("the driver finds no GPU", -1)
    if not gpu:
        return driver.open(0)
    wanted = wire.uuid_bytes(gpu)
    for ordinal in range(count):
        if driver.uuid(ordinal) == wanted:
            return driver.open(ordinal)
    raise CudaError(f"no GPU {gpu} among the {count} that this process may use", -1)


def open_pool(device: Device, nbytes: int, pocket: tuple[socket.socket, socket.socket], log: Log) -> Opened:
    """The predecessor's pool out of the pocket, or a new one. `nbytes` -1: a share of the device."""
    into, out = pocket
    if (found := _predecessors(device, out, log)) is not None:
        return found
    if nbytes < 0:
        nbytes = max(MIN_POOL_BYTES, int(device.memory()[1] * DEFAULT_SHARE))
    pool_id = secrets.token_bytes(16)
    if device.exports_fds():
        try:
            pool = device.create_pool(nbytes, KIND_FD)
            fd = pool.export_fd()
        except CudaError as error:
            log.warning("pool_without_descriptor", why=str(error))
        else:
            packet = _POCKET.pack(_POCKET_MAGIC, device.uuid, pool_id, pool.nbytes)
            try:
                passing.send(into, packet, [fd])
            finally:
                os.close(fd)
            return Opened(pool, pool_id, kept=False)
    return Opened(device.create_pool(nbytes, KIND_HANDLE), pool_id, kept=False)


def _predecessors(device: Device, out: socket.socket, log: Log) -> Opened | None:
    """What the pocket holds, if it can be used; else the pocket is emptied."""
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    while True:
        try:
            packet, fds, _ = passing.receive(out, 256, flags)
        except BlockingIOError:
            return None
        try:
            magic, gpu, pool_id, nbytes = _POCKET.unpack(packet)
            if magic == _POCKET_MAGIC and gpu == device.uuid and fds:
                return Opened(device.import_fd(fds[0], nbytes), pool_id, kept=True)
        except (struct.error, CudaError) as error:
            log.error("pool_not_recovered", why=str(error))
        finally:
            for fd in fds:
                os.close(fd)
        _, fds, _ = passing.receive(out, 256, flags & ~socket.MSG_PEEK)
        for fd in fds:
            os.close(fd)


def born(pid: int) -> int:
    """The process's start time as /proc has it; 0 if it is dead (a zombie is) or cannot be seen."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


class Client:
    """One connection. `holder` has its client's number from HELLO on. `kept`: (generation, lease) of its
    KEEPs."""

    def __init__(self, sock: socket.socket, holder: Holder) -> None:
        self.sock = sock
        self.holder = holder
        self.kept: set[tuple[int, int]] = set()
        self.unsent: tuple[bytes, list[int]] | None = None

    def close(self) -> None:
        self.sock.close()
        if self.unsent is not None:
            _, fds = self.unsent
            self.unsent = None
            for fd in fds:
                os.close(fd)


class Keeper:
    """One keeper's life: `run` never returns."""

    def __init__(self, me: Child, device: Device, opened: Opened, listener: socket.socket) -> None:
        self._me = me
        self._arena = me.arena
        self._log = me.log
        self._device = device
        self._pool = opened.pool
        self._listener = listener
        self._store = ShardStore(me.arena)
        incarnation = me.arena.proc_info(me.arena.proc)[1]
        self._ledger = Ledger(self._store, device.uuid, opened.pool_id, opened.pool.nbytes, incarnation)
        self._clients: dict[int, Client] = {}
        self._unseen: dict[Holder, float] = {}
        self._poll = select.poll()
        self._poll.register(me.control, select.POLLIN)
        self._poll.register(listener, select.POLLIN)
        self._handlers: dict[int, Callable[[Client, Request, list[int]], Region]] = {
            wire.RESERVE: self._reserve,
            wire.COMMIT: self._commit,
            wire.ABORT: self._abort,
            wire.LEASE: self._lease,
            wire.RELEASE: self._release,
            wire.WRITE: self._write,
            wire.CLEAR: self._clear,
            wire.KEEP: self._keep,
            wire.SETTLE: self._settle,
        }
        self._adopt(opened.kept)

    def _adopt(self, kept: bool) -> None:
        found = self._patiently(self._ledger.adopt)
        facts = {"shards": found.shards, "holds": found.holds, "bytes": self._pool.nbytes, "kept": kept}
        self._log.info("pool", gpu=wire.uuid_text(self._device.uuid), **facts)
        if found.lost:
            self._log.warning("gpu_shards_lost", shards=found.lost, why="their pool died with its keeper")
        if found.clashing:
            self._log.error("gpu_records_clash", records=found.clashing)

    # -- the loop --------------------------------------------------------------------------------------
    def run(self) -> None:
        gpu = wire.uuid_text(self._device.uuid)
        self._me.send({"is": "keeper", "gpu": gpu, "pool_bytes": self._pool.nbytes})
        self._me.send({"is": "ready"})
        next_tick = next_reclaim = 0.0
        while True:
            for fd, _ in self._poll.poll(int(HEARTBEAT_S * 1000)):
                self._event(fd)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + HEARTBEAT_S
                self._arena.heartbeat()
                self._bury()
            if now >= next_reclaim:
                next_reclaim = now + RECLAIM_S
                self._patiently(self._ledger.reclaim)

    def _event(self, fd: int) -> None:
        if fd == self._me.control.fileno():
            while self._me.receive() is not None:  # exits at its end; there is nothing else to be told
                pass
        elif fd == self._listener.fileno():
            self._accept()
        elif (client := self._clients.get(fd)) is not None:
            if client.unsent is not None:
                self._send(client, *client.unsent)
            else:
                self._hear(client)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.getuid(), 0) or len(self._clients) >= MAX_CLIENTS:
            self._log.warning("client_refused", pid=pid, uid=uid, clients=len(self._clients))
            sock.close()
            return
        sock.setblocking(False)
        self._clients[sock.fileno()] = Client(sock, Holder(pid, born(pid), 0))
        self._poll.register(sock, select.POLLIN)

    def _hear(self, client: Client) -> None:
        try:
            packet, fds, how = passing.receive(client.sock, wire.MAX_PACKET_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            packet, fds, how = b"", [], 0
        try:
            if not packet:
                self._forget(client)
                return
            if how & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise Malformed("a packet longer than any message")
            self._answer(client, wire.unpack_request(packet), fds)
        except Malformed as error:
            self._send(client, wire.pack_region(Region(0, 0, wire.BAD, str(error))), [])
            self._forget(client)
        finally:
            for fd in fds:
                os.close(fd)

    def _forget(self, client: Client) -> None:
        """The connection is over; what its process holds stays until that is dead."""
        if self._clients.pop(client.sock.fileno(), None) is not None:
            self._poll.unregister(client.sock)
            client.close()
        self._bury()

    def _send(self, client: Client, packet: bytes, fds: list[int]) -> None:
        """Takes over `fds`."""
        client.unsent = None
        try:
            passing.send(client.sock, packet, fds, socket.MSG_DONTWAIT)
        except BlockingIOError:
            client.unsent = packet, fds
            self._poll.modify(client.sock, select.POLLOUT)
            return
        except OSError:
            pass  # its end is reported by the poll
        for fd in fds:
            os.close(fd)
        self._poll.modify(client.sock, select.POLLIN)

    # -- who is dead -----------------------------------------------------------------------------------
    def _bury(self) -> None:
        """Take back what dead processes hold."""
        connected = {client.holder for client in self._clients.values()}
        now = time.monotonic()
        for holder in self._ledger.holders():
            if holder.pid and holder.born:
                dead = born(holder.pid) != holder.born
            elif holder in connected:
                dead = False
                self._unseen.pop(holder, None)
            else:
                dead = now - self._unseen.setdefault(holder, now) > QUARANTINE_S
            if dead:
                count = self._patiently(lambda who=holder: self._ledger.drop_holder(who))  # type: ignore[misc]
                self._log.info("holds_of_the_dead", pid=holder.pid, holds=count)

    # -- requests --------------------------------------------------------------------------------------
    def _answer(self, client: Client, request: Request, fds: list[int]) -> None:
        kind, tag = request.kind, request.tag
        if kind == wire.BYE:
            self._ledger.drop_holder(client.holder)
            self._forget(client)
            return
        if kind == wire.HELLO:
            client.holder = client.holder._replace(client=request.generation)
            self._introduce(client, tag)
            return
        out: list[int] = []
        try:
            if kind == wire.READ:
                region, fd = self._patiently(lambda: self._read_out(request))
                out = [fd] if fd >= 0 else []
            else:
                region = self._patiently(lambda: self._handlers[kind](client, request, fds))
        except IndexBusy:
            region = Region(kind, tag, wire.BUSY, "the arena's index is taken; ask again")
        except (PoolFull, ArenaFull) as error:
            region = Region(kind, tag, wire.FULL, str(error))
        except NotHeld as error:
            region = Region(kind, tag, wire.STALE, str(error))
        except CudaError as error:
            region = Region(kind, tag, wire.DRIVER, str(error))
        except (ValueError, ShardRejected) as error:
            region = Region(kind, tag, wire.BAD, str(error))
        except OSError as error:
            region = Region(kind, tag, wire.FULL, f"no memory on the host: {error.strerror or error}")
        self._send(client, wire.pack_region(region), out)
        if region.status == wire.DRIVER:
            self._check_driver(region.text)

    def _patiently(self, call: Callable[[], T]) -> T:
        """`call()`, again while the index is taken: it changes nothing then. IndexBusy after BUSY_S."""
        until = time.monotonic() + BUSY_S
        while True:
            try:
                return call()
            except IndexBusy:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.0005)

    def _check_driver(self, why: str) -> None:
        """An error that stays means a lost context: only a new process has another."""
        try:
            self._device.memory()
        except CudaError as error:
            self._log.error("driver_lost", why=why, still=str(error))
            os._exit(1)

    def _introduce(self, client: Client, tag: int) -> None:
        gpu, pool_id, nbytes, kind = self._device.uuid, self._ledger.pool, self._pool.nbytes, self._pool.kind
        fds: list[int] = []
        try:
            if kind == KIND_FD:
                fds = [self._pool.export_fd()]
                info = PoolInfo(tag, wire.OK, "", kind, gpu, pool_id, nbytes)
            else:
                info = PoolInfo(tag, wire.OK, "", kind, gpu, pool_id, nbytes, self._pool.export_handle())
        except CudaError as error:
            info = PoolInfo(tag, wire.DRIVER, str(error), kind, gpu, pool_id, nbytes)
        self._send(client, wire.pack_pool(info), fds)
        if info.status == wire.DRIVER:
            self._check_driver(info.text)

    def _keep(self, client: Client, request: Request, fds: list[int]) -> Region:
        if not self._ledger.holds(request.generation, request.lease, client.holder):
            return Region(request.kind, request.tag, wire.STALE, "no such hold")
        client.kept.add((request.generation, request.lease))
        return self._region(request)

    def _settle(self, client: Client, request: Request, fds: list[int]) -> Region:
        self._ledger.drop_holder(client.holder, but=client.kept)
        client.kept.clear()
        return self._region(request)

    def _region(self, request: Request, meta: GpuMeta | None = None, lease: int = 0) -> Region:
        """OK to a request; with `meta`, where that shard is."""
        base = Region(request.kind, request.tag, gpu=self._device.uuid, pool=self._ledger.pool)
        if meta is None:
            return base
        return base._replace(
            offset=meta.offset,
            nbytes=meta.nbytes,
            generation=meta.generation,
            lease=lease,
            dtype=meta.dtype,
            shape=tuple(meta.shape),
        )

    def _reserve(self, client: Client, request: Request, fds: list[int]) -> Region:
        try:
            generation = self._ledger.reserve(request.nbytes, client.holder)
        except PoolFull:
            self._bury()
            generation = self._ledger.reserve(request.nbytes, client.holder)
        offset = self._ledger.blocks[generation].offset
        return self._region(request)._replace(offset=offset, nbytes=request.nbytes, generation=generation)

    def _commit(self, client: Client, request: Request, fds: list[int]) -> Region:
        self._ledger.commit(
            request.generation, client.holder, _text(request.shard_id), request.dtype, request.shape
        )
        return self._region(request)._replace(generation=request.generation)

    def _abort(self, client: Client, request: Request, fds: list[int]) -> Region:
        self._ledger.abort(request.generation, client.holder)
        return self._region(request)

    def _find(self, request: Request) -> GpuMeta | None:
        return self._ledger.find(_text(request.shard_id))

    def _lease(self, client: Client, request: Request, fds: list[int]) -> Region:
        meta = self._find(request)
        if meta is None:
            return _missing(request)
        lease = self._ledger.lease(meta, client.holder)
        return self._region(request, meta, lease=lease)

    def _release(self, client: Client, request: Request, fds: list[int]) -> Region:
        if not self._ledger.release(request.lease, request.generation, client.holder):
            return Region(request.kind, request.tag, wire.STALE, "no such lease")
        return self._region(request)

    def _clear(self, client: Client, request: Request, fds: list[int]) -> Region:
        if not self._store.clear([_text(request.shard_id)])[0]:
            return _missing(request)
        return self._region(request)

    # -- copies between pool and host ------------------------------------------------------------------
    def _read_out(self, request: Request) -> tuple[Region, int]:
        """The shard's bytes in a sealed memfd, the caller's to close. Nothing can take the extent away
        meanwhile: only this thread gives extents back."""
        meta = self._find(request)
        if meta is None:
            return _missing(request), -1
        fd = sealed.create(meta.nbytes)
        try:
            if meta.nbytes:
                os.posix_fallocate(fd, 0, meta.nbytes)
                with mmap.mmap(fd, meta.nbytes) as mapped, memoryview(mapped) as view:
                    for at in range(0, meta.nbytes, CHUNK_BYTES):
                        with view[at : at + CHUNK_BYTES] as piece:
                            self._pool.to_host(meta.offset + at, piece)
                        self._arena.heartbeat()
            sealed.seal(fd)
        except BaseException:
            os.close(fd)
            raise
        return self._region(request, meta), fd

    def _write(self, client: Client, request: Request, fds: list[int]) -> Region:
        nbytes = wire.tensor_bytes(request.dtype, request.shape)
        if not fds or nbytes != request.nbytes:
            raise ValueError("WRITE needs a descriptor with as many bytes as its shape says")
        generation = self._ledger.reserve(nbytes, client.holder)
        try:
            offset = self._ledger.blocks[generation].offset
            done = 0
            while done < nbytes:  # read, not mapped: its owner may cut the file meanwhile
                piece = os.pread(fds[0], min(CHUNK_BYTES, nbytes - done), done)
                if not piece:
                    raise ValueError(f"the descriptor ends after {done} of {nbytes} bytes")
                self._pool.from_host(offset + done, piece)
                done += len(piece)
                self._arena.heartbeat()
            self._ledger.commit(
                generation, client.holder, _text(request.shard_id), request.dtype, request.shape
            )
        except BaseException:
            self._ledger.abort(generation, client.holder)
            raise
        return self._region(request)._replace(generation=generation)


def _missing(request: Request) -> Region:
    return Region(request.kind, request.tag, wire.NOT_FOUND, "no such shard in this pool")


def _text(shard_id: bytes) -> str:
    """A shard id off the wire. ValueError."""
    return shard_id.decode("utf-8", "surrogatepass")


def main() -> None:
    me = child.start()
    listener = socket.socket(fileno=me.boot.listen_fd)
    listener.setblocking(False)
    into, out = (socket.socket(fileno=fd) for fd in me.boot.pocket_fds)
    try:
        device = find_device(Driver(me.settings.cuda_library), me.boot.gpu)
        opened = open_pool(device, me.settings.gpu_pool_bytes, (into, out), me.log)
    except CudaError as error:
        me.fatal(str(error))
    into.close()
    out.close()
    Keeper(me, device, opened, listener).run()


if __name__ == "__main__":
    main()
