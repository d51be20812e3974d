"""The worker's side of the local socket (protocol: shards/local.py): files in and out for this host.

The listener is the supervisor's, shared by all workers like the TCP one. Only processes of this user (or
root) are served; with --data-auth the first message must bring the admin key.

A put: the file is checked, handed to the supervisor (service/holder.py), and published in the arena once that
has it; then the reply goes. A small one is copied into the arena instead, where it costs no descriptor. A
map: a shard that is a file goes out as that file. A large one in the arena becomes a file first, once: the
copy takes its place, in the budget too, and the arena's memory comes back, so the next reader finds a file
(put by HTTP, 1 MiB: 1.3 ms of CPU the first map, 33 µs from then on). All others of the request, small ones
and the parts of exports, which are made when they are asked for and mostly once, are copied into one sealed
file of their own. It belongs to the reader alone and is not in the budget, being what the reader would
otherwise copy out of a reply; here it exists while it is packed and sent: MAX_PACK_BYTES (or one shard), and
large ones one at a time a worker.

Bounds: one request at a time a connection, one message a request, MAX_CLIENTS connections; a client that
takes no reply for REPLY_S is cut. A message that is none is answered with 400 and changes nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from areal_fast.core import ArenaFull, IndexBusy
from areal_fast.errors import KeeperAway, ShardRejected, ShardsNotFound
from areal_fast.service.answers import ARENA_FULL, BUSY, when_free
from areal_fast.service.meters import SHARDS_MAPPED
from areal_fast.shards import raw, sealed
from areal_fast.shards.description import Description, describe
from areal_fast.shards.local import MAX_FILES, MAX_IDS, MAX_MESSAGE_BYTES, decode, encode
from areal_fast.shards.sealed import MAPPED_FROM_BYTES, SealedFile
from areal_fast.shards.store import FileMeta, checked_name

if TYPE_CHECKING:
    from areal_fast.service.child import Child
    from areal_fast.service.gpu import GpuShards
    from areal_fast.shards import ShardStore
    from areal_fast.shards.outgoing import Part

MAX_CLIENTS: Final = 256
REPLY_S: Final = 30.0
HELD_S: Final = 15.0
ALIGNMENT: Final = 64
PACKED_AT_ONCE: Final = 4 << 20
"""Bytes copied on the loop; more are copied beside it."""
MAX_PACK_BYTES: Final = 256 << 20
TOO_MUCH: Final = "These shards are too large to be mapped in one request: ask for fewer, or over HTTP"


class Refusal(Exception):
    """An answer that is no: HTTP's status for it, and its text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Hold:
    """Hands files to the supervisor and waits for its word."""

    def __init__(self, me: Child) -> None:
        self._me = me
        self._token = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._unsent: list[dict[str, Any]] = []

    async def take(self, fd: int) -> dict[str, Any]:
        """{"fd", "inode", "nbytes"} of the file as the supervisor has it. Refusal."""
        self._token += 1
        token, done = self._token, asyncio.get_running_loop().create_future()
        self._waiting[token] = done
        try:
            if not self._me.send({"is": "hold", "token": token}, fd):
                raise Refusal(503, BUSY)
            answer: dict[str, Any] = await asyncio.wait_for(done, HELD_S)
        except TimeoutError:
            raise Refusal(503, BUSY) from None
        finally:
            del self._waiting[token]
        if "why" in answer:
            full = answer["why"] == "full"
            raise Refusal(507 if full else 400, ARENA_FULL if full else answer["why"])
        return answer

    def heard(self, message: dict[str, Any]) -> None:
        """{"do": "held", "token", …}. One that nobody waits for any more is given back."""
        done = self._waiting.get(message["token"])
        if done is not None and not done.done():
            done.set_result(message)
        elif "fd" in message:
            self.tell({"is": "dropped", "fd": message["fd"]})

    def tell(self, message: dict[str, Any]) -> None:
        """Say it now, or when the line has room: `flush`."""
        self._unsent.append(message)
        self.flush()

    def flush(self) -> None:
        while self._unsent and self._me.send(self._unsent[0]):
            del self._unsent[0]


