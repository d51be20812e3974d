"""What is repeated and what is not, without a socket: calls are driven by hand."""

from __future__ import annotations

from typing import Any

import pytest

from areal_fast.client import (
    ArenaFull,
    BadReply,
    Busy,
    ClientError,
    InvalidRequest,
    ProxyError,
    TimedOut,
    Unreachable,
)
from areal_fast.client.calls import Calls
from areal_fast.client.errors import error_of
from areal_fast.client.fetching import Fetcher, batches
from areal_fast.client.references import Reference
from areal_fast.client.shards import WAYS
from areal_fast.client.steps import FIRST_WAIT_S, LONGEST_WAIT_S, Answer, Ask, Wait, ask, wait_s

NOT_SENT = Unreachable("http://x", "refused", sent=False)
BROKE = Unreachable("http://x", "broke", sent=True)


def answer(status: int = 200, body: bytes = b"{}") -> Answer:
    return Answer(status, {}, memoryview(bytearray(body)))


def play(call: Any, *events: Any) -> tuple[Any, list[Any]]:
    """(the call's result, the steps it took) when its requests meet `events` one after another."""
    taken: list[Any] = []
    left = list(events)
    try:
        step = next(call)
        while True:
            taken.append(step)
            event = None if isinstance(step, Wait) else left.pop(0)
            step = call.throw(event) if isinstance(event, Exception) else call.send(event)
    except StopIteration as end:
        assert not left, f"not reached: {left}"
        return end.value, taken


def calls(retries: int = 3) -> Calls:
    return Calls("http://x", "admin", retries, Fetcher("http://x", None, retries, WAYS))


def test_what_was_not_sent_is_sent_again_also_if_unsafe() -> None:
    started = answer(201, b'{"session_id":"t-0","api_key":"k"}')
    result, taken = play(calls().start("t", None, 1), NOT_SENT, NOT_SENT, started)
    assert result.members()[0].session_id == "t-0"
    assert [type(step) for step in taken] == [Ask, Wait, Ask, Wait, Ask]


def test_a_start_may_be_answered_in_three_ways() -> None:
    both = b'"session_id":"a","api_key":"k"'
    group = b'"group_id":"g","sessions":[{"session_id":"a","session_api_key":"k"}]'
    for body in (both, group, both + b"," + group):
        result, _ = play(calls().start("t", None, 1), answer(201, b"{" + body + b"}"))
        assert [(one.session_id, one.session_api_key) for one in result.members()] == [("a", "k")]
    nobody, _ = play(calls().start("t", None, 1), answer(201))
    with pytest.raises(BadReply):
        nobody.members()


def test_a_start_that_may_have_happened_is_not_repeated() -> None:
    with pytest.raises(Unreachable) as caught:
        play(calls().start("t", None, 1), BROKE)
    assert caught.value.sent
    with pytest.raises(Busy):
        play(calls().start("t", None, 1), answer(503))


@pytest.mark.parametrize(
    "event", [BROKE, NOT_SENT, answer(503, b'{"detail":"busy"}')], ids=["broke", "-", "503"]
)
def test_what_is_safe_is_repeated_until_tries_run_out(event: Any) -> None:
    rewarded = answer(200, b'{"interaction_count":2,"trajectory_id":0}')
    result, taken = play(calls().set_reward("k", 1.0, None), event, event, event, rewarded)
    assert result.interaction_count == 2
    assert len({step for step in taken if isinstance(step, Ask)}) == 1, "a repeat is the same request"
    with pytest.raises(ClientError):
        play(calls().set_reward("k", 1.0, None), event, event, event, event)


@pytest.mark.parametrize(
    "event",
    [answer(status) for status in (400, 401, 404, 409, 422, 500, 502, 504, 507)] + [TimedOut("x", 1.0)],
    ids=lambda event: str(getattr(event, "status", "time-out")),
)
def test_refusals_and_time_outs_are_final(event: Any) -> None:
    with pytest.raises(ClientError):
        play(calls().health(), event)


def test_waits_grow_and_end() -> None:
    for attempt in range(12):
        longest = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
        assert all(longest / 2 <= wait_s(attempt) <= longest for _ in range(50))


def test_no_retries_means_one_try() -> None:
    with pytest.raises(Unreachable):
        play(ask(Ask("http://x", "GET", "/", safe=True), 0), NOT_SENT)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"version":"one"}', b'{"version":', b"\xff"])
def test_a_reply_that_is_none_is_said_to_be(body: bytes) -> None:
    with pytest.raises(BadReply, match="GET http://x/get_version"):
        play(calls().get_version(), answer(200, body))


def test_a_version_that_did_not_take_is_an_error() -> None:
    with pytest.raises(BadReply):
        play(calls().set_version(3), answer(200, b'{"version":2}'))


def test_errors_say_what_to_do() -> None:
    full = error_of("PUT http://x/data/a", 507, b'{"status":"error","message":"full"}')
    assert type(full) is ArenaFull and "--arena-max-bytes" in str(full) and full.detail == "full"
    invalid = error_of("POST x", 422, b'{"detail":[{"loc":["body","a"],"msg":"bad","type":"t"},7]}')
    assert type(invalid) is InvalidRequest and "body.a: bad; 7" in str(invalid)
    odd = error_of("POST x", 418, b"I am a teapot")
    assert type(odd) is ProxyError and "I am a teapot" in str(odd)
    assert "no text" in str(error_of("POST x", 500, b""))


def test_batches_are_bounded() -> None:
    known = [Reference(str(i), "", "float32", (1 << 20,)) for i in range(40)]  # 4 MiB each
    assert [len(batch) for batch in batches(known)] == [16, 16, 8]
    assert [len(batch) for batch in batches([Reference(str(i)) for i in range(40)])] == [32, 8]
    huge = [Reference(str(i), "", "int8", (1 << 30,)) for i in range(2)]
    assert [len(batch) for batch in batches(huge)] == [1, 1]
    assert [len(batch) for batch in batches([Reference(str(i), "", "int8", (0,)) for i in range(600)])] == [
        512,
        88,
    ]
    assert list(batches([])) == []


def test_unknown_ways_are_refused() -> None:
    for ways in (("jsom",), ()):
        with pytest.raises(ValueError, match="ways are some of"):
            Fetcher("http://x", None, 1, ways)  # type: ignore[arg-type]
