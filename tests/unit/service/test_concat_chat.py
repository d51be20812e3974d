"""Chats under the concat template: the prompt goes on from the parent's tokens."""

from __future__ import annotations

from typing import Any

from areal_fast.engine.segments import Prompt
from tests.unit.service.conftest import ADMIN, Service
from tests.unit.service.fakes import WordTokenizer


class EndsMessages(WordTokenizer):
    """Each message ends with eos, as in chat templates; 2 opens the answer."""

    def encode_chat(self, messages: list[dict[str, Any]], tools: Any, kwargs: Any) -> Prompt:
        ids = [t for m in messages for t in (*map(ord, f"{m.get('role')}:{m.get('content')}\n"), 1)]
        return Prompt.of([*ids, 2])


def test_concat_goes_on_from_the_parents_tokens(service: Service) -> None:
    service.chats.concat = service.routes._concat = True
    service.chats._tokenizer = EndsMessages()  # type: ignore[assignment]
    session_id, key = service.start()
    service.engine.text = "one"
    first = service.chat(key, "hi", stop=["e"])
    assert first.json["choices"][0]["message"]["content"] == "one"
    echoed = first.json["choices"][0]["message"]
    prompt, sampling = service.engine.asked[0]
    assert sampling.stop == ()
    messages = [{"role": "user", "content": "hi"}, echoed, {"role": "user", "content": "more"}]
    for stream in (False, True):
        answer = service.ask("POST", "/chat/completions", {"messages": messages, "stream": stream}, key=key)
        assert answer.status == 200
    prompts = [list(asked.ids()) for asked, _ in service.engine.asked]
    before = [*prompt.ids(), *map(ord, "one"), 1]
    assert prompts[1] == prompts[2] == before + [*map(ord, "user:more\n"), 1, 2]
    service.ask("POST", "/rl/set_reward", {"reward": 1.0}, key=key)
    body = {"session_id": session_id, "style": "concat"}
    items = service.ask("POST", "/export_trajectories", body, key=ADMIN).json["interactions"]
    assert len(items) == 2 and first.json["id"] not in items


def test_concat_streams_are_parents_too_and_what_is_not_stored_is_none(service: Service) -> None:
    service.chats.concat = True
    service.chats._tokenizer = EndsMessages()  # type: ignore[assignment]
    _, key = service.start()
    for fields in ({"stream": True}, {"store": False}):
        service.engine.text = f"answer to {fields}"
        service.chat(key, "hi", **fields)
        messages = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": service.engine.text},
            {"role": "user", "content": "more"},
        ]
        service.ask("POST", "/chat/completions", {"messages": messages}, key=key)
        asked = list(service.engine.asked[-1][0].ids())
        spoken = [*map(ord, service.engine.text), 1]
        whole = list(EndsMessages().encode_chat(messages, None, None).ids())
        if fields == {"stream": True}:
            before = list(service.engine.asked[-2][0].ids()) + spoken
            assert asked[: len(before)] == before and asked != whole
        else:
            assert asked == whole


def test_style_concat_wants_the_concat_template_and_consumes_nothing(service: Service) -> None:
    session_id, key = service.start()
    service.chat(key)
    service.ask("POST", "/rl/set_reward", {"reward": 1.0}, key=key)
    for body in ({"session_id": session_id}, {"session_ids": [session_id]}):
        for style in ("concat", "other"):
            answer = service.ask("POST", "/export_trajectories", {**body, "style": style}, key=ADMIN)
            assert answer.status == 422
    answer = service.ask("POST", "/export_trajectories", {"session_id": session_id}, key=ADMIN)
    assert answer.status == 200
