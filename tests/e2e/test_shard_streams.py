"""Raw shards that come and go as streams: constant memory, hostile producers, cuts; and what is counted is
exact."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from areal_fast.shards import raw
from areal_fast.shards.description import describe
from tests.e2e.running import Proxy, wait_until
from tests.e2e.test_shard_files import FILE, file_of, totals

MIB = 1 << 20


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy("--arena-max-bytes", "1400M", workers=1, log_level="warning") as running:
        yield running


def used(proxy: Proxy) -> int:
    found: int = proxy.health()["arena"]["granules_used"]
    return found


def private_bytes(pid: int) -> int:
    """A process's own memory: not the arena's pages that it has touched."""
    for line in Path(f"/proc/{pid}/status").read_text().split("\n"):
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon")


@contextmanager
def peak_of(pid: int) -> Iterator[dict[str, int]]:
    """peak: the most private memory meanwhile, beyond what there was before."""
    found, done = {"peak": 0}, threading.Event()
    before = private_bytes(pid)

    def watch() -> None:
        while not done.wait(0.002):
            found["peak"] = max(found["peak"], private_bytes(pid) - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        done.set()
        watching.join()


def stream_in(proxy: Proxy, path: str, tensors: list[tuple[str, int]], block: bytes) -> Any:
    """PUT a file of tensors (name, bytes), made of repeated blocks."""
    layout = raw.lay_out([(name, describe("uint8", (size,))) for name, size in tensors])
    connection = proxy.connection()
    connection.putrequest("PUT", path)
    connection.putheader("content-type", raw.MEDIA_TYPE)
    connection.putheader("content-length", str(layout.file_bytes))
    connection.endheaders(layout.header)
    left = layout.data_bytes
    while left:
        connection.send(block[:left])
        left -= min(left, len(block))
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    return reply.status, answer


def stream_out(proxy: Proxy, method: str, path: str, body: Any, accept: str) -> tuple[int, int]:
    """(bytes, their CRC) of the reply's body, read in pieces."""
    connection = proxy.connection()
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text, {"accept": accept, "content-type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    size = crc = 0
    while piece := reply.read(MIB):
        size += len(piece)
        crc = zlib.crc32(piece, crc)
    connection.close()
    return size, crc


@pytest.mark.slow
def test_a_gib_in_and_out_takes_constant_memory(proxy: Proxy) -> None:
    (pid,) = proxy.worker_pids()
    block = random.Random(1).randbytes(4 * MIB)
    names = [(f"part-{i}", 256 * MIB) for i in range(4)]
    for path, tensors in (("/data/whole", [("t", 1024 * MIB)]), ("/data/batch", names)):
        ids = [name for name, _ in tensors] if path == "/data/batch" else ["whole"]
        with peak_of(pid) as memory:
            assert stream_in(proxy, path, tensors, block)[0] == 200
        assert memory["peak"] < 24 * MIB, f"PUT {path}"
        pairs = [(i, describe("uint8", (size,))) for i, (_, size) in zip(ids, tensors, strict=True)]
        header = raw.lay_out(pairs).header
        crc = zlib.crc32(header)
        for _ in range(256):
            crc = zlib.crc32(block, crc)
        with peak_of(pid) as memory:
            found = stream_out(proxy, "POST", "/data/batch", {"shard_ids": ids}, raw.MEDIA_TYPE)
        assert found == (len(header) + 1024 * MIB, crc)
        assert memory["peak"] < 24 * MIB, f"GET raw of {path}"
        with peak_of(pid) as memory:
            size, _ = stream_out(proxy, "GET", f"/data/{ids[0]}", None, "*/*")
        assert size > 4 * tensors[0][1] // 3
        assert memory["peak"] < 24 * MIB, f"GET JSON of {path}"
        proxy.ask("DELETE", "/data/clear", {"shard_ids": ids})
        wait_until(lambda: used(proxy) == 0, "all is free again")


def test_what_is_too_large_is_refused_before_it_comes_and_says_how_much_may(proxy: Proxy) -> None:
    for kind, size in ((raw.MEDIA_TYPE, 1500 * MIB), ("application/json", 1100 * MIB)):
        connection = proxy.connection()
        connection.putrequest("PUT", "/data/x")
        connection.putheader("content-type", kind)
        connection.putheader("content-length", str(size))
        connection.endheaders()
        reply = connection.getresponse()
        limit = int(reply.read().decode().split("at most ")[1].split()[0])
        assert reply.status == 413 and 1000 * MIB < limit < size
        connection.close()
    assert totals(proxy) == (0, 0)


F1 = {"dtype": "U8", "shape": [400_000], "data_offsets": [0, 400_000]}


def lie(fields: Any, nbytes: int = 400_000) -> bytes:
    header = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(header)) + header + bytes(nbytes)


