"""What is drawn at random: the keys of sessions and the ids of groups, from a stock of random bytes.

Asking the system for a few bytes costs a call of microseconds (and two conversions) each time; here it is
asked for STOCK_BYTES once, converted once, and a name is a slice of that text, given out once and never
again. A stock is one process's own: after a fork the child draws another.
"""

from __future__ import annotations

import os
from binascii import b2a_base64
from typing import Final

KEY_BYTES: Final = 33
"""Random bytes that a key is cut from: of their 44 characters it has the first KEY_CHARS, 258 bits."""
KEY_CHARS: Final = 43
GROUP_DIGITS: Final = 31
"""Hexadecimal digits that a random UUID needs: all but its version."""
STOCK_BYTES: Final = 128 * KEY_BYTES
_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")
_VARIANT: Final = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}

_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


class Drawn:
    """One store's names. Not for several threads at once."""

    def __init__(self) -> None:
        self._forks = _forks
        self._keys, self._key_at = "", 0
        self._digits, self._digit_at = "", 0

    def key(self) -> str:
        """KEY_CHARS characters of A-Z, a-z, 0-9, - and _, as secrets.token_urlsafe(32) has them."""
        at = self._key_at
        if at >= len(self._keys) or self._forks != _forks:
            self._draw()
            at = 0
        self._key_at = at + KEY_CHARS + 1
        return self._keys[at : at + KEY_CHARS]

    def group_id(self) -> str:
        """`grp-` and a random UUID (RFC 9562, version 4)."""
        at = self._digit_at
        if at + GROUP_DIGITS > len(self._digits) or self._forks != _forks:
            self._draw()
            at = 0
        self._digit_at = at + GROUP_DIGITS
        x = self._digits[at : at + GROUP_DIGITS]
        return f"grp-{x[:8]}-{x[8:12]}-4{x[12:15]}-{_VARIANT[x[15]]}{x[16:19]}-{x[19:]}"

    def _draw(self) -> None:
        """Both stocks anew: what is left of the old is not used."""
        self._forks = _forks
        self._keys = b2a_base64(os.urandom(STOCK_BYTES), newline=False).translate(_URL_SAFE).decode()
        self._digits = os.urandom(STOCK_BYTES // 2).hex()
        self._key_at = self._digit_at = 0
