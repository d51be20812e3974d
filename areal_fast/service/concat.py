"""A chat under the concat template: its place in the conversation tree, and the prompt that follows from it.

The rules are protocol/concat.py's. A chat that is not recorded has no parent and its prompt is the template's
own. `stop` is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from areal_fast.engine.segments import Prompt
from areal_fast.protocol.chat import BadChat
from areal_fast.protocol.concat import ROOT, answer_message, continued, follow, prefix_hashes

if TYPE_CHECKING:
    from areal_fast.engine.answer import Piece
    from areal_fast.engine.tokenizer import Tokenizer
    from areal_fast.protocol.chat import ChatRequest
    from areal_fast.store import Turn


class Line:
    """One chat's line through the tree. Made at once after begin_turn: the parent belongs to that place."""

    def __init__(self, chat: ChatRequest, turn: Turn | None) -> None:
        chat.stop = None
        self._turn = turn if turn is not None and turn.ordinal >= 0 else None
        self._last = ROOT
        if self._turn is not None:
            prefixes = prefix_hashes(chat.messages, chat.images)
            self._last = prefixes[-1]
            self._turn.follow(prefixes)

    def prompt(self, whole: Prompt, tokenizer: Tokenizer) -> Prompt:
        """The chat's prompt, from the templated whole conversation. BadChat (400)."""
        parent = self._turn.parent if self._turn is not None else None
        if parent is None:
            return whole
        if tokenizer.eos_id is None:
            raise BadChat("The tokenizer has no eos token, which the concat template needs.")
        ids = np.frombuffer(whole.data, np.int32)
        return Prompt.of(
            continued(
                parent.ids, parent.prompt_len, parent.stop_reason, ids, tokenizer.eos_id, tokenizer.stop_ids
            )
        )

    def messages_hash(self, pieces: Iterable[Piece]) -> bytes:
        """The conversation with this answer, for the record; nothing for what is not recorded."""
        if self._turn is None:
            return b""
        said = list(pieces)
        calls = [(call.id, call.name, call.arguments) for piece in said for call in piece.calls]
        return follow(self._last, answer_message("".join(piece.content for piece in said), calls))
