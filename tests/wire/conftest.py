"""Fixtures of the wire tests: the Qwen vocabulary as a tokenizer folder, built once a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(scope="session")
def qwen_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import qwen_folder

    return qwen_folder.build(tmp_path_factory.getbasetemp() / "qwen")
