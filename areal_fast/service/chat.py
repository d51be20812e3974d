"""Chats: from the body of POST /chat/completions to the turn that it is (turn.py).

* Without a key, or with an unknown one, the chat is answered and not recorded; the admin key is `__hitl__`.
* A chat that names an external model is forwarded (external.py).
* A client that hangs up changes nothing: the engine's answer is still taken and recorded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from areal_fast.engine.generate import Engine
from areal_fast.engine.sampling import MAX_TOTAL_TOKENS
from areal_fast.engine.tokenizer import HfTokenizer, Prompt, Tokenizer
from areal_fast.engine.tools import ToolParsing
from areal_fast.protocol.chat import BadChat, ChatRequest, decode_chat, with_object_arguments
from areal_fast.service import auth
from areal_fast.service.answers import NO_ENGINE, refuse, when_free
from areal_fast.service.retries import Retries
from areal_fast.service.turn import ChatTurn, refuse_chat

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.service.external import ExternalCall, Externals
    from areal_fast.service.log import Log
    from areal_fast.store import Session, SessionStore


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
        self.store = store
        self._keys = keys
        self._tokenizer = tokenizer
        self._engine = engine
        self.log = log
        self.externals = externals
        self.engine_max_tokens = engine_max_tokens
        self.max_total_tokens = max_total_tokens
        self.concat = concat
        self.tools = tools
        self._object_arguments = object_arguments
        self.deterministic = deterministic
        self._known = tokenizer.known if isinstance(tokenizer, HfTokenizer) and not concat else None
        self.retries = Retries(store)
        self.in_flight = 0
        """Turns begun and not ended, those whose client has gone included."""

    def serve(self, exchange: Exchange) -> Awaitable[None] | None:
        """The whole life of one chat, as http.Server's handler. Always answers."""
        call = self.externals.call_in(exchange.body)
        if call is not None:
            return self._forward(exchange, call)
        engine, tokenizer = self._engine(), self._tokenizer
        try:
            known = self._known.take(exchange.body) if self._known is not None else None
            chat, prompt = known or (decode_chat(exchange.body), None)
        except BadChat as error:
            refuse(exchange, 400, str(error))
            return None
        if engine is None or tokenizer is None:
            refuse(exchange, 503, NO_ENGINE)
            return None
        return ChatTurn(self, exchange, chat, prompt, engine, tokenizer).begin()

    async def _forward(self, exchange: Exchange, call: ExternalCall) -> None:
        self.in_flight += 1
        session: Session | None = None
        try:
            session = await when_free(lambda: self.session(exchange))
            await self.externals.forward(exchange, call, session)
        except Exception as error:
            refuse_chat(exchange, error, self.log)
        finally:
            self.in_flight -= 1
            if session is not None:
                session.release()

    async def prompt_tokens(self, body: bytes) -> int | None:
        """How many tokens a chat's prompt has by the template; None without an engine. Asks and records
        nothing. Raises BadChat, TemplateFailed (400)."""
        if self._tokenizer is None:
            return None
        made = self.prompt(decode_chat(body), self._tokenizer)
        return len(made if isinstance(made, Prompt) else await made)

    def prompt(self, chat: ChatRequest, tokenizer: Tokenizer) -> Prompt | Awaitable[Prompt]:
        """By the template. TemplateFailed."""
        messages = with_object_arguments(chat.messages) if self._object_arguments else chat.messages
        return tokenizer.prompt(messages, chat.tools, chat.template_kwargs)

    def session(self, exchange: Exchange) -> Session | None:
        """Where the chat belongs, pinned: its key's session, or the admin's. IndexBusy, ExportBusy: later."""
        token = auth.bearer(exchange.headers.get(b"authorization"))
        if not token:
            return None
        session = self.store.by_key(auth.as_text(token))
        if session is None and self._keys.is_admin(token):
            return self.store.hitl()
        return session
