"""Producers and readers of shards that are processes, and die: what is left is what was acknowledged, to the
byte.

After every death here the same is checked (`Ledger.settle`): an acknowledged shard is there with its bytes;
one whose put was cut is there as it was before, or whole as it was to be; clear's totals, the arena's
records, the files the supervisor holds and what the core counts for them are exactly those of these shards;
no worker has a descriptor more than before, and once all is cleared no process maps or holds a shard file any
more.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_fast.errors import ShardsNotFound
from areal_fast.shards.description import Description, describe
from areal_fast.shards.local import LocalShards
from areal_fast.shards.sealed import MAPPED_FROM_BYTES
from tests.e2e.running import ADMIN, ROOT, WATCHDOG_S, Proxy, alive, descendants, wait_until
from tests.e2e.shard_actor import STEPS, content
from tests.e2e.test_life import shard_ids
from tests.e2e.test_shard_files import FILE, connected, file_of, held_files, totals

pytestmark = pytest.mark.slow

ABSENT = -1
Version = tuple[int, int]
"""(size, seed) of a shard's content; size ABSENT: there is none."""


def bytes_of(size: int) -> Description:
    return describe("uint8", (size,))


class Actor:
    """A process of shard_actor.py. `live`: acknowledged versions by id; `unsure`: what the last act, which
    was not acknowledged, would have made of its id."""

    def __init__(self, proxy: Proxy, label: str, way: str, seed: int, *step: str) -> None:
        self.label = label
        self.way = way
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.shard_actor", str(proxy.port), label, str(seed), way, *step],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.acts = 0

    def kill(self) -> None:
        self.process.kill()

    def outcome(self) -> tuple[dict[str, Version], tuple[str, Version] | None]:
        """(live, unsure), once it is dead. Its words end where it does: a line cut short was not said."""
        out, err = self.process.communicate(timeout=WATCHDOG_S)
        assert self.process.returncode == -9, (self.label, self.way, err.decode()[-2000:])
        live: dict[str, Version] = {}
        doing: tuple[str, Version] | None = None
        for line in out.decode().split("\n")[:-1]:
            word, *rest = line.split()
            if word == "try":
                doing = rest[0], (int(rest[1]), int(rest[2]))
                continue
            assert doing is not None
            self.acts += 1
            if doing[1][0] >= 0:
                live[doing[0]] = doing[1]
            elif doing[1][0] == ABSENT:
                live.pop(doing[0], None)
            doing = None
        return live, doing if doing and doing[1][0] >= ABSENT else None


def worker_descriptors(proxy: Proxy) -> dict[int, int]:
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in proxy.worker_pids()}


def shard_files_of(pids: list[int]) -> list[str]:
    """Shard files that these processes have mapped or open."""
    found = []
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found += [f"{pid}: {line}" for line in (*maps.split("\n"), *links) if "areal_fast-shard" in line]
    return found


