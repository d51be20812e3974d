"""The keeper's process and its clients: what a producer puts a consumer gets, whoever dies in between."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_fast.core import PROC_KEEPER
from areal_fast.core._cuda import KIND_FD, Driver
from areal_fast.protocol import gpu as wire
from areal_fast.protocol.gpu import Malformed, Region, Request
from areal_fast.service.keepers import Post
from areal_fast.shards import passing
from areal_fast.shards.gpu import (
    GpuClient,
    GpuPoolFull,
    GpuShardError,
    GpuShardNotFound,
    KeeperGone,
)
from tests import fakecuda
from tests.gpu.keeping import POOL_BYTES, Keeping, end

KIB = 1024


@pytest.fixture
def keeping(driver_path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeping]:
    with Keeping(driver_path) as made:
        made.start()
        made.gpu = wire.uuid_bytes(made.hear("keeper")["gpu"])
        yield made


class Memory:
    """Device memory of this process."""

    def __init__(self, library: str, nbytes: int) -> None:
        self._device = Driver(library).open(0)
        self.nbytes = nbytes
        self.pointer = self._device.alloc(nbytes)
        self._window = self._device.create_pool(nbytes, 2)

    def fill(self, data: bytes) -> None:
        self._window.from_host(0, data)
        self._window.copy_out(0, self.pointer, len(data))

    def read(self, nbytes: int) -> bytes:
        out = bytearray(nbytes)
        self._window.copy_in(0, self.pointer, nbytes)
        self._window.to_host(0, out)
        return bytes(out)

    def __del__(self) -> None:
        self._device.free(self.pointer)


@pytest.fixture
def memory(keeping: Keeping) -> Memory:
    return Memory(keeping.library, 1 << 20)


def data_of(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def test_put_get_map_read(keeping: Keeping, memory: Memory) -> None:
    with keeping.client() as client:
        assert client.pool_bytes >= POOL_BYTES and client.gpu == wire.uuid_text(keeping.gpu)
        for seed, nbytes in enumerate((0, 2, 4096, 100_000, 1 << 20)):
            data = data_of(seed, nbytes)
            memory.fill(data)
            client.put("s", memory.pointer, "bfloat16", (nbytes // 2,))
            memory.fill(bytes(memory.nbytes))
            shard = client.get_into("s", memory.pointer, memory.nbytes)
            assert shard == ("bfloat16", (nbytes // 2,), nbytes)
            assert memory.read(nbytes) == data
            assert bytes(client.read("s")[1]) == data
            with client.map("s") as lease:
                assert (lease.dtype, lease.shape, lease.nbytes) == shard
            assert lease.valid and lease.release()
        assert keeping.store.totals() == (1, 1 << 20)
        client.clear("s")
        assert keeping.store.totals() == (0, 0)
        with pytest.raises(GpuShardNotFound):
            client.get_into("s", memory.pointer, memory.nbytes)
        with pytest.raises(GpuShardNotFound):
            client.clear("s")
    keeping.wait_no_holds()


def test_from_and_to_host_memory(keeping: Keeping) -> None:
    with keeping.client(device=False) as client:
        client.write("w", "int64", (3, 2), data_of(1, 48))
        shard, data = client.read("w")
        assert shard == ("int64", (3, 2), 48) and bytes(data) == data_of(1, 48)
        with pytest.raises(GpuShardError, match="as many bytes"):
            client.write("w", "int64", (3, 3), data_of(1, 48))
        with pytest.raises(GpuShardNotFound):
            client.read("nobody's")


def test_a_full_pool(keeping: Keeping, memory: Memory) -> None:
    with keeping.client() as client:
        for i in range(POOL_BYTES // memory.nbytes):
            client.put(f"s{i}", memory.pointer, "uint8", (memory.nbytes,))
        with pytest.raises(GpuPoolFull, match="no room for 1 bytes"):
            client.put("more", memory.pointer, "uint8", (1,))
        with pytest.raises(GpuPoolFull):
            client.write("more", "uint8", (1,), b"x")
        lease = client.map("s3")
        client.clear("s3")
        with pytest.raises(GpuPoolFull):
            client.put("more", memory.pointer, "uint8", (memory.nbytes,))
        assert lease.release()
        client.put("more", memory.pointer, "uint8", (memory.nbytes,))


def test_one_mapping_a_process(keeping: Keeping) -> None:
    with keeping.client() as one, keeping.client() as other:
        one.write("s", "uint8", (3,), b"abc")
        with one.map("s") as a, other.map("s") as b:
            assert a.pointer == b.pointer


def test_strangers_and_nonsense(keeping: Keeping) -> None:
    """Whatever comes over the socket, the keeper answers or hangs up, and goes on."""
    draw = random.Random(7)
    whole = wire.pack_request(Request(wire.READ, 1, shard_id=b"s"))
    packets = [b"x", whole[:-1], whole + b"x", b"\0" * len(whole), whole * 9]
    packets += [draw.randbytes(draw.randrange(1, 2000)) for _ in range(50)]
    for packet in packets:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(30)
            sock.connect(f"\0{keeping.post.name}")
            sock.send(packet)
            answer = sock.recv(wire.MAX_PACKET_BYTES)
            assert wire.unpack_region(answer).status == wire.BAD
            assert sock.recv(1) == b""
    for kind in range(wire.RESERVE, wire.SETTLE + 1):
        if kind == wire.BYE:
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(30)
            sock.connect(f"\0{keeping.post.name}")
            sock.send(wire.pack_request(Request(kind, 9, 2**64 - 1, 2**64 - 1, 2**64 - 1, "", (), b"\xff\0")))
            region = wire.unpack_region(sock.recv(wire.MAX_PACKET_BYTES))
            assert (region.kind, region.tag) == (kind, 9)
            assert (region.status == wire.OK) == (kind == wire.SETTLE), region
    with keeping.client(device=False) as client:
        client.write("s", "uint8", (1,), b"x")


def test_messages_travel_unchanged() -> None:
    request = Request(wire.COMMIT, 1, 2, 3, 4, "float8_e5m2", (5, 6), b"id")
    assert wire.unpack_request(wire.pack_request(request)) == request
    region = Region(wire.LEASE, 1, wire.FULL, "wé", b"g" * 16, b"p" * 16, 2, 3, 4, 5, "bool", (7,))
    assert wire.unpack_region(wire.pack_region(region)) == region
    for name in ("float31", "quint8"):
        with pytest.raises(Malformed):
            wire.dtype_code(name)
    later = bytearray(wire.pack_request(request))
    later[4] += 1
    with pytest.raises(Malformed, match="version 2"):
        wire.unpack_request(bytes(later))


# -- deaths --------------------------------------------------------------------------------------------------


def survives(keeping: Keeping) -> bool:
    """Whether the pool outlives its keeper."""
    with keeping.client() as client:
        assert client._info is not None
        return client._info.way == KIND_FD


def test_the_keeper_is_killed(keeping: Keeping, memory: Memory) -> None:
    """Published shards, a reservation being filled and a mapped lease go on with the successor."""
    lives = survives(keeping)
    data = data_of(3, 4096)
    memory.fill(data)
    with keeping.client() as client:
        client.put("old", memory.pointer, "uint8", (4096,))
        lease = client.map("old")
        reserved = client._ask(Request(wire.RESERVE, 0, nbytes=4096), hold=True)
        keeping.kill()
        keeping.start()
        if not lives:
            with pytest.raises(GpuShardNotFound):
                client.read("old")
            assert not lease.release()
            assert keeping.store.totals() == (0, 0)
        else:
            assert bytes(client.read("old")[1]) == data
            client._pool_of(reserved).pool.copy_in(reserved.offset, memory.pointer, 4096)
            client._ask(Request(wire.COMMIT, 0, reserved.generation, 0, 0, "uint8", (4096,), b"late"))
            assert bytes(client.read("late")[1]) == data
            assert lease.release()
        client.put("new", memory.pointer, "uint8", (4096,))
        assert bytes(client.read("new")[1]) == data
    keeping.wait_no_holds()


@pytest.mark.parametrize("step", ["reserved", "copied", "leased", "mapped"])
def test_a_client_is_killed(keeping: Keeping, memory: Memory, step: str) -> None:
    """Its holds go with it, and nothing of what it had not committed is ever seen."""
    memory.fill(data_of(4, 4096))
    with keeping.client() as client:
        client.put("s", memory.pointer, "uint8", (4096,))
        program = {
            "reserved": "client._ask(keeping.reserve(4096), hold=True)",
            "copied": "r = client._ask(keeping.reserve(4096), hold=True)\n"
            "client._pool_of(r).pool.from_host(r.offset, bytes(4096))",
            "leased": "lease = client.map('s')",
            "mapped": "lease = client.map('s'); out = bytearray(4096)\n"
            "lease._mapped.pool.to_host(lease._region.offset, out)",
        }[step]
        child = keeping.child(f"{program}\nsay('there'); sys.stdin.read()")
        assert child.stdout is not None and child.stdout.readline() == b"there\n"
        assert len(keeping.holds()) == 1
        end(child, kill=True)
        keeping.wait_no_holds()
        assert bytes(client.read("s")[1]) == data_of(4, 4096)
        client.clear("s")
        client.write("all", "uint8", (POOL_BYTES,), bytes(POOL_BYTES))  # every byte of the pool is free again


def test_a_client_dies_while_there_is_no_keeper(keeping: Keeping) -> None:
    if not survives(keeping):
        pytest.skip("the pool does not outlive its keeper here")
    child = keeping.child("client._ask(keeping.reserve(4096), hold=True); say('there'); sys.stdin.read()")
    assert child.stdout is not None and child.stdout.readline() == b"there\n"
    keeping.kill()
    assert len(keeping.holds()) == 1
    end(child, kill=True)
    keeping.start()
    keeping.wait_no_holds()


def test_an_answer_that_was_lost_leaves_nothing(keeping: Keeping) -> None:
    """A RESERVE and a LEASE whose answers never came: settled away at the next connection."""
    with keeping.client() as client:
        client.write("s", "uint8", (3,), b"abc")
        assert client._sock is not None
        for request in (Request(wire.RESERVE, 5, nbytes=512), Request(wire.LEASE, 6, shard_id=b"s")):
            client._sock.send(wire.pack_request(request))
            assert client._sock.recv(wire.MAX_PACKET_BYTES)
        assert len(keeping.holds()) == 2
        with client.map("s") as lease:
            client._hang_up()
            assert bytes(client.read("s")[1]) == b"abc"
            assert [hold.lease for hold in keeping.holds()] == [lease._region.lease]


def test_a_lease_is_lost_between_a_question_and_its_answer(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the garbage collector may do it, in any thread at any time: the answers stay with their questions,
    and the lease is given back all the same."""
    with keeping.client() as client:
        client.write("a", "uint8", (3,), b"aaa")
        client.write("b", "uint8", (4,), b"bbbb")
        lost = [client.map("a")]
        plain = passing.receive

        def receive(*arguments: Any, **how: Any) -> Any:
            lost.clear()
            return plain(*arguments, **how)

        with monkeypatch.context() as patch:
            patch.setattr(passing, "receive", receive)
            assert bytes(client.read("b")[1]) == b"bbbb"
        keeping.wait_no_holds()
        lost = [client.map("a"), client.map("b")]
        lost.clear()
        assert not keeping.holds()


