"""Shards on the same host: descriptors of memory files over a Unix socket, mapped without a copy.

    shards = LocalShards(info)                    # info: the "local" of GET /data/ways
    with shards.create(n) as file:                # n bytes to be filled
        file.view[:] = …
        shards.put("an id", describe("float32", (2, 3)), file)
    (mapped,) = shards.map(["an id"])
    mapped.what, mapped.data                      # writable, and private to this process

Whether both are on the same host is found out by trying: the socket's name is random and in the kernel's
abstract namespace, so who can connect is there. `NotLocal` says no; use another way then.

Protocol: SOCK_SEQPACKET; a message is one msgpack map, of at most MAX_MESSAGE_BYTES; request, then reply.

    {"op": "put", "id", "dtype", "shape", "form"} + the sealed file's descriptor
    {"op": "map", "ids": [≤ MAX_IDS]}      -> "shards": [[dtype, shape, form, nbytes, file, at], …], "files":
                                              their sizes, + a descriptor for each of them, in order
      with "gpus": [UUIDs that the           -> a shard in the pool of one of them is [UUID, the keeper's
      reader has a context on]                  socket] instead: to be had there without the host
    {"op": "clear", "ids": [≤ MAX_IDS]}    -> "cleared", "num_tensors", "total_bytes"
    {"op": "hello", "key"}                 first of all, where --data-auth asks for the admin key
    any reply: "ok"; if not: "status" (HTTP's for the same), "message", and "missing" ids

A mapped shard is a lease that the kernel keeps: it stays readable when the shard is cleared or the proxy is
gone, and its memory goes with the last mapping, however its holder ends.

Blocking, for one thread at a time. No torch.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import msgspec

from areal_fast.errors import ArealFastError, ShardsNotFound
from areal_fast.shards import sealed
from areal_fast.shards.description import Description, describe

MAX_MESSAGE_BYTES: Final = 192 << 10
MAX_IDS: Final = 128
MAX_ID_BYTES: Final = 128 << 10
"""Of all ids in a message."""
MAX_FILES: Final = MAX_IDS + 1
TIMEOUT_S: Final = 60.0

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder().decode


class NotLocal(ArealFastError):
    """The proxy cannot be reached on this host."""


class LocalRefused(ArealFastError):
    """The proxy said no. `status` is what HTTP would have answered."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NewFile:
    """Memory to be filled and put. `view`: its bytes; gone after the put."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.fd = sealed.create(nbytes)
        self.view = memoryview(mmap.mmap(self.fd, nbytes)) if nbytes else memoryview(bytearray())

    def seal(self) -> None:
        """BufferError while an array over `view` is alive: it could still write."""
        owner = self.view.obj
        self.view.release()
        if self.nbytes:
            owner.close()  # type: ignore[attr-defined]
        sealed.seal(self.fd)

    def close(self) -> None:
        self.view.release()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Mapped(NamedTuple):
    """A shard as it was when it was mapped. data: its bytes, writable, private; unmapped with the last
    view."""

    what: Description
    data: memoryview


class OnGpu(NamedTuple):
    """A shard in the pool of a GPU that the reader uses. socket: where its keeper is asked for it."""

    gpu: str
    socket: str


class LocalShards:
    """See the top of the file. `key`: the admin key, where the proxy asks for it. NotLocal."""

    def __init__(self, info: Mapping[str, Any], key: str = "", timeout_s: float = TIMEOUT_S) -> None:
        self._address = b"\0" + str(info["socket"]).encode()
        self._key = key
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._connect()

    def close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def create(self, nbytes: int) -> NewFile:
        return NewFile(nbytes)

    def put(self, shard_id: str, what: Description, file: NewFile) -> None:
        """Store `file` under `shard_id`, replacing any other shard. LocalRefused: nothing was stored."""
        file.seal()
        fields = {"op": "put", "id": shard_id, "dtype": what.dtype, "shape": what.shape, "form": what.form}
        self._ask(fields, file.fd)

    def put_bytes(self, shard_id: str, what: Description, data: bytes | memoryview) -> None:
        """The same of bytes that are somewhere else: one copy."""
        with self.create(len(data)) as file:
            file.view[:] = data
            self.put(shard_id, what, file)

    def map(self, shard_ids: Sequence[str]) -> list[Mapped]:
        """The shards, in order. ShardsNotFound, LocalRefused."""
        return [one for one in self.locate(shard_ids, ()) if isinstance(one, Mapped)]

    def locate(self, shard_ids: Sequence[str], gpus: Sequence[str]) -> list[Mapped | OnGpu]:
        """The same, but for shards in the pool of one of these GPUs (UUIDs), which stay where they are."""
        found: list[Mapped | OnGpu] = []
        for ids in _pages(shard_ids):
            reply, fds = self._ask({"op": "map", "ids": ids, **({"gpus": gpus} if gpus else {})})
            try:
                views = [sealed.map_private(fd, size) for fd, size in zip(fds, reply["files"], strict=True)]
            finally:
                for fd in fds:
                    os.close(fd)
            for row in reply["shards"]:
                if len(row) == len(OnGpu._fields):
                    found.append(OnGpu(*row))
                    continue
                dtype, shape, form, nbytes, file, at = row
                data = views[file][at : at + nbytes] if nbytes else memoryview(bytearray())
                found.append(Mapped(describe(dtype, shape, form), data))
        return found

    def clear(self, shard_ids: Sequence[str]) -> int:
        """Remove shards; how many there were."""
        return sum(self._ask({"op": "clear", "ids": ids})[0]["cleared"] for ids in _pages(shard_ids))

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(self._timeout_s)
        try:
            sock.connect(self._address)
        except OSError as error:
            sock.close()
            raise NotLocal(f"cannot connect to the proxy's local socket: {error}") from None
        self._socket = sock
        if self._key:
            try:
                self._exchange(sock, encode({"op": "hello", "key": self._key}), ())
            except BaseException:
                self.close()
                raise
        return sock

    def _ask(self, fields: dict[str, Any], *fds: int) -> tuple[dict[str, Any], list[int]]:
        """Every request may be repeated: the worker that had the connection may have died."""
        request = encode(fields)
        sock = self._socket
        if sock is not None:
            try:
                return self._exchange(sock, request, fds)
            except (NotLocal, OSError):
                self.close()
        try:
            return self._exchange(self._connect(), request, fds)
        except OSError as error:
            self.close()
            raise NotLocal(f"the proxy's local socket broke: {error}") from None

    def _exchange(
        self, sock: socket.socket, request: bytes, fds: Sequence[int]
    ) -> tuple[dict[str, Any], list[int]]:
        socket.send_fds(sock, [request], list(fds))
        packet, got, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, MAX_FILES)
        if not packet:
            raise NotLocal("the proxy closed the local connection")
        reply: dict[str, Any] = decode(packet)
        if reply["ok"]:
            return reply, got
        for fd in got:
            os.close(fd)
        if "missing" in reply:
            raise ShardsNotFound(reply["missing"])
        raise LocalRefused(reply["status"], reply["message"])


def _pages(ids: Sequence[str]) -> Iterator[list[str]]:
    page: list[str] = []
    size = 0
    for shard_id in ids:
        more = len(shard_id.encode("utf-8", "replace")) + 5
        if page and (len(page) == MAX_IDS or size + more > MAX_ID_BYTES):
            yield page
            page, size = [], 0
        page.append(shard_id)
        size += more
    if page:
        yield page
