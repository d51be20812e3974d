"""The core's base64 against the standard library's, at every level of instructions that the processor has."""

import base64
import binascii
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.core import BadArgument, _core, base64_decode_into, base64_decoded_size, base64_encode

LEVELS = ("scalar", "avx2", "vbmi")


def available(level: str) -> bool:
    try:
        _core.base64_set_level(level)
    except BadArgument:
        return False
    finally:
        _core.base64_set_level()
    return True


@pytest.fixture(params=[pytest.param(x, marks=[] if available(x) else pytest.mark.skip(x)) for x in LEVELS])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.base64_set_level(request.param)
    assert _core.base64_level() == request.param
    yield request.param
    _core.base64_set_level()


def strictly(text: bytes) -> bytes | None:
    """The standard library's verdict, but that its strict mode lets padding follow a whole group."""
    try:
        found = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        return None
    return found if len(base64.b64encode(found)) == len(text) else None


def decoded(text: bytes, offset: int = 0) -> bytes | None:
    """The core's, into the middle of a buffer whose other bytes must stay what they are."""
    size = base64_decoded_size(text)
    if size < 0:
        return None
    room = bytearray(b"\xa5" * (size + 32))
    unaligned = memoryview(b"#" * offset + text)[offset:]
    with memoryview(room)[offset : offset + size] as out:
        whole = base64_decode_into(unaligned, out)
    assert room[:offset] == b"\xa5" * offset
    assert room[offset + size :] == b"\xa5" * (32 - offset)
    return bytes(room[offset : offset + size]) if whole else None


@pytest.mark.parametrize("length", range(301))
def test_every_length_and_every_position_of_an_error(level: str, length: int) -> None:
    draw = random.Random(length)
    data = draw.randbytes(length)
    text = base64.b64encode(data)
    offset = length % 13
    assert base64_encode(memoryview(bytes(offset) + data)[offset:], b"<", b">") == b"<" + text + b">"
    assert decoded(text, offset) == data
    for at in range(len(text)):
        for byte in (draw.randrange(256), draw.choice(b"=-_\n\0 \x80\xff@[`{.:")):
            wrong = text[:at] + bytes([byte]) + text[at + 1 :]
            assert decoded(wrong, offset) == strictly(wrong), (at, byte)
    for cut in range(1, 5):
        assert decoded(text[:-cut], offset) == strictly(text[:-cut])
        assert decoded(text + b"=" * cut, offset) == strictly(text + b"=" * cut)


@given(st.binary(max_size=400) | st.text("AZaz09+/=", max_size=400).map(str.encode))
def test_any_text_is_judged_as_the_standard_library_does(text: bytes) -> None:
    for level in filter(available, LEVELS):
        _core.base64_set_level(level)
        assert decoded(text) == strictly(text)
        assert base64_encode(text) == base64.b64encode(text)


def test_large(level: str) -> None:
    data = random.Random(1).randbytes(3_000_001)
    text = base64.b64encode(data)
    assert base64_encode(data) == text
    assert decoded(text) == data
    assert decoded(text[:-9] + b"*" + text[-8:]) is None


def test_buffers_have_to_fit() -> None:
    with pytest.raises(BadArgument):
        base64_decode_into(b"AAAA", bytearray(2))
    with pytest.raises(BadArgument):
        base64_decode_into(b"AAAAAA==", bytearray(4), bf16=True)
    with pytest.raises(BadArgument):
        base64_encode(b"abc", bf16=True)
    with pytest.raises((BufferError, TypeError)):
        base64_decode_into(b"AAAA", b"abc")
    assert not base64_decode_into(b"AAAA", bytearray(1), bf16=True)
    with pytest.raises(BadArgument):
        _core.base64_set_level("neon")
