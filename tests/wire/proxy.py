"""Starts a proxy, ours or AReaL's, on a free loopback port and stops it again: for tests and benchmarks.

Ours runs as `python -m areal_fast` of the interpreter that runs the tests; the original as `python -m
areal.experimental.inference_service.data_proxy` of `.venv-areal`. What a process writes goes to a file,
whose end is quoted when it does not come up or exits badly. Only processes started here are signalled.
"""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import areal_env

CHECKOUT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 30.0
ORIGINAL = "areal.experimental.inference_service.data_proxy"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server process. `address` is HOST:PORT."""

    def __init__(self, command: Sequence[str | Path], port: int, *, ready_path: str = "/health"):
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"
        # lives as long as the server, closed by stop()
        self._log = tempfile.NamedTemporaryFile("w+", prefix="areal_fast-test-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
            # compiled files are allowed: AReaL's imports are slow without
            env=areal_env.environment(PYTHONUNBUFFERED="1"),
        )
        try:
            self._wait(ready_path)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]

    def _wait(self, path: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"exited {self.process.returncode} at the start:\n{self.output()}")
            connection = http.client.HTTPConnection(self.address, timeout=5)
            try:
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.05)
            finally:
                connection.close()
        raise RuntimeError(f"not ready within {START_TIMEOUT_S:g} s:\n{self.output()}")

    def stop(self) -> int:
        """SIGTERM and wait; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(
                f"did not stop within {STOP_TIMEOUT_S:g} s of SIGTERM:\n{self.output()}"
            ) from None
        finally:
            self._log.close()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)


def _flags(port: int, backend: str, tokenizer: str | Path) -> list[str]:
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    return [*listen, "--backend-addr", backend, "--tokenizer-path", str(tokenizer)]


@contextlib.contextmanager
def ours(
    backend: str,
    tokenizer: str | Path,
    flags: Sequence[str] = (),
    *,
    workers: int = 2,
    python: str = sys.executable,
) -> Iterator[Server]:
    """`python -m areal_fast`, up and answering."""
    port = free_port()
    command = [
        python,
        "-m",
        "areal_fast",
        *_flags(port, backend, tokenizer),
        "--workers",
        str(workers),
        *flags,
    ]
    server = Server(command, port)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def original(
    areal_python: Path, backend: str, tokenizer: str | Path, flags: Sequence[str] = ()
) -> Iterator[Server]:
    """AReaL's own data proxy, from the environment that areal_env builds."""
    port = free_port()
    server = Server(
        [areal_python, "-W", "ignore", "-m", ORIGINAL, *_flags(port, backend, tokenizer), *flags], port
    )
    try:
        yield server
    finally:
        server.stop()
