"""SGLang's native generation API: what POST /generate is sent, and what its answers mean. No I/O.

A request is token ids in, token ids out: text is never sent or read, so nothing is tokenized twice. The
body's members and their order are those of the original (transcripts, "backend_received"). It is written
into one buffer, the ids' digits by core/_tokens.pyx; what stands around them is remembered.

An answer's truth is `meta_info.output_token_logprobs`, rows of [log-probability, token id, text or null].
Where rows are missing the turn cannot be trained on, so that is an error; only an abort before prefill may
lack them.

Streams repeat: each event carries all rows so far (SGLang's default) or only the new ones (its incremental
mode). `completion_tokens`, the count so far, tells which. The rows already known are compared as bytes and
not parsed again.

Routed experts (MoE models; base64 of int32, tens of MiB) are taken out before an answer is read here
(routed.py). Source: areal.experimental.inference_service.sglang.bridge;
sglang.srt.managers.tokenizer_manager (behaviour).
"""

from __future__ import annotations

from array import array
from typing import Annotated, NamedTuple

import msgspec

from areal_fast.core._tokens import cut_rows, ids_json
from areal_fast.engine.errors import EngineError
from areal_fast.engine.sampling import TOP_K_ALL, Sampling

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


_NULL = msgspec.Raw(b"null")
_ROWS = b'"output_token_logprobs"'
_ROWS_WERE_HERE = -1
_MARK = b"-1"
_SPELLED_KEPT = 256
_SPELLED_BYTES = 2048  # of one: stop strings may be long


class Attempt(msgspec.Struct, gc=False):
    """What one engine call yielded."""

    ids: array[int]
    """array('i')"""
    logprobs: array[float]
    """array('f'), one a token."""
    stop: str
    """stop, length, tool_calls; anything else means: interrupted, ask again."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the engine counts them."""


class Call(NamedTuple):
    """One request to the engine."""

    path: str
    body: bytes


class _SamplingParams(msgspec.Struct, omit_defaults=True, gc=False):
    """`sampling_params` in the order the original writes them. Fields with defaults are left out when not
    used."""

    top_p: float
    top_k: int
    max_new_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    frequency_penalty: float
    stop: tuple[str, ...] = ()
    sampling_seed: int | None = None


class _Row(msgspec.Struct, array_like=True, gc=False):
    logprob: float
    id: TokenId


class _FinishReason(msgspec.Struct, gc=False):
    type: str
    message: str | None = None


class _MetaInfo(msgspec.Struct, gc=False):
    finish_reason: _FinishReason | None = None
    output_token_logprobs: list[_Row] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answer(msgspec.Struct, gc=False):
    meta_info: _MetaInfo


class _MarkedMetaInfo(msgspec.Struct, gc=False):
    """_MetaInfo of an answer whose rows were taken out; `_ROWS_WERE_HERE` stands for them."""

    finish_reason: _FinishReason
    output_token_logprobs: int
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _MarkedAnswer(msgspec.Struct, gc=False):
    meta_info: _MarkedMetaInfo


class _EventMetaInfo(msgspec.Struct, gc=False):
    finish_reason: _FinishReason | None = None
    output_token_logprobs: msgspec.Raw = _NULL
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Event(msgspec.Struct, gc=False):
    meta_info: _EventMetaInfo | None = None
    error: msgspec.Raw = _NULL


_encode = msgspec.json.Encoder().encode
_answer_decoder = msgspec.json.Decoder(_Answer)
_marked_decoder = msgspec.json.Decoder(_MarkedAnswer)
_event_decoder = msgspec.json.Decoder(_Event)
_rows_decoder = msgspec.json.Decoder(list[_Row])


class Spelled:
    """What an adapter wrote for the last Samplings, found by identity: a request's parameters often repeat,
    and then their Sampling is the same object (sampling.py). Bounded: none with images is kept alive, none
    that is long."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Sampling, bytes]] = {}

    def get(self, sampling: Sampling) -> bytes | None:
        kept = self._kept.get(id(sampling))
        return None if kept is None else kept[1]  # who is kept has its id to itself

    def keep(self, sampling: Sampling, text: bytes) -> bytes:
        """`text` again."""
        if sampling.images is None and sampling.vision_messages is None and len(text) <= _SPELLED_BYTES:
            if len(self._kept) >= _SPELLED_KEPT:
                self._kept.clear()
            self._kept[id(sampling)] = sampling, text
        return text


class SGLang:
    """The adapter for SGLang."""

    name = "sglang"

    def __init__(self) -> None:
        self._spelled = Spelled(), Spelled()

    def generate(self, prompt: bytes, sampling: Sampling, max_new_tokens: int, *, stream: bool) -> Call:
        """One attempt. `prompt`: the ids so far, int32."""
        if max_new_tokens == sampling.max_new_tokens:
            spelled = self._spelled[stream]
            after = spelled.get(sampling) or spelled.keep(sampling, _after(sampling, max_new_tokens, stream))
        else:
            after = _after(sampling, max_new_tokens, stream)
        return Call("/generate", ids_json(prompt, b'{"input_ids":[', after))

    def continues(self, sampling: Sampling) -> bool:
        """Can an interrupted answer go on from its tokens?"""
        return True

    def parse(self, body: bytes) -> Attempt:
        """The answer to a call that did not stream. Raises EngineError."""
        attempt = _quickly(body)
        if attempt is not None:
            return attempt
        try:
            meta = _answer_decoder.decode(body).meta_info
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(f"Engine sent an answer that cannot be read: {error}") from error
        if meta.finish_reason is None:
            raise EngineError("Engine sent an answer without finish_reason")
        stop = meta.finish_reason.type
        rows = meta.output_token_logprobs
        if rows is None:
            if stop != "abort":
                raise EngineError("Engine sent an answer without output_token_logprobs")
            rows = []
        return Attempt(
            ids=array("i", [row.id for row in rows]),
            logprobs=array("f", [row.logprob for row in rows]),
            stop=stop,
            prompt_tokens=meta.prompt_tokens,
            completion_tokens=meta.completion_tokens,
        )

    def read_stream(self) -> StreamedAttempt:
        return StreamedAttempt()

    def pause(self) -> Call:
        return Call("/pause_generation", b"{}")

    def resume(self) -> Call:
        return Call("/continue_generation", b"{}")

    def release_memory(self) -> Call:
        return Call("/release_memory_occupation", b"{}")

    def resume_memory(self, tags: list[str] | None) -> Call:
        return Call("/resume_memory_occupation", b"{}" if tags is None else _encode({"tags": tags}))


def _after(sampling: Sampling, max_new_tokens: int, stream: bool) -> bytes:
    """A request's body from the end of its ids on."""
    parameters = _SamplingParams(
        top_p=sampling.top_p,
        top_k=TOP_K_ALL,
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=False,
        skip_special_tokens=True,
        frequency_penalty=sampling.frequency_penalty,
        stop=sampling.stop,
        sampling_seed=sampling.seed,
    )
    return b'],"image_data":%b,"sampling_params":%b,"return_logprob":true,"stream":%b%b}' % (
        b"null" if sampling.images is None else _encode(sampling.images),
        _encode(parameters),
        b"true" if stream else b"false",
        b',"return_routed_experts":true' if sampling.return_routed_experts else b"",
    )


