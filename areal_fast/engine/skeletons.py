"""What a chat template writes around the contents of messages: found by running it on contents it cannot
look into.

Most templates copy a message's content and never look at it. Then the prompt's text is a skeleton of constant
pieces with holes, the same for all conversations of the same shape (roles in order, tools, template kwargs),
and whoever knows the skeleton need not run the template. `Tracer.trace` finds it by running the template
itself, once a shape, with a `_Hole` in place of each content.

A hole is no str. It can be written out, added to text, and asked what every text answers alike (is it a
string, is it defined…). Everything else that Python or Jinja can do with an object goes through its type's
methods, all of which raise `Observed`, a BaseException that no template and nothing in Jinja catches. So a
trace that ends has not learned anything about a content, and the same program with other contents takes the
same way: the skeleton holds for them all. What else could make two renderings differ (the time, random
choices) raises Observed, too.

Some templates do look, in one way: is the content empty, does it begin with, end with or contain a constant
(Qwen3: `</think>`)? Then the hole answers for the content it stands for, and the answer is a condition of
the skeleton (`Guard`). And some write the content without the blanks around it (Llama 3, Gemma): a hole can
be trimmed.

Not only contents: a message's other texts (tool calls' names and arguments) are holes, too, which a template
may leave out or write as JSON; what is not text (which members there are) belongs to the shape (`Form`).

A template that does more than that has no skeletons, and is rendered as ever. Invariant: for messages of a
skeleton's shape that meet its guards, `text` is what ChatTemplate.render returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jinja2
import jinja2.compiler
import jinja2.nodes
import msgspec

from areal_fast.engine.templates import ChatTemplate, SandboxEnvironment, prepared, tojson

Check = Literal["startswith", "endswith", "contains", "nonempty"]
Way = Literal["text", "trim", "json"]
MAX_GUARDS = 4096


class Guard(NamedTuple):
    """A condition on text `slot` of message `place`: does it start with, end with, contain `text`? Is it
    nonempty?"""

    place: int
    slot: int
    check: Check
    text: str
    holds: bool


class Slot(NamedTuple):
    """Where one of a message's texts stands in it. `is_object`: it is the JSON text of an object, and the
    template gets the object."""

    number: int
    is_object: bool = False


class Form(NamedTuple):
    """A message without its texts: dictionaries, lists and constants, with Slots numbered from 0."""

    members: dict[str, Any]

    def filled(self, values: Sequence[Any]) -> dict[str, Any]:
        """The message with these values in its slots."""
        filled: dict[str, Any] = _filled(self.members, values)
        return filled

    def said(self, texts: Sequence[str]) -> dict[str, Any]:
        """The message as templates get it."""
        slots = self.slots()
        return self.filled([_value(slot, text) for slot, text in zip(slots, texts, strict=True)])

    @property
    def is_plain(self) -> bool:
        """A role, then a content, both text?"""
        return list(self.members) == ["role", "content"] and type(self.members["content"]) is Slot

    def slots(self) -> list[Slot]:
        """In the order of their numbers."""
        return sorted(_slots(self.members))


def plain(role: str) -> Form:
    """Of a message of a role and then a content."""
    return Form({"role": role, "content": Slot(0)})


def _filled(value: Any, values: Sequence[Any]) -> Any:
    if type(value) is Slot:
        return values[value.number]
    if type(value) is dict:
        return {name: _filled(each, values) for name, each in value.items()}
    return [_filled(each, values) for each in value] if type(value) is list else value


def _slots(value: Any) -> list[Slot]:
    if type(value) is Slot:
        return [value]
    inner = value.values() if type(value) is dict else value if type(value) is list else ()
    return [slot for each in inner for slot in _slots(each)]


def _value(slot: Slot, text: str) -> Any:
    return msgspec.json.decode(text) if slot.is_object else text


class Written(NamedTuple):
    """How a text stands in the prompt: as it is, without the blanks around it, or by the filter tojson."""

    slot: Slot
    way: Way

    def shown(self, text: str) -> str:
        """Raises what json.dumps raises."""
        if self.way == "json":
            return tojson(_value(self.slot, text))
        return text.strip() if self.way == "trim" else text


class Skeleton(NamedTuple):
    """`literals[i]` stands before the i-th text that is written, the last one behind all. `written`: of each
    the message's place, and how. The texts of a message are together, messages are in order, and none writes
    nothing."""

    literals: tuple[str, ...]
    written: tuple[tuple[int, Written], ...]
    guards: tuple[Guard, ...]

    def text(self, texts: Sequence[Sequence[str]]) -> str:
        """The prompt's text; `texts` of each message."""
        shown = [how.shown(texts[place][how.slot.number]) for place, how in self.written]
        return "".join(
            [*(x for pair in zip(self.literals, shown, strict=False) for x in pair), self.literals[-1]]
        )


