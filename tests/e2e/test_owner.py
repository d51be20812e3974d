"""A proxy owned by another process (integrations/owner.py): its whole life without Ray, and the owner's
death."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_fast import config
from areal_fast.client import Client
from areal_fast.integrations.owner import OwnedProxy, ProxyFailed
from tests.e2e.running import ADMIN, ROOT, alive, descendants, wait_until

WATCHDOG_S = 120.0
FLAGS = [
    "--host", "127.0.0.1", "--port", "0", "--backend-addr", "embedded", "--workers", "1",
    "--arena-max-bytes", "64M", "--admin-api-key", ADMIN, "--hang-timeout-seconds", "60",
]  # fmt: skip


@pytest.fixture
def owned() -> Iterator[OwnedProxy]:
    proxy = OwnedProxy(FLAGS, max_restarts=1, log=io.StringIO())
    proxy.start()
    yield proxy
    proxy.stop()


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_it_answers_and_stops(owned: OwnedProxy) -> None:
    status = owned.wait_ready(WATCHDOG_S)
    assert status.state == "ready" and status.restarts == 0 and status.last_death == ""
    with Client(f"http://{status.address}", ADMIN) as client:
        assert client.health()["status"] == "ok"
    tree = [status.pid, *descendants(status.pid)]
    assert owned.stop() == 0
    assert owned.status().state == "stopped" and owned.status().pid == 0
    assert not list(filter(alive, tree)) and not listens(status.address)
    assert any(" stopped " in line for line in owned.tail())


def test_a_proxy_that_died_comes_back_on_its_address_and_the_second_death_is_the_end(
    owned: OwnedProxy,
) -> None:
    first = owned.wait_ready(WATCHDOG_S)
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: owned.status().restarts == 1, "it is started again")
    second = owned.wait_ready(WATCHDOG_S)
    assert second.address == first.address and second.pid != first.pid
    assert second.last_death == f"the proxy at {first.address} was killed by SIGKILL"
    with Client(f"http://{second.address}", ADMIN) as client:
        assert client.health()["sessions"] == 0
    os.kill(second.pid, signal.SIGKILL)
    wait_until(lambda: owned.status().state == "failed", "it is given up")
    with pytest.raises(ProxyFailed, match="was killed by SIGKILL"):
        owned.wait_ready(WATCHDOG_S)
    log = owned._log
    assert isinstance(log, io.StringIO)
    told = log.getvalue()
    assert "its sessions are lost; starting it again (1 of 1)" in told
    assert "it is not started again" in told


def test_what_cannot_start_says_why() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        proxy = OwnedProxy([*FLAGS, "--port", str(port)], log=io.StringIO())
        proxy.start()
        with pytest.raises(ProxyFailed, match=f"cannot listen on 127.0.0.1:{port}: the port is in use"):
            proxy.wait_ready(WATCHDOG_S)
        assert proxy.status().state == "failed"
        assert proxy.stop() == 1


def test_bad_flags_are_refused_before_anything_is_started() -> None:
    with pytest.raises(config.UsageError, match="--workers"):
        OwnedProxy([*FLAGS, "--workers", "0"])


def test_stopped_while_it_starts() -> None:
    proxy = OwnedProxy(FLAGS, log=io.StringIO())
    proxy.start()
    proxy.stop()
    assert proxy.status().state == "stopped"
    with pytest.raises(ProxyFailed):
        proxy.wait_ready(WATCHDOG_S)


OWNER = """
import sys, threading
from areal_fast.integrations.owner import OwnedProxy
proxy = OwnedProxy(sys.argv[1:])
proxy.start()
status = proxy.wait_ready()
print(status.address, status.pid, flush=True)
threading.Event().wait()
"""


def test_an_owner_that_is_killed_leaves_nothing_but_dumps(tmp_path: Path) -> None:
    """The owner has no time for a word: its line ends, and the proxy stops as if it had been told to."""
    flags = [*FLAGS, "--stale-session-dump-path", str(tmp_path)]
    before = set(os.listdir("/dev/shm"))
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    try:
        assert owner.stdout is not None
        address, pid = owner.stdout.readline().decode().split()
        tree = [int(pid), *descendants(int(pid))]
        assert len(tree) >= 4  # supervisor, engine, worker, cleaner
        with Client(f"http://{address}", ADMIN) as client:
            key = client.start_session("owned").api_key
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        request = urllib.request.Request(f"http://{address}/chat/completions", json.dumps(chat).encode())
        request.add_header("Authorization", f"Bearer {key}")
        urllib.request.urlopen(request, timeout=WATCHDOG_S).close()
    finally:
        owner.kill()
        owner.wait(WATCHDOG_S)
        owner.stdout.close()
    wait_until(lambda: not list(filter(alive, tree)), "the whole tree is gone")
    assert not listens(address)
    assert set(os.listdir("/dev/shm")) <= before
    (dump,) = tmp_path.iterdir()
    assert dump.name == "owned-0-active.json" and len(json.loads(dump.read_bytes())) == 1


def test_a_lifeline_that_is_none_is_refused() -> None:
    with open(os.devnull) as nothing:
        number = nothing.fileno()
        done = subprocess.run(
            [sys.executable, "-m", "areal_fast", *FLAGS, "--lifeline-fd", str(number)],
            capture_output=True, text=True, cwd=ROOT, timeout=WATCHDOG_S,
            pass_fds=(number,), check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"areal-fast: error: argument --lifeline-fd: {number}: not a socket\n"
