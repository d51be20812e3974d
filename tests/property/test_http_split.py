"""The same bytes give the same requests however they are cut: at every byte, at random, in one piece.

Messages are made by hypothesis from valid requests, known attacks and mutations of both, several in a row.
"The same" means the same heads, bodies and ends up to the same refusal with the same status (its text may
name another fault).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import example, given, settings
from hypothesis import strategies as st

from areal_fast.http.head import ProtocolError
from areal_fast.http.parser import END, ReplyParser, RequestParser
from tests.unit.http.serving import chunked, get, post
from tests.unit.http.test_parser import SMUGGLING


def outcome(parser: RequestParser | ReplyParser, pieces: Iterable[bytes]) -> list[object]:
    """Heads, joined bodies, END, and last the status of a refusal. How much of a body came before it does not
    count."""
    found: list[object] = []
    for piece in pieces:
        parser.feed(piece)
        try:
            while (event := parser.next()) is not None:
                if type(event) is bytes and type(found[-1]) is bytes:
                    found[-1] += event  # type: ignore[operator]
                else:
                    found.append(event)
        except ProtocolError as error:
            if found and type(found[-1]) is bytes:
                found.pop()
            found.append(error.status)
            break
    return found


def requests() -> RequestParser:
    return RequestParser(max_body_bytes=200, max_header_bytes=300, max_request_line_bytes=100, max_headers=8)


def replies() -> ReplyParser:
    return ReplyParser(max_body_bytes=200, max_header_bytes=300)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def every_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


body = st.binary(max_size=60)
valid = st.one_of(
    st.builds(get, st.sampled_from(["/", "/a?b", "/%41", "*", "http://h/p"])),
    st.builds(post, body),
    st.lists(st.binary(min_size=1, max_size=20), max_size=4).map(lambda pieces: chunked(*pieces)),
    st.builds(lambda n: get("/" + "t" * n), st.integers(60, 120)),
    st.builds(lambda n: get("/", "X: " + "v" * n), st.integers(220, 300)),
    st.builds(lambda n: get("/", *["X: y"] * n), st.integers(5, 9)),
    st.just(b"\r\n"),
    st.sampled_from(sorted(SMUGGLING.values())),
)
valid_reply = st.one_of(
    st.builds(lambda b: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(b), b), body),
    st.lists(st.binary(min_size=1, max_size=20), max_size=4).map(
        lambda pieces: chunked(*pieces).replace(b"POST / HTTP/1.1\r\nHost: a", b"HTTP/1.1 200 OK")
    ),
    st.just(b"HTTP/1.1 204 No Content\r\n\r\n"),
    st.just(b"HTTP/1.1 100 Continue\r\n\r\n"),
    st.builds(lambda b: b"HTTP/1.0 200 OK\r\n\r\n" + b, body),
)


@st.composite
def mutated(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> bytes:
    """A few messages in a row; in half of the cases with a few bytes replaced, dropped or put in."""
    data = bytearray(b"".join(draw(st.lists(source, min_size=1, max_size=4))))
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(data)))
            end = min(len(data), at + draw(st.integers(0, 3)))
            data[at:end] = draw(
                st.one_of(
                    st.binary(max_size=3), st.sampled_from([b"\r", b"\n", b"\r\n", b" ", b":", b"\0", b"\t"])
                )
            )
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(mutated(valid), st.lists(st.integers(0, 2000), max_size=6))
@example(b"A" * 40 + b" / HTTP/1.1\r\nHost: a\r\n\r\n", [])
@example(b"GET /\n" + b"a" * 200 + b"\r\n\r\n", [])
@example(b"@" + b"a" * 400, [])
@example(b"@" + b"a" * 400 + b"\r\n\r\n", [])
@example(get("/" + "t" * 400, "X: " + "v" * 400), [])
@example(b"\n" + get(), [])
def test_requests_do_not_depend_on_how_they_are_cut(data: bytes, places: list[int]) -> None:
    whole = outcome(requests(), [data])
    assert outcome(requests(), every_byte(data)) == whole
    assert outcome(requests(), cut(data, places)) == whole


@settings(max_examples=200, deadline=None)
@given(mutated(valid_reply), st.lists(st.integers(0, 2000), max_size=6))
@example(b"HTTP/1.1 200 OK\r\nX: " + b"v" * 400 + b"\r\n\r\n", [])
def test_replies_do_not_depend_on_how_they_are_cut(data: bytes, places: list[int]) -> None:
    whole = outcome(replies(), [data])
    assert outcome(replies(), every_byte(data)) == whole
    assert outcome(replies(), cut(data, places)) == whole


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), body), min_size=1, max_size=6),
    st.lists(st.integers(0, 2000), max_size=8),
)
def test_pipelined_bodies_arrive_as_sent(messages: list[tuple[bool, bytes]], places: list[int]) -> None:
    data = b"".join(
        chunked(body[:7], body[7:]) if in_chunks and len(body) > 7 else post(body)
        for in_chunks, body in messages
    )
    found = outcome(requests(), cut(data, places))
    assert found.count(END) == len(messages)
    assert [event for event in found if type(event) is bytes] == [body for _, body in messages if body]
