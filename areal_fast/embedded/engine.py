"""The embedded engine's state: what is generating, how fast, whether paused, and what fails on purpose.

Theory. A `Generation` is an answer that is complete from the start (answers.py) and is let out token by
token: token k is due at `started + request latency + k × token latency`. Nothing runs in between; a
stream sleeps until its next chunk, a plain request until its last token. Pausing with mode "abort" ends
what is generating with the tokens that were due by then, as SGLang does; any other mode stops the clock
until the engine continues. While paused, new generations wait before their first token.

Faults count generation requests, each kind on its own: with `fail_every: 3` the 3rd, 6th, 9th… since the
switches were last set fails. If several are due at once, the order is hang, drop, fail, abort.

Invariants: `in_flight` holds a generation from `begin` to `end`; an ended one never produces again; the
counters of `Stats` only grow. All of it belongs to one event loop's thread. No HTTP here.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from enum import Enum
from typing import Annotated, Literal

import msgspec

from areal_fast.embedded.answers import Answer, Book, TokenRange, Wanted

ABORT_BEFORE_PREFILL = "Abort before prefill"


def _number(about: str, least: float = 0, most: float | None = None) -> msgspec.Meta:
    return msgspec.Meta(ge=least, le=most, description=about)


class Switches(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What can be set, by a flag of the same name or by POST /embedded/configure. 0 or "" is off."""

    request_latency_s: Annotated[float, _number("seconds before a request's first token", 0, 3600)] = 0.0
    token_latency_s: Annotated[float, _number("seconds per token", 0, 3600)] = 0.0
    chunk_tokens: Annotated[int, _number("tokens per event of a stream", 1)] = 8
    output_tokens: Annotated[
        int,
        _number("length of every answer, its eos included, as far as the request's budget goes", 0, 1 << 20),
    ] = 0
    fail_every: Annotated[int, _number("every n-th request fails with fail_status")] = 0
    fail_status: Annotated[int, _number("status of such a failure", 400, 599)] = 500
    abort_every: Annotated[int, _number("every n-th request is aborted after abort_after_tokens")] = 0
    abort_after_tokens: Annotated[int, _number("tokens of such an abort; 0: before prefill")] = 8
    drop_every: Annotated[
        int, _number("every n-th request's connection breaks before the answer is whole")
    ] = 0
    hang_every: Annotated[int, _number("every n-th request is never answered")] = 0
    logprobs: Annotated[
        Literal["send", "omit", "minus-9999"],
        msgspec.Meta(description="send log-probs, leave them out, or send -9999 (vLLM's sign for none)"),
    ] = "send"
    routed_experts: Annotated[
        str,
        msgspec.Meta(
            pattern=r"^([1-9]\d{0,3}x[1-9]\d{0,3})?$",
            description="LAYERSxTOPK: a token's shape in the routed experts that a request may ask for",
        ),
    ] = ""
    vary_with_version: Annotated[bool, msgspec.Meta(description="a weight update changes the answers")] = (
        False
    )
    keep_bodies: Annotated[
        int, _number("how many of the last generation requests' bodies GET /embedded/stats shows", 0, 10_000)
    ] = 0


class Stats(msgspec.Struct):
    """Counters since the start. `requests` are generation requests; each ends in one of the next six."""

    requests: int = 0
    completed: int = 0
    aborted: int = 0
    failed: int = 0
    dropped: int = 0
    hung: int = 0
    client_gone: int = 0
    tokens: int = 0
    pauses: int = 0
    weight_updates: int = 0


class Fault(Enum):
    """What the switches have in store for a request."""

    NONE = ""
    HANG = "hung"
    DROP = "dropped"
    FAIL = "failed"
    ABORT = "aborted"


