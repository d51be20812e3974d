"""Request bodies of start_session, set_reward and export_trajectories.

`decode_*` turn body bytes into a struct or raise InvalidBody with the 422 details. Fast path: one typed
msgspec pass. What it refuses goes through validation.py, which knows the original's lax conversions and its
words. Whether a body of another content type is refused is decided by `wants_json` (the caller asks it: these
three endpoints want JSON, the others do not look).

An export request is told apart by its fields: `session_id` is pr1268, `session_ids` the later forms, whose
answers differ (main-may: interactions, 1.0 and v2: one batch).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from areal_fast.errors import InvalidBody
from areal_fast.protocol import validation as v

Dialect = Literal["pr1268", "main-may", "1.0", "v2"]

MAX_NAME_BYTES = 1024
MAX_GROUP_SIZE = 1024
STYLES = ("individual", "concat")


class StartSession(msgspec.Struct):
    """group_size ≤ 0 means 1; an empty or null api_key means: make one."""

    task_id: str
    api_key: str | None = None
    group_size: int = 1


class SetReward(msgspec.Struct):
    """reward is finite. interaction_id null or "": the newest."""

    reward: float
    interaction_id: str | None = None
    model: str | None = None


class ExportRequest(msgspec.Struct):
    """What to export, whatever dialect asked. `dialect` decides the answer's form."""

    session_ids: list[str]
    trajectory_id: int | None = None
    discount: float = 1.0
    style: str = "individual"
    remove_session: bool = False
    group_id: str | None = None
    dialect: Dialect = "1.0"


class _ExportOne(msgspec.Struct):
    session_id: str
    trajectory_id: int | None = None
    discount: float = 1.0
    style: str = "individual"
    remove_session: bool = False


class _ExportMany(msgspec.Struct):
    session_ids: list[str]
    group_id: str | None = None
    trajectory_id: int | None = None
    discount: float = 1.0
    style: str = "individual"
    remove_session: bool = True


def _task_id(value: Any, loc: v.Loc) -> str:
    return v.text(value, loc, max_bytes=MAX_NAME_BYTES, forbid_nul=True)


def _api_key(value: Any, loc: v.Loc) -> str:
    return v.text(value, loc, max_bytes=MAX_NAME_BYTES)


def _group_size(value: Any, loc: v.Loc) -> int:
    return v.integer(value, loc, at_most=MAX_GROUP_SIZE)


_START = (
    v.Field("task_id", _task_id),
    v.Field("api_key", v.optional(_api_key), None),
    v.Field("group_size", _group_size, 1),
)
_REWARD = (
    v.Field("interaction_id", v.optional(v.text), None),
    v.Field("reward", v.number),
    v.Field("model", v.optional(v.text), None),
)
_EXPORT_TAIL = (
    v.Field("trajectory_id", v.optional(v.integer), None),
    v.Field("discount", v.number, 1.0),
    v.Field("style", v.text, "individual"),
)
_EXPORT_ONE = (
    v.Field("session_id", v.text),
    *_EXPORT_TAIL,
    v.Field("remove_session", v.boolean, False),
)
_EXPORT_MANY = (
    v.Field("session_ids", v.texts),
    v.Field("group_id", v.optional(v.text), None),
    *_EXPORT_TAIL,
    v.Field("remove_session", v.boolean, True),
)

_start_decoder = msgspec.json.Decoder(StartSession)
_reward_decoder = msgspec.json.Decoder(SetReward)
_one_decoder = msgspec.json.Decoder(_ExportOne)
_many_decoder = msgspec.json.Decoder(_ExportMany)


def wants_json(content_type: bytes | None, body: bytes) -> None:
    """Raise InvalidBody unless the content type is JSON (application/json or +json). A body of another type
    is, to these endpoints, a string and not an object; no body is a missing one."""
    if content_type == b"application/json":
        return
    kind = (content_type or b"").split(b";", 1)[0].strip().lower()
    main, _, sub = kind.partition(b"/")
    if not body or (main == b"application" and (sub == b"json" or sub.endswith(b"+json"))):
        return
    v.convert_body(body.decode("utf-8", "replace"), ())


def _parse(body: bytes) -> Any:
    return v.parse_json(body) if body else None


def decode_start(body: bytes) -> StartSession:
    """A start_session body. InvalidBody, UnreadableBody."""
    try:
        m = _start_decoder.decode(body)
        # at most 4 bytes a character: only names near the limit need the exact check
        if (
            len(m.task_id) <= MAX_NAME_BYTES // 4
            and "\0" not in m.task_id
            and (m.api_key is None or len(m.api_key) <= MAX_NAME_BYTES // 4)
            and m.group_size <= MAX_GROUP_SIZE
        ):
            return m
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return StartSession(**v.convert_body(_parse(body), _START))


def decode_reward(body: bytes) -> SetReward:
    """A set_reward body. InvalidBody, UnreadableBody."""
    try:
        m = _reward_decoder.decode(body)
        if math.isfinite(m.reward):
            return m
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return SetReward(**v.convert_body(_parse(body), _REWARD))


def decode_export(
    body: bytes, *, dialect: Dialect | None = None, default: Dialect = "1.0", concat: bool = False
) -> ExportRequest:
    """An export_trajectories body.

    `dialect` None: told by the request (`default` if it shows neither form, and for the answer to
    `session_ids`). `concat`: the proxy runs the concat template, so that style is allowed.
    InvalidBody. An empty list of sessions passes: that is a 400 after authorization, not a 422 before it."""
    if dialect is None:
        try:
            one = _one_decoder.decode(body)
            if b'"session_ids"' not in body:
                return _checked(_from_one(one), concat)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        later: Dialect = "1.0" if default == "pr1268" else default
        try:
            return _checked(_from_many(_many_decoder.decode(body), later), concat)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        value = _parse(body)
        has = value.keys() if isinstance(value, dict) else ()
        if "session_ids" in has:
            dialect = later
        elif "session_id" in has:
            dialect = "pr1268"
        else:
            dialect = default
    else:
        try:
            if dialect == "pr1268":
                return _checked(_from_one(_one_decoder.decode(body)), concat)
            return _checked(_from_many(_many_decoder.decode(body), dialect), concat)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            value = _parse(body)
    if dialect == "pr1268":
        return _checked(_from_one(_ExportOne(**v.convert_body(value, _EXPORT_ONE))), concat)
    return _checked(_from_many(_ExportMany(**v.convert_body(value, _EXPORT_MANY)), dialect), concat)


def _from_one(m: _ExportOne) -> ExportRequest:
    return ExportRequest(
        [m.session_id], m.trajectory_id, m.discount, m.style, m.remove_session, None, "pr1268"
    )


def _from_many(m: _ExportMany, dialect: Dialect) -> ExportRequest:
    return ExportRequest(
        m.session_ids, m.trajectory_id, m.discount, m.style, m.remove_session, m.group_id, dialect
    )


def _checked(m: ExportRequest, concat: bool) -> ExportRequest:
    errors: list[dict[str, Any]] = []
    if not math.isfinite(m.discount):
        errors.append(
            v.error("finite_number", ("body", "discount"), "Input should be a finite number", m.discount)
        )
    if m.style not in STYLES or (m.style == "concat" and not concat):
        expected = "'individual' or 'concat'" if concat else "'individual'"
        errors.append(
            v.error(
                "literal_error", ("body", "style"), f"Input should be {expected}", m.style, expected=expected
            )
        )
    if errors:
        raise InvalidBody(errors)
    return m
