"""What a client can be told or meet, each with a text that says what happened and what to do.

    ClientError
    ├── Unreachable      no connection, or it broke before the reply was whole
    ├── TimedOut         no whole reply within timeout_s
    ├── BadReply         what came is not what the wire page promises
    └── ProxyError       the server refused: `status`, `detail`
        ├── Unauthorized     401, 403
        ├── NotFound         404, and a batch with missing shards
        │   └── ShardsNotFound   `shard_ids`
        ├── Conflict         409
        │   ├── NotReady         an export before the reward
        │   └── KeyBound         a start with a key that is in use
        ├── InvalidRequest   400, 422
        ├── Busy             503
        ├── EngineFailed     502, 504
        └── ArenaFull        507

`error_of` makes the right one from a reply. Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from areal_fast.errors import ArealFastError

_ADVICE = {
    401: "The key is not known: the session was exported and removed, has expired, or the key is mistyped.",
    403: "This call needs the admin key the proxy was started with (--admin-api-key).",
    404: "Check the id; sessions go with their export or when they are stale.",
    413: "Send less at once; the proxy takes bodies of up to 256 MiB.",
    502: "The proxy is up, its inference server is not: see `backend` in /health.",
    503: "Try again in a moment.",
    504: "The proxy is up, its inference server did not answer in time.",
    507: "Export and remove sessions, delete fetched shards, or start the proxy with more --arena-max-bytes.",
}


class ClientError(ArealFastError):
    """Base of everything the client raises itself."""


class Unreachable(ClientError):
    """No connection to `url`, or it broke. `sent`: the server may have done what was asked."""

    def __init__(self, url: str, why: str, *, sent: bool) -> None:
        advice = (
            "The request may have been carried out; what is safe to repeat was repeated already."
            if sent
            else "Nothing was sent. Is the proxy running there?"
        )
        super().__init__(f"{url}: {why}. {advice}")
        self.url = url
        self.sent = sent


class TimedOut(ClientError):
    """No whole reply within `timeout_s`. The server may have done what was asked."""

    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__(
            f"{url}: no whole reply within {timeout_s:g} s. It may have been carried out. "
            "Give the client more timeout_s if the work is large."
        )
        self.url = url


class BadReply(ClientError):
    """The reply is not what the wire page promises; another server than a data proxy, perhaps."""


class ProxyError(ClientError):
    """A refusal. `detail` is the server's own text (a list for a failed validation)."""

    def __init__(self, what: str, status: int, detail: Any, advice: str = "") -> None:
        advice = advice or _ADVICE.get(status, "")
        super().__init__(f"{what}: {_shown(detail)} (status {status}){'. ' + advice if advice else ''}")
        self.status = status
        self.detail = detail


class Unauthorized(ProxyError):
    """401 or 403."""


class NotFound(ProxyError):
    """404."""


class ShardsNotFound(NotFound):
    """`shard_ids`: those that are not there: never stored, deleted, or past their time."""

    def __init__(self, what: str, status: int, detail: Any, shard_ids: Sequence[str]) -> None:
        advice = (
            "Shards go when they are deleted or past --shard-ttl-seconds: fetch before the batch is cleared."
        )
        super().__init__(what, status, detail, advice)
        self.shard_ids = list(shard_ids)


class Conflict(ProxyError):
    """409."""


class NotReady(Conflict):
    """409 of an export: no trajectory of the session is closed by a reward yet."""


class KeyBound(Conflict):
    """409 of a start: the api key belongs to a live session without a ready trajectory."""


class InvalidRequest(ProxyError):
    """400 or 422."""


class Busy(ProxyError):
    """503: nothing was done."""


class EngineFailed(ProxyError):
    """502 or 504: the inference server behind the proxy."""


class ArenaFull(ProxyError):
    """507: nothing was stored, and nothing was dropped either."""


_KINDS: dict[int, type[ProxyError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    422: InvalidRequest,
    502: EngineFailed,
    503: Busy,
    504: EngineFailed,
    507: ArenaFull,
}


class _Refusal(msgspec.Struct):
    """`{"detail": …}`, or under /data `{"status": "error", "message": …}`."""

    detail: Any = None
    message: Any = None
    missing_shard_ids: list[str] | None = None


_decoder = msgspec.json.Decoder(_Refusal)


def error_of(what: str, status: int, body: bytes) -> ProxyError:
    """The exception for a refusal of the call `what` ("POST http://…/export_trajectories")."""
    try:
        refusal = _decoder.decode(body)
        detail = refusal.detail if refusal.detail is not None else refusal.message
        missing = refusal.missing_shard_ids
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        detail, missing = None, None
    if detail is None:
        detail = body[:200].decode(errors="replace") or "no text"
    if missing is not None:
        return ShardsNotFound(what, status, f"{detail}: {', '.join(missing[:5])}", missing)
    if status == 409 and what.endswith("/export_trajectories"):
        advice = "Set a reward first; with --set-reward-finish-timeout also wait for it to pass."
        return NotReady(what, status, detail, advice)
    if status == 409 and what.endswith("/rl/start_session"):
        return KeyBound(what, status, detail, "Reward and export that session first, or give no api_key.")
    return _KINDS.get(status, ProxyError)(what, status, detail)


def _shown(detail: Any) -> str:
    """The text of a detail; of a failed validation `loc: msg` for each error."""
    if not isinstance(detail, list):
        return str(detail)
    parts = []
    for one in detail:
        if isinstance(one, dict):
            where = ".".join(str(step) for step in one.get("loc", ()))
            parts.append(f"{where}: {one.get('msg', 'invalid')}")
        else:
            parts.append(str(one))
    return "; ".join(parts)
