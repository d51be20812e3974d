"""GPU shards in a whole proxy, on the fake driver: offered, put, read by everybody, and every process
killed."""

from __future__ import annotations

import base64
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from areal_fast.shards import raw
from areal_fast.shards.gpu import GpuClient, GpuShardNotFound, KeeperGone
from areal_fast.shards.local import LocalShards
from tests import fakecuda
from tests.e2e.running import Proxy, alive, wait_until

pytestmark = pytest.mark.slow

FLOATS = base64.b64decode("AACAPwAAAEAAAEBAAACAQA==")


def proxy(*flags: str, library: str = "", workers: int = 2, **environment: str) -> Proxy:
    environment["AREAL_FAST_LIBCUDA"] = library or fakecuda.library()
    return Proxy("--gpu-pool-bytes", "8M", *flags, workers=workers, environment=environment)


def offer(running: Proxy) -> GpuClient:
    answer = running.ask("POST", "/data/gpu", {})
    assert answer.status == 200, answer.body
    return GpuClient.connect(answer.json["socket"], fakecuda.library())


def keeper_pid(running: Proxy) -> int:
    return wait_until(
        lambda: running.health().get("keeper-0", {}).get("pid") or 0,
        "there is a keeper",
    )


def uses_driver(pid: int) -> bool:
    return "libfakecuda" in Path(f"/proc/{pid}/maps").read_text()


def test_without_a_driver_everything_else_works() -> None:
    with proxy(library="libcuda-of-nobody.so") as running:
        for _ in range(3):
            answer = running.ask("POST", "/data/gpu", {"gpu": "GPU-" + "ab" * 16})
            assert answer.status == 503 and "libcuda-of-nobody.so" in answer.json["message"]
        assert len(running.log("no_keeper")) == 1
        body = {"type": "tensor", "data": "AACAPw==", "shape": [1], "dtype": "torch.float32"}
        assert running.ask("PUT", "/data/x", body).status == 200
        assert running.ask("GET", "/data/x").json == body
        assert running.chat(running.start("t")[1]).status == 200
        running.terminate()
        assert running.wait() == 0


def test_switched_off() -> None:
    with proxy("--gpu-pool-bytes", "0") as running:
        answer = running.ask("POST", "/data/gpu")
        assert answer.status == 503 and "--gpu-pool-bytes" in answer.json["message"]
        assert "keeper-0" not in running.health()


def test_what_an_offer_refuses() -> None:
    with proxy(workers=1) as running:
        for body in (b"x", b"[]", {"gpu": "GPU-12"}, {"gpu": 7}):
            assert running.ask("POST", "/data/gpu", body).status == 400
        answer = running.ask("POST", "/data/gpu", {"gpu": "GPU-" + "11" * 16})
        assert answer.status == 503 and "among the 1" in answer.json["message"]
        assert running.ask("PUT", "/data/gpu", _json("float32", [1], b"abcd")).status == 200
        assert running.ask("GET", "/data/gpu").status == 200


def _json(dtype: str, shape: list[int], data: bytes) -> dict[str, object]:
    return {
        "type": "tensor",
        "data": base64.b64encode(data).decode(),
        "shape": shape,
        "dtype": f"torch.{dtype}",
    }


def test_everybody_can_read_a_gpu_shard() -> None:
    with proxy() as running:
        with ThreadPoolExecutor(4) as pool:  # many ask at once, one keeper starts
            answers = list(pool.map(lambda _: running.ask("POST", "/data/gpu", {}), range(8)))
        assert {a.json["socket"] for a in answers} == {answers[0].json["socket"]}
        assert answers[0].json["gpu"] == "a0a0a0a0-a0a0-a0a0-a0a0-a0a0a0a0a0a0"
        keeper = keeper_pid(running)
        assert uses_driver(keeper)
        with offer(running) as client, running.each_worker() as workers:
            client.write("floats", "float32", (2, 2), FLOATS)
            client.write("halves", "bfloat16", (2,), b"\x80\x3f\x00\x40")
            client.write("nothing", "int64", (0, 3), b"")
            running.ask("PUT", "/data/host", _json("float32", [1], b"abcd"))
            assert len(workers) == 2
            for pid, over in workers.items():
                ask = lambda method, path, body=None, over=over: running.ask(method, path, body, over=over)  # noqa: E731
                assert ask("GET", "/data/floats").json == _json("float32", [2, 2], FLOATS)
                wide = base64.b64encode(b"\0\0\x80\x3f\0\0\0\x40").decode()
                assert ask("GET", "/data/halves").json["data"] == wide
                assert ask("GET", "/data/nothing").json == _json("int64", [0, 3], b"")
                batch = ask("POST", "/data/batch", {"shard_ids": ["host", "floats", "floats"]}).json
                assert batch == [_json("float32", [1], b"abcd"), *[_json("float32", [2, 2], FLOATS)] * 2]
                missing = ask("POST", "/data/batch", {"shard_ids": ["floats", "none"]})
                assert missing.status == 400 and missing.json["missing_shard_ids"] == ["none"]
                assert not uses_driver(pid)
            assert not uses_driver(running.cleaner_pid()) and not uses_driver(running.pid)
            answer = running.ask("DELETE", "/data/clear", {"shard_ids": ["floats", "halves", "nothing"]})
            assert (answer.json["cleared_count"], answer.json["num_tensors"]) == (3, 1)
            assert running.ask("GET", "/data/floats").status == 404
            with pytest.raises(GpuShardNotFound):
                client.map("floats")
            client.write("replaced", "float32", (2, 2), FLOATS)
            running.ask("PUT", "/data/replaced", _json("float32", [1], b"abcd"))
            assert running.ask("GET", "/data/replaced").json == _json("float32", [1], b"abcd")
        running.terminate()
        assert running.wait() == 0
        assert not alive(keeper)


