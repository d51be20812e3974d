"""Starting and stopping: what goes wrong at the start is one line, what is alive at the end is kept."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.e2e.running import ADMIN, ROOT, WATCHDOG_S, Proxy, descendants, wait_until


def refused(*flags: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and stderr of a proxy that does not come up."""
    found = subprocess.run(
        [sys.executable, "-m", "areal_fast", "--host", "127.0.0.1", "--port", "0", *flags],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        timeout=WATCHDOG_S,
        check=False,
    )
    return found.returncode, found.stderr.decode()


# -- the start ---------------------------------------------------------------------------------------------
def test_a_port_in_use_is_one_line_and_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, text = refused("--port", port, "--backend-addr", "embedded")
    assert status == 1
    assert text == f"areal-fast: error: cannot listen on 127.0.0.1:{port}: the port is in use\n"


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_a_tokenizer_that_does_not_load_is_one_line_and_status_1(tmp_path: Path, make: object) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    status, text = refused("--backend-addr", "http://127.0.0.1:1", "--tokenizer-path", str(path))
    assert status == 1
    (line,) = text.splitlines()
    assert line.startswith(f"areal-fast: error: cannot load the tokenizer '{path}': ")


def test_a_bad_flag_is_one_line_and_status_2() -> None:
    status, text = refused("--port", "x", "--backend-addr", "embedded")
    assert status == 2
    assert text == "areal-fast: error: argument --port: 'x' is not an integer\n"


def test_unknown_flags_are_one_warning() -> None:
    with Proxy("--no-such-flag", "7", workers=1) as proxy:
        assert len(proxy.log('WARNING .* flags_ignored flags="--no-such-flag 7"')) == 1


def test_a_worker_that_never_starts_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError('broken on purpose')")
    status, text = refused("--backend-addr", "embedded", environment={"PYTHONPATH": str(tmp_path)})
    assert status == 1
    assert "worker-" in text and "cannot stay up" in text


def test_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    with Proxy("--host", "::1", workers=1) as proxy:
        with socket.create_connection(("::1", proxy.port), timeout=10) as sock:
            sock.sendall(b"GET /get_version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_broken_stderr_harms_nobody() -> None:
    with Proxy(workers=2, log_level="debug") as proxy:
        _, key = proxy.start("t")
        pid = proxy.worker_pids()[0]
        proxy.deafen()
        proxy.kill(pid)
        wait_until(lambda: len(p := proxy.worker_pids()) == 2 and pid not in p, "it was replaced")
        assert proxy.chat(key).status == 200
        proxy.terminate()
        assert proxy.wait() == 0


# -- the end -----------------------------------------------------------------------------------------------
def test_sigterm_drains_dumps_and_exits_0(tmp_path: Path) -> None:
    with Proxy("--stale-session-dump-path", str(tmp_path)) as proxy:
        _, idle = proxy.start("idle")
        first = proxy.chat(idle)
        assert proxy.reward(idle).status == 200
        _, busy = proxy.start("busy")
        proxy.engine(request_latency_s=1.5)
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(proxy.chat(busy)))
        waiting.start()
        wait_until(lambda: proxy.engine_stats()["in_flight"] == 1, "the engine has the request")
        proxy.terminate()
        wait_until(lambda: refuses(proxy), "nobody new is let in")
        waiting.join(WATCHDOG_S)
        assert answers[0].status == 200
        assert proxy.wait() == 0
        files = {path.name: list(json.loads(path.read_text())) for path in tmp_path.iterdir()}
        assert files == {
            "idle-0-trajectory-0.json": [first.json["id"]],
            "busy-0-active.json": [answers[0].json["id"]],
        }
        (line,) = proxy.log("NOTICE .* stopped status=0 .*")
        assert "unfinished_requests=0 dumped_sessions=2 not_dumped_sessions=0" in line.string


def refuses(proxy: Proxy) -> bool:
    try:
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5).close()
    except OSError:
        return True
    return False


def test_a_second_sigterm_hurries(tmp_path: Path) -> None:
    with Proxy("--stale-session-dump-path", str(tmp_path), "--drain-seconds", "600") as proxy:
        _, key = proxy.start("t")
        assert proxy.chat(key).status == 200
        proxy.engine(request_latency_s=3600)
        threading.Thread(target=lambda: ignore_broken(proxy, key), daemon=True).start()
        wait_until(lambda: proxy.engine_stats()["in_flight"] == 1, "the engine has the request")
        proxy.terminate()
        wait_until(lambda: refuses(proxy), "it drains")
        proxy.terminate()
        assert proxy.wait() == 0, "the watchdog is far from the 600 s it had"
        assert [path.name for path in tmp_path.iterdir()] == ["t-0-active.json"]
        assert proxy.log("unfinished_requests=1 dumped_sessions=1")


def ignore_broken(proxy: Proxy, key: str) -> None:
    try:
        proxy.chat(key)
    except (OSError, http.client.HTTPException):
        pass


def test_a_guard_that_signals_the_whole_tree_is_hurried_for(tmp_path: Path) -> None:
    with Proxy("--stale-session-dump-path", str(tmp_path), "--drain-seconds", "600") as proxy:
        keys = [proxy.start(f"t{i}")[1] for i in range(20)]
        for key in keys:
            assert proxy.chat(key).status == 200
        proxy.engine(request_latency_s=3600)
        threading.Thread(target=lambda: ignore_broken(proxy, keys[0]), daemon=True).start()
        wait_until(lambda: proxy.engine_stats()["in_flight"] == 1, "the engine has the request")
        for pid in descendants(proxy.pid):
            os.kill(pid, signal.SIGTERM)
        proxy.terminate()
        assert proxy.wait() == 0, "the watchdog is far from the 600 s that it may take without haste"
        assert len(list(tmp_path.iterdir())) == 20
        assert proxy.log(r"stopped status=0 ")


def test_what_cannot_be_dumped_at_the_end_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.write_text("a file")
    with Proxy("--stale-session-dump-path", str(folder)) as proxy:
        _, key = proxy.start("t")
        assert proxy.chat(key).status == 200
        proxy.terminate()
        assert proxy.wait() == 0
        assert proxy.log("ERROR cleaner.* not_dumped session=t-0")
        assert proxy.log("stopped .*not_dumped_sessions=1")


def test_a_stop_during_the_start() -> None:
    proxy = Proxy(log_level="debug")
    try:
        wait_until(lambda: proxy.log("started role=worker-0"), "a worker has been started")
        proxy.terminate()
        assert proxy.wait() == 0
    finally:
        proxy.end()


def test_sigint_stops_too_and_without_a_dump_path_at_once() -> None:
    with Proxy(workers=1) as proxy:
        proxy.start("t")
        proxy.process.send_signal(signal.SIGINT)
        assert proxy.wait() == 0
        assert proxy.log("stopping by=SIGINT")


def test_the_admin_key_is_nowhere_to_be_seen() -> None:
    """Not in the command line of a child, not in its environment, not in the log."""
    with Proxy(workers=1, log_level="debug") as proxy:
        for pid in descendants(proxy.pid):
            assert ADMIN not in Path(f"/proc/{pid}/cmdline").read_text()
            assert ADMIN not in Path(f"/proc/{pid}/environ").read_text()
        assert not any(ADMIN in line for line in proxy.lines)
