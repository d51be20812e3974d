"""Everything between a chat request and the inference engine: tokens, budgets, generation, replies.

chat (protocol.chat) → tokenizer.prompt → sampling.sampling_from_chat → generate.Engine.generate →
answer (detokenize, tools) → reply. Nothing here knows sessions, the arena or HTTP statuses of our own API
beyond those named in docstrings.
"""

from areal_fast.engine.answer import Answer, Piece, StreamedAnswer, ToolCall, whole_answer
from areal_fast.engine.detokenize import ContentStream, OutputRejected, visible_output
from areal_fast.engine.errors import EngineError, EngineFault, EngineTimeout, EngineUnreachable
from areal_fast.engine.generate import Engine, EngineState, Generation, VersionRun
from areal_fast.engine.reply import DONE, Chunks, completion, error_event, new_interaction_id
from areal_fast.engine.sampling import Sampling, sampling_from_chat
from areal_fast.engine.segments import Prompt
from areal_fast.engine.tokenizer import TemplateFailed, Tokenizer, TokenizerError, load_tokenizer
from areal_fast.engine.tools import ParserMissing, ToolParsing

__all__ = [
    "DONE",
    "Answer",
    "Chunks",
    "ContentStream",
    "Engine",
    "EngineError",
    "EngineFault",
    "EngineState",
    "EngineTimeout",
    "EngineUnreachable",
    "Generation",
    "OutputRejected",
    "ParserMissing",
    "Piece",
    "Prompt",
    "Sampling",
    "StreamedAnswer",
    "TemplateFailed",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "ToolParsing",
    "VersionRun",
    "completion",
    "error_event",
    "load_tokenizer",
    "new_interaction_id",
    "sampling_from_chat",
    "visible_output",
    "whole_answer",
]
