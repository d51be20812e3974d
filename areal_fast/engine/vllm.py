"""vLLM's OpenAI API with token ids: what is sent, and what the answers mean. No I/O.

POST /v1/completions with the prompt as ids; the answer names each token "token:ID"
(return_tokens_as_token_ids) beside its log-probability, so text is never read. The body's members and their
order are the original's; frequency_penalty, stop and seed are added where a request has them (the original
drops them).

A request with images goes to /v1/chat/completions with messages instead of ids, because vLLM takes images
only there. What it templates itself cannot be continued by ids: after an abort such an answer begins anew,
unless tokens of it have been streamed already; then it is an engine error.

−9999 is vLLM's way of writing minus infinity, and no number that can be trained on: an engine error, like a
log-probability that is missing.
Source: areal.experimental.inference_service.vllm.bridge; vllm.entrypoints.openai.protocol (behaviour).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import msgspec

from areal_fast.core._tokens import ids_json
from areal_fast.engine.errors import EngineError
from areal_fast.engine.sampling import TOP_K_ALL, Sampling
from areal_fast.engine.sglang import Attempt, Call, Spelled, error_text

NO_LOGPROB = -9999.0
_TOKEN = "token:"
_MAX_ID = 2**31 - 1
_NULL = msgspec.Raw(b"null")
_MIME = (("iVBOR", "png"), ("/9j/", "jpeg"), ("R0lGOD", "gif"), ("UklGR", "webp"))


class _Parameters(msgspec.Struct, omit_defaults=True, gc=False):
    """The body without its prompt. Fields with defaults are left out when not used."""

    top_p: float
    top_k: int
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    return_tokens_as_token_ids: bool
    logprobs: int | bool
    use_beam_search: bool
    stream: bool
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


class _Content(msgspec.Struct, gc=False):
    token: str
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    tokens: list[str] | None = None
    token_logprobs: list[float] | None = None
    content: list[_Content] | None = None


class _Choice(msgspec.Struct, gc=False):
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Answer(msgspec.Struct, gc=False):
    """An answer, or an event of a stream."""

    choices: list[_Choice] = []
    error: msgspec.Raw = _NULL


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(_Answer)


class VLLM:
    """The adapter for vLLM."""

    name = "vllm"

    def __init__(self) -> None:
        self._spelled = Spelled(), Spelled()

    def generate(self, prompt: bytes, sampling: Sampling, max_new_tokens: int, *, stream: bool) -> Call:
        """One attempt. `prompt`: the ids so far, int32."""
        if sampling.vision_messages is not None:
            messages = _encode(_with_images(sampling.vision_messages, sampling.images or ()))
            parameters = _parameters(sampling, max_new_tokens, stream)
            return Call("/v1/chat/completions", b'%b,"messages":%b}' % (parameters, messages))
        if max_new_tokens == sampling.max_new_tokens:
            spelled = self._spelled[stream]
            parameters = spelled.get(sampling) or spelled.keep(
                sampling, _parameters(sampling, max_new_tokens, stream)
            )
        else:
            parameters = _parameters(sampling, max_new_tokens, stream)
        return Call("/v1/completions", ids_json(prompt, b'%b,"prompt":[' % parameters, b"]}"))

    def continues(self, sampling: Sampling) -> bool:
        """Can an interrupted answer go on from its tokens?"""
        return sampling.vision_messages is None

    def parse(self, body: bytes) -> Attempt:
        """The answer to a call that did not stream. Raises EngineError."""
        answer = _decoded(body)
        if not answer.choices or answer.choices[0].finish_reason is None:
            raise EngineError("Engine sent an answer without finish_reason")
        choice = answer.choices[0]
        attempt = Attempt(ids=array("i"), logprobs=array("f"), stop=choice.finish_reason or "")
        if choice.logprobs is not None:
            _add(attempt, choice.logprobs)
        elif attempt.stop != "abort":
            raise EngineError("Engine sent an answer without logprobs")
        return attempt

    def read_stream(self) -> StreamedAttempt:
        return StreamedAttempt()

    def pause(self) -> Call:
        return Call("/areal_pause_generation", b"{}")

    def resume(self) -> Call:
        return Call("/areal_continue_generation", b"{}")

    def release_memory(self) -> Call:
        return Call("/sleep", b"{}")

    def resume_memory(self, tags: list[str] | None) -> Call:
        return Call(
            "/wake_up" if tags is None else "/wake_up?" + urlencode({"tags": tags}, doseq=True), b"{}"
        )


class StreamedAttempt:
    """One streamed answer, event by event; each carries only what is new."""

    def __init__(self) -> None:
        self.attempt = Attempt(ids=array("i"), logprobs=array("f"), stop="")
        self._saw_logprobs = False

    def add(self, data: bytes) -> list[int]:
        """The new token ids of an event's data. Raises EngineError, also where the engine reports one."""
        if data.strip() == b"[DONE]":
            return []
        event = _decoded(data)
        known = len(self.attempt.ids)
        for choice in event.choices[:1]:
            if choice.logprobs is not None:
                self._saw_logprobs = True
                _add(self.attempt, choice.logprobs)
            if choice.finish_reason is not None:
                self.attempt.stop = choice.finish_reason
        return self.attempt.ids[known:].tolist()

    def end(self) -> Attempt:
        """The whole answer once the stream has ended. Raises EngineError if it ended too early."""
        if not self.attempt.stop:
            raise EngineError("Engine ended its stream without finish_reason")
        if not self._saw_logprobs and self.attempt.stop != "abort":
            raise EngineError("Engine sent an answer without logprobs")
        return self.attempt