def test_by_the_other_ways() -> None:
    """Raw over HTTP, and mapped on the same host: the keeper's copy goes out as it is."""
    with proxy() as running, offer(running) as client:
        client.write("halves", "bfloat16", (2,), b"\x80\x3f\x00\x40")
        large = bytes(range(256)) * 8192
        client.write("large", "uint8", (len(large),), large)
        connection = running.connection()
        connection.request("GET", "/data/halves", headers={"Accept": raw.MEDIA_TYPE})
        reply = connection.getresponse()
        entries, data = raw.parse(reply.read(), 1 << 20)
        connection.close()
        assert reply.status == 200 and [entry.name for entry in entries] == ["halves"]
        assert bytes(data[entries[0].start : entries[0].stop]) == b"\x80\x3f\x00\x40"
        info = running.ask("GET", "/data/ways").json["local"]
        with LocalShards(info) as local:
            halves, whole = local.map(["halves", "large"])
            assert halves.what == ("bfloat16", (2,), "bf16") and bytes(halves.data) == b"\x80\x3f\x00\x40"
            running.ask("DELETE", "/data/clear", {"shard_ids": ["large"]})
            assert bytes(whole.data) == large


def test_the_keeper_is_killed() -> None:
    """Its shards are read through the successor, by clients that were connected and by workers."""
    with proxy() as running, offer(running) as client:
        client.write("s", "float32", (2, 2), FLOATS)
        lease = client.map("s")
        for _ in range(2):
            keeper = keeper_pid(running)
            os.kill(keeper, signal.SIGKILL)
            assert running.ask("GET", "/data/s").json == _json("float32", [2, 2], FLOATS)
            assert bytes(client.read("s")[1]) == FLOATS
            assert wait_until(lambda dead=keeper: keeper_pid(running) not in (0, dead), "a successor")
        assert lease.release()
        running.ask("DELETE", "/data/clear", {"shard_ids": ["s"]})
        client.write("all", "uint8", (8 << 20,), bytes(8 << 20))
        assert len(running.log("pool .*kept=yes")) == 2


def test_a_pool_without_descriptors_dies_with_its_keeper() -> None:
    with proxy(FAKECUDA_NO_FDS="1") as running, offer(running) as client:
        client.write("s", "float32", (2, 2), FLOATS)
        client.map("s").release()
        assert running.ask("GET", "/data/s").status == 200
        os.kill(keeper_pid(running), signal.SIGKILL)
        wait_until(lambda: running.log("gpu_shards_lost shards=1"), "the loss is said")
        assert running.ask("GET", "/data/s").status == 404
        assert json.loads(running.ask("DELETE", "/data/clear", {"shard_ids": []}).body)["num_tensors"] == 0
        client.write("t", "float32", (2, 2), FLOATS)
        assert running.ask("GET", "/data/t").json == _json("float32", [2, 2], FLOATS)


def test_a_worker_and_the_cleaner_are_killed() -> None:
    with proxy("--shard-ttl-seconds", "1000") as running, offer(running) as client:
        client.write("s", "float32", (2, 2), FLOATS)
        for pid in (*running.worker_pids(), running.cleaner_pid()):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(running.worker_pids()) == 2, "new workers")
        with running.each_worker() as workers:
            for over in workers.values():
                assert running.ask("GET", "/data/s", over=over).json == _json("float32", [2, 2], FLOATS)


def test_the_supervisor_is_killed() -> None:
    """Everything goes, the keeper too; a client hears that nobody answers."""
    with proxy() as running:
        client = offer(running)
        keeper = keeper_pid(running)
        os.kill(running.pid, signal.SIGKILL)
        wait_until(lambda: not alive(keeper), "the keeper is gone")
        client._patience_s = 1.0
        with pytest.raises(KeeperGone):
            client.write("s", "float32", (2, 2), FLOATS)


def test_expired_shards_free_the_pool() -> None:
    with proxy("--shard-ttl-seconds", "1") as running, offer(running) as client:
        client.write("s", "uint8", (8 << 20,), bytes(8 << 20))
        wait_until(lambda: running.log("shards_expired"), "it expires")
        client.write("t", "uint8", (8 << 20,), bytes(8 << 20))
