"""The client's gpu way against a whole proxy on the fake driver: what is taken, what is not, and
why it says so.

This process uses the GPU, as far as the package can tell (tests/devices.py): it has a context there.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from areal_fast.client import HOST_WAYS, ArenaFull, AsyncClient, BadReply, Client, DeviceArray, ShardsNotFound
from areal_fast.service.keeper import CHUNK_BYTES
from areal_fast.shards import devices
from areal_fast.shards.local import LocalShards
from tests import fakecuda
from tests.devices import Gpus, held_bytes
from tests.e2e.running import ADMIN, Proxy, wait_until
from tests.e2e.test_gpu import keeper_pid, proxy

pytestmark = pytest.mark.slow

POOL = 8 << 20
FIRST, SECOND = (f"{h * 4}-{h * 2}-{h * 2}-{h * 2}-{h * 6}" for h in ("a0", "a1"))


def url_of(running: Proxy) -> str:
    return f"http://127.0.0.1:{running.port}"


def data_of(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@pytest.fixture
def gpus() -> Iterator[Gpus]:
    with Gpus(fakecuda.library()) as made:
        yield made


@pytest.fixture(scope="module")
def running() -> Iterator[Proxy]:
    with proxy() as made:
        yield made


@pytest.fixture
def client(running: Proxy, gpus: Gpus) -> Iterator[Client]:
    with Client(url_of(running), ADMIN) as made:
        yield made


# -- what comes and goes ---------------------------------------------------------------------------------
def test_out_of_the_pool_and_into_it(client: Client, gpus: Gpus) -> None:
    data = data_of(1, 4 << 20)
    given = gpus.array("bfloat16", (2 << 20,), data)
    reference = client.put(given)
    assert (reference.way, reference.why, reference.dtype, reference.shape) == (
        "gpu", "", "bfloat16", (2 << 20,)
    )  # fmt: skip
    shard = client.get(reference)
    assert (shard.way, shard.why, shard.dtype, shard.shape) == ("gpu", "", "bfloat16", (2 << 20,))
    assert shard.device is not None and shard.device.pointer != given.pointer
    assert held_bytes(shard.device) == data == bytes(shard.data)
    assert shard.release()
    assert client.ways == {"gpu": 2}
    assert client.delete([reference]) == 1
    with pytest.raises(ShardsNotFound) as caught:
        client.get(reference)
    assert caught.value.shard_ids == [reference.shard_id]
    assert held_bytes(shard.device) == data, "a copy is one's own"


def test_a_batch_of_both_kinds(client: Client, gpus: Gpus) -> None:
    """What is in host memory comes as ever; its tensors are never put on a GPU."""
    here = [client.put(np.arange(n, dtype=np.int64)) for n in (1, 100_000)]
    assert {one.way for one in here} == {"map"} and {one.why for one in here} == {""}
    there = [client.put(gpus.array("int64", (n,), bytes(8 * n))) for n in (0, 1, 1000)]
    mixed = [there[0], here[0], there[1], here[1], there[2]]
    shards = client.get_many(mixed)
    assert [shard.way for shard in shards] == ["gpu", "map", "gpu", "map", "gpu"]
    assert [shard.shape for shard in shards] == [one.shape for one in mixed]
    assert [shard.array.sum() for shard in shards] == [0, 0, 0, sum(range(100_000)), 0]
    assert client.delete(mixed) == 5


def test_held_where_it_is(client: Client, gpus: Gpus) -> None:
    """No copy: two holds are of the same memory, which nobody else gets before both are released."""
    data = data_of(2, 3000)
    client.put(gpus.array("uint8", (3000,), data), "held")
    first, second = client.get("held", hold=True), client.get("held", hold=True)
    assert first.device is not None and second.device is not None
    assert first.device.pointer == second.device.pointer
    client.delete(["held"])
    client.put(gpus.array("uint8", (3000,), bytes(3000)), "held")  # of the same size, elsewhere
    assert held_bytes(first.device) == data
    assert first.release() and first.release()
    with second:
        assert bytes(second.data) == data
    assert second.release()
    client.delete(["held"])
    assert client.get(client.put(np.zeros(3), "on the host"), hold=True).release()
    client.delete(["on the host"])


def test_a_lost_hold_is_given_back(client: Client, gpus: Gpus) -> None:
    """A held shard that nobody has any more: its bytes return to the pool with the garbage."""
    client.put(gpus.array("uint8", (POOL,), bytes(POOL)), "all")
    client.get("all", hold=True)
    client.delete(["all"])
    assert client.put(gpus.array("uint8", (POOL,), bytes(POOL)), "all").way == "gpu"
    client.delete(["all"])


def test_awaited(running: Proxy, gpus: Gpus) -> None:
    async def of(number: int) -> None:
        data = data_of(number, 10_000)
        async with AsyncClient(url_of(running), ADMIN) as client:
            reference = await client.put(gpus.array("uint8", (10_000,), data))
            copied = await client.get(reference)
            (held,) = await client.get_many([reference], hold=True)
            assert (reference.way, copied.way, held.way) == ("gpu", "gpu", "gpu")
            assert bytes(copied.data) == bytes(held.data) == data
            assert held.release()
            assert await client.delete([reference]) == 1

    async def all_of_them() -> None:
        await asyncio.gather(*map(of, range(5)))

    asyncio.run(all_of_them())


def test_everybody_else_reads_the_same(running: Proxy, client: Client, gpus: Gpus) -> None:
    data = data_of(3, 600_000)
    client.put(gpus.array("int16", (300_000,), data), "for all")
    for way in HOST_WAYS:
        with Client(url_of(running), ADMIN, ways=(way,)) as other:
            shard = other.get("for all")
            assert (shard.way, bytes(shard.data)) == (way, data)
    client.delete(["for all"])


def test_a_process_that_uses_no_gpu_opens_none(running: Proxy, client: Client, gpus: Gpus) -> None:
    """CUDA may be there: who has no context gets the host's copy, without one being made, or the driver
    loaded."""
    client.put(gpus.array("uint8", (5,), b"12345"), "five")
    program = (
        "import sys\nfrom areal_fast.client import Client\n"
        "with Client(sys.argv[1], sys.argv[2]) as client:\n"
        "    shard = client.get('five')\n"
        "    print(shard.way, bytes(shard.data), 'fakecuda' in open('/proc/self/maps').read())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, url_of(running), ADMIN],
        env={**os.environ, "AREAL_FAST_LIBCUDA": fakecuda.library()},
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    assert done.stdout == "map b'12345' False\n"
    client.delete(["five"])


def test_a_child_of_a_fork_has_no_gpu(client: Client, gpus: Gpus) -> None:
    """The driver does not survive a fork: what the parent has mapped is not touched there."""
    client.put(gpus.array("uint8", (5,), b"12345"), "five")
    assert client.get("five").way == "gpu"
    pid = os.fork()
    if pid == 0:
        try:
            shard = client.get("five")
            os._exit(0 if (shard.way, bytes(shard.data)) == ("map", b"12345") else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert client.get("five").way == "gpu"
    client.delete(["five"])


@pytest.mark.slow
def test_one_larger_than_the_keepers_pieces(gpus: Gpus) -> None:
    """Host copies are made in pieces of CHUNK_BYTES; here the last is a short one."""
    size = CHUNK_BYTES + 12_345
    data = random.Random(8).randbytes(1 << 20) * (size >> 20) + bytes(range(256)) * (
        (size & 0xFFFFF) // 256 + 1
    )
    data = data[:size]
    with (
        proxy("--gpu-pool-bytes", "160M", "--arena-max-bytes", "512M", workers=1) as running,
        Client(url_of(running), ADMIN) as client,
    ):
        assert client.put(gpus.array("uint8", (size,), data), "large").way == "gpu"
        shard = client.get("large")
        assert shard.way == "gpu" and bytes(shard.data) == data
        for way in HOST_WAYS[:2]:
            with Client(url_of(running), ADMIN, ways=(way,)) as other:
                assert bytes(other.get("large").data) == data, way


# -- another way, and why --------------------------------------------------------------------------------
def test_a_full_pool_is_said_and_passed_over(running: Proxy, client: Client, gpus: Gpus) -> None:
    client.put(gpus.array("uint8", (POOL - 4096,), bytes(POOL - 4096)), "most")
    reference = client.put(gpus.array("uint8", (8192,), data_of(4, 8192)), "more")
    assert reference.way == "map"
    assert reference.why.startswith("gpu: the GPU pool has no room for 8192 bytes")
    assert bytes(client.get("more").data) == data_of(4, 8192)
    with (
        Client(url_of(running), ADMIN, ways=("gpu",)) as only,
        pytest.raises(ArenaFull, match=r"no room for 8192 bytes.*more --gpu-pool-bytes") as caught,
    ):
        only.put(gpus.array("uint8", (8192,), bytes(8192)), "more")
    assert caught.value.status == 507
    assert bytes(client.get("more").data) == data_of(4, 8192), "what stood there before stands"
    client.delete(["most", "more"])
    assert client.put(gpus.array("uint8", (8192,), bytes(8192)), "more").way == "gpu"
    client.delete(["more"])


def test_no_keeper_is_said_once(gpus: Gpus) -> None:
    """Where the proxy has no driver, the reason comes with each shard; the proxy is not asked each time."""
    asked: list[str] = []
    with (
        proxy(library="libcuda-of-nobody.so", workers=1) as running,
        Client(url_of(running), ADMIN, observe=lambda request: asked.append(request.path)) as client,
    ):
        for _ in range(3):
            reference = client.put(gpus.array("uint8", (5,), b"12345"))
            assert reference.way == "map" and "libcuda-of-nobody.so" in reference.why
            assert bytes(client.get(reference).data) == b"12345"
        assert asked.count("/data/gpu") == 1


def test_gpu_shards_switched_off(gpus: Gpus) -> None:
    with proxy("--gpu-pool-bytes", "0", workers=1) as running, Client(url_of(running), ADMIN) as client:
        reference = client.put(gpus.array("uint8", (5,), b"12345"))
        assert reference.way == "map" and "--gpu-pool-bytes 0" in reference.why
        with Client(url_of(running), ADMIN, ways=("gpu",)) as only:
            with pytest.raises(BadReply, match=r"take them: gpu .*--gpu-pool-bytes 0"):
                only.put(gpus.array("uint8", (5,), b"12345"))


def test_a_node_elsewhere_starts_no_keeper(
    running: Proxy, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host has other GPUs: it is not even asked."""
    plain = LocalShards.__init__

    def elsewhere(self: LocalShards, info: object, *arguments: object) -> None:
        plain(self, {"socket": "nobody listens here"}, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalShards, "__init__", elsewhere)
    asked: list[str] = []
    with Client(url_of(running), ADMIN, observe=lambda request: asked.append(request.path)) as client:
        reference = client.put(gpus.array("uint8", (5,), b"12345"))
        assert reference.way == "raw" and "gpu: cannot connect" in reference.why
        shard = client.get(reference)
        assert shard.way == "raw" and "cannot connect" in shard.why and bytes(shard.data) == b"12345"
        client.delete([reference])
    assert "/data/gpu" not in asked


