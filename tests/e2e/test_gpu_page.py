"""docs/gpu.md: its examples run as they stand, on the fake driver, with its memory in the place of a CUDA
tensor's; its commands are there, and the one that needs no GPU runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from areal_fast.client import gpu as client_gpu
from areal_fast.shards import gpu, gpu_torch
from areal_fast.shards.devices import DeviceArray
from tests import fakecuda
from tests.devices import Gpus, held_bytes
from tests.e2e.running import ADMIN, ROOT
from tests.e2e.test_gpu import proxy

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "gpu.md").read_text()
DATA = bytes(range(200))


def test_the_examples_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    seen: list[bytes] = []
    # torch's tensors need a real GPU: DeviceArrays go through all else
    monkeypatch.setattr(client_gpu, "tensor_of", lambda array: array)
    monkeypatch.setattr(gpu_torch, "tensor_of", lambda array: array)
    monkeypatch.setattr(gpu_torch, "device_array", lambda tensor: tensor)
    monkeypatch.setattr(gpu_torch, "new_array", client_gpu.Gpus().room)
    monkeypatch.setattr(gpu.GpuClient.connect.__func__, "__defaults__", (fakecuda.library(),))  # type: ignore[attr-defined]
    monkeypatch.setattr(DeviceArray, "device", SimpleNamespace(type="cuda", index=0), raising=False)
    with Gpus(fakecuda.library()) as gpus, proxy() as running:
        names: dict[str, Any] = {
            "tensor": gpus.array("uint8", (len(DATA),), DATA),
            "torch": SimpleNamespace(cuda=SimpleNamespace(synchronize=lambda: None)),
            "use": lambda tensor: seen.append(held_bytes(tensor)),
        }
        for number, example in enumerate(examples):
            here = example.replace("http://localhost:8082", f"http://127.0.0.1:{running.port}")
            exec(
                compile(here.replace("areal-admin-key", ADMIN), f"gpu.md, example {number + 1}", "exec"),
                names,
            )
        assert held_bytes(names["other"]) == DATA
        names["client"].close()
    assert seen == [DATA] * 3
    assert capsys.readouterr().out == "gpu\n"


def test_the_commands_are_there() -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    commands = [line.partition("#")[0].split() for line in block.splitlines()]
    assert commands == [["make", "gpu"], ["python", "-m", "benchmarks", "gpu", "--fake"]]
    assert re.search(r"^gpu: build ##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = subprocess.run(
        [sys.executable, *commands[1][1:], "--rounds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    for promised in ("% of copy", "c.hold", '"pool_outlives_maker": "yes"'):
        assert promised in done.stdout, done.stdout
    assert "kept in" not in done.stdout


@pytest.mark.parametrize("name", re.findall(r"`(tests/\S+?\.py|benchmarks/\S+?\.py)`", PAGE))
def test_the_files_are_there(name: str) -> None:
    assert Path(ROOT, name).is_file()
