"""Token ids back to text: all at once, and token by token for streams.

What a reply shows is decoded from the output without its trailing stop tokens (`visible_output`), special
tokens kept, as the original decodes. A stream must show the same characters, in pieces, before the rest is
known. So a piece may leave only when no later token can change it:

- byte-level decoders (GPT-2, Qwen, Llama 3): tokens are bytes; an incremental UTF-8 decoder holds back an
  unfinished character and replaces broken bytes just where a decoder of the whole does (both by maximal
  subparts);
- SentencePiece decoders (Metaspace or `▁`, with byte fallback): text is decoded with one token of
  context; a run of byte tokens is held back until it ends, because one bad byte spoils the whole run;
- any other decoder, and any text that is cleaned up afterwards: everything leaves at the end.

Trailing stop tokens are held back too: they are text if more follows or the reply ended by length, nothing
if it stopped. Invariant: the pieces of `add` and `finish` joined are the text of
`decode(visible_output(ids))`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")


class OutputRejected(Exception):
    """The engine's output can't be shown: it says "stop" but holds no text or no stop token. An engine
    error (502)."""


def visible_output(
    ids: Sequence[int], stop_reason: str, stop_ids: Collection[int], *, stop_strings: bool = False
) -> Sequence[int]:
    """`ids` without trailing stop tokens if the reply stopped; all of it if it ended by length.

    `stop_strings`: the request named stop strings, so an output may end without a stop token (the original
    calls that an error too, and so fails every request that uses them). Raises OutputRejected with the
    original's texts.
    Source: areal.api.io_struct.ModelResponse.output_tokens_without_stop.
    """
    if stop_reason in ("length", "abort") or not ids:
        return ids
    end = len(ids)
    while end and ids[end - 1] in stop_ids:
        end -= 1
    if end == len(ids) and not stop_strings:
        raise OutputRejected(
            f"output_tokens does not end with eos or pad token, it ends with {ids[-1]}, "
            f"but stop_reason is {stop_reason}"
        )
    if end == 0:
        raise OutputRejected(
            "All output_tokens are EOS or PAD tokens; "
            "cannot strip stop tokens without removing entire output."
        )
    return ids[:end]


class Pieces(Protocol):
    """Turns ids into text piece by piece; what leaves is never taken back."""

    def add(self, ids: Iterable[int]) -> str:
        """The text that is certain now that `ids` have come; may be empty."""
        ...

    def finish(self) -> str:
        """The rest. Afterwards the object is spent."""
        ...


class BytePieces:
    """For byte-level decoders. `join` gives the bytes of ids (unknown ones have none)."""

    def __init__(self, join: Callable[[Iterable[int]], bytes]) -> None:
        self._join = join
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(self._join(ids))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class WindowPieces:
    """For SentencePiece-like decoders: decode what is new with one settled token before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], token: Callable[[int], str | None]) -> None:
        self._decode = decode
        self._token = token
        self._window: list[int] = []
        self._settled = 0  # of the window: how many tokens' text has left (0, or 1 once anything has)
        self._shown = ""  # the text of the settled token alone

    def add(self, ids: Iterable[int]) -> str:
        self._window.extend(ids)
        stable = len(self._window)
        while stable > self._settled and self._is_open(self._window[stable - 1]):
            stable -= 1
        return self._show(stable) if stable > self._settled else ""

    def finish(self) -> str:
        return self._show(len(self._window)) if len(self._window) > self._settled else ""

    def _is_open(self, token_id: int) -> bool:
        token = self._token(token_id)
        return token is None or _BYTE_TOKEN.match(token) is not None

    def _show(self, stable: int) -> str:
        text = self._decode(self._window[:stable])[len(self._shown) :]
        self._window = self._window[stable - 1 :]
        self._settled = 1
        self._shown = self._decode(self._window[:1])
        return text


class WholePieces:
    """For decoders that may change anything later: all at the end."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []

    def add(self, ids: Iterable[int]) -> str:
        self._ids.extend(ids)
        return ""

    def finish(self) -> str:
        return self._decode(self._ids)


class ContentStream:
    """The content of one streamed reply: ids in, text out, stop tokens held back until it is known what
    they are."""

    def __init__(self, pieces: Pieces, stop_ids: Iterable[int], *, stop_strings: bool = False) -> None:
        self._pieces = pieces
        self._stops = frozenset(stop_ids)
        self._stop_strings = stop_strings
        self._held: list[int] = []
        self._last = -1
        self._shown_any = False

    def add(self, ids: Sequence[int]) -> str:
        """The text that may be sent now."""
        end = len(ids)
        while end and ids[end - 1] in self._stops:
            end -= 1
        if len(ids):
            self._last = ids[-1]
        if end == 0:
            self._held.extend(ids)
            return ""
        self._shown_any = True
        ready = [*self._held, *ids[:end]] if self._held else ids[:end]
        self._held = list(ids[end:])
        return self._pieces.add(ready)

    def finish(self, stop_reason: str) -> str:
        """The rest of the text. Raises OutputRejected where `visible_output` does."""
        if stop_reason in ("length", "abort"):
            return self._pieces.add(self._held) + self._pieces.finish()
        if self._held or self._shown_any:
            shown = [-1] if self._shown_any else []  # stands for everything that was shown
            everything = [*shown, *self._held]
            try:
                visible_output(everything, stop_reason, self._stops, stop_strings=self._stop_strings)
            except OutputRejected as error:
                raise OutputRejected(
                    str(error).replace("ends with -1,", f"ends with {self._last},")
                ) from None
        return self._pieces.finish()


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, by character: how byte-level vocabularies write bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    moved = 0
    for byte in range(256):
        if byte not in printable:
            alphabet[chr(256 + moved)] = byte
            moved += 1
    return alphabet
