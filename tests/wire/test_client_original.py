"""The client before AReaL 1.0.4's own data proxy: the same calls, the same tensors as before
ours, as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import qwen_folder  # noqa: E402
from areal_env import ArealUnavailable, areal_python  # noqa: E402
from proxy import original, ours  # noqa: E402
from standin import StandIn  # noqa: E402

from areal_fast.client import Client, ShardsNotFound, Unauthorized  # noqa: E402

torch = pytest.importorskip("torch")
pytest.importorskip("openai")
pytestmark = [pytest.mark.areal, pytest.mark.timeout(600)]


def life(url: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A session's batch, and the ways that its tensors came."""
    with Client(url, "areal-admin-key") as client:
        with client.start_session("the same task") as session:
            chat = session.openai()
            for text in ("one", "two ünï"):
                messages: Any = [{"role": "user", "content": text}]
                chat.chat.completions.create(model="default", messages=messages, max_tokens=12)
            assert session.set_reward(0.5).interaction_count == 2
        batch = client.export(session, discount=0.5)
        with pytest.raises(ShardsNotFound):
            client.get(batch.references["rewards"])
        with pytest.raises(Unauthorized):
            session.set_reward(1.0)
        value = torch.randn(3, 4)
        assert torch.equal(client.get(client.put(value, "mine")).tensor, value)
        assert client.delete(["mine"]) == 1
        client.set_version(4)
        assert client.get_version() == 4
        return batch.batch, batch.ways


def test_the_original_proxy_is_served_too(tmp_path: Path) -> None:
    try:
        areal = areal_python()
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")
    tokenizer = qwen_folder.build(tmp_path / "qwen")
    with StandIn() as engine:
        with original(areal, engine.url, tokenizer) as proxy:
            theirs, ways = life(proxy.url)
        with ours(engine.url, tokenizer) as proxy:
            mine, _ = life(proxy.url)
    assert ways == {"json": len(theirs)}
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
