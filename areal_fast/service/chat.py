"""One chat: from the body of POST /chat/completions to a committed record and its reply.

Order of a turn (the design page, "A chat turn"): parse; find and pin the session; take the turn's place in
it, before anything that waits; render and encode; set room aside; ask the engine; append the record; reply.
The append is the commit point: nothing that tells the client of success leaves before it, and when streaming
the finish_reason does not. Whatever fails before it leaves nothing behind in the session.

* The session is pinned from the lookup to the end, so no clean-up can take it away, however long the engine
  takes.
* A client that hangs up changes nothing: the engine's answer is still taken and recorded.
* Without a key, or with an unknown one, the chat is answered and not recorded; the admin key is `__hitl__`.
* A session removed while the engine worked: the client gets its answer, nobody has a place for the record.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from areal_fast.core import ArenaFull, Gone, IndexBusy
from areal_fast.engine import reply
from areal_fast.engine.answer import Answer, Piece, StreamedAnswer, whole_answer
from areal_fast.engine.detokenize import OutputRejected
from areal_fast.engine.errors import EngineFault
from areal_fast.engine.generate import Engine, Generation
from areal_fast.engine.sampling import MAX_TOTAL_TOKENS, sampling_from_chat, stable_seed
from areal_fast.engine.tokenizer import HfTokenizer, Prompt, TemplateFailed, Tokenizer
from areal_fast.engine.tools import ToolParsing
from areal_fast.errors import ExportBusy
from areal_fast.protocol.chat import BadChat, ChatRequest, decode_chat, with_object_arguments
from areal_fast.protocol.records import pack_words
from areal_fast.service import auth
from areal_fast.service.answers import NO_ENGINE, answer_error, refuse, when_free
from areal_fast.service.concat import Line
from areal_fast.service.meters import ORPHANED_CHATS, STANDALONE_CHATS, TURNS, count_generation
from areal_fast.service.retries import Flight, Retries, watch

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.service.external import Externals
    from areal_fast.service.log import Log
    from areal_fast.shards.routed import RoutedIntake
    from areal_fast.store import Session, SessionStore, Turn

STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
EVENT_STREAM = b"text/event-stream; charset=utf-8"


class Chats:
    """Serves chats. `engine` gives the engine in force now, or None if there is none."""

    def __init__(
        self,
        store: SessionStore,
        keys: auth.Keys,
        tokenizer: Tokenizer | None,
        engine: Callable[[], Engine | None],
        log: Log,
        externals: Externals,
        *,
        engine_max_tokens: int | None = None,
        max_total_tokens: int = MAX_TOTAL_TOKENS,
        concat: bool = False,
        tools: ToolParsing | None = None,
        object_arguments: bool = False,
        deterministic: bool = False,
    ) -> None:
        """`max_total_tokens`: prompt and answer together are never longer. `object_arguments`: tool-call
        arguments become objects before templating (dialect v2). `deterministic`: a recorded request without a
        seed gets a stable one (--deterministic-sampling)."""
        self._store = store
        self._keys = keys
        self._tokenizer = tokenizer
        self._engine = engine
        self._log = log
        self._externals = externals
        self._engine_max_tokens = engine_max_tokens
        self._max_total_tokens = max_total_tokens
        self._concat = concat
        self._tools = tools
        self._object_arguments = object_arguments
        self._deterministic = deterministic
        self._known = tokenizer.known if isinstance(tokenizer, HfTokenizer) and not concat else None
        if self._known is not None:
            self._known.object_arguments = object_arguments
        self._retries = Retries(store)
        self.in_flight = 0
        """Turns begun and not ended, those whose client has gone included."""

    async def serve(self, exchange: Exchange) -> None:
        """The whole life of one chat. Always answers."""
        call = self._externals.call_in(exchange.body)
        chat, prompt, engine = None, None, self._engine()
        if call is None:
            try:
                known = self._known.take(exchange.body) if self._known is not None else None
                chat, prompt = known or (decode_chat(exchange.body), None)
            except BadChat as error:
                refuse(exchange, 400, str(error))
                return
            if engine is None or self._tokenizer is None:
                refuse(exchange, 503, NO_ENGINE)
                return
        self.in_flight += 1
        session: Session | None = None
        try:
            try:
                session = self._session(exchange)
            except (IndexBusy, ExportBusy):
                session = await when_free(lambda: self._session(exchange))
            if session is None and self._is_admin(exchange):
                session = await when_free(self._store.hitl)
            if call is not None:
                await self._externals.forward(exchange, call, session)
            elif chat is not None and engine is not None and self._tokenizer is not None:
                await self._answer(exchange, chat, prompt, session, engine, self._tokenizer)
        except (BadChat, TemplateFailed) as error:
            refuse(exchange, 400, str(error))
        except (EngineFault, OutputRejected) as error:
            refuse(exchange, getattr(error, "status", 502), str(error))
        except Exception as error:
            answer_error(exchange, error, self._log)
        finally:
            self.in_flight -= 1
            if session is not None:
                session.release()

    async def prompt_tokens(self, body: bytes) -> int | None:
        """How many tokens a chat's prompt has by the template; None without an engine. Asks and records
        nothing. Raises BadChat, TemplateFailed (400)."""
        if self._tokenizer is None:
            return None
        return len(await self._prompt(decode_chat(body), self._tokenizer))

    async def _prompt(self, chat: ChatRequest, tokenizer: Tokenizer) -> Prompt:
        messages = with_object_arguments(chat.messages) if self._object_arguments else chat.messages
        return await tokenizer.prompt(messages, chat.tools, chat.template_kwargs)

    def _session(self, exchange: Exchange) -> Session | None:
        token = auth.bearer(exchange.headers.get(b"authorization"))
        return self._store.by_key(auth.as_text(token)) if token else None

    def _is_admin(self, exchange: Exchange) -> bool:
        token = auth.bearer(exchange.headers.get(b"authorization"))
        return token is not None and self._keys.is_admin(token)

    def _seed(self, session: Session, turn: Turn) -> int | None:
        """Of the turn's place in its session: the session's identity is its task, and its place in its group
        if it was started in one."""
        if not self._deterministic or turn.ordinal < 0:
            return None
        task, mark, number = session.session_id.rpartition("-")
        identity = task if mark and number.isdigit() else session.session_id
        member = session.state.member
        return stable_seed(identity if member < 0 else f"{identity}:{member}", turn.ordinal)

    async def _answer(
        self,
        exchange: Exchange,
        chat: ChatRequest,
        known: Prompt | None,
        session: Session | None,
        engine: Engine,
        tokenizer: Tokenizer,
    ) -> None:
        """From the record, if this is a repeat whose first reply was lost (retries.py), else by a turn.
        `known`: the chat's prompt, where it was made without its messages (engine/known.py)."""
        if session is None or not chat.wants_store:
            await self._turn(exchange, chat, known, session, engine, tokenizer, None)
            return
        one, twin = await self._retries.twin(session, exchange)
        if twin is None:
            with self._retries.flight(session, exchange, one) as flight:
                await self._turn(exchange, chat, known, session, engine, tokenizer, flight)
            return
        if self._concat:
            chat.stop = None
        prompt = Prompt.of(twin.ids[: twin.prompt_len])
        sampling = sampling_from_chat(
            chat,
            len(prompt),
            tokenizer.stop_ids,
            engine_max_tokens=self._engine_max_tokens,
            max_total_tokens=self._max_total_tokens,
        )
        generation = Generation(
            output_ids=array("i", twin.ids[twin.prompt_len :].tolist()),
            logprobs=array("f"),
            version_runs=[],
            stop_reason=twin.stop_reason,
            attempts=0,
        )
        leaving = watch(session, exchange, twin.place)
        if chat.wants_stream:
            answered = StreamedAnswer(chat, prompt, sampling, tokenizer, self._tools)
            stream = _Stream(exchange, twin.interaction_id, answered)
            stream.tokens(generation.output_ids.tolist())
            rest, reason = answered.finish(generation)
            stream.finish(rest, reason, len(prompt), len(generation.output_ids), leaving)
            return
        answer = whole_answer(generation, chat, prompt, sampling, tokenizer, self._tools)
        _respond(exchange, twin.interaction_id, answer, len(prompt), len(generation.output_ids), leaving)

    async def _turn(
        self,
        exchange: Exchange,
        chat: ChatRequest,
        known: Prompt | None,
        session: Session | None,
        engine: Engine,
        tokenizer: Tokenizer,
        flight: Flight | None,
    ) -> None:
        turn = None if session is None else session.begin_turn(reserve_tokens=0, store=chat.wants_store)
        routed: RoutedIntake | None = None
        try:
            line = Line(chat, turn) if self._concat else None
            prompt = known or await self._prompt(chat, tokenizer)
            if line is not None:
                prompt = line.prompt(prompt, tokenizer)
            sampling = sampling_from_chat(
                chat,
                len(prompt),
                tokenizer.stop_ids,
                engine_max_tokens=self._engine_max_tokens,
                max_total_tokens=self._max_total_tokens,
                seed=None if turn is None or session is None else self._seed(session, turn),
            )
            if turn is not None:
                turn.reserve(len(prompt) + sampling.max_new_tokens)
            if sampling.return_routed_experts:
                routed = None if turn is None else turn.routed_intake()
                if routed is None:  # nobody would keep them
                    sampling = msgspec.structs.replace(sampling, return_routed_experts=False)
            interaction_id = reply.new_interaction_id() if turn is None else turn.interaction_id
            if chat.wants_stream:
                answered = StreamedAnswer(chat, prompt, sampling, tokenizer, self._tools)
                stream = _Stream(exchange, interaction_id, answered)
                try:
                    generation = await engine.generate(
                        prompt, sampling, on_tokens=stream.tokens, routed=routed
                    )
                    rest, reason = answered.finish(generation)
                    said = line.messages_hash([*stream.said, rest]) if line is not None else b""
                    words = self._words(exchange.body, [*stream.said, rest])
                    experts = await _published(routed, len(prompt) + len(generation.output_ids))
                    self._commit(turn, prompt, generation, said, flight, words, experts)
                except (EngineFault, OutputRejected, ArenaFull) as error:
                    if not stream.fail(error):
                        raise
                    return
                leaving = flight.leaving if flight is not None else None
                stream.finish(rest, reason, len(prompt), len(generation.output_ids), leaving)
                return
            generation = await engine.generate(prompt, sampling, routed=routed)
            answer = whole_answer(generation, chat, prompt, sampling, tokenizer, self._tools)
            said = line.messages_hash([Piece(answer.content, answer.calls)]) if line is not None else b""
            words = self._words(exchange.body, [Piece(answer.content, answer.calls)])
            experts = await _published(routed, len(prompt) + len(generation.output_ids))
            self._commit(turn, prompt, generation, said, flight, words, experts)
            leaving = flight.leaving if flight is not None else None
            _respond(exchange, interaction_id, answer, len(prompt), len(generation.output_ids), leaving)
        finally:
            if routed is not None:
                routed.abandon()
            if turn is not None:
                turn.abandon()

    def _words(self, body: bytes, said: list[Piece]) -> bytes:
        """The chat as text, kept where external models exist: a trajectory that has interactions of both
        kinds is exported as text."""
        if not self._externals.names:
            return b""
        messages = decode_chat(body).messages
        return pack_words(msgspec.json.encode(messages), "".join(piece.content for piece in said))

    def _commit(
        self,
        turn: Turn | None,
        prompt: Prompt,
        generation: Generation,
        messages_hash: bytes,
        flight: Flight | None,
        words: bytes,
        routed: RoutedIntake | None,
    ) -> None:
        """COMMIT POINT of a chat: the append of its record. A kill before it leaves a session without the
        turn and a client without an answer; a kill after it, an interaction whose client may never have
        heard of it."""
        arena = self._store.arena
        count_generation(arena, len(prompt), generation)
        if turn is None:
            arena.count(STANDALONE_CHATS)
            return
        try:
            turn.commit(
                prompt_ids=prompt.data,
                output_ids=generation.output_ids,
                logprobs=generation.logprobs,
                version_runs=generation.version_runs,
                stop_reason=generation.stop_reason,
                messages_hash=messages_hash,
                body_hash=flight.body_hash if flight is not None else b"",
                extra=words,
                routed=None if routed is None else routed.result,
            )
            if routed is not None:
                routed.kept()
            if flight is not None:
                flight.recorded(turn.trajectory, turn.ordinal)
        except Gone:
            self._log.info(
                "session_gone_during_chat", session=turn.session_id, interaction=turn.interaction_id
            )
            arena.count(ORPHANED_CHATS)
        else:
            arena.count(TURNS if turn.ordinal >= 0 else STANDALONE_CHATS)


