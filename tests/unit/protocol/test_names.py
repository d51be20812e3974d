"""Dump file names stay inside the directory, within 255 bytes, and upstream's form where that is safe."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.protocol import names


@pytest.mark.parametrize(
    ("session_id", "name"),
    [
        ("ready-0", "ready-0-trajectory-3.json"),
        ("tool 你 sp-0", "tool 你 sp-0-trajectory-3.json"),
        ("../../x-0", "%2E.%2F..%2Fx-0-trajectory-3.json"),
        ("a/b-0", "a%2Fb-0-trajectory-3.json"),
        (".hidden-0", "%2Ehidden-0-trajectory-3.json"),
        ("a\0b\n-0", "a%00b%0A-0-trajectory-3.json"),
        ("a\x7f\x85-0", "a%7F%C2%85-0-trajectory-3.json"),
        ("100%-0", "100%-0-trajectory-3.json"),
    ],
)
def test_unsafe_characters_are_percent_encoded(session_id: str, name: str) -> None:
    assert names.dump_name(session_id, 3) == name


def test_active_and_numbered_names() -> None:
    assert names.dump_name("a-0", -1) == "a-0-active.json"
    assert names.dump_name("a-0", -1, 1) == "a-0-active.json.1"
    assert names.dump_name("a-0", 2, 12) == "a-0-trajectory-2.json.12"


def test_names_up_to_255_bytes_are_kept_and_longer_ones_shortened_apart() -> None:
    fits = "x" * (255 - len("-active.json"))
    assert names.dump_name(fits, -1) == fits + "-active.json"
    a, b = names.dump_name(fits + "a", -1), names.dump_name(fits + "b", -1)
    assert a != b
    assert len(a.encode()) == len(b.encode()) == 255
    assert a.endswith("-active.json")


@given(
    st.text(st.characters(exclude_categories=[]), max_size=400), st.integers(-1, 10**6), st.integers(0, 99)
)
def test_any_id_gives_one_safe_path_component(session_id: str, trajectory: int, n: int) -> None:
    name = names.dump_name(session_id, trajectory, n)
    assert 0 < len(name.encode()) <= 255
    assert "/" not in name
    assert "\0" not in name
    assert not name.startswith(".")
    assert all(ord(c) >= 0x20 for c in name)


def test_temporary_names_are_no_dump_names() -> None:
    assert names.temporary("abc", 1) == ".abc-1.tmp"
