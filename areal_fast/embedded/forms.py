"""The two dialects the embedded engine speaks: how a request is read and its answer written. No I/O.

SGLang: POST /generate. A stream's events repeat everything so far, as SGLang's do by default.
vLLM: POST /v1/completions with token ids (or text) and, if asked, tokens written as "token:ID". A
stream's events carry only what is new.

Prompts are never parsed into integers: the JSON of the ids, without blanks, is itself what answers are
chosen by, and its commas count the tokens. A text prompt is first encoded by the byte tokenizer, so it
gets the answer of its ids.

Invariant: the pieces of a stream hold exactly the tokens, log-probs and text of the whole answer.
Sources: sglang.srt.managers.io_struct and tokenizer_manager; vllm.entrypoints.openai.protocol; what
AReaL's engine bridges send and read (areal.experimental.inference_service.{sglang,vllm}.bridge).
"""

from __future__ import annotations

import binascii
import functools
import time
from typing import Any, ClassVar

import msgspec
import numpy as np

from areal_fast.embedded import tokenizer
from areal_fast.embedded.answers import Wanted
from areal_fast.embedded.engine import EmbeddedEngine, Generation

_NULL = msgspec.Raw(b"null")


class BadRequest(Exception):
    """The request cannot be served: 400 with this text."""


class _SamplingParams(msgspec.Struct):
    max_new_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    sampling_seed: int | None = None


class _GenerateBody(msgspec.Struct):
    input_ids: msgspec.Raw = _NULL
    text: str | None = None
    sampling_params: _SamplingParams | None = None
    return_logprob: bool | None = None
    stream: bool = False
    return_routed_experts: bool = False
    rid: str | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _CompletionsBody(msgspec.Struct):
    prompt: msgspec.Raw = _NULL
    model: str | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    n: int | None = 1
    logprobs: int | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    request_id: str | None = None


_generate_decoder = msgspec.json.Decoder(_GenerateBody)
_completions_decoder = msgspec.json.Decoder(_CompletionsBody)
_encode = msgspec.json.Encoder().encode


class Asked:
    """A generation request in any dialect, read. `write_*` turn a generation into its answer."""

    __slots__ = ("prompt", "prompt_tokens", "rid", "stream", "wanted")
    content_type: ClassVar[bytes] = b"application/json"

    def __init__(self, prompt: tuple[bytes, int], wanted: Wanted, stream: bool, rid: str) -> None:
        self.prompt, self.prompt_tokens = prompt
        self.wanted = wanted
        self.stream = stream
        self.rid = rid

    def whole(self, engine: EmbeddedEngine, generation: Generation) -> bytes:
        """The body of the answer."""
        raise NotImplementedError

    def event(self, engine: EmbeddedEngine, generation: Generation, before: int, count: int) -> bytes:
        """A stream's event with the tokens after `before` up to `count`; the last one says why it ends."""
        raise NotImplementedError

    def last_events(self, generation: Generation) -> bytes:
        """What follows the event with the last token."""
        return b"data: [DONE]\n\n"

    @staticmethod
    def error(status: int, message: str) -> bytes:
        """The body of an answer with that error status."""
        raise NotImplementedError


