"""What the agents were given, where it turned up, and whether the two agree. Pure: no I/O, time is an
argument.

The invariant of the whole project, seen from outside: an answer that an agent received is found exactly
once, in an export or in a dump, with the ids, log-probs, versions and reward that belong to it. An answer
that no agent received (its worker was killed after recording it and before the reply was out) may be
found too, but only in a session one of whose requests failed. Then the agent's retry is a second sample,
unless the proxy answered it from the first one's record.

Rows that carry no interaction id are matched by session, order and content.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from areal_fast.demo.tensors import Row
from areal_fast.embedded import tokenizer

Messages = list[dict[str, Any]]


@dataclass(slots=True)
class Turn:
    """One answer that an agent received in full."""

    id: str
    messages: Messages
    content: str
    finish_reason: str
    prompt_tokens: int = -1
    completion_tokens: int = -1
    streamed: bool = False
    began: float = 0.0
    """When its first attempt was sent."""
    ended: float = 0.0
    latency_s: float = 0.0
    """Of the attempt that succeeded, the client's own repeats included."""
    found: list[str] = field(default_factory=list)
    _prompt: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """The token ids that its messages must have become."""
        if not self._prompt:
            self._prompt = tokenizer.encode(tokenizer.render_chat(self.messages)).tolist()
        return self._prompt


@dataclass(slots=True)
class Session:
    """One episode as its agent knows it."""

    id: str
    key: str
    turns: list[Turn] = field(default_factory=list)
    reward: float | None = None
    requests_failed: int = 0
    fate: str = ""
    extra: int = 0
    """Rows found for it that no agent was ever given."""


@dataclass(slots=True)
class Update:
    """When the weights changed: the old version ruled before `began`, the new one after `ended`."""

    began: float = math.inf
    ended: float = math.inf


@dataclass(slots=True)
class Check:
    """Something that must hold. `wrong` lists where it did not."""

    name: str
    seen: int = 0
    wrong: list[str] = field(default_factory=list)

    def that(self, holds: bool, why: str) -> None:
        self.seen += 1
        if not holds:
            self.wrong.append(why)

    @property
    def holds(self) -> bool:
        return not self.wrong and self.seen > 0


class Ledger:
    """All sessions of the day. `found` is told what exports and dumps held; `checks` gives the verdicts."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.update = Update()
        self.where: Counter[str] = Counter()
        """How many answers turned up in which place."""
        self.spanning = 0
        """Answers with tokens of both weight versions."""
        self.extra = 0
        self.tokens = Check("token ids, log-probs and masks are exactly those of the conversation")
        self.versions = Check("each output token carries the weight version that was in force")
        self.rewards = Check("rewards are those the agents set, discounted backwards")
        self.unknown = Check("nothing was found that nobody asked for")

    def start(self, session_id: str, key: str) -> Session:
        session = Session(session_id, key)
        self.sessions[session_id] = session
        return session

    @property
    def turns(self) -> list[Turn]:
        return [turn for session in self.sessions.values() for turn in session.turns]

    def found(self, session_ids: list[str], rows: list[Row], where: str, discount: float) -> None:
        """`rows`, in order, were found in `where` for these sessions (several: merged in their order)."""
        sessions = [self.sessions[name] for name in session_ids if name in self.sessions]
        self.unknown.that(len(sessions) == len(session_ids), f"{where}: unknown session among {session_ids}")
        by_session: dict[str, list[tuple[Row, Turn | None]]] = {session.id: [] for session in sessions}
        position = 0
        for row in rows:
            position, owner, turn = self._owner(sessions, position, row)
            if owner is None:
                self.unknown.that(False, f"{where}: {row.interaction_id or row.output} in {session_ids}")
                continue
            by_session[owner.id].append((row, turn))
            self.unknown.that(
                turn is not None or owner.requests_failed > 0, f"{where}: extra row in {owner.id}"
            )
            if turn is None:
                owner.extra += 1
                self.extra += 1
            else:
                turn.found.append(where)
                self.where[where.split()[0]] += 1
                self._compare(row, turn)
        for session in sessions:
            self._check_rewards(session, by_session[session.id], discount)

    def _owner(
        self, sessions: list[Session], position: int, row: Row
    ) -> tuple[int, Session | None, Turn | None]:
        """Whose row it is: (position to go on from, session, turn or None for an extra one)."""
        if row.interaction_id is not None:
            for session in sessions:
                for turn in session.turns:
                    if turn.id == row.interaction_id:
                        return position, session, turn
            return position, next((s for s in sessions if s.requests_failed), None), None
        order = [(session, turn) for session in sessions for turn in session.turns]
        for at in range(position, len(order)):
            session, turn = order[at]
            if row.prompt == turn.prompt and text_of(row.output) == turn.content:
                return at + 1, session, turn
        for session in sessions:
            if session.requests_failed and any(row.prompt == turn.prompt for turn in session.turns):
                return position, session, None
        return position, None, None

    def _compare(self, row: Row, turn: Turn) -> None:
        what = turn.id
        self.tokens.that(row.prompt == turn.prompt, f"{what}: prompt ids differ")
        self.tokens.that(text_of(row.output) == turn.content, f"{what}: output is {text_of(row.output)!r}")
        counted = (len(row.prompt), len(row.output))
        self.tokens.that(
            counted == (turn.prompt_tokens, turn.completion_tokens), f"{what}: lengths {counted}"
        )
        ends = bool(row.output) and row.output[-1] == tokenizer.EOS_ID
        self.tokens.that(ends == (turn.finish_reason == "stop"), f"{what}: ended by {turn.finish_reason}")
        self.tokens.that(all(-20 < value < 0 for value in row.logprobs), f"{what}: log-probs not in (-20, 0)")
        if turn.ended < self.update.began:
            expected = set(row.versions) <= {0}
        elif turn.began > self.update.ended:
            expected = set(row.versions) <= {1}
        else:
            expected = set(row.versions) <= {0, 1} and row.versions == sorted(row.versions)
        self.versions.that(expected and bool(row.versions), f"{what}: versions {sorted(set(row.versions))}")
        self.spanning += len(set(row.versions)) == 2

    def _check_rewards(self, session: Session, rows: list[tuple[Row, Turn | None]], discount: float) -> None:
        """r[i] = own reward (0 if none) + discount * r[i+1]; the agent rewarded its last answer."""
        last = session.turns[-1] if session.turns else None
        value = 0.0
        for row, turn in reversed(rows):
            own = session.reward if turn is last and turn is not None and session.reward is not None else 0.0
            value = own + discount * value
            same = math.isclose(row.reward, value, rel_tol=1e-5, abs_tol=1e-6)
            self.rewards.that(same, f"{session.id}: reward {row.reward}, expected {value}")

    def checks(self) -> list[Check]:
        """The verdicts, at the end of the day."""
        once = Check("every answer that an agent received was found exactly once")
        for session in self.sessions.values():
            for turn in session.turns:
                places = ", ".join(turn.found) or "nowhere"
                once.that(len(turn.found) == 1, f"{turn.id} of {session.id} ({session.fate}): {places}")
        return [once, self.unknown, self.tokens, self.versions, self.rewards]


def text_of(output: list[int]) -> str:
    """What an agent is shown of an output: its text without the closing token."""
    return tokenizer.decode(output[:-1] if output and output[-1] == tokenizer.EOS_ID else output)
