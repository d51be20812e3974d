"""The recorded exchanges with the original proxy, played against ours with two workers: one test a step.

A file is played once, by the first of its tests; each test then judges its own line, so that a failure
names the file, the line and the step. differences.py holds what is expected to differ, and why.
AREAL_FAST_TRANSCRIPTS names another folder of recordings to play; files that the tables do not know are
held to the recording alone.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from differences import PLANS, OutOfScope, Plan
from exchange import Names, Transcript, load
from proxy import ours
from replay import Replay
from standin import StandIn

FOLDER = Path(os.environ.get("AREAL_FAST_TRANSCRIPTS") or Path(__file__).parent / "transcripts")
FILES = sorted(FOLDER.glob("*.jsonl"))


class Encoder:
    """Text to ids with the test vocabulary, special tokens included."""

    def __init__(self, tokenizer_folder: Path):
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


@pytest.fixture(scope="session")
def encoder(qwen_tokenizer: Path) -> Encoder:
    return Encoder(qwen_tokenizer)


def flags_of(transcript: Transcript) -> list[str]:
    """The recorded flags, or the plan's."""
    plan = PLANS.get(transcript.stem, Plan())
    return list(plan.flags if plan.flags is not None else transcript.flags)


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory, qwen_tokenizer: Path, encoder: Encoder) -> Any:
    """verdicts(path) plays that file, once."""

    @functools.cache
    def play(path: Path) -> dict[int, list[str] | OutOfScope]:
        transcript = load(path)
        folder = tmp_path_factory.mktemp(transcript.stem)
        with StandIn() as engine, StandIn() as receiver:
            rig = Names({"RIG": str(folder), "127.0.0.1:9301": receiver.address})
            flags = [rig.rewrite(flag) for flag in flags_of(transcript)]
            backend = engine.url if transcript.backend else ""
            with ours(backend, qwen_tokenizer, flags) as proxy:
                return Replay(transcript, proxy.address, engine, receiver, encoder, folder).run()

    return play


def _cases() -> list[Any]:
    cases = []
    for path in FILES:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        polls = PLANS.get(path.stem, Plan()).repeats
        for number, (recorded, following) in enumerate(zip(lines, [*lines[1:], {}], strict=True)):
            if polls and recorded.get("name") == following.get("name") == polls:
                continue  # played as one poll, the last
            if recorded["kind"] in ("step", "observation"):
                cases.append(pytest.param(path, number, id=f"{path.stem}:{number}:{recorded['name'][:60]}"))
    return cases


@pytest.mark.parametrize(("path", "line"), _cases())
def test_step(path: Path, line: int, verdicts: Any) -> None:
    verdict = verdicts(path).get(line)
    if isinstance(verdict, OutOfScope):
        pytest.skip(verdict.why)
    assert verdict is not None, "the step was not played"
    assert not verdict, "\n".join(verdict)
