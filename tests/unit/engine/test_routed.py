"""Routed experts cut out of an answer, wherever it is cut into pieces."""

import json

import pytest

from areal_fast.engine.routed import RoutedFilter

VALUE = "AbC+/09=" * 20
COMPACT = json.dumps(
    {"text": 'say "routed_experts":"x" \\', "meta_info": {"routed_experts": VALUE, "id": "x"}},
    separators=(",", ":"),
).encode()
SPACED = json.dumps({"meta_info": {"routed_experts": VALUE, "routed_experts_": "no"}, "text": "\\"}).encode()
NULL = b'{"meta_info":{"routed_experts":null,"routed":"","x":"routed_experts"}}'
NESTED = b'{"x\\"routed_experts":"kept","y":"\\\\","routed_experts":"' + VALUE.encode() + b'"}'


def filtered(pieces: list[bytes]) -> tuple[bytes, bytes]:
    """(outside, inside)."""
    taken = RoutedFilter()
    outside, inside = b"", b""
    for piece in pieces:
        for is_inside, data in taken.feed(piece):
            if is_inside:
                assert len(data)
                inside += data
            else:
                outside += data
    assert taken.found == len(inside)
    return outside + taken.rest(), inside


@pytest.mark.parametrize("body", [COMPACT, SPACED, NULL, NESTED, SPACED.replace(VALUE.encode(), b"")])
def test_every_cut(body: bytes) -> None:
    value = VALUE.encode() if VALUE.encode() in body else b""
    want = body.replace(value, b"") if value else body, value
    assert filtered([body]) == want
    assert filtered([body[i : i + 1] for i in range(len(body))]) == want
    for cut in range(len(body)):
        assert filtered([body[:cut], body[cut:]]) == want
        assert filtered([body[:cut], body[cut : cut + 3], body[cut + 3 :]]) == want


def test_an_event_passes_at_once() -> None:
    taken = RoutedFilter()
    event = b'data: {"text":"routed","meta_info":{"id":"routed_experts"}}\n\n'
    assert b"".join(bytes(data) for _, data in taken.feed(event)) == event
