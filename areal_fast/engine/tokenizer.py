"""The tokenizer of the served model: chat to token ids, token ids to text.

`load_tokenizer` reads a Hugging Face folder without transformers or torch (folder.py), so that a worker
starts in tenths of a second and stays small. What comes out is exactly transformers'

    apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True, **kwargs)

that is: the template rendered (templates.py), the text encoded with special tokens recognised and none added
(segments.py, which remembers what it encoded). Folders that need code of their own go through a helper
process (remote.py); `builtin:bytes` is the embedded tokenizer.

Cost (2 vCPU Ice Lake, Qwen vocabulary, µs): 5 messages, 200 tokens of which 20 new, 40 to 60; 30 messages,
4k tokens of which 150 new, 160 (rendering 38, known segments 31). New text is 0.06 to 0.25 a token where it
is encoded natively (bpe.py; with cold caches, on a busy machine), and about 1 in the library. So a turn is
encoded on the loop; above `OFFLOAD_CHARS` of work, `prompt` takes new text to a thread (long text is
encoded without the GIL), which keeps the loop's longest pause near 2 ms.

Ownership: one tokenizer a process; all methods for the loop's thread, unless they say otherwise.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tokenizers import Tokenizer as Encoder

from areal_fast.core._tokens import TokenBytes
from areal_fast.engine.detokenize import BytePieces, Pieces, WholePieces, WindowPieces, byte_alphabet
from areal_fast.engine.folder import (
    Folder,
    TokenizerError,
    clean_up,
    give_memory_back,
    load_folder,
    needs_own_code,
)
from areal_fast.engine.known import KnownChats
from areal_fast.engine.segments import Prompt, SegmentEncoder
from areal_fast.engine.templates import ChatTemplate, TemplateFailed, check_template_kwargs

__all__ = [
    "BUILTIN_BYTES",
    "OFFLOAD_CHARS",
    "HfTokenizer",
    "Prompt",
    "TemplateFailed",
    "Tokenizer",
    "TokenizerError",
    "as_prompt",
    "load_tokenizer",
]

BUILTIN_BYTES = "builtin:bytes"
# new text beyond this is encoded on a thread: about 2 ms of the library's encoding, or four times as many
# characters where byte pairs are encoded natively (segments.py), against 60 to 100 µs for the trip there and
# back
OFFLOAD_CHARS = 8192


class Tokenizer(Protocol):
    """What the rest of the proxy knows of a tokenizer. Ids are int32."""

    eos_id: int | None
    pad_id: int | None
    """Never None where eos_id is not: a missing pad token is the eos token."""
    vocab_size: int

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end a reply, ascending: eos and pad."""
        ...

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> Prompt:
        """The prompt of a conversation, generation prompt included. Raises TemplateFailed (400). May
        block."""
        ...

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> Prompt | Awaitable[Prompt]:
        """encode_chat without blocking the loop for long: what would is to be awaited."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        ...

    def incremental(self) -> Pieces:
        """A decoder for one stream, whose pieces joined are `decode` of all ids."""
        ...


def as_prompt(ids: Prompt | Iterable[int]) -> Prompt:
    """Any sequence of ids as a Prompt."""
    return ids if isinstance(ids, Prompt) else Prompt.of(ids)


class BuiltinTokenizer:
    """The embedded engine's byte tokenizer in the form of Tokenizer. It is too cheap to cache or to
    offload."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.eos_id: int | None = inner.eos_id
        self.pad_id: int | None = inner.pad_id
        self.vocab_size: int = inner.vocab_size
        self.stop_ids: list[int] = sorted({inner.eos_id, inner.pad_id})

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> Prompt:
        check_template_kwargs(kwargs)
        return Prompt.of(self._inner.encode_chat(messages, tools, kwargs))

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> Prompt:
        return self.encode_chat(messages, tools, kwargs)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._inner.decode(ids)
        return text

    def incremental(self) -> Pieces:
        pieces: Pieces = self._inner.incremental()
        return pieces