LIES = {
    "a hole": lie({"a": F1, "b": {**F1, "data_offsets": [400_001, 800_001]}}, 800_001),
    "overlapping": lie({"a": F1, "b": {**F1, "data_offsets": [399_999, 799_999]}}, 799_999),
    "out of range": lie({"a": {**F1, "data_offsets": [400_000, 800_000]}}),
    "past the end": lie({"a": {**F1, "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}),
    "wrong shape": lie({"a": {**F1, "shape": [3, 133_333]}}),
    "less than the file": lie({"a": F1}, 400_001),
    "more than the file": lie({"a": F1}, 399_999),
    "a name twice": lie(b'{"a":%b,"a":%b}' % ((json.dumps(F1).encode(),) * 2)),
    "a huge header": struct.pack("<Q", 1 << 40) + bytes(400_000),
    "a header over the limit": struct.pack("<Q", (2 << 20) + 1) + bytes(3 << 20),
    "a header that is all there is": struct.pack("<Q", 400_000 - 8) + b" " * (400_000 - 8),
    "no header": bytes(400_000),
    "nested": lie(b"[" * 300_000),
}


@pytest.mark.parametrize("case", LIES)
def test_a_large_lie_is_400_and_changes_nothing(proxy: Proxy, case: str) -> None:
    connection = proxy.connection()
    good = file_of(300_000, b"\1" * 300_000)
    assert proxy.ask("PUT", "/data/a", good, headers=FILE, over=connection).status == 200
    for path in ("/data/a", "/data/batch"):
        answer = proxy.ask("PUT", path, LIES[case], headers=FILE, over=connection)
        assert answer.status == 400 and answer.json["status"] == "error" and answer.json["message"]
    answer = proxy.ask("GET", "/data/a", headers={"accept": raw.MEDIA_TYPE}, over=connection)
    assert answer.body.endswith(b"\1" * 300_000), "on the same connection"
    connection.close()
    assert totals(proxy) == (1, 300_000)
    proxy.ask("DELETE", "/data/clear", {"shard_ids": ["a"]})
    wait_until(lambda: used(proxy) == 0 and proxy.health()["arena"]["shards_init"] == 0, "nothing is left")


def test_a_batch_that_does_not_fit_stores_nothing(proxy: Proxy) -> None:
    status, answer = stream_in(
        proxy, "/data/batch", [("fits", MIB), ("large", 700 * MIB), ("too", 699 * MIB)], bytes(4 * MIB)
    )
    assert status == 507 and "memory is full" in answer["message"]
    assert totals(proxy) == (0, 0) and proxy.ask("GET", "/data/fits").status == 404
    wait_until(lambda: used(proxy) == 0, "no room stays taken")


def test_producers_that_are_cut_anywhere_leave_nothing(proxy: Proxy, seed: int) -> None:
    chance = random.Random(seed)
    tensors = {f"t{i}": {**F1, "data_offsets": [i * 400_000, (i + 1) * 400_000]} for i in range(8)}
    body = lie(tensors, 3_200_000)
    lines = ("PUT /data/batch HTTP/1.1", "host: x", f"content-type: {raw.MEDIA_TYPE}")
    head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
    request = head.encode() + body
    for _ in range(40):
        cut = chance.choice((chance.randrange(1200), chance.randrange(len(request)), len(request) - 1))
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=90) as sock:
            sock.sendall(request[:cut])
            how = chance.randrange(3)
            if how == 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == 1:
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
    assert totals(proxy) == (0, 0)
    wait_until(lambda: used(proxy) == 0 and proxy.health()["arena"]["shards_init"] == 0, "nothing is left")


def test_two_at_once_under_one_id_are_one_or_the_other(proxy: Proxy) -> None:
    size = 20 * MIB
    answers: list[int] = []

    def put(byte: int) -> None:
        answers.append(stream_in(proxy, "/data/both", [("t", size)], bytes([byte]) * MIB)[0])

    threads = [threading.Thread(target=put, args=(byte,)) for byte in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 3
    content = proxy.ask("GET", "/data/both", headers={"accept": raw.MEDIA_TYPE}).body[-size:]
    assert content in [bytes([byte]) * size for byte in (1, 2, 3)]
    assert totals(proxy) == (1, size)
    proxy.ask("DELETE", "/data/clear", {"shard_ids": ["both"]})
    wait_until(lambda: used(proxy) == 0, "one is left, and that is cleared")


def test_an_unknown_length_is_taken_too(proxy: Proxy) -> None:
    body = file_of(600_000, b"\5" * 600_000)
    connection = proxy.connection()
    pieces = iter([body[:70_000], body[70_000:]])
    connection.request("PUT", "/data/chunked", pieces, FILE, encode_chunked=True)
    assert connection.getresponse().status == 200 and totals(proxy) == (1, 600_000)
    connection.close()
    proxy.ask("DELETE", "/data/clear", {"shard_ids": ["chunked"]})
