"""The embedded engine's HTTP side: routes, and how an answer is let out (whole, streamed, broken, never).

A generation that takes no time is answered in the handler itself, without a task: this server is the
other end of benchmarks. Everything slower runs as a coroutine that waits in EmbeddedEngine.reach.

A client that hangs up aborts its generation, as SGLang does. Unknown paths are 404, wrong methods 405,
JSON that cannot be read 400; every error is JSON. Nothing here asks for a key: it answers nonsense to
whoever can reach it, so listen on a loopback address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import msgspec

import areal_fast
from areal_fast.embedded.engine import EmbeddedEngine, Fault, Generation
from areal_fast.embedded.forms import Asked, BadRequest, Completions, Generate
from areal_fast.http import Exchange

NOTICE = "areal_fast's embedded engine: made-up answers for trying, testing and benchmarking; not a model"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

_encode = msgspec.json.Encoder().encode
_Handler = Callable[[Exchange], Awaitable[None] | None]

WATCH_S = 0.1


def _gone(ex: Exchange) -> bool:
    """Whether nobody waits for the answer. The end of a client's sending side counts, as in uvicorn."""
    return ex.gone or ex.input_ended


def _when_gone(ex: Exchange, do: Callable[[], None]) -> Callable[[], None]:
    """Call `do` when the client hangs up. What is returned ends the watch."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def look() -> None:  # the end of the sending side comes without a call
        nonlocal timer
        timer = None if ex.gone else loop.call_later(WATCH_S, look)
        if ex.input_ended:
            do()

    look()
    ex.on_gone(do)
    return lambda: None if timer is None else timer.cancel()


class EmbeddedServer:
    """Serves one EmbeddedEngine: `handle` is the handler for areal_fast.http.Server."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.engine = engine
        self._words = engine.book.tokens.words
        post: dict[str, _Handler] = {
            "/generate": self._generate,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/abort_request": self._abort,
            "/flush_cache": lambda ex: self._ok(ex, message="Cache flushed."),
            "/update_weights_from_disk": self._update_weights,
            "/release_memory_occupation": lambda ex: self._sleep(ex, True),
            "/resume_memory_occupation": lambda ex: self._sleep(ex, False),
            "/v1/completions": self._completions,
            "/areal_pause_generation": self._pause,
            "/areal_continue_generation": self._continue,
            "/areal_update_weights": self._update_weights,
            "/sleep": lambda ex: self._sleep(ex, True),
            "/wake_up": lambda ex: self._sleep(ex, False),
            "/embedded/configure": self._configure,
        }
        get: dict[str, _Handler] = {
            "/health": lambda ex: self._ok(ex, embedded=True),
            "/health_generate": lambda ex: self._ok(ex, embedded=True),
            "/flush_cache": post["/flush_cache"],
            "/get_model_info": self._model_info,
            "/model_info": self._model_info,
            "/get_server_info": self._server_info,
            "/server_info": self._server_info,
            "/v1/models": self._models,
            "/is_sleeping": lambda ex: ex.respond(200, _encode({"is_sleeping": engine.asleep})),
            "/embedded/configure": lambda ex: ex.respond(200, _encode(engine.switches)),
            "/embedded/stats": self._stats,
        }
        self._routes = {("POST", path): handler for path, handler in post.items()}
        self._routes |= {("GET", path): handler for path, handler in get.items()}
        self._routes["PUT", "/generate"] = self._generate

    def handle(self, ex: Exchange) -> Awaitable[None] | None:
        """Answer one request, at once or by the coroutine returned."""
        handler = self._routes.get((ex.method, ex.path))
        if handler is not None:
            return handler(ex)
        allowed = sorted(method for method, path in self._routes if path == ex.path)
        if not allowed:
            ex.respond(404, _encode({"detail": "Not Found"}))
        else:
            headers = [(b"allow", ", ".join(allowed).encode())]
            ex.respond(405, _encode({"detail": "Method Not Allowed"}), headers=headers)
        return None

    # -- generating ----------------------------------------------------------------------------------------
    def _generate(self, ex: Exchange) -> Awaitable[None] | None:
        return self._serve(ex, Generate, self._words)

    def _completions(self, ex: Exchange) -> Awaitable[None] | None:
        return self._serve(ex, Completions, self._words, self.engine.book.eos_id)

    def _serve(
        self, ex: Exchange, form: type[Generate] | type[Completions], *args: Any
    ) -> Awaitable[None] | None:
        engine = self.engine
        fault = engine.next_fault()
        if engine.switches.keep_bodies:
            engine.bodies.append({"path": ex.path, "body": ex.body.decode("utf-8", "replace")})
        if fault is Fault.HANG:
            return self._hang(ex)
        if fault is Fault.FAIL:
            engine.stats.failed += 1
            status = engine.switches.fail_status
            ex.respond(status, form.error(status, "Failed as configured"))
            return None
        try:
            asked = form(ex.body, *args)
        except BadRequest as error:
            engine.stats.failed += 1
            ex.respond(400, form.error(400, str(error)))
            return None
        if engine.asleep:
            engine.stats.failed += 1
            ex.respond(503, form.error(503, "The engine sleeps: its memory is released"))
            return None
        answer = engine.answer(asked.prompt, asked.wanted)
        generation = engine.begin(asked.prompt_tokens, answer, fault, asked.rid)
        if engine.at_once and not asked.stream and fault is not Fault.DROP:
            engine.end(generation, "aborted" if generation.aborted else "completed")
            ex.respond(200, asked.whole(engine, generation))
            return None
        return self._play(ex, asked, generation, fault)

    async def _play(self, ex: Exchange, asked: Asked, generation: Generation, fault: Fault) -> None:
        """Answer in the time that the switches ask for. With Fault.DROP, break off half-way."""
        engine = self.engine
        outcome = "client_gone"
        engine.track(generation)
        unwatch = _when_gone(ex, lambda: engine.abort(generation, "Client is gone"))
        try:
            if fault is Fault.DROP:
                await self._drop(ex, asked, generation)
                outcome = "dropped"
            elif asked.stream:
                await self._stream(ex, asked, generation, 1 << 62)
            else:
                await engine.reach(generation, generation.end)
                if not _gone(ex):
                    ex.respond(200, asked.whole(engine, generation))
            if fault is not Fault.DROP and ex.finished:
                outcome = "aborted" if generation.aborted else "completed"
        finally:
            unwatch()
            ex.fail()  # for nobody: the client is gone, or this server stops
            engine.end(generation, outcome)

    async def _stream(self, ex: Exchange, asked: Asked, generation: Generation, most: int) -> bool:
        """Send events until the end, or until at least `most` tokens are out. Whether it came to the end."""
        engine = self.engine
        ex.start(200, EVENT_STREAM)
        sent = 0
        while not _gone(ex):
            reached = await engine.reach(generation, sent + engine.switches.chunk_tokens)
            if reached >= most and reached < generation.end:
                return False
            if reached > sent or reached == generation.end:
                ex.write(asked.event(engine, generation, sent, reached))
                sent = reached
            if sent == generation.end:
                ex.write(asked.last_events(generation))
                ex.finish()
                return True
            await ex.drain()
        return False

    async def _drop(self, ex: Exchange, asked: Asked, generation: Generation) -> None:
        """Break the connection: in the middle of a stream, before any byte of a plain answer."""
        half = max(1, generation.end // 2)
        if not asked.stream:
            await self.engine.reach(generation, half)
            ex.fail()
        elif not await self._stream(ex, asked, generation, half):
            ex.fail()

    async def _hang(self, ex: Exchange) -> None:
        self.engine.stats.hung += 1
        gone = asyncio.Event()
        unwatch = _when_gone(ex, gone.set)
        try:
            await gone.wait()
        finally:
            unwatch()
            ex.fail()

    # -- operating -----------------------------------------------------------------------------------------
    @staticmethod
    def _ok(ex: Exchange, **more: Any) -> None:
        ex.respond(200, _encode({"status": "ok", "success": True, **more}))

    @staticmethod
    def _body(ex: Exchange) -> dict[str, Any] | None:
        """The request's JSON object, {} for no body; None if it was answered 400."""
        if not ex.body.strip():
            return {}
        try:
            return msgspec.json.decode(ex.body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            ex.respond(400, _encode({"detail": f"not a JSON object: {error}"}))
            return None

    def _pause(self, ex: Exchange) -> None:
        body = self._body(ex)
        if body is not None:
            ended = self.engine.pause(str(body.get("mode", "abort")))
            self._ok(ex, message="Generation paused.", aborted=ended)

    def _continue(self, ex: Exchange) -> None:
        self.engine.resume()
        self._ok(ex, message="Generation continued.")

    def _abort(self, ex: Exchange) -> None:
        body = self._body(ex)
        if body is not None:
            self._ok(
                ex,
                aborted=self.engine.abort_requests(str(body.get("rid") or ""), body.get("abort_all") is True),
            )

    def _update_weights(self, ex: Exchange) -> None:
        body = self._body(ex)
        if body is not None:
            version = body.get("weight_version")
            path = body.get("model_path") or body.get("path") or ""
            self.engine.update_weights(str(path), None if version is None else str(version))
            self._ok(ex, message="Weights updated.", weight_version=self.engine.weight_version)

    def _sleep(self, ex: Exchange, asleep: bool) -> None:
        body = self._body(ex)
        if body is not None:
            tags = body.get("tags") or parse_qs(ex.query).get("tags")
            self.engine.asleep = asleep
            self._ok(ex, tags=tags)

    def _model_info(self, ex: Exchange) -> None:
        engine = self.engine
        book = engine.book
        about = {
            "model_path": engine.model_path,
            "tokenizer_path": "builtin:bytes" if book.tokens.words else None,
            "is_generation": True,
            "weight_version": engine.weight_version,
            "eos_token_id": book.eos_id,
            "notice": NOTICE,
        }
        ex.respond(200, _encode(about))

    def _server_info(self, ex: Exchange) -> None:
        engine = self.engine
        about = {"version": areal_fast.__version__, "notice": NOTICE, "model_path": engine.model_path}
        ex.respond(200, _encode({**about, "switches": engine.switches, "status": "ready"}))

    def _models(self, ex: Exchange) -> None:
        model = {
            "id": "embedded",
            "object": "model",
            "created": 0,
            "owned_by": "areal_fast",
            "notice": NOTICE,
        }
        ex.respond(200, _encode({"object": "list", "data": [model]}))

    def _configure(self, ex: Exchange) -> None:
        body = self._body(ex)
        if body is None:
            return
        try:
            self.engine.configure(body)
        except msgspec.ValidationError as error:
            ex.respond(400, _encode({"detail": str(error)}))
            return
        ex.respond(200, _encode(self.engine.switches))

    def _stats(self, ex: Exchange) -> None:
        engine = self.engine
        now = {
            "in_flight": len(engine.in_flight),
            "paused": engine.paused,
            "asleep": engine.asleep,
            "weight_version": engine.weight_version,
            "bodies": list(engine.bodies),
        }
        ex.respond(200, _encode({**msgspec.structs.asdict(engine.stats), **now}))
