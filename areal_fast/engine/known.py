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

That is done for messages of a role and a content, both text, and for tool calls and their results (`_form`),
for templates that have skeletons and tokenizers that have segments, and where every message's segment is cut
off as the skeleton says, which is checked for each: a content that spells a special token, alone or together
with its surroundings, is none of these. For everything else `take` says None, and the chat goes the general
way; so it does where new text is too long for the loop.

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
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from areal_fast.core._messages import Context, KnownMessages, Message, Plan, Rest
from areal_fast.engine.segments import Prompt, SegmentEncoder
from areal_fast.engine.skeletons import Check, Form, Guard, Skeleton, Slot, Tracer, Written, answer, plain
from areal_fast.engine.templates import ChatTemplate
from areal_fast.protocol.chat import (
    MESSAGES_TAKEN,
    BadChat,
    ChatRequest,
    as_object,
    decode_chat,
    without_nulls,
)

_MAX_PLAN_BYTES = 4 << 20  # of all plans and what they share, about
_PLAN_BYTES_A_MESSAGE = 128
_PLAN_BYTES_A_SHAPE = 300
_PLAN_BYTES_A_LITERAL = 300  # or a context, beside its texts
_MAX_QUESTIONS = 60  # different ones: they are bits
_MAX_QUESTION = 1024  # characters: a template's own are short, others come from a request
_MAX_SKELETONS_A_SHAPE = 8
# a plan costs as much as two renderings or three, and saves one each time it is used again: where, after so
# many, they were not used so often each, a shape has to come twice
_PLANS_ON_TRUST = 64
_USES_THAT_PAY = 2
_HOPELESS_FORM = 16  # shapes without a skeleton that a form was in, and none with one
_HOPELESS = 64  # shapes without a skeleton, and none with one: the template has none

