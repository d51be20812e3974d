"""Builds and finds the virtual environment in which the released AReaL runs.

AReaL itself is never imported by this project or by its tests: it wants its own versions of transformers
and friends, so its data proxy, gateway, router and client run as separate processes of `.venv-areal`, at
the checkout's root. The environment is built once from requirements-areal.txt (`pip install --no-deps`) and
reused while the digest of that file and of the interpreter's version stays the same: the digest is written
last, so a build that was killed is simply built again. A file lock makes concurrent test runs wait for one
build.

    python tests/wire/areal_env.py        # build if needed, print the interpreter's path

AREAL_FAST_AREAL_VENV names another place for the environment. Its processes are given `environment()`:
without compiled files on disk, importing AReaL takes 19 s of CPU instead of 8, and a test starts it ten
times.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements-areal.txt"
CHECKOUT = HERE.parents[1]
BUILD_TIMEOUT_S = 1200


class ArealUnavailable(RuntimeError):
    """The environment could not be built; the text says why."""


def _digest() -> str:
    seen = hashlib.sha256(REQUIREMENTS.read_bytes())
    seen.update(f"{sys.version_info[:2]} {sysconfig.get_platform()}".encode())
    return seen.hexdigest()


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        [str(part) for part in command], env=environment(), capture_output=True, text=True,
        timeout=BUILD_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ArealUnavailable(f"{command[0]} … exited {done.returncode}: {last}")


def areal_python() -> Path:
    """The interpreter of an environment that holds areal 1.0.4, built now if there is none.

    Raises ArealUnavailable when it cannot be built (no network, no disk, another platform).
    """
    root = Path(os.environ.get("AREAL_FAST_AREAL_VENV") or CHECKOUT / ".venv-areal")
    python = root / "bin" / "python"
    stamp = root / "built-from.sha256"
    root.mkdir(parents=True, exist_ok=True)
    with open(REQUIREMENTS) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == _digest() and python.exists():
            return python
        shutil.rmtree(root)
        try:
            _run(sys.executable, "-m", "venv", root)
            _run(
                python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                "--no-compile", "--requirement", REQUIREMENTS,
            )  # fmt: skip
            _run(python, "-W", "ignore", "-c", "import areal.infra.rpc.rtensor")
        except (OSError, subprocess.TimeoutExpired) as failure:
            raise ArealUnavailable(str(failure)) from failure
        stamp.write_text(_digest())
    return python


def environment(**more: str) -> dict[str, str]:
    """This process's environment, in which Python may keep what it compiled; and `more`."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | more


def beside(areal: Path, folder: Path, *pth: Path) -> Path:
    """The interpreter of a new environment in `folder` where AReaL and this checkout are installed together,
    as a user has them; with the given .pth files."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (theirs,) = areal.parents[1].glob("lib/python3*/site-packages")
    (packages / "__beside.pth").write_text(f"{theirs}\n{CHECKOUT}\n")  # read in the order of their names
    for file in pth:
        shutil.copy(file, packages)
    return folder / "bin" / "python"


if __name__ == "__main__":
    print(areal_python())