class Generate(Asked):
    """SGLang's POST /generate."""

    __slots__ = ("_logprobs", "_routed")

    def __init__(self, body: bytes, words: bool) -> None:
        """Raises BadRequest."""
        try:
            asked = _generate_decoder.decode(body)
        except msgspec.DecodeError as error:
            raise BadRequest(str(error)) from None
        params = asked.sampling_params or _SamplingParams()
        if bytes(asked.input_ids) != b"null":
            prompt = _canonical_ids(bytes(asked.input_ids), "input_ids")
        elif asked.text is not None:
            prompt = _encoded(asked.text, words)
        else:
            raise BadRequest("Either input_ids or text should be provided.")
        budget = 128 if params.max_new_tokens is None else params.max_new_tokens
        if budget < 0:
            raise BadRequest(f"max_new_tokens must be at least 0, got {budget}.")
        wanted = Wanted(
            budget,
            params.sampling_seed,
            params.stop_token_ids or (),
            _stop_texts(params.stop) if params.stop else (),
            bool(params.ignore_eos),
        )
        super().__init__(prompt, wanted, asked.stream, asked.rid or "")
        self._logprobs = bool(asked.return_logprob)
        self._routed = asked.return_routed_experts

    def whole(self, engine: EmbeddedEngine, generation: Generation) -> bytes:
        return self._body(engine, generation, generation.end)

    def event(self, engine: EmbeddedEngine, generation: Generation, before: int, count: int) -> bytes:
        return b"data: " + self._body(engine, generation, count) + b"\n\n"

    def _body(self, engine: EmbeddedEngine, generation: Generation, count: int) -> bytes:
        answer = generation.answer
        parts = [
            b'{"text":"', answer.text(count),
            b'","output_ids":[', answer.ids_json(count),
            b'],"meta_info":{"id":', _encode(generation.id),
            b',"finish_reason":', self._finish_reason(generation, count),
            b',"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":0' % (self.prompt_tokens, count),
            b',"weight_version":', _encode(engine.weight_version),
            b',"e2e_latency":%.6f' % (time.monotonic() - generation.began),
        ]  # fmt: skip
        if self._logprobs:
            mode = engine.switches.logprobs
            if mode == "send":
                parts += (b',"output_token_logprobs":[', answer.sglang_json(count), b"]")
            elif mode == "minus-9999":
                rows = _encode([(-9999.0, i, None) for i in answer.ids(count)])
                parts += (b',"output_token_logprobs":', rows)
        if self._routed and engine.switches.routed_experts and count == generation.end:
            layers, top_k = map(int, engine.switches.routed_experts.split("x"))
            rows_count = max(0, self.prompt_tokens + count - 1)
            parts += (b',"routed_experts":"', _routed_experts(rows_count, layers, top_k), b'"')
        parts.append(b"}}")
        return b"".join(parts)

    @staticmethod
    def _finish_reason(generation: Generation, count: int) -> bytes:
        if count < generation.end:
            return b"null"
        if generation.aborted:
            return b'{"type":"abort","message":%b,"status_code":null,"err_type":null}' % (
                _encode(generation.abort_message)
            )
        matched = generation.answer.matched
        if matched is None:
            return b'{"type":"length","length":%d}' % count
        return b'{"type":"stop","matched":%b}' % _encode(matched)

    @staticmethod
    def error(status: int, message: str) -> bytes:
        return _encode({"error": {"message": message, "code": status}})