def test_what_the_pool_cannot_hold_goes_another_way(client: Client, gpus: Gpus) -> None:
    shape = (1,) * 17
    reference = client.put(gpus.array("uint8", shape, b"x"))
    assert reference.way == "map" and "17 dimensions" in reference.why
    assert client.get(reference).shape == shape
    client.delete([reference])


def test_with_data_auth(gpus: Gpus) -> None:
    with proxy("--data-auth", workers=1) as running, Client(url_of(running), ADMIN) as client:
        reference = client.put(gpus.array("uint8", (5,), b"12345"))
        assert (reference.way, client.get(reference).way) == ("gpu", "gpu")


def test_a_new_proxy_at_the_same_port(gpus: Gpus) -> None:
    """Its keeper has another name; the client finds it, and what was held says that it is gone."""
    with proxy(workers=1) as first, Client(url_of(first), ADMIN, timeout_s=5) as client:
        client.put(gpus.array("uint8", (5,), b"12345"), "five")
        held = client.get("five", hold=True)
        port = first.port
        first.end()
        with proxy("--port", str(port), workers=1):
            assert client.put(gpus.array("uint8", (5,), b"54321"), "five").way == "gpu"
            shard = client.get("five")
            assert (shard.way, bytes(shard.data)) == ("gpu", b"54321")
            assert not held.release()