def _parameters(sampling: Sampling, max_new_tokens: int, stream: bool) -> bytes:
    """The body's members but for the prompt; its end is open."""
    parameters = _Parameters(
        top_p=sampling.top_p,
        top_k=TOP_K_ALL,
        max_tokens=max_new_tokens,
        temperature=sampling.temperature,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=False,
        skip_special_tokens=True,
        return_tokens_as_token_ids=True,
        logprobs=sampling.vision_messages is not None or 0,
        use_beam_search=False,
        stream=stream,
        frequency_penalty=sampling.frequency_penalty or None,
        stop=sampling.stop,
        seed=sampling.seed,
    )
    return _encode(parameters)[:-1]


def _decoded(data: bytes) -> _Answer:
    try:
        answer = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(f"Engine sent an answer that cannot be read: {error}") from error
    if bytes(answer.error) != b"null":
        raise EngineError(f"Engine failed: {error_text(answer.error)}")
    return answer


def _add(attempt: Attempt, logprobs: _Logprobs) -> None:
    """Append the tokens of one answer or event. Raises EngineError."""
    if logprobs.content is not None:
        names = [each.token for each in logprobs.content]
        values = [each.logprob for each in logprobs.content]
    else:
        names, values = logprobs.tokens or [], logprobs.token_logprobs or []
    if len(names) != len(values):
        raise EngineError(f"Engine sent {len(values)} log-probabilities for {len(names)} tokens")
    if NO_LOGPROB in values:
        raise EngineError(f"Engine sent the log-probability {NO_LOGPROB:g}, which stands for none")
    attempt.ids.extend(_ids(names))
    attempt.logprobs.extend(values)


def _ids(names: Sequence[str]) -> Iterator[int]:
    for name in names:
        digits = name[len(_TOKEN) :]
        if not (name.startswith(_TOKEN) and digits.isascii() and digits.isdigit() and int(digits) <= _MAX_ID):
            raise EngineError(f"Engine sent a token as {name[:40]!r}, not as {_TOKEN}ID")
        yield int(digits)


def _with_images(messages: Sequence[Mapping[str, Any]], images: Sequence[str]) -> list[Mapping[str, Any]]:
    """The messages with the images in their places, base64 data as data URIs."""
    left = iter(images)
    filled: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                {"type": "image_url", "image_url": {"url": _url(next(left))}}
                if isinstance(part, dict) and part.get("type") == "image_url"
                else part
                for part in content
            ]
            message = {**message, "content": parts}
        filled.append(message)
    return filled


def _url(image: str) -> str:
    if ":" in image[:16]:
        return image  # a URL as it stood in the request
    kind = next((kind for start, kind in _MIME if image.startswith(start)), "jpeg")
    return f"data:image/{kind};base64,{image}"