class Ledger:
    """What must be in a proxy that nobody else uses."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        wait_until(lambda: totals(proxy) == (0, 0), "an empty proxy")

    def settle(self, actors: list[Actor]) -> None:
        live: dict[str, Version] = {}
        unsure: dict[str, Version] = {}
        for actor in actors:
            known, doing = actor.outcome()
            live |= known
            if doing:
                unsure[doing[0]] = doing[1]
        proxy = self.proxy
        allowed = {
            shard_id: {live.get(shard_id, (ABSENT, 0)), unsure.get(shard_id, live.get(shard_id, (ABSENT, 0)))}
            for shard_id in {*live, *unsure}
        }
        with connected(proxy) as shards:
            # A request of the dead may still end, so counts and contents are compared until they agree.
            wait_until(
                lambda: self._exact(self._found(shards, allowed)),
                f"what is counted is what is there, of {allowed}",
            )
        proxy.ask("DELETE", "/data/clear", {"shard_ids": [*live, *unsure]})
        wait_until(lambda: totals(proxy) == (0, 0), "nothing is left")
        wait_until(lambda: held_files(proxy) == 0, "no file is held")
        wait_until(
            lambda: (s := self._arena())["granules_used"] == s["granules_outside"] == s["shards_init"] == 0,
            "nor a granule",
        )
        wait_until(lambda: not shard_files_of([proxy.pid, *descendants(proxy.pid)]), "nor mapped by anyone")

    def _found(self, shards: LocalShards, allowed: dict[str, set[Version]]) -> tuple[int, int]:
        """(shards, their bytes). An AssertionError if one has another content than one of those allowed."""
        count = nbytes = 0
        for shard_id, versions in allowed.items():
            try:
                (mapped,) = shards.map([shard_id])
            except ShardsNotFound:
                assert any(size == ABSENT for size, _ in versions), f"{shard_id} is lost: {versions}"
                continue
            data = bytes(mapped.data)
            assert any(
                size == len(data) and content(size, seed) == data for size, seed in versions if size >= 0
            ), f"{shard_id} is none of {versions}"
            count += 1
            nbytes += len(data)
        return count, nbytes

    def _exact(self, found: tuple[int, int]) -> bool:
        return (
            totals(self.proxy) == found
            and self._arena()["shards_active"] == found[0]
            and self.proxy.health()["shard_file_bytes"] == self._file_bytes() <= found[1]
        )

    def _arena(self) -> dict[str, int]:
        found: dict[str, int] = self.proxy.health()["arena"]
        return found

    def _file_bytes(self) -> int:
        total = 0
        for link in Path(f"/proc/{self.proxy.pid}/fd").iterdir():
            try:
                if "areal_fast-shard" in os.readlink(link):
                    total += link.stat().st_size
            except OSError:
                continue
        return total


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy(workers=2, log_level="warning") as running:
        yield running


@pytest.mark.parametrize(("way", "step"), [(way, step) for way, steps in STEPS.items() for step in steps])
def test_a_death_at_each_step(proxy: Proxy, way: str, step: str) -> None:
    ledger = Ledger(proxy)
    before = worker_descriptors(proxy)
    ledger.settle([Actor(proxy, f"{way}-{step}".replace(" ", "-"), way, 1, step)])
    wait_until(
        lambda: all(n <= before[pid] + 1 for pid, n in worker_descriptors(proxy).items()),
        "no worker has descriptors left over",
    )


@pytest.mark.parametrize("round_", range(3))
def test_deaths_at_random(proxy: Proxy, seed: int, round_: int) -> None:
    """Two processes of each way, killed one by one in the middle of what they do."""
    ledger = Ledger(proxy)
    chance = random.Random(seed + round_)
    actors = [Actor(proxy, f"{way}{i}-{round_}", way, seed + i) for way in STEPS for i in range(2)]
    wait_until(lambda: totals(proxy)[0] >= 8, "they are at work")
    for actor in chance.sample(actors, len(actors)):
        threading.Event().wait(chance.uniform(0.05, 0.5))
        actor.kill()
    ledger.settle(actors)
    assert sum(actor.acts for actor in actors) > 10


def test_a_reader_keeps_what_it_mapped_and_its_death_gives_it_back(proxy: Proxy) -> None:
    """A shard cleared while a process maps it: gone for others, there for it, and freed with it."""
    data = content(2 << 20, 5)
    assert proxy.ask("PUT", "/data/leased", file_of(len(data), data), headers=FILE).status == 200
    script = (
        "import json, os, sys, http.client\n"
        "from areal_fast.shards.local import LocalShards\n"
        "ask = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]))\n"
        "ask.request('GET', '/data/ways')\n"
        "shards = LocalShards(json.loads(ask.getresponse().read())['local'])\n"
        "(mapped,) = shards.map(['leased'])\n"
        "print('mapped', flush=True)\n"
        "sys.stdin.readline()\n"
        "sys.stdout.buffer.write(bytes(mapped.data)); sys.stdout.flush()\n"
        "sys.stdin.readline()\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", script, str(proxy.port)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdin is not None and reader.stdout is not None
    with reader:
        try:
            assert reader.stdout.readline() == b"mapped\n"
            assert proxy.ask("DELETE", "/data/clear", {"shard_ids": ["leased"]}).json["cleared_count"] == 1
            wait_until(lambda: held_files(proxy) == 0, "the proxy has let it go")
            assert proxy.ask("GET", "/data/leased").status == 404
            with connected(proxy) as shards, pytest.raises(ShardsNotFound):
                shards.map(["leased"])
            reader.stdin.write(b"\n")
            reader.stdin.flush()
            assert reader.stdout.read(len(data)) == data
            assert shard_files_of([reader.pid]), "it is the only one to have it"
            assert not shard_files_of([proxy.pid, *descendants(proxy.pid)])
        finally:
            reader.kill()
    wait_until(lambda: not alive(reader.pid), "the reader is dead, and with it the last mapping")


def test_a_worker_killed_while_a_large_file_arrives_leaves_nothing(proxy: Proxy) -> None:
    ledger = Ledger(proxy)
    pages = (48 << 20) // 4096
    body = file_of(48 << 20)
    with proxy.each_worker() as connections:
        for connection in connections.values():
            connection.putrequest("PUT", "/data/cut")
            for name, value in (("content-type", FILE["content-type"]), ("content-length", str(len(body)))):
                connection.putheader(name, value)
            connection.endheaders()
            connection.send(body[: 30 << 20])
        wait_until(lambda: ledger._arena()["granules_used"] >= 2 * pages, "room for both is taken")
        assert totals(proxy) == (0, 0)
        proxy.kill(*connections)
    wait_until(lambda: len(proxy.worker_pids()) == 2, "there are workers again")
    wait_until(lambda: ledger._arena()["granules_used"] == 0, "and none of it is taken any more")
    assert proxy.ask("GET", "/data/cut").status == 404
    ledger.settle([])


def test_everything_expires_wherever_it_is() -> None:
    with (
        Proxy("--shard-ttl-seconds", "2", workers=1, log_level="warning") as proxy,
        connected(proxy) as shards,
    ):
        session_id, key = proxy.start("ttl")
        assert proxy.chat(key, "x" * 500).status == 200 and proxy.reward(key).status == 200
        data = content(MAPPED_FROM_BYTES, 1)
        what = {"small": 10, "large": 300_000}
        for name, size in what.items():
            assert proxy.ask("PUT", f"/data/{name}", file_of(size), headers=FILE).status == 200
        tensor = {"type": "tensor", "data": "AACAPw==", "shape": [1], "dtype": "torch.float32"}
        assert proxy.ask("PUT", "/data/json", tensor).status == 200
        assert proxy.ask("PUT", "/data/moved", file_of(len(data), data), headers=FILE).status == 200
        shards.put_bytes("file", shards.map(["moved"])[0].what, data)
        (mapped,) = shards.map(["file"])
        (entry,) = proxy.export(session_id).json["interactions"].values()
        ids = ["small", "large", "json", "moved", "file", *shard_ids(entry)]
        for shard_id in ids:
            wait_until(lambda i=shard_id: proxy.ask("GET", f"/data/{i}").status == 404, f"{shard_id} expired")
            # type: ignore[misc]
        wait_until(lambda: totals(proxy) == (0, 0) and held_files(proxy) == 0, "all are counted out")
        wait_until(lambda: proxy.health()["arena"]["shards_active"] == 0, "no record is left")
        assert proxy.health()["shard_file_bytes"] == 0 and bytes(mapped.data) == data
        proxy.ask("POST", "/export_trajectories", {"session_ids": [session_id]}, key=ADMIN)


def test_cleanup_frees_what_a_stale_session_held_and_only_that(tmp_path: Path) -> None:
    """Its records and routed experts go with its dump; what was exported or put is its fetcher's until
    cleared."""
    flags = ("--session-timeout-seconds", "0.4", "--stale-session-cleanup-interval-seconds", "0.1")
    with Proxy(*flags, "--stale-session-dump-path", str(tmp_path), workers=1) as proxy:
        proxy.engine(routed_experts="60x8")
        with proxy.cleaner_held():
            session_id, key = proxy.start("stale")
            routed = {"metadata": {"return_routed_experts": True}}
            assert proxy.chat(key, "x" * 2000, **routed).status == 200 and proxy.reward(key).status == 200
            (entry,) = proxy.export(session_id).json["interactions"].values()
            ids = shard_ids(entry)
            assert proxy.chat(key, "y" * 2000, **routed).status == 200 and proxy.reward(key).status == 200
            assert proxy.chat(key, "z" * 2000, **routed).status == 200
            with connected(proxy) as shards:
                shards.put_bytes("uploaded", bytes_of(300_000), content(300_000, 2))
        wait_until(lambda: proxy.health()["sessions"] == 0, "it went stale")
        wait_until(
            lambda: len(list(tmp_path.glob("*.json"))) == 2, "both its trajectory and its rest are dumped"
        )
        wait_until(
            lambda: proxy.health()["arena"]["shards_active"] == 3,
            "its experts are freed, but for the exported: a bundle, its experts, the uploaded one",
        )
        assert [proxy.ask("GET", f"/data/{i}").status for i in (*ids, "uploaded")] == [200] * (len(ids) + 1)
        cleared = proxy.ask("DELETE", "/data/clear", {"shard_ids": [*ids, "uploaded"]}).json
        assert (cleared["cleared_count"], cleared["num_tensors"], cleared["total_bytes"]) == (
            len(ids) + 1,
            0,
            0,
        )
        wait_until(
            lambda: (s := proxy.health()["arena"])["granules_used"] == s["granules_outside"] == 0,
            "every granule is free",
        )


@pytest.mark.slow
def test_memory_goes_back_to_the_system() -> None:
    """The arena's pages a minute after they were freed; a file's at once."""
    flags = ("--stale-session-cleanup-interval-seconds", "0.5")
    with Proxy(*flags, workers=1, log_level="warning") as proxy, connected(proxy) as shards:

        def resident() -> int:
            """Bytes of the arena and of all shard files."""
            blocks = {
                (s.st_dev, s.st_ino): s.st_blocks
                for link in Path(f"/proc/{proxy.pid}/fd").iterdir()
                if "memfd:areal_fast" in os.readlink(link) and (s := link.stat())
            }
            return 512 * sum(blocks.values())

        begin = resident()
        for i in range(3):
            assert proxy.ask("PUT", f"/data/{i}", file_of(40 << 20), headers=FILE).status == 200
        full = resident()
        assert full - begin > 100 << 20
        shards.map(["0"])
        shards.put_bytes("file", bytes_of(30 << 20), bytes(30 << 20))
        assert resident() > full + (30 << 20)
        proxy.ask("DELETE", "/data/clear", {"shard_ids": ["0", "1", "2", "file"]})
        wait_until(lambda: held_files(proxy) == 0, "files are closed")
        wait_until(lambda: resident() < begin + (20 << 20), "pages are punched out", 180)
