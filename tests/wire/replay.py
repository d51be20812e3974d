"""Plays a recorded transcript against a running proxy and judges every step.

Steps go out in the recorded order, one at a time, unless the file's plan says that a request was in flight
while others were made. Before each step the stand-in engine is told what the recorded engine must have
answered: the tokens of the recorded reply, or what the plan says. After it, the reply is held against the
recording or against the table of differences, and what the engine was sent against what it was sent then.

The verdict is a list of complaints a line; an empty one is a pass.
"""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from differences import DIFFERENCES, HELLO, OBSERVATIONS, PLANS, RULES, Differs, OutOfScope, Plan
from exchange import Names, Reply, Step, Transcript, compare, events, match, send
from standin import EOS, Answer, Call, StandIn

POLL_TIMEOUT_S = 90.0
POLL_PAUSE_S = 0.05
HELD = ("sessions_closing", "sessions_detached", "sessions_dumped")
CHAT_PATHS = ("/chat/completions", "/v1/chat/completions")
# Where ours says more than the recording's dialect: both forms of a start, and health's own fields.
EXTRA_MEMBERS = {"/rl/start_session": ["$"], "/health": ["$"]}
STRUCT_OF = {"torch.int64": "q", "torch.float32": "f", "torch.bool": "?", "torch.int32": "i"}


T = TypeVar("T")


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


@dataclass
class Chat:
    """A chat that was answered: whose it was ("" standalone) and whether the client wanted it stored."""

    id: str
    session: str
    stored: bool


@dataclass
class Played:
    """What checks may look at. `reply`, `step` and `calls` are those of the step being judged, `calls_of`
    what the engine was sent for each line; `version_checked` spares 1.0's batch the recorded versions.
    """

    transcript: Transcript
    address: str
    engine: StandIn
    receiver: StandIn
    names: Names
    folder: Path
    chats: list[Chat] = field(default_factory=list)
    calls_of: dict[int, list[Call]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    step: Step | None = None
    reply: Reply = field(default_factory=lambda: Reply(0))
    calls: list[Call] = field(default_factory=list)
    version_checked: bool = True

    @staticmethod
    def tensor(item: dict[str, Any]) -> list[Any]:
        """The values of a tensor on the wire, flat."""
        data = base64.b64decode(item["data"])
        kind = STRUCT_OF[item["dtype"]]
        return list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))

    def fetch(self, shard_ids: list[str]) -> list[dict[str, Any]]:
        """Shards as they travel, by one batch request."""
        body = json.dumps({"shard_ids": shard_ids}).encode()
        reply = send(self.address, "POST", "/data/batch", [("Content-Type", "application/json")], body)
        fetched: list[dict[str, Any]] = reply.json()
        return fetched

    def match_calls(self, want: list[tuple[str, Any]], got: list[tuple[str, Any]]) -> list[str]:
        return match_calls(want, got, self.names)

    @staticmethod
    def wait_for(look: Callable[[], T], good: Callable[[T], bool]) -> T:
        """What `look` sees once it is good, or at the end of the watchdog's patience."""
        deadline = time.monotonic() + POLL_TIMEOUT_S
        while not good(seen := look()) and time.monotonic() < deadline:
            time.sleep(POLL_PAUSE_S)
        return seen


def answers_for(step: Step, encoder: Encoder) -> list[Answer]:
    """What the engine must have said, read off the recorded reply; nothing if the reply is no completion."""
    if step.path not in CHAT_PATHS or step.reply.status != 200 or not step.reply.body:
        return []
    if (step.reply.header("content-type") or "").startswith("text/event-stream"):
        chunks = events(step.reply.body)[:-1]
        if not chunks[0]["id"].startswith("chatcmpl-"):
            return []
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        finish, usage = chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["usage"]
    else:
        said = step.reply.json()
        if not said["id"].startswith("chatcmpl-"):
            return []
        text, usage = said["choices"][0]["message"]["content"], said["usage"]
        finish = said["choices"][0]["finish_reason"]
    tokens = encoder.encode(text)
    if finish == "stop":
        tokens += [EOS] * (usage["completion_tokens"] - len(tokens))
    if len(tokens) != usage["completion_tokens"]:
        raise ValueError(
            f"line {step.line}: {text!r} is {len(tokens)} tokens, recorded {usage['completion_tokens']}"
        )
    return [Answer(tokens, finish)]


