"""Random producers, readers and killers on the GPU's pool: in the end what was acknowledged is there, bit for
bit, the counts are those of what is there, and every byte of the rest is free.

Each child puts, reads, holds, replaces and deletes shards of its own and reads others', by a seed. It says
each step before and after over its pipe: so the test knows what must be there, and what may, the step that a
kill has cut off. Meanwhile the test kills children (and starts others) and keepers.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from areal_fast.client import Client, ShardsNotFound
from tests import fakecuda
from tests.devices import Gpus, held_bytes
from tests.e2e.running import ADMIN, WATCHDOG_S, wait_until
from tests.e2e.test_gpu import proxy
from tests.e2e.test_gpu_kills import POOL, _counted, after_a_good_run, kill_keeper, url_of

CHILDREN = 3
NAMES = 4
HEARD = 60
"""What a child says before it is killed, at most."""
GENERATIONS = 6
"""Children that are killed, one after another; then the last ones end by themselves."""


def data_of(name: str, version: int) -> bytes:
    """What `name` holds in this version: of any size, and of no other name's or version's bytes."""
    draw = random.Random(f"{name} {version}")
    return draw.randbytes(draw.choice((0, 1, 511, 4096, 70_000, 1 << 20)))


def live(url: str, library: str, child: int, seed: int, pipe: Any) -> None:
    """A child's program, until it is told anything. Says ("begin" or "end", name, version; -1: deleted)."""
    draw = random.Random(seed)
    versions = dict.fromkeys((f"{child}-{n}" for n in range(NAMES)), 0)
    with Gpus(library) as gpus, Client(url, ADMIN) as client:
        while not pipe.poll():
            name = draw.choice(list(versions))
            step = draw.choice(("put", "put", "get", "hold", "other", "delete"))
            if step == "put":
                version = draw.randrange(1 << 30)
                data = data_of(name, version)
                pipe.send(("begin", name, version))
                client.put(gpus.array("uint8", (len(data),), data), name)
                pipe.send(("end", name, version))
                versions[name] = version
            elif step == "delete":
                pipe.send(("begin", name, -1))
                client.delete([name])
                pipe.send(("end", name, -1))
                versions[name] = 0
            elif step == "other":
                other = f"{draw.randrange(CHILDREN)}-{draw.randrange(NAMES)}"
                try:
                    client.get(other)
                except ShardsNotFound:
                    assert not versions.get(other), f"{other} is lost"
            elif versions[name]:
                with client.get(name, hold=step == "hold") as shard:
                    found = held_bytes(shard.device) if shard.device is not None else bytes(shard.data)
                    assert found == data_of(name, versions[name]), f"{name} holds something else"
    pipe.recv()
    pipe.send(("bye", "", 0))


class Life:
    """One child, and what it says."""

    def __init__(self, context: Any, url: str, number: int, seed: int) -> None:
        self.number = number
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=live, args=(url, fakecuda.library(), number, seed, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def said(self) -> Iterator[tuple[str, str, int]]:
        """Everything until its end."""
        while True:
            try:
                yield self.pipe.recv()
            except EOFError:
                return


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_doubled_or_leaked(seed: int) -> None:
    draw = random.Random(seed)
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.test_gpu_kills"])
    allowed: dict[str, set[int]] = {}
    """By name: the versions one of which must be what is there; -1: nothing is."""
    with (
        Gpus(fakecuda.library()) as gpus,
        proxy("--gpu-pool-bytes", str(POOL), workers=2) as running,
        Client(url_of(running), ADMIN) as client,
    ):
        client.put(gpus.array("uint8", (1,), b"x"), "first")
        lives = [Life(context, url_of(running), n, draw.randrange(1 << 30)) for n in range(CHILDREN)]

        def heard(what: str, name: str, version: int) -> None:
            if what == "begin":
                allowed.setdefault(name, {-1}).add(version)
            elif what == "end":
                allowed[name] = {version}

        def ended(one: Life, *, whole: bool) -> None:
            last = ""
            for last, name, version in one.said():
                heard(last, name, version)
            one.process.join(WATCHDOG_S)
            assert not whole or (last, one.process.exitcode) == ("bye", 0), "a child failed"

        for number in range(GENERATIONS):
            if number % 2:
                after_a_good_run(running)
                kill_keeper(running)
            victim = draw.choice(lives)
            for _ in range(draw.randrange(1, HEARD)):
                heard(*victim.pipe.recv())
            os.kill(victim.process.pid, signal.SIGKILL)
            ended(victim, whole=False)
            lives[lives.index(victim)] = Life(
                context, url_of(running), victim.number, draw.randrange(1 << 30)
            )
        for one in lives:
            one.pipe.send("stop")
            ended(one, whole=True)

        there: dict[str, bytes] = {"first": b"x"}
        for name, versions in allowed.items():
            try:
                there[name] = bytes(client.get(name).data)
            except ShardsNotFound:
                assert -1 in versions, f"{name} is lost"
            else:
                digests = {hashlib.sha256(data_of(name, v)).digest() for v in versions if v >= 0}
                assert hashlib.sha256(there[name]).digest() in digests, f"{name} holds something else"
        assert _counted(running) == (len(there), sum(map(len, there.values())))
        client.delete(list(there))
        assert _counted(running) == (0, 0)
        everything = gpus.array("uint8", (POOL,), bytes(POOL))
        wait_until(lambda: client.put(everything, "all").way == "gpu", "the whole pool is free again")