class HfTokenizer:
    """A tokenizer from a Hugging Face folder. Implements Tokenizer."""

    def __init__(self, folder: Folder, *, cache_bytes: int = 32 << 20) -> None:
        """`cache_bytes` bounds the caches of segments and of messages; 0 switches them off. Raises
        TokenizerError."""
        self._encoder = folder.tokenizer
        self._clean_up = folder.clean_up_spaces
        try:
            self.template = ChatTemplate(folder.chat_template, folder.named_tokens)
        except TemplateFailed as error:
            raise TokenizerError(str(error)) from error
        self.named_tokens = folder.named_tokens
        self.segments = SegmentEncoder(self._encoder, limit_bytes=cache_bytes // 2)
        self.known = KnownChats(
            self.template, self.segments, OFFLOAD_CHARS, limit_bytes=cache_bytes - cache_bytes // 2
        )
        self.vocab_size: int = self._encoder.get_vocab_size(with_added_tokens=True)
        self.eos_id = self._id_of("eos_token")
        pad_id = self._id_of("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.stop_ids = sorted({i for i in (self.eos_id, self.pad_id) if i is not None})
        by_bytes = type(self._encoder.decoder).__name__ == "ByteLevel" and not self._clean_up
        self._bytes = (
            TokenBytes(self.vocab_size, _Speller(self._encoder), self.segments.take_spelled())
            if by_bytes
            else None
        )
        self._by_window = not self._clean_up and _is_sentencepiece(self._encoder)

    def _id_of(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self._encoder.token_to_id(token)

    # -- to ids
    # -----------------------------------------------------------------------------------------------------

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> Prompt:
        return self.encode(self.template.render(messages, tools, kwargs))

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> Prompt | Awaitable[Prompt]:
        text = self.template.render(messages, tools, kwargs)
        with _SurrogatesRefused():
            prompt = self.segments.encode_within(text, OFFLOAD_CHARS)
        return self._elsewhere(text) if prompt is None else prompt

    async def _elsewhere(self, text: str) -> Prompt:
        """The new text on a thread."""
        with _SurrogatesRefused():
            missing = self.segments.missing(text)
            entries = await asyncio.to_thread(self.segments.encode_segments, missing)
            return self.segments.assemble(text, missing, entries)

    def encode(self, text: str) -> Prompt:
        """The ids of rendered text: special tokens recognised, none added. Raises TemplateFailed on lone
        surrogates."""
        with _SurrogatesRefused():
            return self.segments.encode(text)

    # -- to text
    # ----------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        if self._bytes is not None:
            # what the byte-level decoder does, at a third of its cost: both replace bad bytes by maximal
            # subparts
            return self._join(ids).decode("utf-8", "replace")
        text: str = self._encoder.decode(list(ids), skip_special_tokens=False)
        return clean_up(text) if self._clean_up else text

    def _join(self, ids: Iterable[int]) -> bytes:
        assert self._bytes is not None
        return self._bytes.join(ids if type(ids) is array else array("i", ids))

    def incremental(self) -> Pieces:
        if self._bytes is not None:
            return BytePieces(self._join)
        if self._by_window:
            return WindowPieces(self.decode, self._encoder.id_to_token)
        return WholePieces(self.decode)


class _SurrogatesRefused:
    """Text with lone surrogates is no UTF-8 and cannot be encoded: the client's fault, in the original's
    words."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (TypeError, UnicodeEncodeError)):
            raise TemplateFailed(
                "TypeError: TextEncodeInput must be "
                "Union[TextInputSequence, Tuple[InputSequence, InputSequence]]"
            ) from error


def _is_sentencepiece(encoder: Encoder) -> bool:
    """Is the decoder Metaspace, or what llama-like tokenizers have: `▁` to space, byte fallback, fuse,
    strip a space?"""
    if encoder.decoder is None:
        return False
    state = msgspec.json.decode(encoder.decoder.__getstate__())
    if state["type"] == "Metaspace":
        return True
    steps = {step["type"] for step in state.get("decoders", [])}
    return "ByteFallback" in steps and steps <= {"Replace", "ByteFallback", "Fuse", "Strip"}


class _Speller:
    """id → bytes of a byte-level vocabulary. A token with a character that stands for no byte (an added one)
    is its own UTF-8, as in tokenizers' ByteLevel decoder; an unknown id has none."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._alphabet = byte_alphabet()

    def __call__(self, token_id: int) -> bytes:
        token = self._encoder.id_to_token(token_id)
        if token is None:
            return b""
        stands_for = [self._alphabet.get(character) for character in token]
        return token.encode() if None in stands_for else bytes(stands_for)  # type: ignore[arg-type]


def load_tokenizer(path: str, *, trust_remote_code: bool = False, cache_bytes: int = 32 << 20) -> Tokenizer:
    """The tokenizer at `path`: a Hugging Face folder, or `builtin:bytes`.

    Folders without tokenizer.json, or with Python code of their own, are served by a helper process that
    imports transformers; their code runs only with `trust_remote_code`. Raises TokenizerError with one
    clear line.
    """
    if path == BUILTIN_BYTES:
        from areal_fast.embedded.tokenizer import ByteTokenizer  # the embedded engine is above this layer

        return BuiltinTokenizer(ByteTokenizer())
    # the encoder's own threads are of no use for one prompt, and warn after a fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = Path(path).expanduser()
    own_code = folder.is_dir() and needs_own_code(folder)
    if own_code or (folder.is_dir() and not (folder / "tokenizer.json").is_file()):
        if own_code and not trust_remote_code:
            if not (folder / "tokenizer.json").is_file():
                raise TokenizerError(
                    f"the tokenizer in {path} is Python code that comes with it; --trust-remote-code runs it"
                )
        else:
            from areal_fast.engine.remote import HelperTokenizer

            return HelperTokenizer(str(folder), trust_remote_code=trust_remote_code)
    tokenizer = HfTokenizer(load_folder(folder), cache_bytes=cache_bytes)
    give_memory_back()
    return tokenizer
