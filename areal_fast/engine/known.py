"""Chats whose messages were mostly seen before: from the body's bytes to the prompt's ids, without reading,
rendering or encoding what is known.

A conversation is sent again and again with a little more at its end. Here its messages are found in the body
as bytes (csrc/messages.c) and looked up by a keyed digest; only those that are new are parsed. What stands
around them, the request's parameters, repeats too, and is looked up in the same way. The template's skeleton
for this sequence of roles (skeletons.py) says what stands around the contents. Since special tokens cut a
text into pieces that are encoded by themselves (segments.py), a message's ids depend on its content and on
the text between it and the next special tokens, its Context; so they are kept with the message, and the
prompt is a join. All that happens to what is known is in core/_messages.pyx; here is what has to be thought
about once.

The digests are keyed by what nobody outside knows and nothing shows, so bodies cannot be made to be taken for
others (csrc/messages.h).

That is done for messages of a role and a content, both text, for templates that have skeletons and
tokenizers that have segments, and where every message's segment is cut off as the skeleton says, which is
checked for each: a content that spells a special token, alone or together with its surroundings, is none of
these. For everything else `take` says None, and the chat goes the general way; so it does where new text is
too long for the loop.

Why a message's check is enough for the whole text: the scanner takes the leftmost special token, then the
longest. No special token lies within another (or this is off), so none that begins before or at the one that
ends a message can reach beyond it: what is cut up to there depends on the text up to there. By induction
from the beginning, whole texts are cut as their parts are.

Invariant: `take(body)` is None, or decode_chat(body) but for its messages, and the prompt that
HfTokenizer.prompt makes of them. The request is shared by all bodies that differ in messages only: nobody
may change it. One thread, the loop's. Bounded in bytes: messages, parameters, and plans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from areal_fast.core._messages import Context, KnownMessages, Message, Plan, Rest
from areal_fast.engine.segments import Prompt, SegmentEncoder
from areal_fast.engine.skeletons import Check, Guard, Skeleton, Tracer, answer
from areal_fast.engine.templates import ChatTemplate
from areal_fast.protocol.chat import MESSAGES_TAKEN, BadChat, ChatRequest, decode_chat

_MAX_PLAN_BYTES = 4 << 20  # of all plans and what they share, about
_PLAN_BYTES_A_MESSAGE = 64
_PLAN_BYTES_A_SHAPE = 300
_PLAN_BYTES_A_TOOL_BYTE = 8  # key, literals as text and ids
_MAX_QUESTIONS = 60  # different ones: they are bits
_MAX_SKELETONS_A_SHAPE = 8
_HOPELESS = 64  # shapes without a skeleton, and none with one: the template has none

_message_decoder = msgspec.json.Decoder(dict[str, Any])
_encode = msgspec.json.Encoder().encode


class KnownChats:
    """For one tokenizer's template and segments. `work` bounds what is encoded at once, in segments' measure.

    The methods without underscore, but for `take`, are what core/_messages.pyi calls a Maker."""

    def __init__(
        self, template: ChatTemplate, segments: SegmentEncoder, work: int, *, limit_bytes: int
    ) -> None:
        self._segments = segments
        self._work = work
        self._cut: re.Pattern[str] | None = segments.cut if _none_within_another(segments.tokens) else None
        self._tracer = Tracer(template)
        self._template = template
        self._plans: dict[bytes, dict[bytes, list[Plan] | None]] = {}  # by tools and kwargs, then by roles
        self._plan_bytes = 0
        self._contexts: dict[tuple[str, str, str, bool], Context] = {}
        self._literals: dict[str, bytes] = {}
        self._questions: list[tuple[Check, str]] = []
        self._hopes = _HOPELESS
        self.encode = segments.segment_within
        starts = "".join({token[0]: None for token in segments.tokens})
        self._messages = KnownMessages(limit_bytes, self, starts)

    def take(self, body: bytes) -> tuple[ChatRequest, Prompt] | None:
        """The chat in `body`, its messages taken out, and their prompt; see above."""
        if self._cut is None:
            return None
        taken = self._messages.take(body, self._work)
        return None if taken is None else (taken[0], Prompt(taken[1]))

    # -- what is new

    def rest(self, before: bytes, after: bytes) -> Rest | None:
        """Of a body without its messages. None: the general way must say what is wrong with it."""
        try:
            chat = decode_chat(b"%b%b%b" % (before, MESSAGES_TAKEN, after))
            kwargs = chat.template_kwargs
            shape = b"" if chat.tools is None and not kwargs else _encode((chat.tools, kwargs))
        except (BadChat, OverflowError, RecursionError):
            return None
        plans = self._plans.get(shape)
        if plans is None:
            self._count(_PLAN_BYTES_A_SHAPE + _PLAN_BYTES_A_TOOL_BYTE * len(shape))
            plans = self._plans[shape] = {}
        return Rest(chat, plans)

    def read(self, text: bytes) -> tuple[str, str] | None:
        """Role and content of a message. None: it is not of this kind, or cannot be read."""
        try:
            fields = _message_decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        given = {name: value for name, value in fields.items() if value is not None}
        role, content = given.get("role"), given.get("content")
        if len(given) != 2 or not isinstance(role, str) or not isinstance(content, str):
            return None
        return role, content

    def answer(self, message: Message, content: str) -> None:
        """Every question so far."""
        answers = 0
        for bit, (check, text) in enumerate(self._questions):
            answers |= answer(content, check, text) << bit
        message.asked, message.answers = (1 << len(self._questions)) - 1, answers

    def is_cut(self, segment: str, until: str) -> bool:
        """Does `until` cut `segment` + `until` there, and nothing before?"""
        assert self._cut is not None
        parts = self._cut.split(segment + until)
        return parts == ([segment, until, ""] if until else [segment])

    # -- plans: skeletons with their literals encoded
    # ---------------------------------------------------------------------------------------------

    def plan(self, rest: Rest, roles: bytes, names: list[str], contents: list[str]) -> Plan | None:
        """A new plan for these messages, kept for others like them. None: there is none."""
        plans = rest.plans.get(roles) or []
        if len(plans) >= _MAX_SKELETONS_A_SHAPE:
            return None
        chat: ChatRequest = rest.chat
        new = self._traced(names, contents, chat.tools, chat.template_kwargs)
        self._count(_PLAN_BYTES_A_MESSAGE * len(roles))
        if new is None:
            rest.plans[roles] = None
            self._hopes -= 1
            if self._hopes == 0:
                self._cut = None
            return None
        self._hopes = -1
        rest.plans[roles] = [*plans, new]
        return new

    def _count(self, size: int) -> None:
        """So much more is kept. If that is too much, every plan goes, and what they share; what messages
        have in contexts that are gone is encoded anew."""
        self._plan_bytes += size
        if self._plan_bytes <= _MAX_PLAN_BYTES:
            return
        self._plan_bytes = size
        self._plans.clear()  # rests hold these dictionaries, too
        self._messages.forget_rests()
        self._contexts.clear()
        self._literals.clear()

    def _traced(
        self,
        roles: list[str],
        contents: list[str],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> Plan | None:
        skeleton = self._tracer.trace(roles, contents, tools, kwargs)
        if skeleton is None:
            return None
        said = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        if skeleton.text(contents) != self._template.render(said, tools, kwargs):
            return None  # never: a second look at the one claim that all rests on
        return self._lay(skeleton)

    def _lay(self, skeleton: Skeleton) -> Plan | None:
        """The skeleton's literals cut at special tokens and encoded. None: they do not keep contents apart,
        or are too much work, or guards are too many."""
        assert self._cut is not None
        cut = [self._cut.split(literal) for literal in skeleton.literals]
        if any(len(parts) < 3 for parts in cut[1:-1]):
            return None
        guards = self._guards(skeleton.guards)
        fixed = ["".join(cut[0][:-1]), *("".join(parts[1:-1]) for parts in cut[1:-1]), "".join(cut[-1][1:])]
        literals = list(map(self._literal, fixed))
        if guards is None or None in literals:
            return None
        contexts = []
        for i, trim in enumerate(skeleton.trimmed):
            following = cut[i + 1]
            until = following[1] if len(following) > 1 else ""
            key = cut[i][-1], following[0], until, trim
            context = self._contexts.get(key)
            if context is None:
                context = self._contexts[key] = Context(*key)
            contexts.append(context)
        return Plan(tuple(contexts), tuple(ids for ids in literals if ids is not None), guards)

    def _literal(self, text: str) -> bytes | None:
        known = self._literals.get(text)
        if known is None:
            prompt = self._segments.encode_within(text, self._work)
            if prompt is None:
                return None
            known = self._literals[text] = prompt.data
        return known

    def _guards(self, guards: tuple[Guard, ...]) -> tuple[tuple[int, int, int], ...] | None:
        """A plan's guards, one a message."""
        found: dict[int, tuple[int, int]] = {}
        for index, check, text, holds in guards:
            question = check, text
            if question not in self._questions:
                if len(self._questions) == _MAX_QUESTIONS:
                    return None
                self._questions.append(question)
            bit = 1 << self._questions.index(question)
            asked, answers = found.get(index, (0, 0))
            found[index] = asked | bit, answers | (bit if holds else 0)
        return tuple((index, *bits) for index, bits in found.items())


def _none_within_another(tokens: list[str]) -> bool:
    return not any(a is not b and a in b for a in tokens for b in tokens)
