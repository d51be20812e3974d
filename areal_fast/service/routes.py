"""Which request is answered how: paths, methods, the order of the checks, and the bodies of the answers.

Every handler gets the Exchange and answers it, at once or as a coroutine (what only touches the arena answers
at once; no task is made for it). Order of the checks, as the original: body (422), authorization (401, 403),
the rule itself. Unknown path: 404; known path, other method: 405 with Allow. A path of `more` that ends with
a slash stands for all below it. Source: the wire page.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from areal_fast.core import IndexBusy
from areal_fast.errors import ExportBusy, ShardRejected, ShardsNotFound
from areal_fast.protocol import messages
from areal_fast.service import auth
from areal_fast.service.answers import answer_error, refuse, refuse_data, respond_json, when_free
from areal_fast.service.auth import Forbidden, Unauthorized
from areal_fast.service.intake import MAX_RAW_HEADER_BYTES, WORTH_STREAMING, RawIntake
from areal_fast.service.meters import EXPORTS_DELIVERED, EXPORTS_UNDELIVERED, SESSIONS_STARTED
from areal_fast.shards import raw
from areal_fast.shards.store import checked_name

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.http._native import RequestHead
    from areal_fast.service.chat import Chats
    from areal_fast.service.control import Control
    from areal_fast.service.gpu import GpuShards
    from areal_fast.service.health import Health
    from areal_fast.service.log import Log
    from areal_fast.shards import Outgoing, RawOutgoing, ShardStore
    from areal_fast.shards.store import Elsewhere
    from areal_fast.store import SessionStore

Handler = Callable[["Exchange"], Awaitable[None] | None]

OCTETS = b"application/octet-stream"
SENT_AT_ONCE = 1 << 21
SENT_A_TURN = 1 << 20
JSON_TYPE = b"application/json"
RAW = raw.MEDIA_TYPE.encode()
LET_GO_S = 1.0
"""How long an export that removes a session waits for another worker, which has answered its request, to let
go of the session. One still held after that has a turn in flight, and stays."""
NOT_A_LIST = "'shard_ids' must be a list"
NOT_A_STRING_LIST = "Expected JSON body with string list field 'shard_ids'"
_encode = msgspec.json.Encoder().encode


class Routes:
    """The handler of the HTTP server: call it with an Exchange."""

    def __init__(
        self,
        store: SessionStore,
        shards: ShardStore,
        chats: Chats,
        control: Control,
        health: Health,
        keys: auth.Keys,
        log: Log,
        *,
        dialect: messages.Dialect = "1.0",
        data_auth: bool = False,
        concat: bool = False,
        gpu: GpuShards | None = None,
        more: Mapping[str, dict[str, Handler]] | None = None,
    ) -> None:
        self._store = store
        self._shards = shards
        self._keys = keys
        self._log = log
        self._dialect: messages.Dialect = dialect
        self._data_auth = data_auth
        self._concat = concat
        self._gpu = gpu
        self._table: dict[str, dict[str, Handler]] = {
            "/health": {"GET": health.serve},
            "/configure": {"POST": _configure},
            "/pause_generation": {"POST": control.pause},
            "/continue_generation": {"POST": control.resume},
            "/release_memory_occupation": {"POST": control.release_memory},
            "/resume_memory_occupation": {"POST": control.resume_memory},
            "/set_version": {"POST": control.set_version},
            "/get_version": {"GET": control.get_version},
            "/configure_backend": {"POST": control.configure_backend},
            "/register_model": {"POST": control.register_model},
            "/rl/start_session": {"POST": self.start_session},
            "/rl/set_reward": {"POST": self.set_reward},
            "/chat/completions": {"POST": chats.serve},
            "/v1/chat/completions": {"POST": chats.serve},
            "/export_trajectories": {"POST": self.export_trajectories},
            **(more or {}),
        }
        self._below = {path: self._table.pop(path) for path in [*self._table] if path.endswith("/")}
        shard: dict[str, Handler] = {"GET": self.get_shard, "PUT": self.put_shard}
        self._shard = shard
        if "/data/ways" in self._table:
            self._table["/data/ways"] = {**shard, **self._table["/data/ways"]}
        if gpu is not None:
            self._table["/data/gpu"] = {**shard, "POST": gpu.offer}
        self._table["/data/batch"] = {**shard, "POST": self.batch}
        self._table["/data/clear"] = {**shard, "DELETE": self.clear}

    def __call__(self, exchange: Exchange) -> Awaitable[None] | None:
        path = exchange.path
        methods = self._table.get(path)
        data = path.startswith("/data/")
        if methods is None and not data and not path.endswith("/"):
            methods = next((each for below, each in self._below.items() if path.startswith(below)), None)
        if methods is None:
            if not data or "/" in path[6:] or len(path) == 6:
                refuse(exchange, 404, "Not Found")
                return None
            methods = self._shard
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            offered = {*methods, *(("HEAD",) if "GET" in methods else ()), *(("OPTIONS",) if data else ())}
            allow = ((b"allow", ", ".join(sorted(offered)).encode()),)
            if exchange.method in offered:  # OPTIONS, which the original answers under /data and nowhere else
                exchange.respond(200, b"", headers=allow)
            else:
                exchange.respond(405, _encode({"detail": "Method Not Allowed"}), headers=allow)
            return None
        try:
            if data and self._data_auth:
                self._keys.require_admin(exchange.headers.get(b"authorization"))
            pending = handler(exchange)
        except Exception as error:
            answer_error(exchange, error, self._log, data=data)
            return None
        return None if pending is None else self._guarded(exchange, pending, data)

    async def _guarded(self, exchange: Exchange, pending: Awaitable[None], data: bool) -> None:
        try:
            await pending
        except Exception as error:
            answer_error(exchange, error, self._log, data=data)

    def _at_once_or_later(self, attempt: Callable[[], None]) -> Coroutine[Any, Any, None] | None:
        """Try now; if the index or an export is busy, go on trying as a task."""
        try:
            attempt()
            return None
        except (IndexBusy, ExportBusy):
            return when_free(attempt)

    # -- sessions --------------------------------------------------------------------------------------
    def start_session(self, exchange: Exchange) -> Awaitable[None] | None:
        messages.wants_json(exchange.headers.get(b"content-type"), exchange.body)
        body = messages.decode_start(exchange.body)
        self._keys.require_admin(exchange.headers.get(b"authorization"))
        if body.api_key and self._keys.is_admin_text(body.api_key):
            refuse(exchange, 400, "The admin API key cannot be a session's key.")
            return None

        def attempt() -> None:
            group = self._store.start(body.task_id, body.api_key or None, body.group_size)
            first_id, first_key = group.sessions[0]
            self._store.arena.count(SESSIONS_STARTED, len(group.sessions))
            if self._log.tells:
                self._log.info("started", sessions=[i for i, _ in group.sessions], group=group.group_id)
            respond_json(
                exchange,
                {
                    "session_id": first_id,
                    "api_key": first_key,
                    "group_id": group.group_id,
                    "sessions": [{"session_id": i, "session_api_key": k} for i, k in group.sessions],
                },
                201,
            )

        return self._at_once_or_later(attempt)

    def set_reward(self, exchange: Exchange) -> Awaitable[None] | None:
        messages.wants_json(exchange.headers.get(b"content-type"), exchange.body)
        body = messages.decode_reward(exchange.body)
        token = auth.require_bearer(exchange.headers.get(b"authorization"))
        admin = self._keys.is_admin(token)

        def attempt() -> None:
            session = self._store.hitl() if admin else self._store.by_key(auth.as_text(token))
            if session is None:
                refuse(exchange, 401, "Invalid or expired session API key.")
                return
            with session:
                result = session.set_reward(body.reward, body.interaction_id or None)
            if self._log.tells:
                self._log.info(
                    "rewarded",
                    session=result.session_id,
                    trajectory=result.trajectory_id,
                    reward=body.reward,
                    ready=result.trajectory_ready,
                )
            respond_json(
                exchange,
                {
                    "message": "success",
                    "interaction_count": result.interaction_count,
                    "session_id": result.session_id,
                    "trajectory_id": result.trajectory_id,
                    "trajectory_ready": result.trajectory_ready,
                    "ready_transition": result.ready_transition,
                },
            )

        return self._at_once_or_later(attempt)

    def export_trajectories(self, exchange: Exchange) -> Awaitable[None] | None:
        messages.wants_json(exchange.headers.get(b"content-type"), exchange.body)
        request = messages.decode_export(exchange.body, default=self._dialect, concat=self._concat)
        self._keys.require_admin(exchange.headers.get(b"authorization"))
        patient_until = time.monotonic() + LET_GO_S

        def attempt() -> None:
            export = self._store.begin_export(request, patient=time.monotonic() < patient_until)

            def sent(arrived: bool) -> None:
                if arrived:
                    export.delivered()
                else:
                    export.undelivered()
                self._store.arena.count(EXPORTS_DELIVERED if arrived else EXPORTS_UNDELIVERED)
                self._log.info(
                    "exported" if arrived else "export_undelivered",
                    sessions=request.session_ids,
                    trajectory=request.trajectory_id,
                    interactions=export.interactions,
                    bytes=len(export.body),
                    removed=request.remove_session if arrived else None,
                )

            exchange.on_sent(sent)
            exchange.respond(200, export.body)

        return self._at_once_or_later(attempt)

    # -- shards ----------------------------------------------------------------------------------------
    def put_shard(self, exchange: Exchange) -> Awaitable[None] | None:
        """JSON of one tensor; or a safetensors file of one, whatever its name there, and under /data/batch of
        any number, each stored under its name. Nothing of a file with a fault in it is stored; nor, if it was
        taken as it arrived (`sink`), of one that the arena has no room for (507)."""
        shard_id = exchange.path[6:]
        if media_type(exchange.headers.get(b"content-type")) == RAW:
            return self._put_raw(exchange, shard_id)

        def attempt() -> None:
            try:
                self._shards.put_json(shard_id, exchange.body)
            except ShardRejected as error:
                refuse_data(exchange, 400, str(error))
                return
            respond_json(exchange, {"shard_id": shard_id, "status": "ok"})

        return self._at_once_or_later(attempt)

    def sink(self, head: RequestHead) -> RawIntake | None:
        """Who takes the body of a request as it arrives, or None: a raw shard that is allowed to come. What
        is not gets its answer from the handler, as ever."""
        if head.body_size < WORTH_STREAMING or not _is_raw_put(head):
            return None
        if self._data_auth:
            try:
                self._keys.require_admin(head.headers.get(b"authorization"))
            except (Unauthorized, Forbidden):
                return None
        shard_id = head.path[6:]
        return RawIntake(self._shards, None if shard_id == "batch" else shard_id, head.body_size)

    def streamed_bytes(self, head: RequestHead) -> int:
        """How large such a body may be: as all of the arena; the budget says no to what is too large now."""
        return self._shards.arena.stats()["bytes_max"] + MAX_RAW_HEADER_BYTES if _is_raw_put(head) else 0

    async def _put_streamed(self, exchange: Exchange, sink: RawIntake, shard_id: str) -> None:
        stored = await sink.store()
        named: dict[str, Any] = {"shard_ids": stored} if shard_id == "batch" else {"shard_id": shard_id}
        respond_json(exchange, {**named, "status": "ok"})

    def _put_raw(self, exchange: Exchange, shard_id: str) -> Awaitable[None] | None:
        """A file that came as a whole: a small one, or one of unknown length."""
        if isinstance(exchange.sink, RawIntake):
            return self._put_streamed(exchange, exchange.sink, shard_id)
        many = shard_id == "batch"
        try:
            entries, data = raw.parse(exchange.body, MAX_RAW_HEADER_BYTES)
            if not many and len(entries) != 1:
                raise ShardRejected(f"The file holds {len(entries)} tensors; one is stored under one id")
            for entry in entries:
                checked_name(entry.name if many else shard_id)
        except ShardRejected as error:
            refuse_data(exchange, 400, str(error))
            return None
        named: dict[str, Any] = {"shard_ids": [e.name for e in entries]} if many else {"shard_id": shard_id}
        left = entries[::-1]

        def attempt() -> None:
            while left:
                name, what, start, stop = left[-1]
                self._shards.put(name if many else shard_id, what, data[start:stop])
                left.pop()
            respond_json(exchange, {**named, "status": "ok"})

        return self._at_once_or_later(attempt)

    def get_shard(self, exchange: Exchange) -> Awaitable[None] | None:
        shard_id = exchange.path[6:]
        if self._gpu is not None and self._gpu.has((shard_id,)):
            return self._with_gpu(exchange, (shard_id,), lambda parts: self._get(exchange, shard_id, parts))
        return self._get(exchange, shard_id, {})

    async def _with_gpu(
        self,
        exchange: Exchange,
        shard_ids: Sequence[str],
        answer: Callable[[Elsewhere], Awaitable[None] | None],
    ) -> None:
        """`answer` with the parts that had to be fetched from a GPU. KeeperAway."""
        assert self._gpu is not None
        pending = answer(await self._gpu.fetch(shard_ids))
        if pending is not None:
            await pending

    def _get(self, exchange: Exchange, shard_id: str, parts: Elsewhere) -> Awaitable[None] | None:
        if wants_raw(exchange.headers.get(b"accept")) and "\0" not in shard_id:
            try:
                return _send(exchange, self._shards.raw([shard_id], parts), RAW)
            except ShardsNotFound:
                refuse_data(exchange, 404, f"Shard {shard_id} not found")
                return None
        found = None if "\0" in shard_id else self._shards.get_json(shard_id, parts)
        if found is None:
            refuse_data(exchange, 404, f"Shard {shard_id} not found")
            return None
        return _send(exchange, found)

    def batch(self, exchange: Exchange) -> Awaitable[None] | None:
        shard_ids = _shard_ids(exchange)
        if shard_ids is None or not all(isinstance(shard_id, str) for shard_id in shard_ids):
            refuse_data(exchange, 400, NOT_A_STRING_LIST)
            return None
        if self._gpu is not None and self._gpu.has(shard_ids):
            return self._with_gpu(exchange, shard_ids, lambda parts: self._batch(exchange, shard_ids, parts))
        return self._batch(exchange, shard_ids, {})

    def _batch(self, exchange: Exchange, shard_ids: list[str], parts: Elsewhere) -> Awaitable[None] | None:
        try:
            if wants_raw(exchange.headers.get(b"accept")):
                return _send(exchange, self._shards.raw(shard_ids, parts), RAW)
            return _send(exchange, self._shards.batch_json(shard_ids, parts))
        except ShardsNotFound as error:
            refuse_data(exchange, 400, str(error), missing_shard_ids=error.shard_ids)
            return None

    def clear(self, exchange: Exchange) -> Awaitable[None] | None:
        shard_ids = _shard_ids(exchange)
        if shard_ids is None:
            refuse_data(exchange, 400, NOT_A_LIST)
            return None
        names = [shard_id for shard_id in shard_ids if isinstance(shard_id, str)]
        cleared = 0

        def attempt() -> None:
            nonlocal cleared
            while names:
                removed, _, _ = self._shards.clear(names[-1:])
                cleared += removed
                names.pop()
            _, tensors, nbytes = self._shards.clear(())
            respond_json(
                exchange,
                {"status": "ok", "cleared_count": cleared, "num_tensors": tensors, "total_bytes": nbytes},
            )

        return self._at_once_or_later(attempt)


def media_type(value: bytes | None) -> bytes:
    """Of a Content-Type, without its parameters."""
    return (value or b"").split(b";", 1)[0].strip().lower()


def _is_raw_put(head: RequestHead) -> bool:
    path = head.path
    if head.method != "PUT" or not path.startswith("/data/") or "/" in path[6:] or len(path) == 6:
        return False
    return media_type(head.headers.get(b"content-type")) == RAW


def wants_raw(accept: bytes | None) -> bool:
    """Whether an Accept names the raw form, and no form of JSON that it likes better. A wildcard names
    nothing: JSON is what every AReaL client can read. Source: RFC 9110, 12.5.1."""
    if accept is None or RAW not in accept.lower():
        return False
    liked = {RAW: 0.0, OCTETS: 0.0, JSON_TYPE: 0.0}
    for item in accept.split(b","):
        name, *parameters = (part.strip().lower() for part in item.split(b";"))
        if name in liked:
            weights = [_weight(p[2:]) for p in parameters if p.startswith(b"q=")]
            liked[name] = weights[0] if weights else 1.0
    return liked[RAW] > 0 and liked[RAW] >= max(liked[OCTETS], liked[JSON_TYPE])


def _weight(text: bytes) -> float:
    return float(text) if re.fullmatch(rb"[01](\.[0-9]{0,3})?", text) else 0.0


def _send(
    exchange: Exchange, found: Outgoing | RawOutgoing, content_type: bytes = OCTETS
) -> Awaitable[None] | None:
    """Answer with shards: at once if they are small, else as fast as the client takes them."""
    if found.size <= SENT_AT_ONCE:
        exchange.respond(200, found.whole(), content_type)
        return None
    return _stream(exchange, found, content_type)


async def _stream(exchange: Exchange, found: Outgoing | RawOutgoing, content_type: bytes) -> None:
    """The loop is left to others after every MiB of JSON, or 8 MiB of raw bytes, which cost it less, and
    whenever the client is slower."""
    try:
        exchange.start(200, content_type, size=found.size)
        turn = 0
        for piece in found.pieces():
            if isinstance(piece, list):
                exchange.write_all(piece)
                turn = SENT_A_TURN
            else:
                exchange.write(piece)
                turn += len(piece)
            await exchange.drain()
            if exchange.gone:
                exchange.fail()
                return
            if turn >= SENT_A_TURN:
                turn = 0
                await asyncio.sleep(0)
        exchange.finish()
    finally:
        found.close()


def _configure(exchange: Exchange) -> None:
    respond_json(exchange, {"status": "ok"})


def _shard_ids(exchange: Exchange) -> list[Any] | None:
    """The list in a JSON body `{"shard_ids": […]}` of JSON content type, or None."""
    kind = media_type(exchange.headers.get(b"content-type"))
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        return None
    try:
        fields = msgspec.json.decode(exchange.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    found = fields.get("shard_ids") if isinstance(fields, dict) else None
    return found if isinstance(found, list) else None
