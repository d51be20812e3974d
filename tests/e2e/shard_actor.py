"""A producer or reader of shards as a process of its own, to be killed: by itself at a step, or by the test.

    python -m tests.e2e.shard_actor PORT LABEL SEED WAY [STEP]

It works on ids of its own, `LABEL-0` to `LABEL-5`, for ever: puts, reads, clears. Before each act it writes
`try ID SIZE-OR--1 SEED`, after it `done`; so whoever reads its lines knows what must be there and what may
be. With a STEP (a name below) it kills itself when it gets there, in its first act but one, which is a put if
the step is a put's: a shard is there, is being replaced or read, and the process is gone.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import signal
import sys

from areal_fast.shards import raw
from areal_fast.shards.description import describe
from areal_fast.shards.local import LocalShards

STEPS = {
    "json": ("head sent", "half sent", "all sent", "answered", "get sent", "get half read"),
    "raw": ("head sent", "half sent", "all sent", "answered", "get sent", "get half read"),
    "local": ("created", "filled", "sealed", "put sent", "put done", "map sent", "mapped"),
}
SIZES = (1000, 262_144, 700_000, 3 << 20)


def content(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


class Actor:
    def __init__(self, port: int, way: str, step: str) -> None:
        self.port = port
        self.way = way
        self.step = step
        self.armed = False
        self.local: LocalShards | None = None
        if way == "local":
            connection = self.connection()
            connection.request("GET", "/data/ways")
            self.local = LocalShards(json.loads(connection.getresponse().read())["local"])
            connection.close()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)

    def at(self, step: str) -> None:
        if self.armed and step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    # -- acts ------------------------------------------------------------------------------------------
    def put(self, shard_id: str, data: bytes) -> None:
        what = describe("uint8", (len(data),))
        if self.local is not None:
            with self.local.create(len(data)) as file:
                self.at("created")
                file.view[:] = data
                self.at("filled")
                if self.armed and self.step == "sealed":
                    file.seal()
                    self.at("sealed")
                if self.armed and self.step == "put sent":
                    self._receive_never()
                self.local.put(shard_id, what, file)
            self.at("put done")
            return
        if self.way == "raw":
            body, kind = raw.lay_out([("t", what)]).header + data, raw.MEDIA_TYPE
        else:
            fields = {"type": "tensor", "data": base64.b64encode(data).decode(), "shape": [len(data)]}
            body, kind = json.dumps({**fields, "dtype": "torch.uint8"}).encode(), "application/json"
        connection = self.connection()
        connection.putrequest("PUT", f"/data/{shard_id}")
        connection.putheader("content-type", kind)
        connection.putheader("content-length", str(len(body)))
        connection.endheaders()
        self.at("head sent")
        connection.send(body[: len(body) // 2])
        self.at("half sent")
        connection.send(body[len(body) // 2 :])
        self.at("all sent")
        reply = connection.getresponse()
        text = reply.read()
        assert reply.status == 200, text
        self.at("answered")
        connection.close()

    def _receive_never(self) -> None:
        """The next exchange ends with its request: this process dies before the reply."""
        assert self.local is not None

        def send_and_die(sock: object, request: bytes, fds: object) -> None:
            import socket

            socket.send_fds(sock, [request], list(fds))  # type: ignore[arg-type, call-overload]
            os.kill(os.getpid(), signal.SIGKILL)

        self.local._exchange = send_and_die  # type: ignore[method-assign, assignment]

    def get(self, shard_id: str) -> None:
        if self.local is not None:
            if self.armed and self.step == "map sent":
                self._receive_never()
            self.mapped = self.local.map([shard_id])
            assert self.mapped[0].data[0] >= 0
            self.at("mapped")
            return
        connection = self.connection()
        accept = raw.MEDIA_TYPE if self.way == "raw" else "*/*"
        connection.request("GET", f"/data/{shard_id}", headers={"accept": accept})
        self.at("get sent")
        reply = connection.getresponse()
        assert reply.status == 200
        reply.read(1000)
        self.at("get half read")
        reply.read()
        connection.close()

    def clear(self, shard_id: str) -> None:
        if self.local is not None:
            self.local.clear([shard_id])
            return
        connection = self.connection()
        body = json.dumps({"shard_ids": [shard_id]})
        connection.request("DELETE", "/data/clear", body, {"content-type": "application/json"})
        assert connection.getresponse().read()
        connection.close()


def main() -> None:
    port, label, seed, way, *step = sys.argv[1:]
    actor = Actor(int(port), way, step[0] if step else "")
    chance = random.Random(int(seed))
    live: set[str] = set()
    act = 0
    while True:
        shard_id = f"{label}-{chance.randrange(6)}"
        doing = chance.choice(("put", "put", "get", "clear"))
        if actor.step:
            reading = actor.step.startswith(("get", "map"))
            shard_id, doing, actor.armed = f"{label}-0", "get" if act and reading else "put", act == 1
        size = (actor.step and SIZES[2 + act % 2]) or chance.choice(SIZES)
        if doing == "get" and shard_id not in live:
            continue
        act += 1
        print("try", shard_id, {"put": size, "clear": -1, "get": -2}[doing], act, flush=True)
        if doing == "put":
            actor.put(shard_id, content(size, act))
            live.add(shard_id)
        elif doing == "get":
            actor.get(shard_id)
        else:
            actor.clear(shard_id)
            live.discard(shard_id)
        print("done", flush=True)


if __name__ == "__main__":
    main()
