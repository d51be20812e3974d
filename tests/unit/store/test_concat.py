"""WIRE "Template concat" and style concat, against the rule stated plainly: look at every earlier chat."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from areal_fast.protocol.chat import BadChat
from areal_fast.protocol.concat import answer_message, canonical, continued, follow, prefix_hashes
from areal_fast.store import SessionStore
from tests.unit.store.trees import EOS, Chat, play, read, scenario, template
from tests.unit.store.turns import ask, export, started, take

REWARDS = {0: 1.0, 3: -0.5, 9: 2.0}


class Node:
    """One recorded chat of the plain statement."""

    def __init__(self, i: int, chat: Chat, parent: Node | None) -> None:
        self.chat, self.parent, self.reward = chat, parent, 0.0
        whole = template(chat.messages)
        if parent is not None:
            before = [*parent.prompt, *parent.chat.output]
            while parent.chat.stop_reason != "length" and before[-1] == EOS:
                before.pop()
            before.append(EOS)
            at = [j for j, token in enumerate(whole) if token == EOS][before.count(EOS) - 1]
            whole = before + whole[at + 1 :]
        self.prompt = whole
        n = len(chat.output)
        zeros = len(whole)
        self.logprobs = [0.0] * zeros + [-0.25 * (k + 1) - i for k in range(n)]
        self.mask = [0] * zeros + [1] * n
        self.versions = [-1] * zeros + [i] * (n - 1) + [i + 1]
        if parent is not None and len(whole) > (size := len(parent.mask)):
            self.logprobs[:size] = parent.logprobs
            self.mask[:size] = parent.mask
            self.versions[:size] = parent.versions


def stated(chats: list[Chat], discount: float) -> tuple[list[list[int] | None], dict[int, Node]]:
    nodes: dict[int, Node] = {}
    prompts: list[list[int] | None] = []
    for i, chat in enumerate(chats):
        best: Node | None = None
        for node in nodes.values():
            known = [*node.chat.messages, {"role": "assistant", "content": node.chat.answer}]
            if chat.messages[: len(known)] == known and (
                best is None or len(node.chat.messages) > len(best.chat.messages)
            ):
                best = node
        try:
            nodes[i] = Node(i, chat, best)
            prompts.append(nodes[i].prompt)
        except IndexError:
            prompts.append(None)
    following = 0.0
    for i in reversed(nodes):
        following = nodes[i].reward = following * discount + REWARDS.get(i, 0.0)
    parents = [node.parent for node in nodes.values()]
    return prompts, {i: node for i, node in nodes.items() if node not in parents}


@pytest.mark.parametrize("number", range(12))
def test_prompts_and_leaves_are_the_rules(store: SessionStore, seed: int, number: int) -> None:
    chats = scenario(seed + number)
    played = play(store, chats, REWARDS, 0.5)
    prompts, leaves = stated(chats, 0.5)
    assert played.prompts == prompts
    assert list(played.leaves) == list(leaves)
    for i, node in leaves.items():
        got = played.leaves[i]
        assert got["input_ids"] == [node.prompt + chats[i].output]
        assert got["loss_mask"] == [node.mask]
        assert got["logprobs"] == [node.logprobs]
        assert got["versions"] == [node.versions]
        assert got["attention_mask"] == [[True] * len(node.mask)]
        assert got["reward"] == node.reward and got["rewards"] == [node.reward]


def test_scenarios_hold_what_they_are_for(seed: int) -> None:
    shorter = branches = failed = 0
    for number in range(40):
        prompts, leaves = stated(scenario(seed + number), 1.0)
        failed += prompts.count(None)
        branches += len(leaves) > 1
        shorter += any(n.parent is not None and len(n.prompt) <= len(n.parent.mask) for n in leaves.values())
    assert shorter and branches and failed == 0


def test_prompts_that_cannot_be_aligned_are_refused() -> None:
    parent = np.array([5, EOS, 6, EOS], np.int32)
    with pytest.raises(BadChat, match="Failed to align child tokens"):
        continued(parent, 2, "stop", np.array([5, EOS, 6], np.int32), EOS, [EOS])
    with pytest.raises(BadChat, match="Failed to align child tokens"):
        continued(parent, 2, "stop", np.array([5, EOS, 6, EOS], np.int32), EOS, [EOS])
    ids = continued(parent, 2, "stop", np.array([5, EOS, 6, EOS, 9], np.int32), EOS, [EOS])
    assert ids.tolist() == [5, EOS, 6, EOS, 9]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ('{"x":1,"y":[2]}', '{"y":[2.0],"x":1.0}', True),
        ('{"x":-0.0}', '{"x":0}', True),
        ('{"x":1e2}', '{"x":100}', True),
        ('{"x":"\\u00e9"}', '{"x":"é"}', True),
        ('{"x":true}', '{"x":1}', False),
        ('{"x":"1"}', '{"x":1}', False),
        ('{"x":0.1}', '{"x":0.2}', False),
        ('{"x":[1,2]}', '{"x":[2,1]}', False),
        ('{"x":1e300}', '{"x":1e300}', True),
    ],
)
def test_equal_as_json_values(a: str, b: str, same: bool) -> None:
    assert (canonical(json.loads(a)) == canonical(json.loads(b))) is same


def test_images_count_though_they_were_taken_out() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}]}]
    one, two = (prefix_hashes(messages, [image])[0] for image in ("a", "b"))
    assert one != two != prefix_hashes(messages)[0]


def test_the_parent_is_of_the_same_session_and_trajectory(store: SessionStore) -> None:
    chat = scenario(1, 1)[0]
    on = prefix_hashes([*chat.messages, {"role": "assistant", "content": chat.answer}])
    with started(store) as session, started(store) as other:
        turn = session.begin_turn(reserve_tokens=50)
        turn.commit(
            prompt_ids=template(chat.messages),
            output_ids=chat.output,
            logprobs=[-1.0] * len(chat.output),
            version_runs=[(0, len(chat.output))],
            stop_reason=chat.stop_reason,
            messages_hash=on[-1],
        )
        child, stranger = session.begin_turn(reserve_tokens=1), other.begin_turn(reserve_tokens=1)
        child.follow(on)
        stranger.follow(on)
        assert child.parent is not None and child.parent.ordinal == turn.ordinal
        assert stranger.parent is None
        session.set_reward(1.0)
        later = session.begin_turn(reserve_tokens=1)
        later.follow(on)
        assert later.parent is None
        for open_turn in (child, stranger, later):
            open_turn.abandon()


def test_a_parent_is_found_without_looking_at_every_turn(store: SessionStore) -> None:
    """One look-up a message of the request, however many turns the session holds."""
    looked: list[bytes] = []

    class Counting(dict[bytes, int]):
        def get(self, key: bytes, default: Any = None) -> Any:
            looked.append(key)
            return super().get(key, default)

    with started(store) as session:
        for i in range(200):
            turn = session.begin_turn(reserve_tokens=30)
            turn.commit(
                prompt_ids=[i], output_ids=[i], logprobs=[0.0], version_runs=[(0, 1)], stop_reason="length",
                messages_hash=prefix_hashes([{"role": "user", "content": str(i)}])[0],
            )  # fmt: skip
        state = session.state
        assert state.parent_of(0, []) == -1 and isinstance(state.by_prefix, dict)
        state.by_prefix = Counting(state.by_prefix)
        turn = session.begin_turn(reserve_tokens=1)
        prefixes = prefix_hashes([{"role": "user", "content": "7"}, {"role": "user", "content": "on"}])
        turn.follow(prefixes)
        assert turn.parent is not None and turn.parent.ordinal == 7
        assert looked == [prefixes[1], prefixes[0]]
        turn.abandon()


def test_v2_says_the_turn_and_the_reward_before_discounting(store: SessionStore) -> None:
    chats = [chat for chat in scenario(3) if chat.stop_reason == "stop"][:1]
    first = chats[0]
    messages = [
        *first.messages,
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "a"},
    ]
    chats.append(Chat(messages, "yx", [*map(ord, "yx")], "length"))
    individual = [chat._replace(output=[*map(ord, chat.answer), EOS]) for chat in chats]
    with started(store) as session:
        take(session, [1, 2], [3])
        take(session, [1, 2, 3, 4], [5, 6])
        session.set_reward(2.0)
        done = export(store, session.session_id, dialect="v2", discount=0.5, remove_session=False)["traj"]
    assert list(done)[-2:] == ["turn_ids", "original_rewards"]
    assert read(store, done["turn_ids"]) == [[-1, -1, 0, 0, 0, 0], [-1, -1, -1, -1, 0, 0]]
    assert read(store, done["rewards"]) == [1.0, 2.0]
    assert read(store, done["original_rewards"]) == [0.0, 2.0]
    assert done["turn_ids"]["data"]["data"]["dtype"] == "torch.int32"
    with started(store) as session:
        for chat in individual:
            turn = session.begin_turn(reserve_tokens=100)
            prefixes = prefix_hashes(chat.messages)
            turn.follow(prefixes)
            ids = np.array(template(chat.messages), np.int32)
            if turn.parent is not None:
                ids = continued(turn.parent.ids, turn.parent.prompt_len, "stop", ids, EOS, [EOS])
            n = len(chat.output)
            turn.commit(
                prompt_ids=ids, output_ids=chat.output, logprobs=[0.0] * n, version_runs=[(0, n)],
                stop_reason="stop",
                messages_hash=follow(prefixes[-1], answer_message(chat.answer, [])),
            )  # fmt: skip
        session.set_reward(1.0)
        body = json.loads(
            ask(store, session.session_id, dialect="v2", style="concat", remove_session=False).body
        )["traj"]
    (turns,) = read(store, body["turn_ids"])
    assert [t for t in dict.fromkeys(turns) if t >= 0] == [0, 1]
    assert [t >= 0 for t in turns] == [m == 1 for m in read(store, body["loss_mask"])[0]]
