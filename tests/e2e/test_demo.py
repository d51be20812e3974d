"""The demo, smaller: it runs as a user runs it, its checks hold, it leaves dumps and a log and no process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("torch")

COMMAND = [sys.executable, "-m", "areal_fast", "demo"]


@pytest.mark.slow
def test_a_small_day(tmp_path: Path) -> None:
    folder = tmp_path / "day"
    done = subprocess.run(
        [
            *COMMAND,
            *("--agents", "5", "--seconds", "5", "--session-timeout-seconds", "5", "--folder", str(folder)),
            *("--seed", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    assert re.search(r"^All \d+ checks hold\.", done.stdout, re.MULTILINE)
    assert "FAILED" not in done.stdout and "\x1b" not in done.stdout
    assert "killed with SIGKILL" in done.stdout and "weights updated to version 1" in done.stdout
    served = re.search(r"served +([\d,]+) answers", done.stdout)
    assert served is not None and int(served[1].replace(",", "")) >= 20
    assert len(list((folder / "dumps").iterdir())) >= 4
    assert "admin" not in (folder / "proxy.log").read_text()
    pid = re.search(r"accident: worker (\d+) ", done.stdout)
    assert pid is not None and not Path(f"/proc/{pid[1]}").exists()


@pytest.mark.parametrize(
    "flags", [["--agents", "1"], ["--workers", "1"], ["--nothing"], ["--folder", os.sep]]
)
def test_a_bad_command_line_is_status_2(flags: list[str]) -> None:
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "error" in done.stderr and "Traceback" not in done.stderr


def test_a_proxy_that_cannot_start_is_said_in_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "not-a-folder"
    blocker.write_text("in the way")
    done = subprocess.run(
        [*COMMAND, "--folder", str(blocker / "day")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "FAILED" in done.stdout and "Traceback" not in done.stdout + done.stderr