class LocalServer:
    """See the top of the file. key: what a client must show first, "" for nothing."""

    def __init__(
        self, me: Child, shards: ShardStore, gpu: GpuShards, listener: socket.socket, key: str
    ) -> None:
        self._shards = shards
        self._gpu = gpu
        self._listener = listener
        self._key = key
        self._log = me.log
        self.hold = Hold(me)
        self._clients: set[asyncio.Task[None]] = set()
        self._packing = asyncio.Lock()
        listener.setblocking(False)

    def info(self) -> dict[str, Any]:
        """What a client must know to come here."""
        return {
            "socket": self._listener.getsockname()[1:].decode(),
            "uid": os.getuid(),
            "mapped_from_bytes": MAPPED_FROM_BYTES,
            "raw": raw.MEDIA_TYPE,
        }

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        for client in self._clients:
            client.cancel()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.getuid()) or len(self._clients) >= MAX_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._serve(sock))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, sock: socket.socket) -> None:
        known: bool | None = not self._key
        with sock:
            while known is not None:
                await _ready(sock, reading=True)
                known = await self._serve_one(sock, known)

    async def _serve_one(self, sock: socket.socket, known: bool) -> bool | None:
        """One request; whether the client is known now, or None: it is gone. When this returns, the worker
        has none of the request's files any more, however long the client says nothing."""
        try:
            packet, fds, flags, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, 1)
        except (BlockingIOError, InterruptedError):
            return known
        except OSError:
            return None
        file = SealedFile(fds[0] if fds else -1, 0)
        if not packet:
            return None
        out: list[SealedFile] = []
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise Refusal(400, "The message is too long, or brings more than one descriptor")
            request = _read(packet)
            if not known:
                known = self._knows(request)
            reply, out = await self._answer(request, file)
        except Exception as error:
            reply = self._no(error)
        finally:
            file.close()
        try:
            await _send(sock, encode(reply), out)
        except (OSError, TimeoutError):
            return None
        return known

    def _knows(self, request: dict[str, Any]) -> bool:
        key = request.get("key")
        shown = key.encode("utf-8", "replace") if isinstance(key, str) else b""
        if request.get("op") == "hello" and hmac.compare_digest(shown, self._key.encode()):
            return True
        raise Refusal(401, "The first message must be hello, with the admin key")

    async def _answer(
        self, request: dict[str, Any], file: SealedFile
    ) -> tuple[dict[str, Any], list[SealedFile]]:
        op = request.get("op")
        if op == "map":
            return await self._map(_ids(request), _gpus(request))
        if op == "put":
            await self._put(request, file)
        elif op == "clear":
            cleared, tensors, nbytes = await when_free(lambda: self._shards.clear(_ids(request)))
            return {"ok": True, "cleared": cleared, "num_tensors": tensors, "total_bytes": nbytes}, []
        elif op != "hello":
            raise Refusal(400, "Unknown operation")
        return {"ok": True}, []

    def _no(self, error: Exception) -> dict[str, Any]:
        if isinstance(error, ShardsNotFound):
            return {"ok": False, "status": 400, "message": str(error), "missing": error.shard_ids}
        if isinstance(error, Refusal):
            status = error.status
        elif isinstance(error, KeeperAway):
            status = 503
        elif isinstance(error, ShardRejected):
            status = 400
        elif isinstance(error, (ArenaFull, IndexBusy, OSError)):
            status = 503 if isinstance(error, IndexBusy) else 507
            error = Refusal(status, BUSY if status == 503 else ARENA_FULL)
        else:
            status = 500
            self._log.error("fault", where="local", error=repr(error))
            error = Refusal(500, "Internal error")
        return {"ok": False, "status": status, "message": str(error)}

    # -- in --------------------------------------------------------------------------------------------
    async def _put(self, request: dict[str, Any], file: SealedFile) -> None:
        shard_id = request.get("id")
        if not isinstance(shard_id, str):
            raise Refusal(400, "'id' must be a string")
        name = checked_name(shard_id)
        what = describe(request.get("dtype"), request.get("shape"), request.get("form"))
        if file.fd < 0:
            raise Refusal(400, "No descriptor came")
        size = sealed.check(file.fd).st_size
        if size != what.nbytes:
            raise Refusal(400, f"{what.nbytes} bytes are described, the file has {size}")
        if size < MAPPED_FROM_BYTES:
            data = os.pread(file.fd, size, 0)
            await when_free(lambda: self._shards.put(shard_id, what, data))
            return
        await self._publish(file, what, lambda meta: self._shards.put_file(shard_id, name, meta))

    async def _publish(
        self, file: SealedFile, what: Description, publish: Callable[[FileMeta], int | None]
    ) -> None:
        """Have the supervisor hold the file, then `publish` its record: the slot, or None for no."""
        held = await self.hold.take(file.fd)
        meta = FileMeta(what.dtype, list(what.shape), what.form, what.nbytes, held["fd"], held["inode"])
        slot = None
        try:
            slot = await when_free(lambda: publish(meta))
        finally:
            if slot is None:
                self.hold.tell({"is": "dropped", "fd": held["fd"]})
            else:
                self.hold.tell({"is": "placed", "fd": held["fd"], "slot": slot})

    # -- out -------------------------------------------------------------------------------------------
    async def _map(self, ids: list[str], gpus: list[str]) -> tuple[dict[str, Any], list[SealedFile]]:
        placed = self._gpu.placed(ids, gpus) if gpus else {}
        here = [shard_id for shard_id in ids if shard_id not in placed] if placed else ids
        fetched = await self._gpu.fetch(here) if self._gpu.has(here) else None
        parts = self._shards.find(here, fetched)
        files: list[SealedFile] = []
        packed: list[tuple[int, Part]] = []
        shards: list[list[Any]] = []
        made: dict[int, SealedFile] = {}
        at = i = 0
        for shard_id in ids:
            if shard_id in placed:
                shards.append(list(placed[shard_id]))
                continue
            part = parts[i]
            row: list[Any] = [part.dtype, part.shape, part.form, part.nbytes, 0, 0]
            file = part.data
            if part.slot >= 0 and part.nbytes >= MAPPED_FROM_BYTES:
                file = made.get(part.slot) or await self._made_a_file(shard_id, part)
                made[part.slot] = file
                parts[i] = part = part._replace(data=file, slot=-1)
            if isinstance(file, SealedFile):
                files.append(file)
                row[4] = len(files)
            else:
                packed.append((at, part))
                row[5] = at
                at += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
            shards.append(row)
            i += 1
        if files:
            self._shards.arena.count(SHARDS_MAPPED, len(files))
        files.insert(0, await self._packed([(start, part.content) for start, part in packed], at))
        return {"ok": True, "shards": shards, "files": [file.nbytes for file in files]}, files

    async def _made_a_file(self, shard_id: str, part: Part) -> SealedFile:
        """A large shard in the arena turned into a file, which stays if the shard is still the one of its id.

        A kill before the record is published leaves the shard as it was, and the file to the supervisor to
        close; one after it, the file (holder.py). Two readers at once make two; the second is its alone."""
        name = checked_name(shard_id)
        if not self._shards.has_room_for(part.nbytes):
            raise Refusal(507, ARENA_FULL)  # before anything is copied; over HTTP it goes out in pieces
        file = await self._packed([(0, part.content)], part.nbytes)
        await self._publish(file, part.what, lambda meta: self._shards.turn_into_file(name, part.slot, meta))
        return file

    async def _packed(self, pieces: list[tuple[int, Callable[[], memoryview]]], nbytes: int) -> SealedFile:
        """One sealed file of pieces (offset, what makes its bytes)."""
        made = ((start, content()) for start, content in pieces)
        if nbytes <= PACKED_AT_ONCE:
            return sealed.pack(made, nbytes)
        if len(pieces) > 1 and nbytes > MAX_PACK_BYTES:
            raise Refusal(413, TOO_MUCH)
        async with self._packing:
            return await asyncio.to_thread(sealed.pack, made, nbytes)


