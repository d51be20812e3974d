"""The ways a shard can go in and out, behind one face, for tests that hold for all of them.

A way puts bytes under an id and gets (description, bytes) back; how it does that is its own. Bytes here are
a tensor's as torch holds them (and an array's as numpy does): what a way changes underway (JSON widens
bfloat16) it must change back.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import numpy as np

from areal_fast import client
from areal_fast.client import Client
from areal_fast.config import cuda_library
from areal_fast.errors import ShardsNotFound
from areal_fast.shards import raw
from areal_fast.shards.description import Description, describe, own_form
from areal_fast.shards.local import LocalRefused, LocalShards
from areal_fast.shards.small_floats import SMALL_FLOATS, widened
from tests.devices import Gpus
from tests.e2e.running import ADMIN, Proxy


class Shard(NamedTuple):
    what: Description
    data: bytes


class Refused(Exception):
    """The proxy said no; `status` is HTTP's, or what the way's own refusal stands for."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status


class Way(Protocol):
    name: str

    def takes(self, what: Description) -> bool:
        """Whether it can bring this in at all."""
        ...

    def put(self, shard_id: str, shard: Shard) -> None: ...
    def get(self, shard_ids: Sequence[str]) -> list[Shard]: ...
    def shown(self, shard: Shard) -> Shard:
        """What `get` gives of a shard: the same, or the same values where the way has no word for them."""

    def close(self) -> None: ...


def checked(answer: Any) -> Any:
    if answer.status != 200:
        raise Refused(answer.status, answer.body.decode())
    return answer


class _Plain:
    def takes(self, what: Description) -> bool:
        return True

    def shown(self, shard: Shard) -> Shard:
        return shard


class _Http(_Plain):
    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    def close(self) -> None:
        """Nothing is kept open."""


class Json(_Http):
    name = "json"

    def put(self, shard_id: str, shard: Shard) -> None:
        what, data = shard
        if what.form == "bf16":
            data = (np.frombuffer(data, "<u2").astype("<u4") << 16).astype("<u4").tobytes()
        body = {
            "type": "ndarray" if what.form == "ndarray" else "tensor",
            "data": None if what.form == "meta" else base64.b64encode(data).decode(),
            "shape": what.shape,
            "dtype": what.dtype if what.form == "ndarray" else f"torch.{what.dtype}",
        }
        checked(self.proxy.ask("PUT", f"/data/{quote(shard_id, safe='')}", body))

    def get(self, shard_ids: Sequence[str]) -> list[Shard]:
        answer = checked(self.proxy.ask("POST", "/data/batch", {"shard_ids": list(shard_ids)}))
        return [self._shard(fields) for fields in answer.json]

    def shown(self, shard: Shard) -> Shard:
        """8-bit floats are float32 in JSON."""
        what, data = shard
        if what.form != "own" or what.dtype not in SMALL_FLOATS or not data:
            return shard
        return Shard(what._replace(form="wide"), bytes(widened(memoryview(data), what.dtype)))

    def _shard(self, fields: dict[str, Any]) -> Shard:
        array = fields["type"] == "ndarray"
        data = b"" if fields["data"] is None else base64.b64decode(fields["data"])
        form: str | None = "ndarray" if array else "meta" if fields["data"] is None else None
        what = describe(fields["dtype"], fields["shape"], form)
        if what.form == "bf16":
            data = (np.frombuffer(data, "<u4") >> 16).astype("<u2").tobytes()
        elif what.nbytes != len(data):
            what = describe(fields["dtype"], fields["shape"], "wide")
        return Shard(what, data)


class Raw(_Http):
    name = "raw"

    def put(self, shard_id: str, shard: Shard) -> None:
        body = raw.lay_out([("t", shard.what)]).header + shard.data
        checked(
            self.proxy.ask(
                "PUT", f"/data/{quote(shard_id, safe='')}", body, headers={"content-type": raw.MEDIA_TYPE}
            )
        )

    def get(self, shard_ids: Sequence[str]) -> list[Shard]:
        headers = {"accept": raw.MEDIA_TYPE, "content-type": "application/json"}
        body = json.dumps({"shard_ids": list(shard_ids)}).encode()
        answer = checked(self.proxy.ask("POST", "/data/batch", body, headers=headers))
        assert answer.headers["content-type"] == raw.MEDIA_TYPE
        entries, data = raw.parse(answer.body)
        found = {name: Shard(what, bytes(data[start:stop])) for name, what, start, stop in entries}
        assert set(found) == set(shard_ids)
        return [found[shard_id] for shard_id in shard_ids]


class Local(_Plain):
    name = "local"

    def __init__(self, proxy: Proxy) -> None:
        self.shards = LocalShards(proxy.ask("GET", "/data/ways").json["local"])

    def put(self, shard_id: str, shard: Shard) -> None:
        with _refusals():
            self.shards.put_bytes(shard_id, shard.what, shard.data)

    def get(self, shard_ids: Sequence[str]) -> list[Shard]:
        with _refusals():
            return [Shard(mapped.what, bytes(mapped.data)) for mapped in self.shards.map(shard_ids)]

    def close(self) -> None:
        self.shards.close()


class Gpu(_Plain):
    """The Python client in a process that uses the GPU: in from device memory, out into it. What is not on
    the GPU comes to it as to any client."""

    name = "gpu"

    def __init__(self, proxy: Proxy) -> None:
        self.gpus = Gpus(cuda_library())
        self.client = Client(f"http://127.0.0.1:{proxy.port}", ADMIN)

    def takes(self, what: Description) -> bool:
        return what.form == own_form(what.dtype)

    def put(self, shard_id: str, shard: Shard) -> None:
        with _refusals():
            array = self.gpus.array(shard.what.dtype, shard.what.shape, shard.data)
            reference = self.client.put(array, shard_id)
        assert (reference.way, reference.why) == ("gpu", "")

    def get(self, shard_ids: Sequence[str]) -> list[Shard]:
        with _refusals():
            return [self._shard(one) for one in self.client.get_many(shard_ids)]

    @staticmethod
    def _shard(one: client.Shard) -> Shard:
        assert one.way in ("gpu", "map") and (one.device is not None) == (one.way == "gpu")
        return Shard(Description(one.dtype, one.shape, one._form), bytes(one.data))

    def close(self) -> None:
        self.client.close()
        self.gpus.close()


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except LocalRefused as error:
        raise Refused(error.status, str(error)) from None
    except client.ShardsNotFound as error:
        raise Refused(400, str(error)) from None
    except ShardsNotFound as error:
        raise Refused(400, f"{error} {error.shard_ids}") from None


WAYS: dict[str, Any] = {"json": Json, "raw": Raw, "local": Local, "gpu": Gpu}
