"""GET /openapi.json: every endpoint as an OpenAPI 3.1 document, for tools and fuzzers.

Request bodies come from the types that decode them (protocol/messages.py, protocol/chat.py), so they cannot
drift; what is read without a type is described here. Schemas say what a well-behaved client sends: start,
reward and export take some other JSON forms, too (numbers as strings), as the original does. Unknown members
are ignored everywhere. A test holds the paths and methods against the routing table.

Made once a process, when first asked for. Pure: nothing here knows the state of the proxy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

from areal_fast import __version__
from areal_fast.protocol import messages
from areal_fast.protocol.chat import ChatRequest

if TYPE_CHECKING:
    from areal_fast.http import Exchange

Schema = dict[str, Any]

_JSON: Final = "application/json"
_COMPUTED: Final = ("images", "vision_messages", "sampled")
"""Fields of ChatRequest that are never read from a body."""

_TEXT: Final[Schema] = {"type": "string"}
_INT: Final[Schema] = {"type": "integer"}
_BOOL: Final[Schema] = {"type": "boolean"}
_OBJECT: Final[Schema] = {"type": "object"}


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_DETAIL: Final = _object({"detail": _TEXT})
_INVALID: Final = _object(
    {"detail": _list(_object({"type": _TEXT, "loc": _list({"type": ["string", "integer"]}), "msg": _TEXT}))}
)
_DATA_ERROR: Final = _object({"status": {"const": "error"}, "message": _TEXT}, missing_shard_ids=_list(_TEXT))
_API_ERROR: Final = _object({"error": {"type": ["object", "string"]}})
_OK: Final = _object({"status": {"const": "ok"}})
_TENSOR: Final = _object(
    {
        "type": {"enum": ["tensor", "ndarray"]},
        "data": _TEXT,
        "shape": _list({"type": "integer", "minimum": 0}),
        "dtype": {"type": "string", "examples": ["torch.float32", "<f4"]},
    }
)

_PART: Final = _object({"type": {"const": "text"}, "text": _TEXT})
_TURN: Final = _object(
    {
        "role": {"enum": ["user", "assistant"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}]},
    }
)

_WORDS: Final = {
    200: "Done",
    201: "Made",
    400: "Refused: the detail says why",
    401: "No or an unknown key",
    403: "Not the admin key",
    404: "Not there",
    408: "The request came too slowly",
    409: "In the way of something else",
    413: "Body too large",
    422: "The body is not what this endpoint reads",
    502: "The engine or provider failed",
    503: "No engine, or too busy: try again",
    504: "The engine did not answer in time",
    507: "The proxy's memory is full",
}


def _reply(status: int, schema: Schema, kind: str = _JSON) -> Schema:
    return {"description": _WORDS[status], "content": {kind: {"schema": schema}}}


def _operation(
    summary: str,
    *,
    ok: Schema,
    errors: tuple[int, ...] = (),
    body: Schema | None = None,
    body_required: bool = True,
    key: str = "",
    status: int = 200,
    kinds: tuple[str, ...] = (_JSON,),
    error: Schema = _DETAIL,
    parameters: tuple[Schema, ...] = (),
) -> Schema:
    """`key`: "admin", "session" or "any" where one may be sent."""
    replies: Schema = {
        str(status): {
            "description": _WORDS[status],
            "content": {
                kind: {"schema": ok if kind in (_JSON, "application/octet-stream") else {}} for kind in kinds
            },
        }
    }
    answered = {*errors, *((401, 403) if key == "admin" else ()), *((400, 408, 413, 503) if body else ())}
    for number in sorted(answered):
        replies[str(number)] = _reply(number, _INVALID if number == 422 else error)
    if error is not _DETAIL:  # the HTTP layer below has one form of its own
        for number in answered & {400, 401, 403, 408, 413, 503}:
            replies[str(number)] = _reply(number, {"anyOf": [error, _DETAIL]})
    operation: Schema = {"summary": summary, "responses": replies}
    if body is not None:
        operation["requestBody"] = {"required": body_required, "content": {_JSON: {"schema": body}}}
    if key:
        operation["security"] = [{"key": []}, *([{}] if key == "any" else [])]
    if parameters:
        operation["parameters"] = list(parameters)
    return operation


_SHARD_ID: Final[Schema] = {
    "name": "shard_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "minLength": 1},
}
_MODEL: Final[Schema] = {**_SHARD_ID, "name": "model"}


def _paths(ref: dict[type, Schema]) -> dict[str, Schema]:
    engine = (502, 503, 504)
    chat_errors = (400, 401, 422, 502, 503, 504, 507)
    streams = (_JSON, "text/event-stream")
    status: Schema = {"ok": _OK, "errors": engine}
    chat = _operation(
        "A chat, recorded in the session of its key",
        body=ref[ChatRequest], ok=_OBJECT, errors=chat_errors, key="any", kinds=streams,
    )  # fmt: skip
    responses = _operation(
        "OpenAI responses",
        body=_object({"input": {"anyOf": [_TEXT, _list(_TURN)]}}, model=_TEXT, stream=_BOOL),
        ok=_OBJECT, errors=chat_errors, key="any", kinds=streams, error=_API_ERROR,
    )  # fmt: skip
    models = _operation("The models' names", ok=_object({"data": _list(_OBJECT)}))
    model = _operation(
        "One model", ok=_object({"id": _TEXT}), errors=(404,), error=_API_ERROR, parameters=(_MODEL,)
    )
    shard_ids = _object({"shard_ids": _list(_TEXT)})
    exporting = {"oneOf": [ref[messages._ExportMany], ref[messages._ExportOne]]}
    exported = {"anyOf": [_object({"traj": _OBJECT}), _object({"interactions": _OBJECT})]}
    name = _object({"status": _TEXT, "name": _TEXT})
    started = _object(
        {
            "session_id": _TEXT,
            "api_key": _TEXT,
            "group_id": _TEXT,
            "sessions": _list(_object({"session_id": _TEXT, "session_api_key": _TEXT})),
        }
    )
    rewarded = _object(
        {
            "message": _TEXT,
            "interaction_count": _INT,
            "session_id": _TEXT,
            "trajectory_id": {"type": ["integer", "null"]},
            "trajectory_ready": _BOOL,
            "ready_transition": _BOOL,
        }
    )
    page = tuple(
        {"name": each, "in": "query", "schema": {"type": "integer", "minimum": low}}
        for each, low in (("limit", 1), ("cursor", 0))
    )
    data: Schema = {"error": _DATA_ERROR, "kinds": (_JSON,)}
    octets: Schema = {"error": _DATA_ERROR, "kinds": ("application/octet-stream",)}
    get_shard = _operation("A tensor", ok=_TENSOR, errors=(401, 403, 404), parameters=(_SHARD_ID,), **octets)
    put_shard = _operation(
        "Store a tensor or an array", body=_TENSOR, ok=_OK,
        errors=(400, 401, 403, 404, 507), parameters=(_SHARD_ID,), **data,
    )  # fmt: skip
    get: Schema = {
        "/health": _operation(
            "How the proxy is", ok=_object({"status": _TEXT, "sessions": _INT, "version": _INT})
        ),
        "/get_version": _operation("The weight version", ok=_object({"version": _INT})),
        "/metrics": _operation("Prometheus text", ok={}, kinds=("text/plain",)),
        "/openapi.json": _operation("This document", ok=_OBJECT),
        "/admin/sessions": _operation(
            "Live sessions, a page at a time", ok=_object({"sessions": _list(_OBJECT)}),
            errors=(400,), key="admin", parameters=page,
        ),
        "/v1/models": models,
        "/models": models,
        "/v1/models/{model}": model,
        "/data/{shard_id}": get_shard,
    }  # fmt: skip
    post: Schema = {
        "/configure": _operation("Accepted and ignored", ok=_OK),
        "/pause_generation": _operation("Stop generating", **status),
        "/continue_generation": _operation("Go on generating", **status),
        "/release_memory_occupation": _operation("Let the engine free its memory", **status),
        "/resume_memory_occupation": _operation(
            "Let the engine take memory again",
            body=_object({}, tags=_list(_TEXT)), body_required=False, **status,
        ),
        "/set_version": _operation(
            "Set the weight version",
            body=_object({"version": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}}),
            ok=_object({"status": _TEXT, "version": _INT}), errors=(400,),
        ),
        "/configure_backend": _operation(
            "Use another engine", body=_object({"backend_addr": _TEXT}),
            ok=_object({"status": _TEXT, "backend_addr": _TEXT}), key="admin",
        ),
        "/register_model": _operation(
            "Name an external model",
            body=_object({"name": _TEXT}, url=_TEXT, model={"type": ["string", "null"]}, api_key=_TEXT),
            ok=name, errors=(507,), key="admin",
        ),
        "/rl/start_session": _operation(
            "Start a session, or a group of them", body=ref[messages.StartSession], ok=started, status=201,
            errors=(409, 422, 507), key="admin",
        ),
        "/rl/set_reward": _operation(
            "Reward an interaction", body=ref[messages.SetReward], ok=rewarded,
            errors=(401, 422, 507), key="session",
        ),
        "/export_trajectories": _operation(
            "Export what is ready", body=exporting, ok=exported, errors=(404, 409, 422, 507), key="admin"
        ),
        "/chat/completions": chat,
        "/v1/chat/completions": chat,
        "/v1/messages": _operation(
            "Anthropic messages",
            body=_object(
                {"messages": _list(_TURN), "max_tokens": _INT},
                model=_TEXT, stream=_BOOL,
            ),
            ok=_OBJECT, errors=chat_errors, key="any", kinds=streams, error=_API_ERROR,
        ),
        "/v1/messages/count_tokens": _operation(
            "Tokens of an Anthropic request",
            body=_object({"messages": _list(_TURN)}, model=_TEXT),
            ok=_object({"input_tokens": _INT}), errors=chat_errors, key="any", error=_API_ERROR,
        ),
        "/v1/responses": responses,
        "/responses": responses,
        "/data/gpu": _operation(
            "Where this host's processes share GPU tensors",
            body=_object({}, gpu=_TEXT), body_required=False,
            ok=_object({"gpu": _TEXT, "socket": _TEXT, "pool_bytes": _INT}),
            errors=(400, 401, 403, 503), **data,
        ),
        "/data/batch": _operation(
            "Several tensors", body=shard_ids, ok=_list(_TENSOR), errors=(401, 403), **octets
        ),
    }  # fmt: skip
    paths: dict[str, Schema] = {}
    for method, operations in (("get", get), ("post", post)):
        for path, operation in operations.items():
            paths.setdefault(path, {})[method] = operation
    paths["/data/{shard_id}"]["put"] = put_shard
    paths["/data/clear"] = {
        "delete": _operation(
            "Forget tensors", body=shard_ids,
            ok=_object({"status": _TEXT, "cleared_count": _INT, "num_tensors": _INT, "total_bytes": _INT}),
            errors=(401, 403, 507), **data,
        )
    }  # fmt: skip
    return paths


def document() -> Schema:
    """The document as a Python object."""
    types: list[type] = [
        messages.StartSession, messages.SetReward, messages._ExportOne, messages._ExportMany, ChatRequest,
    ]  # fmt: skip
    refs, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for field in _COMPUTED:
        del components["ChatRequest"]["properties"][field]
    return {
        "openapi": "3.1.0",
        "info": {"title": "areal_fast", "version": __version__},
        "paths": _paths(dict(zip(types, refs, strict=True))),
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


@cache
def _encoded() -> bytes:
    return msgspec.json.encode(document())


def serve(exchange: Exchange) -> None:
    exchange.respond(200, _encoded())
