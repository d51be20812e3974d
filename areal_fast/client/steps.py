"""What a call is made of, without I/O and clocks: a generator of steps that a driver carries out.

A call yields an `Ask` (one HTTP request) and is sent its `Answer`; a `Wait`; a `Work` (a function that may
block, and is sent its result); or a `Together` (several calls at once, and is sent their results in order).
What goes wrong with a step is thrown into the call. So the rules (what is asked, what is repeated, what a
reply means) stand once, and `blocking.py` and `awaiting.py` only carry steps out, each in its own way.

Repeats. A request is sent again, after a wait that doubles, while tries are left and
  - nothing of it was sent (no connection), or
  - the connection broke, or the server was too busy to do anything (503), and the call says that it is
    `safe`: it reads, or doing it twice is doing it once.
Never after a 4xx, which would be the same again, and never after a time-out, which would double the time the
caller has set. The wait is random in its upper half, so that many clients do not come back together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from areal_fast.client.errors import BadReply, ClientError, Unreachable, error_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

T = TypeVar("T")

JSON = ("Content-Type", "application/json")
FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 1.0
RETRIES = 5
"""Together up to 1.6 s of waiting: a worker that was killed is back in about one; others serve meanwhile."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. url: the server's base URL. body: pieces that are sent one after another."""

    url: str
    method: str
    path: str
    body: tuple[Buffer, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    safe: bool = False

    @property
    def what(self) -> str:
        """How errors name it: "GET http://host:1234/health"."""
        return f"{self.method} {self.url}{self.path}"


@dataclass(slots=True)
class Answer:
    """A whole reply. headers: names in lower case. body: memory that belongs to this answer alone and may be
    written, so that tensors can be made over it without a copy."""

    status: int
    headers: Mapping[str, str]
    body: memoryview


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """`call()` may block for long; `brief` says that it will not, and need not leave the event loop."""

    call: Callable[[], Any]
    brief: bool = False


@dataclass(frozen=True, slots=True)
class Together:
    calls: Sequence[Steps[Any]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Request:
    """One request that was made, for who wants to count them; a repeat is another one. Times:
    time.monotonic(). error: why there was no whole reply."""

    method: str
    path: str
    began: float
    ended: float
    error: ClientError | None


Observer = Callable[[Request], None]
Step = Ask | Wait | Work | Together
Steps = Generator[Step, Any, T]


def ask(request: Ask, retries: int = RETRIES, *, expect: tuple[int, ...] = ()) -> Steps[Answer]:
    """Send, with the repeats above. ProxyError for a status ≥ 400 that is not in `expect`; Unreachable,
    TimedOut."""
    for attempt in range(retries + 1):
        last = attempt == retries
        try:
            answer: Answer = yield request
        except Unreachable as error:
            if last or (error.sent and not request.safe):
                raise
        else:
            if answer.status < 400 or answer.status in expect:
                return answer
            if last or answer.status != 503 or not request.safe:
                raise error_of(request.what, answer.status, bytes(answer.body))
        yield Wait(wait_s(attempt))
    raise AssertionError("unreachable")


def wait_s(attempt: int) -> float:
    """Seconds before the repeat after attempt 0, 1, 2…"""
    longest = min(FIRST_WAIT_S * 2.0**attempt, LONGEST_WAIT_S)
    return random.uniform(longest / 2, longest)


def work(call: Callable[[], T], *, brief: bool = False) -> Steps[T]:
    result: T = yield Work(call, brief)
    return result


def together(calls: Sequence[Steps[T]]) -> Steps[list[T]]:
    """All of them, at once; their results in order. The first error, after all have ended."""
    if len(calls) == 1:
        return [(yield from calls[0])]
    results: list[T] = yield Together(calls)
    return results


def decoded(answer: Answer, kind: type[T], what: str) -> T:
    """The JSON reply as `kind`. BadReply."""
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        shown = bytes(answer.body[:100]).decode(errors="replace")
        raise BadReply(f"{what} answered what no data proxy does ({error}): {shown!r}") from None


def bearer(key: str | None) -> tuple[tuple[str, str], ...]:
    """The header that shows this key, if there is one."""
    return () if key is None else (("Authorization", f"Bearer {key}"),)