class Completions(Asked):
    """vLLM's POST /v1/completions."""

    __slots__ = ("_as_ids", "_created", "_eos_id", "_include_usage", "_logprobs", "_model", "_text_sent")

    def __init__(self, body: bytes, words: bool, eos_id: int | None) -> None:
        """Raises BadRequest."""
        try:
            asked = _completions_decoder.decode(body)
            prompt_json = bytes(asked.prompt)
            text = msgspec.json.decode(prompt_json, type=str) if prompt_json.startswith(b'"') else None
        except msgspec.DecodeError as error:
            raise BadRequest(str(error)) from None
        prompt = _canonical_ids(prompt_json, "prompt") if text is None else _encoded(text, words)
        if asked.n not in (None, 1):
            raise BadRequest("n: this engine answers once, n must be 1")
        budget = 16 if asked.max_tokens is None else asked.max_tokens
        if budget < 1:
            raise BadRequest(f"max_tokens must be at least 1, got {budget}.")
        stops = _stop_texts(asked.stop) if asked.stop else ()
        wanted = Wanted(budget, asked.seed, asked.stop_token_ids or (), stops, asked.ignore_eos)
        super().__init__(prompt, wanted, asked.stream, asked.request_id or "")
        self._model = _encode(asked.model or "embedded")
        self._logprobs = asked.logprobs is not None
        self._as_ids = bool(asked.return_tokens_as_token_ids)
        self._include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        self._eos_id = eos_id
        self._created = int(time.time())
        self._text_sent = 0

    def whole(self, engine: EmbeddedEngine, generation: Generation) -> bytes:
        text = generation.answer.text(generation.end)
        choice = self._choice(engine, generation, 0, generation.end, text)
        return self._body(generation, choice, b',"usage":' + self._usage(generation))

    def event(self, engine: EmbeddedEngine, generation: Generation, before: int, count: int) -> bytes:
        text = generation.answer.text(count)
        choice = self._choice(engine, generation, before, count, text[self._text_sent :])
        self._text_sent = len(text)
        return b"data: " + self._body(generation, choice, b"") + b"\n\n"

    def last_events(self, generation: Generation) -> bytes:
        usage = b""
        if self._include_usage:
            body = self._body(generation, b"", b',"usage":' + self._usage(generation))
            usage = b"data: " + body + b"\n\n"
        return usage + b"data: [DONE]\n\n"

    def _body(self, generation: Generation, choice: bytes, more: bytes) -> bytes:
        return b'{"id":%b,"object":"text_completion","created":%d,"model":%b,"choices":[%b]%b}' % (
            _encode("cmpl-" + generation.id), self._created, self._model, choice, more
        )  # fmt: skip

    def _usage(self, generation: Generation) -> bytes:
        prompt, made = self.prompt_tokens, generation.end
        return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
            prompt,
            made,
            prompt + made,
        )

    def _choice(
        self, engine: EmbeddedEngine, generation: Generation, before: int, count: int, text: bytes
    ) -> bytes:
        finish, stop = b"null", b"null"
        if count == generation.end:
            matched = generation.answer.matched
            if generation.aborted:
                finish = b'"abort"'
            elif matched is None:
                finish = b'"length"'
            else:
                finish = b'"stop"'
                stop = b"null" if matched == self._eos_id else _encode(matched)
        logprobs = self._logprobs_json(engine, generation, before, count)
        return b'{"index":0,"text":"%b","logprobs":%b,"finish_reason":%b,"stop_reason":%b}' % (
            text, logprobs, finish, stop
        )  # fmt: skip

    def _logprobs_json(
        self, engine: EmbeddedEngine, generation: Generation, before: int, count: int
    ) -> bytes:
        mode = engine.switches.logprobs
        if not self._logprobs or mode == "omit":
            return b"null"
        answer = generation.answer
        if self._as_ids and mode == "send":
            tokens = b"[" + _since(answer.vllm_tokens, before, count) + b"]"
            values = b"[" + _since(answer.vllm_logprobs, before, count) + b"]"
            top = b"[" + _since(answer.vllm_top, before, count) + b"]"
        else:
            ids = answer.ids(count)[before:]
            names = [f"token:{i}" if self._as_ids else tokenizer.decode([i]) for i in ids]
            sent = _floats(answer.vllm_logprobs(count))[before:] if mode == "send" else [-9999.0] * len(ids)
            tokens, values = _encode(names), _encode(sent)
            top = _encode([{name: value} for name, value in zip(names, sent, strict=True)])
        offsets = _encode(answer.text_starts(count)[before:])
        return b'{"text_offset":%b,"token_logprobs":%b,"tokens":%b,"top_logprobs":%b}' % (
            offsets, values, tokens, top
        )  # fmt: skip

    @staticmethod
    def error(status: int, message: str) -> bytes:
        kind = "BadRequestError" if status < 500 else "InternalServerError"
        return _encode({"error": {"message": message, "type": kind, "param": None, "code": status}})


def _floats(joined: bytes) -> list[float]:
    return [float(value) for value in joined.split(b",")] if joined else []


def _since(column: Any, before: int, count: int) -> bytes:
    """The part of a column of JSON that tokens before..count add."""
    if count <= before:
        return b""
    whole: bytes = column(count)
    return whole[len(column(before)) + 1 :] if before else whole


def _canonical_ids(ids: bytes, name: str) -> tuple[bytes, int]:
    """JSON of token ids without blanks, and how many they are. Raises BadRequest."""
    if ids.translate(None, b"0123456789,") != b"[]":
        ids = ids.translate(None, b" \t\r\n")
        if ids.translate(None, b"0123456789,") != b"[]":
            raise BadRequest(
                f"{name} must be one list of token ids (integers from 0); batches are not served"
            )
    if ids == b"[]":
        raise BadRequest(f"{name} is empty")
    return ids, ids.count(b",") + 1


def _encoded(text: str, words: bool) -> tuple[bytes, int]:
    if not words:
        raise BadRequest("text needs the byte tokenizer; this engine was started for arbitrary token ids")
    ids = tokenizer.encode(text).tolist()
    if not ids:
        raise BadRequest("text is empty")
    return _encode(ids), len(ids)


def _stop_texts(stop: str | list[str]) -> list[bytes]:
    return [text.encode() for text in ([stop] if isinstance(stop, str) else stop)]


@functools.lru_cache(maxsize=1)
def _routed_experts(rows: int, layers: int, top_k: int) -> bytes:
    """Base64 of int32 [rows, layers, top_k]: the experts each token was sent to, all different."""
    layer = np.arange(rows * layers, dtype=np.int32).reshape(rows, layers, 1) * 7
    experts = (layer + np.arange(top_k, dtype=np.int32)) % max(128, top_k)
    return binascii.b2a_base64(experts.astype("<i4").tobytes(), newline=False)
