"""The body of POST /chat/completions: decoded, checked, with the texts the original answers to what is wrong.

`decode_chat` reads the body into a ChatRequest in one typed pass. Only when that fails is the body read
again, loosely, to find out what the original would have said; so a good request pays for none of it.

Rules (wire page, "Chat"): null means absent. Unknown members are ignored. Messages lose their null members,
at every depth. Every refusal here is a 400 whose detail has the original's text, where the original had one
(it answered 500); the texts that name Python types are the original's too.

Pure: no I/O, no clock, and it knows neither tokenizer nor engine; the token budget is engine/sampling.py.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import msgspec

INVALID_JSON = "Invalid JSON body"
_NOT_ITERABLE = "TypeError: messages must be provided as an iterable of dictionaries or BaseModel instances."
_NO_MESSAGES = (
    "TypeError: AsyncCompletionsWithReward.create() missing 1 required keyword-only argument: 'messages'"
)
_BAD_TOOL = (
    "Tools should either be a JSON schema, or a callable function with type hints and a docstring "
    "suitable for auto-conversion to a schema."
)
_LONE_SURROGATE = (
    "TypeError: TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]"
)
_BOTH_BUDGETS = (
    "max_tokens and max_completion_tokens cannot be set at the same time. "
    "max_tokens has been deprecated. Please use max_completion_tokens instead. "
    "To set the total max tokens, please use max_total_tokens instead."
)
_NOT_ONE = "NotImplementedError: n != 1 is not supported yet"
_NO_IMAGE_URL = (
    "image_url content part has an empty or missing URL. "
    "Provide a valid data URI or HTTP(S) URL in image_url.url."
)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TOO_DEEP = "messages are nested too deeply"
_DATA_URI = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,(.+)\Z", re.DOTALL)


class BadChat(ValueError):
    """The request cannot be served as it is: HTTP 400, str() is the detail."""


class ChatRequest(msgspec.Struct, kw_only=True, gc=False):
    """What the proxy reads of a chat request. After `decode_chat`, None means "not given" everywhere."""

    messages: list[dict[str, Any]]
    """Without null members; image parts as templates want them (`{"type": "image"}`)."""
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: float | None = None
    max_completion_tokens: float | None = None
    max_total_tokens: float | None = None
    stop: str | list[str] | None = None
    frequency_penalty: float | None = None
    n: float | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: Any = None
    logprobs: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    extra_body: dict[str, Any] | None = None
    areal_cache: Any = msgspec.UNSET
    images: list[str] | None = None
    """Base64 data or URL of each image in the messages, in order. Never read from the body."""
    vision_messages: list[dict[str, Any]] | None = None
    """If there are images: the messages with their image_url parts. Never read from the body."""
    sampled: Any = None
    """The Sampling last made of it (engine/sampling.py), of which it is not changed any more. Never read from
    the body."""

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """chat_template_kwargs, wherever they stood; the top level wins over extra_body name by name."""
        nested = self.extra_body.get("chat_template_kwargs") if self.extra_body else None
        if nested is None:
            return self.chat_template_kwargs or {}
        return {**nested, **(self.chat_template_kwargs or {})}

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_stream(self) -> bool:
        return self.stream is True

    @property
    def wants_store(self) -> bool:
        return self.store is not False


MESSAGES_TAKEN = b"[{}]"
"""What stands for the messages of a body whose messages were taken out, so that the rest can be decoded."""

_decoder = msgspec.json.Decoder(ChatRequest)


def decode_chat(body: bytes) -> ChatRequest:
    """The request in `body`. Raises BadChat (400)."""
    try:
        request = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        request = _decode_again(body, error)
    if not request.messages:
        raise BadChat("messages cannot be empty")
    _check(request)
    request.images = request.vision_messages = request.sampled = None
    for message in request.messages:
        for value in message.values():
            if type(value) is not str:
                # something other than plain text: only then is there anything to drop or to take out
                try:
                    messages = [_without_nulls(each) for each in request.messages]
                except RecursionError:
                    raise BadChat(_TOO_DEEP) from None
                request.messages, images = extract_images(messages)
                if images:
                    request.images, request.vision_messages = images, messages
                return request
    return request


def _check(request: ChatRequest) -> None:
    """What the types do not say."""
    if request.n is not None and request.n != 1:
        raise BadChat(_NOT_ONE)
    if request.areal_cache not in (None, msgspec.UNSET):
        raise BadChat(
            "TypeError: areal.experimental.openai.client.AsyncCompletionsWithReward.create() "
            "got multiple values for keyword argument 'areal_cache'"
        )
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise BadChat(_BOTH_BUDGETS)
    if request.extra_body:
        nested = request.extra_body.get("chat_template_kwargs")
        if nested is not None and not isinstance(nested, dict):
            raise BadChat(_not_a_mapping(nested))


def _without_nulls(value: Any) -> Any:
    """`value` without members that are null, at every depth. Nulls in lists stay."""
    if type(value) is dict:
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if type(value) is list:
        return [_without_nulls(item) for item in value]
    return value


def extract_images(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages with each `image_url` part replaced by `{"type": "image"}`, and the images in order.

    An image is the base64 text of a data URI, or its URL as it stands. Raises BadChat for a part without a
    URL.
    """
    images: list[str] = []
    replaced: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(_is_image(part) for part in content):
            parts = []
            for part in content:
                if not _is_image(part):
                    parts.append(part)
                    continue
                images.append(_image_of(part))
                parts.append({"type": "image"})
            message = {**message, "content": parts}
        replaced.append(message)
    return replaced, images


