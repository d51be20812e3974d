"""Tool calls out of a model's text, piece by piece: the machine that all formats share. Pure state, no I/O.

Text goes in as it is generated; out come content that is certain and calls that are complete. A format (one
file a family) only says which markers open a block and how a block is read. The machine is in one of three
places: outside, inside reasoning (whose text is content and is never looked at for calls), or in a block.

When a block opens, content stops: what may turn out to be a call is held back, with the white space before
it. The first good call settles it: the held text is dropped, and so is all text after, as most of SGLang's
parsers drop it (those of llama3, mistral and gpt-oss keep some of it). If the answer ends without a good
call, the held text leaves as plain text: a call that cannot be read is never an error. Calls leave whole,
because half a call could not be taken back.

Invariants: content and calls, joined, do not depend on how the text was cut; without calls the content is
the text, character by character; content never changes after it left; every character is looked at a
bounded number of times, whatever a model writes.

Source: areal.experimental.openai.tool_call_parser (what is reasoning, what stays in content);
sglang.srt.function_call (formats). PyPI has no parser library of this kind without an engine attached
(tool-parser is a placeholder, openai-harmony reads one family and only token ids).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple

from areal_fast.engine.tools.values import Call, Tools


class Block(NamedTuple):
    """A block that was read: calls, and where in the text it ends."""

    calls: list[Call]
    end: int


class More:
    """The block goes on: ask again when there is more text."""


class Bad:
    """It is no block after all: only its opener is skipped."""


MORE: Final = More()
BAD: Final = Bad()


class Format:
    """A format's state for one answer. Subclasses read blocks."""

    openers: ClassVar[tuple[str, ...]]
    """Markers that open a block. None is a prefix of another."""
    strips: ClassVar[bool] = True
    """Is white space before a call dropped?"""
    ends_calls: ClassVar[bool] = False
    """Do these models end an answer with a call by a token of its own, which is neither eos nor pad?"""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    def opens_at_start(self, first: str) -> bool:
        """Does an answer whose first character that is no white space is `first` begin with a block?"""
        return False

    def block(self, text: str, start: int, final: bool) -> Block | More | Bad:
        """Read the block whose opener is at `start`. Asked again with the same beginning and more behind
        it; `final`: there will be no more, and MORE means that the block was never closed. A block that
        cannot be read ends where that was noticed: a Block without calls."""
        raise NotImplementedError

    def moved(self, by: int) -> None:
        """`by` characters were cut off the front of the text (positions kept between calls shrink)."""


class CallStream:
    """One answer's text, read for tool calls."""

    def __init__(self, form: Format, reasoning: tuple[str, str] | None, *, starts_inside: bool) -> None:
        """`reasoning`: the tags around it, or None; `starts_inside`: the prompt opened it already."""
        self._form = form
        self._think, self._think_end = reasoning or ("", "")
        self._markers = [*form.openers, self._think] if self._think else list(form.openers)
        self._any_marker = re.compile("|".join(map(re.escape, self._markers)))
        self._text = ""
        self._sent = 0  # characters of the text that left as content
        self._at = 0  # everything before is settled
        self._solid = 0  # white space before is content whatever follows
        self._limit = -1  # where the first block opened: content ends there, unless there was no call
        self._block = -1  # where the open block begins
        self._inside = bool(reasoning) and starts_inside
        self._fresh = True  # nothing but white space so far, since the start or the end of reasoning
        self.called = False
        """Was there a call?"""

    def add(self, text: str) -> tuple[str, list[Call]]:
        """(content, calls) that are certain now; the content comes first."""
        self._text += text
        return self._run(final=False)

    def finish(self) -> tuple[str, list[Call]]:
        """The rest. Afterwards the object is spent."""
        content, calls = self._run(final=True)
        if not self.called:
            content += self._text[self._sent :]
        return content, calls

    # -- the machine
    # ------------------------------------------------------------------------------------------------

    def _run(self, *, final: bool) -> tuple[str, list[Call]]:
        calls: list[Call] = []
        going = True
        while going:
            if self._block >= 0:
                going = self._read_block(calls, final=final)
            elif self._inside:
                going = self._read_reasoning()
            else:
                going = self._look_for_marker()
        end = self._at if self._limit < 0 else self._limit
        if self._form.strips:
            # white space before a call is dropped, and it is not known yet whether one follows
            low = max(self._sent, self._solid)
            end = low + len(self._text[low:end].rstrip())
        content = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        self._shorten()
        return content, calls

    def _look_for_marker(self) -> bool:
        """Go to the next marker. False: there is none yet."""
        text = self._text
        if self._fresh:
            rest = len(text) - len(text[self._at :].lstrip())
            if rest == len(text):
                return False
            self._fresh = False
            if self._form.opens_at_start(text[rest]):
                self._open(rest)
                return True
        found = self._any_marker.search(text, self._at)
        if found is None:
            self._at = max(self._at, len(text) - _begun(text, self._markers))
            return False
        if found.group() == self._think:
            self._at = found.end()
            self._inside = True
        else:
            self._open(found.start())
        return True

    def _open(self, start: int) -> None:
        self._block = self._at = start
        if self._limit < 0:
            self._limit = start

    def _read_reasoning(self) -> bool:
        """Go to the end of reasoning. False: it is not there yet."""
        text, tag = self._text, self._think_end
        at = text.find(tag, self._at)
        if at >= 0:
            self._at = at + len(tag)
            self._inside, self._fresh = False, True
        else:
            self._at = max(self._at, len(text) - _begun(text, (tag,)))
        self._solid = self._at
        return at >= 0

    def _read_block(self, calls: list[Call], *, final: bool) -> bool:
        """Read the open block. False: it goes on."""
        read = self._form.block(self._text, self._block, final)
        if isinstance(read, More):
            if final:  # cut off: what stands in it is not looked at again
                self._block, self._at = -1, len(self._text)
            return False
        if isinstance(read, Bad):
            self._at = self._block + 1
        else:
            self._at = max(read.end, self._block + 1)
            calls += read.calls
            self.called = self.called or bool(read.calls)
        self._block = -1
        return True

    def _shorten(self) -> None:
        """Forget text that nobody asks for again, now and then."""
        done = self._sent
        if self.called:
            done = self._at if self._block < 0 else self._block
        if done < _KEEP:
            return
        self._text = self._text[done:]
        self._form.moved(done)
        self._sent = max(0, self._sent - done)
        self._solid = max(0, self._solid - done)
        self._at -= done
        if self._block >= 0:
            self._block -= done
        if self._limit >= 0:
            self._limit = max(0, self._limit - done)


_KEEP = 4096


def _begun(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a marker without completing it."""
    longest = max(map(len, markers), default=1)
    for length in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-length:]
        for marker in markers:
            if marker.startswith(tail):
                return length
    return 0
