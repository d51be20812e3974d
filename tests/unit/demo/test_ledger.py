"""The demo's book-keeping catches what it is there to catch: each kind of damage fails its own check."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from areal_fast.demo.ledger import Check, Ledger, Session, Turn  # noqa: E402
from areal_fast.demo.tensors import BadTensor, Row, rows  # noqa: E402
from areal_fast.embedded import tokenizer  # noqa: E402

ONCE, UNKNOWN, TOKENS, VERSIONS, REWARDS = range(5)
DISCOUNT = 0.5


def converse(ledger: Ledger, name: str, answers: tuple[str, ...], reward: float | None = 1.0) -> Session:
    session = ledger.start(name, "key")
    messages = [{"role": "user", "content": f"hello from {name}"}]
    for i, answer in enumerate(answers):
        turn = Turn(f"{name}/{i}", list(messages), answer, "stop", began=10.0 * i, ended=10.0 * i + 5)
        turn.prompt_tokens = len(turn.prompt)
        turn.completion_tokens = len(answer.encode()) + 1
        session.turns.append(turn)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and then?"}]
    session.reward = reward
    return session


def exported(session: Session, *, with_ids: bool = True) -> list[Row]:
    """What a faultless proxy exports for it."""
    found = []
    for turn in session.turns:
        output = [*turn.content.encode(), tokenizer.EOS_ID]
        name = turn.id if with_ids else None
        found.append(Row(name, list(turn.prompt), output, [-0.5] * len(output), [0] * len(output), 0.0))
    value = 0.0
    for i, row in reversed(list(enumerate(found))):
        value = (
            session.reward if i == len(found) - 1 and session.reward is not None else 0.0
        ) + DISCOUNT * value
        row.reward = value
    return found


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def session(ledger: Ledger) -> Session:
    return converse(ledger, "a-0", ("One.", "Two, naïve.", "Three."))


def failing(ledger: Ledger) -> set[int]:
    return {i for i, check in enumerate(ledger.checks()) if not check.holds}


@pytest.mark.parametrize("with_ids", [True, False])
def test_all_is_well(ledger: Ledger, session: Session, with_ids: bool) -> None:
    other = converse(ledger, "a-1", ("One.",), reward=None)
    together = exported(session, with_ids=with_ids) + exported(other, with_ids=with_ids)
    ledger.found(["a-0", "a-1"], together, "export", DISCOUNT)
    assert failing(ledger) == set()
    assert ledger.where == {"export": 4}
    assert ledger.extra == ledger.spanning == 0


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_lost_answer(ledger: Ledger, session: Session, with_ids: bool) -> None:
    found = exported(session, with_ids=with_ids)
    del found[1]
    ledger.found(["a-0"], found, "export", DISCOUNT)
    assert ONCE in failing(ledger)
    assert ledger.checks()[ONCE].wrong == ["a-0/1 of a-0 (): nowhere"]


def test_an_answer_found_twice(ledger: Ledger, session: Session) -> None:
    ledger.found(["a-0"], exported(session), "export", DISCOUNT)
    ledger.found(["a-0"], exported(session), "dump", DISCOUNT)
    assert failing(ledger) == {ONCE}


@pytest.mark.parametrize("with_ids", [True, False])
def test_an_answer_nobody_asked_for(ledger: Ledger, session: Session, with_ids: bool) -> None:
    found = exported(session, with_ids=with_ids)
    stranger = replace(found[1], interaction_id="stranger" if with_ids else None, reward=0.0)
    stranger.output = [*b"Never said.", tokenizer.EOS_ID]
    ledger.found(["a-0"], [stranger, *found], "export", DISCOUNT)
    assert UNKNOWN in failing(ledger)
    assert ONCE not in failing(ledger)


@pytest.mark.parametrize("with_ids", [True, False])
def test_an_answer_that_never_arrived_is_forgiven_where_a_request_failed(
    ledger: Ledger, session: Session, with_ids: bool
) -> None:
    session.requests_failed = 1
    found = exported(session, with_ids=with_ids)
    unheard = replace(found[1], interaction_id="unheard" if with_ids else None)
    unheard.output = [*b"Lost on its way.", tokenizer.EOS_ID]
    unheard.reward = DISCOUNT * found[1].reward
    found[0].reward = DISCOUNT * unheard.reward
    ledger.found(["a-0"], [found[0], unheard, *found[1:]], "export", DISCOUNT)
    assert failing(ledger) == set()
    assert (ledger.extra, session.extra) == (1, 1)


def test_an_unknown_session(ledger: Ledger, session: Session) -> None:
    ledger.found(["a-0"], exported(session), "export", DISCOUNT)
    ledger.found(["b-0"], [], "dump", DISCOUNT)
    assert failing(ledger) == {UNKNOWN}


@pytest.mark.parametrize("damage", ["prompt", "output", "length", "logprob", "eos"])
def test_damaged_tokens(ledger: Ledger, session: Session, damage: str) -> None:
    found = exported(session)
    row = found[2]
    if damage == "prompt":
        row.prompt[3] ^= 1
    elif damage == "output":
        row.output[0] ^= 1
    elif damage == "length":
        row.prompt.append(10)
    elif damage == "logprob":
        row.logprobs[0] = 0.0
    else:
        session.turns[2].finish_reason = "length"
    ledger.found(["a-0"], found, "export", DISCOUNT)
    assert failing(ledger) == {TOKENS}


@pytest.mark.parametrize(
    ("update", "versions", "holds"),
    [
        ((math.inf, math.inf), (0, 0, 0), True),
        ((math.inf, math.inf), (0, 0, 1), False),
        ((6.0, 9.0), (0, 1, 1), True),
        ((6.0, 9.0), (1, 1, 1), False),
        ((6.0, 9.0), (0, 0, 1), False),
        ((12.0, 13.0), (0, 0, 1), True),
        ((12.0, 13.0), (0, 1, 1), True),
        ((12.0, 13.0), (0, 2, 1), False),
    ],
)
def test_versions_follow_the_update(
    ledger: Ledger, session: Session, update: tuple[float, float], versions: tuple[int, ...], holds: bool
) -> None:
    ledger.update.began, ledger.update.ended = update
    found = exported(session)
    for row, version in zip(found, versions, strict=True):
        row.versions = [version] * len(row.output)
    ledger.found(["a-0"], found, "export", DISCOUNT)
    assert failing(ledger) == (set() if holds else {VERSIONS})


def test_versions_within_an_answer_only_grow(ledger: Ledger, session: Session) -> None:
    ledger.update.began, ledger.update.ended = 12.0, 13.0
    found = exported(session)
    found[1].versions = [0] + [1] * (len(found[1].output) - 1)
    found[2].versions = [1] * len(found[2].output)
    ledger.found(["a-0"], found, "export", DISCOUNT)
    assert failing(ledger) == set()
    assert ledger.spanning == 1
    found[1].versions.reverse()
    ledger.found(["a-0"], found, "export", DISCOUNT)
    assert VERSIONS in failing(ledger)


def test_a_wrong_reward(ledger: Ledger, session: Session) -> None:
    found = exported(session)
    found[0].reward += 0.01
    ledger.found(["a-0"], found, "export", DISCOUNT)
    assert failing(ledger) == {REWARDS}


def test_nothing_seen_is_no_success() -> None:
    assert not Check("x").holds


# ---- tensors -------------------------------------------------------------------------------------------


def batch() -> dict[str, torch.Tensor]:
    """Two rows: prompt 2 + output 1, and prompt 1 + output 1 with one place of padding."""
    return {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "loss_mask": torch.tensor([[0, 0, 1], [0, 1, 0]]),
        "logprobs": torch.tensor([[0, 0, -0.5], [0, -0.25, 0]]),
        "versions": torch.tensor([[-1, -1, 0], [-1, 1, 0]]),
        "attention_mask": torch.tensor([[True, True, True], [True, True, False]]),
        "rewards": torch.tensor([0.5, 1.0]),
    }


def test_rows_of_a_padded_batch() -> None:
    assert rows(batch()) == [
        Row(None, [1, 2], [3], [-0.5], [0], 0.5),
        Row(None, [4], [5], [-0.25], [1], 1.0),
    ]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("input_ids", torch.zeros(2, 3, dtype=torch.int32)),
        ("input_ids", torch.zeros(2, 4, dtype=torch.int64)),
        ("rewards", torch.zeros(3)),
        ("loss_mask", torch.tensor([[0, 1, 0], [0, 1, 0]])),
        ("loss_mask", torch.tensor([[0, 0, 2], [0, 1, 0]])),
        ("attention_mask", torch.tensor([[True, True, True], [False, True, True]])),
        ("logprobs", torch.full((2, 3), -0.5)),
        ("versions", torch.zeros(2, 3, dtype=torch.int64)),
        ("more", torch.zeros(1)),
    ],
)
def test_a_batch_that_breaks_a_promise_is_refused(name: str, wrong: torch.Tensor) -> None:
    with pytest.raises(BadTensor):
        rows(batch() | {name: wrong})
