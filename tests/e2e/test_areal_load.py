"""The released AReaL's gateway under concurrent load: many episodes at once by its own workflow, one of our
workers killed in the middle.

The same episodes run before AReaL's own proxy, where nobody is killed. The engine answers a prompt with the
same tokens always, so every tensor of every session must be the same; and each session's tensors must hold
exactly the turns that its agent was given, in order: none lost, none twice, none of another session.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

WIRE = Path(__file__).resolve().parents[1] / "wire"
sys.path[:0] = [str(WIRE), str(WIRE.parent)]

import qwen_folder  # noqa: E402
from areal_env import ArealUnavailable, areal_python  # noqa: E402
from proxy import Server, free_port, original, ours  # noqa: E402

from tests.e2e.running import alive  # noqa: E402

pytestmark = [pytest.mark.areal, pytest.mark.timeout(600)]
SERVICE = "areal.experimental.inference_service"
SESSIONS, TURNS = 32, 4
WATCHDOG_S = 300


@pytest.fixture(scope="module")
def areal() -> Path:
    try:
        return areal_python()
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder.build(tmp_path_factory.getbasetemp() / "qwen")


@pytest.fixture(scope="module")
def engine() -> Iterator[Server]:
    """The embedded engine, slow enough that a kill meets turns in flight."""
    port = free_port()
    flags = ["--tokens", "1000-20000", "--output-tokens", "24", "--request-latency-s", "0.05",
             "--token-latency-s", "0.005", "--chunk-tokens", "4"]  # fmt: skip
    server = Server([sys.executable, "-m", "areal_fast", "embedded", "--port", str(port), *flags], port)
    yield server
    server.stop()


@contextlib.contextmanager
def front(areal: Path) -> Iterator[tuple[str, str]]:
    """AReaL's router and gateway: (gateway URL, router URL)."""
    with contextlib.ExitStack() as stack:
        urls: list[str] = []
        for name in ("router", "gateway"):
            port = free_port()
            command = [areal, "-W", "ignore", "-m", f"{SERVICE}.{name}", "--host", "127.0.0.1"]
            known = ["--router-addr", urls[0]] if urls else []
            server = Server([*command, "--port", str(port), *known], port)
            stack.callback(server.stop)
            urls.append(server.url)
        yield urls[1], urls[0]


def workers(proxy: Server) -> list[int]:
    children = Path(f"/proc/{proxy.pid}/task/{proxy.pid}/children").read_text().split()
    command = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, words in command.items() if b"areal_fast.service.worker" in words]


def loaded(areal: Path, gateway: str, router: str, mine: Server, theirs: Server, tokenizer: Path) -> Any:
    """The episodes before one proxy, then before the other; a worker of the first one is killed halfway."""
    script = [
        areal,
        WIRE / "areal_load.py",
        gateway,
        router,
        tokenizer,
        SESSIONS,
        TURNS,
        mine.url,
        theirs.url,
    ]
    killed: list[int] = []
    last = ""
    with subprocess.Popen([str(part) for part in script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        try:
            for last in run.stdout:
                if last == "half\n" and not killed:
                    killed += workers(mine)[:1]
                    os.kill(killed[0], signal.SIGKILL)
            assert run.wait(WATCHDOG_S) == 0, mine.output() + theirs.output()
        finally:
            run.kill()
    assert len(killed) == 1 and not alive(killed[0])
    report = json.loads(last)
    return {"ours": report[mine.url], "original": report[theirs.url]}


@pytest.fixture(scope="module")
def reports(areal: Path, engine: Server, tokenizer: Path) -> dict[str, dict[str, Any]]:
    """Reports by whose proxy it was. Everything starts at once: AReaL's processes take their time."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        theirs, mine, (gateway, router) = (
            starting.result()
            for starting in (
                pool.submit(stack.enter_context, original(areal, engine.url, tokenizer)),
                pool.submit(stack.enter_context, ours(engine.url, tokenizer, workers=2)),
                pool.submit(stack.enter_context, front(areal)),
            )
        )
        return loaded(areal, gateway, router, mine, theirs, tokenizer)


def test_each_trajectory_holds_exactly_its_sessions_turns(reports: dict[str, dict[str, Any]]) -> None:
    sessions = reports["ours"]["sessions"]
    assert sorted(sessions, key=int) == [str(number) for number in range(SESSIONS)]
    for number, session in sessions.items():
        assert len(session["told"]) == TURNS
        assert session["turns"] == session["told"], f"session {number}"


def test_every_tensor_is_the_originals(reports: dict[str, dict[str, Any]]) -> None:
    theirs, mine = reports["original"]["sessions"], reports["ours"]["sessions"]
    assert mine.keys() == theirs.keys()
    for number, session in theirs.items():
        assert mine[number]["tensors"] == session["tensors"], f"session {number}"


def test_the_kill_was_felt_and_nothing_is_left(reports: dict[str, dict[str, Any]]) -> None:
    mine = reports["ours"]
    assert sum(worker["restarts"] for worker in mine["health"]["workers"]) == 1
    # a start whose reply the gateway did not get in its time is asked again: the first session stays, empty
    assert [row for row in mine["left"] if row["interactions"]] == []
