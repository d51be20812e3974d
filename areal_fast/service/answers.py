"""How refusals become HTTP: the one place that knows which error has which status, and how long to be
patient.

`{"detail": …}` is the form everywhere but under /data, which speaks AReaL's `{"status": "error", "message":
…}`. IndexBusy and ExportBusy are never an answer: `when_free` tries again on the loop with back-off and only
a process that holds the index for many seconds (the supervisor replaces it after one) makes a client see
503.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from areal_fast import errors
from areal_fast.core import ArenaFull, CoreError, Gone, IndexBusy
from areal_fast.protocol.validation import detail_json
from areal_fast.service.auth import Forbidden, Unauthorized

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.service.log import Log

T = TypeVar("T")

NO_ENGINE: Final = "No inference backend configured (external model mode)."
ARENA_FULL: Final = "The proxy's memory is full: export or remove sessions and clear shards, then try again."
BUSY: Final = "The proxy is busy with the same sessions. Try again."

FIRST_WAIT_S: Final = 0.0005
LONGEST_WAIT_S: Final = 0.05
PATIENCE_S: Final = 30.0

_encode = msgspec.json.Encoder().encode

_STATUS: Final[dict[type[Exception], int]] = {
    Unauthorized: 401,
    Forbidden: 403,
    errors.UnreadableBody: 400,
    errors.EmptySessionList: 400,
    errors.NoInteractions: 400,
    errors.InteractionNotFound: 400,
    errors.ShardRejected: 400,
    errors.SessionNotFound: 404,
    errors.TrajectoryNotFound: 404,
    errors.KeyBound: 409,
    errors.KeeperAway: 503,
}


def respond_json(exchange: Exchange, value: Any, status: int = 200) -> None:
    exchange.respond(status, _encode(value))


def refuse(exchange: Exchange, status: int, detail: Any) -> None:
    """`{"detail": …}`."""
    exchange.respond(status, _encode({"detail": detail}))


def refuse_data(exchange: Exchange, status: int, message: str, **more: Any) -> None:
    """`{"status": "error", "message": …}`, the form under /data."""
    exchange.respond(status, _encode({"status": "error", "message": message, **more}))


def status_of(error: Exception) -> tuple[int, Any] | None:
    """(status, detail) of a refusal; None for what is no refusal but a fault of ours."""
    status = _STATUS.get(type(error))
    if status is not None:
        return status, str(error)
    if isinstance(error, errors.InvalidBody):
        return 422, error.errors
    if isinstance(error, errors.NoReadyTrajectories):
        return (404 if error.named else 409), str(error)
    if isinstance(error, ArenaFull):
        return 507, ARENA_FULL
    if isinstance(error, (IndexBusy, errors.ExportBusy)):
        return 503, BUSY
    if isinstance(error, Gone):
        return 401, "Invalid or expired session API key."
    return None


def answer_error(exchange: Exchange, error: Exception, log: Log, *, data: bool = False) -> None:
    """Answer with the status an error stands for; a fault of ours is 500 and a line in the log."""
    found = status_of(error)
    if found is None:
        log.error(
            "fault",
            path=exchange.path,
            error=repr(error),
            code=error.code if isinstance(error, CoreError) else None,
            where=" < ".join(
                f"{frame.name}:{frame.lineno}"
                for frame in reversed(traceback.extract_tb(error.__traceback__)[-4:])
            ),
        )
        found = 500, "Internal error"
    if isinstance(error, errors.InvalidBody):
        exchange.respond(found[0], detail_json(error.errors))  # what was sent may be no valid Unicode
    elif data:
        refuse_data(exchange, found[0], str(found[1]))
    else:
        refuse(exchange, *found)


async def when_free(attempt: Callable[[], T]) -> T:
    """`attempt()`, again with back-off while the index or an export is busy. After PATIENCE_S its error."""
    wait, waited = FIRST_WAIT_S, 0.0
    while True:
        try:
            return attempt()
        except (IndexBusy, errors.ExportBusy):
            if waited >= PATIENCE_S:
                raise
        await asyncio.sleep(wait)
        waited += wait
        wait = min(wait * 2, LONGEST_WAIT_S)
