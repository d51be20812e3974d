"""Messages that were seen before, found again in a chat's body by their bytes. One thread's. Nothing here
knows the arena, JSON's rules, templates or tokenizers: those who fill it do."""

from typing import final

@final
class Message:
    """A message as it stood in a body. `role`: a number from 0 to 255."""

    def __new__(cls, role: int) -> Message: ...
    @property
    def role(self) -> int: ...
    @property
    def context(self) -> object:
        """In what surroundings it has `ids`; None: it has none yet."""
    @property
    def ids(self) -> bytes:
        """int32."""
    asked: int
    answers: int
    """64 bits: which questions about the message are answered, and which of them by yes."""

@final
class Plan:
    """What stands around messages: the ids of the literals before each, and behind the last."""

    def __new__(
        cls,
        contexts: tuple[object, ...],
        literals: tuple[bytes, ...],
        guards: tuple[tuple[int, int, int], ...] = (),
    ) -> Plan:
        """`guards`: (place of a message, questions about it, those that must be answered by yes), as bits.
        BadArgument: not one more literal than contexts; a guard that makes no sense."""
    @property
    def contexts(self) -> tuple[object, ...]: ...
    @property
    def literals(self) -> tuple[bytes, ...]: ...
    def fits(self, messages: list[Message]) -> int | None:
        """None: the guards are met; −1: they are not; else the place of a message that lacks an answer.
        BadArgument: another number of messages."""
    def prompt(self, messages: list[Message]) -> bytes | int:
        """The ids of messages and literals in order, or the place of the first message that has another
        context. BadArgument: another number of messages."""

@final
class KnownMessages:
    """A bounded cache: two generations of at most half of `limit_bytes` each (and one message more)."""

    def __new__(cls, limit_bytes: int) -> KnownMessages: ...
    def find(self, body: bytes) -> tuple[list[Message | None], list[int], int, int] | None:
        """The messages of a chat's body, None for unknown ones, whose places come next; where the array
        starts and stops. None: a body of another form. Holds on the conditions that csrc/messages.h states:
        the caller must parse the unknown ones, and the body with something else in place of the array."""
    def place(self, i: int) -> tuple[int, int]:
        """Where the i-th message of the last body looked at starts and stops. BadArgument: there is none."""
    def add(self, body: bytes, i: int, message: Message, context: object, ids: bytes) -> None:
        """Give the i-th message of `body`, the last one looked at, its ids in this context, and keep it.
        BadArgument: there is no such message."""
    @staticmethod
    def roles(messages: list[Message]) -> bytes:
        """The roles, a byte each."""
    @property
    def size_bytes(self) -> int:
        """What the young generation holds."""

def fingerprint(data: bytes) -> bytes:
    """16 bytes by which to tell data apart that nobody made to be alike; the same in every process."""

def digest(seed: bytes, data: bytes) -> bytes:
    """16 bytes by which KnownMessages tells messages apart, for a seed of 16 bytes that nobody knows.
    BadArgument: a seed of another size."""