def test_an_answer_to_another_question_is_none(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has left it there: an interrupt, say. The client asks anew, over another connection."""
    with keeping.client() as client:
        client.write("b", "uint8", (4,), b"bbbb")
        plain = passing.receive

        def interrupted(*arguments: Any, **how: Any) -> Any:
            raise KeyboardInterrupt

        for patched in (interrupted, lambda *a, **how: (plain(*a, **how)[0][:8] + b"another!", [], 0)):
            lease = client.map("b")
            with monkeypatch.context() as patch:
                patch.setattr(passing, "receive", patched)
                with pytest.raises(KeyboardInterrupt if patched is interrupted else OSError):
                    client._once(Request(wire.LEASE, 0, shard_id=b"b"), [])
            if patched is not interrupted:
                client._hang_up()
            assert bytes(client.read("b")[1]) == b"bbbb"
            assert lease.release()
        keeping.wait_no_holds()


def test_nobody_answers() -> None:
    with pytest.raises(KeeperGone):
        GpuClient.connect("areal_fast-nobody", fakecuda.library(), patience_s=0.2)


def test_a_client_cannot_be_used_after_a_fork(keeping: Keeping) -> None:
    with keeping.client() as client:
        pid = os.fork()
        if pid == 0:
            try:
                client.read("s")
            except KeeperGone:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


# -- the fake driver's failures ------------------------------------------------------------------------------


@pytest.fixture
def fake(state: fakecuda.State, tmp_path: Path) -> Iterator[Keeping]:
    with Keeping(fakecuda.library()) as made:
        yield made


def test_no_driver_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Keeping("libcuda-of-nobody.so") as made:
        made.start(wait=False)
        assert "libcuda-of-nobody.so" in made.hear("fatal")["why"]


def _life(keeping: Keeping) -> None:
    """What a keeper's driver is asked for: a shard in from the host, and out."""
    with keeping.client(device=False, patience_s=20.0) as client:
        client.write("s", "uint8", (4096,), data_of(5, 4096))
        assert bytes(client.read("s")[1]) == data_of(5, 4096)
        client.clear("s")


@pytest.mark.slow
def test_the_keepers_driver_fails_at_every_call(fake: Keeping, state: fakecuda.State) -> None:
    """A start that fails says which call it was; a copy that fails is a clear error and leaves nothing
    held."""
    fake.start()
    fake.gpu = wire.uuid_bytes(fake.hear("keeper")["gpu"])
    starting = state.calls
    _life(fake)
    total = state.calls
    for nth in range(1, total + 1):
        if nth <= starting:
            fake.kill()
            fake.post.close()  # a new one has nothing in its pocket
            fake.post = Post(0, "", PROC_KEEPER)
            state.fail(nth)
            fake.start(wait=False)
            if "fatal" in (said := fake.hear("ready", "fatal"))["is"]:
                assert state.failed.removesuffix("_v2") in said["why"], (nth, state.failed, said)
                fake.bury()
                state.disarm()
                fake.start()
            else:
                assert state.failed in FALLS_BACK, state.failed
            state.disarm()
            _life(fake)
            continue
        state.fail(nth - starting)
        try:
            _life(fake)
        except GpuShardError as error:
            assert state.failed.removesuffix("_v2") in str(error), (nth, state.failed, str(error))
        assert state.failed, f"call {nth} was not reached"
        state.disarm()
        _life(fake)
        fake.wait_no_holds()


FALLS_BACK = (
    "cuMemExportToShareableHandle",
    "cuMemGetAllocationGranularity", "cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess",
    "cuCtxPushCurrent_v2", "cuMemAddressFree", "cuMemUnmap", "cuMemRelease",
)  # fmt: skip
"""Calls whose failure makes the keeper offer a legacy pool instead."""


@pytest.mark.slow
def test_the_keeper_is_killed_at_every_call(fake: Keeping, state: fakecuda.State) -> None:
    """SIGKILL in the middle of any driver call: the successor has every published shard, and nothing
    leaks."""
    fake.start()
    fake.gpu = wire.uuid_bytes(fake.hear("keeper")["gpu"])
    before = state.calls
    _life(fake)
    total = state.calls - before
    with fake.client(device=False) as client:
        client.write("kept", "uint8", (512,), data_of(6, 512))
        for nth in range(1, total + 1):
            state.kill(nth)
            done = fake.child(LIFE.format(data=data_of(5, 64)), device=False)
            while not fake.dead and done.poll() is None:
                pass
            assert fake.dead, f"call {nth} was not reached"
            state.disarm()
            fake.bury()
            fake.start()
            assert end(done) == 0
            assert bytes(client.read("kept")[1]) == data_of(6, 512)
            fake.wait_no_holds()
        assert fake.store.totals() == (1, 512)


LIFE = """
client.write("s", "uint8", (64,), {data!r})
assert bytes(client.read("s")[1]) == {data!r}
client.clear("s")
client.close()
"""


def test_a_clients_driver_fails_at_every_call(fake: Keeping, state: fakecuda.State) -> None:
    """Whichever side's call it is: the client hears which one, holds nothing, and the next try succeeds."""
    fake.start()
    fake.gpu = wire.uuid_bytes(fake.hear("keeper")["gpu"])
    child = fake.child(CLIENTS_CALLS)
    assert child.stdout is not None
    assert int(child.stdout.readline() or -1) > 25
    assert end(child) == 0
    fake.wait_no_holds()
    assert fake.store.totals() == (1, 4096)


CLIENTS_CALLS = """
from pathlib import Path
from areal_fast.core._cuda import CudaError, Driver
from tests import fakecuda
client.close()
state = fakecuda.State(Path(os.environ["FAKECUDA_STATE"]))
device = Driver(sys.argv[2]).open(0)
source, target = device.alloc(4096), device.alloc(4096)
def life():
    with GpuClient.connect(sys.argv[1], sys.argv[2], patience_s=20) as client:
        client.put("s", source, "uint8", (4096,))
        client.get_into("s", target, 4096)
        with client.map("s") as lease: pass
        assert lease.valid
before = state.calls
life()
total = state.calls - before
for nth in range(1, total + 1):
    state.fail(nth)
    try:
        life()
        told = ""
    except (CudaError, GpuShardError) as error:
        told = str(error)
    name = state.failed
    assert name, nth
    assert name.removesuffix("_v2") in told or told == "" and name in keeping.GIVING_BACK, (nth, name, told)
    state.disarm()
    life()
say(total)
"""
