"""A chat's reply written in one go. Nothing here knows what it says."""

from typing import final

@final
class Form:
    """What stands around the members that change: nine pieces, around the interaction's id, the
    finish_reason, the content, the tool calls, the time, and the tokens of the answer, the prompt and
    both."""

    def __new__(cls, *pieces: bytes) -> Form:
        """BadArgument: not nine of bytes."""
    def fill(
        self,
        id: str,
        reason: str,
        content: str,
        calls: bytes,
        created: int,
        prompt_tokens: int,
        completion_tokens: int,
    ) -> bytes:
        """The reply. `content` is escaped as the inside of a JSON string; `id` and `reason` go as they are,
        `calls` as JSON. Numbers are not negative, or OverflowError. UnicodeEncodeError: lone surrogates."""
