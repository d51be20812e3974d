"""Writes anew what SGLang's own parsers say to the texts of sglang_calls.jsonl.

    pip download --no-deps sglang==0.5.10.post1 && unzip -d SGLANG sglang-*.whl   # what areal 1.0.4 asks for
    pip install pydantic orjson partial-json-parser
    python tests/unit/engine/record_sglang.py SGLANG

Of SGLang only the detectors are run: the modules above them, which want torch and CUDA, are replaced by the
few names that the detectors import. What is reasoning is decided as in
areal.experimental.openai.tool_call_parser.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.unit.engine.test_tools import SGLANG_CALLS, TOOLS

_PACKAGES = (
    "sglang",
    "sglang.srt",
    "sglang.srt.function_call",
    "sglang.srt.parser",
    "sglang.srt.entrypoints",
    "sglang.srt.entrypoints.openai",
    "sglang.srt.debug_utils",
)


class _Named(types.SimpleNamespace):
    """Stands for SGLang's request models: members, unset ones None."""

    def __getattr__(self, name: str) -> None:
        return None


def _stub(folder: Path) -> None:
    """Packages without their __init__, and the modules that would import the engine."""
    for name in _PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.modules["sglang.srt.debug_utils.cuda_coredump"] = types.ModuleType("cuda_coredump")
    protocol = types.ModuleType("sglang.srt.entrypoints.openai.protocol")
    protocol.__getattr__ = lambda name: _Named  # type: ignore[method-assign]
    sys.modules[protocol.__name__] = protocol


def say(text: str, parser: str, reasoning: str) -> tuple[str, list[list[str]]]:
    """(content, [[name, arguments]…]) as AReaL with SGLang answers."""
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    tools: list[Any] = [
        _Named(type=tool["type"], function=_Named(**tool["function"]), model_dump=lambda tool=tool: tool)
        for tool in TOOLS
    ]
    calls, tags = FunctionCallParser(tools, parser), ReasoningParser(reasoning).detector
    thought, rest = "", text
    if tags.think_start_token in text:
        plain = text.replace(tags.think_start_token, "")
        inside, end, rest = plain.partition(tags.think_end_token)
        thought = tags.think_start_token + inside + end
    if not calls.has_tool_call(rest):
        return text, []
    try:
        content, found = calls.parse_non_stream(rest)
    except Exception:
        return text, []
    return thought + content, [[call.name, call.parameters] for call in found]


def main() -> None:
    _stub(Path(sys.argv[1]).resolve())
    lines = [json.loads(line) for line in SGLANG_CALLS.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["content"], line["calls"] = say(line["text"], line["sglang"], line["reasoning"])
    SGLANG_CALLS.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
