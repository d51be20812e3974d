"""Messages that were seen before, found again in a chat's body by their bytes. One thread's. Nothing here
knows the arena, templates or tokenizers, and of JSON only how a plain message is written: a Maker does."""

from typing import Any, Protocol, final

@final
class Context:
    """What stands around a content, up to the special token that ends its segment (none: the text's end), and
    whether the content stands there without the blanks around it."""

    def __new__(cls, before: str, after: str, until: str, trim: bool) -> Context: ...
    @property
    def before(self) -> str: ...
    @property
    def after(self) -> str: ...
    @property
    def until(self) -> str: ...
    @property
    def trim(self) -> bool: ...

@final
class Message:
    """A message as it stood in a body."""

    def __new__(cls, role: int) -> Message:
        """BadArgument: the role is no number from 0 to 255."""
    @property
    def role(self) -> int: ...
    @property
    def context(self) -> Context | None:
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
        contexts: tuple[Context, ...],
        literals: tuple[bytes, ...],
        guards: tuple[tuple[int, int, int], ...] = (),
    ) -> Plan:
        """`guards`: (place of a message, questions about it, those that must be answered by yes), as bits.
        BadArgument: not one more literal than contexts; a guard that makes no sense."""
    @property
    def contexts(self) -> tuple[Context, ...]: ...
    @property
    def literals(self) -> tuple[bytes, ...]: ...

@final
class Rest:
    """A chat but for its messages, and the plans for chats like it by their roles (a byte each); None:
    there is none, nor will be."""

    def __new__(cls, chat: Any, plans: dict[bytes, list[Plan] | None]) -> Rest: ...
    @property
    def chat(self) -> Any: ...
    @property
    def plans(self) -> dict[bytes, list[Plan] | None]: ...

class Maker(Protocol):
    """Who makes what is not known yet. Whatever it raises comes out of `take`."""

    def rest(self, before: bytes, after: bytes) -> Rest | None:
        """The body's beginning up to the array of messages, and its end from there. None: not to be taken."""
    def read(self, text: bytes) -> tuple[str, str] | None:
        """Role and content of a message that is not plain; None: not to be taken."""
    def answer(self, message: Message, content: str) -> None:
        """Set `asked` and `answers`: to be called again when there are more questions."""
    def plan(self, rest: Rest, roles: bytes, names: list[str], contents: list[str]) -> Plan | None:
        """A plan for these messages, kept in rest.plans; None: not to be taken."""
    def is_cut(self, segment: str, until: str) -> bool:
        """Does `until`, where it is not empty, cut `segment` + `until` there, and nothing else before?"""
    def encode(self, segment: str, work: int) -> tuple[bytes, int] | None:
        """int32 ids of text in which nothing cuts, and how much work that was; None: more than `work`."""

@final
class KnownMessages:
    """A bounded cache: two generations of at most half of `limit_bytes` each (and one message more), and
    rests in an eighth of it."""

    def __new__(cls, limit_bytes: int, maker: Maker, starts: str) -> KnownMessages:
        """`starts`: the first characters of all texts that cut."""
    def take(self, body: bytes, work: int) -> tuple[Any, bytes] | None:
        """The chat in a body but for its messages, and the ids of its prompt (int32); None: go another way.
        `work`: what may be encoded, in the Maker's measure.

        Holds on the conditions that csrc/messages.h states: the Maker must parse the rest with an array of an
        object in place of the messages, and what it is given to read."""
    def forget_rests(self) -> None: ...
    @property
    def size_bytes(self) -> int:
        """What the young generation of messages holds."""

def fingerprint(data: bytes) -> bytes:
    """16 bytes by which to tell data apart that nobody made to be alike; the same in every process."""

def digest(seed: bytes, data: bytes) -> bytes:
    """16 bytes by which KnownMessages tells messages apart, for a seed of 16 bytes that nobody knows.
    BadArgument: a seed of another size."""