async def _published(routed: RoutedIntake | None, tokens: int) -> RoutedIntake | None:
    """The routed experts of a whole sequence, ready to be named by its record; None if there are none."""
    if routed is None or await routed.finish(tokens) is None:
        return None
    await when_free(routed.publish)
    return routed


def _respond(
    exchange: Exchange,
    interaction_id: str,
    answer: Answer,
    prompt_tokens: int,
    output_tokens: int,
    leaving: Callable[[], None] | None,
) -> None:
    body = reply.completion(
        interaction_id,
        int(time.time()),
        answer.content,
        answer.finish_reason,
        prompt_tokens,
        output_tokens,
        answer.calls,
    )
    if leaving is not None:
        leaving()
    exchange.respond(200, body)


class _Stream:
    """The reply of one streamed chat. It begins with the first text, so that what fails before has a
    status."""

    def __init__(self, exchange: Exchange, interaction_id: str, answer: StreamedAnswer) -> None:
        self._exchange = exchange
        self._chunks = reply.Chunks(interaction_id, int(time.time()))
        self._answer = answer
        self._started = False
        self.said: list[Piece] = []

    def tokens(self, ids: list[int]) -> None:
        """New ids from the engine: the text and the calls that are certain go out."""
        piece = self._answer.add(ids)
        if piece.content or piece.calls:
            self.said.append(piece)
        events = self._events(piece)
        if events:
            self._write(events)

    def _events(self, piece: Piece) -> bytes:
        content = self._chunks.content(piece.content) if piece.content else b""
        return content + b"".join(map(self._chunks.tool_call, piece.calls))

    def _write(self, event: bytes) -> None:
        if not self._started:
            self._started = True
            self._exchange.start(200, EVENT_STREAM, STREAM_HEADERS)
            event = self._chunks.role() + event
        self._exchange.write(event)

    def finish(
        self,
        rest: Piece,
        reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        leaving: Callable[[], None] | None,
    ) -> None:
        """After the commit: what was held back, the finish_reason, the end. `leaving` is told just before."""
        last = self._chunks.finish(reason, prompt_tokens, completion_tokens)
        events = self._events(rest) + last + reply.DONE
        if leaving is not None:
            leaving()
        self._write(events)
        self._exchange.finish()

    def fail(self, error: Exception) -> bool:
        """End a started stream with an error event and no [DONE]. False: not started, answer with a
        status."""
        if self._started:
            self._exchange.write(reply.error_event(str(error), getattr(error, "status", 507)))
            self._exchange.finish()
        return self._started