_TEXTS = frozenset({"content", "name", "tool_call_id", "reasoning_content"})
_MAX_CALLS = 16

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
        self._contexts: dict[tuple[str, str, str, bool, Any], Context] = {}
        self._literals: dict[str, bytes] = {}
        self._questions: list[tuple[int, Check, str]] = []
        self._plans_made = self._plans_used = 0
        self._hopes = _HOPELESS
        self._form_hopes: dict[str | bytes, int] = {}  # -1: it was in a skeleton
        self.encode = segments.segment_within
        self.object_arguments = False
        """Do templates get tool calls' arguments as objects (protocol.chat.with_object_arguments)? To be set
        before the first `take`."""
        starts = "".join({token[0]: None for token in segments.tokens})
        self._messages = KnownMessages(limit_bytes, self, starts)

    def take(self, body: bytes) -> tuple[ChatRequest, Prompt] | None:
        """The chat in `body`, its messages taken out, and their prompt; see above."""
        if self._cut is None:
            return None
        made = self._plans_made
        taken = self._messages.take(body, self._work)
        if taken is None:
            return None
        self._plans_used += made == self._plans_made
        return taken[0], Prompt(taken[1])

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
            self._count(_PLAN_BYTES_A_SHAPE + len(shape))
            plans = self._plans[shape] = {}
        return Rest(chat, plans)

    def read(self, text: bytes) -> tuple[str | bytes, str | tuple[str, ...]] | None:
        """Form and content of a message. None: it is not of this kind, or cannot be read."""
        try:
            fields = without_nulls(_message_decoder.decode(text))
            role, content = fields.get("role"), fields.get("content")
            if list(fields) == ["role", "content"] and isinstance(role, str) and isinstance(content, str):
                return role, content
            texts: list[str] = []
            members = _form(fields, texts, self.object_arguments)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, _OtherForm):
            return None
        return _encode(members), tuple(texts)

    def answer(self, message: Message, content: str | tuple[str, ...]) -> None:
        """Every question so far."""
        texts = (content,) if isinstance(content, str) else content
        answers = 0
        for bit, (slot, check, text) in enumerate(self._questions):
            if slot < len(texts):
                answers |= answer(texts[slot], check, text) << bit
        message.asked, message.answers = (1 << len(self._questions)) - 1, answers

    def is_cut(self, segment: str, until: str) -> bool:
        """Does `until` cut `segment` + `until` there, and nothing before?"""
        assert self._cut is not None
        parts = self._cut.split(segment + until)
        return parts == ([segment, until, ""] if until else [segment])

    def encode_parts(
        self, context: Context, content: str | tuple[str, ...], work: int
    ) -> tuple[bytes, int] | None:
        """The ids of a message's texts with what stands between and around them, and how much work that was.
        None: more than `work`, or other special tokens are in it than the template's."""
        assert self._cut is not None
        texts = (content,) if isinstance(content, str) else content
        parts = [context.before]
        try:
            for how, following in context.inner:
                parts[-1] += how.shown(texts[how.slot.number])
                inside = self._cut.split(following)
                parts[-1] += inside[0]
                parts += inside[1:]
        except (ValueError, RecursionError):
            return None
        parts[-1] += context.after
        until = context.until
        if self._cut.split("".join(parts) + until) != (parts + [until, ""] if until else parts):
            return None
        found, left = [], work
        for part in filter(None, parts):
            new = self.encode(part, left)
            if new is None:
                return None
            found.append(new[0])
            left -= new[1]
        return b"".join(found), work - left

    # -- plans: skeletons with their literals encoded
    # ---------------------------------------------------------------------------------------------

    def plan(
        self, rest: Rest, forms: bytes, names: list[str | bytes], contents: list[str | tuple[str, ...]]
    ) -> Plan | None:
        """A new plan for these messages, kept for others like them. None: there is none, or not yet."""
        plans = rest.plans.get(forms)
        if plans is None:
            plans = []
            if self._plans_made >= max(_PLANS_ON_TRUST, self._plans_used // _USES_THAT_PAY):
                self._count(_PLAN_BYTES_A_MESSAGE * len(forms))
                rest.plans[forms] = plans
                return None
        if len(plans) >= _MAX_SKELETONS_A_SHAPE:
            return None
        new = None
        if all(self._form_hopes.get(name, _HOPELESS_FORM) for name in names):
            self._plans_made += 1
            chat: ChatRequest = rest.chat
            known = [plain(name) if isinstance(name, str) else _known_form(name) for name in names]
            texts = [(content,) if isinstance(content, str) else content for content in contents]
            new = self._traced(known, texts, chat.tools, chat.template_kwargs)
            for name in set(names):
                left = self._form_hopes.get(name, _HOPELESS_FORM)
                self._form_hopes[name] = -1 if new is not None else max(left - 1, min(left, 0))
        self._count(_PLAN_BYTES_A_MESSAGE * len(forms))
        if new is None:
            # other texts in these forms had one, and may have it again; what was tried in vain takes a place
            rest.plans[forms] = [*plans, plans[-1]] if plans else None
            self._hopes -= 1
            if self._hopes == 0:
                self._cut = None
            return None
        self._hopes = -1
        rest.plans[forms] = [*plans, new]
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
        forms: list[Form],
        texts: list[tuple[str, ...]],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> Plan | None:
        skeleton = self._tracer.trace(forms, texts, tools, kwargs)
        if skeleton is None:
            return None
        said = [form.said(each) for form, each in zip(forms, texts, strict=True)]
        try:
            if skeleton.text(texts) != self._template.render(said, tools, kwargs):
                return None  # never: a second look at the one claim that all rests on
        except (ValueError, RecursionError):
            return None
        return self._lay(skeleton, forms)

    def _lay(self, skeleton: Skeleton, forms: list[Form]) -> Plan | None:
        """The skeleton's literals cut at special tokens and encoded. None: they do not keep messages apart,
        or are too much work, or guards are too many."""
        assert self._cut is not None
        # of each message what is written, and what follows that before the message's next; between messages
        # the literals that keep them apart
        inner: list[list[tuple[Written, str]]] = [[] for _ in forms]
        outer = [skeleton.literals[0]]
        for (place, how), following in zip(skeleton.written, skeleton.literals[1:], strict=True):
            if inner[place]:
                inner[place][-1] = inner[place][-1][0], outer.pop()
            inner[place].append((how, ""))
            outer.append(following)
        cut = [self._cut.split(literal) for literal in outer]
        if any(len(parts) < 3 for parts in cut[1:-1]):
            return None
        guards = self._guards(skeleton.guards)
        fixed = ["".join(cut[0][:-1]), *("".join(parts[1:-1]) for parts in cut[1:-1]), "".join(cut[-1][1:])]
        literals = list(map(self._literal, fixed))
        if guards is None or None in literals:
            return None
        contexts = []
        for i, form in enumerate(forms):
            behind = cut[i + 1]
            until = behind[1] if len(behind) > 1 else ""
            how = inner[i][0][0]
            is_plain = form.is_plain and how.way != "json"
            key = cut[i][-1], behind[0], until, how.way == "trim", None if is_plain else tuple(inner[i])
            context = self._contexts.get(key)
            if context is None:
                context = self._contexts[key] = Context(*key)
                self._plan_bytes += _PLAN_BYTES_A_LITERAL + sum(map(sys.getsizeof, key[:3]))
                self._plan_bytes += sum(_PLAN_BYTES_A_LITERAL + sys.getsizeof(text) for _, text in inner[i])
            contexts.append(context)
        return Plan(tuple(contexts), tuple(ids for ids in literals if ids is not None), guards)

    def _literal(self, text: str) -> bytes | None:
        known = self._literals.get(text)
        if known is None:
            prompt = self._segments.encode_within(text, self._work)
            if prompt is None:
                return None
            known = self._literals[text] = prompt.data
            self._plan_bytes += _PLAN_BYTES_A_LITERAL + sys.getsizeof(text) + len(known)  # plan() looks at it
        return known

    def _guards(self, guards: tuple[Guard, ...]) -> tuple[tuple[int, int, int], ...] | None:
        """A plan's guards, one a message."""
        found: dict[int, tuple[int, int]] = {}
        for index, slot, check, text, holds in guards:
            question = slot, check, text
            if question not in self._questions:
                if len(self._questions) == _MAX_QUESTIONS or len(text) > _MAX_QUESTION:
                    return None
                self._questions.append(question)
            bit = 1 << self._questions.index(question)
            asked, answers = found.get(index, (0, 0))
            found[index] = asked | bit, answers | (bit if holds else 0)
        return tuple((index, *bits) for index, bits in found.items())


def _none_within_another(tokens: list[str]) -> bool:
    known = set(tokens)  # there may be thousands: parts are looked up, not all compared with all
    return not any(
        token[start:stop] in known
        for token in known
        for start in range(len(token))
        for stop in range(start + 1, len(token) + 1)
        if stop - start < len(token)
    )


class _OtherForm(Exception):
    """A message is not of the kind that is taken."""


def _form(fields: dict[str, Any], texts: list[str], objects: bool) -> dict[str, Any]:
    """What `fields`, a message, have beside their texts, as JSON that a Form can be made of: a number stands
    for a text, which goes into `texts`; and in a list by itself for the JSON text of an object. Raises
    _OtherForm."""
    members: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "role" and isinstance(value, str):
            members[name] = value
        elif name in _TEXTS and isinstance(value, str):
            members[name] = _slot(value, texts)
        elif name == "tool_calls" and isinstance(value, list) and 0 < len(value) <= _MAX_CALLS:
            members[name] = [_call(call, texts, objects) for call in value]
        else:
            raise _OtherForm
    if "role" not in members:
        raise _OtherForm
    return members


def _call(call: Any, texts: list[str], objects: bool) -> dict[str, Any]:
    members: dict[str, Any] = {}
    if not isinstance(call, dict):
        raise _OtherForm
    for name, value in call.items():
        if name == "type" and value == "function":
            members[name] = value
        elif name == "id" and isinstance(value, str):
            members[name] = _slot(value, texts)
        elif name == "function" and isinstance(value, dict) and value.keys() == {"name", "arguments"}:
            members[name] = {each: _slot(said, texts) for each, said in value.items()}
            if objects and as_object(value["arguments"]) is not None:
                members[name]["arguments"] = [members[name]["arguments"]]
        else:
            raise _OtherForm
    return members


def _slot(value: Any, texts: list[str]) -> int:
    if not isinstance(value, str):
        raise _OtherForm
    texts.append(value)
    return len(texts) - 1


def _known_form(name: bytes) -> Form:
    """Of what `_form` made, as JSON."""

    def slots(value: Any) -> Any:
        if isinstance(value, int):
            return Slot(value)
        if isinstance(value, list):
            return Slot(value[0], is_object=True) if type(value[0]) is int else list(map(slots, value))
        return {each: slots(inner) for each, inner in value.items()} if isinstance(value, dict) else value

    return Form(slots(msgspec.json.decode(name)))
