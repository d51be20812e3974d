"""A worker's part in GPU shards: offering the keeper to who asks, and reading its shards for who has no GPU.

Workers open no device. POST /data/gpu asks the supervisor for a keeper and answers with its socket's name;
GET /data/{id} and POST /data/batch of a shard on a GPU ask the keeper for a copy in host memory (a sealed
memfd) and send that. The loop never waits: one connection a keeper, one request at a time on it, the reply
by add_reader.

A keeper that dies meanwhile has a successor under the same name within seconds; the request is sent again
until PATIENCE_S are over, then the client hears 503.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from areal_fast.errors import KeeperAway
from areal_fast.protocol import gpu as wire
from areal_fast.protocol.gpu import Malformed, Region, Request
from areal_fast.service.answers import refuse_data, respond_json
from areal_fast.shards import passing
from areal_fast.shards.description import own_form
from areal_fast.shards.gpu_records import GpuRecords
from areal_fast.shards.outgoing import Part
from areal_fast.shards.sealed import SealedFile

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.shards import ShardStore

START_S: Final = 90.0
"""A keeper's start may take so long: a context on a busy machine."""
PATIENCE_S: Final = 20.0
RETRY_S: Final = 0.05
NO_ANSWER: Final = "The GPU's keeper does not answer. Try again."


class Line:
    """A connection to one keeper. `read` may be called by many tasks; they take turns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._address = f"\0{name}"
        self._sock: socket.socket | None = None
        self._turn = asyncio.Lock()
        self._tag = 0

    async def read(self, shard_id: str) -> tuple[Region, int]:
        """READ's answer and the descriptor that came with it (-1: none). KeeperAway."""
        until = time.monotonic() + PATIENCE_S
        async with self._turn:
            while True:
                try:
                    region, fd = await asyncio.wait_for(self._ask(shard_id), until - time.monotonic())
                except (OSError, TimeoutError, Malformed) as error:
                    self.close()
                    if time.monotonic() + RETRY_S >= until or isinstance(error, Malformed):
                        raise KeeperAway(NO_ANSWER) from None
                except BaseException:
                    self.close()  # the answer may still come, to nobody
                    raise
                else:
                    if region.status != wire.BUSY or time.monotonic() + RETRY_S >= until:
                        return region, fd
                await asyncio.sleep(RETRY_S)

    async def _ask(self, shard_id: str) -> tuple[Region, int]:
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            try:
                sock.connect(self._address)
            except BaseException:
                sock.close()
                raise
            self._sock = sock
        self._tag += 1
        self._sock.send(
            wire.pack_request(
                Request(wire.READ, self._tag, shard_id=shard_id.encode("utf-8", "surrogatepass"))
            )
        )
        packet, fds = await self._receive(self._sock)
        try:
            region = wire.unpack_region(packet)
            if region.tag != self._tag:
                raise Malformed("an answer to another question")
            if region.status != wire.OK:
                return region, -1
            return region, fds.pop()
        finally:
            for fd in fds:
                os.close(fd)

    @staticmethod
    async def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_reader(sock)
        packet, fds, _ = passing.receive(sock, wire.MAX_PACKET_BYTES)
        if not packet:
            raise ConnectionResetError("the keeper is gone")
        return packet, fds

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class GpuShards:
    """See the top of the file. `send` puts a message on the control line."""

    def __init__(self, send: Callable[[dict[str, Any]], bool], shards: ShardStore) -> None:
        self._send = send
        self._records = GpuRecords(shards)
        self._lines: dict[str, Line] = {}
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._token = 0

    def heard(self, message: dict[str, Any]) -> None:
        """From the supervisor: the answer to an offer, or all keepers there are."""
        if message["do"] == "keepers":
            for gpu, name in message["keepers"].items():
                self._lines.setdefault(gpu, Line(name))
            return
        done = self._waiting.get(message["token"])
        if done is not None and not done.done():
            done.set_result(message)

    # -- offering --------------------------------------------------------------------------------------
    async def offer(self, exchange: Exchange) -> None:
        """POST /data/gpu {"gpu": UUID, optional} → {"gpu", "socket", "pool_bytes"}: where this host's
        processes reach the keeper (an abstract Unix socket, SEQPACKET). 503 and why where there is none."""
        try:
            body = msgspec.json.decode(exchange.body) if exchange.body else {}
            asked = body.get("gpu") or ""
            gpu = wire.uuid_text(wire.uuid_bytes(asked)) if asked else ""
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, AttributeError):
            refuse_data(exchange, 400, "Expected a JSON object with an optional string 'gpu'")
            return
        except Malformed as error:
            refuse_data(exchange, 400, str(error))
            return
        answer = await self._keeper(gpu)
        if answer is None or not answer["socket"]:
            refuse_data(exchange, 503, f"No GPU shards here: {answer['why'] if answer else NO_ANSWER}")
            return
        respond_json(exchange, {name: answer[name] for name in ("gpu", "socket", "pool_bytes")})

    async def _keeper(self, gpu: str) -> dict[str, Any] | None:
        self._token += 1
        token, done = self._token, asyncio.get_running_loop().create_future()
        self._waiting[token] = done
        try:
            if not self._send({"is": "keeper", "token": token, "gpu": gpu}):
                return None
            answer: dict[str, Any] = await asyncio.wait_for(done, START_S)
            return answer
        except TimeoutError:
            return None
        finally:
            del self._waiting[token]

    # -- reading ---------------------------------------------------------------------------------------
    def has(self, shard_ids: Iterable[str]) -> bool:
        """Whether any of them is on a GPU. Costs nothing where no keeper ever was."""
        return bool(self._lines) and any(self._records.find(shard_id) is not None for shard_id in shard_ids)

    def placed(self, shard_ids: Iterable[str], gpus: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Those that are on one of these GPUs (UUIDs): on which, and its keeper's socket. For readers who
        can copy them there themselves."""
        names = {gpu: self._lines[gpu].name for gpu in gpus if gpu in self._lines}
        found: dict[str, tuple[str, str]] = {}
        for shard_id in shard_ids if names else ():
            meta = self._records.find(shard_id)
            if meta is not None and (gpu := wire.uuid_text(meta.gpu)) in names:
                found[shard_id] = gpu, names[gpu]
        return found

    async def fetch(self, shard_ids: Iterable[str]) -> dict[str, Part]:
        """Those that are on a GPU, in host memory. KeeperAway if one cannot be had now."""
        fetched: dict[str, Part] = {}
        for shard_id in shard_ids:
            meta = self._records.find(shard_id)
            if meta is None or shard_id in fetched:
                continue
            line = self._lines.get(wire.uuid_text(meta.gpu))
            if line is None:
                raise KeeperAway(NO_ANSWER)
            region, fd = await line.read(shard_id)
            if region.status == wire.OK:
                fetched[shard_id] = _part(region, fd)
            elif region.status != wire.NOT_FOUND:
                raise KeeperAway(f"The GPU's keeper cannot copy it: {region.text}")
        return fetched


def _part(region: Region, fd: int) -> Part:
    """Takes over `fd`."""
    return Part(
        region.dtype, region.shape, own_form(region.dtype), region.nbytes, SealedFile(fd, region.nbytes)
    )
