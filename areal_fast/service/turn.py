"""One chat turn: from a chat that was read to a committed record and its reply.

Order of a turn (the design page, "A chat turn"): find and pin the session; take the turn's place in it,
before anything that waits; render and encode; set room aside; ask the engine; append the record; reply. The
append is the commit point: nothing that tells the client of success leaves before it, and when streaming the
finish_reason does not. Whatever fails before it leaves nothing behind in the session.

An ordinary turn has no task. `begin` runs it within the server's call up to the engine's request, and
`_answered` within the engine connection's call from the answer to the reply; between the two nothing of it is
on any stack. What is not ordinary is found by the step that meets it, and the turn goes on in `_rest`, a
coroutine, from the state in which it is then:

  a streamed answer                              with nothing taken
  the index or an export is busy                 with nothing taken
  a twin in flight, or one that is told again    with its session
  a prompt whose new text is long                with its place
  routed experts; the engine is paused           with its room
  the engine was interrupted in its answer       with what that brought

Invariants: `_close` runs once, last, however a turn ends; until then the session is pinned (so no clean-up
can take it away, however long the engine takes) and the turn is counted in `chats.in_flight`. Each step is
done once: what it made (session, flight, turn, sampling, first) says so. A client that hangs up changes
nothing.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from areal_fast.core import ArenaFull, Gone, IndexBusy
from areal_fast.engine import reply
from areal_fast.engine.answer import Answer, Piece, StreamedAnswer, whole_answer
from areal_fast.engine.detokenize import OutputRejected
from areal_fast.engine.errors import EngineFault
from areal_fast.engine.generate import Engine, First, Generation
from areal_fast.engine.sampling import Sampling, sampling_from_chat, stable_seed
from areal_fast.engine.tokenizer import Prompt, TemplateFailed, Tokenizer
from areal_fast.errors import ExportBusy
from areal_fast.protocol.chat import BadChat, ChatRequest, decode_chat
from areal_fast.protocol.records import pack_words
from areal_fast.service.answers import answer_error, refuse, when_free
from areal_fast.service.concat import Line
from areal_fast.service.meters import ORPHANED_CHATS, STANDALONE_CHATS, TURNS, count_generation
from areal_fast.service.retries import Flight, watch

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.service.chat import Chats
    from areal_fast.service.log import Log
    from areal_fast.shards.routed import RoutedIntake
    from areal_fast.store import Session, Turn
    from areal_fast.store.session import Twin

STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
EVENT_STREAM = b"text/event-stream; charset=utf-8"


def refuse_chat(exchange: Exchange, error: Exception, log: Log) -> None:
    """Answer with what a chat's failure stands for."""
    if isinstance(error, (BadChat, TemplateFailed)):
        refuse(exchange, 400, str(error))
    elif isinstance(error, (EngineFault, OutputRejected)):
        refuse(exchange, getattr(error, "status", 502), str(error))
    else:
        answer_error(exchange, error, log)


