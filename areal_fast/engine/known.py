"""Chats whose messages were mostly seen before: from the body's bytes to the prompt's ids, without reading,
rendering or encoding what is known.

A conversation is sent again and again with a little more at its end. Here its messages are found in the body
as bytes (csrc/messages.c) and looked up by a keyed digest; only those that are new are parsed. The
template's skeleton for this sequence of roles (skeletons.py) says what stands around the contents. Since
special tokens cut a text into pieces that are encoded by themselves (segments.py), a message's ids depend on
its content and on the text between it and the next special tokens, its `_Context`; so they are kept with the
message, and the prompt is a join.

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
HfTokenizer.prompt makes of them. One thread, the loop's. Bounded in bytes: messages, and plans.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from areal_fast.core._messages import KnownMessages, Message, Plan
from areal_fast.engine.segments import Prompt, SegmentEncoder
from areal_fast.engine.skeletons import Check, Guard, Skeleton, Tracer, answer
from areal_fast.engine.templates import ChatTemplate
from areal_fast.protocol.chat import MESSAGES_TAKEN, BadChat, ChatRequest, decode_chat

_MAX_ROLES = 64
_MAX_ROLE_CHARS = 64
_MAX_MESSAGES = 512  # of a chat that is taken
_MAX_PLAN_BYTES = 4 << 20  # of all plans and what they share, about
_PLAN_BYTES_A_MESSAGE = 64
_PLAN_BYTES_A_TOOL_BYTE = 8  # key, literals as text and ids
_MAX_QUESTIONS = 60  # different ones: they are bits
_MAX_SKELETONS_A_SHAPE = 8
_HOPELESS = 64  # shapes without a skeleton, and none with one: the template has none


class _Context(NamedTuple):
    """What stands around a content, up to the special token that ends its segment (none: the text's end)."""

    before: str
    after: str
    until: str
    trim: bool


_message_decoder = msgspec.json.Decoder(dict[str, Any])
_encode = msgspec.json.Encoder().encode


class KnownChats:
    """For one tokenizer's template and segments. `work` bounds what is encoded at once, in segments'
    measure."""

    def __init__(
        self, template: ChatTemplate, segments: SegmentEncoder, work: int, *, limit_bytes: int
    ) -> None:
        self._segments = segments
        self._work = work
        self._cut: re.Pattern[str] | None = segments.cut if _none_within_another(segments.tokens) else None
        self._tracer = Tracer(template)
        self._messages = KnownMessages(limit_bytes)
        self._roles: dict[str, int] = {}
        self._role_names: list[str] = []
        self._template = template
        self._shapes: dict[tuple[bytes, bytes], list[Plan] | None] = {}
        self._plan_bytes = 0
        self._contexts: dict[_Context, _Context] = {}
        self._literals: dict[str, bytes] = {}
        self._questions: list[tuple[Check, str]] = []
        self._found_any = False

    def take(self, body: bytes) -> tuple[ChatRequest, Prompt] | None:
        """The chat in `body`, its messages taken out, and their prompt; see above."""
        if self._cut is None:
            return None
        found = self._messages.find(body)
        if found is None:
            return None
        messages, unknown, start, stop = found
        fresh: dict[int, str] = {}
        if len(messages) > _MAX_MESSAGES:
            return None
        for place in unknown:
            new = self._read(body, place)
            if new is None:
                return None
            messages[place], fresh[place] = new
        known: list[Message] = messages  # type: ignore[assignment]
        try:
            chat = decode_chat(b"%b%b%b" % (body[:start], MESSAGES_TAKEN, body[stop:]))
        except BadChat:
            return None
        if chat.template_kwargs or (plan := self._plan(body, known, chat.tools)) is None:
            return None
        work = self._work
        while isinstance(prompt := plan.prompt(known), int):
            content = fresh.get(prompt)
            ids, cost = self._encoded(
                plan.contexts[prompt], self._content(body, prompt) if content is None else content, work
            )
            if ids is None:
                return None
            self._messages.add(body, prompt, known[prompt], plan.contexts[prompt], ids)
            work -= cost
        return chat, Prompt(prompt)

    def _raw(self, body: bytes, place: int) -> bytes:
        start, stop = self._messages.place(place)
        return body[start:stop]

    def _content(self, body: bytes, place: int) -> str:
        """Of a message that was read before."""
        content: str = _message_decoder.decode(self._raw(body, place))["content"]
        return content

    def _read(self, body: bytes, place: int) -> tuple[Message, str] | None:
        """A message that is not known, and its content. None: it is not of this kind, or cannot be read."""
        try:
            fields = _message_decoder.decode(self._raw(body, place))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        given = {name: value for name, value in fields.items() if value is not None}
        role, content = given.get("role"), given.get("content")
        if len(given) != 2 or not isinstance(role, str) or not isinstance(content, str):
            return None
        number = self._roles.get(role)
        if number is None:
            if len(self._role_names) == _MAX_ROLES or len(role) > _MAX_ROLE_CHARS:
                return None
            number = self._roles[role] = len(self._role_names)
            self._role_names.append(role)
        message = Message(number)
        self._answer(message, content)
        return message, content

    def _answer(self, message: Message, content: str) -> None:
        """Every question so far."""
        answers = 0
        for bit, (check, text) in enumerate(self._questions):
            answers |= answer(content, check, text) << bit
        message.asked, message.answers = (1 << len(self._questions)) - 1, answers

    def _encoded(self, context: object, content: str, work: int) -> tuple[bytes | None, int]:
        """The ids of a content in its context, and how much work that was. No ids: it would be more than
        `work`, or the content is not cut off as it should be; the general way must be gone."""
        assert isinstance(context, _Context) and self._cut is not None
        shown = content.strip() if context.trim else content
        segment = f"{context.before}{shown}{context.after}"
        parts = self._cut.split(segment + context.until)
        if parts != ([segment, context.until, ""] if context.until else [segment]):
            return None, 0
        return self._segments.segment_within(segment, work) or (None, 0)

    # -- plans: skeletons with their literals encoded
    # ---------------------------------------------------------------------------------------------

    def _plan(self, body: bytes, messages: list[Message], tools: list[dict[str, Any]] | None) -> Plan | None:
        """The plan for these roles and tools whose guards these messages meet."""
        roles = self._messages.roles(messages)
        shape = roles, b"" if tools is None else _encode(tools)
        plans = self._shapes.get(shape, ())
        if plans is None:
            return None
        for plan in plans:
            while (place := plan.fits(messages)) is not None and place >= 0:
                self._answer(messages[place], self._content(body, place))
            if place is None:
                return plan
        if len(plans) >= _MAX_SKELETONS_A_SHAPE:
            return None
        new = self._traced(body, roles, tools)
        self._plan_bytes += _PLAN_BYTES_A_MESSAGE * len(roles) + _PLAN_BYTES_A_TOOL_BYTE * len(shape[1])
        if self._plan_bytes > _MAX_PLAN_BYTES:
            self._forget()
        if new is None:
            self._shapes[shape] = None
            if not self._found_any and len(self._shapes) >= _HOPELESS:
                self._cut = None
            return None
        self._found_any = True
        self._shapes[shape] = [*plans, new]
        return new

    def _forget(self) -> None:
        """Every plan, and what they share. What messages have in contexts that are gone is encoded anew."""
        self._shapes.clear()
        self._contexts.clear()
        self._literals.clear()
        self._plan_bytes = 0

    def _traced(self, body: bytes, roles: bytes, tools: list[dict[str, Any]] | None) -> Plan | None:
        names = [self._role_names[role] for role in roles]
        contents = [self._content(body, place) for place in range(len(roles))]
        skeleton = self._tracer.trace(names, contents, tools)
        if skeleton is None:
            return None
        said = [{"role": role, "content": content} for role, content in zip(names, contents, strict=True)]
        if skeleton.text(contents) != self._template.render(said, tools):
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
            context = _Context(cut[i][-1], following[0], until, trim)
            contexts.append(self._contexts.setdefault(context, context))
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