# -- several GPUs ----------------------------------------------------------------------------------------
def test_two_gpus_have_two_keepers() -> None:
    """Each tensor stays on its own GPU; one batch takes from both; one that is not used here comes by the
    host."""
    with (
        pytest.MonkeyPatch.context() as patch,
        proxy(FAKECUDA_DEVICES="2") as running,
    ):
        patch.setenv("FAKECUDA_DEVICES", "2")
        with Gpus(fakecuda.library(), count=2) as gpus, Client(url_of(running), ADMIN) as client:
            assert devices.active_gpus() == {FIRST: 0, SECOND: 1}
            for ordinal in (0, 1):
                array = gpus.array("uint8", (4,), f"gpu{ordinal}".encode(), ordinal)
                assert client.put(array, f"on {ordinal}").way == "gpu"
            shards = client.get_many(["on 0", "on 1"])
            assert [(one.way, bytes(one.data)) for one in shards] == [("gpu", b"gpu0"), ("gpu", b"gpu1")]
            assert [one.device.ordinal for one in shards if one.device is not None] == [0, 1]
            health = running.health()
            assert health["keeper-0"]["pid"] != health["keeper-1"]["pid"]
            batch = running.ask("POST", "/data/batch", {"shard_ids": ["on 1", "on 0"]}).json
            assert [base64.b64decode(one["data"]) for one in batch] == [b"gpu1", b"gpu0"]
            for visible, ways in {
                "0": {"on 0": "gpu", "on 1": "map"},
                "1": {"on 0": "map", "on 1": "gpu"},
                "1,0": {"on 0": "gpu", "on 1": "gpu"},
            }.items():
                assert of_another_order(running, visible) == ways
            # a keeper dies: its GPU's shards go on, the other's were never touched
            os.kill(keeper_pid(running), 9)
            assert [bytes(one.data) for one in client.get_many(["on 0", "on 1"])] == [b"gpu0", b"gpu1"]


