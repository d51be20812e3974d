"""docs/client.md: its examples run as they stand, one after another, against the embedded engine."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import ADMIN, Proxy

pytest.importorskip("torch")
pytest.importorskip("openai")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "client.md"


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 6
    with Proxy() as proxy, warnings.catch_warnings():
        # sessions that an example leaves open for a later one are closed by nobody
        warnings.simplefilter("ignore", ResourceWarning)
        names: dict[str, Any] = {}
        for number, example in enumerate(examples):
            here = example.replace("http://localhost:8082", f"http://127.0.0.1:{proxy.port}")
            exec(
                compile(here.replace("areal-admin-key", ADMIN), f"client.md, example {number + 1}", "exec"),
                names,
            )
        assert proxy.ask("DELETE", "/data/clear", {"shard_ids": []}).json["num_tensors"] == 0
    said = capsys.readouterr().out
    for promised in ("torch.Size([2, ", "tensor([0.9000, 1.0000])", "{'map': 6}", "map float32 (512, 1024)"):
        assert promised in said
    assert "Set a reward first" in said and "exported and removed" in said


def test_every_error_stands_in_the_table() -> None:
    from areal_fast import client

    text = PAGE.read_text()
    errors = [
        name
        for name in client.__all__
        if isinstance(found := getattr(client, name), type) and issubclass(found, client.ClientError)
    ]
    bases = {"ProxyError", "Conflict"}
    assert [name for name in errors if f"`{name}`" not in text and name not in bases] == []
