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

A template that does more than that has no skeletons, and is rendered as ever. Invariant: for messages of a
skeleton's shape that meet its guards, `text(contents)` is what ChatTemplate.render returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jinja2
import jinja2.compiler
import jinja2.nodes

from areal_fast.engine.templates import ChatTemplate, SandboxEnvironment, prepared

Check = Literal["startswith", "endswith", "contains", "nonempty"]
MAX_GUARDS = 4096


class Guard(NamedTuple):
    """A condition on the content of message `place`: does it start with, end with, contain `text`? Is it
    nonempty?"""

    place: int
    check: Check
    text: str
    holds: bool


class Skeleton(NamedTuple):
    """`literals[i]` stands before the i-th content, the last one behind all. `trimmed[i]`: it stands there
    without the blanks around it. Contents are those of all messages in order."""

    literals: tuple[str, ...]
    trimmed: tuple[bool, ...]
    guards: tuple[Guard, ...]

    def text(self, contents: Sequence[str]) -> str:
        """The prompt's text."""
        shown = [c.strip() if trim else c for c, trim in zip(contents, self.trimmed, strict=True)]
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
    """Stands for a content; see above. Its fields are read by `_field` alone."""

    __slots__ = ("content", "guards", "index", "trim")

    def __init__(self, index: int, content: str, guards: list[Guard], trim: bool = False) -> None:
        for name, value in (("index", index), ("content", content), ("guards", guards), ("trim", trim)):
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
            elif type(piece) is str or type(piece) is _Hole:
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


def _is_opaque(value: Any) -> bool:
    return type(value) is _Hole or type(value) is _Text


def _guarded(hole: _Hole, check: Check, text: Any) -> bool:
    guards: list[Guard] = _field(hole, "guards")
    if type(text) is not str or _field(hole, "trim") or len(guards) >= MAX_GUARDS:
        raise Observed
    holds = answer(_field(hole, "content"), check, text)
    guards.append(Guard(_field(hole, "index"), check, text, holds))
    return holds


# what every str answers alike
_TESTS = {
    "defined": True, "undefined": False, "none": False, "string": True, "mapping": False, "iterable": True,
    "sequence": True, "number": False, "integer": False, "float": False, "boolean": False, "true": False,
    "false": False, "callable": False,
}  # fmt: skip


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
    if type(value) is not _Hole or chars:
        raise Observed
    return _Hole(_field(value, "index"), _field(value, "content"), _field(value, "guards"), True)


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
            return _TESTS[name]
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
        roles: Sequence[str],
        contents: Sequence[str],
        tools: Sequence[dict[str, Any]] | None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Skeleton | None:
        """The skeleton of messages {role, content}, these tools and template kwargs that holds for these
        contents, among others; None: the template is not of this kind, or refuses them."""
        if self._template is None:
            return None
        guards: list[Guard] = []
        messages: list[dict[str, Any]] = [
            {"role": role, "content": _Hole(i, content, guards)}
            for i, (role, content) in enumerate(zip(roles, contents, strict=True))
        ]
        try:
            pieces = _field(_Text(self._template.pieces(messages, tools, kwargs)), "pieces")
        except Observed:
            return None
        except Exception:  # whatever the template says against these messages, rendering will say it
            return None
        literals, trimmed, written = [""], [], []
        for piece in pieces:
            if type(piece) is str:
                literals[-1] += piece
            else:
                written.append(_field(piece, "index"))
                trimmed.append(_field(piece, "trim"))
                literals.append("")
        if written != list(range(len(roles))):
            return None  # a content left out, twice or elsewhere
        return Skeleton(tuple(literals), tuple(trimmed), tuple(dict.fromkeys(guards)))


def _traced_environment() -> _Environment:
    environment = prepared(_Environment)
    environment.forbid()
    return environment
