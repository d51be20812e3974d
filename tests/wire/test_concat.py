"""Template concat and style concat against the original's own functions, on the same conversations."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from areal_env import ArealUnavailable, areal_python

from areal_fast.core import Arena
from areal_fast.store import SessionStore
from tests.unit.store.trees import EOS, play, scenario

pytestmark = [pytest.mark.areal, pytest.mark.timeout(600)]
REWARDS = {0: 1.0, 2: -0.5, 7: 2.0}
DISCOUNT = 0.5


@pytest.fixture(scope="session")
def areal() -> Path:
    try:
        return areal_python()
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")


@pytest.fixture
def store() -> Iterator[SessionStore]:
    with Arena.create(32 << 20, proc=0) as arena:
        yield SessionStore(arena)


def test_ours_are_the_originals(areal: Path, store: SessionStore, seed: int) -> None:
    conversations = [scenario(seed + number, 30) for number in range(20)]
    asked = [
        {"chats": [chat._asdict() for chat in chats], "rewards": REWARDS, "discount": DISCOUNT, "eos": EOS}
        for chats in conversations
    ]
    done = subprocess.run(
        [areal, "-W", "ignore", Path(__file__).parent / "areal_concat.py"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    originals: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for chats, original in zip(conversations, originals, strict=True):
        ours = play(store, chats, REWARDS, DISCOUNT)
        assert ours.prompts == original["prompts"]
        assert [str(i) for i in ours.leaves] == list(original["leaves"])
        for i, leaf in ours.leaves.items():
            theirs = original["leaves"][str(i)]
            assert leaf.keys() == theirs.keys()
            for name, values in leaf.items():
                assert values == theirs[name], (i, name)