def _quickly(body: bytes) -> Attempt | None:
    """An answer in the usual form, its rows read straight into arrays; None: read it in the general way.

    The rows are looked for by their name. A quote that is not escaped and begins it is a member's, or the
    rest of the answer would not be JSON; a second one, or one in another place, leaves no mark in
    meta_info."""
    rows = cut_rows(body, _ROWS, _MARK)
    if rows is None:
        return None
    try:
        meta = _marked_decoder.decode(rows[2]).meta_info
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if meta.output_token_logprobs != _ROWS_WERE_HERE:
        return None
    return Attempt(
        array("i", rows[0]),
        array("f", rows[1]),
        meta.finish_reason.type,
        meta.prompt_tokens,
        meta.completion_tokens,
    )


class StreamedAttempt:
    """One streamed answer, event by event."""

    def __init__(self) -> None:
        self.attempt = Attempt(ids=array("i"), logprobs=array("f"), stop="")
        self.finished = False
        self._seen = b""  # the rows seen so far as JSON, without the closing bracket (cumulative streams)
        self._saw_rows = False

    def add(self, data: bytes) -> list[int]:
        """The new token ids of an event's data. Raises EngineError, also where the engine reports one."""
        if data.strip() == b"[DONE]":
            return []
        try:
            event = _event_decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(f"Engine sent an event that cannot be read: {error}") from error
        if bytes(event.error) != b"null":
            raise EngineError(f"Engine failed in mid-stream: {error_text(event.error)}")
        meta = event.meta_info
        if meta is None:
            raise EngineError("Engine sent an event without meta_info")
        rows = self._new_rows(meta)
        attempt = self.attempt
        new_ids = [row.id for row in rows]
        attempt.ids.extend(new_ids)
        attempt.logprobs.extend([row.logprob for row in rows])
        attempt.prompt_tokens = meta.prompt_tokens
        attempt.completion_tokens = meta.completion_tokens or len(attempt.ids)
        if meta.finish_reason is not None:
            attempt.stop = meta.finish_reason.type
            self.finished = True
        return new_ids

    def end(self) -> Attempt:
        """The whole answer once the stream has ended. Raises EngineError if it ended too early."""
        if not self.finished:
            raise EngineError("Engine ended its stream without finish_reason")
        if not self._saw_rows and self.attempt.stop != "abort":
            raise EngineError("Engine sent an answer without output_token_logprobs")
        return self.attempt

    def _new_rows(self, meta: _EventMetaInfo) -> list[_Row]:
        text = bytes(meta.output_token_logprobs)
        if text == b"null":
            return []
        self._saw_rows = True
        known = len(self.attempt.ids)
        count = meta.completion_tokens
        try:
            if known and text.startswith(self._seen):
                rest = text[len(self._seen) :].lstrip(b" \t\r\n,")
                rows = _rows_decoder.decode(b"[" + rest)
                if count is None or known + len(rows) == count:
                    self._seen = text.rstrip()[:-1]
                    return rows
            rows = _rows_decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise EngineError(f"Engine sent log-probabilities that cannot be read: {error}") from error
        if known == 0 or (len(rows) >= known and count == len(rows)):
            self._seen = text.rstrip()[:-1]  # cumulative, or the first
            return rows[known:]
        if count is None and [row.id for row in rows[:known]] == self.attempt.ids.tolist():
            self._seen = text.rstrip()[:-1]
            return rows[known:]
        if count is not None and known + len(rows) != count:
            raise EngineError(
                f"Engine's stream does not add up: {known} tokens so far, {len(rows)} in this event, "
                f"{count} in all"
            )
        return rows  # incremental


def error_text(raw: msgspec.Raw) -> str:
    """What an engine's `error` member says."""
    value = msgspec.json.decode(raw)
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        return str(value["message"])
    return value if isinstance(value, str) else bytes(raw).decode(errors="replace")
