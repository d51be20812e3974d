"""Messages that were seen before, found again in a chat's body by their bytes. One thread's; nothing here
knows the arena, JSON's rules, templates or tokenizers: those who fill it do."""

from typing import final

@final
class Message:
    """A message as it stood in a body. `raw` is valid JSON of an object; `role` a number from 0 to 255, -1
    where the message is of another kind than this is for. In `context` (any object) it has these token
    ids."""

    def __new__(cls, raw: bytes, role: int) -> Message: ...
    @property
    def raw(self) -> bytes: ...
    @property
    def role(self) -> int: ...
    @property
    def context(self) -> object: ...
    @property
    def ids(self) -> bytes:
        """int32."""
    @property
    def text(self) -> bytes:
        """The same as decimal text, each followed by a comma."""
    asked: int
    answers: int
    """64 bits: which questions about the message are answered, and which of them by yes."""

@final
class Plan:
    """What stands around messages: `ids` and `text` (as a Message's) before each, and behind the last."""

    def __new__(
        cls,
        contexts: tuple[object, ...],
        ids: tuple[bytes, ...],
        text: tuple[bytes, ...],
        guards: tuple[tuple[int, int, int], ...] = (),
    ) -> Plan:
        """`guards`: (place of a message, questions about it, those that must be answered by yes), as bits.
        BadArgument: not one more literal than contexts; a guard that makes no sense."""
    def fits(self, messages: list[Message]) -> int | None:
        """None: the guards are met; −1: they are not; else the place of a message that lacks an answer.
        BadArgument: another number of messages."""
    @property
    def contexts(self) -> tuple[object, ...]: ...
    @property
    def ids(self) -> tuple[bytes, ...]: ...
    @property
    def text(self) -> tuple[bytes, ...]: ...
    def prompt(self, messages: list[Message]) -> tuple[bytes, bytes] | int:
        """(ids, text) of messages and literals in order, or the place of the first message that has another
        context. BadArgument: another number of messages."""

@final
class KnownMessages:
    """A bounded cache: two generations of at most half of `limit_bytes` each (and one message more)."""

    def __new__(cls, limit_bytes: int) -> KnownMessages: ...
    def find(self, body: bytes) -> tuple[list[Message | None], list[tuple[int, int, int]], int, int] | None:
        """The messages of a chat's body: known ones; (place, start, stop) of the others; where the array
        starts and stops. None: a body of another form. Holds on the conditions that csrc/messages.h states:
        the caller must parse the others, and the body with something else in place of the array."""
    def add(self, message: Message, context: object, ids: bytes, text: bytes) -> None:
        """Give the message its ids in this context, and keep it."""
    @staticmethod
    def roles(messages: list[Message]) -> bytes | None:
        """The roles' numbers, a byte each; None if one of the messages is of another kind."""
    @property
    def size_bytes(self) -> int:
        """What the young generation holds."""
