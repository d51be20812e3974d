"""The worker's side of tokenizer_helper.py: a Tokenizer whose work is done by a process with transformers
in it.

Questions go one at a time, from a thread, so the loop never waits on the pipe. Slow (a template, an
encoding and two pipe trips a turn, and no segment cache), but exact by construction, and the only way for
folders that need code.

The helper dies with its worker (its stdin ends). If the helper dies first, the next question starts
another; a second death in a row is an error to the caller.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from array import array
from collections.abc import Mapping, Sequence
from typing import IO, Any, cast

from areal_fast.engine.detokenize import Pieces, WholePieces
from areal_fast.engine.folder import TokenizerError
from areal_fast.engine.segments import Prompt
from areal_fast.engine.templates import TemplateFailed, check_template_kwargs
from areal_fast.engine.tokenizer_helper import read_frame, write_frame


class HelperTokenizer:
    """A Tokenizer (see tokenizer.py) in another process. Safe from any thread."""

    def __init__(self, path: str, *, trust_remote_code: bool = False) -> None:
        """Starts the helper and waits until it has loaded the folder: seconds. Raises TokenizerError."""
        self._command = [sys.executable, "-m", "areal_fast.engine.tokenizer_helper", path]
        if trust_remote_code:
            self._command.append("--trust-remote-code")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        facts = self._start()
        self.eos_id: int | None = facts["eos"]
        self.pad_id: int | None = facts["pad"]
        self.vocab_size: int = facts["size"]
        self.stop_ids: list[int] = sorted({i for i in (self.eos_id, self.pad_id) if i is not None})

    def _start(self) -> dict[str, Any]:
        # its own session: signals for the proxy's process group are not for it, the end of its stdin is
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            first = read_frame(cast("IO[bytes]", self._process.stdout))  # type: ignore[arg-type]
        except EOFError:
            self.close()
            raise TokenizerError(
                "the tokenizer's helper process ended before it had loaded the folder"
            ) from None
        if "error" in first:
            self.close()
            raise TokenizerError(f"transformers cannot load the tokenizer: {first['error']}")
        facts: dict[str, Any] = first["ok"]
        return facts

    def close(self) -> None:
        """End the helper and reap it."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass  # it was gone already
        process.kill()  # its work has no effects: there is nothing to wind down
        process.wait()

    def _ask(self, *question: Any) -> Any:
        with self._lock:
            for _ in range(2):
                try:
                    if self._process is None:
                        self._start()
                    process = cast("subprocess.Popen[bytes]", self._process)
                    write_frame(process.stdin, question)  # type: ignore[arg-type]
                    answer = read_frame(process.stdout)  # type: ignore[arg-type]
                    break
                except (EOFError, BrokenPipeError):
                    self.close()
            else:
                raise TokenizerError("the tokenizer's helper process died twice over one question")
        if "refused" in answer:
            raise TemplateFailed(answer["refused"])
        return answer["ok"]

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> Prompt:
        check_template_kwargs(kwargs)
        return Prompt.of(self._ask("encode_chat", messages, tools, dict(kwargs)))

    async def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> Prompt:
        return await asyncio.to_thread(self.encode_chat, messages, tools, kwargs)

    def decode(self, ids: Sequence[int]) -> str:
        """Blocks for a pipe trip."""
        text: str = self._ask("decode", ids.tolist() if isinstance(ids, array) else list(ids))
        return text

    def incremental(self) -> Pieces:
        return WholePieces(self.decode)
