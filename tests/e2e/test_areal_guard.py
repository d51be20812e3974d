"""areal_fast under the real guard of AReaL 1.0.4: launched by its /fork, ended by its kill.

A guard runs a service below a shell that pipes its output into tee, and ends it by SIGTERM to every process
of that tree, then SIGKILL 3 s later. Whatever way it ends (asked to, killed at once, its supervisor alone
killed), there must be no process of it left, no file in tmpfs, and nobody listening. Every process that was
started here is known by a variable in its environment, so that one that ran away from the tree is found too.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import wait_until

WIRE = Path(__file__).resolve().parents[1] / "wire"
sys.path[:0] = [str(WIRE)]

from areal_env import ArealUnavailable, areal_python, beside, environment  # noqa: E402

pytestmark = [pytest.mark.areal, pytest.mark.timeout(900)]
GUARD = "areal.experimental.inference_service.guard"
KEY = "a-key-of-the-guards"
MARK = "AREAL_FAST_TEST_TREE"
START_S = 500.0
TMPFS = "/dev/shm/"


def post(address: str, path: str, body: Any, key: str = "") -> tuple[int, Any]:
    """The status and the JSON answer."""
    host, _, port = address.rpartition(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except OSError:
        return False


class Guard:
    """A running guard. `launch` starts a service as AReaL's controller does."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.python = python
        self.folder = folder
        flags = {
            "host": "127.0.0.1", "port": port, "experiment-name": "guarded", "trial-name": "t",
            "role": "rollout", "worker-index": 0, "fileroot": folder, "nfs-record-root": folder / "names",
        }  # fmt: skip
        argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        with (folder / "guard.log").open("w") as log:
            self.process = subprocess.Popen(
                [str(python), "-W", "ignore", "-m", GUARD, *argv],
                env=environment(**{MARK: self.mark}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: self.process.poll() is not None or listening(self.address), "the guard", START_S)
        assert self.process.poll() is None, (folder / "guard.log").read_text()[-3000:]

    def launch(self, index: int) -> str:
        """The address of a proxy with the embedded engine."""
        _, given = post(self.address, "/alloc_ports", {"count": 1})
        address = f"{given['host']}:{given['ports'][0]}"
        argv = [
            str(self.python), "-m", "areal_fast", "--backend-addr", "embedded", "--admin-api-key", KEY,
            "--log-level", "info", "--workers", "2", "--arena-max-bytes", "64M", "--drain-seconds", "0.5",
            "--stale-session-dump-path", str(self.folder / f"dumps-{index}"), "--hang-timeout-seconds", "60",
            "--host", given["host"], "--port", str(given["ports"][0]),
        ]  # fmt: skip
        (self.folder / f"dumps-{index}").mkdir()
        status, forked = post(
            self.address, "/fork", {"role": "data-proxy", "worker_index": index, "raw_cmd": argv}
        )
        assert status == 200, forked
        wait_until(lambda: listening(address), "the proxy", START_S)
        return address

    def kill(self, index: int) -> tuple[int, Any]:
        return post(self.address, "/kill_forked_worker", {"role": "data-proxy", "worker_index": index})

    def tree(self) -> dict[int, str]:
        """The living processes that come from this guard, itself left out, and their command lines."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == self.process.pid:
                continue
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                if (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
                    argv = (folder / "cmdline").read_bytes().split(b"\0")
                    found[int(folder.name)] = b" ".join(argv).decode()
        return found

    def supervisor(self) -> int:
        """The pid of the only proxy's supervisor."""
        (pid,) = [
            pid for pid, line in self.tree().items() if line.startswith(f"{self.python} -m areal_fast -")
        ]
        return pid

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        for pid in self.tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return beside(areal_python(), tmp_path_factory.mktemp("beside"))
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")


@pytest.fixture(scope="module")
def guard(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    made = Guard(python, tmp_path_factory.mktemp("guard"))
    yield made
    made.end()


def used(address: str, name: str) -> None:
    """Sessions with turns, one of them ready, and a large shard."""
    shard = {"type": "tensor", "data": "AAAA" * (1 << 18), "shape": [3 << 18], "dtype": "torch.uint8"}
    host, _, port = address.rpartition(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        connection.request("PUT", f"/data/{name}", json.dumps(shard), {"content-type": "application/json"})
        assert connection.getresponse().status == 200
    _, started = post(address, "/rl/start_session", {"task_id": name, "group_size": 2}, KEY)
    chat = {"messages": [{"role": "user", "content": "who is there?"}], "max_tokens": 16}
    for one in started["sessions"]:
        assert post(address, "/chat/completions", chat, one["session_api_key"])[0] == 200
    key = started["sessions"][0]["session_api_key"]
    assert post(address, "/rl/set_reward", {"reward": 1.0}, key)[0] == 200


def in_tmpfs(pids: dict[int, str]) -> set[str]:
    """The files in tmpfs that these processes have open or mapped: what nobody opened, nobody leaves."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
            lines = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
            found |= {line[5] for line in lines if len(line) > 5}
    return {path for path in found if path.startswith(TMPFS)}


def gone(guard: Guard, address: str) -> None:
    wait_until(lambda: guard.tree() == {}, "every process of it has gone")
    # the kernel takes a dying process's environment first and its sockets after that
    wait_until(lambda: not listening(address), f"nobody listens on {address}")
    host, _, port = address.rpartition(":")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))


def kill_every(guard: Guard) -> None:
    for pid in guard.tree():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


ENDINGS: dict[str, Callable[[Guard], None]] = {
    "the guard's kill": lambda guard: None,
    "SIGKILL of the whole tree": kill_every,
    "SIGKILL of the supervisor alone": lambda guard: os.kill(guard.supervisor(), signal.SIGKILL),
}


@pytest.mark.parametrize("index", range(len(ENDINGS)), ids=list(ENDINGS))
def test_nothing_is_left(guard: Guard, index: int) -> None:
    address = guard.launch(index)
    used(address, f"of-{index}")
    tree = guard.tree()
    assert sum("areal_fast.service.worker" in line for line in tree.values()) == 2
    assert any(line.startswith("tee -a") for line in tree.values()), "it does not run as a guard runs it"
    assert in_tmpfs(tree) == set()
    list(ENDINGS.values())[index](guard)
    status, said = guard.kill(index)
    assert status == 200, said
    gone(guard, address)
    if index == 0:  # it fits into the guard's 3 s, because the drain was told to be short
        dumped = {file.name for file in (guard.folder / f"dumps-{index}").iterdir()}
        assert dumped == {"of-0-0-trajectory-0.json", "of-0-1-active.json"}


def test_nothing_is_left_of_a_guard_that_is_stopped_itself(guard: Guard) -> None:
    address = guard.launch(len(ENDINGS))
    used(address, "last")
    guard.process.terminate()
    gone(guard, address)