class ChatTurn:
    """See above. Made for one exchange, begun once."""

    __slots__ = (
        "_chat",
        "_chats",
        "_engine",
        "_exchange",
        "_first",
        "_flight",
        "_found",
        "_line",
        "_making",
        "_prompt",
        "_routed",
        "_sampling",
        "_session",
        "_tokenizer",
        "_turn",
    )

    def __init__(
        self,
        chats: Chats,
        exchange: Exchange,
        chat: ChatRequest,
        prompt: Prompt | None,
        engine: Engine,
        tokenizer: Tokenizer,
    ) -> None:
        """`prompt`: the chat's, where it was made without its messages (engine/known.py)."""
        self._chats = chats
        self._exchange = exchange
        self._chat = chat
        self._prompt = prompt
        self._engine = engine
        self._tokenizer = tokenizer
        self._found = False
        self._session: Session | None = None
        self._flight: Flight | None = None
        self._turn: Turn | None = None
        self._line: Line | None = None
        self._making: Awaitable[Prompt] | None = None
        self._sampling: Sampling | None = None
        self._routed: RoutedIntake | None = None
        self._first: First | None = None

    # The ordinary way

    def begin(self) -> Awaitable[None] | None:
        """Serve it. None: it has been answered, or will be when the engine has answered (the exchange is
        deferred); else the rest is to be awaited. Always answers."""
        self._chats.in_flight += 1
        try:
            if not self._chat.wants_stream and self._find() and self._take_off():
                self._take_place()
                prompt = self._render()
                if prompt is not None:
                    sampling = self._budget(prompt)
                    if not sampling.return_routed_experts:
                        self._first = self._engine.begin(prompt, sampling, self._answered)
                        if self._first is not None:
                            self._exchange.defer()
                            return None
            return self._rest()
        except Exception as error:
            try:
                self._fail(error)
            finally:
                self._close()
        return None

    def _answered(self, _: object) -> None:
        """The engine has answered, or will not. Nothing is raised into its connection."""
        try:
            goes_on = False
            try:
                goes_on = not self._end()
            finally:
                if not goes_on:
                    self._close()
            if goes_on:
                self._exchange.go_on(self._rest())
        except Exception as error:
            self._exchange.fault(error)

    def _end(self) -> bool:
        """Record and reply. False: the engine was interrupted."""
        assert self._first is not None
        try:
            generation = self._first.generation()
            if generation is None:
                return False
            answer = self._answer(generation)
            self._commit(generation, self._said_whole(answer), None)
            self._respond(answer, generation)
        except Exception as error:
            self._fail(error)
        return True

    # The general way

    async def _rest(self) -> None:
        """Whatever is not done yet."""
        chats, chat, exchange = self._chats, self._chat, self._exchange
        try:
            if not self._found:
                await when_free(self._look_up)
            session = self._session
            if session is not None and chat.wants_store and self._flight is None:
                one = chats.retries.asked(exchange)
                while (earlier := chats.retries.twin_in_flight(session, one)) is not None:
                    await earlier.landed()
                twin = session.twin(one)
                if twin is not None:
                    self._tell_again(session, twin)
                    return
                self._flight = chats.retries.flight(session, exchange, one)
            if self._turn is None:
                self._take_place()
            prompt = self._render()
            if prompt is None:
                assert self._making is not None
                prompt = self._rendered(await self._making)
            if self._sampling is None:
                self._budget(prompt)
            await self._generate(prompt)
        except Exception as error:
            self._fail(error)
        finally:
            self._close()

    async def _generate(self, prompt: Prompt) -> None:
        sampling = self._sampling
        assert sampling is not None
        if sampling.return_routed_experts and self._routed is None:
            self._routed = None if self._turn is None else self._turn.routed_intake()
            if self._routed is None:  # nobody would keep them
                self._sampling = sampling = msgspec.structs.replace(sampling, return_routed_experts=False)
        if self._chat.wants_stream:
            await self._stream(prompt, sampling)
            return
        generation = await self._engine.generate(prompt, sampling, routed=self._routed, first=self._first)
        answer = self._answer(generation)
        self._commit(generation, self._said_whole(answer), await self._published(generation))
        self._respond(answer, generation)

    async def _stream(self, prompt: Prompt, sampling: Sampling) -> None:
        answered = StreamedAnswer(self._chat, prompt, sampling, self._tokenizer, self._chats.tools)
        stream = _Stream(self._exchange, self._interaction_id(), answered)
        try:
            generation = await self._engine.generate(
                prompt, sampling, on_tokens=stream.tokens, routed=self._routed
            )
            rest, reason = answered.finish(generation)
            said = self._said([*stream.said, rest])
            self._commit(generation, said, await self._published(generation))
        except (EngineFault, OutputRejected, ArenaFull) as error:
            if not stream.fail(error):
                raise
            return
        leaving = self._flight.leaving if self._flight is not None else None
        stream.finish(rest, reason, len(prompt), len(generation.output_ids), leaving)

    def _tell_again(self, session: Session, twin: Twin) -> None:
        """A repeat whose first reply was lost: from the record, whole or streamed as it asks."""
        chats, chat, exchange, tokenizer = self._chats, self._chat, self._exchange, self._tokenizer
        if chats.concat:
            chat.stop = None
        prompt = Prompt.of(twin.ids[: twin.prompt_len])
        sampling = sampling_from_chat(
            chat,
            len(prompt),
            tokenizer.stop_ids,
            engine_max_tokens=chats.engine_max_tokens,
            max_total_tokens=chats.max_total_tokens,
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
            answered = StreamedAnswer(chat, prompt, sampling, tokenizer, chats.tools)
            stream = _Stream(exchange, twin.interaction_id, answered)
            stream.tokens(generation.output_ids.tolist())
            rest, reason = answered.finish(generation)
            stream.finish(rest, reason, len(prompt), len(generation.output_ids), leaving)
            return
        answer = whole_answer(generation, chat, prompt, sampling, tokenizer, chats.tools)
        _respond(exchange, twin.interaction_id, answer, len(prompt), len(generation.output_ids), leaving)

    # Steps

    def _look_up(self) -> None:
        """The session of the request's key, if there is one: pinned. IndexBusy, ExportBusy."""
        self._session = self._chats.session(self._exchange)
        self._found = True

    def _find(self) -> bool:
        """`_look_up`, unless it must wait."""
        try:
            self._look_up()
        except (IndexBusy, ExportBusy):
            return False
        return True

    def _take_off(self) -> bool:
        """If the chat will be recorded: be seen by its twins. False: it has one (retries.py)."""
        session = self._session
        if session is None or not self._chat.wants_store:
            return True
        retries = self._chats.retries
        one = retries.asked(self._exchange)
        if retries.twin_in_flight(session, one) is not None or session.twin(one) is not None:
            return False
        self._flight = retries.flight(session, self._exchange, one)
        return True

    def _take_place(self) -> None:
        if self._session is not None:
            self._turn = self._session.begin_turn(reserve_tokens=0, store=self._chat.wants_store)
        if self._chats.concat:
            self._line = Line(self._chat, self._turn)

    def _render(self) -> Prompt | None:
        """The prompt; None: it takes long, and `_making` must be awaited. TemplateFailed, BadChat."""
        if self._prompt is None and self._making is None:
            made = self._chats.prompt(self._chat, self._tokenizer)
            if isinstance(made, Prompt):
                return self._rendered(made)
            self._making = made
        return self._prompt

    def _rendered(self, whole: Prompt) -> Prompt:
        self._prompt = prompt = whole if self._line is None else self._line.prompt(whole, self._tokenizer)
        return prompt

    def _budget(self, prompt: Prompt) -> Sampling:
        """What the engine is asked for, and room for it. ArenaFull."""
        chats, turn = self._chats, self._turn
        self._sampling = sampling = sampling_from_chat(
            self._chat,
            len(prompt),
            self._tokenizer.stop_ids,
            engine_max_tokens=chats.engine_max_tokens,
            max_total_tokens=chats.max_total_tokens,
            seed=self._seed() if chats.deterministic else None,
        )
        if turn is not None:
            turn.reserve(len(prompt) + sampling.max_new_tokens)
        return sampling

    def _seed(self) -> int | None:
        """Of the turn's place in its session: the session's identity is its task, and its place in its group
        if it was started in one."""
        session, turn = self._session, self._turn
        if session is None or turn is None or turn.ordinal < 0:
            return None
        task, mark, number = session.session_id.rpartition("-")
        identity = task if mark and number.isdigit() else session.session_id
        member = session.state.member
        return stable_seed(identity if member < 0 else f"{identity}:{member}", turn.ordinal)

    def _interaction_id(self) -> str:
        return reply.new_interaction_id() if self._turn is None else self._turn.interaction_id

    def _answer(self, generation: Generation) -> Answer:
        """What the engine said. OutputRejected."""
        assert self._prompt is not None and self._sampling is not None
        return whole_answer(
            generation, self._chat, self._prompt, self._sampling, self._tokenizer, self._chats.tools
        )

    def _said_whole(self, answer: Answer) -> tuple[bytes, bytes]:
        """`_said` of an answer in one piece."""
        if self._line is None and not self._chats.externals.names:
            return b"", b""
        return self._said([Piece(answer.content, answer.calls)])

    def _said(self, pieces: list[Piece]) -> tuple[bytes, bytes]:
        """Of the answer, for the record: the conversation's hash with it (concat), and the chat as text. That
        is kept where external models exist: a trajectory that has interactions of both kinds is exported as
        text."""
        messages_hash = self._line.messages_hash(pieces) if self._line is not None else b""
        if not self._chats.externals.names:
            return messages_hash, b""
        messages = decode_chat(self._exchange.body).messages
        words = pack_words(msgspec.json.encode(messages), "".join(piece.content for piece in pieces))
        return messages_hash, words

    async def _published(self, generation: Generation) -> RoutedIntake | None:
        """The routed experts of the whole sequence, ready to be named by its record; None if there are
        none."""
        routed, prompt = self._routed, self._prompt
        assert prompt is not None
        if routed is None or await routed.finish(len(prompt) + len(generation.output_ids)) is None:
            return None
        await when_free(routed.publish)
        return routed

    def _commit(self, generation: Generation, said: tuple[bytes, bytes], routed: RoutedIntake | None) -> None:
        """COMMIT POINT of a chat: the append of its record. A kill before it leaves a session without the
        turn and a client without an answer; a kill after it, an interaction whose client may never have
        heard of it. A session removed while the engine worked: the client gets its answer, nobody has a place
        for the record."""
        arena, turn, flight, prompt = self._chats.store.arena, self._turn, self._flight, self._prompt
        assert prompt is not None
        count_generation(arena, len(prompt), generation)
        if turn is None:
            arena.count(STANDALONE_CHATS)
            return
        messages_hash, words = said
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
            self._chats.log.info(
                "session_gone_during_chat", session=turn.session_id, interaction=turn.interaction_id
            )
            arena.count(ORPHANED_CHATS)
        else:
            arena.count(TURNS if turn.ordinal >= 0 else STANDALONE_CHATS)

    def _respond(self, answer: Answer, generation: Generation) -> None:
        leaving = self._flight.leaving if self._flight is not None else None
        assert self._prompt is not None
        prompt_tokens, output_tokens = len(self._prompt), len(generation.output_ids)
        _respond(self._exchange, self._interaction_id(), answer, prompt_tokens, output_tokens, leaving)

    # Ends

    def _fail(self, error: Exception) -> None:
        self._leave()
        refuse_chat(self._exchange, error, self._chats.log)

    def _leave(self) -> None:
        """Give back what was for the record, unless that was made."""
        routed, self._routed = self._routed, None
        flight, self._flight = self._flight, None
        try:
            if routed is not None:
                routed.abandon()
        finally:
            if self._turn is not None:
                self._turn.abandon()
            if flight is not None:
                flight.ended()

    def _close(self) -> None:
        try:
            self._leave()
        finally:
            self._chats.in_flight -= 1
            if self._session is not None:
                self._session.release()


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
