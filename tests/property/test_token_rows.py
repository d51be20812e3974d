"""An engine's rows read in C against msgspec; ids as text; a vocabulary's bytes. What the quick reader
accepts reads exactly as the general one reads it; what it does not accept goes to the general one, so it may
not crash either."""

import json
from array import array
from itertools import accumulate

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from areal_fast.core import BadArgument
from areal_fast.core._tokens import TokenBytes, cut_rows, ids_json
from areal_fast.engine import sglang
from areal_fast.engine.errors import EngineError

ids = st.integers(0, 2**31 - 1)
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
# decimal texts of every length and place of the point, and with exponents
numbers = st.one_of(
    float32s.map(repr),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.from_regex(r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
)
blanks = st.sampled_from(["", "", "", " ", "\n", " \t"])
thirds = st.sampled_from(["", ",null", ', "plain text"', ',"\\u00e9"', ',"é"', ",1", ",null,null"])


@st.composite
def rows_texts(draw: st.DrawFn) -> str:
    rows = draw(st.lists(st.tuples(numbers, ids, thirds, blanks), max_size=6))
    return f"[{draw(blanks)}" + ",".join(f"[{b}{n},{b}{i}{t}{b}]{b}" for n, i, t, b in rows) + "]"


def generally(body: bytes) -> sglang.Attempt | None:
    """What the reader that knows nothing of quick ways makes of it."""
    try:
        meta = sglang._answer_decoder.decode(body).meta_info
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if meta.finish_reason is None or meta.output_token_logprobs is None:
        return None
    rows = meta.output_token_logprobs
    return sglang.Attempt(
        array("i", [row.id for row in rows]),
        array("f", [row.logprob for row in rows]),
        meta.finish_reason.type,
        meta.prompt_tokens,
        meta.completion_tokens,
    )


def answer(rows: str, before: str = "", after: str = "") -> bytes:
    return (
        f'{{"text":"t","meta_info":{{"finish_reason":{{"type":"stop"}},{before}'
        f'"output_token_logprobs":{rows}{after}}}}}'
    ).encode()


def check(body: bytes) -> bool:
    quick = sglang._quickly(body)
    if quick is None:
        return False
    slow = generally(body)
    assert slow is not None, body
    assert quick.ids == slow.ids
    assert quick.logprobs.tobytes() == slow.logprobs.tobytes() or quick.logprobs == slow.logprobs
    assert (quick.stop, quick.prompt_tokens, quick.completion_tokens) == (
        slow.stop,
        slow.prompt_tokens,
        slow.completion_tokens,
    )
    return True


@given(
    rows_texts(), st.sampled_from(["", ' "prompt_tokens": 3,']), st.sampled_from(["", ',"e2e_latency":0.1'])
)
@example("[[-0,1]]", "", "")
@example("[[-1.1920928955078125e-07,1],[-3.5762778338721546e-07,2]]", "", "")
@example("[[0.1,01]]", "", "")
@example("[[1.0000000596046448,1]]", "", "")
@example("[[1.00000005960464477539062500000000000001,1]]", "", "")
@example("[[3.4028235677973366e38,1],[1e30,2],[1e31,2]]", "", "")
def test_what_is_read_quickly_is_read_alike(rows: str, before: str, after: str) -> None:
    check(answer(rows, before, after))


@given(st.lists(st.tuples(float32s.filter(lambda x: x == 0 or 1e-25 < abs(x) < 1e15), ids), max_size=40))
def test_what_engines_send_is_read_quickly(rows: list[tuple[float, int]]) -> None:
    assert check(answer(json.dumps([[x, i, None] for x, i in rows], separators=(",", ":"))))
    assert check(answer(json.dumps([[x, i, "tok"] for x, i in rows])))


@given(rows_texts(), st.data())
def test_damaged_answers(rows: str, data: st.DataObject) -> None:
    body = bytearray(answer(rows))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        kind = data.draw(st.integers(0, 2))
        if kind == 0:
            del body[at]
        elif kind == 1:
            body[at] = data.draw(st.sampled_from(list(b'[]{},:"\\0123456789eE+-. \n\x00\xff')))
        else:
            del body[at : at + data.draw(st.integers(1, 20))]
        if not body:
            return
    check(bytes(body))


@pytest.mark.parametrize(
    "body",
    [
        # the name in another place, in text, twice, or spelled otherwise
        b'{"output_token_logprobs":[[0,1]],"meta_info":{"finish_reason":{"type":"stop"}}}',
        b'{"text":"\\"output_token_logprobs":[[0,1]],"meta_info":{"finish_reason":{"type":"stop"}}}',
        answer("[[-1,5]]", after=',"output_token_logprobs":[[-2,6]]'),
        answer("[[-1,5]]", after=',"output_token_logprob\\u0073":[[-2,6]]'),
        answer("-1", before='"x":{"output_token_logprobs":[[-1,5]]},'),
        b'{"meta_info":{"x":{"output_token_logprobs":[[-1,5]]},"finish_reason":{"type":"stop"}}}',
        answer("[[null,5]]"),
        answer("[[-1,5]"),
        answer("[[-1,2147483648]]"),
        answer("[[-1]]"),
    ],
)
def test_what_is_left_to_the_general_reader(body: bytes) -> None:
    assert sglang._quickly(body) is None
    slow = generally(body)
    if slow is None:
        with pytest.raises(EngineError):
            sglang.SGLang().parse(body)
    else:
        assert sglang.SGLang().parse(body) == slow


@given(st.binary(max_size=8), st.binary(max_size=64) | rows_texts().map(str.encode), st.binary(max_size=8))
@example(b'{"a":1,', b"[[-1,2]]", b"}")
@example(b"\\", b"[[-1,2]]", b"")
@example(b"", b"[[-1,2]]", b"")
def test_any_bytes(before: bytes, text: bytes, after: bytes) -> None:
    for colon in (b"", b":", b": ", b":  "):
        whole = b'%b"rows"%b%b%b' % (before, colon, text, after)
        found = cut_rows(whole, b'"rows"', b"-1")
        if found is None:
            continue
        ids, logprobs, rest = found
        start = len(before) + len(b'"rows":')
        stop = len(whole) - (len(rest) - start - 2)
        assert rest == whole[:start] + b"-1" + whole[stop:] and stop >= start
        rows = msgspec.json.decode(whole[start:stop])
        assert [row[1] for row in rows] == array("i", ids).tolist() and len(logprobs) == len(ids)


EDGES = [10**n + d for n in range(10) for d in (-1, 0, 1)]


@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 1100000), max_size=50))
@example(EDGES)
@example([-n for n in EDGES])
@example(list(range(1000)))
@example(list(range(1000, 1000000, 997)))
def test_ids_as_text(values: list[int]) -> None:
    digits = b",".join(b"%d" % value for value in values)
    assert ids_json(array("i", values)) == digits
    assert ids_json(array("i", values), b"[", b"]..") == b"[%b].." % digits


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=8))
def test_bytes_of_a_vocabulary(asked: list[list[int]]) -> None:
    spelled: list[int] = []

    def spell(token: int) -> bytes:
        spelled.append(token)
        return b"" if token % 5 == 0 else bytes([token]) * (token * 40)

    table = TokenBytes(32, spell)
    for each in asked:
        assert table.join(array("i", each)) == b"".join(spell(token) for token in each)
        table.join(array("i", [token for token in each if token < 32]))
    spelled.clear()
    for each in asked:
        table.join(array("i", [token for token in each if token < 32]))
    assert not spelled, "what is known is not asked for again"