def of_another_order(running: Proxy, visible: str) -> dict[str, str]:
    """The ways by which a process that sees the GPUs so gets the shards, having put its own on each."""
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_ORDER, url_of(running), ADMIN],
        env={**os.environ, "AREAL_FAST_LIBCUDA": fakecuda.library(), "CUDA_VISIBLE_DEVICES": visible},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


ANOTHER_ORDER = """
import json, os, sys
from areal_fast.client import Client
from areal_fast.service.keeper import CHUNK_BYTES
from areal_fast.shards import devices
from tests.devices import Gpus
visible = [int(n) for n in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
gpus = Gpus(os.environ["AREAL_FAST_LIBCUDA"], len(visible))
with Client(sys.argv[1], sys.argv[2]) as client:
    for ordinal, physical in enumerate(visible):
        name = f"put on {physical}"
        assert client.put(gpus.array("uint8", (1,), bytes([physical]), ordinal), name).way == "gpu"
        shard = client.get(name)
        assert (shard.way, shard.device.ordinal, bytes(shard.data)) == ("gpu", ordinal, bytes([physical]))
        client.delete([name])
    shards = client.get_many(["on 0", "on 1"])
    assert [bytes(one.data) for one in shards] == [b"gpu0", b"gpu1"]
    for one in shards:
        if one.device is not None:
            assert f"on {visible[one.device.ordinal]}" == one.id
    print(json.dumps({one.id: one.way for one in shards}))
"""


# -- beside sessions -------------------------------------------------------------------------------------
def test_the_cleaner_dumps_sessions_beside_gpu_shards(gpus: Gpus, tmp_path: Path) -> None:
    """Stale sessions are written while the GPU has shards, also while it has no keeper, and the shards stay;
    at the end everything that lives is dumped."""
    flags = (
        "--session-timeout-seconds",
        "2",
        "--stale-session-dump-path",
        str(tmp_path),
        "--stale-session-cleanup-interval-seconds",
        "1",
    )
    with proxy(*flags) as running, Client(url_of(running), ADMIN) as client:
        client.put(gpus.array("uint8", (5,), b"12345"), "five")
        with client.start_session("stale") as session:
            assert running.chat(session.api_key).status == 200
            os.kill(keeper_pid(running), 9)
            wait_until(lambda: list(tmp_path.glob("*stale*")), "the session is dumped")
        shard = client.get("five")
        assert (shard.way, bytes(shard.data)) == ("gpu", b"12345")
        with client.start_session("alive") as session:
            assert running.chat(session.api_key).status == 200
            running.terminate()
            assert running.wait() == 0
        assert list(tmp_path.glob("*alive*"))


def test_device_arrays_are_shown_to_other_libraries(gpus: Gpus) -> None:
    array = gpus.array("float32", (2, 3), bytes(24))
    shown = array.__cuda_array_interface__
    assert (shown["shape"], shown["typestr"], shown["data"][0]) == ((2, 3), "<f4", array.pointer)
    with pytest.raises(AttributeError, match="bfloat16"):
        gpus.array("bfloat16", (1,), b"ab").__cuda_array_interface__
    assert DeviceArray(0, "bool", (0,)).to_host() == b""
