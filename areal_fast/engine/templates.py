"""Chat templates: messages and tools to the prompt's text, exactly as transformers renders them.

A chat template is a Jinja program that comes with a model, so it is code from a stranger: it runs in
Jinja's immutable sandbox, as transformers runs it, with the same extras (`raise_exception`, `strftime_now`,
`tojson` without HTML escaping, `dict`, guarded `namespace`, `{% generation %}` blocks, break and continue)
and the same variables (messages, tools, documents, add_generation_prompt, the named special tokens, then
the caller's own).

The engine is jinja2, not minijinja, by measurement (2 vCPU Ice Lake, Python 3.11, Qwen2.5 template, µs a
rendering):

    5 messages, 194 tokens:    jinja2 23.6   minijinja  6.3   jinja2 as here 12.8
    30 messages, 3.7k tokens:  jinja2 104    minijinja 30.9   jinja2 as here 37.0

What stock jinja2 loses is one raised AttributeError for each `message.role`; `SandboxEnvironment` looks into
plain dicts and lists first. The 6 µs that remain do not pay for a second implementation of Jinja, which
must agree with the first on every input: string methods, float formatting, truthiness and the texts of
errors.

Invariant: for the plain JSON values a request can hold, `SandboxEnvironment` resolves every name to what
jinja2's sandbox resolves it to. No template source is ever taken from a request. Source:
transformers.utils.chat_template_utils (behaviour); the wire page, "Template hf".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

_DICT_ATTRIBUTES = frozenset(dir(dict))
# a message's reasoning travels under three names; templates read the first (transformers fills it from the
# others)
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class TemplateFailed(ValueError):
    """The template refused the messages, or there is none. HTTP 400; str() is the detail, worded as
    transformers'."""


class SandboxEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a short way into plain JSON values; everything else goes the sandbox's way."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        # a plain dict has no attributes of its own beyond dict's, so the attribute lookup that jinja2 tries
        # first can only fail: go to the item at once
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict or type(obj) is list:
            try:
                return obj[argument]
            except (LookupError, TypeError):
                pass
        return super().getitem(obj, argument)


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training masks; here it is just
    its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it an instance variable)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a call block, because that is what gives the body the scope it has under transformers
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, without the type object itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no underscore names, so that none reaches into Python."""

    def __init__(
        *args: Any, **kwargs: Any
    ) -> None:  # no named self: `namespace(self=…)` is legal in a template
        self, *positional = args
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
            "Please rename the attribute."
        )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # json.dumps and not msgspec: its spaces after ':' and ',' are part of the prompt the model was trained on
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_Kind = TypeVar("_Kind", bound=SandboxEnvironment)


def prepared(kind: type[_Kind]) -> _Kind:
    """An environment of this kind with the extras that transformers gives to templates."""
    environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


def _with_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their reasoning under every name templates know. The same list if there is none."""
    for message in messages:
        if "reasoning_content" in message or "thinking" in message or "reasoning" in message:
            break
    else:
        return messages
    filled = []
    for message in messages:
        reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        filled.append(message)
    return filled


# apply_chat_template's own parameters, which a request may not set (except to "off")
_FIXED = frozenset({"messages", "conversation", "tools", "add_generation_prompt", "tokenize", "tokenizer"})
_UNSUPPORTED = frozenset(
    {
        "chat_template",
        "continue_final_message",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises TemplateFailed if `chat_template_kwargs` sets what the proxy decides (the original: a
    TypeError, 500)."""
    for name, value in kwargs.items():
        if name in _FIXED:
            raise TemplateFailed(
                "TypeError: transformers.tokenization_utils_base.PreTrainedTokenizerBase."
                f"apply_chat_template() got multiple values for keyword argument '{name}'"
            )
        if name in _UNSUPPORTED and value not in (None, False):
            raise TemplateFailed(f"chat_template_kwargs: '{name}' is not supported")


class ChatTemplate:
    """A tokenizer's chat template, compiled once; or several by name ("default", "tool_use", …)."""

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str],
        environment: SandboxEnvironment | None = None,
    ) -> None:
        """`special_tokens`: bos_token, eos_token… as the template sees them. Raises TemplateFailed if it
        won't compile."""
        self._source = source
        self._variables = dict(special_tokens)
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        self._single = isinstance(source, str)
        environment = environment or prepared(SandboxEnvironment)
        try:
            self._templates = {name: environment.from_string(text) for name, text in sources.items()}
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise TemplateFailed(f"the chat template does not compile: {error}") from error
        for template in self._templates.values():
            # jinja2's is a ChainMap, which every rendering walks twice; nothing is added to it here
            template.globals = dict(template.globals)

    def compiled_for(self, environment: SandboxEnvironment) -> ChatTemplate:
        """The same template in another environment."""
        return ChatTemplate(self._source, self._variables, environment)

    def pieces(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """What the template writes, piece by piece; joined, it is what `render` returns. Raises whatever the
        template raises."""
        variables = self._variables_for(messages, tools, kwargs)
        template = self._choose(tools)
        return list(template.root_render_func(template.new_context(variables)))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, the generation prompt included.

        `messages` must be without null members (ChatRequest sees to it); `tools` are JSON schemas; `kwargs`
        are the request's chat_template_kwargs. Raises TemplateFailed (400).
        """
        template = self._choose(tools)
        variables = self._variables_for(messages, tools, kwargs)
        try:
            return template.render(variables)
        except ValueError as error:
            raise TemplateFailed(str(error)) from error
        except Exception as error:  # the template's own errors, whatever they are, are answers to the client
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error

    def _variables_for(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        kwargs: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Raises TemplateFailed for kwargs that cannot be."""
        variables: dict[str, Any] = {**self._variables, "documents": None}
        if kwargs:
            check_template_kwargs(kwargs)
            variables.update(
                (k, v) for k, v in kwargs.items() if k not in _UNSUPPORTED and k != "return_dict"
            )
            _check_documents(variables["documents"])
        variables.update(messages=_with_reasoning(messages), tools=tools, add_generation_prompt=True)
        return variables

    def _choose(self, tools: Sequence[dict[str, Any]] | None) -> jinja2.Template:
        if not self._single and tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if self._templates:
            raise TemplateFailed(
                "This model has multiple chat templates with no default specified! "
                f"Available template names are {sorted(self._templates)}."
            )
        raise TemplateFailed("Cannot use chat template functions because tokenizer.chat_template is not set")


def _check_documents(documents: Any) -> None:
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(document, dict) for document in documents)
    ):
        raise TemplateFailed("TypeError: Documents should be a list of dicts with 'title' and 'text' keys!")