def _checked(check: Callable[[], list[str]]) -> list[str]:
    """A check's complaints; a reply it cannot even read is one too, and must not end the replay."""
    try:
        return check()
    except (ArithmeticError, LookupError, TypeError, ValueError, OSError) as failure:
        return [f"unreadable: {type(failure).__name__}: {failure}"]


def _holds_no_session() -> Callable[[dict[str, Any]], bool]:
    """Judge of successive /health replies: no session is live, and none is being dumped, which still holds
    its id. What /health says of the arena is made now and then, by each worker (`pid`, `uptime_s`): only what
    was made after the last session had gone counts.
    """
    made: dict[Any, Any] = {}

    def judge(health: dict[str, Any]) -> bool:
        worker, when = health.get("pid"), health.get("uptime_s")
        if health["sessions"]:
            made.clear()
            return False
        if made.setdefault(worker, when) == when and worker is not None:
            return False
        return sum(count for name, count in health.get("arena", {}).items() if name in HELD) == 0

    return judge


@dataclass
class _Flight:
    """A request under way. `seen`: how many calls the engine had got when it started."""

    seen: int
    release: threading.Event = field(default_factory=threading.Event)
    replies: list[Reply] = field(default_factory=list)
    thread: threading.Thread | None = None


class Replay:
    """One transcript against one proxy. `run` returns the verdict: line → complaints, or why it is not
    judged.
    """

    def __init__(
        self,
        transcript: Transcript,
        address: str,
        engine: StandIn,
        receiver: StandIn,
        encoder: Encoder,
        folder: Path,
    ):
        self.transcript = transcript
        self.address = address
        self.encoder = encoder
        self.plan: Plan = PLANS.get(transcript.stem, Plan())
        self.expected = DIFFERENCES.get(transcript.stem, {})
        host = next((v for step in transcript.steps for k, v in step.headers if k == "Host"), "")
        known = {"127.0.0.1:9100": engine.address, "127.0.0.1:9301": receiver.address, "RIG": str(folder)}
        known |= {host: address} if host else {}
        self.played = Played(transcript, address, engine, receiver, Names(known), folder)
        self.verdict: dict[int, list[str] | OutOfScope] = {}
        self._running: dict[int, _Flight] = {}
        self._held = {session: threading.Event() for session in self.plan.holds}
        receiver.answer_always(self._answer_callback)

    def _answer_callback(self, call: Call) -> Answer:
        """By session, since callbacks of several come in no order: the planned answers, then it is taken."""
        session = call.body["session_id"]
        told = sum(c.body["session_id"] == session for c in self.played.receiver.received[: call.order])
        planned = self.plan.callbacks.get(session, ())
        answer = planned[min(told, len(planned) - 1)] if planned else Answer()
        return replace(answer, hold=self._held.get(session))

    def run(self) -> dict[int, list[str] | OutOfScope]:
        steps = {step.line: step for step in self.transcript.steps}
        in_flight = {overlap.line for overlap in self.plan.overlaps}
        for line in sorted({*steps, *self.transcript.observations}):
            for overlap in self.plan.overlaps:
                if overlap.before == line:
                    self._start(steps[overlap.line], overlap.seen)
            self._bide(line)
            if line in self.transcript.observations:
                self._observe(line)
            elif line in in_flight:
                self._finish(steps[line])
            elif not self._skipped(steps, line):
                self._step(steps[line])
            for session, until in self.plan.holds.items():
                if until == line:
                    self._held[session].set()
            for overlap in self.plan.overlaps:
                if overlap.after == line:
                    self._running[overlap.line].release.set()
        return self.verdict

    def _bide(self, line: int) -> None:
        """Let the clock run where the recording did: a fixed time, or until every session has expired."""
        if line in self.plan.pauses:
            threading.Event().wait(self.plan.pauses[line])
        if line in self.plan.empties:
            health = Step(line, "", "GET", "/health", [], b"", Reply(200), None, None)
            self.played.wait_for(lambda: self._request(health).json(), _holds_no_session())

    def _skipped(self, steps: dict[int, Step], line: int) -> bool:
        expected = self.expected.get(line)
        if isinstance(expected, OutOfScope) and not expected.sent:
            self.verdict[line] = expected
            return True
        name, following = steps[line].name, steps.get(line + 1)
        return name == self.plan.repeats and following is not None and following.name == name

    def _request(self, step: Step, hang_up: threading.Event | None = None) -> Reply:
        rewrite = self.played.names.rewrite
        headers = [(key, rewrite(value)) for key, value in step.headers]
        body = self.played.names.rewrite_bytes(step.body)
        return send(self.address, step.method, rewrite(step.path), headers, body, hang_up)

    def _prepare(self, step: Step, hold: threading.Event | None = None) -> None:
        planned = self.plan.answers.get(step.line)
        answers = list(planned) if planned is not None else answers_for(step, self.encoder)
        if (cut := self.plan.aborts.get(step.line)) is not None:
            whole = answers[0]
            answers = [Answer(whole.tokens[:cut], "abort"), replace(whole, tokens=whole.tokens[cut:])]
        if hold is not None:
            answers[:1] = [replace(answers[0] if answers else Answer([HELLO, EOS]), hold=hold)]
        self.played.engine.answer_next(*answers)

    def _start(self, step: Step, seen_by_engine: bool = True) -> None:
        """Put a request in flight; the engine holds its first answer until the overlap's end."""
        flight = _Flight(len(self.played.engine.received))
        self._prepare(step, flight.release)
        hang_up = flight.release if step.hangs_up_after_s is not None else None
        flight.thread = threading.Thread(
            target=lambda: flight.replies.append(self._request(step, hang_up)), daemon=True
        )
        flight.thread.start()
        if seen_by_engine:
            self.played.engine.wait_for_call("/generate", flight.seen)
        self._running[step.line] = flight

    def _finish(self, step: Step) -> None:
        flight = self._running.pop(step.line)
        flight.release.set()
        assert flight.thread is not None
        flight.thread.join(POLL_TIMEOUT_S * 2)
        reply = flight.replies[0] if flight.replies else Reply(0, broken="never answered")
        self._judge(step, reply, flight.seen)

    def _step(self, step: Step) -> None:
        if step.hangs_up_after_s is not None:
            self._start(step)
            self._finish(step)
            return
        seen = len(self.played.engine.received)
        self._prepare(step)
        reply = self._request(step)
        if step.line in self.plan.polls and not self._settled(step, reply):
            reply = self.played.wait_for(lambda: self._request(step), lambda came: self._settled(step, came))
        self._judge(step, reply, seen)

    def _settled(self, step: Step, reply: Reply) -> bool:
        expected = self.expected.get(step.line)
        status = expected.status if isinstance(expected, Differs) and expected.status else step.reply.status
        if reply.status == status and step.path == "/health":
            return bool(reply.json()["sessions"] == self._expected_json(step)["sessions"])
        return reply.status == status

    def _expected_json(self, step: Step) -> Any:
        expected = self.expected.get(step.line)
        body = json.loads(self.played.names.rewrite_bytes(step.reply.body))
        if isinstance(expected, Differs) and expected.change:
            body |= expected.change
        return body

    def _judge(self, step: Step, reply: Reply, seen: int) -> None:
        played = self.played
        played.step, played.reply, played.calls = step, reply, played.engine.received[seen:]
        played.calls_of[step.line] = played.calls
        # while others are in flight, what is prepared is theirs
        left_over = 0 if self._running else played.engine.forget_prepared()
        expected = self.expected.get(step.line) or next(
            (rule.differs(step) for rule in RULES if rule.applies(self.transcript, step)), None
        )
        self._note_chat(step, reply)
        if isinstance(expected, OutOfScope):
            self.verdict[step.line] = expected
            return
        found = self._against(step, reply, expected)
        if left_over and step.line not in self.plan.answers and not (expected and expected.status):
            found.append(f"the engine was asked {left_over} times less than recorded")
        if expected is None or expected.engine:
            found += self._engine_calls(step)
        self.verdict[step.line] = found

    def _against(self, step: Step, reply: Reply, expected: Differs | None) -> list[str]:
        names = self.played.names
        extra = EXTRA_MEMBERS.get(step.path, [])
        if step.hangs_up_after_s is not None:
            return []
        if expected is None:
            return compare(step.reply, reply, names, extra)
        status = expected.status or step.reply.status
        if reply.status != status:
            return [f"status {reply.status} instead of {status} ({expected.why}): {reply}"]
        found: list[str] = []
        if expected.detail is not None:
            found += _checked(lambda: match({"detail": expected.detail}, reply.json(), names))
        if expected.body is not None:
            found += match(
                json.loads(names.rewrite(json.dumps(expected.body))), reply.json(), names, "$", ["$"]
            )
        if expected.change is not None:
            found += match(self._expected_json(step), reply.json(), names, "$", extra)
        if expected.check is not None:
            found += _checked(lambda: expected.check(self.played) if expected.check else [])
        if status >= 400 and "json" not in (reply.header("content-type") or ""):
            found.append(f"an error that is not JSON: {reply}")
        return found

    def _engine_calls(self, step: Step) -> list[str]:
        if step.engine_saw is None:
            return []
        want = [(call["path"], json.loads(call["body"] or "null")) for call in step.engine_saw]
        got = [(call.path, call.body) for call in self.played.calls]
        return match_calls(want, got, self.played.names) or self._keys(step)

    def _keys(self, step: Step) -> list[str]:
        """Headers that matter to who is called: whose key it is, and the client's own."""
        found = []
        for number, (want, call) in enumerate(zip(step.engine_saw or [], self.played.calls, strict=True)):
            if "headers" not in want:
                continue  # a recording that kept none
            recorded = {key.lower(): value for key, value in want["headers"]}
            for name in ("authorization", "content-type", "x-custom"):
                if recorded.get(name) != call.headers.get(name):
                    found.append(
                        f"engine call {number}: {name} {call.headers.get(name)!r}"
                        f" instead of {recorded.get(name)!r}"
                    )
        return found

    def _note_chat(self, step: Step, reply: Reply) -> None:
        """Remember who was answered, for the checks that count."""
        if step.path == "/rl/start_session" and reply.status == 201:
            for member in reply.json().get("sessions", []):
                self.played.owners[member["session_api_key"]] = member["session_id"]
        if step.path not in CHAT_PATHS or reply.status != 200:
            return
        said = events(reply.body)[0] if b"data: " in reply.body[:6] else reply.json() if reply.body else {}
        key = next((v for k, v in step.headers if k.lower() == "authorization"), "")
        owner = self.played.owners.get(self.played.names.rewrite(key).partition(" ")[2], "")
        asked = json.loads(step.body)
        self.played.chats.append(Chat(said.get("id", ""), owner, asked.get("store", True) is not False))

    def _observe(self, line: int) -> None:
        check = OBSERVATIONS.get(self.transcript.stem, {}).get(line)
        if check is None:
            self.verdict[line] = OutOfScope("an observation about the original, nothing to compare")
        elif isinstance(check, OutOfScope):
            self.verdict[line] = check
        else:
            self.verdict[line] = _checked(lambda: check(self.played, self.transcript.observations[line]))


def match_calls(
    want: list[tuple[str, Any]],
    got: list[tuple[str, Any]],
    names: Names,
    *,
    ignore: Iterable[str] = ("stream",),
) -> list[str]:
    """What the engine was sent. Whether it was asked to stream is the proxy's choice, not the wire's."""
    if [path for path, _ in want] != [path for path, _ in got]:
        return [f"the engine was sent {[path for path, _ in got]} instead of {[path for path, _ in want]}"]
    found = []
    for number, ((path, expected), (_, body)) in enumerate(zip(want, got, strict=True)):
        if isinstance(expected, dict) and isinstance(body, dict):
            expected = {key: value for key, value in expected.items() if key not in ignore}
            body = {key: value for key, value in body.items() if key not in ignore}
        differs = match(_with_plain_numbers(expected), _with_plain_numbers(body), names)
        found += [f"engine call {number} {path} {line}" for line in differs]
    return found


def _with_plain_numbers(value: Any) -> Any:
    """2.0 as 2: an engine takes either, and a proxy with typed parameters sends the one where it got the
    other.
    """
    if isinstance(value, dict):
        return {key: _with_plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_plain_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
