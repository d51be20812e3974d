"""The fake CUDA driver for tests: built once a run from tests/c/fakecuda.c, its counters in a file that every
process of a test maps. See the top of that file for what it refuses and how it is made to fail."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("c") / "fakecuda.c"
REAL = "libcuda.so.1"
FLAGS = (
    "-std=c11",
    "-O1",
    "-g",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Wshadow",
    "-Werror",
)


@functools.cache
def library() -> str:
    """Path of the built fake driver."""
    folder = tempfile.mkdtemp(prefix="areal-fast-fakecuda-")
    path = os.path.join(folder, "libfakecuda.so")
    subprocess.run([os.environ.get("CC", "cc"), *FLAGS, "-o", path, str(SOURCE)], check=True, timeout=110)
    return path


class _State(ctypes.Structure):
    _fields_ = (
        ("calls", ctypes.c_uint64),
        ("fail_at", ctypes.c_uint64),
        ("kill_at", ctypes.c_uint64),
        ("live", ctypes.c_int64),
        ("failed", ctypes.c_char * 48),
    )


class State:
    """`struct state` of the fake, shared with every process that loads it with FAKECUDA_STATE=path."""

    def __init__(self, path: Path) -> None:
        """Of an existing file, or of a new one."""
        self.path = path
        path.touch()
        with path.open("rb+") as file:
            file.truncate(mmap.PAGESIZE)
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.words = _State.from_buffer(self._map)

    @property
    def calls(self) -> int:
        """Driver calls so far, of all processes together."""
        return self.words.calls

    @property
    def live(self) -> int:
        """What was acquired and not given back. Means nothing once a process was killed."""
        return self.words.live

    @property
    def failed(self) -> str:
        """The entry point that was made to fail."""
        return self.words.failed.decode()

    def fail(self, nth: int) -> None:
        """Fail the nth call from now on (1: the next)."""
        self.words.failed = b""
        self.words.fail_at = self.words.calls + nth

    def kill(self, nth: int) -> None:
        """SIGKILL the process that makes the nth call from now on."""
        self.words.kill_at = self.words.calls + nth

    def disarm(self) -> None:
        self.words.fail_at = self.words.kill_at = 0