class Generation:
    """One request's answer on its way out: the first `end` tokens of `answer` are or will be the client's."""

    __slots__ = (
        "abort_at",
        "abort_message",
        "answer",
        "began",
        "cut",
        "id",
        "prompt_tokens",
        "ran",
        "since",
        "waiter",
    )

    def __init__(self, id: str, prompt_tokens: int, answer: Answer) -> None:
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.answer = answer
        self.began = time.monotonic()
        self.since: float | None = None
        """Since when its clock runs; None while the engine is paused."""
        self.ran = 0.0
        """Seconds that its clock ran before."""
        self.abort_at: int | None = None
        """The number of tokens after which it aborts, if it does."""
        self.abort_message = ""
        self.cut = False
        """Ended by an abort from outside: no waiting for what is due."""
        self.waiter: asyncio.Future[None] | None = None

    @property
    def end(self) -> int:
        return self.answer.count if self.abort_at is None else self.abort_at

    @property
    def aborted(self) -> bool:
        return self.abort_at is not None

    def poke(self) -> None:
        """Something changed: whoever waits for its tokens must look again."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def stop_clock(self, now: float) -> None:
        if self.since is not None:
            self.ran += now - self.since
            self.since = None
            self.poke()

    def start_clock(self, now: float) -> None:
        if self.since is None:
            self.since = now
            self.poke()


class EmbeddedEngine:
    """See the file's head. `tokens` says which ids answers are made of, `eos_id` which one ends them."""

    def __init__(self, tokens: TokenRange, eos_id: int | None, switches: Switches | None = None) -> None:
        self.book = Book(tokens, eos_id)
        self.switches = switches or Switches()
        self.stats = Stats()
        self.paused = False
        self.asleep = False
        self.weight_version = "0"
        self.model_path = "embedded"
        self.in_flight: dict[str, Generation] = {}
        self.bodies: deque[dict[str, str]] = deque(maxlen=self.switches.keep_bodies)
        self._faults = 0
        self._prefix = os.urandom(12).hex()
        self._made = 0

    def configure(self, changes: dict[str, object]) -> None:
        """Set some switches; fault counts begin anew. A latency holds at once, for what is generating, too.
        Raises msgspec.ValidationError and then sets none."""
        merged = {**msgspec.structs.asdict(self.switches), **changes}
        self.switches = msgspec.convert(merged, Switches)
        self.bodies = deque(self.bodies, maxlen=self.switches.keep_bodies)
        self._faults = 0
        for generation in self.in_flight.values():
            generation.poke()

    def next_fault(self) -> Fault:
        """Count a generation request and say what shall happen to it."""
        self.stats.requests += 1
        self._faults += 1
        n, switches = self._faults, self.switches
        for every, fault in (
            (switches.hang_every, Fault.HANG),
            (switches.drop_every, Fault.DROP),
            (switches.fail_every, Fault.FAIL),
            (switches.abort_every, Fault.ABORT),
        ):
            if every and n % every == 0:
                return fault
        return Fault.NONE

    def answer(self, prompt: bytes, wanted: Wanted) -> Answer:
        """The answer to a prompt of canonical JSON ids under the switches of now."""
        wanted.fixed_tokens = self.switches.output_tokens
        salt = hash_text(self.weight_version) if self.switches.vary_with_version else 0
        return self.book.answer(prompt, wanted, salt)

    # -- the life of a generation ------------------------------------------------------------------------
    def begin(self, prompt_tokens: int, answer: Answer, fault: Fault, rid: str = "") -> Generation:
        """Start a generation. `rid`: the caller's own id, for abort_request."""
        self._made += 1
        generation = Generation(rid or f"{self._prefix}{self._made:08x}", prompt_tokens, answer)
        if fault is Fault.ABORT:
            generation.abort_at = min(self.switches.abort_after_tokens, answer.count)
            generation.abort_message = "Abort as configured" if generation.abort_at else ABORT_BEFORE_PREFILL
        return generation

    @property
    def at_once(self) -> bool:
        """Whether a generation that begins now can be answered now."""
        switches = self.switches
        return not (self.paused or switches.token_latency_s or switches.request_latency_s)

    def track(self, generation: Generation) -> None:
        """It will take time: from now on it can be paused and aborted, until `end`."""
        if generation.id in self.in_flight:
            generation.id = f"{generation.id}-{self._made}"  # the caller uses one id twice
        self.in_flight[generation.id] = generation
        if not self.paused:
            generation.start_clock(time.monotonic())

    async def reach(self, generation: Generation, count: int) -> int:
        """Wait until `count` tokens are due or the generation has ended before; how many there then are."""
        loop = asyncio.get_running_loop()
        while True:
            now = time.monotonic()
            goal = min(count, generation.end)
            if generation.cut or self._due(generation, now) >= goal:
                return goal
            timer = None
            if generation.since is not None:
                wait = generation.since + self._time_of(goal) - generation.ran - now
                timer = loop.call_later(wait, generation.poke)
            generation.waiter = loop.create_future()
            try:
                await generation.waiter
            finally:
                generation.waiter = None
                if timer is not None:
                    timer.cancel()

    def end(self, generation: Generation, outcome: str) -> None:
        """It was answered (`completed` or `aborted`) or given up (another counter's name)."""
        if self.in_flight.get(generation.id) is generation:
            del self.in_flight[generation.id]
        if outcome in ("completed", "aborted"):
            self.stats.tokens += generation.end
        setattr(self.stats, outcome, getattr(self.stats, outcome) + 1)

    def abort(self, generation: Generation, message: str) -> None:
        """End it with the tokens that are due by now."""
        made = self._due(generation, time.monotonic())
        if made < generation.end:
            generation.abort_at = made
            generation.abort_message = message if made else ABORT_BEFORE_PREFILL
            generation.cut = True
            generation.poke()

    def _time_of(self, count: int) -> float:
        return self.switches.request_latency_s + count * self.switches.token_latency_s

    def _due(self, generation: Generation, now: float) -> int:
        """How many tokens are due at `now`."""
        if generation.since is None and not generation.ran:
            return 0
        ran = generation.ran + (0.0 if generation.since is None else now - generation.since)
        ran -= self.switches.request_latency_s
        if ran < 0:
            return 0
        per_token = self.switches.token_latency_s
        return min(generation.end, int(ran / per_token + 1e-6)) if per_token else generation.end

    # -- the operator ------------------------------------------------------------------------------------
    def pause(self, mode: str) -> int:
        """Pause. mode "abort" ends what is generating, any other holds it. Returns how many were ended."""
        self.paused = True
        self.stats.pauses += 1
        now = time.monotonic()
        running = [generation for generation in self.in_flight.values() if generation.since is not None]
        for generation in running:
            if mode == "abort":
                self.abort(generation, "Abort as the engine was paused")
            else:
                generation.stop_clock(now)
        return len(running) if mode == "abort" else 0

    def resume(self) -> None:
        self.paused = False
        now = time.monotonic()
        for generation in self.in_flight.values():
            generation.start_clock(now)

    def abort_requests(self, rid: str, every: bool) -> int:
        """Abort the generations whose id begins with `rid` (as SGLang matches), or all. Returns how many."""
        chosen = [g for i, g in self.in_flight.items() if every or (rid and i.startswith(rid))]
        for generation in chosen:
            self.abort(generation, "Abort on request")
        return len(chosen)

    def update_weights(self, model_path: str, version: str | None) -> None:
        """New weights are in place: their version is the given one, else the old one plus one."""
        self.stats.weight_updates += 1
        if model_path:
            self.model_path = model_path
        if version is not None:
            self.weight_version = version
        else:
            old = self.weight_version
            self.weight_version = str(int(old) + 1) if old.isdecimal() else f"{old}+1"


def hash_text(text: str) -> int:
    """A stable 63-bit number of a text (Python's own hash differs from process to process)."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & ((1 << 63) - 1)
    return value
