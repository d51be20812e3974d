"""Everybody dies, at every moment of a put, a get and a hold of a GPU shard, in a whole proxy on the fake
driver.

A moment is the sending of a message to the keeper, the coming of its answer, or a call of the driver. What
must hold afterwards: a shard is there bit for bit or not at all, who lives goes on or hears why not, and
not one byte of the pool is lost: a shard as large as the whole pool fits into it.

Programs that are killed run as children of a server that has loaded the package but no driver.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from areal_fast.client import Client, Reference, ShardsNotFound, Unreachable
from areal_fast.shards import passing
from tests import fakecuda
from tests.devices import Gpus, held_bytes
from tests.e2e.running import ADMIN, ROOT, WATCHDOG_S, Proxy, alive, wait_until
from tests.e2e.test_gpu import keeper_pid, proxy

POOL = 8 << 20
DATA = random.Random(5).randbytes(100_000)
MESSAGES = 9
"""Of `life` with a client that is not yet connected: HELLO and SETTLE, HELLO for the pool, RESERVE, COMMIT;
LEASE and RELEASE of the get and of the hold."""
GOOD_RUN_S = 2.0
"""A keeper that has run for so long is started again at once when it dies."""


def url_of(running: Proxy) -> str:
    return f"http://127.0.0.1:{running.port}"


def life(client: Client, gpus: Gpus) -> list[str]:
    """Put, get, hold; right bytes everywhere. The ways they went."""
    given = client.put(gpus.array("uint8", (len(DATA),), DATA), "s")
    shard = client.get("s")
    assert bytes(shard.data) == DATA
    held = client.get("s", hold=True)
    if held.device is not None:
        assert held_bytes(held.device) == DATA
    held.release()
    return [given.way, shard.way, held.way]


@contextmanager
def at_moment(number: int, then: Callable[[], object]) -> Iterator[list[int]]:
    """Calls `then` at the moment `number` (0: the first message is about to be sent; odd: one was sent, its
    answer has not been read; even: it has). Gives the list of moments that passed."""
    passed: list[int] = []
    plain_send, plain_receive = passing.send, passing.receive

    def moment() -> None:
        passed.append(len(passed))
        if passed[-1] == number:
            then()

    @functools.wraps(plain_send)
    def send(*arguments: Any) -> None:
        if not passed:
            moment()
        plain_send(*arguments)
        moment()

    @functools.wraps(plain_receive)
    def receive(*arguments: Any, **how: Any) -> Any:
        got = plain_receive(*arguments, **how)
        moment()
        return got

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passing, "send", send)
        patch.setattr(passing, "receive", receive)
        yield passed


def check_whole(running: Proxy, client: Client, gpus: Gpus) -> None:
    """Nothing is left but what stands in the store, and that is whole; then nothing at all is left, and every
    byte of the pool is free again."""
    with Client(url_of(running), ADMIN, ways=("json",)) as plain:
        try:
            assert bytes(plain.get("s").data) == DATA
        except ShardsNotFound:
            assert _counted(running) == (0, 0)
        else:
            assert _counted(running) == (1, len(DATA))
    client.delete(["s"])
    assert _counted(running) == (0, 0)
    everything = gpus.array("uint8", (POOL,), bytes(POOL))
    wait_until(lambda: client.put(everything, "all").way == "gpu", "the whole pool is free again")
    client.delete(["all"])


def _counted(running: Proxy) -> tuple[int, int]:
    answer = running.ask("DELETE", "/data/clear", {"shard_ids": []}).json
    return answer["num_tensors"], answer["total_bytes"]


@pytest.fixture
def gpus() -> Iterator[Gpus]:
    with Gpus(fakecuda.library()) as made:
        yield made


def kill_keeper(running: Proxy) -> None:
    pid = keeper_pid(running)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), "the keeper is dead")


def after_a_good_run(running: Proxy) -> None:
    """Wait until the keeper has run so long that its death is none of many."""
    pid = keeper_pid(running)
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    born_s = ticks / os.sysconf("SC_CLK_TCK")
    wait_until(
        lambda: float(Path("/proc/uptime").read_text().split()[0]) - born_s > GOOD_RUN_S + 1,
        "it has run for a while",
    )


# -- the keeper --------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False], ids=["connecting", "connected"])
def test_the_keeper_dies_at_every_moment(gpus: Gpus, fresh: bool) -> None:
    """Its pool outlives it: the client notices nothing, but that it takes longer."""
    with proxy(workers=1) as running, Client(url_of(running), ADMIN) as steady:
        assert life(steady, gpus) == ["gpu"] * 3
        moments = range(0, 7) if fresh else range(0, 2 * MESSAGES - 5)
        for number in moments:
            after_a_good_run(running)
            with Client(url_of(running), ADMIN) as new:
                client = new if fresh else steady
                with at_moment(number, lambda: kill_keeper(running)) as passed:
                    assert life(client, gpus) == ["gpu"] * 3, number
                assert len(passed) > number, f"moment {number} was not reached"
            check_whole(running, steady, gpus)
        assert len(running.log("pool .*kept=yes")) == len(moments)
        assert not running.log("gpu_shards_lost")


def test_a_keeper_without_descriptors_takes_its_pool_along(gpus: Gpus) -> None:
    """A put starts again in the new pool. What was in the old one is gone, and nobody is given anything else
    for it: a copy that was under way counts for nothing, what is held is no longer vouched for."""
    with proxy(FAKECUDA_NO_FDS="1", workers=1) as running, Client(url_of(running), ADMIN) as client:
        array = gpus.array("uint8", (len(DATA),), DATA)
        assert client.put(array, "s").way == "gpu"
        with at_moment(2, lambda: kill_keeper(running)):  # RESERVE is answered, nothing is copied yet
            assert client.put(array, "s").way == "gpu"
        assert bytes(client.get("s").data) == DATA
        with at_moment(2, lambda: kill_keeper(running)):  # LEASE is answered
            with pytest.raises(ShardsNotFound):
                client.get("s")
        assert client.put(array, "s").way == "gpu"
        held = client.get("s", hold=True)
        kill_keeper(running)
        assert not held.release()
        with pytest.raises(ShardsNotFound):
            client.get("s")
        assert client.put(array, "s").way == "gpu"
        check_whole(running, client, gpus)
        assert len(running.log("gpu_shards_lost shards=1")) == 3


# -- producers and consumers -------------------------------------------------------------------------------
def die_at_moment(url: str, library: str, number: int) -> None:
    """A child's program: `life`, until the moment comes."""
    with Gpus(library) as gpus, Client(url, ADMIN) as client:
        with at_moment(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            life(client, gpus)


def die_at_call(url: str, library: str, path: str, nth: int) -> None:
    """The same, at the nth call of the driver after the device was opened; -1: not at all, and their number
    is left in the state."""
    os.environ["FAKECUDA_STATE"] = path
    with Gpus(library) as gpus, Client(url, ADMIN) as client:
        array = gpus.array("uint8", (len(DATA),), DATA)
        state = fakecuda.State(Path(path))
        before = state.calls
        if nth > 0:
            state.kill(nth)
        client.put(array, "s")
        client.get("s")
        client.get("s", hold=True).release()
        if nth < 0:
            state.words.kill_at = state.calls - before
    os._exit(0)


@pytest.fixture(scope="module")
def children() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.test_gpu_kills"])
    return context


def run(children: Any, program: Callable[..., None], *arguments: Any) -> int:
    child = children.Process(target=program, args=arguments)
    child.start()
    child.join(WATCHDOG_S)
    assert child.exitcode is not None, "the child does not end"
    return int(child.exitcode)


@pytest.mark.slow
def test_a_client_dies_at_every_moment(gpus: Gpus, children: Any) -> None:
    with proxy(workers=1) as running, Client(url_of(running), ADMIN) as client:
        for number in range(2 * MESSAGES + 1):
            code = run(children, die_at_moment, url_of(running), fakecuda.library(), number)
            assert code == -signal.SIGKILL, f"moment {number} was not reached"
            check_whole(running, client, gpus)
        assert run(children, die_at_moment, url_of(running), fakecuda.library(), 2 * MESSAGES + 1) == 0


@pytest.mark.slow
def test_a_client_dies_in_every_call_of_the_driver(gpus: Gpus, children: Any, tmp_path: Path) -> None:
    state = fakecuda.State(tmp_path / "state")
    with proxy(workers=1) as running, Client(url_of(running), ADMIN) as client:
        where = (url_of(running), fakecuda.library(), str(state.path))
        assert run(children, die_at_call, *where, -1) == 0
        calls = state.words.kill_at
        assert calls > 20
        for nth in range(1, calls + 1):
            state.disarm()
            assert run(children, die_at_call, *where, nth) == -signal.SIGKILL, nth
            check_whole(running, client, gpus)


# -- those that the shards are not of ------------------------------------------------------------------------
@pytest.mark.slow
def test_workers_and_the_cleaner_die_meanwhile(gpus: Gpus) -> None:
    with proxy(workers=2) as running, Client(url_of(running), ADMIN) as client:
        life(client, gpus)
        for number in (0, 3, 6, 9):
            victims = [*running.worker_pids(), running.cleaner_pid()]
            with at_moment(number, lambda pids=victims: running.kill(*pids)):  # type: ignore[misc]
                assert life(client, gpus) == ["gpu"] * 3, number
            wait_until(lambda: len(running.worker_pids()) == 2, "successors are up")
            check_whole(running, client, gpus)


@pytest.mark.parametrize("number", [2, 3, 6, 8], ids=["reserved", "committing", "leased", "leased again"])
def test_the_supervisor_dies(gpus: Gpus, number: int) -> None:
    """Everything ends. The client hears that nobody is there, and keeps nothing of the pool."""
    with proxy(workers=1) as running, Client(url_of(running), ADMIN, timeout_s=5, retries=1) as client:
        life(client, gpus)
        assert _pool_is_mapped()
        keeper = keeper_pid(running)

        def kill() -> None:
            os.kill(running.pid, signal.SIGKILL)
            wait_until(lambda: not alive(keeper), "the keeper is gone")

        with at_moment(number, kill), pytest.raises(Unreachable):
            life(client, gpus)
            client.get("s")  # what was held last is not vouched for, but that is no error
        client.close()
        assert not _pool_is_mapped()


def _pool_is_mapped() -> bool:
    return "fakecuda-pool" in Path("/proc/self/maps").read_text()


# -- a driver that fails -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_clients_driver_fails_at_every_call(gpus: Gpus, tmp_path: Path) -> None:
    """Once each: what cannot go the gpu way goes another, which says why; the next time all is well."""
    state = fakecuda.State(tmp_path / "state")
    with proxy(workers=1) as running, Client(url_of(running), ADMIN) as client:
        done = subprocess.run(
            [sys.executable, "-c", FAILING, url_of(running), ADMIN, str(state.path)],
            env={**os.environ, "FAKECUDA_STATE": str(state.path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert len(told) > 20
        assert {"cuMemImportFromShareableHandle", "cuMemcpyDtoDAsync", "cuStreamSynchronize"} <= set(told)
        check_whole(running, client, gpus)


FAILING = """
import json, sys
from pathlib import Path
from areal_fast.client import Client
from tests import fakecuda
from tests.devices import Gpus
from tests.gpu.keeping import GIVING_BACK

url, admin, path = sys.argv[1:]
state = fakecuda.State(Path(path))
gpus = Gpus(fakecuda.library())
data = bytes(range(256)) * 16
array = gpus.array("uint8", (len(data),), data)

def life():
    \"\"\"Why it was not the GPU's way: the text of the put, or, where that went well, of each get.\"\"\"
    with Client(url, admin) as client:
        put = client.put(array, "s")
        got = client.get("s")
        held = client.get("s", hold=True)
        whys = [one.why for one in ((put,) if put.way != "gpu" else (got, held)) if one.way != "gpu"]
        held.release()
        host = bytearray(len(data))
        calls.append(state.calls)
        state.disarm()
        for shard in (got, held):
            if shard.way != "gpu" or shard is got:
                assert bytes(shard.data) == data
        client.delete(["s"])
    return whys

calls = []
before = state.calls
assert life() == []
total = calls[0] - before
told = []
for nth in range(1, total + 1):
    state.fail(nth)
    whys = life()
    name = state.failed.removesuffix("_v2")
    assert name, f"call {nth} of {total} was not reached"
    if whys:
        assert all("gpu: " in why for why in whys), whys
    told.append(name)
    state.disarm()
    assert life() == []
print(json.dumps(told))
"""


@pytest.mark.slow
def test_the_keepers_driver_fails_at_every_call(gpus: Gpus, tmp_path: Path) -> None:
    """The same on the other side: whoever reads, and by whatever way, gets the right bytes."""
    state = fakecuda.State(tmp_path / "state")
    with proxy(workers=1, FAKECUDA_STATE=str(state.path)) as running:

        def all_ways() -> None:
            with Client(url_of(running), ADMIN) as client:
                life(client, gpus)
            for way in ("map", "raw", "json"):
                with Client(url_of(running), ADMIN, ways=(way, "raw")) as plain:  # type: ignore[arg-type]
                    assert bytes(plain.get("s").data) == DATA

        all_ways()
        before = state.calls
        all_ways()
        total = state.calls - before
        assert total > 5
        for nth in range(1, total + 1):
            state.fail(nth)
            all_ways()
            assert state.failed, f"call {nth} of {total} was not reached"
            state.disarm()
        with Client(url_of(running), ADMIN) as client:
            assert client.put(gpus.array("uint8", (1,), b"x"), "s").way == "gpu"
            assert client.get(Reference("s")).way == "gpu"
            client.put(gpus.array("uint8", (len(DATA),), DATA), "s")
            check_whole(running, client, gpus)