def with_object_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose tool calls have their arguments as objects where they are JSON texts of objects, for
    templates that iterate over them (dialect v2). The same list if there is nothing to change; arguments
    that cannot be read stay text."""
    changed = [_with_objects(message) for message in messages]
    return messages if all(map(operator.is_, changed, messages)) else changed


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    changed = [_call_with_object(call) for call in calls]
    return message if all(map(operator.is_, changed, calls)) else {**message, "tool_calls": changed}


def _call_with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str) or not isinstance(function, dict):
        return call
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return call
    return {**call, "function": {**function, "arguments": value}} if isinstance(value, dict) else call


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image_url"


def _image_of(part: dict[str, Any]) -> str:
    holder = part.get("image_url")
    url = holder.get("url") if isinstance(holder, dict) else None
    if not url or not isinstance(url, str):
        raise BadChat(_NO_IMAGE_URL)
    data = _DATA_URI.match(url)
    return data.group(1) if data else url


# -- the slow way: what is wrong, in the original's words
# ----------------------------------------------------------


def _decode_again(body: bytes, error: Exception) -> ChatRequest:
    """Read a body that the typed pass refused: as UTF-8 and as a request after repair, or BadChat."""
    try:
        body = _as_utf8(body)
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as decode_error:
        raise BadChat(_json_detail(body, decode_error)) from error
    if not isinstance(fields, dict):
        raise BadChat("Request body must be a JSON object")
    for name in ("images", "vision_messages", "sampled"):
        fields.pop(name, None)
    if "messages" not in fields:
        raise BadChat(_NO_MESSAGES)
    fields["messages"] = _messages(fields["messages"])
    fields["tools"] = _tools(fields.get("tools"))
    for name in ("extra_body", "chat_template_kwargs"):
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            attribute_error = f"AttributeError: '{type(value).__name__}' object has no attribute 'get'"
            raise BadChat(attribute_error if name == "extra_body" else _not_a_mapping(value))
    if isinstance(fields.get("n"), (str, list, dict)):
        raise BadChat(_NOT_ONE)
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(value := fields.get(name), (str, list, dict)):
            kind = type(value).__name__
            raise BadChat(f"TypeError: '<' not supported between instances of '{kind}' and 'int'")
    if isinstance(value := fields.get("max_total_tokens"), (str, list, dict)):
        raise BadChat(f"TypeError: unsupported operand type(s) for -: '{type(value).__name__}' and 'int'")
    value = fields.get("metadata")
    if value is not None and not isinstance(value, dict):
        raise BadChat(f"AttributeError: '{type(value).__name__}' object has no attribute 'get'")
    if isinstance(fields.get("store"), (int, float, str, list, dict)):
        fields["store"] = bool(fields["store"])
    if isinstance(fields.get("model"), (int, float, bool)):
        fields["model"] = None  # names no registered model, and is ignored like any other
    try:
        return msgspec.convert(fields, ChatRequest)
    except msgspec.ValidationError as invalid:
        raise BadChat(_kind_detail(invalid, fields)) from error


def _as_utf8(body: bytes) -> bytes:
    """`body` in UTF-8 without a byte order mark, from UTF-8, UTF-16 or UTF-32 (RFC 4627 section 3: by its
    zeros)."""
    if body.startswith(b"\xef\xbb\xbf"):
        return body[3:]
    if body.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return body.decode("utf-32").encode()
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        return body.decode("utf-16").encode()
    head = body[:4]
    if len(head) == 4 and 0 in head:
        if head[:3] == b"\0\0\0" or head[1:] == b"\0\0\0":
            return body.decode("utf-32-be" if head[0] == 0 else "utf-32-le").encode()
        return body.decode("utf-16-be" if head[0] == 0 else "utf-16-le").encode()
    return body


def _json_detail(body: bytes, error: Exception) -> str:
    text = str(error)
    # half a surrogate pair; close to the end of the body msgspec calls it truncated
    if "utf-16" in text or ("truncated" in text and _SURROGATE.search(body) and body.rstrip().endswith(b"}")):
        return _LONE_SURROGATE
    at = re.search(r"\(byte (\d+)\)", text)
    if at and re.match(rb"-?(NaN|Infinity)", body[int(at.group(1)) :].lstrip(b"-")):
        return "Out of range float values are not JSON compliant"
    return INVALID_JSON


def _messages(value: Any) -> list[dict[str, Any]]:
    """The original takes any iterable: text is its characters, an object its keys."""
    if not isinstance(value, (list, str, dict)):
        raise BadChat(_NOT_ITERABLE)
    messages = list(value)
    if not messages:
        raise BadChat("messages cannot be empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadChat(
                f"TypeError: messages[{i}] must be a dict or a BaseModel; got {type(message).__name__}"
            )
    return messages


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, (list, str, dict)):
        raise BadChat("TypeError: tools must be an iterable of ChatCompletionToolParam")
    tools = list(value)
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadChat(_BAD_TOOL)
    return tools


def _not_a_mapping(value: Any) -> str:
    return (
        "TypeError: areal.utils.hf_utils.apply_chat_template() argument after ** must be a mapping, "
        f"not {type(value).__name__}"
    )


def _kind_detail(invalid: msgspec.ValidationError, fields: dict[str, Any]) -> str:
    """One line naming the member: "temperature must be a number, got str"."""
    message, _, path = str(invalid).partition(" - at `$.")
    name = re.split(r"[.\[`]", path, maxsplit=1)[0]
    wanted = {
        "model": "a string",
        "seed": "an integer",
        "stream": "a boolean",
        "store": "a boolean",
        "stop": "a string or a list of strings",
    }.get(name, "a number")
    if name not in fields:
        return message
    return f"TypeError: {name} must be {wanted}, got {type(fields[name]).__name__}"