class Observed(BaseException):
    """The template looked at what it must not know. Not an Exception: nothing on the way may catch it."""


def answer(content: str, check: Check, text: str) -> bool:
    """What a content says to a guard's question."""
    if check == "startswith":
        return content.startswith(text)
    if check == "endswith":
        return content.endswith(text)
    return text in content if check == "contains" else bool(content)


def _observed(*_args: Any, **_kwargs: Any) -> Any:
    raise Observed


class _Hole:
    """Stands for a text; see above. Its fields are read by `_field` alone."""

    __slots__ = ("content", "guards", "how", "index")

    def __init__(self, index: int, how: Written, content: str, guards: list[Guard]) -> None:
        for name, value in (("index", index), ("how", how), ("content", content), ("guards", guards)):
            object.__setattr__(self, name, value)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":  # isinstance asks: no, it is nothing that Jinja knows
            return _Hole
        raise Observed

    def __add__(self, other: Any) -> _Text:
        return _Text([self, other])

    def __radd__(self, other: Any) -> _Text:
        return _Text([other, self])

    def __contains__(self, text: Any) -> bool:
        return _guarded(self, "contains", text)

    def __bool__(self) -> bool:
        return _guarded(self, "nonempty", "")


class _Text:
    """Text with holes, which can only be written out or added to."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: Iterable[Any]) -> None:
        flat: list[Any] = []
        for piece in pieces:
            if type(piece) is _Text:
                flat += cast("list[Any]", _field(piece, "pieces"))
            elif type(piece) is str or (type(piece) is _Hole and not _is_object(piece)):
                flat.append(piece)
            else:
                raise Observed  # text + number and the like is an error, which rendering reports
        object.__setattr__(self, "pieces", flat)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return _Text
        raise Observed

    def __add__(self, other: Any) -> _Text:
        return _Text([self, other])

    def __radd__(self, other: Any) -> _Text:
        return _Text([other, self])


# everything else that an object can be asked by its type
_ASKED = """
lt le eq ne gt ge hash str repr format bytes len length_hint getitem setitem delitem missing iter next
reversed sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or rsub rmul rmatmul rtruediv
rfloordiv rmod rdivmod rpow rlshift rrshift rand rxor ror iadd isub imul imatmul itruediv ifloordiv imod ipow
ilshift irshift iand ixor ior neg pos abs invert complex int float index round trunc floor ceil call enter
exit await aiter anext fspath copy deepcopy reduce reduce_ex getstate sizeof setattr delattr dir get set
delete instancecheck subclasscheck html
"""
for _name in _ASKED.split():
    for _type in (_Hole, _Text):
        setattr(_type, f"__{_name}__", _observed)
for _name in ("__contains__", "__bool__"):
    setattr(_Text, _name, _observed)


def _field(opaque: _Hole | _Text, name: str) -> Any:
    return object.__getattribute__(opaque, name)


def _is_object(hole: _Hole) -> bool:
    how: Written = _field(hole, "how")
    return how.slot.is_object and how.way != "json"


def _is_opaque(value: Any) -> bool:
    return type(value) is _Hole or type(value) is _Text


def _guarded(hole: _Hole, check: Check, text: Any) -> bool:
    guards: list[Guard] = _field(hole, "guards")
    how: Written = _field(hole, "how")
    if type(text) is not str or how.way != "text" or how.slot.is_object or len(guards) >= MAX_GUARDS:
        raise Observed
    holds = answer(_field(hole, "content"), check, text)
    guards.append(Guard(_field(hole, "index"), how.slot.number, check, text, holds))
    return holds


# what every str answers alike, and every dict
_TESTS = {
    "defined": True, "undefined": False, "none": False, "string": True, "mapping": False, "iterable": True,
    "sequence": True, "number": False, "integer": False, "float": False, "boolean": False, "true": False,
    "false": False, "callable": False,
}  # fmt: skip
_OBJECT_TESTS = {**_TESTS, "string": False, "mapping": True}


class _Generator(jinja2.compiler.CodeGenerator):
    """Writes values out by `environment.spell`, so that holes come out as they are."""

    def _output_child_pre(self, node: jinja2.nodes.Expr, frame: jinja2.compiler.Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.spell(")

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat(map(environment.spell, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write(")))")


class _Environment(SandboxEnvironment):
    """The sandbox that templates are rendered in, for contents that are holes."""

    code_generator_class = _Generator

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, test in list(self.tests.items()):
            self.tests[name] = _test(name, test)

    def forbid(self) -> None:
        """Once filters and globals are all there: those that holes may not meet, and what is not
        repeatable."""
        for name, filter in list(self.filters.items()):
            if name == "trim":
                self.filters[name] = _trim
            elif name == "tojson":
                self.filters[name] = _json
            elif name not in ("default", "d"):
                self.filters[name] = _observed if name == "random" else _unseen(filter)
        self.globals.update(strftime_now=_observed, lipsum=_observed)

    @staticmethod
    def spell(value: Any) -> Any:
        return value if _is_opaque(value) else str(value)

    @staticmethod
    def concat(pieces: Iterable[Any]) -> Any:
        listed = list(pieces)
        return _Text(listed) if any(map(_is_opaque, listed)) else "".join(listed)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is _Hole and attribute in ("startswith", "endswith", "strip"):
            return _Question(obj, attribute)
        return super().getattr(obj, attribute)


class _Question:
    """`content.startswith`, `content.endswith`, `content.strip`, to be called."""

    def __init__(self, hole: _Hole, name: str) -> None:
        self._hole = hole
        self._name = name

    def __call__(self, *args: Any) -> Any:
        if self._name == "strip":
            return _trim(self._hole, *args)
        if len(args) != 1:
            raise Observed
        return _guarded(self._hole, cast(Check, self._name), args[0])

    __str__ = __repr__ = __format__ = __eq__ = __hash__ = _observed


def _trim(value: Any, *chars: Any) -> Any:
    if type(value) is str:
        return value.strip(*chars)
    if chars:
        raise Observed
    return _shown(value, "trim")


def _json(value: Any, *args: Any, **kwargs: Any) -> Any:
    if not _is_opaque(value):
        return _unseen(tojson)(value, *args, **kwargs)
    if args or kwargs:
        raise Observed
    return _shown(value, "json")


def _shown(value: Any, way: Way) -> _Hole:
    """A hole in another way."""
    if type(value) is not _Hole:
        raise Observed
    how: Written = _field(value, "how")
    if how.way not in ("text", way) or way == how.way == "json" or (how.slot.is_object and way != "json"):
        raise Observed
    return _Hole(
        _field(value, "index"), Written(how.slot, way), _field(value, "content"), _field(value, "guards")
    )


def _passing(function: Any, wrapper: Any) -> Any:
    """Jinja's marks (wants the context, the environment…) carried over."""
    if hasattr(function, "jinja_pass_arg"):
        wrapper.jinja_pass_arg = function.jinja_pass_arg
    return wrapper


