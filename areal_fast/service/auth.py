"""Who asks: the bearer token of a request, and whether it is the admin key.

Keys are compared as bytes and in constant time, non-ASCII included. A token that is no valid UTF-8 is read as
Latin-1, as HTTP libraries send it, so that the same key works from every client.
Texts and order of the checks: the wire page, "Rules for every endpoint".
"""

from __future__ import annotations

import hmac

from areal_fast.errors import ArealFastError


class Unauthorized(ArealFastError):
    """401."""


class Forbidden(ArealFastError):
    """403."""


class Keys:
    """The admin key, and how tokens are read."""

    def __init__(self, admin_api_key: str) -> None:
        self._admin = admin_api_key.encode()
        self._admin_header = b"Bearer " + self._admin

    def is_admin(self, token: bytes) -> bool:
        if token.isascii():
            return hmac.compare_digest(token, self._admin)
        return self.is_admin_text(as_text(token))

    def is_admin_text(self, key: str) -> bool:
        """Whether a key given as text (as in a start_session body) is the admin key."""
        return hmac.compare_digest(key.encode("utf-8", "surrogatepass"), self._admin)

    def require_admin(self, authorization: bytes | None) -> None:
        """Unauthorized (401) without a bearer token, Forbidden (403) with a wrong one."""
        if authorization is not None and hmac.compare_digest(authorization, self._admin_header):
            return  # as nearly everyone writes it
        if not self.is_admin(require_bearer(authorization)):
            raise Forbidden("Invalid admin API key.")


def bearer(authorization: bytes | None) -> bytes | None:
    """The token of an Authorization header, or None if there is none or it has another form."""
    if authorization is None:
        return None
    if not authorization.startswith(b"Bearer ") and authorization[:7].lower() != b"bearer ":
        return None
    return authorization[7:].strip()


def require_bearer(authorization: bytes | None) -> bytes:
    """The token, or Unauthorized (401)."""
    token = bearer(authorization)
    if token is None:
        raise Unauthorized("Missing or malformed Authorization header. Expected 'Bearer <token>'.")
    return token


def as_text(token: bytes) -> str:
    """The token as the text a session key was given as."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return token.decode("latin-1")
