"""The shared pause flag: a failed pause takes back its own mark and nobody else's."""

from __future__ import annotations

from areal_fast.service.words import SharedState


class Words:
    def __init__(self) -> None:
        self.words = [0] * 64

    def word(self, i: int) -> int:
        return self.words[i]

    def set_word(self, i: int, v: int) -> None:
        self.words[i] = v

    def cas_word(self, i: int, old: int, new: int) -> bool:
        if self.words[i] != old:
            return False
        self.words[i] = new
        return True


def test_a_failed_pause_leaves_the_flag_as_before() -> None:
    state = SharedState(Words())
    change = state.mark(True)
    assert state.paused()
    state.take_back(change)
    assert not state.paused()


def test_a_failed_pause_of_a_paused_proxy_keeps_it_paused() -> None:
    state = SharedState(Words())
    state.mark(True)
    state.take_back(state.mark(True))
    assert state.paused()


def test_a_failed_pause_does_not_undo_a_later_one() -> None:
    state = SharedState(Words())
    first = state.mark(True)
    second = state.mark(True)
    state.take_back(first)
    assert state.paused()
    state.take_back(second)
    assert state.paused(), "the second found it paused, so paused it stays"


def test_an_old_change_cannot_be_mistaken_for_a_new_one() -> None:
    state = SharedState(Words())
    first = state.mark(True)
    state.take_back(first)
    state.mark(True)
    state.take_back(first)
    assert state.paused()


def test_versions_are_whole_64_bit_numbers() -> None:
    state = SharedState(Words())
    for version in (0, 7, -1, 2**63 - 1, -(2**63)):
        state.set_version(version)
        assert state.version() == version
