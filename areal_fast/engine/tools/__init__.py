"""Tool calls and reasoning in a model's text: which parser a flag names, and a stream for one answer.

`ToolParsing` is made once a worker from --tool-call-parser and --reasoning-parser; `stream` gives the
object that reads one answer, for requests that are `wanted`: those with tools, unless tool_choice is
"none". Parsers are small state machines of our own; nothing heavy is imported unless a flag says
`sglang:NAME` or `vllm:NAME` (installed.py).

Reasoning stays in content; it is only hidden from the tool parser. It begins at its tag, or at once if the
prompt already ended with the tag, as templates of thinking models do.
Source: the wire page, "Tools".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from areal_fast.engine.tools.bare import Llama3, Mistral
from areal_fast.engine.tools.installed import ParserMissing, Whole, WholeStream, load
from areal_fast.engine.tools.stream import CallStream, Format
from areal_fast.engine.tools.tagged import DeepSeekV3, DeepSeekV31, GptOss, Hermes, KimiK2, Qwen
from areal_fast.engine.tools.values import Call, Tools, new_call_id
from areal_fast.engine.tools.xml import Glm45, Qwen3Coder

__all__ = ["Call", "CallStream", "ParserMissing", "ToolParsing", "WholeStream", "new_call_id"]

FORMATS: Final[dict[str, type[Format]]] = {
    "qwen": Qwen,
    "qwen25": Qwen,
    "qwen3": Qwen,
    "qwen3_coder": Qwen3Coder,
    "qwen3_xml": Qwen3Coder,
    "hermes": Hermes,
    "llama3": Llama3,
    "llama3_json": Llama3,
    "mistral": Mistral,
    "deepseek_v3": DeepSeekV3,
    "deepseekv3": DeepSeekV3,
    "deepseek_v31": DeepSeekV31,
    "deepseekv31": DeepSeekV31,
    "glm": Glm45,
    "glm45": Glm45,
    "glm47": Glm45,
    "kimi_k2": KimiK2,
    "gpt-oss": GptOss,
    "openai": GptOss,
}
"""By the names that SGLang, and where it differs vLLM, give them."""

_THINK: Final = ("<think>", "</think>")
REASONING: Final[dict[str, tuple[str, str]]] = {
    "qwen3": _THINK,
    "qwen3-thinking": _THINK,
    "deepseek-r1": _THINK,
    "deepseek_r1": _THINK,
    "deepseek-v3": _THINK,
    "deepseek_v3": _THINK,
    "glm45": _THINK,
    "kimi_k2": _THINK,
    "minimax": _THINK,
    "step3": _THINK,
    "interns1": _THINK,
    "kimi": ("◁think▷", "◁/think▷"),
    "mistral": ("[THINK]", "[/THINK]"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|>"),
    "openai_gptoss": ("<|channel|>analysis<|message|>", "<|end|>"),
}
OFF: Final = ("", "none")


class ToolParsing:
    """The parsers a worker uses."""

    def __init__(self, tool_parser: str, reasoning_parser: str, *, tokenizer_path: str = "") -> None:
        """The flags' values. "none" and "" switch off. Raises ParserMissing with one line."""
        self._format: type[Format] | None = None
        self._whole: Whole | None = None
        kind, _, name = tool_parser.partition(":")
        if kind in ("sglang", "vllm") and name:
            self._whole = load(kind, name, tokenizer_path)
        elif tool_parser not in OFF:
            if tool_parser not in FORMATS:
                raise ParserMissing(
                    f"--tool-call-parser: no parser {tool_parser!r}; there are {', '.join(FORMATS)}, none, "
                    "sglang:NAME and vllm:NAME"
                )
            self._format = FORMATS[tool_parser]
        if reasoning_parser not in OFF and reasoning_parser not in REASONING:
            raise ParserMissing(
                f"--reasoning-parser: no parser {reasoning_parser!r}; there are {', '.join(REASONING)} "
                "and none"
            )
        self.reasoning = REASONING.get(reasoning_parser)
        self.ends_calls = self._format is not None and self._format.ends_calls
        """May an answer with calls end with a token that is neither eos nor pad?"""

    def wanted(self, tools: Sequence[Mapping[str, Any]] | None, tool_choice: Any) -> bool:
        """Is an answer to such a request parsed?"""
        parses = self._format is not None or self._whole is not None
        return parses and bool(tools) and tool_choice != "none"

    def stream(self, tools: Sequence[Mapping[str, Any]], *, prompt_end: str = "") -> CallStream | WholeStream:
        """For one answer. `prompt_end`: the last text of the prompt, some ten tokens."""
        inside = self.reasoning is not None and prompt_end.rstrip().endswith(self.reasoning[0])
        if self._whole is not None:
            return WholeStream(self._whole, tools, self.reasoning, starts_inside=inside)
        assert self._format is not None
        return CallStream(self._format(Tools(tools)), self.reasoning, starts_inside=inside)