@given(st.lists(st.binary(max_size=40), max_size=40), st.integers(0, 40))
def test_bytes_known_from_the_start(values: list[bytes], tokens: int) -> None:
    """Of what has no bytes, and of what lies beyond them, the speller is asked."""
    asked: list[int] = []

    def spell(token: int) -> bytes:
        asked.append(token)
        return b"?%d" % token

    starts = array("I", [0, *accumulate(map(len, values))])
    table = TokenBytes(tokens, spell, (starts.tobytes(), b"".join(values)))
    ids = list(range(tokens))
    unknown = [token for token in ids if token >= len(values) or not values[token]]
    expected = [b"?%d" % token if token in unknown else values[token] for token in ids]
    assert table.join(array("i", ids)) == b"".join(expected)
    assert asked == unknown


@pytest.mark.parametrize("starts", [[0, 5], [3, 2], [0, 2, 1]])
def test_bytes_that_are_not_where_they_should_be(starts: list[int]) -> None:
    with pytest.raises(BadArgument, match="where tokens begin"):
        TokenBytes(4, lambda token: b"x", (array("I", starts).tobytes(), b"abc"))


def test_ids_that_are_no_int32() -> None:
    with pytest.raises(BadArgument):
        ids_json(b"abc")
    with pytest.raises(BadArgument):
        TokenBytes(4, lambda token: b"x").join(b"abc")