def _unseen(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(map(_is_opaque, args)) or any(map(_is_opaque, kwargs.values())):
            raise Observed
        return function(*args, **kwargs)

    return _passing(function, call)


def _test(name: str, function: Any) -> Any:
    unseen = _unseen(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and _is_opaque(args[0]) and name in _TESTS:
            is_object = type(args[0]) is _Hole and _is_object(args[0])
            return (_OBJECT_TESTS if is_object else _TESTS)[name]
        return unseen(*args, **kwargs)

    return _passing(function, call)


class Tracer:
    """Finds the skeletons of one ChatTemplate."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template: ChatTemplate | None
        try:
            self._template = template.compiled_for(_traced_environment())
        except Observed:  # constants are computed when it is compiled
            self._template = None

    def trace(
        self,
        forms: Sequence[Form],
        texts: Sequence[Sequence[str]],
        tools: Sequence[dict[str, Any]] | None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Skeleton | None:
        """The skeleton of messages of these forms, tools and template kwargs that holds for these texts of
        each, among others; None: the template is not of this kind, or refuses them."""
        if self._template is None:
            return None
        guards: list[Guard] = []
        messages = [
            form.filled(
                [
                    _Hole(place, Written(slot, "text"), text, guards)
                    for slot, text in zip(form.slots(), said, strict=True)
                ]
            )
            for place, (form, said) in enumerate(zip(forms, texts, strict=True))
        ]
        try:
            pieces = _field(_Text(self._template.pieces(messages, tools, kwargs)), "pieces")
        except Observed:
            return None
        except Exception:  # whatever the template says against these messages, rendering will say it
            return None
        literals, written = [""], []
        for piece in pieces:
            if type(piece) is str:
                literals[-1] += piece
            else:
                written.append((_field(piece, "index"), _field(piece, "how")))
                literals.append("")
        places = [place for place, _ in written]
        if places != sorted(places) or set(places) != set(range(len(forms))):
            return None  # a message left out, or taken apart
        if len({(place, how.slot) for place, how in written}) != len(written):
            return None  # twice: what for?
        return Skeleton(tuple(literals), tuple(written), tuple(dict.fromkeys(guards)))


def _traced_environment() -> _Environment:
    environment = prepared(_Environment)
    environment.forbid()
    return environment