def _read(packet: bytes) -> dict[str, Any]:
    try:
        request = decode(packet)
    except (ValueError, RecursionError):
        raise Refusal(400, "Not msgpack") from None
    if not isinstance(request, dict):
        raise Refusal(400, "Not a map")
    return request


def _ids(request: dict[str, Any]) -> list[str]:
    ids = request.get("ids")
    if not isinstance(ids, list) or len(ids) > MAX_IDS or not all(isinstance(i, str) for i in ids):
        raise Refusal(400, f"'ids' must be a list of at most {MAX_IDS} strings")
    return ids


def _gpus(request: dict[str, Any]) -> list[str]:
    gpus = request.get("gpus", [])
    if not isinstance(gpus, list) or len(gpus) > MAX_IDS or not all(isinstance(i, str) for i in gpus):
        raise Refusal(400, f"'gpus' must be a list of at most {MAX_IDS} strings")
    return gpus


async def _ready(sock: socket.socket, *, reading: bool) -> None:
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def ready() -> None:
        if not done.done():
            done.set_result(None)

    fd = sock.fileno()
    if reading:
        loop.add_reader(fd, ready)
    else:
        loop.add_writer(fd, ready)
    try:
        await done
    finally:
        if reading:
            loop.remove_reader(fd)
        else:
            loop.remove_writer(fd)


async def _send(sock: socket.socket, packet: bytes, files: list[SealedFile]) -> None:
    assert len(files) <= MAX_FILES
    while True:
        try:
            socket.send_fds(sock, [packet], [file.fd for file in files])
            return
        except (BlockingIOError, InterruptedError):
            await asyncio.wait_for(_ready(sock, reading=False), REPLY_S)
