"""Shards as files on the same host: leases, kills, hostile producers, and in the end nothing is left."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_fast.errors import ShardsNotFound
from areal_fast.shards import raw, sealed
from areal_fast.shards.description import describe
from areal_fast.shards.local import LocalRefused, LocalShards, NotLocal, decode, encode
from tests.e2e.running import ADMIN, Proxy, alive, wait_until

SIZE = 1 << 20
WHAT = describe("uint8", (SIZE,))
SECONDS = 8.0


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy(workers=2, log_level="warning") as running:
        yield running


@pytest.fixture
def shards(proxy: Proxy) -> Iterator[LocalShards]:
    with connected(proxy) as found:
        yield found


def connected(proxy: Proxy, key: str = "") -> LocalShards:
    return LocalShards(proxy.ask("GET", "/data/ways", key=key or None).json["local"], key)


def held_files(proxy: Proxy) -> int:
    """Shard files that the supervisor has open."""
    folder = Path(f"/proc/{proxy.pid}/fd")
    found = 0
    for link in folder.iterdir():
        try:
            found += "areal_fast-shard" in os.readlink(link)
        except OSError:
            continue
    return found


def totals(proxy: Proxy) -> tuple[int, int]:
    answer = proxy.ask("DELETE", "/data/clear", {"shard_ids": []}).json
    return answer["num_tensors"], answer["total_bytes"]


def emptied(proxy: Proxy, shard_ids: list[str]) -> None:
    proxy.ask("DELETE", "/data/clear", {"shard_ids": shard_ids})
    wait_until(lambda: held_files(proxy) == 0, "the supervisor has closed every file")
    wait_until(lambda: proxy.health()["shard_file_bytes"] == 0, "and counts none")


def test_a_mapped_shard_outlives_its_removal(proxy: Proxy, shards: LocalShards) -> None:
    data = os.urandom(SIZE)
    shards.put_bytes("lease", WHAT, data)
    assert held_files(proxy) == 1
    assert proxy.health()["shard_file_bytes"] == SIZE
    (mapped,) = shards.map(["lease"])
    emptied(proxy, ["lease"])
    assert bytes(mapped.data) == data
    with pytest.raises(ShardsNotFound):
        shards.map(["lease"])
    assert proxy.ask("GET", "/data/lease").status == 404


def test_a_reader_cannot_change_a_shard(proxy: Proxy, shards: LocalShards) -> None:
    shards.put_bytes("mine", WHAT, bytes(SIZE))
    (first,) = shards.map(["mine"])
    first.data[:4] = b"abcd"
    (second,) = shards.map(["mine"])
    assert bytes(second.data) == bytes(SIZE)
    emptied(proxy, ["mine"])


def test_a_producer_cannot_change_it_either(proxy: Proxy, shards: LocalShards) -> None:
    with shards.create(SIZE) as file:
        view = file.view
        shards.put("sealed", WHAT, file)
        with pytest.raises(ValueError, match="released"):
            view[0] = 1
        with pytest.raises(OSError):
            os.pwrite(file.fd, b"x", 0)
        with pytest.raises(OSError):
            os.truncate(file.fd, 0)
    emptied(proxy, ["sealed"])


def test_no_death_of_a_worker_or_cleaner_loses_a_shard(proxy: Proxy, shards: LocalShards) -> None:
    data = os.urandom(SIZE)
    shards.put_bytes("survivor", WHAT, data)
    proxy.kill(*proxy.worker_pids(), proxy.cleaner_pid())
    wait_until(lambda: len(proxy.worker_pids()) == 2, "there are workers again")
    assert bytes(shards.map(["survivor"])[0].data) == data
    answer = proxy.ask("GET", "/data/survivor", headers={"accept": raw.MEDIA_TYPE})
    assert answer.body.endswith(data)
    emptied(proxy, ["survivor"])


def test_the_end_of_the_proxy_leaves_readers_what_they_mapped() -> None:
    with Proxy(workers=1, log_level="warning") as proxy:
        shards = connected(proxy)
        data = os.urandom(SIZE)
        shards.put_bytes("last", WHAT, data)
        (mapped,) = shards.map(["last"])
        proxy.end()
    assert bytes(mapped.data) == data
    with pytest.raises(NotLocal):
        shards.map(["last"])
    shards.close()


FILE = {"content-type": raw.MEDIA_TYPE}


def file_of(nbytes: int, data: bytes = b"") -> bytes:
    """A safetensors file of one tensor."""
    return raw.lay_out([("t", describe("uint8", (nbytes,)))]).header + (data or bytes(nbytes))


def test_files_count_against_the_budget() -> None:
    """For files, shards put over HTTP, small ones and sessions alike; and what is full can be emptied."""
    flags = ("--arena-max-bytes", "32M")
    with Proxy(*flags, workers=2, log_level="warning") as proxy, connected(proxy) as shards:
        session_id, key = proxy.start("early")
        assert proxy.chat(key).status == 200
        what = describe("uint8", (20 << 20,))
        shards.put_bytes("first", what, bytes(what.nbytes))
        with pytest.raises(LocalRefused) as refusal:
            shards.put_bytes("second", what, bytes(what.nbytes))
        assert refusal.value.status == 507
        assert proxy.ask("PUT", "/data/second", file_of(20 << 20), headers=FILE).status == 507
        filled = 0
        while (
            answer := proxy.ask("PUT", f"/data/small-{filled}", file_of(200_000), headers=FILE)
        ).status == 200:
            filled += 1
        assert answer.status == 507 and "memory is full" in answer.json["message"]
        assert 20 < filled < 60, "12 MiB are left beside the file, a sixteenth of all is kept back"
        statuses = [proxy.chat(proxy.start("x")[1], "x" * 20_000).status for _ in range(12)]
        assert statuses[-1] == 507, "sessions see the file's share, too"
        assert proxy.reward(key).status == 200, "the reserve is there for the rest of a session's life"
        assert proxy.export(session_id).status == 200
        proxy.ask("DELETE", "/data/clear", {"shard_ids": ["first"]})
        assert proxy.ask("PUT", "/data/second", file_of(18 << 20), headers=FILE).status == 200, "at once"
        proxy.ask("DELETE", "/data/clear", {"shard_ids": ["second"]})
        shards.put_bytes("third", what, bytes(what.nbytes))
        emptied(proxy, ["third", *(f"small-{i}" for i in range(filled))])
        assert proxy.health()["arena"]["granules_outside"] == 0


@pytest.mark.parametrize("size", [300_000, 9 << 20])
def test_a_large_shard_put_over_http_becomes_a_file_when_it_is_mapped(
    proxy: Proxy, shards: LocalShards, size: int
) -> None:
    data = os.urandom(size)
    before = totals(proxy)
    assert proxy.ask("PUT", "/data/moved", file_of(size, data), headers=FILE).status == 200
    pages = -(-size // 4096)
    wait_until(lambda: proxy.health()["arena"]["granules_used"] >= pages, "it is in the arena")
    assert held_files(proxy) == 0
    first, again = shards.map(["moved", "moved"])
    assert bytes(first.data) == bytes(again.data) == data
    assert held_files(proxy) == 1 and totals(proxy) == (before[0] + 1, before[1] + size)
    wait_until(
        lambda: (s := proxy.health()["arena"])["granules_used"] < pages and s["granules_outside"] == pages,
        "it is moved, not copied, and counted once",
    )
    assert bytes(shards.map(["moved"])[0].data) == data
    assert proxy.ask("GET", "/data/moved", headers={"accept": raw.MEDIA_TYPE}).body.endswith(data)
    assert held_files(proxy) == 1, "the next reader gets the same file"
    page = proxy.ask("GET", "/metrics").body.decode()
    assert "\nareal_fast_shard_files 1\n" in page and f"\nareal_fast_shard_file_bytes {size}\n" in page
    assert int(page.split("\nareal_fast_shards_mapped_total ")[1].split("\n")[0]) >= 2
    emptied(proxy, ["moved"])
    assert totals(proxy) == before


def test_what_does_not_fit_as_a_file_still_goes_out_over_http() -> None:
    flags = ("--arena-max-bytes", "32M")
    with Proxy(*flags, workers=1, log_level="warning") as proxy, connected(proxy) as shards:
        data = os.urandom(20 << 20)
        assert proxy.ask("PUT", "/data/big", file_of(len(data), data), headers=FILE).status == 200
        with pytest.raises(LocalRefused) as refusal:
            shards.map(["big"])
        assert refusal.value.status == 507
        assert proxy.ask("GET", "/data/big", headers={"accept": raw.MEDIA_TYPE}).body.endswith(data)
        emptied(proxy, ["big"])


def test_data_auth_asks_for_the_key() -> None:
    with Proxy("--data-auth", workers=1, log_level="warning") as proxy:
        assert proxy.ask("GET", "/data/ways").status in (401, 403)
        info = proxy.ask("GET", "/data/ways", key=ADMIN).json["local"]
        with LocalShards(info) as unknown, pytest.raises(LocalRefused) as refusal:
            unknown.put_bytes("x", WHAT, bytes(SIZE))
        assert refusal.value.status == 401
        with pytest.raises(LocalRefused):
            LocalShards(info, "wrong")
        with LocalShards(info, ADMIN) as known:
            known.put_bytes("x", WHAT, bytes(SIZE))
            assert len(known.map(["x"])) == 1


PUT = {"op": "put", "id": "evil", "dtype": "uint8", "shape": [SIZE], "form": "own"}


def sealed_file(nbytes: int) -> int:
    fd = sealed.create(nbytes)
    sealed.seal(fd)
    return fd


HOSTILE: dict[str, tuple[Any, Any]] = {
    "no descriptor": (PUT, None),
    "not sealed": (PUT, lambda: sealed.create(SIZE)),
    "not a memory file": (PUT, lambda: os.open("/dev/zero", os.O_RDONLY)),
    "a pipe": (PUT, lambda: os.pipe()[0]),
    "shorter than it says": (PUT, lambda: sealed_file(SIZE - 1)),
    "longer than it says": (PUT, lambda: sealed_file(SIZE + 1)),
    "huge and sparse": ({**PUT, "shape": [1 << 40]}, lambda: sealed_file(1 << 40)),
    "negative size": ({**PUT, "shape": [-SIZE]}, lambda: sealed_file(SIZE)),
    "shape of no list": ({**PUT, "shape": "x"}, lambda: sealed_file(SIZE)),
    "unknown dtype": ({**PUT, "dtype": "object"}, lambda: sealed_file(SIZE)),
    "id of no text": ({**PUT, "id": 5}, lambda: sealed_file(SIZE)),
    "an id of ours": ({**PUT, "id": "\0x"}, lambda: sealed_file(SIZE)),
    "unknown operation": ({"op": "exec"}, None),
    "no operation": ({}, None),
    "ids of no list": ({"op": "map", "ids": "x"}, None),
    "too many ids": ({"op": "map", "ids": ["x"] * 129}, None),
    "gpus of no list": ({"op": "map", "ids": [], "gpus": 7}, None),
    "gpus of no text": ({"op": "map", "ids": [], "gpus": [b"\xff"]}, None),
    "not a map": ([1], None),
    "not msgpack": (b"\xc1", None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_message_changes_nothing(proxy: Proxy, shards: LocalShards, case: str) -> None:
    before = totals(proxy)
    message, make = HOSTILE[case]
    fds = [] if make is None else [make()]
    name = proxy.ask("GET", "/data/ways").json["local"]["socket"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(60)
        sock.connect("\0" + name)
        socket.send_fds(sock, [message if isinstance(message, bytes) else encode(message)], fds)
        reply = decode(sock.recv(65536))
        assert not reply["ok"]
        assert reply["status"] in (400, 507)
        assert reply["message"]
        sock.send(encode({"op": "map", "ids": []}))
        assert decode(sock.recv(65536))["ok"], "and the connection goes on"
    for fd in fds:
        os.close(fd)
    assert totals(proxy) == before
    wait_until(lambda: held_files(proxy) == 0, "nothing is held")


class Producer(threading.Thread):
    """Puts, reads and clears its own ids. `live`: sizes by id; `unsure`: ids whose last call broke."""

    def __init__(self, proxy: Proxy, name: str, seed: int, until: float) -> None:
        super().__init__()
        self.proxy = proxy
        self.label = name
        self.random = random.Random(seed)
        self.until = until
        self.live: dict[str, bytes] = {}
        self.unsure: set[str] = set()
        self.acts = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        shards: LocalShards | None = None
        try:
            while time.monotonic() < self.until:
                shard_id = f"{self.label}-{self.random.randrange(12)}"
                try:
                    shards = shards or connected(self.proxy)
                    self.act(shards, shard_id)
                    self.acts += 1
                except (NotLocal, OSError, http.client.HTTPException, json.JSONDecodeError, KeyError):
                    self.unsure.add(shard_id)
                    if shards is not None:
                        shards.close()
                    shards = None
                except LocalRefused as error:
                    assert error.status == 503, error
                    self.unsure.add(shard_id)
        except BaseException as error:
            self.error = error
        finally:
            if shards is not None:
                shards.close()

    def act(self, shards: LocalShards, shard_id: str) -> None:
        size = self.random.choice((1000, 262_144, 300_001, 600_000))
        way = self.random.random()
        if way < 0.5:
            data = self.random.randbytes(size)
            what = describe("uint8", (size,))
            if way < 0.35:
                shards.put_bytes(shard_id, what, data)
            else:
                body = raw.lay_out([("t", what)]).header + data
                kind = {"content-type": raw.MEDIA_TYPE}
                assert self.proxy.ask("PUT", f"/data/{shard_id}", body, headers=kind).status == 200
            self.live[shard_id] = data
            self.unsure.discard(shard_id)
        elif way < 0.7:
            shards.clear([shard_id])
            self.live.pop(shard_id, None)
            self.unsure.discard(shard_id)
        elif shard_id in self.live and shard_id not in self.unsure:
            assert bytes(shards.map([shard_id])[0].data) == self.live[shard_id]


@pytest.mark.slow
def test_count_and_bytes_are_exact_after_random_kills(seed: int) -> None:
    with Proxy("--hang-timeout-seconds", "3", workers=3, log_level="warning") as proxy:
        until = time.monotonic() + SECONDS
        producers = [Producer(proxy, f"p{i}", seed + i, until) for i in range(3)]
        for producer in producers:
            producer.start()
        chance, kills = random.Random(seed), 0
        while time.monotonic() < until:
            threading.Event().wait(chance.uniform(0.2, 0.8))
            try:
                health = proxy.health()
            except (OSError, http.client.HTTPException):
                continue
            rows = [row for row in (*health["workers"], health["cleaner"]) if row and row["pid"]]
            row = chance.choice(rows or [None])
            if row is not None and alive(row["pid"]):
                os.kill(row["pid"], signal.SIGKILL)
                kills += 1
        for producer in producers:
            producer.join(90)
            assert not producer.is_alive()
            if producer.error is not None:
                raise AssertionError("\n".join(proxy.lines[-20:])) from producer.error
        assert kills > 2 and sum(producer.acts for producer in producers) > 20
        wait_until(lambda: len(proxy.worker_pids()) == 3, "all workers are back")
        count = nbytes = 0
        with connected(proxy) as shards:
            for producer in producers:
                for shard_id in {*producer.live, *producer.unsure}:
                    try:
                        (mapped,) = shards.map([shard_id])
                    except ShardsNotFound:
                        assert shard_id in producer.unsure, "an acknowledged shard is lost"
                        continue
                    if shard_id not in producer.unsure:
                        assert bytes(mapped.data) == producer.live[shard_id]
                    count += 1
                    nbytes += mapped.what.nbytes
        wait_until(lambda: totals(proxy) == (count, nbytes), f"totals are {count} shards, {nbytes} bytes")
        wait_until(lambda: proxy.health()["arena"]["shards_active"] == count, "and so many records")
        everything = [i for producer in producers for i in (*producer.live, *producer.unsure)]
        emptied(proxy, everything)
        wait_until(lambda: totals(proxy) == (0, 0), "nothing is left")
